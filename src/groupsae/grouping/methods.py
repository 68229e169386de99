"""The ways to cut layers into contiguous groups, each for every number of groups at once.

`complete_linkage` is the paper's. `optimal` shows how far that greedy hierarchy is from the best
cuts, and `even` is the control that looks at no distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float64, Int

from groupsae.grouping.layers import checked_layers
from groupsae.grouping.matrix import Distances
from groupsae.grouping.partition import Partition, interval_diameters


def complete_linkage(distances: Distances) -> dict[int, Partition]:
    """Agglomerative clustering with complete linkage in which only neighbours merge.

    From one group per layer, the two neighbouring groups with the smallest largest distance
    between their layers merge, again and again; of equal ones the lowest. (Group-SAE v2, arXiv
    2410.21508, section 3. scikit-learn's AgglomerativeClustering with a path as `connectivity`
    is no reference: it forgets distances between groups that were no neighbours, so that after a
    merge only those across the seam count.)

    Returns:
        G -> partition into G groups, for every G from 1 to the number of layers. Each refines the
        one before it.
    """
    partition = _singletons(distances)
    partitions = {partition.G: partition}
    for lower, _ in _merges(distances):
        groups = partition.groups
        merged = groups[lower] + groups[lower + 1]
        partition = Partition(distances.layers, (*groups[:lower], merged, *groups[lower + 2 :]))
        partitions[partition.G] = partition
    return dict(sorted(partitions.items()))


def linkage_matrix(distances: Distances) -> Float64[np.ndarray, "merge 4"]:
    """The hierarchy of `complete_linkage` as scipy.cluster.hierarchy has it, for a dendrogram.

    One row per merge: the two groups' numbers (those below L are layers, L + i is the result of
    row i), the height, the number of layers. The height is the diameter of the merged group. It
    never falls from one merge to the next, contiguity or not: after A and B merged at height h,
    the next neighbour C of B is at max(d(A, C), d(B, C)) >= d(B, C) >= h, else B and C had merged.
    The lower group stands first, so that a dendrogram's leaves are in the order of the layers.
    """
    numbers = list(range(len(distances.layers)))
    sizes = [1] * len(numbers)
    rows = []
    for lower, height in _merges(distances):
        size = sizes[lower] + sizes[lower + 1]
        rows.append([numbers[lower], numbers[lower + 1], height, size])
        numbers[lower : lower + 2] = [len(distances.layers) + len(rows) - 1]
        sizes[lower : lower + 2] = [size]
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def optimal(distances: Distances) -> dict[int, Partition]:
    """The best contiguous partition for every G: by largest diameter, then by the mean over layers.

    Exact, by dynamic programming over cuts, in two steps: the smallest largest diameter; then,
    among groups no wider than that, the smallest layer-weighted mean diameter. (One pass that
    compares both at once would be wrong: the best beginning under a wide end need not have the
    smallest diameter.) Of equal cuts those are taken whose highest group begins lowest.

    Returns:
        G -> partition into G groups, for every G from 1 to the number of layers. These need not
        refine one another.
    """
    n_layers = len(distances.layers)
    diameter = np.full((n_layers + 1, n_layers + 1), np.inf)  # of the group [start, end)
    starts, ends = np.triu_indices(n_layers)
    diameter[starts, ends + 1] = interval_diameters(distances.matrix)[starts, ends]
    size = np.arange(n_layers + 1)[None, :] - np.arange(n_layers + 1)[:, None]

    smallest, _ = _best_cuts(diameter, n_layers, np.maximum)
    partitions = {}
    for G in range(1, n_layers + 1):
        narrow = np.isfinite(diameter) & (diameter <= smallest[G])
        weight = np.where(narrow, size * np.where(narrow, diameter, 0), np.inf)
        _, origin = _best_cuts(weight, G, np.add)
        sizes: list[int] = []
        end = n_layers
        for number in range(G, 0, -1):
            start = int(origin[number, end])
            sizes.insert(0, end - start)
            end = start
        partitions[G] = Partition.from_sizes(distances.layers, sizes)
    return partitions


def even(layers: Sequence[int]) -> dict[int, Partition]:
    """Groups of equal length, for every G; sizes differ by at most one, the lowest groups larger.

    (The published control cuts 11 layers into 6 groups as 2, 2, 2, 2, 2, 1, too.)
    """
    layers = checked_layers(layers)
    partitions = {}
    for G in range(1, len(layers) + 1):
        length, extra = divmod(len(layers), G)
        sizes = [length + (number < extra) for number in range(G)]
        partitions[G] = Partition.from_sizes(layers, sizes)
    return partitions


def _merges(distances: Distances) -> list[tuple[int, float]]:
    """Complete linkage's merges in order: the lower group's place among the groups, the height.

    The largest distance between two neighbouring groups is the diameter of their union, as neither
    is wider inside (they merged earlier, and heights never fall).
    """
    diameter = interval_diameters(distances.matrix)
    spans = [(i, i) for i in range(len(diameter))]
    merges = []
    while len(spans) > 1:
        heights = [diameter[low[0], high[1]] for low, high in pairwise(spans)]
        lower = int(np.argmin(heights))
        spans[lower : lower + 2] = [(spans[lower][0], spans[lower + 1][1])]
        merges.append((lower, float(heights[lower])))
    return merges


def _singletons(distances: Distances) -> Partition:
    return Partition.from_sizes(distances.layers, [1] * len(distances.layers))


def _best_cuts(
    weight: Float64[np.ndarray, "cut cut"], most_groups: int, combine: np.ufunc
) -> tuple[Float64[np.ndarray, " groups"], Int[np.ndarray, "groups cut"]]:
    """Shortest paths from cut 0 to the last cut in exactly 1, 2, ... steps.

    Args:
        weight: Of the group between two cuts; infinite where there can be none.
        most_groups: The largest number of steps.
        combine: How the weights of a path's steps become the path's weight.

    Returns:
        The best weight for each number of groups (infinite where there is no path), and
        [groups, cut] -> the cut before it on the best path there.
    """
    n_cuts = len(weight)
    best = np.full(n_cuts, np.inf)
    best[0] = 0
    totals = np.full(most_groups + 1, np.inf)
    origin = np.zeros((most_groups + 1, n_cuts), dtype=np.intp)
    for groups in range(1, most_groups + 1):
        reached = combine(best[:, None], weight)
        origin[groups] = reached.argmin(axis=0)
        best = reached.min(axis=0)
        totals[groups] = best[-1]
    return totals, origin
