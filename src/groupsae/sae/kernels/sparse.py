"""The training step that works on active latents only: plain PyTorch, any device.

A dense step costs five products of 2 d_model d_sae operations a token. Only k of d_sae latents are
active, so all products but the encoder's shrink by k / d_sae when they are done on the active rows
alone. Nothing is approximated: latents, loss and gradients are those of `reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from groupsae.products import linear
from groupsae.sae.autoencoder import SAE
from groupsae.sae.kernels import reference
from groupsae.sae.kernels.reference import StepResult
from groupsae.sae.kernels.selection import (
    Chosen,
    choose_latents,
    chunk_rows,
    encode,
    members_of,
)
from groupsae.sae.sparsity import Latents, l0_penalty

Activate: TypeAlias = Callable[[Tensor, int], Tensor]

FEW = 4  # times k dead latents: up to there matrix products over all of them are quicker


@torch.no_grad()
def step(
    sae: SAE,
    x: Float[Tensor, "token d_model"],
    *,
    members: Int[Tensor, " token"] | None = None,
    dead: Bool[Tensor, " d_sae"] | None = None,
    auxk_weight: float = 1 / 32,
    sparsity_weight: float = 0.0,
) -> StepResult:
    """Loss and gradients of an SAE on a mixed batch: see :func:`reference.step`.

    A rule without a fixed number of active latents (jumprelu, relu) is sparse once few enough are
    active; until then, and for gated SAEs, the step is the reference's.
    """
    inputs = sae.inputs(x, members)
    chosen = choose_latents(sae, inputs, members)
    if chosen is None:
        return reference.step(
            sae,
            x,
            members=members,
            dead=dead,
            auxk_weight=auxk_weight,
            sparsity_weight=sparsity_weight,
        )
    latents = chosen.latents
    variance = (x - x.mean(0)).square().sum()
    decoded = Decoded.of(latents, sae.W_dec, sae.config.prefixes or (sae.config.d_sae,))
    rows = decoded.rows + sae.b_dec
    gain = sae.of_member(sae.gain_out, members) if sae.config.learned_affine == "gain" else None
    residual = x.unsqueeze(1) - (rows if gain is None else rows * gain.unsqueeze(1))
    fvus = residual.square().sum((0, 2)) / variance
    output_gradient = residual * (-2 / (variance * residual.shape[1]))
    gradients = {}
    if gain is not None:
        gradients["gain_out"] = _by_member(sae, (output_gradient * rows).sum(1), members)
        output_gradient *= gain.unsqueeze(1)
    b_dec = output_gradient.sum((0, 1))

    bag_gradient = decoded.bag_gradient(output_gradient)
    at_values = decoded.value_gradient(bag_gradient)
    penalty = x.new_zeros(())
    if chosen.near is not None:
        penalty, gradients["log_threshold"] = at_thresholds(
            sae, chosen, at_values, members, sparsity_weight
        )
    if sae.config.architecture == "relu":
        penalty = latents.values.sum(1).mean()
        at_values += sparsity_weight / len(x)
    at_values *= latents.values > 0
    gradients |= gradients_of(sae, x, inputs, members, decoded, bag_gradient, at_values)
    gradients["b_dec"] += b_dec

    auxk = x.new_zeros(())
    if dead is not None and bool(dead.any()):
        last = residual[:, -1]
        auxk = _add_auxk(sae, x, inputs, members, last, dead, auxk_weight, variance, gradients)

    firings = torch.zeros_like(sae.b_enc).index_add_(
        0, latents.indices.flatten(), (latents.values > 0).to(sae.b_enc.dtype).flatten()
    )
    return StepResult(
        gradients={name: gradients[name] for name, _ in sae.named_parameters()},
        loss=fvus.mean() + auxk_weight * auxk + sparsity_weight * penalty,
        fvu=fvus[-1],
        auxk=auxk,
        penalty=penalty,
        l0=latents.l0().mean(),
        fired=firings > 0,
        cuts=chosen.cuts,
    )


@dataclass(frozen=True)
class Decoded:
    """The sums of each token's active decoder rows up to the end of each prefix, and their graph.

    `bags` is the sum that each entry first enters: token * prefixes + prefix. With one prefix it
    is the token, and left out.
    """

    latents: Latents
    rows: Float[Tensor, "token prefix d_model"]
    bags: Int[Tensor, "token k"] | None
    _parts: Float[Tensor, "bag d_model"]

    @classmethod
    def of(
        cls, latents: Latents, W_dec: Float[Tensor, "latent d_model"], ends: tuple[int, ...]
    ) -> Decoded:
        values = latents.values.detach().requires_grad_()
        indices, tokens = latents.indices, len(latents.indices)
        if len(ends) == 1:
            with torch.enable_grad():
                parts = F.embedding_bag(
                    indices, W_dec.detach(), per_sample_weights=values, mode="sum"
                )
            return cls(Latents(values, indices), parts.detach().unsqueeze(1), None, parts)
        prefix = torch.bucketize(indices, indices.new_tensor(ends), right=True)
        bags = prefix + len(ends) * torch.arange(tokens, device=values.device).unsqueeze(1)
        order = bags.flatten().argsort(stable=True)
        counts = torch.zeros(tokens * len(ends), dtype=torch.long, device=values.device)
        counts.index_add_(0, bags.flatten(), torch.ones_like(bags).flatten())
        with torch.enable_grad():
            parts = F.embedding_bag(
                indices.flatten()[order],
                W_dec.detach(),
                counts.cumsum(0) - counts,
                per_sample_weights=values.flatten()[order],
                mode="sum",
            )
        rows = parts.detach().reshape(tokens, len(ends), -1).cumsum(1)
        return cls(Latents(values, indices), rows, bags, parts)

    def bag_gradient(
        self, output_gradient: Float[Tensor, "token prefix d_model"]
    ) -> Float[Tensor, "bag d_model"]:
        """A bag enters the sums of its own prefix and of those after it."""
        if output_gradient.shape[1] > 1:
            output_gradient = output_gradient.flip(1).cumsum(1).flip(1)
        return output_gradient.reshape(-1, output_gradient.shape[2])

    def value_gradient(
        self, bag_gradient: Float[Tensor, "bag d_model"]
    ) -> Float[Tensor, "token k"]:
        """bag_gradient . W_dec[j] for each entry, active or not.

        No [token, k, d_model] is made.
        """
        return torch.autograd.grad(self._parts, self.latents.values, bag_gradient)[0]


def at_thresholds(
    sae: SAE,
    chosen: Chosen,
    at_values: Float[Tensor, "token k"],
    members: Int[Tensor, " token"] | None,
    weight: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, "row d_sae"]]:
    """The L0 penalty, and the gradient of the thresholds' logarithms."""
    config, latents, n_members = sae.config, chosen.latents, len(sae.layers)
    own = sae.sharing(members)
    l0 = latents.l0().requires_grad_()
    with torch.enable_grad():
        penalty = l0_penalty(l0, config.target_l0, own, n_members)
    (l0_gradient,) = torch.autograd.grad(penalty, l0)
    assert chosen.near is not None
    assert config.bandwidth is not None
    near, thresholds = chosen.near
    estimate = at_values * thresholds + weight * l0_gradient.unsqueeze(1)
    estimate *= near * (-thresholds / config.bandwidth)  # d threshold / d log threshold
    row = 0 if own is None else own.unsqueeze(1) * config.d_sae
    gradient = torch.zeros_like(sae.log_threshold)
    gradient.view(-1).index_add_(0, (row + latents.indices).flatten(), estimate.flatten())
    return penalty.detach(), gradient


