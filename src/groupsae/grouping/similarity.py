"""Other measures of how alike two layers are, as distances: linear CKA and SVCCA, streamed.

Both take the residual streams batch by batch through the same `update` and `result` as
`AngularDistances`, hold nothing that grows with the number of tokens, and give 1 - similarity.
They ask another question than the angle does: whether two layers hold the same information up to a
rotation and one scale (CKA) or up to any invertible linear map (SVCCA), where the angle compares
the vectors as they stand, as a shared dictionary must read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from groupsae.errors import InputError
from groupsae.grouping.distance import (
    AngularDistances,
    centered,
    check_finite,
    check_layers,
    check_some,
    home_of,
)
from groupsae.grouping.layers import checked_layers
from groupsae.grouping.matrix import Distances

MINIBATCH = 256  # tokens of one unbiased HSIC; its Gram matrices take 8 * 256^2 bytes per layer
LEAST_TOKENS = 4  # the unbiased HSIC divides by n - 3
KEPT_VARIANCE = 0.99
# How many float64 numbers a chunk of tokens holds: enough that adding its products to the
# covariances costs little beside them.
CHUNK_NUMBERS = 2**23


class CKADistances:
    """1 - linear CKA between every two layers, debiased, with its standard error.

    CKA(p, q) = mean_b H_b(p, q) / sqrt(mean_b H_b(p, p) * mean_b H_b(q, q)) over minibatches b of
    at least `MINIBATCH` tokens, each weighted by its tokens n_b (Nguyen, Raghu and Kornblith 2021,
    arXiv 2010.15327). H is the unbiased HSIC_1 of Song et al. 2012 with the linear kernels
    K = X_p X_p^T and L = X_q X_q^T of Kornblith et al. 2019 (arXiv 1905.00414); ~ marks a zero
    diagonal:

        H = (tr(K~ L~) + 1'K~1 1'L~1 / ((n - 1)(n - 2)) - 2 / (n - 2) 1'K~ L~1) / (n (n - 3))

    H is an inner product of U-centred Gram matrices (Szekely and Rizzo 2014), so CKA lies in
    [-1, 1]; a negative one, as chance gives for layers with nothing in common, counts as 0. It is
    the same after a shift, a rotation or one scale of all tokens of a layer. A layer that is
    constant has nothing in common with any other.
    """

    def __init__(
        self, layers: Sequence[int], center: Float[Tensor, "layer d_model"] | None = None
    ) -> None:
        """Starts with no token.

        Args:
            layers: The layers' numbers, ascending, in the order of the streams.
            center: Subtracted first (`Moments.mean`): no matter but for rounding.
        """
        self.layers = checked_layers(layers)
        self.center = center
        self._sums = _HSICSums()
        self._waiting: Tensor | None = None  # [layer, token, d_model], too few for a minibatch

    @torch.no_grad()
    def update(
        self,
        streams: Float[Tensor, "layer token d_model"],
        context: Int[Tensor, " token"] | None = None,
    ) -> None:
        """Counts more tokens in.

        The tokens of one call are dealt out to its minibatches in turn, so that each minibatch
        holds few tokens of one context; a call of less than one minibatch waits for the next.

        Args:
            streams: The layers' residual streams on the same tokens, any float dtype and device.
            context: Not looked at: minibatches of one call share its contexts, so the standard
                error takes calls as independent. A context must be complete within one call.

        Raises:
            InputError: The activations hold a NaN or an infinity.
        """
        check_layers(streams, self.layers)
        check_finite(streams, streams, self.layers)
        if self._waiting is not None:
            streams = torch.cat([self._waiting, streams], dim=1)
        if streams.shape[1] < MINIBATCH:
            self._waiting = streams.clone()
            return
        self._waiting = None
        self._sums = self._sums.plus(self._cluster(streams))

    @torch.no_grad()
    def result(self) -> Distances:
        """The distances over all tokens so far.

        The standard error is that of the ratio, linearised, with the calls as clusters. It is None
        where there is but one.

        Raises:
            InputError: Fewer than four tokens were counted.
        """
        sums, waiting = self._sums, self._waiting
        if waiting is not None and waiting.shape[1] >= LEAST_TOKENS:
            sums = sums.plus(self._cluster(waiting))
        check_some(sums.tokens + (0 if waiting is None else waiting.shape[1]))
        if not sums.tokens:
            raise InputError(
                f"tokens: CKA needs at least {LEAST_TOKENS}, fewer were measured; measure more"
            )
        similarity = sums.similarity()
        standard_error = sums.standard_error()
        return Distances(
            layers=self.layers,
            matrix=_symmetric((1 - similarity).clamp(0, 1)),
            standard_error=None if standard_error is None else _symmetric(standard_error),
            tokens=sums.tokens,
            center=True,
            similarity="cka",
        )

    def _cluster(self, streams: Float[Tensor, "layer token d_model"]) -> _HSICSums:
        """The tokens of one call, in minibatches of at least `MINIBATCH` tokens if there are."""
        n_tokens = streams.shape[1]
        n_batches = max(1, n_tokens // MINIBATCH)
        total = torch.zeros((), dtype=torch.float64)
        for first in range(n_batches):
            vectors = _float64(streams[:, first::n_batches], self.center).transpose(0, 1)
            total = total + vectors.shape[1] * unbiased_hsic(vectors)
        own = total.diagonal()
        return _HSICSums(
            n_tokens, 1, total, total.square(), total * own[:, None], own * own[:, None]
        )


class SVCCADistances:
    """1 - SVCCA between every two layers.

    SVCCA(p, q) is the mean of the canonical correlations between the leading principal directions
    of the two layers, as many of each as hold `variance` of its variance (Raghu et al. 2017, arXiv
    1706.05806; in variance, the squares of the singular values); the mean is over the fewer of the
    two numbers of directions. With all of the variance it is CCA, which no invertible linear map of
    a layer changes.

    All of it comes from float64 sums of x_p x_q^T over tokens: 4 L (L + 1) d^2 bytes for L layers
    of width d. There is no standard error.
    """

    def __init__(
        self,
        layers: Sequence[int],
        center: Float[Tensor, "layer d_model"] | None = None,
        variance: float = KEPT_VARIANCE,
    ) -> None:
        """Starts with no token.

        Args:
            layers: The layers' numbers, ascending, in the order of the streams.
            center: Subtracted first (`Moments.mean`): no matter but for rounding.
            variance: Share of each layer's variance that its directions are to hold, in (0, 1].
        """
        self.layers = checked_layers(layers)
        self.center = center
        self.variance = variance
        self._tokens = 0
        self._sum = torch.zeros((), dtype=torch.float64)  # [layer, d_model]
        self._products: list[Tensor] = []  # of each layer p: x_p^T x_q for q <= p, side by side

    @torch.no_grad()
    def update(
        self,
        streams: Float[Tensor, "layer token d_model"],
        context: Int[Tensor, " token"] | None = None,
    ) -> None:
        """Counts more tokens in.

        Args:
            streams: The layers' residual streams on the same tokens, any float dtype and device.
            context: Not looked at.

        Raises:
            InputError: The activations hold a NaN or an infinity.
        """
        check_layers(streams, self.layers)
        check_finite(streams, streams, self.layers)
        n_layers, n_tokens, d_model = streams.shape
        ends = [d_model * (p + 1) for p in range(n_layers)]
        if not self._products:
            home = home_of(streams)
            self._products = [
                torch.zeros(d_model, end, dtype=torch.float64, device=home) for end in ends
            ]
        size = max(1, CHUNK_NUMBERS // (n_layers * d_model))
        for start in range(0, n_tokens, size):
            vectors = _float64(streams[:, start : start + size], self.center)
            self._sum = self._sum + vectors.sum(0)
            flat = vectors.flatten(1)
            for products, end in zip(self._products, ends, strict=True):
                products.addmm_(flat[:, end - d_model : end].T, flat[:, :end])
        self._tokens += n_tokens

    @torch.no_grad()
    def result(self) -> Distances:
        """The distances over all tokens so far.

        Raises:
            InputError: No token was counted, or so few that some correlations are 1 whatever the
                layers hold.
        """
        check_some(self._tokens)
        n_layers = len(self.layers)
        # Of each layer: the map from its vectors to its directions, each of variance 1.
        whitened = [_whitening(self._covariance(p, p), self.variance) for p in range(n_layers)]
        similarity = torch.eye(n_layers, dtype=torch.float64)
        for p in range(n_layers):
            for q in range(p):
                left, right = whitened[p], whitened[q]
                self._check_enough(left.shape[1] + right.shape[1])
                correlations = torch.linalg.svdvals(left.T @ self._covariance(p, q) @ right)
                if len(correlations):
                    similarity[p, q] = correlations.mean()
        return Distances(
            layers=self.layers,
            matrix=_symmetric((1 - similarity).clamp(0, 1)),
            tokens=self._tokens,
            center=True,
            similarity="svcca",
        )

    def _covariance(self, p: int, q: int) -> Float64[Tensor, "d_model d_model"]:
        """Between layers p >= q, by their places."""
        products, mean = self._products[p], self._sum / self._tokens
        d_model = len(products)
        block = products[:, q * d_model : (q + 1) * d_model]
        return block / self._tokens - torch.outer(mean[p], mean[q])

    def _check_enough(self, directions: int) -> None:
        # Subspaces of a space of tokens - 1 dimensions that together have more must meet.
        if directions >= self._tokens:
            raise InputError(
                f"tokens: {self._tokens} are too few for SVCCA: two layers have {directions} "
                "directions together, so that some are perfectly correlated by chance; measure at "
                f"least {10 * directions} tokens, or take another similarity"
            )


DISTANCES: dict[str, type[AngularDistances | CKADistances | SVCCADistances]] = {
    "angular": AngularDistances,
    "cka": CKADistances,
    "svcca": SVCCADistances,
}


def unbiased_hsic(
    vectors: Float64[Tensor, "layer token d_model"],
) -> Float64[Tensor, "layer layer"]:
    """HSIC_1 with linear kernels between every two layers, from at least four tokens.

    As the mean product of U-centred Gram matrices: equal to the formula of `CKADistances`, without
    its differences of large numbers.
    """
    n_tokens = vectors.shape[1]
    gram = vectors @ vectors.mT
    gram.diagonal(dim1=1, dim2=2).zero_()
    rows = gram.sum(2, keepdim=True) / (n_tokens - 2)
    gram += rows.sum(1, keepdim=True) / (n_tokens - 1) - rows - rows.mT
    gram.diagonal(dim1=1, dim2=2).zero_()
    flat = gram.flatten(1)
    return flat @ flat.T / (n_tokens * (n_tokens - 3))


@dataclass(frozen=True)
class _HSICSums:
    """What CKA and its standard error need of clusters c whose weighted HSICs sum to S_c."""

    tokens: int = 0
    clusters: int = 0
    # [layer p, layer q] each
    total: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))  # of S(p,q)
    squares: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    with_own: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    owns: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def plus(self, other: _HSICSums) -> _HSICSums:
        return _HSICSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def similarity(self) -> Float64[Tensor, "layer layer"]:
        scale = self._scale()
        return self.total * scale * scale[:, None]

    def standard_error(self) -> Float64[Tensor, "layer layer"] | None:
        """Of S(p,q) / sqrt(S(p,p) S(q,q)), a cluster's part in which is, to first order,
        S_c(p,q) - CKA / 2 * (S_c(p,p) + S_c(q,q)) once layers are scaled to a total S(p,p) of 1.
        """
        if self.clusters < 2:
            return None
        scale = self._scale()
        both = scale * scale[:, None]
        similarity = self.total * both
        owns = self.owns * (both * both)
        with_own = self.with_own * (both * scale[:, None].square())
        own = owns.diagonal()
        spread = (
            self.squares * (both * both)
            - similarity * (with_own + with_own.T)
            + similarity.square() / 4 * (own + own[:, None] + 2 * owns)
        )
        return (self.clusters / (self.clusters - 1) * spread.clamp(min=0)).sqrt()

    def _scale(self) -> Float64[Tensor, " layer"]:
        """1 / sqrt(S(p,p)), or 0 of a constant layer."""
        own = self.total.diagonal()
        return torch.where(own > 0, own, torch.inf).rsqrt()


def _whitening(
    covariance: Float64[Tensor, "d_model d_model"], variance: float
) -> Float64[Tensor, "d_model direction"]:
    """The leading principal directions that hold a share of the variance, over their deviation."""
    values, directions = torch.linalg.eigh(covariance)
    values, directions = values.flip(0), directions.flip(1)
    rank = int((values > len(values) * torch.finfo(torch.float64).eps * values[0]).sum())
    held = values.clamp(min=0).cumsum(0)
    kept = min(rank, int((held < variance * held[-1]).sum()) + 1)
    whitening: Tensor = directions[:, :kept] / values[:kept].sqrt()
    return whitening


def _float64(
    streams: Float[Tensor, "layer token d_model"], center: Float[Tensor, "layer d_model"] | None
) -> Float64[Tensor, "token layer d_model"]:
    return centered(streams.to(home_of(streams)).to(torch.float64).transpose(0, 1), center)


def _symmetric(matrix: Float64[Tensor, "layer layer"]) -> Float64[np.ndarray, "layer layer"]:
    """The symmetric matrix of zero diagonal with this lower triangle."""
    lower = matrix.tril(-1)
    full: np.ndarray = (lower + lower.T).cpu().numpy()
    return full
