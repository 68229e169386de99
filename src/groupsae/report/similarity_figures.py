"""The figures of how alike the dictionaries are: matrices, layers, distributions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from groupsae.errors import InputError
from groupsae.report.metrics import number
from groupsae.report.style import (
    BAND,
    BASELINE,
    BLUES,
    COLUMN,
    GROUP,
    INK,
    PAGE,
    THRESHOLD,
    Floats,
    layer_ticks,
    roomy,
    styled,
    unique_legend,
)

MEASURES = {"mmcs": "MMCS", "concordance": "Concordance"}
MOST_PRINTED = 12  # layers up to which a matrix prints its values
_YARDSTICK = "two seeds, one layer"


@styled
def matrices(
    layers: Sequence[int],
    by_measure: Mapping[str, Sequence[Sequence[object]]],
    groups: Sequence[Sequence[int]],
) -> Figure:
    """Baselines of every layer against every layer's group SAE: a panel for each measure.

    The groups are outlined. Values are printed where there are at most `MOST_PRINTED` layers.
    """
    n_layers = len(layers)
    side = PAGE / 2 if len(by_measure) == 2 else 1.3 * COLUMN
    figure = Figure(figsize=(side * len(by_measure), side + 0.1), layout=roomy())
    panels = figure.subplots(1, len(by_measure), squeeze=False).ravel()
    for axes, (measure, rows) in zip(panels, by_measure.items(), strict=True):
        matrix = _matrix(rows)
        highest = float(np.nanmax(matrix, initial=1e-3))
        mesh = _heat(axes, layers, matrix, highest, groups)
        axes.set(xlabel="SAE of the group of layer", ylabel="Layer's own SAE")
        if n_layers <= MOST_PRINTED:
            _print_values(axes, matrix, highest)
        bar = figure.colorbar(mesh, ax=axes, location="top", shrink=0.85, aspect=28, pad=0.02)
        bar.set_label(MEASURES[measure])
        bar.outline.set_visible(False)
    return figure


@styled
def matrices_of_every_g(
    layers: Sequence[int],
    by_groups: Mapping[int, Sequence[Sequence[object]]],
    groups_of: Mapping[int, Sequence[Sequence[int]]],
    measure: str,
) -> Figure:
    """One measure's matrix for every G, small, on one colour scale."""
    found = {total: _matrix(rows) for total, rows in sorted(by_groups.items())}
    highest = max(float(np.nanmax(matrix, initial=1e-3)) for matrix in found.values())
    columns = min(4, len(found))
    n_rows = math.ceil(len(found) / columns)
    figure = Figure(
        figsize=(max(COLUMN, PAGE * columns / 4), 0.6 + 1.5 * n_rows), layout="constrained"
    )
    panels = figure.subplots(n_rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (total, matrix) in zip(panels, found.items(), strict=False):
        mesh = _heat(axes, layers, matrix, highest, groups_of.get(total, ()), small=True)
        axes.set_title(f"G = {total}", fontsize=7, pad=3)
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(found) - columns) : len(found)]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel("SAE of the group of layer", fontsize=8)
    figure.supylabel("Layer's own SAE", fontsize=8)
    bar = figure.colorbar(mesh, ax=list(panels), shrink=0.8, aspect=30, pad=0.02)
    bar.set_label(MEASURES[measure])
    bar.outline.set_visible(False)
    return figure


@styled
def similarity_per_layer(
    rows: Sequence[Mapping[str, Any]], yardstick: Mapping[int, Mapping[str, Any]]
) -> Figure:
    """MMCS both ways and concordance of each layer, with what two seeds of one layer have.

    Bands show the groups. Lines join layers of one group only.
    """
    layers = [row["layer"] for row in rows]
    at = np.arange(len(layers))
    has_concordance = any(math.isfinite(number(row.get("concordance"))) for row in rows)
    n_panels = 1 + has_concordance
    figure = Figure(figsize=(PAGE if n_panels == 2 else 1.3 * COLUMN, 2.55), layout=roomy())
    panels = figure.subplots(1, n_panels, squeeze=False).ravel()
    drawn: list[tuple[str, str, list[tuple[str, str, str, str]]]] = [
        (
            "MMCS",
            "mmcs",
            [
                ("mmcs_group_to_layer", GROUP, "o", "group → layer"),
                ("mmcs_layer_to_group", THRESHOLD, "^", "layer → group"),
            ],
        ),
        ("Concordance", "concordance", [("concordance", THRESHOLD, "^", "layer → group")]),
    ]
    for axes, (label, key, series) in zip(panels, drawn, strict=False):
        spans = _spans(rows)
        for index, (start, stop) in enumerate(spans):
            axes.axvspan(
                start - 0.5, stop - 0.5, color=BAND if index % 2 == 0 else "white", linewidth=0
            )
        seeds = [number(yardstick.get(layer, {}).get(key)) for layer in layers]
        if any(map(math.isfinite, seeds)):
            axes.plot(
                at,
                seeds,
                color=BASELINE,
                linewidth=1,
                marker="s",
                markersize=4.5,
                markerfacecolor="white",
                label=_YARDSTICK,
            )
        for name, colour, marker, legend in series:
            values = [number(row.get(name)) for row in rows]
            for start, stop in spans:
                axes.plot(
                    at[start:stop],
                    values[start:stop],
                    color=colour,
                    marker=marker,
                    label=legend,
                )
        axes.set(xlabel="Layer", ylabel=label, xlim=(-0.5, len(layers) - 0.5), ylim=(0, 1.03))
        axes.grid(axis="y")
        layer_ticks(axes, layers, offset=0, most=12)
    figure.legend(*unique_legend(*panels), loc="outside upper center", ncols=3)
    return figure


