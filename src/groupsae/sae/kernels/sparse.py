"""The training step that works on active latents only: plain PyTorch, any device.

A dense step costs five products of 2 d_model d_sae operations a token. Only k of d_sae latents are
active, so all products but the encoder's shrink by k / d_sae when they are done on the active rows
alone. Nothing is approximated: latents, loss and gradients are those of `reference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from groupsae.products import linear
from groupsae.sae.autoencoder import SAE
from groupsae.sae.kernels.reference import StepResult
from groupsae.sae.sparsity import Latents

_CHUNK_BYTES = 16 * 2**20  # of pre-activations: [token, d_sae] never exists whole
_FEW = 4  # times k dead latents: up to there matrix products over all of them are quicker


@torch.no_grad()
def step(
    sae: SAE,
    x: Float[Tensor, "token d_model"],
    *,
    dead: Bool[Tensor, " d_sae"] | None = None,
    auxk_weight: float = 1 / 32,
) -> StepResult:
    """Loss and gradients of a TopK SAE on a mixed batch: see :func:`reference.step`."""
    inputs = x - sae.b_dec
    variance = (x - x.mean(0)).square().sum()

    latents = encode(inputs, sae.W_enc, sae.b_enc, sae.config.k)
    decoded = _Decoded.of(latents, sae.W_dec)
    residual = x - decoded.rows.detach() - sae.b_dec
    fvu = residual.square().sum() / variance
    output_gradient = residual * (-2 / variance)
    gradients = _gradients(sae, inputs, decoded, output_gradient)
    gradients["b_dec"] += output_gradient.sum(0)

    auxk = x.new_zeros(())
    if dead is not None and bool(dead.any()):
        auxk = _add_auxk(sae, inputs, residual, dead, auxk_weight, variance, gradients)

    firings = torch.zeros_like(sae.b_enc).index_add_(
        0, latents.indices.flatten(), (latents.values > 0).to(sae.b_enc.dtype).flatten()
    )
    return StepResult(
        gradients=gradients,
        loss=fvu + auxk_weight * auxk,
        fvu=fvu,
        auxk=auxk,
        l0=latents.l0().mean(),
        fired=firings > 0,
    )


def encode(
    inputs: Float[Tensor, "token d_model"],
    W_enc: Float[Tensor, "latent d_model"],
    b_enc: Float[Tensor, " latent"],
    k: int,
) -> Latents:
    """TopK(relu(W_enc inputs + b_enc)), a chunk of tokens at a time."""
    tokens, rows = len(inputs), _chunk_rows(b_enc)
    values = inputs.new_empty(tokens, k)
    indices = torch.empty(tokens, k, dtype=torch.long, device=inputs.device)
    for start in range(0, tokens, rows):
        chunk = slice(start, start + rows)
        chosen = (values[chunk], indices[chunk])
        torch.topk(linear(inputs[chunk], W_enc, b_enc), k, sorted=False, out=chosen)
    return Latents(values.relu_(), indices)


def _chunk_rows(b_enc: Float[Tensor, " latent"]) -> int:
    """Tokens whose pre-activations of these latents fill a chunk; one at least."""
    return max(_CHUNK_BYTES // (b_enc.element_size() * len(b_enc)), 1)


@dataclass(frozen=True)
class _Decoded:
    """The sum of each token's active decoder rows, and its graph."""

    latents: Latents
    rows: Float[Tensor, "token d_model"]

    @classmethod
    def of(cls, latents: Latents, W_dec: Float[Tensor, "latent d_model"]) -> _Decoded:
        values = latents.values.detach().requires_grad_()
        with torch.enable_grad():
            rows = F.embedding_bag(
                latents.indices, W_dec.detach(), per_sample_weights=values, mode="sum"
            )
        return cls(Latents(values, latents.indices), rows)

    def activation_gradient(
        self, output_gradient: Float[Tensor, "token d_model"]
    ) -> Float[Tensor, "token k"]:
        """output_gradient[t] . W_dec[j] for each active latent j of token t.

        No [token, k, d_model] is made.
        """
        products = torch.autograd.grad(self.rows, self.latents.values, output_gradient)[0]
        return products * (self.latents.values > 0)


def _gradients(
    sae: SAE,
    inputs: Float[Tensor, "token d_model"],
    decoded: _Decoded,
    output_gradient: Float[Tensor, "token d_model"],
) -> dict[str, Tensor]:
    """Of all parameters through the latents, given the loss's gradient at the decoder's output.

    Writing g_t for that gradient and v_tj for the activation of latent j on token t: the gradient
    of v_tj is g_t . W_dec[j], that of W_dec[j] is sum_t v_tj g_t, and so on; b_dec gets here what
    reaches it through the encoder's input alone.
    """
    activation_gradient = decoded.activation_gradient(output_gradient)
    latents = decoded.latents
    by_latent = _ByLatent.of(latents.indices, sae.config.d_sae)
    b_enc = by_latent.sum(activation_gradient)
    return {
        "W_enc": by_latent.sum_rows(inputs, activation_gradient),
        "b_enc": b_enc,
        "W_dec": by_latent.sum_rows(output_gradient, latents.values),
        "b_dec": -(b_enc @ sae.W_enc),
    }


