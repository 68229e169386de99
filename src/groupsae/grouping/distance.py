"""How far apart layers are: the mean angular distance between their residual streams, streamed.

Distances are measured in two passes over the same tokens: `LayerMoments` finds each layer's mean,
`AngularDistances` subtracts it and measures (or in one pass that leaves the means in, as v1 of the
paper does). Both take the residual streams of all layers batch by batch and hold nothing that
grows with the number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from groupsae.errors import InputError
from groupsae.grouping.layers import checked_layers, format_layers
from groupsae.grouping.matrix import Distances

# How many float64 numbers a chunk of tokens and its products hold: on a CPU few enough for its
# cache (twice as fast as large ones), elsewhere enough to keep the device busy.
CHUNK_NUMBERS = {"cpu": 2**18, "cuda": 2**24}


class AngularDistances:
    """Mean angular distance between every two layers, with its standard error.

    d(p, q) = mean over tokens t of arccos(cos(x^p_t - m_p, x^q_t - m_q)) / pi, in [0, 1]
    (Group-SAE, arXiv 2410.21508, section 3; with m = 0 in v1, with running means in v2's code).

    All pairs come from one batched product per chunk of tokens. It is taken in float64, for arccos
    is ill-conditioned near a cosine of 1: against extended precision a token's distance is off by
    at most 1e-11 at a distance of 1e-4, 1e-14 at 0.1 and 2e-8 at 0 and 1, where float32 products
    would be off by 2e-4, 3e-7 and 2e-4. A zero vector has no direction and counts as orthogonal to
    every other (0.5).
    """

    def __init__(
        self, layers: Sequence[int], center: Float[Tensor, "layer d_model"] | None = None
    ) -> None:
        """Starts with no token.

        Args:
            layers: The layers' numbers, ascending, in the order of the streams.
            center: What to subtract from each layer's residual stream: its mean (`Moments.mean`).
        """
        self.layers = checked_layers(layers)
        self.center = center
        self._sums = _ClusterSums()

    @torch.no_grad()
    def update(
        self,
        streams: Float[Tensor, "layer token d_model"],
        context: Int[Tensor, " token"] | None = None,
    ) -> None:
        """Counts more tokens in.

        Args:
            streams: The layers' residual streams on the same tokens, any float dtype and device.
            context: The number of each token's context. Tokens of one context are correlated, so
                the standard error treats contexts, not tokens, as independent. A context must be
                complete within one call; its number means nothing in the next. Without it every
                token counts as independent.

        Raises:
            InputError: The activations hold a NaN or an infinity.
        """
        check_layers(streams, self.layers)
        n_layers, home = len(streams), home_of(streams)
        rows, columns = torch.tril_indices(n_layers, n_layers, -1, device=home)
        sums, seen = _ClusterSums(), 0
        if context is not None:
            found, member = torch.unique(context.to(home), return_inverse=True)
            sizes = member.bincount(minlength=len(found)).to(torch.float64)
            totals = sizes.new_zeros((len(found), len(rows)))
        for chunk in _chunks(streams):
            angles = _pairwise_angles(centered(chunk, self.center), rows, columns)
            if context is None:
                sums.add(angles, angles.new_ones(len(angles)))
            else:
                totals.index_add_(0, member[seen : seen + len(angles)], angles)
                seen += len(angles)
        if context is not None:
            sums.add(totals, sizes)
        check_finite(sums.total, streams, self.layers)
        sums.tokens = streams.shape[1]
        self._sums.merge(sums)

    def result(self) -> Distances:
        """The distances over all tokens so far.

        The standard error is that of a ratio estimator with clusters c of n_c tokens whose
        distances sum to S_c: SE^2 = C / (C - 1) * sum_c (S_c - n_c * mean)^2 / tokens^2 over C
        clusters. It is None where there is but one cluster.

        Raises:
            InputError: No token was counted.
        """
        sums = self._sums
        check_some(sums.tokens)
        standard_error = sums.standard_error()
        return Distances(
            layers=self.layers,
            matrix=self._square(sums.total / sums.tokens),
            standard_error=None if standard_error is None else self._square(standard_error),
            tokens=sums.tokens,
            center=self.center is not None,
        )

    def _square(self, pairs: Float64[Tensor, " pair"]) -> Float64[np.ndarray, "layer layer"]:
        """The symmetric matrix of zero diagonal whose lower triangle holds the pairs."""
        matrix = np.zeros((len(self.layers), len(self.layers)))
        matrix[np.tril_indices_from(matrix, -1)] = pairs.cpu().numpy()
        return matrix + matrix.T


@dataclass(frozen=True)
class Moments:
    """Mean and size of each layer's residual stream; float64.

    Attributes:
        layers: The layers' numbers, ascending.
        mean: Mean vector of each layer.
        mean_norm: Mean over tokens of ||x||, the L2 norm.
        mean_centered_norm: Mean over tokens of ||x - m||, where a centre m was given.
        tokens: Tokens that were averaged over.
    """

    layers: tuple[int, ...]
    mean: Float64[Tensor, "layer d_model"]
    mean_norm: Float64[Tensor, " layer"]
    mean_centered_norm: Float64[Tensor, " layer"] | None
    tokens: int


class LayerMoments:
    """Each layer's exact mean and mean norm, from float64 sums over tokens."""

    def __init__(
        self, layers: Sequence[int], center: Float[Tensor, "layer d_model"] | None = None
    ) -> None:
        """Starts with no token.

        Args:
            layers: The layers' numbers, ascending, in the order of the streams.
            center: Where given, the mean norm of x - center is measured too.
        """
        self.layers = checked_layers(layers)
        self.center = center
        self._tokens = 0
        self._sum = _zero()  # [layer, d_model]
        self._norms = _zero()  # [layer]
        self._centered_norms = _zero()  # [layer]

    @torch.no_grad()
    def update(self, streams: Float[Tensor, "layer token d_model"]) -> None:
        """Counts more tokens in.

        Args:
            streams: The layers' residual streams on the same tokens, any float dtype and device.

        Raises:
            InputError: The activations hold a NaN or an infinity.
        """
        check_layers(streams, self.layers)
        total, norms, centered_norms = _zero(), _zero(), _zero()
        for chunk in _chunks(streams):
            total = total + chunk.sum(0)
            norms = norms + chunk.norm(dim=-1).sum(0)
            if self.center is not None:
                centered_norms = centered_norms + centered(chunk, self.center).norm(dim=-1).sum(0)
        check_finite(total, streams, self.layers)
        self._tokens += streams.shape[1]
        self._sum = self._sum + total
        self._norms = self._norms + norms
        self._centered_norms = self._centered_norms + centered_norms

    def result(self) -> Moments:
        """The means over all tokens so far.

        Raises:
            InputError: No token was counted.
        """
        check_some(self._tokens)
        return Moments(
            layers=self.layers,
            mean=self._sum / self._tokens,
            mean_norm=self._norms / self._tokens,
            mean_centered_norm=(
                None if self.center is None else self._centered_norms / self._tokens
            ),
            tokens=self._tokens,
        )


@dataclass
class _ClusterSums:
    """What the mean and its standard error need of clusters c of n_c tokens that sum to S_c."""

    tokens: int = 0
    clusters: int = 0
    total: Tensor = field(default_factory=lambda: _zero())  # sum of S_c [pair]
    squares: Tensor = field(default_factory=lambda: _zero())  # sum of S_c^2 [pair]
    weighted: Tensor = field(default_factory=lambda: _zero())  # sum of n_c S_c [pair]
    sizes_squared: Tensor = field(default_factory=lambda: _zero())  # sum of n_c^2

    def add(
        self, sums: Float64[Tensor, "cluster pair"], sizes: Float64[Tensor, " cluster"]
    ) -> None:
        self.clusters += len(sizes)
        self.total = self.total + sums.sum(0)
        self.squares = self.squares + sums.square().sum(0)
        self.weighted = self.weighted + sizes @ sums
        self.sizes_squared = self.sizes_squared + sizes.square().sum()

    def merge(self, other: _ClusterSums) -> None:
        for part in fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))

    def standard_error(self) -> Float64[Tensor, " pair"] | None:
        if self.clusters < 2:
            return None
        mean = self.total / self.tokens
        spread = self.squares - 2 * mean * self.weighted + mean.square() * self.sizes_squared
        correction = self.clusters / (self.clusters - 1)
        return (correction * spread.clamp(min=0)).sqrt() / self.tokens


