"""The figures, drawn from plain artefacts and sized for a paper (inches, 7 to 9 point type).

One hue stands for group SAEs in all of them, light for shallow groups and dark for deep ones; grey
stands for one SAE per layer. Both survive the common colour-vision deficiencies and greyscale.
Every function returns a `matplotlib.figure.Figure` that no global state knows; write it with
:func:`encode`, which embeds the fonts and gives the same bytes for the same figure.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from scipy.cluster import hierarchy

from groupsae.errors import InputError
from groupsae.grouping.matrix import QUANTITIES, Distances
from groupsae.grouping.methods import linkage_matrix
from groupsae.report.metrics import (
    METRICS,
    LayerComparison,
    compare,
    evaluated_totals,
    means,
    number,
)
from groupsae.report.style import (
    BAND,
    BASELINE,
    COLUMN,
    GROUP,
    HEAT,
    INK,
    MUTED,
    OPAQUE,
    PAGE,
    STYLE,
    THRESHOLD,
    Floats,
    group_colours,
    layer_ticks,
    roomy,
    styled,
    unique_legend,
)
from groupsae.report.wording import chosen_groups, sae_label, si_scale

# No times of writing, so that the same figure gives the same bytes.
_METADATA: dict[str, dict[str, None]] = {
    "pdf": {"CreationDate": None},
    "png": {},
    "svg": {"Date": None},
}

MOST_PRINTED = 16  # layers up to which the heat map prints its values

_MOST_LEGEND_ENTRIES = 8
_MOST_POINTS = 400

_MEASURES = {
    "amad": ("AMAD", "AMAD"),
    "flops_per_token": ("predicted cost", "Predicted {}FLOP per token"),
}
_UNIT_NAMES = {
    "": "",
    "k": " (thousands)",
    "M": " (millions)",
    "G": " (billions)",
    "T": " (trillions)",
    "P": " (quadrillions)",
}


@styled
def distance_heatmap(
    distances: Mapping[str, Any], partition: Mapping[str, Any] | None = None
) -> Figure:
    """Distances of all pairs of layers, the chosen groups outlined on the diagonal.

    Takes `distances.json` and, for the outlines, `partition.json`. The values are printed where
    there are at most `MOST_PRINTED` layers.
    """
    layers, matrix = distances["layers"], _matrix(distances)
    n_layers = len(layers)
    printed = n_layers <= MOST_PRINTED
    side = max(2.3, 0.315 * n_layers) if printed else 4.0
    figure = Figure(figsize=(side + 1.15, side + 0.4), layout="constrained")
    axes = figure.subplots()
    mesh = axes.pcolormesh(
        matrix,
        cmap=HEAT,
        vmin=0,
        vmax=np.nanmax(matrix, initial=1e-3),
        edgecolors="white" if n_layers <= 24 else "face",
        linewidth=0.6 if n_layers <= 24 else 0.1,
        rasterized=n_layers > 48,
    )
    axes.set(aspect="equal", xlim=(0, n_layers), ylim=(n_layers, 0), xlabel="Layer", ylabel="Layer")
    layer_ticks(axes, layers, offset=0.5, most=24, both=True)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if printed:
        _print_values(axes, matrix)
    for group in chosen_groups(partition):
        members = [layers.index(layer) for layer in group if layer in layers]
        if members:
            start, width = min(members), max(members) - min(members) + 1
            axes.add_patch(
                Rectangle(
                    (start, start),
                    width,
                    width,
                    fill=False,
                    edgecolor=GROUP,
                    linewidth=2.0 if n_layers <= 24 else 1.4,
                    joinstyle="round",
                    clip_on=False,
                    zorder=4,
                )
            )
    bar = figure.colorbar(mesh, ax=axes, shrink=0.75, aspect=24, pad=0.03)
    name = quantity(distances)
    bar.set_label(name[0].upper() + name[1:])
    bar.outline.set_visible(False)
    return figure


@styled
def dendrogram(distances: Mapping[str, Any], partition: Mapping[str, Any] | None = None) -> Figure:
    """Contiguous complete linkage of the layers, and the cut that gives the chosen groups.

    The height of a join is the largest distance inside the group that it makes. The bars under the
    leaves are the chosen groups. The cut is drawn only where the chosen partition is a cut of this
    tree, which explicit, even and optimal partitions need not be.
    """
    layers, matrix = distances["layers"], _matrix(distances)
    if partition is not None:
        keep = [layers.index(layer) for layer in partition["layers"] if layer in layers]
        layers, matrix = [layers[at] for at in keep], matrix[np.ix_(keep, keep)]
    n_layers = len(layers)
    if n_layers < 2:
        raise InputError(f"a dendrogram needs at least two layers; there is {n_layers}")
    links = linkage_matrix(Distances.from_matrix(matrix, layers))
    groups = chosen_groups(partition) or [[layer] for layer in layers]
    group_of = {layer: at for at, group in enumerate(groups) for layer in group}
    colours = group_colours(len(groups))
    cut = _cut(links, layers, groups) if partition is not None else None

    width = min(PAGE, max(COLUMN, 0.2 * n_layers + 0.8))
    figure = Figure(figsize=(width, 2.7), layout="constrained")
    axes = figure.subplots()
    tree = hierarchy.dendrogram(links, no_plot=True)
    for x, heights in zip(np.array(tree["icoord"]) / 10, tree["dcoord"], strict=True):
        inside = cut is not None and heights[1] <= cut
        group = group_of.get(layers[int(x[0])], 0)
        axes.plot(
            x,
            heights,
            color=colours[group] if inside else MUTED,
            linewidth=1.6 if inside else 0.9,
            solid_joinstyle="miter",
        )
    if partition is not None:
        for shared, colour in zip(groups, colours, strict=True):
            members = [layers.index(layer) for layer in shared if layer in layers]
            if members:
                axes.add_patch(
                    Rectangle(
                        (min(members) + 0.12, -0.035),
                        max(members) - min(members) + 0.76,
                        0.028,
                        transform=axes.get_xaxis_transform(),
                        facecolor=colour,
                        clip_on=False,
                    )
                )
    if cut is not None:
        axes.axhline(cut, color=THRESHOLD, linestyle=(0, (4, 2.5)), linewidth=1, label="cut")
        axes.text(
            1.015,
            cut,
            f"G = {len(groups)}",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=7,
            color=THRESHOLD,
        )
    axes.set(xlim=(0, n_layers), xlabel="Layer", ylabel=f"Largest {quantity(distances)}")
    axes.set_ylim(0, 1.08 * max(float(links[:, 2].max()), 1e-9))
    layer_ticks(axes, layers, offset=0.5, most=32)
    axes.tick_params(axis="x", length=0, pad=7)
    axes.spines["bottom"].set_visible(False)
    return figure


@styled
def amad_and_cost(partition: Mapping[str, Any]) -> Figure:
    """AMAD and predicted FLOPs per token against G, the threshold and the choice marked."""
    by_groups = sorted((int(total), entry) for total, entry in partition["by_groups"].items())
    totals = np.array([total for total, _ in by_groups])
    chosen, n_layers = int(partition["chosen"]), len(partition["layers"])
    measures = {
        key: np.array([number(entry.get(key)) for _, entry in by_groups]) for key in _MEASURES
    }
    shown = [key for key, values in measures.items() if np.isfinite(values).any()]
    if not shown:
        raise InputError("the partition has neither AMAD nor predicted cost to draw")

    figure = Figure(figsize=(PAGE if len(shown) == 2 else COLUMN, 2.35), layout=roomy())
    panels = dict(zip(shown, figure.subplots(1, len(shown), squeeze=False).ravel(), strict=True))
    for key, axes in panels.items():
        scale, prefix = (1.0, "") if key == "amad" else si_scale(float(np.nanmax(measures[key])))
        values = measures[key] / scale
        name, label = _MEASURES[key]
        axes.plot(totals, values, color=INK, marker="o", markersize=3.2, label=name)
        highest = float(np.nanmax(values))
        threshold = number(partition.get("threshold"))
        if key == "amad" and math.isfinite(threshold):
            axes.axhline(
                threshold,
                color=THRESHOLD,
                linestyle=(0, (4, 2.5)),
                linewidth=1,
                label=f"threshold {threshold:g}",
            )
            highest = max(highest, threshold)
        if key == "flops_per_token" and n_layers in totals:
            axes.plot(
                [n_layers],
                values[totals == n_layers],
                linestyle="none",
                marker="s",
                markersize=5.5,
                color=BASELINE,
                label="one SAE per layer",
            )
        axes.axvline(chosen, color=GROUP, linewidth=0.8, alpha=0.45)
        axes.plot(
            [chosen],
            values[totals == chosen],
            linestyle="none",
            marker="o",
            markersize=7,
            color=GROUP,
            label=f"chosen, G = {chosen}",
        )
        axes.set(xlabel="Number of groups G", ylabel=label.format(prefix))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
        axes.set_xlim(min(totals) - 0.6, max(totals) + 0.6)
        axes.set_ylim(0, 1.1 * max(highest, 1e-9))
        axes.grid(axis="y")
        axes.legend(**OPAQUE, loc="upper right" if key == "amad" else "lower right")
    return figure


def has_measures(partition: Mapping[str, Any]) -> bool:
    """Whether a partition has anything that :func:`amad_and_cost` could draw."""
    return any(
        math.isfinite(number(entry.get(key)))
        for entry in partition["by_groups"].values()
        for key in _MEASURES
    )


@styled
def training_curves(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """FVU and fraction of dead latents of each SAE against the tokens that it has seen.

    Takes the lines of `metrics.jsonl`. SAEs of one layer each, baselines and twins, are drawn grey.
    Of a long log at most some 400 points a curve are kept, evenly, the last one always.
    """
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for line in metrics:
        curves.setdefault(str(line["sae"]), []).append(line)
    baselines = sorted(name for name in curves if is_of_a_layer(name))
    groups = sorted((name for name in curves if name not in baselines), key=_first_layer)
    tokens = [number(line.get("tokens")) for line in metrics]
    scale, unit = si_scale(float(np.nanmax(tokens, initial=0)))

    figure = Figure(figsize=(PAGE, 2.75), layout=roomy())
    panels = figure.subplots(1, 2)
    for axes, key, label in zip(
        panels,
        ("fvu", "dead"),
        ("FVU (log scale)", "Fraction of dead latents"),
        strict=True,
    ):
        drawn = [(name, BASELINE, 0.7) for name in baselines]
        drawn += list(zip(groups, group_colours(len(groups)), [1.5] * len(groups), strict=True))
        for name, colour, width in drawn:
            points = _thinned(curves[name])
            axes.plot(
                [number(point.get("tokens")) / scale for point in points],
                [number(point.get(key)) for point in points],
                color=colour,
                linewidth=width,
                marker="o" if len(points) == 1 else None,
                alpha=0.75 if name in baselines else 1,
                zorder=2 if name in baselines else 3,
                label=name,
            )
        axes.set(xlabel=f"Tokens per SAE{_UNIT_NAMES[unit]}", ylabel=label)
        axes.grid(axis="y")
        axes.margins(x=0.02)
        axes.set_xlim(left=0)
    _log_axis(panels[0])
    most_dead = max((number(line.get("dead")) for line in metrics), default=0, key=np.nan_to_num)
    top = max(1.08 * float(np.nan_to_num(most_dead)), 0.001)
    panels[1].set_ylim(-0.02 * top, top)

    lines = {line.get_label(): line for line in panels[0].get_lines()}
    entries = [(lines[name], sae_label(name)) for name in groups]
    if len(groups) > _MOST_LEGEND_ENTRIES:
        entries = [
            (lines[groups[0]], f"groups, shallowest ({sae_label(groups[0])})"),
            (lines[groups[len(groups) // 2]], "…"),
            (lines[groups[-1]], f"deepest ({sae_label(groups[-1])})"),
        ]
    if baselines:
        entries.append((lines[baselines[0]], "one SAE per layer"))
    handles, labels = zip(*entries, strict=True) if entries else ((), ())
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, max(1, len(entries))))
    return figure


def is_of_a_layer(name: str) -> bool:
    """Whether an SAE is a layer's own, a baseline or its twin of another seed."""
    return name.startswith(("baseline/", "twin/"))


