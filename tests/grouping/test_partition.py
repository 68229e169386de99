from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsae.errors import InputError
from groupsae.grouping.matrix import Distances
from groupsae.grouping.partition import (
    Partition,
    amad,
    diameters,
    interval_diameters,
    largest_diameter,
    mean_diameter,
    parse_partition,
)
from tests.grouping.matrices import any_matrix, partitions_into

LAYERS = (2, 3, 4, 5, 8)


def test_a_partition_knows_its_groups() -> None:
    partition = Partition(LAYERS, ((2, 3), (4, 5, 8)))
    assert partition.G == 2
    assert partition.group_of(8) == (4, 5, 8)
    with pytest.raises(InputError, match=r"layer 7 is in no group; .* 2-5, 8"):
        partition.group_of(7)


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        (((2, 3), (), (4, 5, 8)), "group 1 .* is empty"),
        (((2, 3), (4, 5, 7, 8)), "layer 7 is not among the layers to group, 2-5, 8"),
        (((2, 3, 3), (4, 5, 8)), r"group \[2, 3, 3\]: layer 3 stands twice"),
        (((3, 2), (4, 5, 8)), r"group \[3, 2\]: layer 2 comes after layer 3"),
        (((2, 3, 4), (4, 5, 8)), r"overlap: layer 4 is in \[2, 3, 4\] and in \[4, 5, 8\]"),
        (((2, 3), (5, 8)), "layers 4 are in no group"),
        (((2, 4), (3, 5, 8)), r"group \[2, 4\] is not contiguous: .* between 2 and 4"),
        (((4, 5, 8), (2, 3)), r"group \[2, 3\] comes after \[4, 5, 8\]"),
        ((), "layers 2-5, 8 are in no group"),
        (((True,), (2, 3, 4, 5, 8)), "layer True is not among"),
    ],
)
def test_each_way_to_be_no_partition_has_its_message(
    groups: tuple[tuple[int, ...], ...], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        Partition(LAYERS, groups)


@pytest.mark.parametrize("groups", ["2-3,4-8", " 2 - 3 , 4-8 ", [[2, 3], [4, 5, 8]]])
def test_users_write_ranges_or_lists(groups: str | list[list[int]]) -> None:
    assert parse_partition(groups, LAYERS) == Partition(LAYERS, ((2, 3), (4, 5, 8)))


@given(st.integers(1, 8), st.data())
@settings(deadline=None, max_examples=50)
def test_every_partition_can_be_written_as_ranges(n_layers: int, data: st.DataObject) -> None:
    layers = tuple(range(n_layers))
    G = data.draw(st.integers(1, n_layers))
    partition = data.draw(st.sampled_from(list(partitions_into(layers, G))))
    text = ",".join(f"{group[0]}-{group[-1]}" for group in partition.groups)
    assert parse_partition(text, layers) == partition


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        ("", "'' is neither a layer nor a range"),
        ("2-3,,4-8", "'' is neither"),
        ("2-3;4-8", "'2-3;4-8' is neither"),
        ("two", "'two' is neither"),
        ("-1", "'-1' is neither"),
        ("2-3-4", "'2-3-4' is neither"),
        ("9" * 5000, "is neither"),
        ("3-2,4-8", "runs downwards; write 2-3"),
        ("2-3,4-6", "layer 6 is not among"),
        ("0-999999", "layer 0 is not among"),
        ("2-3,3-8", "overlap: layer 3"),
        ("2-3,5-8", "layers 4 are in no group"),
        ([2, 3], "2 is no list of layers"),
        ([[2, 3], "4-8"], "'4-8' is no list of layers"),
        ([], "are in no group"),
        ([[2, 3], [], [4, 5, 8]], r"group \[\]: the list is empty"),
        ([[2, 3], [4, 5.5, 8]], r"group \[4, 5.5, 8\]: 5.5 is no layer number"),
        ([[2, 3], [4, "5", 8]], "'5' is no layer number"),
        ([[2, 3], [[4], 5, 8]], r"\[4\] is no layer number"),
    ],
)
def test_what_cannot_be_read_is_refused(groups: object, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        parse_partition(groups, LAYERS)  # type: ignore[arg-type]


@given(any_matrix(), st.data())
@settings(deadline=None)
def test_measures_follow_their_definitions(matrix: np.ndarray, data: st.DataObject) -> None:
    distances = Distances.from_matrix(matrix)
    layers = distances.layers
    G = data.draw(st.integers(1, len(layers)))
    partition = data.draw(st.sampled_from(list(partitions_into(layers, G))))
    widths = [
        max((distances.matrix[p, q] for p, q in combinations(group, 2)), default=0.0)
        for group in partition.groups
    ]
    assert diameters(distances, partition) == tuple(widths)
    assert amad(distances, partition) == pytest.approx(sum(widths) / G, rel=1e-14)
    assert largest_diameter(distances, partition) == max(widths)
    of_layer = [width for group, width in zip(partition.groups, widths, strict=True) for _ in group]
    assert mean_diameter(distances, partition) == pytest.approx(np.mean(of_layer), rel=1e-14)


@given(any_matrix())
@settings(deadline=None)
def test_interval_diameters_are_those_of_the_submatrices(matrix: np.ndarray) -> None:
    distances = Distances.from_matrix(matrix)
    table = interval_diameters(distances.matrix)
    for i in range(len(table)):
        for j in range(i, len(table)):
            assert table[i, j] == distances.matrix[i : j + 1, i : j + 1].max()


def test_distances_may_know_more_layers_than_are_grouped() -> None:
    matrix = np.abs(np.subtract.outer(np.arange(6), np.arange(6))) / 10
    partition = Partition((1, 3, 4), ((1, 3), (4,)))
    assert diameters(Distances.from_matrix(matrix), partition) == (0.2, 0.0)
    with pytest.raises(InputError, match="know no layer 6"):
        diameters(Distances.from_matrix(matrix), Partition((4, 6), ((4, 6),)))
