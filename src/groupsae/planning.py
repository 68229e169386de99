"""What a config comes to before anything is measured: layers, groups, cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from groupsae.config import Config
from groupsae.errors import InputError

if TYPE_CHECKING:
    from groupsae.grouping.cost import CostModel
    from groupsae.grouping.matrix import Distances
    from groupsae.grouping.table import PartitionTable


def grouped(distances: Distances, config: Config, cost: CostModel | None = None) -> PartitionTable:
    """The partitions of layers that `config.grouping` asks for, and the chosen one."""
    from groupsae.grouping.table import group_layers

    asked = config.grouping
    return group_layers(
        distances,
        layers=asked.layers if isinstance(asked.layers, tuple) else None,
        method="explicit" if asked.partition is not None else asked.method,
        threshold=asked.threshold,
        groups=asked.groups,
        partition=asked.partition,
        cost=cost,
    )


def chosen_beforehand(config: Config, layers: Sequence[int]) -> PartitionTable | None:
    """The partition as far as the config fixes it without distances; None where it does not.

    With `grouping.groups` alone only the number of groups is the right one.
    """
    from groupsae.grouping.table import group_layers

    asked = config.grouping
    if asked.groups is None and asked.partition is None:
        return None
    return group_layers(
        None,
        layers=layers,
        method="even" if asked.partition is None else "explicit",  # need no distances
        groups=asked.groups,
        partition=asked.partition,
    )


def covered_layers(config: Config, n_layers: int) -> tuple[int, ...]:
    """The layers that `grouping.layers` means in a host of `n_layers` blocks."""
    asked = config.grouping.layers
    if asked == "all_but_last":
        return tuple(range(max(n_layers - 1, 1)))
    if asked == "all":
        return tuple(range(n_layers))
    wrong = [layer for layer in asked if not 0 <= layer < n_layers]
    if wrong or not asked:
        raise InputError(
            f"grouping.layers: {wrong or 'an empty list'} does not fit {config.host.name}, whose "
            f"layers are 0 to {n_layers - 1}"
        )
    return asked


def cost_model(config: Config, n_layers: int, d_model: int) -> CostModel:
    """The paper's FLOP cost model for a host of these sizes."""
    from groupsae.grouping.cost import CostModel

    return CostModel(
        d_model=d_model,
        n_layers=n_layers,
        context_length=config.tokens.context_length,
        d_sae=config.sae.width(d_model),
    )
