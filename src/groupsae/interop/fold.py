"""One layer's SAE in raw activation units: the form in which SAEs go to other libraries and come.

Other libraries know one layer, one bias and no scale. For the layer l of an SAE of
:mod:`groupsae.sae.autoencoder`, with all that is the layer's own folded in,

    p     = W_enc (x - b_dec)
    z     = activation(p + b_enc)
    x_hat = W_dec^T z + b_dec

From z = activation(W_enc (g s (x - m) - b) + c + b_enc) and x_hat = h (W_dec^T z + b) / s + m,
where g and h are the learned gains and c the learned bias, follows with latents in units of x,
z / s in place of z:

    W_enc -> W_enc diag(g)    b_enc -> (b_enc + c + W_enc ((g h - 1) b)) / s
    W_dec -> W_dec diag(h)    b_dec -> h b / s + m                  thresholds -> thresholds / s

So without learned gains both matrices stay as they are, rows of unit norm, and only vectors are the
layer's own. All latents have the same factor: the k largest stay the k largest. With learned gains
decoder rows have other norms; under a rule that compares latents with one another (topk, batchtopk,
matryoshka) they cannot be normalised without changing which ones are active.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from groupsae.architectures import BY_BATCH
from groupsae.errors import InputError
from groupsae.sae import SAE, SAEConfig


@dataclass(frozen=True)
class Folded:
    """The SAE of one layer, in raw activation units.

    Attributes:
        config: What it is; of one layer, without a learned affine.
        threshold: What a pre-activation must exceed: of each latent under jumprelu, of all under
            batchtopk and matryoshka.
        r_mag, b_gate: gated: magnitudes are relu(exp(r_mag) p + b_enc), gates p + b_gate > 0.
    """

    config: SAEConfig
    W_enc: Float[Tensor, "d_sae d_model"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_model"]
    b_dec: Float[Tensor, " d_model"]
    threshold: Float[Tensor, " d_sae"] | Float[Tensor, ""] | None = None
    r_mag: Float[Tensor, " d_sae"] | None = None
    b_gate: Float[Tensor, " d_sae"] | None = None

    def shifted(self, inputs: Float[Tensor, " d_model"]) -> Folded:
        """The SAE whose encoder sees its inputs with this added."""
        return self._with_added(self.W_enc.double() @ inputs.double())

    def in_units(self, units: Float[Tensor, " d_sae"]) -> Folded:
        """The same function, each latent times its positive number.

        Only where latents are not compared with one another, or the numbers are all the same, do
        the same ones stay active.
        """
        columns = units.unsqueeze(1)
        return replace(
            self,
            W_enc=self.W_enc * columns,
            b_enc=self.b_enc * units,
            W_dec=self.W_dec / columns,
            threshold=None if self.threshold is None else self.threshold * units,
            b_gate=None if self.b_gate is None else self.b_gate * units,
        )

    def with_unit_rows(self) -> Folded:
        """The same function with decoder rows of unit norm."""
        norms = self.W_dec.norm(dim=1)
        return self.in_units(torch.where(norms > 0, norms, 1.0))

    def sae(self) -> SAE:
        """As an SAE of this package: mean 0, scale 1."""
        sae = SAE(self.config, generator=torch.Generator())  # of weights to be overwritten
        weights = dict(sae.state_dict())  # with mean 0 and scale 1
        weights |= {name: getattr(self, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        if self.config.architecture == "gated":
            assert self.r_mag is not None
            assert self.b_gate is not None
            weights |= {"r_mag": self.r_mag, "b_gate": self.b_gate}
        if self.config.architecture == "jumprelu":
            assert self.threshold is not None
            least = torch.finfo(torch.float32).tiny  # a logarithm that can be trained
            weights["log_threshold"] = self.threshold.clamp_min(least).log().unsqueeze(0)
        if self.config.architecture in BY_BATCH:
            assert self.threshold is not None
            weights["threshold"] = self.threshold.clamp_min(0).reshape(1)
        sae.load_state_dict(weights)
        return sae

    def _with_added(self, products: Tensor) -> Folded:
        """With this added to the encoder's product."""
        if self.b_gate is None or self.r_mag is None:
            return replace(self, b_enc=_plus(self.b_enc, products))
        return replace(
            self,
            b_enc=_plus(self.b_enc, self.r_mag.double().exp() * products),
            b_gate=_plus(self.b_gate, products),
        )


@torch.no_grad()
def folded(sae: SAE, layer: int) -> Folded:
    """What `sae` is at one of its member layers, in raw activation units.

    Its latents are those of `sae.encode`, divided by the layer's scale. Vectors are computed in
    float64; all is returned in the dtype of the weights, on the CPU.

    Raises:
        InputError: If the layer is no member, or a weight is NaN or infinite.
    """
    if layer not in sae.layers:
        raise InputError(
            f"layer {layer} is no member of this SAE; its layers are "
            f"{', '.join(map(str, sae.layers))}"
        )
    weights = {name: tensor.detach().cpu() for name, tensor in sae.state_dict().items()}
    broken = [name for name, tensor in weights.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise InputError(
            f"the SAE of layers {', '.join(map(str, sae.layers))} holds NaN or infinity in "
            f"{', '.join(broken)}: its training went wrong; train it again with a lower "
            "training.learning_rate"
        )
    member, scale = sae.layers.index(layer), weights["scale"][sae.layers.index(layer)].double()
    config = replace(sae.config, layers=(layer,), learned_affine="none", per_layer_threshold=False)
    W_enc, b_dec = weights["W_enc"], weights["b_dec"].double()
    plain = Folded(
        config,
        W_enc=W_enc,
        b_enc=_over(weights["b_enc"], scale),
        W_dec=weights["W_dec"],
        b_dec=(b_dec / scale + weights["mean"][member]).to(W_enc.dtype),
        threshold=_threshold(sae, layer, scale),
        r_mag=weights.get("r_mag"),
        b_gate=_over(weights["b_gate"], scale) if "b_gate" in weights else None,
    )
    if sae.config.learned_affine == "bias":
        return plain._with_added(weights["latent_bias"][member].double() / scale)
    if sae.config.learned_affine == "gain":
        gain_in, gain_out = (weights[name][member].double() for name in ("gain_in", "gain_out"))
        return replace(
            plain.shifted((gain_in * gain_out - 1) * b_dec / scale),
            W_enc=(W_enc * gain_in).to(W_enc.dtype),
            W_dec=(plain.W_dec * gain_out).to(W_enc.dtype),
            b_dec=(gain_out * b_dec / scale + weights["mean"][member]).to(W_enc.dtype),
        )
    return plain


def training_options(bandwidth: float | None = None) -> dict[str, float]:
    """What the config of a jumprelu SAE needs besides its weights.

    Rajamanoharan et al. 2024b's values where another program has not stored its own.
    """
    return {"bandwidth": bandwidth or 0.001, "initial_threshold": 0.001}


def _threshold(sae: SAE, layer: int, scale: Tensor) -> Tensor | None:
    config = sae.config
    if config.architecture == "jumprelu":
        own = sae.layers.index(layer) if config.per_layer_threshold else 0
        exact = sae.log_threshold.detach()[own].cpu().double().exp()
        return (exact / scale).to(sae.W_enc.dtype)
    if config.architecture in BY_BATCH:
        return _over(sae.threshold[sae.layers.index(layer)].cpu(), scale)
    return None


def _over(values: Tensor, scale: Tensor) -> Tensor:
    return (values.double() / scale).to(values.dtype)


def _plus(values: Tensor, more: Tensor) -> Tensor:
    return (values.double() + more).to(values.dtype)