@styled
def per_layer(
    rows: Sequence[Mapping[str, Any]],
    metrics: Sequence[str] = ("ce_loss_score", "r2", "l2", "l0"),
    chosen: int | None = None,
) -> Figure:
    """Each layer's metrics with its group's SAE and with its own, bands showing the groups.

    Takes the rows of `evaluation/reconstruction.json`, of which those of `chosen` groups are drawn
    where several partitions were evaluated. Lines join layers of one group only.
    """
    for key in metrics:
        if key not in METRICS:
            raise InputError(f"no metric is called {key!r}; there are {', '.join(METRICS)}")
    comparisons = compare(rows, chosen)
    columns = min(2, len(metrics))
    height = 1.95 if len(metrics) > 1 else 2.3
    figure = Figure(
        figsize=(PAGE if columns == 2 else COLUMN, height * math.ceil(len(metrics) / columns)),
        layout=roomy(),
    )
    panels = figure.subplots(math.ceil(len(metrics) / columns), columns, squeeze=False).ravel()
    for axes, key in zip(panels, metrics, strict=False):
        _per_layer_panel(axes, comparisons, key)
    for axes in panels[len(metrics) :]:
        axes.set_visible(False)
    figure.legend(*unique_legend(panels[0]), loc="outside upper center", ncols=2)
    return figure


