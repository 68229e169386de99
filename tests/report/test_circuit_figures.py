from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.colors import same_color, to_rgb

from groupsae.report.artefacts import read_run
from groupsae.report.circuit_figures import Drawn, circuit_curves, other_curves, runs_off
from groupsae.report.circuit_illustrations import circuit_illustrations
from groupsae.report.curves import Line, Panel, Subject
from groupsae.report.style import BASELINE, INK
from tests.report.synthetic_run import write_run
from tests.report.test_figures import line, text_sizes


def drawn_line(partition: str, total: int, latents: str = "ranked", top: float = 0.9) -> Line:
    return Line(Subject(partition, total), latents, np.array([4.0, 40.0]), np.array([0.1, top]))


PANELS = {
    Panel("faithfulness", error_nodes=nodes): Drawn(
        [
            drawn_line("groups", 1),
            drawn_line("groups", 6),
            drawn_line("baseline", 11),
            drawn_line("groups", 6, "random", 0.1),
            drawn_line("groups", 6, "untrained", 0.2),
        ]
    )
    for nodes in (False, True)
}


def test_a_line_for_every_partition_and_control() -> None:
    drawn = circuit_curves(PANELS, chosen=6)
    without, with_errors = drawn.axes
    assert without.get_ylabel() == "Faithfulness\n(without error nodes)"
    assert with_errors.get_ylabel() == "Faithfulness\n(with error nodes)"
    for axes in drawn.axes:
        assert axes.get_xscale() == "log"
        assert same_color(line(axes, "one SAE per layer").get_color(), INK)
        few, many = (to_rgb(line(axes, f"G = {G}").get_color()) for G in (1, 6))
        assert sum(few) > sum(many)
        for label in ("random latents", "untrained SAEs"):
            assert same_color(line(axes, label).get_color(), BASELINE)
        assert line(axes, "G = 6").get_linewidth() > line(axes, "G = 1").get_linewidth()
        np.testing.assert_array_equal(line(axes, "G = 6").get_xdata(), [4, 40])
        np.testing.assert_array_equal(line(axes, "G = 6").get_ydata(), [0.1, 0.9])
    (legend,) = drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "G = 1",
        "G = 6",
        "one SAE per layer",
        "random latents",
        "untrained SAEs",
    ]


def test_with_many_partitions_the_legend_names_the_ends_and_the_choice() -> None:
    lines = [drawn_line("groups", G) for G in range(1, 23)] + [drawn_line("baseline", 23)]
    (legend,) = circuit_curves({Panel("faithfulness"): Drawn(lines)}, chosen=9).legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["G = 1", "G = 9", "G = 22", "one SAE per layer"]


def test_a_panel_without_lines_says_so() -> None:
    axes = circuit_curves({Panel("completeness"): Drawn([])}).axes[0]
    assert [text.get_text() for text in axes.texts] == ["no curve to be drawn"]
    axes = circuit_curves({Panel("completeness"): Drawn([], "flagged: G = 2")}).axes[0]
    assert [text.get_text() for text in axes.texts] == ["flagged: G = 2"]


def test_a_wild_score_does_not_flatten_the_others() -> None:
    wild = drawn_line("groups", 2, top=900.0)
    low, high = circuit_curves({Panel("faithfulness"): Drawn([wild])}).axes[0].get_ylim()
    assert low < 0
    assert 1 < high < 2
    assert runs_off([wild])
    assert not runs_off([drawn_line("groups", 2)])


def test_other_ways_have_a_row_each() -> None:
    panels = {
        Panel(score, method, selection): Drawn([drawn_line("groups", 2)])
        for method, selection in (("attribution", "global"), ("integrated_gradients", "per_layer"))
        for score in ("faithfulness", "completeness")
    }
    drawn = other_curves(panels)
    assert [axes.get_ylabel().replace("\n", " ") for axes in drawn.axes[::2]] == [
        "attribution patching, over all layers",
        "integrated gradients, per layer",
    ]


def test_figures_fit_a_paper(tmp_path: Path) -> None:
    directory = write_run(
        tmp_path, n_layers=4, chosen=2, steps=20, also_groups=(1,), tasks=("ioi", "greater_than")
    )
    found = circuit_illustrations(read_run(directory))
    assert len(found) == 10
    for illustration in found:
        drawn = illustration.draw()
        assert drawn.get_figwidth() <= 6.4
        assert drawn.get_figheight() <= 9
        assert 7 <= min(text_sizes(drawn)) <= max(text_sizes(drawn)) <= 9
        assert len(illustration.alt) > 30
        assert illustration.definitions
