"""Which latents of a layer's baseline a group's latents match: by direction, and by firing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from scipy.sparse import csr_array
from torch import Tensor

from groupsae.errors import InputError
from groupsae.evaluation.similarity import decoder_rows
from groupsae.interpretation.latent_cache import FiringRange, LatentCache
from groupsae.sae import SAE

DEFINITIONS = {
    "cosine": "largest cosine of a latent's decoder row with one of the baseline's",
    "nearest": "the baseline's latent of that row",
    "jaccard": "largest |fires(a) and fires(b)| / |fires(a) or fires(b)| with a latent b of the "
    "baseline, on the same tokens of the same layer; 0 where the latent is silent there",
    "companion": "the baseline's latent b of that; -1 where there is none",
}


@dataclass(frozen=True)
class Matches:
    """The best matches of each latent of one SAE among those of another, at one layer.

    See :data:`DEFINITIONS`.
    """

    cosine: Float64[np.ndarray, " latent"]
    nearest: Int64[np.ndarray, " latent"]
    jaccard: Float64[np.ndarray, " latent"]
    companion: Int64[np.ndarray, " latent"]


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
    cache: LatentCache, sae_name: str, sae: SAE, baseline_name: str, baseline: SAE, layer: int
) -> Matches:
    """The best matches of a group's latents among those of a layer's baseline.

    Args:
        sae_name, baseline_name: Their names in the cache.

    Raises:
        InputError: If the cache lacks one of them at the layer.
    """
    whole = [cache.range(name, layer, 0, cache.d_sae(name)) for name in (sae_name, baseline_name)]
    cosine, nearest = nearest_rows(decoder_rows(sae, layer), decoder_rows(baseline, layer))
    jaccard, companion = companions(*whole, positions=cache.tokens.size)
    return Matches(cosine.double().cpu().numpy(), nearest.cpu().numpy(), jaccard, companion)


@torch.no_grad()
def nearest_rows(
    A: Float[Tensor, "a d_model"], B: Float[Tensor, "b d_model"], block: int = 4096
) -> tuple[Float[Tensor, " a"], Int64[Tensor, " a"]]:
    """The largest cosine of each row of A with a row of B, and which; of equal ones the first.

    The cosines are those of :func:`groupsae.evaluation.similarity.best_matches`.

    Args:
        block: Rows of A and of B that are multiplied at a time.
    """
    dtype = torch.promote_types(A.dtype, torch.float32)
    best = torch.full((len(A),), -2.0, dtype=dtype, device=A.device)
    which = torch.zeros(len(A), dtype=torch.int64, device=A.device)
    for first in range(0, len(A), block):
        rows = slice(first, first + block)
        directions = torch.nn.functional.normalize(A[rows].to(dtype), dim=1)
        for start in range(0, len(B), block):
            columns = torch.nn.functional.normalize(B[start : start + block].to(dtype), dim=1)
            cosines, indices = (directions @ columns.T).max(1)
            better = cosines > best[rows]
            best[rows] = torch.where(better, cosines, best[rows])
            which[rows] = torch.where(better, indices + start, which[rows])
    return best.clamp(-1, 1), which


def companions(
    a: FiringRange, b: FiringRange, *, positions: int, block: int = 512
) -> tuple[Float64[np.ndarray, " a"], Int64[np.ndarray, " a"]]:
    """For each latent of A the largest Jaccard index with a latent of B, and which.

    The indices are those of :func:`groupsae.evaluation.concordance.concordance`. Where a latent of
    A is silent, or fires with none of B, the index is 0, and which is -1.

    Args:
        positions: Tokens of the cache.
        block: Latents of A whose common firings with all of B, `[block, b]`, are in memory at a
            time.
    """
    by_token = _matrix(b, positions).T.tocsr()
    of_a, of_b = _matrix(a, positions), np.diff(b.offsets)
    best, which = np.zeros(of_a.shape[0]), np.full(of_a.shape[0], -1, np.int64)
    for start in range(0, of_a.shape[0], block):
        some = slice(start, start + block)
        both = (of_a[some] @ by_token).toarray()
        either = np.diff(a.offsets)[some, None] + of_b - both
        jaccard = both / np.maximum(either, 1)
        best[some] = jaccard.max(axis=1)
        which[some] = np.where(best[some] > 0, jaccard.argmax(axis=1), -1)
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


def _matrix(firings: FiringRange, positions: int) -> csr_array:
    """Latents x tokens, a one at every firing."""
    ones = np.ones(len(firings.positions), np.int32)
    shape = (len(firings.offsets) - 1, positions)
    return csr_array((ones, firings.positions, firings.offsets), shape=shape)