@styled
def by_number_of_groups(rows: Sequence[Mapping[str, Any]], chosen: int | None = None) -> Figure:
    """Mean CE-loss score and R² over layers against G, beside one SAE per layer.

    Takes the rows of `evaluation/reconstruction.json`, of every G that was evaluated.
    """
    totals = evaluated_totals(rows)
    figure = Figure(figsize=(PAGE, 2.35), layout=roomy())
    for axes, key in zip(figure.subplots(1, 2), ("ce_loss_score", "r2"), strict=True):
        found = [means(compare(rows, total), key) for total in totals]
        values = [ours for ours, _, _ in found]
        axes.plot(totals, values, color=GROUP, marker="o", label="one SAE per group")
        baseline = [theirs for _, theirs, _ in found if math.isfinite(theirs)]
        if baseline:
            axes.axhline(
                baseline[0], color=BASELINE, linestyle=(0, (4, 2.5)), label="one SAE per layer"
            )
        if chosen in totals:
            axes.plot(
                [chosen],
                [values[totals.index(chosen)]],
                linestyle="none",
                marker="o",
                markersize=7,
                color=GROUP,
                label=f"chosen, G = {chosen}",
            )
        axes.set(xlabel="Number of groups G", ylabel=f"Mean {METRICS[key].label}")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
        axes.set_xlim(min(totals) - 0.6, max(totals) + 0.6)
        axes.grid(axis="y")
    figure.legend(*unique_legend(*figure.axes), loc="outside upper center", ncols=3)
    return figure


