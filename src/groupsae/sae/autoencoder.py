"""One sparse autoencoder, shared by the member layers of its group."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn

from groupsae.architectures import ARCHITECTURES, BY_BATCH, BY_COUNT, check_option
from groupsae.errors import InputError
from groupsae.files import load_tensors, replacing, save_tensors, write_json
from groupsae.sae.sparsity import Latents, batch_cut, positive, topk

if TYPE_CHECKING:
    from groupsae.sae.layer import LayerSAE

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae.safetensors"

_ENOUGH = 256  # rows to fit one number to
_SHORT = 0.05  # norm of an encoder's rows at the start, under an L1 penalty

Members: TypeAlias = int | Int[Tensor, "*token"] | None


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE is, as written in `cfg.json` beside its weights.

    Attributes:
        architecture: The sparsity rule: see :mod:`groupsae.sae.sparsity`.
        k: Active latents per token: exactly (topk) or on average over a batch.
        prefixes: matryoshka: how many latents each nested dictionary has; the last has all.
        target_l0: jumprelu: the L0 that training aims at; None: the L0 itself is the penalty.
        bandwidth: jumprelu: width of the straight-through estimators' rectangle.
        initial_threshold: jumprelu: every latent's threshold at the start.
        per_layer_threshold: Each member layer has thresholds, k or target_l0 for itself.
        learned_affine: What else each member layer learns of its own: "none", a "bias" on the
            latents, or a "gain" on every dimension of input and output.
    """

    d_model: int
    d_sae: int
    layers: tuple[int, ...]
    architecture: str = "topk"
    k: int | None = None
    prefixes: tuple[int, ...] | None = None
    target_l0: float | None = None
    bandwidth: float | None = None
    initial_threshold: float | None = None
    per_layer_threshold: bool = False
    learned_affine: str = "none"

    def __post_init__(self) -> None:
        """Refuse what cannot work, or does not go together."""
        if self.architecture not in ARCHITECTURES:
            raise InputError(
                f"sae.architecture: {self.architecture!r} is not known here; known are "
                f"{', '.join(ARCHITECTURES)}"
            )
        if not self.layers:
            raise InputError("sae.layers: an SAE needs at least one member layer")
        for name in ("k", "prefixes", "target_l0", "bandwidth", "initial_threshold"):
            check_option(f"sae.{name}", getattr(self, name), self.architecture)
        check_option("sae.per_layer_threshold", self.per_layer_threshold, self.architecture)
        self._check_there("k", BY_COUNT)
        self._check_there("prefixes", ("matryoshka",))
        self._check_there("bandwidth", ("jumprelu",))
        self._check_there("initial_threshold", ("jumprelu",))
        if self.k is not None and not 1 <= self.k <= self.d_sae:
            raise InputError(f"sae.k: {self.k} must lie between 1 and d_sae = {self.d_sae}")
        if self.target_l0 is not None and not 0 < self.target_l0 <= self.d_sae:
            raise InputError(
                f"sae.target_l0: {self.target_l0} must lie between 0 and d_sae = {self.d_sae}"
            )
        ends = self.prefixes
        if ends is not None and (ends[-1:] != (self.d_sae,) or sorted({*ends, 0}) != [0, *ends]):
            raise InputError(
                f"sae.prefixes: {ends} must rise from at least 1 to d_sae = {self.d_sae}"
            )
        for name in ("bandwidth", "initial_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"sae.{name}: {value} must be a positive number")
        if self.learned_affine not in ("none", "bias", "gain"):
            raise InputError(
                f"sae.learned_affine: {self.learned_affine!r} must be none, bias or gain"
            )

    def _check_there(self, name: str, architectures: tuple[str, ...]) -> None:
        if self.architecture in architectures and getattr(self, name) is None:
            raise InputError(f"sae.{name}: an SAE of architecture {self.architecture} needs one")


class SAE(nn.Module):
    """A sparse autoencoder with one pair of weight matrices for all its member layers.

    Each member layer l brings its own mean m_l and scale s_l; the weights see s_l (x - m_l):

        z     = activation(W_enc (s_l (x - m_l) - b_dec) + b_enc)
        x_hat = (W_dec^T z + b_dec) / s_l + m_l

    The activation is the sparsity rule's: TopK(relu(.)), a threshold, a gate. With a learned bias
    c_l, W_enc (.) + c_l takes the place of W_enc (.); with learned gains g_l and h_l,
    g_l s_l (x - m_l) that of s_l (x - m_l), and h_l (W_dec^T z + b_dec) that of the decoder's
    output. They are vectors of each member layer; c_l starts at 0, the gains at 1.

    Rows of `W_enc` and `W_dec` belong to latents. Rows of `W_dec` have unit norm at the start and
    after every training step; `W_enc` starts equal to `W_dec` (the decoder's transpose, in the
    papers' orientation; :meth:`fit_encoder` gives it a better size) and the biases start at 0. This
    start: Group-SAE (arXiv 2410.21508 v2, section 3) after Gao et al. 2024 (arXiv 2406.04093).

    Args:
        config: Sizes and member layers.
        mean: m_l for each member layer, in their order; zeros if left out.
        scale: s_l for each member layer, > 0; ones if left out.
        generator: Source of the random start.
    """

    def __init__(
        self,
        config: SAEConfig,
        *,
        mean: Float[Tensor, "layer d_model"] | None = None,
        scale: Float[Tensor, " layer"] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        directions = torch.randn(config.d_sae, config.d_model, generator=generator)
        directions = F.normalize(directions, dim=1)
        self.W_enc = nn.Parameter(directions.clone())
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.W_dec = nn.Parameter(directions)
        self.b_dec = nn.Parameter(torch.zeros(config.d_model))
        members = len(config.layers)
        if config.architecture == "gated":  # its b_enc belongs to the magnitudes
            self.r_mag = nn.Parameter(torch.zeros(config.d_sae))
            self.b_gate = nn.Parameter(torch.zeros(config.d_sae))
        if config.initial_threshold is not None:
            rows = members if config.per_layer_threshold else 1
            start = math.log(config.initial_threshold)
            self.log_threshold = nn.Parameter(torch.full((rows, config.d_sae), start))
        if config.architecture in BY_BATCH:
            self.threshold: Tensor
            self.register_buffer("threshold", torch.zeros(members))
        if config.learned_affine == "bias":
            self.latent_bias = nn.Parameter(torch.zeros(members, config.d_sae))
        if config.learned_affine == "gain":
            self.gain_in = nn.Parameter(torch.ones(members, config.d_model))
            self.gain_out = nn.Parameter(torch.ones(members, config.d_model))
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer(
            "mean", torch.zeros(members, config.d_model) if mean is None else mean.float().clone()
        )
        self.register_buffer(
            "scale", torch.ones(members) if scale is None else scale.float().clone()
        )
        if self.mean.shape != (members, config.d_model) or self.scale.shape != (members,):
            raise InputError(
                f"an SAE of {members} layers and d_model = {config.d_model} cannot take means of "
                f"shape {tuple(self.mean.shape)} and scales of shape {tuple(self.scale.shape)}"
            )
        if not bool((self.scale > 0).all()):
            raise InputError("the scale of a layer must be positive")

    @property
    def layers(self) -> tuple[int, ...]:
        """The member layers, from below."""
        return self.config.layers

    def member(self, layer: int) -> int:
        """Position of `layer` among the member layers.

        Raises:
            InputError: If it is none of them.
        """
        try:
            return self.config.layers.index(layer)
        except ValueError:
            raise InputError(
                f"layer {layer} is no member of this SAE; its layers are "
                f"{', '.join(map(str, self.config.layers))}"
            ) from None

    def at(self, layer: int) -> LayerSAE:
        """The SAE as one of its member layers sees it: `encode(x)` instead of `encode(x, layer)`.

        Raises:
            InputError: If the layer is no member.
        """
        from groupsae.sae.layer import LayerSAE

        return LayerSAE(self, layer)

    def encode(self, x: Float[Tensor, "*token d_model"], layer: int) -> Latents:
        """The active latents of residual streams x of `layer`."""
        return self.encode_normalized(self.normalize(x, layer), self.member(layer))

    def decode(self, latents: Latents, layer: int) -> Float[Tensor, "*token d_model"]:
        """Reconstruct residual streams of `layer` from latents."""
        return self.denormalize(self.decode_normalized(latents, self.member(layer)), layer)

    def forward(self, x: Float[Tensor, "*token d_model"], layer: int) -> Tensor:
        """Reconstruct x, residual streams of `layer`: decode(encode(x)), in x's dtype."""
        return self.decode(self.encode(x, layer), layer).to(x.dtype)

    def normalize(
        self, x: Float[Tensor, "*token d_model"], layer: int
    ) -> Float[Tensor, "*token d_model"]:
        """s_l (x - m_l), in the weights' dtype."""
        member = self.member(layer)
        return (x.to(self.W_enc.dtype) - self.mean[member]) * self.scale[member]

    def denormalize(
        self, x: Float[Tensor, "*token d_model"], layer: int
    ) -> Float[Tensor, "*token d_model"]:
        """x / s_l + m_l: the inverse of :meth:`normalize`."""
        member = self.member(layer)
        return x / self.scale[member] + self.mean[member]

    def encode_normalized(
        self, x: Float[Tensor, "*token d_model"], members: Members = None
    ) -> Latents:
        """The active latents of normalised residual streams.

        Args:
            members: Position among the member layers, of all tokens or of each. It may be left out
                where nothing depends on it.
        """
        products = self.products(x, members)
        pre_activations = products + self.b_enc
        if self.config.architecture == "gated":
            magnitudes = torch.relu(self.r_mag.exp() * products + self.b_enc)
            return positive(magnitudes * (products + self.b_gate > 0))
        if self.config.k is not None and self.config.architecture == "topk":
            return topk(pre_activations, self.config.k)
        threshold = self.thresholds(members)
        return positive(torch.relu(pre_activations) * (pre_activations > threshold))

    def decode_normalized(
        self, latents: Latents, members: Members = None
    ) -> Float[Tensor, "*token d_model"]:
        """Reconstruct normalised residual streams: the sum of the active decoder rows.

        Args:
            members: As in :meth:`encode_normalized`.
        """
        shape = latents.indices.shape
        rows = F.embedding_bag(
            latents.indices.reshape(-1, shape[-1]),
            self.W_dec,
            per_sample_weights=latents.values.reshape(-1, shape[-1]),
            mode="sum",
        )
        return self.outputs(rows.reshape(*shape[:-1], self.config.d_model), members)

    def inputs(
        self, x: Float[Tensor, "*token d_model"], members: Members = None
    ) -> Float[Tensor, "*token d_model"]:
        """What the encoder's product is taken of, for normalised residual streams."""
        if self.config.learned_affine == "gain":
            x = x * self.of_member(self.gain_in, members)
        return x - self.b_dec

    def products(
        self, x: Float[Tensor, "*token d_model"], members: Members = None
    ) -> Float[Tensor, "*token d_sae"]:
        """The encoder's product and its layer's bias, for normalised residual streams."""
        products = F.linear(self.inputs(x, members), self.W_enc)
        if self.config.learned_affine == "bias":
            products = products + self.of_member(self.latent_bias, members)
        return products

    def outputs(
        self, rows: Float[Tensor, "*token d_model"], members: Members = None
    ) -> Float[Tensor, "*token d_model"]:
        """Normalised reconstructions, from sums of decoder rows."""
        if self.config.learned_affine == "gain":
            return (rows + self.b_dec) * self.of_member(self.gain_out, members)
        return rows + self.b_dec

    def thresholds(self, members: Members = None) -> Float[Tensor, "*shared d_sae_or_1"]:
        """What a pre-activation must exceed at inference: of each latent, or one for all."""
        if self.config.architecture == "jumprelu":
            shared = not self.config.per_layer_threshold
            return self.of_member(self.log_threshold, 0 if shared else members).exp()
        if self.config.architecture in BY_BATCH:
            return self.of_member(self.threshold.unsqueeze(1), members)
        return self.b_enc.new_zeros(1)

    def check_given(self, members: Members) -> None:
        """Refuse tokens of unknown layers where it makes a difference.

        Raises:
            InputError: If they are left out and there are several member layers.
        """
        if members is None and len(self.layers) > 1:
            raise InputError("this SAE treats its member layers differently: say which they are")

    def of_member(self, values: Float[Tensor, "member n"], members: Members) -> Tensor:
        """The rows of a per-layer parameter that belong to these tokens.

        Raises:
            InputError: As in :meth:`check_given`.
        """
        self.check_given(members)
        return values[0 if members is None else members]

    def sharing(self, members: Int[Tensor, " token"] | None) -> Int[Tensor, " token"] | None:
        """Which tokens of a batch share thresholds, k or target_l0: those of a number; None: all.

        Raises:
            InputError: As in :meth:`check_given`.
        """
        if not self.config.per_layer_threshold:
            return None
        self.check_given(members)
        return members

    @torch.no_grad()
    def fit_encoder(
        self,
        x: Float[Tensor, "token d_model"],
        members: Int[Tensor, " token"] | None = None,
        reconstruct: Callable[[Tensor, int], Tensor] | None = None,
    ) -> None:
        """Scale the encoder of a new SAE so that it reconstructs these normalised rows best.

        With rows of unit norm the many latents that are active by chance add up to several times
        the input, and training begins with unlearning that: on the models at hand the variance left
        unexplained after 440 steps is halved by the right size. The directions stay. A JumpReLU SAE
        without a k is taken with the L0 that it aims at.

        relu and gated, whose L0 nothing tells beforehand, start with short rows instead: an L1
        penalty then lets latents grow where they pay, and need not shrink all of them first.

        Args:
            reconstruct: Gives the reconstruction of the encoder's inputs by their k most active
                latents, where this SAE is a shard and does not have them all.
        """
        if self.config.architecture in ("relu", "gated"):
            self.W_enc.mul_(_SHORT)
            return
        x, members = x[:_ENOUGH], None if members is None else members[:_ENOUGH]
        active = self.config.k or round(self.config.target_l0 or self.config.d_sae)
        active = max(min(active, self.config.d_sae), 1)
        inputs = self.inputs(x, members)
        if reconstruct is None:
            x_hat = self.decode_normalized(topk(F.linear(inputs, self.W_enc), active), members)
        else:
            x_hat = reconstruct(inputs, active)
        squares = x_hat.square().sum()
        factor = torch.where(squares > 0, (x * x_hat).sum() / squares, 1.0)
        self.W_enc.mul_(factor)

    @torch.no_grad()
    def fit_thresholds(
        self, x: Float[Tensor, "token d_model"], members: Int[Tensor, " token"] | None = None
    ) -> None:
        """jumprelu: set the thresholds to where `target_l0` latents are active on these rows.

        All of a row are equal; each member layer has its own where `per_layer_threshold` holds.
        """
        x, members = x[:_ENOUGH], None if members is None else members[:_ENOUGH]
        assert self.config.target_l0 is not None
        pre_activations = F.linear(self.inputs(x, members), self.W_enc)
        own, k = self.sharing(members), max(round(self.config.target_l0), 1)
        cuts = batch_cut(torch.relu(pre_activations), k, own, len(self.log_threshold))
        fitted = cuts.isfinite()  # not so where a layer has no row
        self.log_threshold[fitted] = cuts[fitted].log().unsqueeze(1)

    def save(self, directory: Path) -> None:
        """Write `cfg.json` and `sae.safetensors` into `directory`, made where it is missing.

        Raises:
            InputError: If they cannot be written.
        """
        weights = {name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}
        with replacing(directory / WEIGHTS_FILE) as aside:
            save_tensors(weights, aside)
        write_json(directory / CONFIG_FILE, asdict(self.config))

    @classmethod
    def load(cls, directory: Path | str, device: str | torch.device = "cpu") -> SAE:
        """Read an SAE that :meth:`save` wrote.

        Raises:
            InputError: If the folder holds no SAE, or one whose weights do not fit its
                configuration.
        """
        directory = Path(directory)
        try:
            stored = json.loads((directory / CONFIG_FILE).read_text())
            sequences = {key: tuple(v) for key, v in stored.items() if isinstance(v, list)}
            config = SAEConfig(**{**stored, **sequences})
            weights = load_tensors(directory / WEIGHTS_FILE, device=str(device))
            start = torch.Generator()  # of weights to be overwritten; the global one stays
            sae = cls(config, mean=weights["mean"], scale=weights["scale"], generator=start)
            sae = sae.to(device)
            sae.load_state_dict(weights)
        except FileNotFoundError as error:
            raise InputError(
                f"{directory} holds no SAE: {Path(error.filename or '').name or WEIGHTS_FILE} is "
                f"missing; give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
            ) from error
        except PermissionError as error:
            raise InputError(
                f"{error.filename} cannot be read: {error.strerror}; ask its owner for permission"
            ) from error
        except (
            SafetensorError,
            OSError,
            ValueError,
            LookupError,
            TypeError,
            RuntimeError,
        ) as error:
            raise InputError(
                f"{directory} holds no readable SAE: {error}; the folder is damaged, or of another "
                "program"
            ) from error
        return sae


def directory_name(layers: Sequence[int]) -> str:
    """`layers-03-06` for a group of layers 3 to 6, `layers-03` for layer 3 alone."""
    first, last = min(layers), max(layers)
    return f"layers-{first:02d}" if first == last else f"layers-{first:02d}-{last:02d}"
