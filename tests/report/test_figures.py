from __future__ import annotations

import copy
import itertools
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from scipy.cluster import hierarchy

from groupsae.errors import InputError
from groupsae.report import figures
from groupsae.report.artefacts import Artefacts, read_run
from groupsae.report.metrics import compare
from tests.report.synthetic_run import write_run


@pytest.fixture(scope="module")
def run(finished_run: Path) -> Artefacts:
    return read_run(finished_run)


def line(axes: Axes, label: str) -> Line2D:
    return next(line for line in axes.get_lines() if line.get_label() == label)


def blocks(axes: Axes) -> list[tuple[float, float, float]]:
    return [
        (patch.get_x(), patch.get_y(), patch.get_width())
        for patch in axes.patches
        if isinstance(patch, Rectangle)
    ]


def text_sizes(figure: Figure) -> list[float]:
    return [text.get_fontsize() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


# The heat map.


def test_heatmap_shows_the_matrix_and_outlines_every_group(run: Artefacts) -> None:
    axes = figures.distance_heatmap(run.distances, run.partition).axes[0]
    shown = axes.collections[0].get_array().reshape(11, 11)
    np.testing.assert_allclose(shown, run.distances["matrix"])
    groups = run.partition["by_groups"]["6"]["groups"]
    assert blocks(axes) == [(group[0], group[0], len(group)) for group in groups]
    assert all(same_color(patch.get_edgecolor(), figures.GROUP) for patch in axes.patches)


def test_heatmap_prints_values_of_sixteen_layers_but_not_of_more() -> None:
    for n_layers, printed in ((16, 16 * 15), (17, 0)):
        matrix = np.full((n_layers, n_layers), 0.25)
        np.fill_diagonal(matrix, 0)
        distances = {"layers": list(range(n_layers)), "matrix": matrix.tolist()}
        texts = [text.get_text() for text in figures.distance_heatmap(distances).axes[0].texts]
        assert texts == ["0.25"] * printed


def test_heatmap_of_one_filled_triangle_is_whole() -> None:
    distances = {"layers": [0, 1], "matrix": [[0, None], [0.3, 0]]}
    shown = figures.distance_heatmap(distances).axes[0].collections[0].get_array()
    np.testing.assert_array_equal(np.ravel(shown), [0, 0.3, 0.3, 0])


def test_heatmap_without_a_partition_has_no_outline(run: Artefacts) -> None:
    assert blocks(figures.distance_heatmap(run.distances).axes[0]) == []


def test_layers_that_are_not_numbered_from_zero_keep_their_numbers() -> None:
    distances = {"layers": [2, 5, 9], "matrix": [[0, 0.1, 0.4], [0.1, 0, 0.3], [0.4, 0.3, 0]]}
    partition = {
        "layers": [2, 5, 9],
        "chosen": 2,
        "by_groups": {"2": {"groups": [[2, 5], [9]]}},
    }
    axes = figures.distance_heatmap(distances, partition).axes[0]
    assert blocks(axes) == [(0, 0, 2), (2, 2, 1)]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["2", "5", "9"]


@pytest.mark.parametrize(
    ("similarity", "name"),
    [
        ({}, "angular distance"),
        ({"similarity": "angular"}, "angular distance"),
        ({"similarity": "cka"}, "1 − linear CKA"),
        ({"similarity": "svcca"}, "1 − SVCCA"),
        ({"similarity": ["$"]}, "distance"),
    ],
)
def test_the_axes_name_the_kind_of_distance(similarity: dict[str, object], name: str) -> None:
    distances = {"layers": [0, 1], "matrix": [[0, 0.3], [0.3, 0]]} | similarity
    bar = figures.distance_heatmap(distances).axes[1]
    assert bar.get_ylabel() == name[0].upper() + name[1:]
    assert figures.dendrogram(distances).axes[0].get_ylabel() == f"Largest {name}"


# The dendrogram.


def test_dendrogram_cut_separates_the_chosen_groups(run: Artefacts) -> None:
    axes = figures.dendrogram(run.distances, run.partition).axes[0]
    cut = line(axes, "cut").get_ydata()[0]
    joins = [drawn for drawn in axes.get_lines() if drawn.get_label() != "cut"]
    heights = sorted(drawn.get_ydata()[1] for drawn in joins)
    assert sum(height < cut for height in heights) == 11 - 6
    assert sum(height > cut for height in heights) == 6 - 1
    assert max(heights) == pytest.approx(np.max(run.distances["matrix"]))


def test_dendrogram_bars_are_the_groups(run: Artefacts) -> None:
    axes = figures.dendrogram(run.distances, run.partition).axes[0]
    groups = run.partition["by_groups"]["6"]["groups"]
    spans = [(np.floor(x), np.ceil(x + width)) for x, _, width in blocks(axes)]
    assert spans == [(group[0], group[-1] + 1) for group in groups]


def test_dendrogram_draws_no_cut_for_groups_that_no_cut_gives(run: Artefacts) -> None:
    groups = [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [10]]
    partition = {
        "layers": run.distances["layers"],
        "chosen": 2,
        "by_groups": {"2": {"groups": groups}},
    }
    axes = figures.dendrogram(run.distances, partition).axes[0]
    assert all(drawn.get_label() != "cut" for drawn in axes.get_lines())
    assert len(blocks(axes)) == 2


def test_dendrogram_of_one_layer_is_refused() -> None:
    with pytest.raises(InputError, match="at least two layers"):
        figures.dendrogram({"layers": [0], "matrix": [[0.0]]})


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**32 - 1))
def test_join_heights_are_scipys_where_neighbours_are_nearest(n_layers: int, seed: int) -> None:
    """On a line, complete linkage joins neighbours by itself, so scipy's own tree is the same."""
    position = np.cumsum(np.random.default_rng(seed).uniform(0.01, 0.1, n_layers))
    matrix = np.abs(position[:, None] - position[None, :])
    distances = {"layers": list(range(n_layers)), "matrix": matrix.tolist()}
    drawn = figures.dendrogram(distances).axes[0].get_lines()
    condensed = [matrix[a, b] for a, b in itertools.combinations(range(n_layers), 2)]
    expected = hierarchy.linkage(condensed, method="complete")[:, 2]
    np.testing.assert_allclose(sorted(join.get_ydata()[1] for join in drawn), sorted(expected))


