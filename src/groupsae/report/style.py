"""How figures look: sizes, colours, type, and what their axes share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

COLUMN, PAGE = 3.2, 6.4  # inches: one column, and the full width, of a two-column paper

INK, MUTED, RULE = "#1c2128", "#59636e", "#d5dae0"
GROUP, BASELINE, THRESHOLD, BAND = "#0b5cad", "#858d96", "#b3420c", "#edf3fa"
RAMP = LinearSegmentedColormap.from_list("groups", ["#86bdf0", "#0b5cad", "#062c55"])
BLUES = LinearSegmentedColormap.from_list(
    "blues", ["#fdfefe", "#d3e6f8", "#86bdf0", "#3a86d0", "#0b5cad", "#062c55"]
)
HEAT = LinearSegmentedColormap.from_list(
    "distance", ["#fffdf6", "#fdeabf", "#f8c274", "#e78b3a", "#b9531a", "#702a0e"]
)

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so figures are the same everywhere
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.titlepad": 5,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "text.color": INK,
    "text.parse_math": False,  # names from a run may hold a dollar sign
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.borderaxespad": 0.2,
    "legend.columnspacing": 1.4,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,  # TrueType: editable, and what publishers ask for
    "svg.fonttype": "path",
    "svg.hashsalt": "groupsae",
}

OPAQUE: dict[str, Any] = {"frameon": True, "edgecolor": "none", "framealpha": 0.9}

_P = ParamSpec("_P")
Floats = NDArray[np.float64]


def styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """A decorator that lets a function draw in our style, whatever matplotlib's settings are."""

    @functools.wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def group_colours(n_groups: int) -> list[str]:
    """One blue per group, from light for the first to dark for the last."""
    if n_groups == 1:
        return [GROUP]
    return [to_hex(RAMP(at)) for at in np.linspace(0, 1, n_groups)]


def layer_ticks(
    axes: Axes, layers: Sequence[int], *, offset: float, most: int, both: bool = False
) -> None:
    """Label at most `most` of the layers, evenly, at their positions plus `offset`."""
    every = math.ceil(len(layers) / most)
    at = list(range(0, len(layers), every))
    for axis in (axes.xaxis, axes.yaxis)[: 1 + both]:
        axis.set_ticks([position + offset for position in at], [str(layers[i]) for i in at])


def roomy() -> ConstrainedLayoutEngine:
    """More room between panels, so that one's labels are not taken for the other's."""
    return ConstrainedLayoutEngine(wspace=0.06, hspace=0.05)


def unique_legend(*panels: Axes) -> tuple[list[Any], list[str]]:
    """Handles and labels, one of each label, groups first."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    labels = sorted(found, key=lambda label: "per layer" in label)
    return [found[label] for label in labels], labels