def gradients_of(
    sae: SAE,
    x: Float[Tensor, "token d_model"],
    inputs: Float[Tensor, "token d_model"],
    members: Int[Tensor, " token"] | None,
    decoded: Decoded,
    bag_gradient: Float[Tensor, "bag d_model"],
    at_values: Float[Tensor, "token k"],
) -> dict[str, Tensor]:
    """Of all parameters through the latents, given the loss's gradients at sums and activations.

    Writing g_t for the gradient at token t's sum and v_tj for the activation of latent j on token
    t: the gradient of v_tj is g_t . W_dec[j], that of W_dec[j] is sum_t v_tj g_t, and so on; b_dec
    gets here what reaches it through the encoder's input alone.
    """
    latents = decoded.latents
    by_latent = _ByLatent.of(latents.indices, decoded.bags, sae.config.d_sae)
    b_enc = by_latent.sum(at_values)
    gradients = {
        "W_enc": by_latent.sum_tokens(inputs, at_values),
        "b_enc": b_enc,
        "W_dec": by_latent.sum_bags(bag_gradient, latents.values),
        "b_dec": -(b_enc @ sae.W_enc),
    }
    if sae.config.learned_affine == "bias":
        rows = members_of(sae, members, len(x)).unsqueeze(1) * sae.config.d_sae
        gradients["latent_bias"] = torch.zeros_like(sae.latent_bias)
        gradients["latent_bias"].view(-1).index_add_(
            0, (rows + latents.indices).flatten(), at_values.flatten()
        )
    if sae.config.learned_affine == "gain":
        input_gradient = F.embedding_bag(
            latents.indices, sae.W_enc, per_sample_weights=at_values, mode="sum"
        )
        gradients["gain_in"] = _by_member(sae, input_gradient * x, members)
    return gradients