# AMAD and cost.


def test_amad_and_cost_are_the_artefacts_and_the_choice_is_marked(run: Artefacts) -> None:
    left, right = figures.amad_and_cost(run.partition).axes
    by_groups = {int(total): entry for total, entry in run.partition["by_groups"].items()}
    for axes, label, key, scale in (
        (left, "AMAD", "amad", 1),
        (right, "predicted cost", "flops_per_token", 1e6),
    ):
        drawn = line(axes, label)
        np.testing.assert_array_equal(drawn.get_xdata(), sorted(by_groups))
        expected = [by_groups[total][key] / scale for total in sorted(by_groups)]
        np.testing.assert_allclose(drawn.get_ydata(), expected)
        marked = line(axes, "chosen, G = 6")
        assert list(marked.get_xdata()) == [6]
        assert marked.get_ydata()[0] == pytest.approx(by_groups[6][key] / scale)
    threshold = run.partition["threshold"]
    assert line(left, f"threshold {threshold:g}").get_ydata()[0] == threshold
    assert list(line(right, "one SAE per layer").get_xdata()) == [11]


def test_what_the_partition_does_not_know_is_not_drawn() -> None:
    partition: dict[str, Any] = {
        "layers": [0, 1],
        "chosen": 1,
        "threshold": None,
        "by_groups": {"1": {"groups": [[0, 1]], "amad": 0.2, "flops_per_token": None}},
    }
    (axes,) = figures.amad_and_cost(partition).axes
    assert axes.get_ylabel() == "AMAD"
    partition["by_groups"]["1"]["amad"] = None
    assert not figures.has_measures(partition)
    with pytest.raises(InputError, match="neither AMAD nor predicted cost"):
        figures.amad_and_cost(partition)


# Training.


def test_training_curves_are_the_artefacts(run: Artefacts) -> None:
    fvu, dead = figures.training_curves(run.metrics).axes
    for name in {entry["sae"] for entry in run.metrics}:
        entries = [entry for entry in run.metrics if entry["sae"] == name]
        for axes, key in ((fvu, "fvu"), (dead, "dead")):
            drawn = line(axes, name)
            np.testing.assert_allclose(drawn.get_ydata(), [entry[key] for entry in entries])
            tokens = np.array([entry["tokens"] for entry in entries])
            np.testing.assert_allclose(drawn.get_xdata(), tokens / 1e3)
        grey = same_color(line(fvu, name).get_color(), figures.BASELINE)
        assert grey == name.startswith("baseline/")


def test_twins_are_grey() -> None:
    metrics = [
        {"sae": name, "step": 1, "tokens": 1, "fvu": 0.5, "dead": 0.0}
        for name in ("layers-00", "baseline/layers-00", "twin/layers-00")
    ]
    drawn = figures.training_curves(metrics).axes[0]
    grey = {own.get_label() for own in drawn.get_lines() if own.get_color() == figures.BASELINE}
    assert grey == {"baseline/layers-00", "twin/layers-00"}


