"""A partition of layers into contiguous groups, and how far apart the layers inside a group are."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from jaxtyping import Float64

from groupsae.errors import InputError
from groupsae.grouping.layers import checked_layers, format_layers
from groupsae.grouping.matrix import Distances


@dataclass(frozen=True)
class Partition:
    """Layers cut into groups, each of which shares one SAE.

    Attributes:
        layers: The layers that are grouped, ascending.
        groups: The groups from the lowest to the highest; each its layers, ascending and next to
            one another in `layers`. Every layer is in exactly one group.

    Raises:
        InputError: One of these does not hold; the message names the layer or group.
    """

    layers: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        checked_layers(self.layers)
        position = {layer: i for i, layer in enumerate(self.layers)}
        owner: dict[int, tuple[int, ...]] = {}
        for number, group in enumerate(self.groups):
            if not group:
                raise InputError(
                    f"partition: group {number} (counted from 0) is empty; leave it out"
                )
            for layer in group:
                if layer not in position:
                    raise InputError(
                        f"partition: layer {layer} is not among the layers to group, "
                        f"{format_layers(self.layers)}"
                    )
            checked_layers(group, f"partition: group {list(group)}")
            for layer in group:
                if layer in owner:
                    raise InputError(
                        f"partition: groups overlap: layer {layer} is in {list(owner[layer])} "
                        f"and in {list(group)}; put each layer into one group"
                    )
                owner[layer] = group
        missing = [layer for layer in self.layers if layer not in owner]
        if missing:
            raise InputError(
                f"partition: layers {format_layers(missing)} are in no group; add them to one, "
                "or leave them out of the layers to group"
            )
        for group in self.groups:
            for lower, upper in pairwise(group):
                if position[upper] != position[lower] + 1:
                    raise InputError(
                        f"partition: group {list(group)} is not contiguous: other layers lie "
                        f"between {lower} and {upper}; groups are made of neighbours"
                    )
        for lower_group, upper_group in pairwise(self.groups):
            if lower_group[0] > upper_group[0]:
                raise InputError(
                    f"partition: group {list(upper_group)} comes after {list(lower_group)}; "
                    "list groups from the lowest layers to the highest"
                )

    @classmethod
    def from_sizes(cls, layers: Sequence[int], sizes: Sequence[int]) -> Partition:
        """The partition whose groups, from the lowest up, have these numbers of layers."""
        layers = tuple(layers)
        ends = list(accumulate(sizes))
        starts = [0, *ends[:-1]]
        return cls(layers, tuple(layers[i:j] for i, j in zip(starts, ends, strict=True)))

    @property
    def G(self) -> int:  # noqa: N802  (the paper's name)
        """The number of groups."""
        return len(self.groups)

    def group_of(self, layer: int) -> tuple[int, ...]:
        """The group that a layer is in.

        Raises:
            InputError: The layer is in none.
        """
        for group in self.groups:
            if layer in group:
                return group
        raise InputError(
            f"layer {layer} is in no group; the partition covers layers "
            f"{format_layers(self.layers)}"
        )


def parse_partition(groups: str | Sequence[Any], layers: Sequence[int]) -> Partition:
    """A partition as users write it.

    Args:
        groups: Lists of layers, `[[0, 1, 2], [3, 4]]`, or a text of ranges, `"0-2,3-4"`. A range
            `a-b` stands for those of `layers` from a to b, both included.
        layers: The layers to group.

    Raises:
        InputError: It cannot be read, or is no partition of the layers.
    """
    layers = checked_layers(layers)
    parse = _parse_range if isinstance(groups, str) else _parse_list
    parts = groups.split(",") if isinstance(groups, str) else groups
    return Partition(layers, tuple(parse(part, layers) for part in parts))


def diameters(distances: Distances, partition: Partition) -> tuple[float, ...]:
    """Each group's diameter: the largest distance between two of its layers; 0 of a singleton.

    Raises:
        InputError: The distances lack a layer of the partition.
    """
    matrix = distances.select(partition.layers).matrix
    index = {layer: i for i, layer in enumerate(partition.layers)}
    rows = [slice(index[group[0]], index[group[-1]] + 1) for group in partition.groups]
    return tuple(float(matrix[row, row].max()) for row in rows)


def amad(distances: Distances, partition: Partition) -> float:
    """Average maximum angular distance: the plain mean of the groups' diameters.

    AMAD(G) = (1 / G) * sum over groups of the largest distance inside (Group-SAE v2, arXiv
    2410.21508, section 3). It compares the partitions of one linkage; as an objective it would
    prefer one giant group and many singletons.
    """
    return math.fsum(diameters(distances, partition)) / partition.G


def largest_diameter(distances: Distances, partition: Partition) -> float:
    """The largest distance between two layers that share a group."""
    return max(diameters(distances, partition))


def mean_diameter(distances: Distances, partition: Partition) -> float:
    """The mean over layers of the diameter of the layer's group."""
    weighted = zip(partition.groups, diameters(distances, partition), strict=True)
    total = math.fsum(len(group) * diameter for group, diameter in weighted)
    return total / len(partition.layers)


def interval_diameters(
    matrix: Float64[np.ndarray, "layer layer"],
) -> Float64[np.ndarray, "layer layer"]:
    """Entry [i, j], i <= j, is the diameter of the group of all layers from i to j."""
    table = np.triu(matrix)
    for width in range(1, len(matrix)):
        starts = np.arange(len(matrix) - width)
        ends = starts + width
        table[starts, ends] = np.maximum.reduce(
            [matrix[starts, ends], table[starts, ends - 1], table[starts + 1, ends]]
        )
    return table


def _parse_range(text: str, layers: tuple[int, ...]) -> tuple[int, ...]:
    found = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", text)
    if found is None:
        raise InputError(
            f"partition: {text.strip()!r} is neither a layer nor a range of layers; "
            "write for example '0-2,3,4-6'"
        )
    first, last = int(found[1]), int(found[2] or found[1])
    if first > last:
        raise InputError(
            f"partition: the range {text.strip()!r} runs downwards; write {last}-{first}"
        )
    for layer in (first, last):
        if layer not in layers:
            raise InputError(
                f"partition: layer {layer} is not among the layers to group, "
                f"{format_layers(layers)}"
            )
    return tuple(layer for layer in layers if first <= layer <= last)


def _parse_list(group: object, layers: tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(group, str) or not isinstance(group, Sequence):
        raise InputError(
            f"partition: {group!r} is no list of layers; write [[0, 1, 2], [3, 4]] or '0-2,3-4'"
        )
    return checked_layers(group, f"partition: group {list(group)}")