@styled
def latent_density(rows: Sequence[Mapping[str, Any]], chosen: int | None = None) -> Figure:
    """How often latents are active: one histogram a layer, its group's SAE over its own.

    Takes the rows of `evaluation/reconstruction.json` that have `latent_density`, with `edges` in
    log10 of the share of tokens, and `counts` of latents.
    """
    comparisons = [
        comparison
        for comparison in compare(rows, chosen)
        if histogram(comparison.groups) or histogram(comparison.baseline)
    ]
    if not comparisons:
        raise InputError("no row of the evaluation has a latent_density histogram")
    columns = _density_columns(len(comparisons))
    n_rows = math.ceil(len(comparisons) / columns)
    width = max(COLUMN, PAGE * min(1, columns / 4))
    figure = Figure(figsize=(width, 0.5 + min(1.1 * n_rows, 8)), layout="constrained")
    panels = figure.subplots(n_rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, comparison in zip(panels, comparisons, strict=False):
        for row, colour, filled, label in (
            (comparison.groups, GROUP, True, "group SAE"),
            (comparison.baseline, INK, False, "one SAE per layer"),
        ):
            if found := histogram(row):
                edges, counts = found
                share = 100 * counts / max(counts.sum(), 1)
                axes.stairs(
                    share,
                    edges,
                    fill=filled,
                    color=colour,
                    alpha=0.5 if filled else 1,
                    linewidth=0.8,
                    label=label,
                )
        axes.text(
            0.04, 0.95, f"layer {comparison.layer}", transform=axes.transAxes, va="top", fontsize=7
        )
    for axes in panels[len(comparisons) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(comparisons) - columns) : len(comparisons)]:
        axes.tick_params(labelbottom=True)
    panels[0].set_ylim(0, 1.25 * panels[0].get_ylim()[1])
    panels[0].set_xlim(*_occupied(comparisons))
    figure.supxlabel("log10 of the share of tokens on which a latent is active", fontsize=8)
    figure.supylabel("Latents (%)", fontsize=8)
    figure.legend(*unique_legend(*panels), loc="outside upper center", ncols=2)
    return figure


