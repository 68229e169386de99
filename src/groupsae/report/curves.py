"""Which curves of faithfulness and completeness are drawn, and their means over tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from groupsae.report.artefacts import Artefact
from groupsae.report.metrics import number

METHODS = {
    "attribution": "attribution patching",
    "integrated_gradients": "integrated gradients",
    "exact": "exact effects",
}
SELECTIONS = {"per_layer": "per layer", "global": "over all layers"}
SCORES = {"faithfulness": "Faithfulness", "completeness": "Completeness"}
CONTROLS = {"random": "random latents", "untrained": "untrained SAEs"}


class Subject(NamedTuple):
    """Whose latents a curve is of: those of `groups_total` groups' SAEs, or the baseline's."""

    partition: str
    groups_total: int

    @property
    def is_baseline(self) -> bool:
        """Whether every layer has an SAE of its own."""
        return self.partition == "baseline"

    @property
    def label(self) -> str:
        """The name in legends and tables."""
        return "one SAE per layer" if self.is_baseline else f"G = {self.groups_total}"

    @property
    def order(self) -> float:
        """Sorts by G; one SAE per layer comes after every G."""
        return self.groups_total + (0.5 if self.is_baseline else 0.0)


class Panel(NamedTuple):
    """What is the same for all lines of one panel."""

    score: str
    method: str = "attribution"
    selection: str = "per_layer"
    error_nodes: bool = False


@dataclass(frozen=True)
class Line:
    """One curve that means something: a score against the latents kept per layer."""

    subject: Subject
    latents: str
    n: NDArray[np.float64]
    value: NDArray[np.float64]

    @property
    def key(self) -> tuple[Subject, str]:
        """Tells apart the lines of a panel."""
        return self.subject, self.latents


def subject_of(entry: Mapping[str, Any]) -> Subject:
    """The subject of a curve, a latent or a picture."""
    return Subject(str(entry["partition"]), int(entry["groups_total"]))


def entries(task: Artefact, panel: Panel) -> list[Artefact]:
    """The curves of a panel, the flagged ones too, by G with the baseline last.

    Random latents have no method: where those of another method alone are there, they are taken.
    """
    found: dict[tuple[Subject, str], Artefact] = {}
    for curve in task["curves"]:
        same_method = curve["method"] == panel.method
        if (curve["score"], curve["selection"], curve["error_nodes"]) == (
            panel.score,
            panel.selection,
            panel.error_nodes,
        ) and (same_method or curve["latents"] == "random"):
            key = (subject_of(curve), curve["latents"])
            if same_method or key not in found:
                found[key] = curve
    order = ("ranked", *CONTROLS)
    known = [key for key in found if key[1] in order]
    return [found[key] for key in sorted(known, key=lambda k: (order.index(k[1]), k[0].order))]


def lines(task: Artefact, panel: Panel) -> list[Line]:
    """The curves of a panel that are not flagged. None where the task was refused."""
    if task.get("refused"):
        return []
    drawn = []
    for curve in entries(task, panel):
        n = np.array([number(n) for n in curve["n"]])
        value = np.array([number(value) for value in curve["value"]])
        kept = np.isfinite(n) & np.isfinite(value) & (n > 0)
        if curve.get("flag") is None and kept.any():
            at = np.argsort(n[kept], kind="stable")
            drawn.append(Line(subject_of(curve), curve["latents"], n[kept][at], value[kept][at]))
    return drawn


def mean_lines(tasks: Sequence[Artefact], panel: Panel) -> tuple[list[Artefact], list[Line]]:
    """Means over tasks, and the tasks that they are over: the same for every line.

    A task counts if it has every partition's curve that any task has; a control is averaged if all
    of these tasks have it. Between points, scores are interpolated over log N.
    """
    found = {
        index: {line.key: line for line in lines(task, panel)} for index, task in enumerate(tasks)
    }
    ranked = {key for lines_of in found.values() for key in lines_of if key[1] == "ranked"}
    counted = [index for index, own in found.items() if ranked and ranked <= own.keys()]
    if not counted:
        return [], []
    keys = [key for key in found[counted[0]] if all(key in found[index] for index in counted)]
    means = [_mean([found[index][key] for index in counted]) for key in keys]
    return [tasks[index] for index in counted], [line for line in means if line.n.size]


def panels_with_curves(tasks: Iterable[Artefact]) -> list[Panel]:
    """Every panel for which some task has a ranked curve: known methods and scores, in order."""
    there = {
        Panel(curve["score"], curve["method"], curve["selection"], curve["error_nodes"])
        for task in tasks
        for curve in task["curves"]
        if curve["latents"] == "ranked"
    }
    return [
        panel
        for method in METHODS
        for selection in SELECTIONS
        for error_nodes in (False, True)
        for score in SCORES
        if (panel := Panel(score, method, selection, error_nodes)) in there
    ]


def _mean(drawn: Sequence[Line]) -> Line:
    low = max(line.n[0] for line in drawn)
    high = min(line.n[-1] for line in drawn)
    n = np.unique(np.concatenate([line.n for line in drawn]))
    n = n[(n >= low) & (n <= high)]
    values = [np.interp(np.log(n), np.log(line.n), line.value) for line in drawn]
    return Line(drawn[0].subject, drawn[0].latents, n, np.mean(values, axis=0))


def mean_area(areas: Iterable[float]) -> float:
    """The mean of areas, NaN where one is missing."""
    areas = list(areas)
    return math.fsum(areas) / len(areas) if areas and all(map(math.isfinite, areas)) else math.nan