@styled
def maxima(rows: Sequence[Mapping[str, Any]], yardstick: Mapping[int, Mapping[str, Any]]) -> Figure:
    """The distribution of the largest cosines: one histogram a layer, both ways and two seeds."""
    drawn = [row for row in rows if has_maxima(row)]
    if not drawn:
        raise InputError("no row of the similarity has a histogram")
    columns = len(drawn) if len(drawn) <= 4 else 4 if len(drawn) <= 12 else 6
    n_rows = math.ceil(len(drawn) / columns)
    figure = Figure(
        figsize=(max(COLUMN, PAGE * min(1, columns / 4)), 0.7 + min(1.15 * n_rows, 8)),
        layout="constrained",
    )
    panels = figure.subplots(n_rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, row in zip(panels, drawn, strict=False):
        twin = yardstick.get(row["layer"], {})
        for found, colour, filled, label in (
            (_shares(row, "group_to_layer"), GROUP, True, "group → layer"),
            (_shares(row, "layer_to_group"), THRESHOLD, False, "layer → group"),
            (_shares(twin, "counts"), INK, False, _YARDSTICK),
        ):
            if found is not None:
                axes.stairs(
                    *found,
                    fill=filled,
                    color=colour,
                    alpha=0.45 if filled else 1,
                    linewidth=0.8,
                    linestyle=(0, (2, 1)) if label == _YARDSTICK else "-",
                    label=label,
                )
        axes.text(
            0.05, 0.95, f"layer {row['layer']}", transform=axes.transAxes, va="top", fontsize=7
        )
    for axes in panels[len(drawn) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(drawn) - columns) : len(drawn)]:
        axes.tick_params(labelbottom=True)
    panels[0].set_xlim(0, 1)
    panels[0].set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    panels[0].set_ylim(0, 1.2 * panels[0].get_ylim()[1])
    figure.supxlabel("Largest cosine with a latent of the other SAE", fontsize=8)
    figure.supylabel("Latents (%)", fontsize=8)
    figure.legend(*unique_legend(*panels), loc="outside upper center", ncols=3)
    return figure


def has_maxima(row: Mapping[str, Any]) -> bool:
    """Whether a row has a histogram that can be drawn."""
    return any(_shares(row, key) is not None for key in ("group_to_layer", "layer_to_group"))


def _heat(
    axes: Axes,
    layers: Sequence[int],
    matrix: Floats,
    highest: float,
    groups: Sequence[Sequence[int]],
    *,
    small: bool = False,
) -> Any:
    n_layers = len(layers)
    ruled = n_layers <= 24 and not small
    mesh = axes.pcolormesh(
        matrix,
        cmap=BLUES,
        vmin=0,
        vmax=highest,
        edgecolors="white" if ruled else "face",
        linewidth=0.4 if ruled else 0.1,
        rasterized=n_layers > 48 or small,
    )
    axes.set(aspect="equal", xlim=(0, n_layers), ylim=(n_layers, 0))
    layer_ticks(axes, layers, offset=0.5, most=6 if small else 12, both=True)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for group in groups:
        members = [layers.index(layer) for layer in group if layer in layers]
        if members:
            start, stop = min(members), max(members) + 1
            axes.add_patch(
                Rectangle(
                    (start, start),
                    stop - start,
                    stop - start,
                    fill=False,
                    edgecolor=THRESHOLD,
                    linewidth=1.0 if small else 1.6,
                    joinstyle="round",
                    clip_on=False,
                    zorder=4,
                )
            )
    return mesh


def _print_values(axes: Axes, matrix: Floats, highest: float) -> None:
    shades = BLUES(matrix / highest)
    for (row, column), value in np.ndenumerate(matrix):
        if math.isfinite(value):
            dark = float(shades[row, column, :3] @ to_rgb("#4d9624")) < 0.52
            axes.text(
                column + 0.5,
                row + 0.52,
                f"{value:.2f}".removeprefix("0"),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else INK,
            )


def _matrix(rows: Sequence[Sequence[object]]) -> Floats:
    return np.array([[number(entry) for entry in row] for row in rows])


def _spans(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    starts = [i for i, row in enumerate(rows) if i == 0 or row["group"] != rows[i - 1]["group"]]
    return list(zip(starts, [*starts[1:], len(rows)], strict=True))


def _shares(row: Mapping[str, Any], key: str) -> tuple[Floats, Floats] | None:
    """(per cent of latents, edges) of a histogram; None where it is not one."""
    histogram = row.get("histogram")
    if not isinstance(histogram, Mapping) or not {"edges", key} <= histogram.keys():
        return None
    edges, counts = (
        np.array([number(value) for value in values]) if isinstance(values, list) else np.zeros(0)
        for values in (histogram["edges"], histogram[key])
    )
    if len(edges) != len(counts) + 1 or not np.isfinite(edges).all() or not counts.size:
        return None
    counts = np.nan_to_num(counts)
    return 100 * counts / max(counts.sum(), 1), edges
