"""Concordance: whether the latents of two SAEs fire on the same tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int32, Int64
from scipy.sparse import csr_array
from torch import Tensor

from groupsae.errors import InputError
from groupsae.host.model import HostModel
from groupsae.host.tokens import TokenStream
from groupsae.progress import progress
from groupsae.sae import SAE
from groupsae.sae.kernels.inference import encode


@dataclass(frozen=True)
class Firings:
    """Which latents of one SAE are active on which tokens of one layer.

    Takes 4 bytes a firing and 8 a token: 4 tokens L0 + 8 tokens bytes in all, 136 MB for 1M tokens
    and k = 32.

    Attributes:
        bounds: Token t's firings lie at bounds[t] to bounds[t + 1].
        latents: The active latents, token after token; in no particular order within one.
        d_sae: How many latents there are.
    """

    bounds: Int64[np.ndarray, " bound"]
    latents: Int32[np.ndarray, " firing"]
    d_sae: int

    @property
    def tokens(self) -> int:
        """Tokens looked at, those where no latent is active included."""
        return len(self.bounds) - 1

    def counts(self) -> Int64[Tensor, " d_sae"]:
        """On how many tokens each latent is active."""
        return _counts(self.latents, self.d_sae)


@dataclass(frozen=True)
class FiringSets:
    """The firings of several SAEs on the same tokens.

    Attributes:
        of: (SAE, layer) -> its firings there.
        tokens: Tokens looked at.
        excluded: Special tokens left out.
    """

    of: Mapping[tuple[SAE, int], Firings]
    tokens: int
    excluded: int


@torch.no_grad()
def firing_sets(
    host: HostModel,
    stream: TokenStream,
    wanted: Iterable[tuple[SAE, int]],
    *,
    tokens: int,
    batch_contexts: int,
    special: Iterable[int] = (),
) -> FiringSets:
    """Where each latent of each wanted (SAE, layer) is active, from one pass over the text.

    All of it is in memory at the end: about 4 bytes per token, active latent and (SAE, layer); see
    :class:`Firings`.

    Args:
        wanted: SAEs, each with the member layer whose residual streams it is to encode.
        tokens: Tokens to read; rounded up to whole contexts.
        batch_contexts: Contexts in one forward of the host.
        special: Token ids to leave out.

    Raises:
        InputError: If no token is left, or an SAE has no such member layer.
        EndOfText: If the text is used up.
    """
    if tokens < 1:
        raise InputError(f"similarity.tokens={tokens}: firing sets need at least one token")
    growing = {pair: _Growing() for pair in wanted}
    layers = sorted({layer for _, layer in growing})
    counted = excluded = 0
    with progress("firing sets", tokens) as bar:
        for input_ids, mask in stream.batches(tokens, batch_contexts, special):
            counted += int(mask.sum())
            excluded += int((~mask).sum())
            streams, mask = host.residual_streams(input_ids, layers), mask.to(host.device)
            for (sae, layer), firings in growing.items():
                chunk = max(_CHUNK_NUMBERS // sae.config.d_sae, 1)
                for x in torch.split(streams[layer][mask], chunk):
                    firings.add(sae, x, layer)
            bar.advance(input_ids.numel())
    if not counted:
        raise InputError(
            f"similarity.tokens={tokens}: all {excluded:,} tokens read are special ones, which are "
            "left out; give more text, or set tokens.exclude_special=false"
        )
    return FiringSets(
        {(sae, layer): firings.joined(sae) for (sae, layer), firings in growing.items()},
        tokens=counted,
        excluded=excluded,
    )


def concordance(
    a: Firings, b: Firings, block: int = 4096
) -> tuple[Float64[Tensor, " d_sae_a"], Bool[Tensor, " d_sae_a"]]:
    """For each latent of A, the largest Jaccard index of its firing set with one of a latent of B.

    |fires(a) and fires(b)| / |fires(a) or fires(b)|, as in the published code of Group-SAE (arXiv
    2410.21508 v2). Concordance(A, B) is the mean over the latents of A that fire at all: see
    :func:`mean_concordance`.

    For one latent of A at a time, B's firings on its tokens are gathered and counted, so that the
    work is one step per firing of A and firing of B on the same token, without a matrix of d_sae x
    d_sae.

    Args:
        block: Tokens whose firings of B are gathered at a time. Memory: about 5 bytes per block
            and active latent, 6 per firing of A, 1 per firing of B, some vectors of length d_sae.

    Returns:
        The largest index of every latent of A, 0 where it is silent; and which are silent.

    Raises:
        InputError: If A and B have not seen the same number of tokens.
    """
    if a.tokens != b.tokens:
        raise InputError(
            f"firing sets on {a.tokens:,} and on {b.tokens:,} tokens cannot be compared; gather "
            "both from the same tokens"
        )
    by_latent, by_token = _matrix(a).tocsc(), _matrix(b)
    counts_b = b.counts()
    best = torch.zeros(a.d_sae, dtype=torch.float64)
    for latent in range(a.d_sae):
        tokens = by_latent.indices[by_latent.indptr[latent] : by_latent.indptr[latent + 1]]
        if len(tokens):
            both = torch.zeros_like(counts_b)
            for start in range(0, len(tokens), block):
                both += _counts(by_token[tokens[start : start + block]].indices, b.d_sae)
            best[latent] = (both / (len(tokens) + counts_b - both).double()).max()
    return best, torch.from_numpy(np.diff(by_latent.indptr) == 0)


def mean_concordance(
    best: Float64[Tensor, " d_sae"], silent: Bool[Tensor, " d_sae"]
) -> tuple[float | None, int]:
    """The mean over the latents that fire, None where none does; and how many are silent.

    A silent latent agrees with nothing and disagrees with nothing: it is counted apart.
    """
    mean = None if bool(silent.all()) else float(best[~silent].mean())
    return mean, int(silent.sum())


_CHUNK_NUMBERS = 2**26  # pre-activations, [token d_sae], that one SAE computes at a time


class _Growing:
    """The firings of one SAE at one layer, batch by batch."""

    def __init__(self) -> None:
        self._latents: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []

    def add(self, sae: SAE, x: Float[Tensor, "token d_model"], layer: int) -> None:
        found = encode(sae, x, layer)
        active = found.values > 0
        self._latents.append(found.indices[active].to(torch.int32).cpu().numpy())
        self._counts.append(active.sum(-1).cpu().numpy())

    def joined(self, sae: SAE) -> Firings:
        """All of them, in one piece; the batches are let go."""
        counts = np.concatenate(self._counts)
        latents = np.concatenate(self._latents)
        self._latents.clear()
        return Firings(np.concatenate([[0], counts.cumsum()]), latents, sae.config.d_sae)


def _counts(latents: Int[np.ndarray, " firing"], d_sae: int) -> Int64[Tensor, " d_sae"]:
    return torch.bincount(torch.from_numpy(latents), minlength=d_sae)  # numpy's would copy to int64


def _matrix(firings: Firings) -> csr_array:
    """Tokens x latents, a one at every firing."""
    ones = np.ones(len(firings.latents), np.int8)
    # scipy would copy the latents to the bounds' dtype
    small = len(ones) <= np.iinfo(np.int32).max
    bounds = firings.bounds.astype(np.int32) if small else firings.bounds
    shape = (firings.tokens, firings.d_sae)
    return csr_array((ones, firings.latents, bounds), shape=shape)
