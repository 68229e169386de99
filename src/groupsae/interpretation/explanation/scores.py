"""Detection and fuzzing accuracy of each latent, and their means for each SAE and layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t

from groupsae.interpretation.cards import Shown

DEFINITIONS = {
    "explanation": "what the language model says of the windows in which the latent is strongest",
    "detection": "balanced accuracy of telling active from silent windows by the explanation: the "
    "mean of the shares that are judged right among both (Paulo et al. 2024)",
    "fuzzing": "balanced accuracy of telling windows whose marked tokens are the right ones from "
    "windows in which as many others are marked (Paulo et al. 2024)",
    "unparsed": "answers that are not what was asked for; their examples are left out of the "
    "accuracy. A latent whose explanation does not parse has no scores; a score that still waits "
    "for an answer is null",
    "rows": "means over the latents that have a score; low and high: 95% interval of the mean by "
    "Student's t, cut to 0..1, which takes the latents as independent; null for fewer than two. A "
    "row without layer is of all layers together, where a group's latent may be drawn at several",
}
_SCORES = ("detection", "fuzzing")


@dataclass(frozen=True)
class Explained:
    """What came of one latent at one layer.

    Attributes:
        unparsed: Answers that could not be read.
        complete: Whether every request was answered.
    """

    sae: str
    layer: int
    latent: int
    explanation: str | None
    detection: float | None
    fuzzing: float | None
    unparsed: int
    complete: bool


def balanced_accuracy(judged: Iterable[tuple[bool, bool]]) -> float | None:
    """The mean share of right judgements among the true examples and among the false ones.

    Args:
        judged: Truth and judgement of each example.

    Returns:
        None where examples of one kind are missing.
    """
    right: dict[bool, list[bool]] = {True: [], False: []}
    for truth, said in judged:
        right[truth].append(truth == said)
    if not all(right.values()):
        return None
    return float(np.mean([np.mean(own) for own in right.values()]))


def mean_rows(shown: Sequence[Shown], explained: Iterable[Explained]) -> list[dict[str, Any]]:
    """One row for each partition and layer, and one for all its layers: :data:`DEFINITIONS`."""
    by_place: dict[tuple[str, int], list[Explained]] = {}
    for own in explained:
        by_place.setdefault((own.sae, own.layer), []).append(own)
    found = []
    for one in shown:
        of_layers = []
        for layer, sae in sorted(one.saes.items()):
            there = by_place.get((sae, layer), [])
            group = sorted(other for other, name in one.saes.items() if name == sae)
            found.append(_row(one, group, layer, sae, there))
            of_layers += there
        found.append(_row(one, None, None, None, of_layers))
    return found


def latent_rows(explained: Iterable[Explained]) -> list[dict[str, Any]]:
    """One row for each latent of which anything is known."""
    return [
        {
            "sae": own.sae,
            "layer": own.layer,
            "latent": own.latent,
            "explanation": own.explanation,
            "detection": own.detection,
            "fuzzing": own.fuzzing,
            "unparsed": own.unparsed,
        }
        for own in sorted(explained, key=lambda own: (own.sae, own.layer, own.latent))
        if own.explanation is not None or own.unparsed
    ]


def _row(
    one: Shown,
    group: list[int] | None,
    layer: int | None,
    sae: str | None,
    explained: Sequence[Explained],
) -> dict[str, Any]:
    scored = [own for own in explained if any(getattr(own, name) is not None for name in _SCORES)]
    row: dict[str, Any] = {
        "partition": one.partition,
        "groups_total": one.groups_total,
        "group": group,
        "layer": layer,
        "sae": sae,
        "latents": len(scored),
    }
    for name in _SCORES:
        values = [getattr(own, name) for own in scored if getattr(own, name) is not None]
        row |= _mean(name, values)
    return row


def _mean(name: str, values: Sequence[float]) -> Mapping[str, float | None]:
    if not values:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    mean, low, high = float(np.mean(values)), None, None
    if len(values) > 1:
        half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
        low, high = max(mean - float(half), 0.0), min(mean + float(half), 1.0)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}