def _by_member(
    sae: SAE, rows: Float[Tensor, "token d_model"], members: Int[Tensor, " token"] | None
) -> Float[Tensor, "member d_model"]:
    """The sum of each member layer's rows."""
    sums = rows.new_zeros(len(sae.layers), rows.shape[1])
    return sums.index_add_(0, members_of(sae, members, len(rows)), rows)


def _add_auxk(
    sae: SAE,
    x: Float[Tensor, "token d_model"],
    inputs: Float[Tensor, "token d_model"],
    members: Int[Tensor, " token"] | None,
    residual: Float[Tensor, "token d_model"],
    dead: Bool[Tensor, " d_sae"],
    weight: float,
    variance: Float[Tensor, ""],
    gradients: dict[str, Tensor],
) -> Float[Tensor, ""]:
    """Add the auxiliary loss's gradients, weighted; returns the loss. Touches dead latents only."""
    which = dead.nonzero().squeeze(1)
    if sae.config.learned_affine != "none":
        return (
            _add_auxk_by_autograd(sae, x, members, residual, which, weight / variance, gradients)
            / variance
        )
    k, share = reference.auxk_size(sae.config.d_model, len(which))
    scale = 2 * share * weight / variance
    if len(which) <= FEW * k:
        rows = chunk_rows(sae.b_enc[which])
        squares = add_dense_auxk(sae, inputs, residual, which, k, scale, gradients, rows=rows)
        return share * squares / variance
    latents = encode(inputs, sae.W_enc[which], sae.b_enc[which], k)
    latents = Latents(latents.values, which[latents.indices])
    decoded = Decoded.of(latents, sae.W_dec, (sae.config.d_sae,))
    error = decoded.rows[:, 0] - residual
    at_values = decoded.value_gradient(error * scale) * (latents.values > 0)
    added = gradients_of(sae, x, inputs, members, decoded, error * scale, at_values)
    for name, gradient in added.items():
        gradients[name] += gradient
    return share * error.square().sum() / variance


