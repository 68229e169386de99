"""What each per-layer figure is called, means, and how it is printed; groups against baseline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MISSING = "–"


@dataclass(frozen=True)
class Metric:
    """One per-layer figure of `evaluation/reconstruction.json`."""

    key: str
    label: str
    digits: int
    definition: str
    percent: bool = False

    def format(self, value: float, *, signed: bool = False) -> str:
        """`value` for people to read; a dash where it is missing or not finite."""
        if not math.isfinite(value):
            return MISSING
        scaled = 100 * value if self.percent else value
        text = f"{scaled:,.{self.digits}f}"
        if float(text.replace(",", "")) == 0:
            text = text.removeprefix("-")
            return text + "%" * self.percent
        sign = "+" if signed and scaled > 0 else ""
        return sign + text.replace("-", "−") + "%" * self.percent


METRICS = {
    metric.key: metric
    for metric in (
        Metric(
            "ce_loss_score",
            "CE-loss score",
            4,
            "(CE zero − CE spliced) / (CE zero − CE clean): how much of the host model's "
            "next-token cross-entropy survives when the layer's residual stream is replaced by "
            "its reconstruction, on a scale where replacing it by zero scores 0 and leaving it "
            "alone scores 1.",
        ),
        Metric(
            "r2",
            "R²",
            4,
            "1 − (sum over all tokens of the squared reconstruction error) / (sum over all tokens "
            "of the squared distance to the mean residual stream). It equals 1 − FVU.",
        ),
        Metric(
            "explained_variance",
            "Explained variance",
            4,
            "The mean over tokens of each token's own 1 − error / variance ratio, as in the "
            "published tables. It is not R², which sums before it divides.",
        ),
        Metric(
            "l2",
            "L2",
            3,
            "Mean over tokens of the Euclidean norm of the reconstruction error, in the units of "
            "the host model's residual stream.",
        ),
        Metric("l0", "L0", 1, "Mean number of latents that are active on a token."),
        Metric(
            "dead",
            "Dead",
            2,
            "Share of the SAE's latents that were active on none of the evaluated tokens of this "
            "layer.",
            percent=True,
        ),
        Metric(
            "dead_in_group",
            "Dead in group",
            2,
            "Share of the SAE's latents that were active at none of its layers.",
            percent=True,
        ),
        Metric(
            "mse",
            "MSE",
            6,
            "Mean over tokens and dimensions of the squared reconstruction error.",
        ),
        Metric(
            "cosine",
            "Cosine",
            4,
            "Mean over tokens of the cosine between the residual stream and its reconstruction.",
        ),
        Metric(
            "kl",
            "KL",
            4,
            "Mean Kullback-Leibler divergence, in nats, from the clean next-token distribution to "
            "the one with the reconstruction spliced in.",
        ),
        Metric(
            "ce_clean", "CE clean", 4, "Cross-entropy of the untouched host model, nats per token."
        ),
        Metric(
            "ce_spliced",
            "CE spliced",
            4,
            "Cross-entropy with the layer's residual stream replaced by its reconstruction.",
        ),
        Metric(
            "ce_zero",
            "CE zero",
            4,
            "Cross-entropy with the layer's residual stream replaced by zero.",
        ),
    )
}


@dataclass(frozen=True)
class LayerComparison:
    """One layer's row for its group's SAE beside the row for its own SAE (either may lack)."""

    layer: int
    group: tuple[int, ...]
    groups: Mapping[str, Any]
    baseline: Mapping[str, Any]

    def values(self, key: str) -> tuple[float, float, float]:
        """(group's SAE, baseline, difference); NaN where a value is missing or not finite."""
        ours, theirs = number(self.groups.get(key)), number(self.baseline.get(key))
        return ours, theirs, ours - theirs


def compare(rows: Iterable[Mapping[str, Any]], chosen: int | None = None) -> list[LayerComparison]:
    """Pair the rows of `evaluation/reconstruction.json` by layer, in order of layers.

    Where rows of several partitions are there, those of `chosen` groups are taken; where these are
    not among them, those of the partition that comes first.
    """
    rows = list(rows)
    of_groups = [row for row in rows if row["partition"] == "groups"]
    totals = [row.get("groups_total") for row in of_groups]
    shown = chosen if chosen in totals else next(iter(totals), None)
    of_groups = [row for row in of_groups if row.get("groups_total") == shown]
    ours = {int(row["layer"]): row for row in of_groups}
    theirs = {int(row["layer"]): row for row in rows if row["partition"] == "baseline"}
    return [
        LayerComparison(
            layer=layer,
            group=tuple(ours[layer].get("group", (layer,))) if layer in ours else (layer,),
            groups=ours.get(layer, {}),
            baseline=theirs.get(layer, {}),
        )
        for layer in sorted(ours.keys() | theirs.keys())
    ]


def evaluated_totals(rows: Iterable[Mapping[str, Any]]) -> list[int]:
    """Every G that the rows of `evaluation/reconstruction.json` are of, ascending."""
    totals = {row.get("groups_total") for row in rows if row["partition"] == "groups"}
    return sorted(total for total in totals if isinstance(total, int))


def means(comparisons: Sequence[LayerComparison], key: str) -> tuple[float, float, float]:
    """Mean (group's SAE, baseline, difference) over the layers that have both.

    Where no layer has both, each mean is over the layers that it has, and the difference is NaN.
    """
    triples = [comparison.values(key) for comparison in comparisons]
    both = [triple for triple in triples if math.isfinite(triple[2])]
    ours, theirs, difference = (
        [value for value in column if math.isfinite(value)]
        for column in zip(*(both or triples or [(math.nan,) * 3]), strict=True)
    )
    return _mean(ours), _mean(theirs), _mean(difference)


def number(value: object) -> float:
    """A finite float, or NaN for None, NaN, infinities and what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
