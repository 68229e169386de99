"""Which latents of a layer's baseline a group's latents match: by direction, and by firing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int32, Int64
from scipy.sparse import csr_array
from torch import Tensor

from groupsae.errors import InputError
from groupsae.evaluation.similarity import decoder_rows
from groupsae.interpretation.latent_cache import FiringRange, LatentCache
from groupsae.sae import SAE

DEFINITIONS = {
    "cosine": "cosines of a latent's decoder row with the baseline's rows, the largest first",
    "nearest": "the baseline's latents of those rows",
    "jaccard": "|fires(a) and fires(b)| / |fires(a) or fires(b)| with the latents b of the "
    "baseline, on the same tokens of the same layer, the largest first; 0 where the latent is "
    "silent there",
    "companions": "the baseline's latents b of those; -1 where the index is 0",
}


@dataclass(frozen=True)
class Matches:
    """The n best matches of latents of one SAE among those of another, at one layer.

    See :data:`DEFINITIONS`.
    """

    cosine: Float64[np.ndarray, "latent n"]
    nearest: Int64[np.ndarray, "latent n"]
    jaccard: Float64[np.ndarray, "latent n"]
    companions: Int64[np.ndarray, "latent n"]


@dataclass(frozen=True)
class Stratum:
    """Latents whose similarity lies in one part of its range.

    Attributes:
        low, high: The part's ends.
        population: How many latents lie there.
        latents: Those that were drawn, the least similar first.
    """

    low: float
    high: float
    population: int
    latents: tuple[int, ...]


def match(
    cache: LatentCache,
    sae_name: str,
    sae: SAE,
    baseline_name: str,
    baseline: SAE,
    layer: int,
    *,
    n: int = 1,
    latents: Int64[np.ndarray, " latent"] | None = None,
) -> Matches:
    """The best matches of a group's latents among those of a layer's baseline, or the other way.

    The firings of both SAEs at the layer are in memory together: about 30 bytes each.

    Args:
        sae_name, baseline_name: Their names in the cache.
        n: How many of each latent; fewer where the baseline has fewer latents.
        latents: Whose matches; by default those of all.

    Raises:
        InputError: If the cache lacks one of them at the layer.
    """
    chosen = np.arange(cache.d_sae(sae_name)) if latents is None else latents
    own, theirs = (cache.range(x, layer, 0, cache.d_sae(x)) for x in (sae_name, baseline_name))
    rows = decoder_rows(sae, layer)
    cosine, nearest = nearest_rows(
        rows[torch.from_numpy(chosen).to(rows.device)], decoder_rows(baseline, layer), n
    )
    return Matches(
        cosine.double().cpu().numpy(),
        nearest.cpu().numpy(),
        *companions(_of(chosen, own), theirs, n, positions=cache.tokens.size),
    )


@torch.no_grad()
def nearest_rows(
    A: Float[Tensor, "a d_model"], B: Float[Tensor, "b d_model"], n: int = 1, block: int = 4096
) -> tuple[Float[Tensor, "a n"], Int64[Tensor, "a n"]]:
    """The n largest cosines of each row of A with rows of B, and which; of equal ones the first.

    The cosines are those of :func:`groupsae.evaluation.similarity.best_matches`. Where B has fewer
    rows than n, there are as many as it has.

    Args:
        block: Rows of A and of B that are multiplied at a time.
    """
    dtype = torch.promote_types(A.dtype, torch.float32)
    found = []
    for some in torch.split(A, block):
        directions = torch.nn.functional.normalize(some.to(dtype), dim=1)
        best = directions.new_empty(len(some), 0)
        which = best.to(torch.int64)
        for start in range(0, len(B), block):
            columns = torch.nn.functional.normalize(B[start : start + block].to(dtype), dim=1)
            largest, at = _largest(directions @ columns.T, n)
            best, order = torch.cat([best, largest], 1).sort(dim=1, descending=True, stable=True)
            best, order = best[:, :n], order[:, :n]
            which = torch.cat([which, at + start], 1).gather(1, order)
        found.append((best.clamp(-1, 1), which))
    return torch.cat([best for best, _ in found]), torch.cat([which for _, which in found])


def companions(
    a: FiringRange, b: FiringRange, n: int = 1, *, positions: int, block: int = 512
) -> tuple[Float64[np.ndarray, "a n"], Int64[np.ndarray, "a n"]]:
    """For each latent of A the n largest Jaccard indices with latents of B, and which.

    The indices are those of :func:`groupsae.evaluation.concordance.concordance`. Of equal ones the
    first latents are taken. Where a latent of A fires with fewer than n of B, the others' index is
    0, and which is -1. Where B has fewer latents than n, there are as many as it has.

    Args:
        positions: Tokens of the cache.
        block: Latents of A whose common firings with all of B, `[block, b]`, are in memory at a
            time.
    """
    by_token, of_a, of_b = _by_token(b, positions), np.diff(a.offsets), np.diff(b.offsets)
    n = min(n, len(of_b))
    best, which = np.zeros((len(of_a), n)), np.full((len(of_a), n), -1, np.int64)
    own = np.split(a.positions, a.offsets[1:-1])
    for start in range(0, len(of_a), block):
        some = slice(start, start + block)
        both = np.stack([_firings_on(tokens, by_token) for tokens in own[some]])
        either = of_a[some, None] + of_b - both
        largest, at = _largest(torch.from_numpy(both / np.maximum(either, 1)), n)
        best[some] = largest.numpy()
        which[some] = torch.where(largest > 0, at, -1).numpy()
    return best, which


def strata(
    similarity: Float64[np.ndarray, " latent"],
    eligible: Bool[np.ndarray, " latent"],
    *,
    parts: int = 10,
    per_part: int = 3,
    seed: int = 0,
) -> list[Stratum]:
    """Draw latents from equal parts of the similarities from 0 to 1; those below 0 count as 0.

    Pairs over the whole range can so be set side by side, however few are at its ends.

    Args:
        eligible: Which latents may be drawn: those that fire, say.

    Raises:
        InputError: If none may be.
    """
    if not eligible.any():
        raise InputError("no latent fires that could be set beside its match; cache more tokens")
    part_of = np.clip(similarity * parts, 0, parts - 1).astype(np.int64)
    random = np.random.default_rng(seed)
    found = []
    for part in range(parts):
        there = np.flatnonzero((part_of == part) & eligible)
        drawn = random.choice(there, min(per_part, len(there)), replace=False)
        latents = drawn[np.argsort(similarity[drawn], kind="stable")]
        low, high = part / parts, (part + 1) / parts
        found.append(Stratum(low, high, len(there), tuple(latents.tolist())))
    return found


def _largest(
    values: Float[Tensor, "row column"], n: int
) -> tuple[Float[Tensor, "row n"], Int64[Tensor, "row n"]]:
    """The n largest of each row, or all, and where; of equal ones the first. Spoils `values`."""
    found = []
    for _ in range(min(n, values.shape[1])):  # topk would take any of equal ones
        largest, at = values.max(1, keepdim=True)
        values.scatter_(1, at, -torch.inf)
        found.append((largest, at))
    return torch.cat([largest for largest, _ in found], 1), torch.cat([at for _, at in found], 1)


def _of(latents: Int64[np.ndarray, " chosen"], firings: FiringRange) -> FiringRange:
    """The firings of some of the latents."""
    counts = np.diff(firings.offsets)[latents]
    offsets = np.concatenate([[0], counts.cumsum()])
    taken = np.repeat(firings.offsets[latents] - offsets[:-1], counts) + np.arange(offsets[-1])
    return FiringRange(offsets, firings.positions[taken], firings.activations[taken])


def _by_token(firings: FiringRange, positions: int) -> csr_array:
    """Tokens x latents, a one at every firing."""
    ones = np.ones(len(firings.positions), np.int8)
    shape = (len(firings.offsets) - 1, positions)
    # scipy would copy the positions to the offsets' dtype
    small = len(ones) <= np.iinfo(np.int32).max
    offsets = firings.offsets.astype(np.int32) if small else firings.offsets
    return csr_array((ones, firings.positions, offsets), shape=shape).T.tocsr()


def _firings_on(
    tokens: Int32[np.ndarray, " token"], by_token: csr_array, block: int = 4096
) -> Int64[np.ndarray, " latent"]:
    """On how many of the tokens each latent fires; `block` tokens' firings are gathered at once."""
    counts = np.zeros(by_token.shape[1], np.int64)
    for start in range(0, len(tokens), block):
        latents = by_token[tokens[start : start + block]].indices
        counts += np.bincount(latents, minlength=len(counts))
    return counts
