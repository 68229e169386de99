from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from sklearn.cluster import AgglomerativeClustering

from groupsae.errors import InputError
from groupsae.grouping.matrix import Distances
from groupsae.grouping.methods import complete_linkage, even, linkage_matrix, optimal
from groupsae.grouping.partition import Partition, largest_diameter, mean_diameter
from tests.grouping.matrices import any_matrix, arbitrary, partitions_into, robinson, seeds


def test_linkage_merges_by_the_largest_distance_between_neighbours() -> None:
    matrix = np.array(
        [
            [0.0, 0.1, 0.9, 0.9],
            [0.1, 0.0, 0.2, 0.9],
            [0.9, 0.2, 0.0, 0.5],
            [0.9, 0.9, 0.5, 0.0],
        ]
    )
    partitions = complete_linkage(Distances.from_matrix(matrix))
    # 1 and 2 are close (0.2), but once 0 and 1 are one group it is 0.9 from 2.
    assert partitions[2].groups == ((0, 1), (2, 3))
    assert linkage_matrix(Distances.from_matrix(matrix)).tolist() == [
        [0, 1, 0.1, 2],
        [2, 3, 0.5, 2],
        [4, 5, 0.9, 4],
    ]


def test_far_layers_never_merge_before_their_neighbours() -> None:
    matrix = np.array([[0.0, 0.5, 0.1], [0.5, 0.0, 0.6], [0.1, 0.6, 0.0]])
    assert complete_linkage(Distances.from_matrix(matrix))[2].groups == ((0, 1), (2,))


def test_of_equal_merges_the_lowest_comes_first() -> None:
    equal = Distances.from_matrix(np.full((5, 5), 0.3) - 0.3 * np.eye(5))
    partitions = complete_linkage(equal)
    assert [partitions[G].groups[0] for G in (4, 3, 2)] == [(0, 1), (0, 1, 2), (0, 1, 2, 3)]


@given(any_matrix())
@settings(deadline=None)
def test_each_merge_is_the_best_that_there_is(matrix: np.ndarray) -> None:
    """Complete linkage by its definition, with every distance looked at again."""
    distances = Distances.from_matrix(matrix)
    partitions = complete_linkage(distances)
    assert list(partitions) == list(range(1, len(distances.layers) + 1))
    assert partitions[len(distances.layers)].groups == tuple((p,) for p in distances.layers)
    for G in range(len(distances.layers) - 1, 0, -1):
        before, after = partitions[G + 1].groups, partitions[G].groups
        heights = [
            max(distances.matrix[p, q] for p in lower for q in upper)
            for lower, upper in pairwise(before)
        ]
        lowest = heights.index(min(heights))
        merged = before[lowest] + before[lowest + 1]
        assert after == (*before[:lowest], merged, *before[lowest + 2 :])


@given(any_matrix())
@settings(deadline=None)
def test_heights_are_diameters_and_never_fall(matrix: np.ndarray) -> None:
    """Also under contiguity, on any matrix: linkages without this property draw no dendrogram."""
    distances = Distances.from_matrix(matrix)
    rows = linkage_matrix(distances)
    members = [(layer,) for layer in distances.layers]
    for lower, upper, height, size in rows:
        members.append(members[int(lower)] + members[int(upper)])
        assert height == distances.matrix[np.ix_(members[-1], members[-1])].max()
        assert size == len(members[-1])
    assert (np.diff(rows[:, 2]) >= 0).all()
    partitions = complete_linkage(distances)
    for i in range(len(rows)):
        assert (
            members[len(distances.layers) + i] in partitions[len(distances.layers) - 1 - i].groups
        )


@given(any_matrix(2))
@settings(deadline=None)
def test_scipy_draws_the_hierarchy_in_the_order_of_the_layers(matrix: np.ndarray) -> None:
    distances = Distances.from_matrix(matrix)
    rows = linkage_matrix(distances)
    assert hierarchy.is_valid_linkage(rows)
    assert hierarchy.is_monotonic(rows)
    assert hierarchy.leaves_list(rows).tolist() == list(range(len(distances.layers)))


@given(st.integers(2, 14), seeds)
@settings(deadline=None, max_examples=50)
def test_linkage_agrees_with_scipy_where_contiguity_costs_nothing(n_layers: int, seed: int) -> None:
    """Where distances grow away from the diagonal the nearest group is always a neighbour."""
    distances = Distances.from_matrix(robinson(n_layers, seed))
    reference = hierarchy.linkage(squareform(distances.matrix), "complete")
    np.testing.assert_array_equal(linkage_matrix(distances)[:, 2:], reference[:, 2:])
    for G, partition in complete_linkage(distances).items():
        labels = hierarchy.fcluster(reference, G, "maxclust")
        assert partition == _from_labels(labels)


