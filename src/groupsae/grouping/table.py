"""From distances to the choice of groups: every G with its measures, and which one is taken."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from groupsae.errors import InputError
from groupsae.grouping.cost import CostModel
from groupsae.grouping.layers import checked_layers
from groupsae.grouping.matrix import Distances
from groupsae.grouping.methods import complete_linkage, even, optimal
from groupsae.grouping.partition import (
    Partition,
    amad,
    diameters,
    largest_diameter,
    parse_partition,
)
from groupsae.grouping.prediction import BASIS, Loss, Prediction, predict, why_not

Method = Literal["linkage", "optimal", "even", "explicit"]
METHODS: tuple[str, ...] = get_args(Method)
_LOSS_KEY = "predicted_{}_loss"


def group_layers(
    distances: Distances | None,
    *,
    layers: Sequence[int] | None = None,
    method: str = "linkage",
    threshold: float = 0.2,
    groups: int | None = None,
    partition: Partition | str | Sequence[Any] | None = None,
    cost: CostModel | None = None,
) -> PartitionTable:
    """Partitions of the layers by one method, and the one to train.

    Args:
        distances: Between (at least) the layers. Not needed for an explicit partition, nor for
            `even` with a fixed number of groups; measures are None without them.
        layers: The layers to group, ascending; by default those of the distances.
        method: "linkage": contiguous complete linkage (the paper's). "optimal": the smallest
            largest diameter, then the smallest layer-weighted mean diameter. "even": groups of
            equal length. "explicit": `partition`.
        threshold: The smallest G whose AMAD is below it is taken.
        groups: A fixed number of groups; the threshold is not used then.
        partition: With method "explicit": the groups (see `parse_partition`).
        cost: Predicts each G's cost; None leaves `flops_per_token` out.

    Returns:
        The table, with every G from 1 to the number of layers (explicit: the given one alone).

    Raises:
        InputError: The arguments contradict one another or lack what the method needs.
    """
    if method not in METHODS:
        raise InputError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
    if (method == "explicit") != (partition is not None):
        raise InputError(
            "partition: method 'explicit' needs the groups; give for example '0-2,3-6'"
            if partition is None
            else f"partition: groups are given but method is {method!r}; set method to 'explicit'"
        )
    if layers is None:
        known = partition if isinstance(partition, Partition) else distances
        if known is None:
            raise InputError("layers: neither layers nor distances are given; give one of them")
        layers = known.layers
    layers = checked_layers(layers)
    if distances is not None:
        distances = distances.select(layers)

    partitions = _partitions(distances, layers, method, partition)
    rows = {G: _row(each, distances, cost) for G, each in partitions.items()}
    if groups is not None and groups not in rows:
        raise InputError(
            f"groups is {groups}; "
            + (
                f"the explicit partition has {next(iter(rows))} (leave groups out)"
                if method == "explicit"
                else f"{len(layers)} layers make 1 to {len(layers)} groups"
            )
        )
    by_threshold = groups is None and method != "explicit"
    if by_threshold:
        if distances is None:
            raise InputError(
                "groups: without distances there is no AMAD to choose by; fix the number of groups"
            )
        groups = choose({G: row.amad for G, row in rows.items() if row.amad is not None}, threshold)
    return PartitionTable(
        layers=layers,
        method=method,
        threshold=float(threshold) if by_threshold else None,
        chosen=next(iter(rows)) if groups is None else groups,
        by_groups=rows,
        prediction=None if distances is None else why_not(distances) or BASIS,
    )


def choose(amad_by_groups: Mapping[int, float], threshold: float) -> int:
    """The smallest G whose AMAD is below the threshold (strictly), as in Group-SAE v2.

    With every G up to the number of layers there always is one, as singletons have an AMAD of 0.

    Raises:
        InputError: The threshold is not above 0, or no G has an AMAD below it.
    """
    if not threshold > 0:  # NaN, too
        raise InputError(
            f"threshold is {threshold}; it must be above 0, as no AMAD is smaller "
            "(0.2 in the paper; for one SAE per layer fix the number of groups)"
        )
    below = [G for G, value in amad_by_groups.items() if value < threshold]
    if not below:
        raise InputError(
            f"threshold is {threshold}; no partition has a smaller AMAD (smallest "
            f"{min(amad_by_groups.values()):g})"
        )
    return min(below)


@dataclass(frozen=True)
class PartitionRow:
    """One partition with its measures; None where distances or cost model are not known."""

    partition: Partition
    amad: float | None
    largest_diameter: float | None
    flops_per_token: int | None
    prediction: Prediction | None


@dataclass(frozen=True)
class PartitionTable:
    """The partitions that one method gives, and the choice among them.

    Attributes:
        layers: The layers that are grouped, ascending.
        method: How the groups were found: one of `METHODS`.
        threshold: The AMAD that the choice had to stay below; None where G was given.
        chosen: The number of groups that is taken.
        by_groups: G -> partition into G groups, and its measures.
        prediction: What the rows' predicted losses rest on, or why there are none; None without
            distances.
    """

    layers: tuple[int, ...]
    method: str
    threshold: float | None
    chosen: int
    by_groups: Mapping[int, PartitionRow]
    prediction: str | None

    @property
    def partition(self) -> Partition:
        """The partition that is taken."""
        return self.by_groups[self.chosen].partition

    def to_json(self) -> dict[str, Any]:
        """What `partition.json` of a run directory holds; floats survive the way there and back."""
        return {
            "layers": list(self.layers),
            "method": self.method,
            "threshold": self.threshold,
            "chosen": self.chosen,
            "prediction": self.prediction,
            "by_groups": {
                str(G): {
                    "groups": [list(group) for group in row.partition.groups],
                    "amad": row.amad,
                    "largest_diameter": row.largest_diameter,
                    "flops_per_token": row.flops_per_token,
                    **_prediction_json(row.prediction),
                }
                for G, row in self.by_groups.items()
            },
        }

    @classmethod
    def from_json(cls, data: Any, source: str = "partition.json") -> PartitionTable:
        """The table from the parsed content of a `partition.json`; unknown keys are left alone.

        Raises:
            InputError: naming the source, the key and what is wrong with it.
        """
        layers = checked_layers(_get(data, "layers", list, source), f"{source}: layers")
        method = _get(data, "method", str, source)
        if method not in METHODS:
            raise InputError(
                f"{source}: method is {method!r}; expected one of {', '.join(METHODS)}"
            )
        rows = {}
        for key, value in _get(data, "by_groups", dict, source).items():
            name = f"{source}: by_groups[{key!r}]"
            try:
                partition = parse_partition(_get(value, "groups", list, name), layers)
            except InputError as error:
                raise InputError(f"{name}: {error}") from error
            if key != str(partition.G):
                raise InputError(f"{name}: holds {partition.G} groups; key and groups must agree")
            rows[partition.G] = PartitionRow(
                partition,
                amad=_number(value, "amad", name),
                largest_diameter=_number(value, "largest_diameter", name),
                flops_per_token=_get(value, "flops_per_token", int, name, optional=True),
                prediction=_prediction(value, name),
            )
        chosen = _get(data, "chosen", int, source)
        if chosen not in rows:
            raise InputError(f"{source}: chosen is {chosen} but by_groups has no such entry")
        threshold = _number(data, "threshold", source)
        prediction = _get(data, "prediction", str, source, optional=True)
        return cls(layers, method, threshold, chosen, rows, prediction)


def _partitions(
    distances: Distances | None,
    layers: tuple[int, ...],
    method: str,
    partition: Partition | str | Sequence[Any] | None,
) -> dict[int, Partition]:
    if partition is not None:
        groups = partition.groups if isinstance(partition, Partition) else partition
        given = parse_partition(groups, layers)
        return {given.G: given}
    if method == "even":
        return even(layers)
    if distances is None:
        raise InputError(f"method {method!r} needs distances; measure them, or give a file of them")
    return complete_linkage(distances) if method == "linkage" else optimal(distances)


def _row(partition: Partition, distances: Distances | None, cost: CostModel | None) -> PartitionRow:
    prediction = None
    if distances is not None and why_not(distances) is None:
        sizes = [len(group) for group in partition.groups]
        prediction = predict(diameters(distances, partition), sizes)
    return PartitionRow(
        partition,
        amad=None if distances is None else amad(distances, partition),
        largest_diameter=None if distances is None else largest_diameter(distances, partition),
        flops_per_token=None if cost is None else cost.flops_per_token(partition.G),
        prediction=prediction,
    )


def _prediction_json(prediction: Prediction | None) -> dict[str, Any]:
    losses = dict.fromkeys(Prediction._fields) if prediction is None else prediction._asdict()
    return {
        _LOSS_KEY.format(metric): None if loss is None else loss._asdict()
        for metric, loss in losses.items()
    }


def _prediction(data: dict[str, Any], source: str) -> Prediction | None:
    losses = {}
    for metric in Prediction._fields:
        key = _LOSS_KEY.format(metric)
        loss = _get(data, key, dict, source, optional=True)
        if loss is None:
            return None
        found = [_number(loss, name, f"{source}: {key}") for name in Loss._fields]
        numbers = [number for number in found if number is not None]
        if len(numbers) < len(found):
            raise InputError(f"{source}: {key} is {loss}; expected {', '.join(Loss._fields)}")
        losses[metric] = Loss(*numbers)
    return Prediction(**losses)


def _get(data: object, key: str, kind: type, source: str, *, optional: bool = False) -> Any:
    """The value of a key of parsed JSON, once it is known to be of its kind."""
    if not isinstance(data, dict):
        raise InputError(f"{source}: holds {data!r}; expected a JSON object")
    value = data.get(key)
    if value is None and optional:
        return None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{source}: the key {key!r} must be there and hold a {kind.__name__}")
    return value


def _number(data: dict[str, Any], key: str, source: str) -> float | None:
    value = data.get(key)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(f"{source}: {key} is {value!r}; expected a finite number or null")
    return float(value)
