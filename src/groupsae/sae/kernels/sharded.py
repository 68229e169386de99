"""The training step of an SAE whose latents are divided over several processes.

Each holds a shard: some rows of `W_enc` and `W_dec` with their `b_enc`, and the whole `b_dec`. All
see the same batch. What they tell each other of a token are the activations of its k most active
latents of each shard, to find the most active of all, and its shard's part of the reconstruction.
The active latents are those of the undivided SAE, loss and gradients too but for the order of sums.

For topk and batchtopk, without what member layers learn of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from groupsae.sae.autoencoder import SAE
from groupsae.sae.kernels import reference
from groupsae.sae.kernels.reference import StepResult
from groupsae.sae.kernels.selection import chunk_rows, encode
from groupsae.sae.kernels.sparse import FEW, Decoded, add_dense_auxk, gradients_of
from groupsae.sae.kernels.update import update as update_alone
from groupsae.sae.sparsity import Latents

_GATHERED_BYTES = 64 * 2**20  # of activations of all shards that are held at a time
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
_WHOLE = ("b_dec",)  # parameters that every process has whole


@runtime_checkable
class Shards(Protocol):
    """The processes that hold the shards of an SAE. All of them call the same in the same order.

    Attributes:
        index, count: Which shard is this process's, and how many there are.
    """

    index: int
    count: int

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all shards, in its place."""

    def gather(self, tensor: Tensor) -> Tensor:
        """That of each shard, one after another along a new first dimension."""


@dataclass(frozen=True)
class ShardedStep:
    """Loss and gradients of a shard: a :class:`groupsae.sae.kernels.Step`."""

    shards: Shards

    @torch.no_grad()
    def __call__(
        self,
        sae: SAE,
        x: Float[Tensor, "token d_model"],
        *,
        members: Int[Tensor, " token"] | None = None,
        dead: Bool[Tensor, " d_sae"] | None = None,
        auxk_weight: float = 1 / 32,
        sparsity_weight: float = 0.0,
    ) -> StepResult:
        """See :func:`reference.step`. `fired`, `dead` and gradients are of the shard's latents."""
        shards = self.shards
        inputs = sae.inputs(x, members)
        latents, cuts = _choose(sae, inputs, members, shards)
        variance = (x - x.mean(0)).square().sum()
        decoded = Decoded.of(latents, sae.W_dec, (sae.config.d_sae,))
        residual = x - (shards.sum(decoded.rows[:, 0].contiguous()) + sae.b_dec)
        fvu = residual.square().sum() / variance
        output_gradient = residual * (-2 / variance)
        at_values = decoded.value_gradient(output_gradient) * (latents.values > 0)
        gradients = gradients_of(sae, x, inputs, members, decoded, output_gradient, at_values)
        auxk = x.new_zeros(())
        if dead is not None:
            auxk = _add_auxk(sae, inputs, residual, dead, auxk_weight, variance, gradients, shards)
        # Its part through the encoder comes from all shards; that of the output each has whole.
        gradients["b_dec"] = shards.sum(gradients["b_dec"]) + output_gradient.sum(0)
        firings = torch.zeros_like(sae.b_enc).index_add_(
            0, latents.indices.flatten(), (latents.values > 0).to(sae.b_enc.dtype).flatten()
        )
        return StepResult(
            gradients={name: gradients[name] for name, _ in sae.named_parameters()},
            loss=fvu + auxk_weight * auxk,
            fvu=fvu,
            auxk=auxk,
            penalty=x.new_zeros(()),
            l0=shards.sum(latents.l0().mean()),
            fired=firings > 0,
            cuts=cuts,
        )