@pytest.mark.parametrize("seed", range(5))
def test_linkage_agrees_with_scikit_learn_where_contiguity_costs_nothing(seed: int) -> None:
    """Without `connectivity`, under which scikit-learn forgets distances between far groups."""
    distances = Distances.from_matrix(robinson(11, seed))
    for G, partition in complete_linkage(distances).items():
        model = AgglomerativeClustering(n_clusters=G, metric="precomputed", linkage="complete")
        assert partition == _from_labels(model.fit_predict(distances.matrix))


def test_groups_do_not_depend_on_the_scale_of_the_distances() -> None:
    distances = Distances.from_matrix(arbitrary(10, seed=0))
    scaled = Distances(distances.layers, distances.matrix**2)
    assert complete_linkage(scaled) == complete_linkage(distances)


@given(any_matrix())
@settings(deadline=None, max_examples=40)
def test_optimal_beats_every_contiguous_partition(matrix: np.ndarray) -> None:
    distances = Distances.from_matrix(matrix)
    partitions = optimal(distances)
    assert list(partitions) == list(range(1, len(distances.layers) + 1))
    for G, best in partitions.items():
        others = list(partitions_into(distances.layers, G))
        assert best.G == G
        assert best in others
        smallest = min(largest_diameter(distances, other) for other in others)
        assert largest_diameter(distances, best) == smallest
        smallest_mean = min(
            mean_diameter(distances, other)
            for other in others
            if largest_diameter(distances, other) == smallest
        )
        assert mean_diameter(distances, best) == pytest.approx(smallest_mean, rel=1e-12)


@pytest.mark.parametrize("values", [None, 2, 4])
def test_optimal_against_brute_force_with_ten_layers(values: int | None) -> None:
    distances = Distances.from_matrix(arbitrary(10, seed=1, values=values))
    for G, best in optimal(distances).items():
        objectives = [
            (largest_diameter(distances, other), mean_diameter(distances, other))
            for other in partitions_into(distances.layers, G)
        ]
        objective = (largest_diameter(distances, best), mean_diameter(distances, best))
        assert objective == pytest.approx(min(objectives), rel=1e-12)


def test_optimal_finds_what_linkage_misses() -> None:
    matrix = np.array(
        [
            [0.0, 0.4, 0.9, 0.9],
            [0.4, 0.0, 0.3, 0.9],
            [0.9, 0.3, 0.0, 0.4],
            [0.9, 0.9, 0.4, 0.0],
        ]
    )
    distances = Distances.from_matrix(matrix)
    assert largest_diameter(distances, complete_linkage(distances)[2]) == 0.9
    assert optimal(distances)[2].groups == ((0, 1), (2, 3))


def test_optimal_breaks_ties_by_the_mean_over_layers() -> None:
    matrix = np.zeros((5, 5))
    lower = {(1, 0): 0.5, (2, 1): 0.2, (3, 2): 0.1, (4, 3): 0.9}
    for (row, column), value in lower.items():
        matrix[row, column] = value
    matrix[2, 0] = matrix[3, 1] = 0.5
    matrix[3, 0] = matrix[4, 2] = matrix[4, 1] = matrix[4, 0] = 1.0
    # With layer 4 alone, 0-3 in two groups: 0 | 1-3, 0-1 | 2-3 and 0-2 | 3 all have 0.5 as the
    # largest diameter; over layers they sum to 1.5, 1.2 and 1.5.
    assert optimal(Distances.from_matrix(matrix))[3].groups == ((0, 1), (2, 3), (4,))


def test_layers_keep_their_numbers() -> None:
    distances = Distances.from_matrix(robinson(4, 0), [1, 3, 5, 7])
    for partitions in (complete_linkage(distances), optimal(distances), even(distances.layers)):
        for G, partition in partitions.items():
            assert (partition.layers, partition.G) == ((1, 3, 5, 7), G)


@given(st.integers(1, 40))
@settings(deadline=None)
def test_even_groups_differ_by_at_most_one_layer_and_the_lowest_are_larger(n_layers: int) -> None:
    for G, partition in even(range(n_layers)).items():
        sizes = [len(group) for group in partition.groups]
        assert len(sizes) == G
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)


def test_even_is_the_published_control() -> None:
    """`group_sae/groups/pythia-160m_sequential.json` of ghidav/group-sae, commit ca6392f."""
    assert even(range(11))[6].groups == ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10,))


def test_no_layers_are_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        even([])


def _from_labels(labels: np.ndarray) -> Partition:
    """The partition of layers 0, 1, ... that cluster labels stand for."""
    groups: list[list[int]] = []
    for layer, label in enumerate(labels):
        if groups and labels[layer - 1] == label:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    assert len(groups) == len(set(labels)), "the reference's groups are not contiguous"
    return Partition(tuple(range(len(labels))), tuple(map(tuple, groups)))