def test_a_long_log_is_thinned_but_keeps_its_ends() -> None:
    metrics = [
        {"sae": "layers-00", "step": step, "tokens": step, "fvu": 1 / step, "dead": 0.0}
        for step in range(1, 5001)
    ]
    drawn = line(figures.training_curves(metrics).axes[0], "layers-00")
    assert len(drawn.get_xdata()) <= 401
    assert drawn.get_ydata()[0] == 1
    assert drawn.get_ydata()[-1] == 1 / 5000


def test_missing_values_leave_gaps_in_training_curves() -> None:
    metrics = [
        {"sae": "layers-00", "step": step, "tokens": step, "fvu": fvu, "dead": None}
        for step, fvu in enumerate([0.5, None, float("nan"), 0.2])
    ]
    drawn = line(figures.training_curves(metrics).axes[0], "layers-00")
    np.testing.assert_array_equal(drawn.get_ydata(), [0.5, np.nan, np.nan, 0.2])


def test_the_legend_stays_short_with_many_groups() -> None:
    metrics = [
        {"sae": f"layers-{layer:02d}", "step": 1, "tokens": 1, "fvu": 0.5, "dead": 0.0}
        for layer in range(30)
    ]
    (legend,) = figures.training_curves(metrics).legends
    assert len(legend.get_texts()) <= 4


def test_without_dead_latents_the_axis_begins_at_zero() -> None:
    metrics = [{"sae": "layers-00", "step": 1, "tokens": 5, "fvu": 0.5, "dead": 0.0}]
    low, high = figures.training_curves(metrics).axes[1].get_ylim()
    assert high > 0
    assert -0.05 * high < low <= 0


# Per layer.


def test_per_layer_values_are_the_artefacts(run: Artefacts) -> None:
    rows = run.reconstruction["rows"]
    metrics = ("ce_loss_score", "r2", "l2", "l0")
    axes = figures.per_layer(rows, metrics).axes
    comparisons = compare(rows)
    for panel, key in zip(axes, metrics, strict=True):
        baseline = line(panel, "one SAE per layer").get_ydata()
        np.testing.assert_array_equal(baseline, [c.baseline[key] for c in comparisons])
        pieces = [p for p in panel.get_lines() if p.get_label() == "one SAE per group"]
        assert len(pieces) == 6  # a line ends where its group ends
        groups = np.concatenate([piece.get_ydata() for piece in pieces])
        np.testing.assert_array_equal(groups, [c.groups[key] for c in comparisons])


def test_bands_are_the_groups(run: Artefacts) -> None:
    axes = figures.per_layer(run.reconstruction["rows"], ("r2",)).axes[0]
    groups = run.partition["by_groups"]["6"]["groups"]
    bands = [(patch.get_x() + 0.5, patch.get_width()) for patch in axes.patches]
    assert bands == [(group[0], len(group)) for group in groups]


def test_missing_values_are_gaps_and_a_missing_baseline_is_not_drawn(run: Artefacts) -> None:
    rows = [copy.copy(row) for row in run.reconstruction["rows"] if row["partition"] == "groups"]
    rows[0]["r2"] = None
    rows[1]["r2"] = float("nan")
    axes = figures.per_layer(rows, ("r2",)).axes[0]
    drawn = np.concatenate([drawn.get_ydata() for drawn in axes.get_lines()])
    assert np.isnan(drawn).sum() == 2
    assert len(drawn) == 11
    assert {drawn.get_label() for drawn in axes.get_lines()} == {"one SAE per group"}


@pytest.mark.parametrize("metrics", [("r2",), ("r2", "kl"), ("r2", "kl", "dead")])
def test_any_metrics_can_be_drawn(run: Artefacts, metrics: tuple[str, ...]) -> None:
    figure = figures.per_layer(run.reconstruction["rows"], metrics)
    assert sum(axes.get_visible() for axes in figure.axes) == len(metrics)


def test_an_unknown_metric_is_named(run: Artefacts) -> None:
    with pytest.raises(InputError, match=r"'r3'.*ce_loss_score"):
        figures.per_layer(run.reconstruction["rows"], ("r3",))


def test_means_against_g_are_those_of_the_rows(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, n_layers=4, chosen=2, steps=20, also_groups=(1, 3)))
    rows = run.reconstruction["rows"]
    drawn = figures.by_number_of_groups(rows, 2)
    for axes, key in zip(drawn.axes, ("ce_loss_score", "r2"), strict=True):
        expected = {
            (partition, total): np.mean(
                [
                    row[key]
                    for row in rows
                    if (row["partition"], row["groups_total"]) == (partition, total)
                ]
            )
            for partition, total in (("groups", 1), ("groups", 2), ("groups", 3), ("baseline", 4))
        }
        groups = line(axes, "one SAE per group")
        np.testing.assert_array_equal(groups.get_xdata(), [1, 2, 3])
        np.testing.assert_allclose(groups.get_ydata(), list(expected.values())[:3])
        chosen, baseline = line(axes, "chosen, G = 2"), line(axes, "one SAE per layer")
        assert chosen.get_ydata()[0] == pytest.approx(expected["groups", 2])
        assert baseline.get_ydata()[0] == pytest.approx(expected["baseline", 4])