@dataclass(frozen=True)
class ShardedUpdate:
    """Moves a shard by its gradients, clipped by the norm of all: an `Update` of the kernels."""

    shards: Shards

    def __call__(
        self,
        sae: SAE,
        gradients: dict[str, Tensor],
        adam: torch.optim.Adam,
        *,
        gradient_clip: float,
    ) -> Float[Tensor, ""]:
        """See :func:`groupsae.sae.kernels.update.update`."""
        return update_alone(
            sae, gradients, adam, gradient_clip=gradient_clip, norm_of=self._norm_of_all
        )

    def _norm_of_all(self, gradients: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        squares = {name: gradient.square().sum() for name, gradient in gradients.items()}
        whole = torch.stack([squares.pop(name) for name in _WHOLE]).sum()
        return (self.shards.sum(torch.stack(list(squares.values())).sum()) + whole).sqrt()


@torch.no_grad()
def reconstruct(
    sae: SAE, shards: Shards, inputs: Float[Tensor, "token d_model"], k: int
) -> Float[Tensor, "token d_model"]:
    """The reconstruction by the k most active latents of all shards, for `SAE.fit_encoder`."""
    latents = _of_largest(inputs, sae.W_enc, sae.b_enc, k, shards)
    rows = F.embedding_bag(
        latents.indices, sae.W_dec, per_sample_weights=latents.values, mode="sum"
    )
    return shards.sum(rows) + sae.b_dec


def _choose(
    sae: SAE,
    inputs: Float[Tensor, "token d_model"],
    members: Int[Tensor, " token"] | None,
    shards: Shards,
) -> tuple[Latents, Float[Tensor, " member"] | None]:
    """The shard's active latents, in as many places as a token has at most, and the cuts."""
    k = sae.config.k
    assert k is not None
    if sae.config.architecture == "topk":
        return _of_largest(inputs, sae.W_enc, sae.b_enc, k, shards), None
    latents, cuts = _at_cuts(sae, partial(encode, inputs, sae.W_enc, sae.b_enc), members, shards)
    return _packed(latents), cuts


def _of_largest(
    inputs: Float[Tensor, "token d_model"],
    W_enc: Float[Tensor, "latent d_model"],
    b_enc: Float[Tensor, " latent"],
    k: int,
    shards: Shards,
) -> Latents:
    """Those of these latents that are among the k most active of all shards.

    In as many places as a token needs at most: a shard has few of a token's active latents. To
    count them the device is waited for.
    """
    rows = max(_GATHERED_BYTES // (shards.count * k * inputs.element_size()), 1)
    parts = []
    for chunk in torch.split(inputs, rows):
        own = min(k, len(b_enc))
        latents = encode(chunk, W_enc, b_enc, own) if own else _none(chunk)
        padded = F.pad(latents.values, (0, k - latents.values.shape[1]))
        kept = _among_largest(padded, k, shards)[:, : latents.values.shape[1]]
        parts.append(_packed(Latents(latents.values * kept, latents.indices)))
    most = max(part.values.shape[1] for part in parts)
    return Latents(
        torch.cat([F.pad(p.values, (0, most - p.values.shape[1])) for p in parts]),
        torch.cat([F.pad(p.indices, (0, most - p.indices.shape[1])) for p in parts]),
    )


def _none(inputs: Float[Tensor, "token d_model"]) -> Latents:
    """A place for each token that no latent takes."""
    values = inputs.new_zeros(len(inputs), 1)
    return Latents(values, values.long())


def _among_largest(
    values: Float[Tensor, "token k"], k: int, shards: Shards
) -> Bool[Tensor, "token k"]:
    """Which values are among the k largest of all shards. Of equal ones all keep the same k."""
    of_all = shards.gather(values).transpose(0, 1)
    flat = of_all.reshape(len(values), -1)
    indices = torch.topk(flat, k, sorted=False).indices
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, indices, True)
    return kept.view(of_all.shape)[:, shards.index]


def _packed(latents: Latents) -> Latents:
    """Without places that no token needs."""
    most = max(int((latents.values > 0).sum(1).max()), 1)
    values, places = torch.topk(latents.values, most, sorted=False)
    return Latents(values, latents.indices.gather(1, places))


def _at_cuts(
    sae: SAE,
    largest: Callable[[int], Latents],
    members: Int[Tensor, " token"] | None,
    shards: Shards,
) -> tuple[Latents, Float[Tensor, " member"]]:
    """batchtopk: the latents at or above the batch's cut: see `selection.cut_to_batch`."""
    config, n_members = sae.config, len(sae.layers)
    own = sae.sharing(members)
    assert config.k is not None
    candidates = min(2 * config.k, config.d_sae)
    while True:
        latents = largest(candidates)
        cuts = _cuts(latents.values, config.k, own, n_members if own is not None else 1, shards)
        cut = (cuts if own is None else cuts[own]).unsqueeze(1)
        left_out = latents.values.amin(1, keepdim=True) >= cut
        unsure = left_out.any() if candidates < config.d_sae else torch.zeros_like(left_out[0, 0])
        if not bool(shards.sum(unsure.long())):
            kept = Latents(latents.values * (latents.values >= cut), latents.indices)
            return kept, cuts.expand(n_members)
        candidates = min(2 * candidates, config.d_sae)


def _cuts(
    values: Float[Tensor, "token candidate"],
    k: int,
    own: Int[Tensor, " token"] | None,
    n_cuts: int,
    shards: Shards,
) -> Float[Tensor, " cut"]:
    """As `sparsity.batch_cut`, of the values of all shards, of which only counts are exchanged.

    Bisection: floats that are not negative are ordered as the whole numbers of the same bits.
    """
    tokens = (
        torch.zeros(len(values), dtype=torch.long, device=values.device) if own is None else own
    )
    n_tokens = torch.bincount(tokens, minlength=n_cuts)
    bits = values.view(_BITS[values.dtype])
    tiny = torch.full_like(values[0, 0], torch.finfo(values.dtype).tiny).view(bits.dtype)
    low = tiny.long().expand(n_cuts).clone()  # k n values at least are as large, or it is the cut
    high = torch.full_like(low, torch.iinfo(bits.dtype).max)  # fewer are
    for _ in range(torch.iinfo(bits.dtype).bits):
        middle = low + (high - low) // 2
        reached = (bits >= middle[tokens].unsqueeze(1)).sum(1)
        counts = torch.zeros_like(low).index_add_(0, tokens, reached)
        enough = shards.sum(counts) >= k * n_tokens
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    cuts = low.to(bits.dtype).view(values.dtype)
    return cuts.masked_fill(n_tokens == 0, torch.inf)


def _add_auxk(
    sae: SAE,
    inputs: Float[Tensor, "token d_model"],
    residual: Float[Tensor, "token d_model"],
    dead: Bool[Tensor, " d_sae"],
    weight: float,
    variance: Float[Tensor, ""],
    gradients: dict[str, Tensor],
    shards: Shards,
) -> Float[Tensor, ""]:
    """Add the shard's gradients of the auxiliary loss, weighted; returns the loss."""
    which = dead.nonzero().squeeze(1)
    n_dead = shards.gather(torch.tensor([len(which)], device=dead.device)).flatten().tolist()
    if not sum(n_dead):
        return inputs.new_zeros(())
    k, share = reference.auxk_size(sae.config.d_model, sum(n_dead))
    scale = 2 * share * weight / variance
    if sum(n_dead) <= FEW * k:
        squares = add_dense_auxk(
            sae,
            inputs,
            residual,
            which,
            k,
            scale,
            gradients,
            rows=chunk_rows(sae.b_enc.new_empty(max(max(n_dead), k * shards.count))),
            activate=partial(_most_active, shards=shards, all_of_them=k == sum(n_dead)),
            total=shards.sum,
        )
        return share * squares / variance
    latents = _of_largest(inputs, sae.W_enc[which], sae.b_enc[which], k, shards)
    if len(which):
        latents = Latents(latents.values, which[latents.indices])
    decoded = Decoded.of(latents, sae.W_dec, (sae.config.d_sae,))
    error = shards.sum(decoded.rows[:, 0].contiguous()) - residual
    at_values = decoded.value_gradient(error * scale) * (latents.values > 0)
    added = gradients_of(sae, inputs, inputs, None, decoded, error * scale, at_values)
    for name, gradient in added.items():
        gradients[name] += gradient
    return share * error.square().sum() / variance


def _most_active(
    pre_activations: Float[Tensor, "token dead"], k: int, shards: Shards, all_of_them: bool
) -> Float[Tensor, "token dead"]:
    """Activations of the latents among the k most active of all shards; the others' are zero."""
    if all_of_them:
        return pre_activations.relu_()
    values, indices = torch.topk(pre_activations, min(k, pre_activations.shape[1]), sorted=False)
    values = F.pad(values.relu_(), (0, k - values.shape[1]))
    values *= _among_largest(values, k, shards)
    return pre_activations.zero_().scatter_(1, indices, values[:, : indices.shape[1]])