def _pairwise_angles(
    vectors: Float64[Tensor, "token layer d_model"],
    rows: Int[Tensor, " pair"],
    columns: Int[Tensor, " pair"],
) -> Float64[Tensor, "token pair"]:
    """Angle / pi between two layers' vectors, for each token and pair of layers."""
    products = torch.bmm(vectors, vectors.mT)
    squares = products.diagonal(dim1=1, dim2=2)
    norms = squares.clamp(min=torch.finfo(torch.float64).tiny).sqrt()  # 0 / tiny is orthogonal
    cosines = products[:, rows, columns] / (norms[:, rows] * norms[:, columns])
    return cosines.clamp_(-1, 1).acos_() / math.pi


def _chunks(
    streams: Float[Tensor, "layer token d_model"],
) -> Iterator[Float64[Tensor, "token layer d_model"]]:
    """The streams in float64, few tokens at a time, so that memory stays bounded."""
    n_layers, n_tokens, d_model = streams.shape
    numbers = CHUNK_NUMBERS.get(streams.device.type, CHUNK_NUMBERS["cpu"])
    size = max(1, numbers // (n_layers * (n_layers + d_model)))
    for start in range(0, n_tokens, size):
        chunk = streams[:, start : start + size].to(home_of(streams))
        yield chunk.to(torch.float64).transpose(0, 1)


def centered(
    chunk: Float64[Tensor, "token layer d_model"], center: Float[Tensor, "layer d_model"] | None
) -> Float64[Tensor, "token layer d_model"]:
    return chunk if center is None else chunk - center.to(chunk.device).to(torch.float64)


def home_of(streams: Tensor) -> torch.device:
    """Where the arithmetic is done: with the streams, but for devices that know no float64."""
    return torch.device("cpu") if streams.device.type == "mps" else streams.device


def _zero() -> Float64[Tensor, ""]:
    """An empty sum: adding a tensor to it gives that tensor, wherever it lies."""
    return torch.zeros((), dtype=torch.float64)


def check_layers(streams: Tensor, layers: tuple[int, ...]) -> None:
    if len(streams) != len(layers):
        raise InputError(
            f"streams: {len(streams)} residual streams for layers {format_layers(layers)}; "
            "give one per layer"
        )


def check_finite(sums: Tensor, streams: Tensor, layers: tuple[int, ...]) -> None:
    """Raises if a NaN or infinity went into the sums; costs one look at the few sums."""
    if bool(sums.isfinite().all()):
        return
    finite = streams.isfinite().all(-1).all(-1).tolist()
    sick = [layer for layer, fine in zip(layers, finite, strict=True) if not fine]
    raise InputError(
        f"the activations of layers {format_layers(sick or layers)} hold a NaN or an infinity; "
        "load the host model in float32, or check that its weights are sound"
    )


def check_some(tokens: int) -> None:
    if tokens == 0:
        raise InputError("no token was measured: the corpus gave none; give it more text")
