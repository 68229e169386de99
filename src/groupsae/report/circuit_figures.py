"""The figures of circuits: faithfulness and completeness over the number of latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from groupsae.report.curves import CONTROLS, METHODS, SCORES, SELECTIONS, Line, Panel, Subject
from groupsae.report.style import (
    BASELINE,
    INK,
    MUTED,
    PAGE,
    RULE,
    Floats,
    group_colours,
    roomy,
    styled,
)

_LOWEST, _HIGHEST = -0.5, 1.5  # scores beyond run off the panel
_MOST_LEGEND_ENTRIES = 12
_DASHES = {"random": (0, (1, 1.4)), "untrained": (0, (4, 1.8))}
_ON_WHITE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.4}


class Drawn(NamedTuple):
    """A panel's lines, and a note that is written into it."""

    lines: Sequence[Line]
    note: str = ""


@styled
def circuit_curves(panels: Mapping[Panel, Drawn], chosen: int | None = None) -> Figure:
    """Faithfulness and completeness against N: a column for each score, a row without and with
    error nodes.

    One line for each partition, blue from light for few groups to dark for many, black for one SAE
    per layer; controls are grey.

    Args:
        panels: Of one method and selection.
        chosen: The G whose line is the thickest.
    """
    scores = [score for score in SCORES if any(panel.score == score for panel in panels)]
    nodes = sorted({panel.error_nodes for panel in panels})
    figure = Figure(
        figsize=(PAGE, 0.5 + 2.05 * len(nodes)),
        layout=roomy(),
    )
    grid = figure.subplots(len(nodes), len(scores), sharex="col", sharey=True, squeeze=False)
    colours = _colours(panels)
    for row, error_nodes in enumerate(nodes):
        for column, score in enumerate(scores):
            axes = grid[row][column]
            for panel, drawn in panels.items():
                if (panel.score, panel.error_nodes) == (score, error_nodes):
                    _curves_panel(axes, panel, drawn, colours, chosen)
            axes.set_ylabel(f"{SCORES[score]}\n({_error_nodes(error_nodes)})")
    _finish(figure, list(grid.ravel()), colours, chosen)
    for axes in grid[-1]:
        axes.set_xlabel("Latents per layer N")
    return figure


@styled
def other_curves(panels: Mapping[Panel, Drawn], chosen: int | None = None) -> Figure:
    """The curves of several methods and selections, small: one of these a row.

    Columns are the two scores, without error nodes and with them.
    """
    rows = list(dict.fromkeys((panel.method, panel.selection) for panel in panels))
    columns = [
        (score, nodes)
        for score in SCORES
        for nodes in (False, True)
        if any((panel.score, panel.error_nodes) == (score, nodes) for panel in panels)
    ]
    figure = Figure(figsize=(PAGE, 0.75 + 1.35 * len(rows)), layout=roomy())
    grid = figure.subplots(len(rows), len(columns), sharex="col", sharey=True, squeeze=False)
    colours = _colours(panels)
    for row, (method, selection) in enumerate(rows):
        for column, (score, nodes) in enumerate(columns):
            panel = Panel(score, method, selection, nodes)
            if panel in panels:
                _curves_panel(grid[row][column], panel, panels[panel], colours, chosen)
            if row == 0:
                grid[row][column].set_title(
                    f"{SCORES[score]}\n{_error_nodes(nodes)}", fontsize=7, linespacing=1.3
                )
        name = METHODS[method].replace(" ", "\n", 1)
        grid[row][0].set_ylabel(f"{name},\n{SELECTIONS[selection]}", fontsize=7)
    _finish(figure, list(grid.ravel()), colours, chosen, size=0.8)
    figure.supxlabel("Latents per layer N", fontsize=8)
    return figure


