"""Matrices of distances to test with, and every partition that there is."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np
from hypothesis import strategies as st

from groupsae.grouping.partition import Partition


def arbitrary(n_layers: int, seed: int, values: int | None = None) -> np.ndarray:
    """Symmetric with no other structure; of few distinct values (many ties) if asked."""
    generator = np.random.default_rng(seed)
    if values is None:
        entries = generator.uniform(0.01, 1, (n_layers, n_layers))
    else:
        entries = generator.integers(1, values + 1, (n_layers, n_layers)) / values
    lower = np.tril(entries, -1)
    return lower + lower.T


def robinson(n_layers: int, seed: int) -> np.ndarray:
    """No ties, and growing strictly away from the diagonal, as between layers of real models."""
    generator = np.random.default_rng(seed)
    matrix = np.zeros((n_layers, n_layers))
    for width in range(1, n_layers):
        for i in range(n_layers - width):
            inner = max(matrix[i, i + width - 1], matrix[i + 1, i + width])
            matrix[i, i + width] = matrix[i + width, i] = inner + generator.uniform(0.001, 1)
    return matrix / max(1.0, matrix.max())


def partitions_into(layers: tuple[int, ...], G: int) -> Iterator[Partition]:
    """Every contiguous partition into G groups."""
    for cuts in combinations(range(1, len(layers)), G - 1):
        bounds = (0, *cuts, len(layers))
        yield Partition(layers, tuple(layers[i:j] for i, j in pairwise(bounds)))


seeds = st.integers(0, 2**32 - 1)


def any_matrix(least_layers: int = 1) -> st.SearchStrategy[np.ndarray]:
    """Distances of every kind between few layers."""
    n_layers = st.integers(least_layers, 8)
    return st.one_of(
        st.builds(arbitrary, n_layers, seeds),
        st.builds(arbitrary, n_layers, seeds, st.integers(1, 3)),
        st.builds(robinson, n_layers, seeds),
    )
