"""The figures of interpretation: depths, ground truth, and scores of interpretability."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from groupsae.report.ground_truth import Detector
from groupsae.report.metrics import number
from groupsae.report.style import (
    BAND,
    BASELINE,
    BLUES,
    COLUMN,
    GROUP,
    INK,
    MUTED,
    PAGE,
    RULE,
    THRESHOLD,
    group_colours,
    layer_ticks,
    roomy,
    styled,
    unique_legend,
)
from groupsae.report.wording import layer_range

TRUTHS = {"coverage": "Coverage", "auroc": "Mean AUROC"}
_CHANCE = {"coverage": 0.0, "auroc": 0.5}
_MOST_IN_A_ROW = 6
_MOST_LEGEND_ENTRIES = 8


class Point(NamedTuple):
    """A score at a layer, with its interval, and the SAE that it is of."""

    layer: int
    value: float
    low: float
    high: float
    sae: str


@styled
def depth_heat_maps(profiles: Sequence[Mapping[str, Any]]) -> Figure:
    """Shares of firings at each member layer, a panel for each group, on one colour scale.

    Latents are ordered by depth, from below; a panel's height is all of its latents that fire.
    """
    columns = min(_MOST_IN_A_ROW, len(profiles))
    n_rows = math.ceil(len(profiles) / columns)
    figure = Figure(
        figsize=(max(COLUMN, PAGE * (columns / _MOST_IN_A_ROW)), 0.5 + 2.5 * n_rows),
        layout=roomy(),
    )
    panels = figure.subplots(n_rows, columns, squeeze=False).ravel()
    for axes, profile in zip(panels, profiles, strict=False):
        share = np.array([[number(entry) for entry in row] for row in profile["share"]])
        layers = profile["layers"]
        latents = _latents(profile)
        mesh = axes.pcolormesh(
            np.arange(len(layers) + 1),
            np.linspace(0, latents, len(share) + 1),
            share,
            cmap=BLUES,
            vmin=0,
            vmax=1,
            rasterized=True,
        )
        layer_ticks(axes, layers, offset=0.5, most=8)
        axes.set_title(f"layers {layer_range(layers)}", fontsize=7, pad=3)
        axes.set_ylim(0, latents)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.tick_params(axis="x", length=0)
        axes.spines[:].set_visible(False)
    for axes in panels[len(profiles) :]:
        axes.set_visible(False)
    figure.supxlabel("Layer", fontsize=8)
    figure.supylabel("Latents, the shallowest first", fontsize=8)
    bar = figure.colorbar(mesh, ax=list(panels), shrink=0.8, aspect=30, pad=0.02)
    bar.set_label("Share of a latent's firings")
    bar.outline.set_visible(False)
    return figure


@styled
def ground_truth_per_layer(
    by_measure: Mapping[str, Mapping[Detector, Mapping[int, float]]], chosen: int | None = None
) -> Figure:
    """Coverage and mean AUROC of each layer: partitions, and between which ends they lie.

    Args:
        chosen: The G whose line is the thickest.
    """
    figure = Figure(figsize=(PAGE, 2.75), layout=roomy())
    panels = figure.subplots(1, len(by_measure), squeeze=False).ravel()
    detectors = {detector for found in by_measure.values() for detector in found}
    layers = sorted({at for found in by_measure.values() for own in found.values() for at in own})
    colours = _colours(detectors)
    for axes, (key, found) in zip(panels, by_measure.items(), strict=True):
        for detector, values in found.items():
            axes.plot(
                [layers.index(layer) for layer in values],
                list(values.values()),
                **_line(detector, colours, chosen),
            )
        _truth_axes(axes, key)
        axes.set(xlabel="Layer", xlim=(-0.3, len(layers) - 0.7))
        layer_ticks(axes, layers, offset=0, most=12)
    _legend(figure, list(panels), chosen)
    return figure


@styled
def ground_truth_by_groups(
    means: Mapping[Detector, Mapping[str, Any]], chosen: int | None = None
) -> Figure:
    """Coverage and mean AUROC, means over layers, against G; what has no G is a level line."""
    figure = Figure(figsize=(PAGE, 2.55), layout=roomy())
    panels = figure.subplots(1, len(TRUTHS), squeeze=False).ravel()
    for axes, key in zip(panels, TRUTHS, strict=True):
        for source, colour, dashes, label in (
            ("trained", GROUP, "-", "one SAE per group"),
            ("untrained", BASELINE, (0, (4, 1.8)), "untrained SAEs"),
        ):
            points = sorted(
                (detector.groups_total, number(row.get(key)))
                for detector, row in means.items()
                if detector.source == source and detector.groups_total is not None
            )
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    linestyle=dashes,
                    marker="o",
                    label=label,
                )
                for total, value in points:
                    if source == "trained" and total == chosen:
                        axes.plot([total], [value], "o", color=GROUP, markersize=7)
        for detector, row in means.items():
            value = number(row.get(key))
            if math.isfinite(value) and detector.source == "trained" and detector.is_baseline:
                axes.axhline(
                    value,
                    color=INK,
                    linewidth=1,
                    linestyle=(0, (4, 2.5)),
                    label="one SAE per layer",
                )
            elif math.isfinite(value) and detector.source == "probe":
                axes.axhline(value, color=THRESHOLD, linewidth=1, label="linear probe")
        _truth_axes(axes, key)
        axes.set_xlabel("Number of groups G")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*unique_legend(*panels), loc="outside upper center", ncols=4)
    return figure


@styled
def scores_per_layer(
    by_measure: Mapping[str, Mapping[str, Sequence[Point]]], chance: Mapping[str, float]
) -> Figure:
    """Scores of interpretability with their intervals, groups against one SAE per layer.

    Args:
        by_measure: Of each measure the points of "groups" and "baseline". Lines join layers that
            share an SAE.
        chance: The score of guessing, for the measures that have one.
    """
    n_panels = len(by_measure)
    figure = Figure(figsize=(PAGE if n_panels > 1 else 1.3 * COLUMN, 2.55), layout=roomy())
    panels = figure.subplots(1, n_panels, sharey=True, squeeze=False).ravel()
    layers = sorted(
        {own.layer for found in by_measure.values() for p in found.values() for own in p}
    )
    for axes, (label, found) in zip(panels, by_measure.items(), strict=True):
        for index, (start, stop) in enumerate(_spans(layers, found.get("groups", ()))):
            axes.axvspan(
                start - 0.5, stop - 0.5, color=BAND if index % 2 == 0 else "white", linewidth=0
            )
        if label in chance:
            axes.axhline(chance[label], color=MUTED, linewidth=0.8, linestyle=(0, (1, 1.4)))
            axes.text(
                0.99,
                chance[label] + 0.01,
                "guessing",
                transform=axes.get_yaxis_transform(),
                ha="right",
                va="bottom",
                fontsize=7,
                color=MUTED,
            )
        for partition, aside, colour, marker, face, name in (
            ("baseline", 0.12, BASELINE, "s", "white", "one SAE per layer"),
            ("groups", -0.12, GROUP, "o", GROUP, "one SAE per group"),
        ):
            points = found.get(partition, ())
            for start, stop in _runs(points):
                own = points[start:stop]
                axes.errorbar(
                    [layers.index(point.layer) + aside for point in own],
                    [point.value for point in own],
                    yerr=[
                        [max(0.0, point.value - point.low) for point in own],
                        [max(0.0, point.high - point.value) for point in own],
                    ],
                    color=colour,
                    marker=marker,
                    markerfacecolor=face,
                    linewidth=1.1,
                    elinewidth=0.9,
                    capsize=2,
                    label=name,
                )
        axes.set(xlabel="Layer", xlim=(-0.5, len(layers) - 0.5), ylim=(0, 1.03))
        axes.set_title(label)
        axes.grid(axis="y")
        layer_ticks(axes, layers, offset=0, most=12 if n_panels < 3 else 8)
    panels[0].set_ylabel("Score")
    figure.legend(*unique_legend(*panels), loc="outside upper center", ncols=2)
    return figure


def _latents(profile: Mapping[str, Any]) -> float:
    """How many latents a heat map's rows stand for."""
    per_row = number(profile.get("latents_per_row"))
    return len(profile["share"]) * (per_row if per_row > 0 else 1)