@styled
def sweep_means(means: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean CE-loss score, R² and L0 of each member of a sweep, groups beside layers.

    Takes the `means` of a sweep's `results.json`.
    """
    members = list(dict.fromkeys(row["member"] for row in means))
    figure = Figure(figsize=(PAGE, 0.9 + 0.19 * len(members)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, key in zip(panels, ("ce_loss_score", "r2", "l0"), strict=True):
        for partition, colour, marker, label in (
            ("baseline", BASELINE, "s", "one SAE per layer"),
            ("groups", GROUP, "o", "group SAE"),
        ):
            own = [row for row in means if row["partition"] == partition]
            if own:
                axes.plot(
                    [number(row[key]) for row in own],
                    [members.index(row["member"]) for row in own],
                    color=colour,
                    marker=marker,
                    linestyle="none",
                    label=label,
                )
        axes.set_xlabel(f"Mean {METRICS[key].label}")
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(4))
    labels = {row["member"]: _setting(row["overrides"]) for row in means}
    panels[0].set_yticks(range(len(members)), [labels[member] for member in members])
    panels[0].set_ylim(len(members) - 0.5, -0.5)
    figure.legend(*unique_legend(*panels), loc="outside upper center", ncols=2)
    return figure


def _setting(overrides: Mapping[str, Any]) -> str:
    """A member of a sweep in words: "k 16, learning_rate 0.0001"."""
    return ", ".join(f"{path.rpartition('.')[2]} {value}" for path, value in overrides.items())


def encode(figure: Figure, form: str) -> bytes:
    """`figure` as a PDF, PNG or SVG file; the same figure gives the same bytes."""
    if form not in _METADATA:
        raise InputError(f"figures cannot be written as {form!r}; choose of {', '.join(_METADATA)}")
    buffer = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format=form, dpi=300, metadata=_METADATA[form])
    return buffer.getvalue()


def histogram(row: Mapping[str, Any]) -> tuple[Floats, Floats] | None:
    """(edges in log10 density, counts) of a row's `latent_density`, or None where it has none."""
    density = row.get("latent_density")
    if not isinstance(density, Mapping) or not {"edges", "counts"} <= density.keys():
        return None
    edges = np.array([number(edge) for edge in density["edges"]])
    counts = np.array([number(count) for count in density["counts"]])
    if len(edges) != len(counts) + 1 or not np.isfinite(edges).all():
        return None
    return edges, np.nan_to_num(counts)


def _per_layer_panel(axes: Axes, comparisons: Sequence[LayerComparison], key: str) -> None:
    layers = [comparison.layer for comparison in comparisons]
    values = np.array([comparison.values(key) for comparison in comparisons]).reshape(-1, 3)
    at = np.arange(len(layers))
    starts = [i for i, c in enumerate(comparisons) if i == 0 or c.group != comparisons[i - 1].group]
    size = 4 if len(layers) <= 32 else 2
    spans = list(zip(starts, [*starts[1:], len(layers)], strict=True))
    for index, (start, stop) in enumerate(spans):
        axes.axvspan(
            start - 0.5, stop - 0.5, color=BAND if index % 2 == 0 else "white", linewidth=0
        )
    if np.isfinite(values[:, 1]).any():
        axes.plot(
            at,
            values[:, 1],
            color=BASELINE,
            linewidth=1,
            marker="s",
            markersize=1.15 * size,
            markerfacecolor="white",
            markeredgewidth=size / 4,
            label="one SAE per layer",
        )
    for start, stop in spans:
        axes.plot(
            at[start:stop],
            values[start:stop, 0],
            color=GROUP,
            marker="o",
            markersize=size,
            label="one SAE per group",
        )
    axes.set(xlabel="Layer", ylabel=METRICS[key].label)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.grid(axis="y")
    layer_ticks(axes, layers, offset=0, most=16)
    finite = values[:, :2][np.isfinite(values[:, :2])]
    if finite.size and np.ptp(finite) <= 1e-3 * abs(finite).max():
        middle = float(finite.mean())
        axes.set_ylim(middle - 0.1 * abs(middle) - 1e-9, middle + 0.1 * abs(middle) + 1e-9)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))