def _add_auxk(
    sae: SAE,
    inputs: Float[Tensor, "token d_model"],
    residual: Float[Tensor, "token d_model"],
    dead: Bool[Tensor, " d_sae"],
    weight: float,
    variance: Float[Tensor, ""],
    gradients: dict[str, Tensor],
) -> Float[Tensor, ""]:
    """Add the auxiliary loss's gradients, weighted; returns the loss. Touches dead latents only."""
    which = dead.nonzero().squeeze(1)
    wanted = max(sae.config.d_model // 2, 1)
    k, share = min(wanted, len(which)), min(len(which) / wanted, 1.0)
    scale = 2 * share * weight / variance
    if len(which) <= _FEW * k:
        squares = _add_dense_auxk(sae, inputs, residual, which, k, scale, gradients)
        return share * squares / variance
    latents = encode(inputs, sae.W_enc[which], sae.b_enc[which], k)
    decoded = _Decoded.of(Latents(latents.values, which[latents.indices]), sae.W_dec)
    error = decoded.rows.detach() - residual
    for name, gradient in _gradients(sae, inputs, decoded, error * scale).items():
        gradients[name] += gradient
    return share * error.square().sum() / variance


def _add_dense_auxk(
    sae: SAE,
    inputs: Float[Tensor, "token d_model"],
    residual: Float[Tensor, "token d_model"],
    which: Int[Tensor, " latent"],
    k: int,
    scale: Float[Tensor, ""],
    gradients: dict[str, Tensor],
) -> Float[Tensor, ""]:
    """The same by matrix products over all of `which`: quicker where they are few times k.

    Returns the sum of squared errors.
    """
    W_enc, b_enc, W_dec = sae.W_enc[which], sae.b_enc[which], sae.W_dec[which]
    sums = {
        "W_enc": torch.zeros_like(W_enc),
        "b_enc": torch.zeros_like(b_enc),
        "W_dec": torch.zeros_like(W_dec),
    }
    squares = inputs.new_zeros(())
    rows = _chunk_rows(b_enc)
    for x, target in zip(torch.split(inputs, rows), torch.split(residual, rows), strict=True):
        pre_activations = linear(x, W_enc, b_enc)
        values, indices = torch.topk(pre_activations, k, sorted=False)
        z = pre_activations.zero_().scatter_(1, indices, values.relu_())
        error = linear(z, W_dec.T).sub_(target)
        squares += error.square().sum()
        error *= scale
        z_gradient = linear(error, W_dec).mul_(z > 0)
        sums["W_enc"].addmm_(z_gradient.T, x)
        sums["b_enc"] += z_gradient.sum(0)
        sums["W_dec"].addmm_(z.T, error)
    for name, gradient in sums.items():
        gradients[name].index_add_(0, which, gradient)
    gradients["b_dec"] -= sums["b_enc"] @ W_enc
    return squares


@dataclass(frozen=True)
class _ByLatent:
    """The pattern of active latents, transposed once: which tokens each latent is chosen on."""

    order: Int[Tensor, " entry"]  # sorts the entries of [token, k] by latent
    tokens: Int[Tensor, " entry"]  # each entry's token, in that order
    offsets: Int[Tensor, " latent"]  # where each latent's entries begin
    indices: Int[Tensor, " entry"]
    d_sae: int

    @classmethod
    def of(cls, indices: Int[Tensor, "token k"], d_sae: int) -> _ByLatent:
        flat = indices.flatten()
        order = _stable_argsort(flat, d_sae)
        counts = torch.zeros(d_sae, dtype=torch.long, device=flat.device)
        counts.index_add_(0, flat, torch.ones_like(flat))
        return cls(order, order // indices.shape[1], counts.cumsum(0) - counts, flat, d_sae)

    def sum_rows(
        self, rows: Float[Tensor, "token d_model"], weights: Float[Tensor, "token k"]
    ) -> Float[Tensor, "latent d_model"]:
        """For each latent the weighted sum of its tokens' rows."""
        return F.embedding_bag(
            self.tokens,
            rows,
            self.offsets,
            mode="sum",
            per_sample_weights=weights.flatten()[self.order],
        )

    def sum(self, weights: Float[Tensor, "token k"]) -> Float[Tensor, " latent"]:
        """For each latent the sum of its tokens' weights."""
        return weights.new_zeros(self.d_sae).index_add_(0, self.indices, weights.flatten())


def _stable_argsort(values: Int[Tensor, " entry"], bound: int) -> Int[Tensor, " entry"]:
    """What sorts whole numbers in [0, bound), equal ones in their order.

    On the CPU numpy's radix sort of 16-bit numbers is a hundred times faster than torch's sort.
    """
    if values.device.type != "cpu" or bound > 2**16:
        return values.argsort(stable=True)
    return torch.from_numpy(values.numpy().astype(np.uint16).argsort(kind="stable"))
