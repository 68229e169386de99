"""A circuit's picture: the strongest latents, by layer and position."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from groupsae.errors import InputError
from groupsae.report.metrics import number
from groupsae.report.style import BAND, GROUP, THRESHOLD, styled
from groupsae.report.wording import visible

MOST_POSITIONS = 32  # up to which a picture has a column for every position
MOST_LABELS = 12  # latents of a picture that have their number beside them
# Of a picture, in points: the narrowest column, the gap between circles, the columns together.
_NARROWEST, _GAP, _SLIMMEST, _WIDEST = 11.0, 1.5, 230.0, 400.0
_MARGIN = 0.8  # inches beside the columns


@styled
def circuit_picture(picture: Mapping[str, Any], layers: Sequence[int] = ()) -> Figure:
    """The strongest latents of a circuit: layers, the deepest on top, against positions.

    A circle's area is the size of the effect, its colour the sign; the strongest have their
    numbers under them. Of a prompt of more than `MOST_POSITIONS` tokens only those positions are
    shown that have a latent.

    Args:
        picture: Tokens and cells as in an artefact of circuits.
        layers: Layers that have a row even without a latent.
    """
    cells = [cell for cell in picture["cells"] if math.isfinite(number(cell.get("effect")))]
    if not cells:
        raise InputError("the picture of a circuit has no latent with a finite effect")
    cells.sort(key=lambda cell: -abs(cell["effect"]))
    columns = shown_positions(picture)
    rows = sorted({*layers, *(cell["layer"] for cell in cells)})
    row_height = min(0.33, 7.0 / len(rows))
    layout = _layout(cells, columns, highest=min(16.0, 0.6 * 72 * row_height))

    shown_rows = max(3, len(rows))
    figure = Figure(
        figsize=(_MARGIN + layout.width / 72, 1.25 + row_height * shown_rows),
        layout="constrained",
    )
    axes = figure.subplots()
    at = [(x, rows.index(cell["layer"])) for x, cell in zip(layout.x, cells, strict=True)]
    for (x, y), diameter, cell in zip(at, layout.diameters, cells, strict=True):
        axes.plot(
            [x],
            [y],
            marker="o",
            markersize=diameter,
            color=_sign_colour(cell["effect"]),
            markeredgecolor="white",
            markeredgewidth=0.5,
            alpha=0.85,
            linestyle="none",
        )
    axes.set(xlim=(0, layout.width), ylim=(-0.6, shown_rows - 0.4))
    _number_strongest(axes, at, layout.diameters, cells, 72 * row_height)
    angle = 90 if len(columns) > 16 else 45
    axes.set_xticks(
        layout.centres,
        [drawable(picture["tokens"][position], 14) for position in columns],
        rotation=angle,
        ha="center" if angle == 90 else "right",
        rotation_mode="default" if angle == 90 else "anchor",
    )
    every = math.ceil(len(rows) / 26)
    axes.set_yticks(range(0, len(rows), every), [str(layer) for layer in rows[::every]])
    axes.set_ylabel("Layer")
    axes.set_xlabel("Token")
    axes.grid(axis="y", linewidth=0.4)
    for left, right in itertools.islice(itertools.pairwise([0.0, *layout.ends]), 0, None, 2):
        axes.axvspan(left, right, color=BAND, linewidth=0, zorder=0.2)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    handles = [
        Line2D([], [], marker="o", linestyle="none", color=colour, markersize=5, label=label)
        for colour, label in ((GROUP, "towards the patched answer"), (THRESHOLD, "away from it"))
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def shown_positions(picture: Mapping[str, Any]) -> list[int]:
    """The positions that have a column of :func:`circuit_picture`."""
    if len(picture["tokens"]) <= MOST_POSITIONS:
        return list(range(len(picture["tokens"])))
    return sorted({cell["position"] for cell in picture["cells"]})


def drawable(text: str, most: int) -> str:
    """A token in the figures' font: spaces at its ends show, and what it cannot draw is escaped."""
    inner = text.strip(" ")
    before = len(text) - len(text.lstrip(" "))
    after = len(text) - before - len(inner)
    marked = "␣" * before + inner + "␣" * (after if inner else 0)
    return visible(marked, most, _drawable_characters()) or "∅"


class _Layout(NamedTuple):
    """Where a picture's columns and circles stand from left to right, in points."""

    ends: list[float]
    centres: list[float]
    x: list[float]
    diameters: list[float]

    @property
    def width(self) -> float:
        return self.ends[-1]


def _layout(cells: Sequence[Mapping[str, Any]], columns: Sequence[int], highest: float) -> _Layout:
    """Circles as large as lets those of one layer and position stand side by side.

    A column is as wide as the layer needs that has the most there.

    Args:
        cells: The strongest first.
        highest: Largest diameter of a circle.
    """
    together: dict[tuple[int, int], list[int]] = {}
    for index, cell in enumerate(cells):
        together.setdefault((cell["position"], cell["layer"]), []).append(index)
    strongest = abs(cells[0]["effect"]) or 1.0
    relative = [math.sqrt(abs(cell["effect"]) / strongest) for cell in cells]
    for largest in np.arange(max(highest, 3.0), 2.9, -0.5):
        diameters = [max(1.5, float(largest) * share) for share in relative]
        widths = [
            max(
                [min(_NARROWEST, _WIDEST / len(columns))]
                + [
                    _GAP + sum(diameters[index] + _GAP for index in indices)
                    for (at, _), indices in together.items()
                    if at == position
                ]
            )
            for position in columns
        ]
        if sum(widths) <= _WIDEST:
            break
    stretch = min(max(_SLIMMEST, 1.25 * sum(widths)), _WIDEST) / sum(widths)
    ends = list(itertools.accumulate(stretch * width for width in widths))
    centres = [end - stretch * width / 2 for end, width in zip(ends, widths, strict=True)]
    x = [0.0] * len(cells)
    for (position, _), indices in together.items():
        needed = stretch * sum(diameters[index] + _GAP for index in indices)
        left = centres[columns.index(position)] - needed / 2
        for index in indices:
            width = stretch * (diameters[index] + _GAP)
            x[index] = left + width / 2
            left += width
    return _Layout(ends, centres, x, diameters)


def _number_strongest(
    axes: Axes,
    at: Sequence[tuple[float, float]],
    diameters: Sequence[float],
    cells: Sequence[Mapping[str, Any]],
    row_height: float,
) -> None:
    """Write the strongest latents' numbers under their circles, where no other number stands.

    Args:
        row_height: In points, as the first of each of `at` and the diameters are.
    """
    taken: list[tuple[float, float, float]] = []
    labelled = zip(at, diameters, cells, strict=True)
    for (x, y), diameter, cell in itertools.islice(labelled, MOST_LABELS):
        text = str(cell["latent"])
        half_width = 2.4 * len(text)
        below = y - (diameter / 2 + 1.0) / row_height
        if any(
            abs(x - other_x) < half_width + other_half and abs(below - other_y) < 7.5 / row_height
            for other_x, other_y, other_half in taken
        ):
            continue
        taken.append((x, below, half_width))
        axes.text(x, below, text, ha="center", va="top", fontsize=7, zorder=5)


def _sign_colour(effect: float) -> str:
    return GROUP if effect > 0 else THRESHOLD


@functools.cache
def _drawable_characters() -> frozenset[int]:
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    return frozenset(font.get_charmap())
