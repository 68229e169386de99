"""Which latents are active on each token of a batch, without ever holding [token, d_sae]."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from groupsae.architectures import BY_BATCH
from groupsae.products import linear
from groupsae.sae.autoencoder import SAE
from groupsae.sae.sparsity import Latents, batch_cut, kernel

_CHUNK_BYTES = 16 * 2**20  # of pre-activations
_DENSE_BELOW = 8  # d_sae / active latents: a sparse step needs fewer than one in so many

# Each token's position among the member layers, and a bias on the latents for each of these.
_MemberBias: TypeAlias = tuple[Int[Tensor, " token"], Float[Tensor, "member latent"]]


@dataclass(frozen=True)
class Chosen:
    """The active latents of a batch.

    Attributes:
        cuts: As in :class:`StepResult`.
        near: jumprelu: entries whose pre-activation is in the estimators' rectangle about the
            threshold, and these thresholds. They have a place in `latents` whether active or not.
        counts: jumprelu: how many places of each token hold an active or near entry: the first.
    """

    latents: Latents
    cuts: Float[Tensor, " member"] | None = None
    near: tuple[Bool[Tensor, "token k"], Float[Tensor, "token k"]] | None = None
    counts: Int[Tensor, " token"] | None = None


def choose_latents(
    sae: SAE, inputs: Float[Tensor, "token d_model"], members: Int[Tensor, " token"] | None
) -> Chosen | None:
    """The active latents in training; None where a sparse step is not to be had."""
    config = sae.config
    bias = None
    if config.learned_affine == "bias":
        bias = members_of(sae, members, len(inputs)), sae.latent_bias

    def largest(k: int) -> Latents:
        return encode(inputs, sae.W_enc, sae.b_enc, k, bias)

    if config.architecture == "topk":
        assert config.k is not None
        return Chosen(largest(config.k))
    if config.architecture in BY_BATCH:
        return cut_to_batch(sae, members, largest)
    if config.architecture == "gated":
        return None
    return above_thresholds(sae, members, partial(_find_above, inputs, sae, bias))


def cut_to_batch(
    sae: SAE, members: Int[Tensor, " token"] | None, largest: Callable[[int], Latents]
) -> Chosen:
    """The latents at or above a batch's cut, from the largest few of each token.

    Twice as many are asked for as long as a token's last candidate is at the cut: what it left out
    could be, too.

    Args:
        largest: Gives the so many largest of each token.
    """
    config = sae.config
    assert config.k is not None
    candidates = min(2 * config.k, config.d_sae)
    while True:
        latents = largest(candidates)
        chosen, cuts = at_cuts(sae, members, latents)
        last = latents.values.amin(1, keepdim=True)
        if candidates == config.d_sae or bool((last < cuts).all()):
            return chosen
        candidates = min(2 * candidates, config.d_sae)


def at_cuts(
    sae: SAE, members: Int[Tensor, " token"] | None, candidates: Latents
) -> tuple[Chosen, Float[Tensor, "cut 1"]]:
    """Those of the candidates that are at or above their batch's cut, and each token's cut."""
    config, n_members = sae.config, len(sae.layers)
    own = sae.sharing(members)
    assert config.k is not None
    cuts = batch_cut(candidates.values, config.k, own, n_members)
    cut = (cuts if own is None else cuts[own]).unsqueeze(1)
    kept = Latents(candidates.values * (candidates.values >= cut), candidates.indices)
    return Chosen(kept, cuts.expand(n_members)), cut


def encode(
    inputs: Float[Tensor, "token d_model"],
    W_enc: Float[Tensor, "latent d_model"],
    b_enc: Float[Tensor, " latent"],
    k: int,
    bias: _MemberBias | None = None,
) -> Latents:
    """TopK(relu(W_enc inputs + b_enc)), a chunk of tokens at a time."""
    values = inputs.new_empty(len(inputs), k)
    indices = torch.empty(len(inputs), k, dtype=torch.long, device=inputs.device)
    for chunk, pre_activations in pre_activations_of(inputs, W_enc, b_enc, bias):
        torch.topk(pre_activations, k, sorted=False, out=(values[chunk], indices[chunk]))
        del pre_activations  # one chunk is held at a time
    return Latents(values.relu_(), indices)


def pre_activations_of(
    inputs: Float[Tensor, "token d_model"],
    W_enc: Float[Tensor, "latent d_model"],
    b_enc: Float[Tensor, " latent"],
    bias: _MemberBias | None = None,
) -> Iterator[tuple[slice, Float[Tensor, "chunk latent"]]]:
    """W_enc inputs + b_enc, and the bias of each token's layer, a chunk of tokens at a time."""
    rows = chunk_rows(b_enc)
    for start in range(0, len(inputs), rows):
        chunk = slice(start, start + rows)
        pre_activations = linear(inputs[chunk], W_enc, b_enc)
        if bias is not None:
            members, of_member = bias
            pre_activations += of_member[members[chunk]]
        yield chunk, pre_activations
        del pre_activations