def _line(
    detector: Detector, colours: Mapping[Detector, str], chosen: int | None
) -> dict[str, Any]:
    subject = detector.subject
    if detector.source == "untrained":
        return {
            "color": BASELINE,
            "linewidth": 0.9,
            "linestyle": (0, (4, 1.8)),
            "zorder": 2,
            "label": "untrained SAEs",
        }
    if subject is None:
        return {
            "color": THRESHOLD,
            "linewidth": 1.2,
            "marker": "^",
            "markersize": 3.2,
            "zorder": 3,
            "label": "linear probe",
        }
    marked = subject.is_baseline or subject.groups_total == chosen
    return {
        "color": colours[detector],
        "linewidth": 1.7 if marked else 1.0,
        "marker": "s" if subject.is_baseline else "o",
        "markersize": 3.2 if marked else 2.4,
        "zorder": 4 if marked else 3,
        "label": subject.label,
    }


def _colours(detectors: set[Detector]) -> dict[Detector, str]:
    """Blue by G, black for one SAE per layer."""
    trained = sorted(
        (own for own in detectors if own.source == "trained"), key=lambda own: own.order
    )
    groups = [own for own in trained if not own.is_baseline]
    colours = dict(zip(groups, group_colours(len(groups)), strict=True)) if groups else {}
    return colours | {own: INK for own in trained if own.is_baseline}


def _legend(figure: Figure, panels: Sequence[Axes], chosen: int | None) -> None:
    """Of many partitions the ends and the chosen one alone have a name."""
    handles, labels = unique_legend(*panels)
    groups = [label for label in labels if label.startswith("G = ")]
    if len(groups) > _MOST_LEGEND_ENTRIES:
        left_out = set(groups) - {groups[0], groups[-1], f"G = {chosen}"}
        kept = [at for at, label in enumerate(labels) if label not in left_out]
        handles, labels = [handles[at] for at in kept], [labels[at] for at in kept]
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)))


def _truth_axes(axes: Axes, key: str) -> None:
    axes.axhline(1, color=RULE, linewidth=0.8, zorder=1)
    axes.set_ylabel(TRUTHS[key])
    axes.set_ylim(_CHANCE[key] - 0.02, 1.03)
    axes.grid(axis="y")


def _spans(layers: Sequence[int], points: Sequence[Point]) -> list[tuple[int, int]]:
    """Ranges of positions in `layers` that share an SAE."""
    of_layer = {point.layer: point.sae for point in points}
    names = [of_layer.get(layer, f" {layer}") for layer in layers]
    starts = [at for at, name in enumerate(names) if at == 0 or name != names[at - 1]]
    return list(zip(starts, [*starts[1:], len(names)], strict=True)) if points else []


def _runs(points: Sequence[Point]) -> list[tuple[int, int]]:
    """Ranges of points whose layers share an SAE."""
    starts = [at for at, own in enumerate(points) if at == 0 or own.sae != points[at - 1].sae]
    return list(zip(starts, [*starts[1:], len(points)], strict=True))