def _curves_panel(
    axes: Axes, panel: Panel, drawn: Drawn, colours: Mapping[Subject, str], chosen: int | None
) -> None:
    for level in (0, 1):
        axes.axhline(level, color=RULE, linewidth=0.8, zorder=1)
    for line in drawn.lines:
        if line.latents == "ranked":
            marked = line.subject.is_baseline or line.subject.groups_total == chosen
            axes.plot(
                line.n,
                line.value,
                color=colours[line.subject],
                linewidth=1.7 if marked else 1.0,
                marker="o" if line.n.size == 1 else None,
                zorder=4 if marked else 3,
                label=line.subject.label,
            )
        else:
            axes.plot(
                line.n,
                line.value,
                color=BASELINE,
                linewidth=0.9,
                linestyle=_DASHES[line.latents],
                marker="o" if line.n.size == 1 else None,
                zorder=2,
                label=CONTROLS[line.latents],
            )
    note = drawn.note or ("" if drawn.lines else "no curve to be drawn")
    if note:
        falls = panel.score == "completeness"  # and leaves the lower corner free
        axes.text(
            0.03,
            0.03 if falls else 0.97,
            note,
            transform=axes.transAxes,
            va="bottom" if falls else "top",
            fontsize=7,
            color=MUTED,
            zorder=1.5,  # over the rules, under the lines
            bbox=_ON_WHITE,
        )


def _finish(
    figure: Figure,
    panels: Sequence[Axes],
    colours: Mapping[Subject, str],
    chosen: int | None,
    size: float = 1.0,
) -> None:
    """Axes that the panels share, and the legend."""
    values = [
        np.asarray(line.get_ydata(), dtype=np.float64)
        for axes in panels
        for line in axes.get_lines()
    ]
    low, high = _limits(np.concatenate(values) if values else np.zeros(1))
    for axes in panels:
        axes.set_ylim(low, high)
        axes.grid(axis="y")
        _log_x(axes, dense=size == 1.0)
        if size < 1.0:
            for line in axes.get_lines():
                line.set_linewidth(size * line.get_linewidth())
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    subjects = sorted(colours, key=lambda subject: subject.order)
    names = [subject.label for subject in subjects if subject.label in found]
    if len(names) > _MOST_LEGEND_ENTRIES:
        ends = {names[0], names[-2], names[-1], f"G = {chosen}"}
        names = [name for name in names if name in ends]
    names += [label for label in CONTROLS.values() if label in found]
    if names:
        figure.legend(
            [found[name] for name in names],
            names,
            loc="outside upper center",
            ncols=min(5, len(names)),
        )


def _limits(values: Floats) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    low = min(0.0, float(finite.min(initial=0.0)))
    high = max(1.0, float(finite.max(initial=1.0)))
    return max(_LOWEST, low) - 0.06, min(_HIGHEST, high) + 0.06


def runs_off(lines: Sequence[Line]) -> bool:
    """Whether a line leaves the panel that it is drawn in."""
    return any(
        float(line.value.min()) < _LOWEST or float(line.value.max()) > _HIGHEST for line in lines
    )


def _log_x(axes: Axes, *, dense: bool) -> None:
    """A log axis with plain numbers, where there is a line."""
    drawn = [line for line in axes.get_lines() if str(line.get_label())[0] != "_"]
    if not drawn:
        return
    axes.set_xscale("log")
    n = np.concatenate([np.asarray(line.get_xdata(), dtype=np.float64) for line in drawn])
    low, high = float(n.min()), float(n.max())
    axes.set_xlim(low / 1.08, high * 1.08)
    few = high / low > (200 if dense else 20)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if few else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if not dense:
        axes.xaxis.set_minor_locator(NullLocator())


def _colours(panels: Mapping[Panel, Drawn]) -> dict[Subject, str]:
    """Blue by G, black for one SAE per layer."""
    subjects = {line.subject for drawn in panels.values() for line in drawn.lines}
    groups = sorted((s for s in subjects if not s.is_baseline), key=lambda s: s.order)
    colours = dict(zip(groups, group_colours(len(groups)), strict=True)) if groups else {}
    return colours | {subject: INK for subject in subjects if subject.is_baseline}


def _error_nodes(error_nodes: bool) -> str:
    return "with error nodes" if error_nodes else "without error nodes"