def _add_auxk_by_autograd(
    sae: SAE,
    x: Float[Tensor, "token d_model"],
    members: Int[Tensor, " token"] | None,
    residual: Float[Tensor, "token d_model"],
    which: Int[Tensor, " latent"],
    scale: Float[Tensor, ""],
    gradients: dict[str, Tensor],
) -> Float[Tensor, ""]:
    """The same for SAEs whose layers have learned vectors; returns the sum of squared errors."""
    parameters = dict(sae.named_parameters())
    with torch.enable_grad():
        products = F.linear(sae.inputs(x, members), sae.W_enc[which], sae.b_enc[which])
        if sae.config.learned_affine == "bias":
            products = products + sae.of_member(sae.latent_bias[:, which], members)
        squares = reference.auxk_loss(sae, products, which, residual, members)
        added = torch.autograd.grad(
            scale * squares, list(parameters.values()), allow_unused=True, materialize_grads=True
        )
    for name, gradient in zip(parameters, added, strict=True):
        gradients[name] += gradient
    return squares.detach()


def _largest(pre_activations: Float[Tensor, "token dead"], k: int) -> Float[Tensor, "token dead"]:
    """Activations of the k most active latents; the others' are zero."""
    values, indices = torch.topk(pre_activations, k, sorted=False)
    return pre_activations.zero_().scatter_(1, indices, values.relu_())


def _as_it_is(rows: Tensor) -> Tensor:
    return rows


def add_dense_auxk(
    sae: SAE,
    inputs: Float[Tensor, "token d_model"],
    residual: Float[Tensor, "token d_model"],
    which: Int[Tensor, " dead"],
    k: int,
    scale: Float[Tensor, ""],
    gradients: dict[str, Tensor],
    *,
    rows: int,
    activate: Activate = _largest,
    total: Callable[[Tensor], Tensor] = _as_it_is,
) -> Float[Tensor, ""]:
    """The same by matrix products over all of `which`: quicker where they are few times k.

    Args:
        rows: Tokens at a time.
        activate: Gives the activations of the k most active latents, from pre-activations that it
            may overwrite.
        total: Makes of these latents' reconstruction that of all dead ones.

    Returns:
        The sum of squared errors.
    """
    W_enc, b_enc, W_dec = sae.W_enc[which], sae.b_enc[which], sae.W_dec[which]
    sums = {
        "W_enc": torch.zeros_like(W_enc),
        "b_enc": torch.zeros_like(b_enc),
        "W_dec": torch.zeros_like(W_dec),
    }
    squares = inputs.new_zeros(())
    for x, target in zip(torch.split(inputs, rows), torch.split(residual, rows), strict=True):
        z = activate(linear(x, W_enc, b_enc), k)
        error = total(linear(z, W_dec.T)).sub_(target)
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
    bags: Int[Tensor, " entry"]  # the decoder's sum that it first enters, in that order
    offsets: Int[Tensor, " latent"]  # where each latent's entries begin
    indices: Int[Tensor, " entry"]
    d_sae: int

    @classmethod
    def of(
        cls, indices: Int[Tensor, "token k"], bags: Int[Tensor, "token k"] | None, d_sae: int
    ) -> _ByLatent:
        flat = indices.flatten()
        order = _stable_argsort(flat, d_sae)
        counts = torch.zeros(d_sae, dtype=torch.long, device=flat.device)
        counts.index_add_(0, flat, torch.ones_like(flat))
        tokens = order // indices.shape[1]
        return cls(
            order,
            tokens,
            tokens if bags is None else bags.flatten()[order],
            counts.cumsum(0) - counts,
            flat,
            d_sae,
        )

    def sum_tokens(
        self, rows: Float[Tensor, "token d_model"], weights: Float[Tensor, "token k"]
    ) -> Float[Tensor, "latent d_model"]:
        """For each latent the weighted sum of its tokens' rows."""
        return self._sum_rows(rows, self.tokens, weights)

    def sum_bags(
        self, rows: Float[Tensor, "bag d_model"], weights: Float[Tensor, "token k"]
    ) -> Float[Tensor, "latent d_model"]:
        """For each latent the weighted sum of its bags' rows."""
        return self._sum_rows(rows, self.bags, weights)

    def _sum_rows(self, rows: Tensor, which: Tensor, weights: Tensor) -> Tensor:
        return F.embedding_bag(
            which,
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
