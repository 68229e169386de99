"""The published groups of Pythia 160M and 410M (`../shared/reference/group-sae`).

The matrices of distances behind them are not published in a form that can be read, only, for
every G, the groups and their AMAD to three decimals. AMAD(G) * G is the sum of the groups'
diameters, so the published figures fix every published group's diameter to some 0.001 to 0.01.
`reconstructed` makes up the rest: of all matrices whose distances grow away from the diagonal and
that have the published AMADs, it takes the one on which the published merges stand out most. That
complete linkage then returns the published groups shows that they are consistent with it, not
that it returns them on the true matrix.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linprog

from groupsae.grouping.matrix import Distances
from groupsae.grouping.methods import complete_linkage
from groupsae.grouping.partition import Partition, amad
from groupsae.grouping.table import choose, group_layers

# theta = 0.2 (Group-SAE v2): model -> G, AMAD
CHOICES = {"160m": (6, 0.179), "410m": (9, 0.187)}


@pytest.mark.shared
@pytest.mark.parametrize("model", CHOICES)
def test_the_threshold_chooses_as_published(shared: Path, model: str) -> None:
    _, amads = published(shared, model)
    G, value = CHOICES[model]
    assert choose(amads, 0.2) == G
    assert round(amads[G], 3) == value


@pytest.mark.shared
@pytest.mark.parametrize("model", CHOICES)
def test_linkage_gives_the_published_groups_on_a_matrix_of_their_diameters(
    shared: Path, model: str
) -> None:
    partitions, amads = published(shared, model)
    distances = reconstructed(partitions, amads)
    ours = complete_linkage(distances)
    for G, partition in partitions.items():
        assert ours[G] == partition
        assert amad(distances, ours[G]) == pytest.approx(amads[G], abs=0.0005)
    assert group_layers(distances, threshold=0.2).chosen == CHOICES[model][0]


def published(shared: Path, model: str) -> tuple[dict[int, Partition], dict[int, float]]:
    """G -> partition, G -> AMAD; every G from 1 to the number of layers less one."""
    file = shared / "reference" / "group-sae" / f"groups-pythia-{model}.json"
    entries = {int(G): entry for G, entry in json.loads(file.read_text()).items() if G.isdigit()}
    partitions = {}
    for G, entry in entries.items():
        labels = entry["labels"]
        cuts = [i for i, (lower, upper) in enumerate(pairwise(labels), 1) if lower != upper]
        sizes = np.diff([0, *cuts, len(labels)]).tolist()
        partitions[G] = Partition.from_sizes(range(len(labels)), sizes)
        assert partitions[G].G == G
    return partitions, {G: entry["amd"] for G, entry in entries.items()}


def reconstructed(partitions: dict[int, Partition], amads: dict[int, float]) -> Distances:
    """A matrix with the published AMADs on which each published merge is the best by a margin.

    A linear programme. Where distances grow away from the diagonal, the diameter of a group is
    the distance of its first layer from its last: the unknowns are these, and the margin.
    """
    layers = partitions[1].layers
    unknowns = {
        pair: i for i, pair in enumerate(zip(*np.triu_indices(len(layers), 1), strict=True))
    }
    rows, bounds = [], []

    def require(terms: dict[tuple[int, int], float], at_most: float, margin: float = 0) -> None:
        row = np.zeros(len(unknowns) + 1)
        for pair, factor in terms.items():
            row[unknowns[pair]] = factor
        row[-1] = margin
        rows.append(row)
        bounds.append(at_most)

    for first, last in unknowns:
        if last - first > 1:
            require({(first, last - 1): 1, (first, last): -1}, 0)
            require({(first + 1, last): 1, (first, last): -1}, 0)
    singletons = Partition.from_sizes(layers, [1] * len(layers))
    for G, partition in partitions.items():
        wide = [(group[0], group[-1]) for group in partition.groups if len(group) > 1]
        require(dict.fromkeys(wide, 1), G * (amads[G] + 0.00049))
        require(dict.fromkeys(wide, -1), -G * (amads[G] - 0.00049))
        finer = partitions.get(G + 1, singletons).groups
        unions = [(lower[0], upper[-1]) for lower, upper in pairwise(finer)]
        (merged,) = [pair for pair in unions if pair in wide]
        for union in unions:
            if union != merged:
                require({merged: 1, union: -1}, 0, margin=1)
    objective = np.zeros(len(unknowns) + 1)
    objective[-1] = -1
    limits = [(0.001, 1)] * len(unknowns) + [(0.0001, 1)]
    solution = linprog(objective, A_ub=np.array(rows), b_ub=bounds, bounds=limits)
    assert solution.success, solution.message
    matrix = np.zeros((len(layers), len(layers)))
    for (first, last), i in unknowns.items():
        matrix[last, first] = solution.x[i]
    return Distances.from_matrix(matrix, layers)
