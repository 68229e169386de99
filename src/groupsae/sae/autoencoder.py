"""One sparse autoencoder, shared by the member layers of its group."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from groupsae.errors import InputError
from groupsae.files import replacing, write_text
from groupsae.sae.sparsity import Latents, topk

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae.safetensors"


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE is, as written in `cfg.json` beside its weights."""

    d_model: int
    d_sae: int
    k: int
    layers: tuple[int, ...]
    architecture: str = "topk"

    def __post_init__(self) -> None:
        """Refuse sizes that cannot work."""
        if self.architecture != "topk":
            raise InputError(
                f"sae.architecture: {self.architecture!r} is not known here; known is 'topk'"
            )
        if not 1 <= self.k <= self.d_sae:
            raise InputError(f"sae.k: {self.k} must lie between 1 and d_sae = {self.d_sae}")
        if not self.layers:
            raise InputError("sae.layers: an SAE needs at least one member layer")


class SAE(nn.Module):
    """A TopK sparse autoencoder with one pair of weight matrices for all its member layers.

    Each member layer l brings its own mean m_l and scale s_l; the weights see s_l (x - m_l):

        z     = TopK(relu(W_enc (s_l (x - m_l) - b_dec) + b_enc))
        x_hat = (W_dec^T z + b_dec) / s_l + m_l

    Rows of `W_enc` and `W_dec` belong to latents. Rows of `W_dec` have unit norm at the start and
    after every training step; `W_enc` starts equal to `W_dec` (the decoder's transpose, in the
    papers' orientation) and both biases start at 0. TopK and this start: Group-SAE
    (arXiv 2410.21508 v2, section 3) after Gao et al. 2024 (arXiv 2406.04093).

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

    def encode(self, x: Float[Tensor, "*token d_model"], layer: int) -> Latents:
        """The active latents of residual streams x of `layer`."""
        return self.encode_normalized(self.normalize(x, layer))

    def decode(self, latents: Latents, layer: int) -> Float[Tensor, "*token d_model"]:
        """Reconstruct residual streams of `layer` from latents."""
        return self.denormalize(self.decode_normalized(latents), layer)

    def forward(self, x: Float[Tensor, "*token d_model"], layer: int) -> Tensor:
        """Reconstruct x, residual streams of `layer`: decode(encode(x)), in x's dtype."""
        return self.decode(self.encode(x, layer), layer).to(x.dtype)

    def normalize(
        self, x: Float[Tensor, "*token d_model"], layer: int
    ) -> Float[Tensor, "*token d_model"]:
        """s_l (x - m_l), in the weights' dtype."""
        member = self._member(layer)
        return (x.to(self.W_enc.dtype) - self.mean[member]) * self.scale[member]

    def denormalize(
        self, x: Float[Tensor, "*token d_model"], layer: int
    ) -> Float[Tensor, "*token d_model"]:
        """x / s_l + m_l: the inverse of :meth:`normalize`."""
        member = self._member(layer)
        return x / self.scale[member] + self.mean[member]

    def encode_normalized(self, x: Float[Tensor, "*token d_model"]) -> Latents:
        """The active latents of normalised residual streams (of any member layer)."""
        return topk(F.linear(x - self.b_dec, self.W_enc, self.b_enc), self.config.k)

    def decode_normalized(self, latents: Latents) -> Float[Tensor, "*token d_model"]:
        """Reconstruct normalised residual streams: the sum of the active decoder rows."""
        shape = latents.indices.shape
        rows = F.embedding_bag(
            latents.indices.reshape(-1, shape[-1]),
            self.W_dec,
            per_sample_weights=latents.values.reshape(-1, shape[-1]),
            mode="sum",
        )
        return rows.reshape(*shape[:-1], self.config.d_model) + self.b_dec

    def save(self, directory: Path) -> None:
        """Write `cfg.json` and `sae.safetensors` into `directory`, made where it is missing.

        Raises:
            InputError: If they cannot be written.
        """
        weights = {name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}
        with replacing(directory / WEIGHTS_FILE) as aside:
            save_file(weights, aside)
        write_text(directory / CONFIG_FILE, json.dumps(asdict(self.config), indent=2) + "\n")

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
            config = SAEConfig(**{**stored, "layers": tuple(stored["layers"])})
            weights = load_file(directory / WEIGHTS_FILE, device=str(device))
            start = torch.Generator()  # of weights to be overwritten; the global one stays
            sae = cls(config, mean=weights["mean"], scale=weights["scale"], generator=start)
            sae = sae.to(device)
            sae.load_state_dict(weights)
        except FileNotFoundError as error:
            raise InputError(
                f"{directory} holds no SAE: {Path(error.filename or '').name or WEIGHTS_FILE} is "
                f"missing; give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
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

    def _member(self, layer: int) -> int:
        try:
            return self.config.layers.index(layer)
        except ValueError:
            raise InputError(
                f"layer {layer} is no member of this SAE; its layers are "
                f"{', '.join(map(str, self.config.layers))}"
            ) from None


def directory_name(layers: Sequence[int]) -> str:
    """`layers-03-06` for a group of layers 3 to 6, `layers-03` for layer 3 alone."""
    first, last = min(layers), max(layers)
    return f"layers-{first:02d}" if first == last else f"layers-{first:02d}-{last:02d}"