# Densities.


def test_latent_density_shows_every_layers_histogram_in_per_cent(run: Artefacts) -> None:
    rows = run.reconstruction["rows"]
    panels = [axes for axes in figures.latent_density(rows).axes if axes.get_visible()]
    assert len(panels) == 11
    for axes, comparison in zip(panels, compare(rows), strict=True):
        assert axes.texts[0].get_text() == f"layer {comparison.layer}"
        for stairs, row in zip(axes.patches, (comparison.groups, comparison.baseline), strict=True):
            counts = np.array(row["latent_density"]["counts"])
            np.testing.assert_allclose(stairs.get_data().values, 100 * counts / counts.sum())
            np.testing.assert_allclose(stairs.get_data().edges, row["latent_density"]["edges"])


def test_latent_density_shows_only_the_part_of_the_axis_that_is_used() -> None:
    density = {"edges": [-6, -5, -4, -3, -2, -1, 0], "counts": [0, 0, 3, 1, 0, 0]}
    row = {"partition": "groups", "layer": 0, "latent_density": density}
    low, high = figures.latent_density([row]).axes[0].get_xlim()
    assert -4.5 < low < -4
    assert -2 < high < -1.5


@pytest.mark.parametrize(
    "density", [None, {}, {"edges": [0, 1], "counts": [1, 2]}, {"edges": [0, None], "counts": [1]}]
)
def test_rows_without_a_histogram_are_told(density: object) -> None:
    row = {"partition": "groups", "layer": 0, "latent_density": density}
    assert figures.histogram(row) is None
    with pytest.raises(InputError, match="latent_density"):
        figures.latent_density([row])


# What holds for every figure.

DRAWN: dict[str, Callable[[Artefacts], Figure]] = {
    "distance_heatmap": lambda run: figures.distance_heatmap(run.distances, run.partition),
    "dendrogram": lambda run: figures.dendrogram(run.distances, run.partition),
    "amad_and_cost": lambda run: figures.amad_and_cost(run.partition),
    "training_curves": lambda run: figures.training_curves(run.metrics),
    "per_layer": lambda run: figures.per_layer(run.reconstruction["rows"]),
    "latent_density": lambda run: figures.latent_density(run.reconstruction["rows"]),
}


@pytest.mark.parametrize("name", DRAWN)
def test_figures_fit_a_paper(run: Artefacts, name: str) -> None:
    figure = DRAWN[name](run)
    assert figure.get_figwidth() <= figures.PAGE
    sizes = text_sizes(figure)
    assert sizes
    assert min(sizes) >= 7
    assert max(sizes) <= 9
    assert all(axes.get_title() == "" for axes in figure.axes)


@pytest.mark.parametrize("name", DRAWN)
def test_pdf_embeds_truetype(run: Artefacts, name: str) -> None:
    pdf = figures.encode(DRAWN[name](run), "pdf")
    assert pdf.startswith(b"%PDF")
    assert b"/Type /Font" in pdf
    assert b"/Type3" not in pdf
    assert b"/FontFile2" in pdf  # TrueType, embedded


def test_files_are_the_same_every_time(run: Artefacts) -> None:
    for form, start in (("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")):
        first, second = (figures.encode(DRAWN["dendrogram"](run), form) for _ in range(2))
        assert first.startswith(start)
        assert zlib.crc32(first) == zlib.crc32(second)


def test_another_format_is_refused() -> None:
    with pytest.raises(InputError, match=r"'gif'.*pdf, png, svg"):
        figures.encode(Figure(), "gif")


def test_drawing_leaves_matplotlibs_settings_alone(run: Artefacts) -> None:
    before = dict(matplotlib.rcParams)
    figures.encode(DRAWN["dendrogram"](run), "svg")
    assert dict(matplotlib.rcParams) == before


def test_a_name_with_a_dollar_sign_is_no_formula() -> None:
    metrics = [{"sae": "$\\frac$", "step": 1, "tokens": 1, "fvu": 0.5, "dead": 0.0}]
    assert figures.encode(figures.training_curves(metrics), "svg")


@given(st.integers(1, 40))
def test_group_colours_differ_and_darken(n_groups: int) -> None:
    colours = figures.group_colours(n_groups)
    assert len(colours) == n_groups
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)
    channels = [[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in colours]
    light = [channel @ np.array([0.2126, 0.7152, 0.0722]) for channel in np.array(channels)]
    assert all(a > b for a, b in itertools.pairwise(light))