def above_thresholds(
    sae: SAE,
    members: Int[Tensor, " token"] | None,
    find: Callable[[Float[Tensor, "row d_sae"], Int[Tensor, " token"] | None], Found | None],
) -> Chosen | None:
    """jumprelu and relu: what is above, or within half a bandwidth of, each latent's threshold.

    Args:
        find: Gives what is above the floors, of which each member layer has a row, or all share
            one; None where a token has more of that than is worth a sparse step.
    """
    config = sae.config
    bandwidth = config.bandwidth or 0.0
    table = torch.zeros_like(sae.b_enc).unsqueeze(0)
    if config.architecture == "jumprelu":
        table = sae.log_threshold.exp()
    own = sae.sharing(members)
    found = find(table - bandwidth / 2, own)
    if found is None:
        return None
    rows = 0 if own is None else own.unsqueeze(1) * config.d_sae
    thresholds = table.flatten()[rows + found.indices]
    active = found.values > thresholds
    latents = Latents(torch.where(active, found.values, 0.0), found.indices)
    if config.bandwidth is None:
        return Chosen(latents)
    near = kernel(found.values, thresholds, bandwidth) > 0
    return Chosen(latents, near=(near, thresholds), counts=found.counts)


class Found(NamedTuple):
    """Pre-activations above a floor. Behind the first counts[t] of a token there are none.

    The places there hold minus infinity and any latent.
    """

    values: Float[Tensor, "token k"]
    indices: Int[Tensor, "token k"]
    counts: Int[Tensor, " token"]


def _find_above(
    inputs: Float[Tensor, "token d_model"],
    sae: SAE,
    bias: _MemberBias | None,
    floors: Float[Tensor, "row d_sae"],
    own: Int[Tensor, " token"] | None,
) -> Found | None:
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for chunk, pre_activations in pre_activations_of(inputs, sae.W_enc, sae.b_enc, bias):
        floor = floors if own is None else floors[own[chunk]]
        reached = pre_activations > floor
        counts = reached.sum(1)
        most = max(int(counts.max()), 1)
        if most > most_found(sae):
            return None
        parts.append(
            (*torch.topk(pre_activations.masked_fill_(~reached, -torch.inf), most), counts)
        )
        del pre_activations, reached
    most = max(values.shape[1] for values, _, _ in parts)
    values, indices = (
        torch.cat([F.pad(part[i], (0, most - part[i].shape[1]), value=empty) for part in parts])
        for i, empty in enumerate((-torch.inf, 0))
    )
    return Found(values, indices, torch.cat([counts for _, _, counts in parts]))


def most_found(sae: SAE) -> int:
    """Above how many latents of one token a sparse step is not worth it."""
    return max(sae.config.d_sae // _DENSE_BELOW, 1)


def chunk_rows(b_enc: Float[Tensor, " latent"]) -> int:
    """Tokens whose pre-activations of these latents fill a chunk; one at least."""
    return max(_CHUNK_BYTES // (b_enc.element_size() * len(b_enc)), 1)


def members_of(
    sae: SAE, members: Int[Tensor, " token"] | None, tokens: int
) -> Int[Tensor, " token"]:
    """Each token's position among the member layers; it may be left out where there is only one."""
    if members is not None:
        return members
    sae.check_given(members)
    return torch.zeros(tokens, dtype=torch.long, device=sae.b_enc.device)