def quantity(distances: Mapping[str, Any]) -> str:
    """What the distances are: "angular distance"."""
    return QUANTITIES.get(str(distances.get("similarity", "angular")), "distance")


def _matrix(distances: Mapping[str, Any]) -> Floats:
    """The distances as a symmetric matrix; None becomes NaN, one filled triangle is enough."""
    matrix = np.array(distances["matrix"], dtype=np.float64)
    return np.fmax(matrix, matrix.T)


def _cut(links: Floats, layers: Sequence[int], groups: Sequence[Sequence[int]]) -> float | None:
    """A height that gives `groups`, or None where no height does."""
    members: list[list[int]] = [[layer] for layer in layers]
    current = {tuple(member) for member in members}
    joins = len(layers) - len(groups)
    for left, right, _, _ in links[:joins]:
        a, b = members[int(left)], members[int(right)]
        members.append(a + b)
        current = (current - {tuple(a), tuple(b)}) | {tuple(a + b)}
    if current != {tuple(group) for group in groups}:
        return None
    below = float(links[joins - 1, 2]) if joins else 0.0
    above = float(links[joins, 2]) if joins < len(links) else 1.06 * below
    return (below + above) / 2


def _print_values(axes: Axes, matrix: Floats) -> None:
    shades = HEAT(matrix / np.nanmax(matrix, initial=1e-3))
    for (row, column), value in np.ndenumerate(matrix):
        if row != column and math.isfinite(value):
            dark = float(shades[row, column, :3] @ to_rgb("#4d9624")) < 0.52
            axes.text(
                column + 0.5,
                row + 0.5,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else INK,
            )


def _log_axis(axes: Axes) -> None:
    """A log scale with plain numbers, where there is something positive to show."""
    values = np.concatenate([np.ravel(line.get_ydata()) for line in axes.get_lines()])
    positive = values[np.isfinite(values) & (values > 0)]
    if positive.size == 0:
        return
    axes.set_yscale("log")
    low, high = positive.min() / 1.12, positive.max() * 1.12
    axes.set_ylim(low, high)
    many = high / low > 30
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if many else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _thinned(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    every = math.ceil(len(points) / _MOST_POINTS)
    kept = list(points[::every])
    return kept if kept[-1] is points[-1] else [*kept, points[-1]]


def _first_layer(name: str) -> tuple[int, str]:
    digits = re.search(r"\d+", name)
    return (int(digits[0]) if digits else -1, name)


def _density_columns(n_panels: int) -> int:
    if n_panels <= 6:
        return n_panels
    return 4 if n_panels <= 12 else 6 if n_panels <= 36 else 8


def _occupied(comparisons: Sequence[LayerComparison]) -> tuple[float, float]:
    """The part of the density axis that any latent falls on, a little wider."""
    lows, highs = [], []
    for comparison in comparisons:
        for row in (comparison.groups, comparison.baseline):
            if found := histogram(row):
                edges, counts = found
                filled = np.flatnonzero(counts)
                if filled.size:
                    lows.append(edges[filled[0]])
                    highs.append(edges[filled[-1] + 1])
    return (min(lows) - 0.2, max(highs) + 0.2) if lows else (-6.0, 0.0)
