from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groupsae.errors import InputError
from groupsae.report import similarity_figures as figures
from groupsae.report.artefacts import read_run
from groupsae.report.similarity import shown_total, similarity_contents
from groupsae.report.similarity_illustrations import similarity_illustrations
from tests.report.synthetic_run import write_run
from tests.report.test_figures import blocks, line, text_sizes
from tests.report.test_page import words


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_run(tmp_path, n_layers=4, chosen=2, steps=20, also_groups=(1, 3), similarity=True)


def stored(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "evaluation" / "similarity.json").read_text())
    return content


def change(directory: Path, **changes: Any) -> None:
    path = directory / "evaluation" / "similarity.json"
    path.write_text(json.dumps(stored(directory) | changes))


def names(directory: Path) -> list[str]:
    return [found.name for found in similarity_illustrations(read_run(directory))]


def own_rows(directory: Path, total: int = 2) -> list[dict[str, Any]]:
    return [row for row in stored(directory)["rows"] if row["groups_total"] == total]


def test_the_table_holds_every_layer_of_the_chosen_groups_and_the_means(directory: Path) -> None:
    rows = own_rows(directory)
    yardstick = stored(directory)["yardstick"]
    _, heads, *body, mean = words(directory).tables["likeness"]
    assert heads[2:5] == ["group → layer", "layer → group", "two seeds"]
    for cells, row, seeds in zip(body, rows, yardstick, strict=True):
        assert cells[0] == str(row["layer"])
        assert cells[2:5] == [
            f"{value:.3f}"
            for value in (row["mmcs_group_to_layer"], row["mmcs_layer_to_group"], seeds["mmcs"])
        ]
        assert cells[5:8] == [
            f"{value:.1%}"
            for value in (
                row["above_0.9_group_to_layer"],
                row["above_0.9_layer_to_group"],
                seeds["above_0.9"],
            )
        ]
        assert cells[8:] == [
            f"{row['concordance']:.3f}",
            f"{seeds['concordance']:.3f}",
            str(row["silent"]),
        ]
    assert mean[1] == f"{np.mean([row['mmcs_group_to_layer'] for row in rows]):.3f}"


def test_without_a_yardstick_none_is_shown(directory: Path) -> None:
    change(directory, yardstick=None)
    page = words(directory)
    assert page.tables["likeness"][1].count("two seeds") == 0
    assert "as a yardstick, were not trained" in page.text
    drawn = figures.similarity_per_layer(own_rows(directory), {})
    assert "two seeds, one layer" not in {own.get_label() for own in drawn.axes[0].get_lines()}


def test_the_figures_are_those_of_the_chosen_groups(directory: Path) -> None:
    assert names(directory) == [
        "similarity_per_layer",
        "similarity_maxima",
        "similarity_matrices",
        "similarity_mmcs_of_every_g",
        "similarity_concordance_of_every_g",
    ]
    assert all(
        "G = 2" in found.title for found in similarity_illustrations(read_run(directory))[:3]
    )


def test_concordance_that_was_not_measured_is_not_drawn(directory: Path) -> None:
    matrices = {G: own | {"concordance": None} for G, own in stored(directory)["matrices"].items()}
    rows = [row | {"concordance": None, "silent": None} for row in stored(directory)["rows"]]
    change(directory, matrices=matrices, rows=rows)
    assert "similarity_concordance_of_every_g" not in names(directory)
    per_layer, _, heat, *_ = similarity_illustrations(read_run(directory))
    assert len(per_layer.draw().axes) == 1
    assert len(heat.draw().axes) == 2  # the matrix and its bar
    assert words(directory).tables["likeness"][2][-1] == "–"


def test_where_the_chosen_groups_were_not_measured_the_fewest_are_shown(directory: Path) -> None:
    change(directory, rows=[row for row in stored(directory)["rows"] if row["groups_total"] != 2])
    assert shown_total(read_run(directory)) == 1
    change(directory, rows=[])
    assert shown_total(read_run(directory)) is None
    assert names(directory) == ["similarity_mmcs_of_every_g", "similarity_concordance_of_every_g"]
    contents = similarity_contents(read_run(directory))
    assert contents is not None
    assert contents["table"]["rows"] == []
    assert words(directory)


def test_matrices_are_the_artefacts_and_the_groups_are_outlined(directory: Path) -> None:
    own = stored(directory)["matrices"]["2"]
    groups = json.loads((directory / "partition.json").read_text())["by_groups"]["2"]["groups"]
    drawn = figures.matrices([0, 1, 2, 3], own, groups).axes
    for axes, measure in zip(drawn, ("mmcs", "concordance"), strict=False):
        shown = axes.collections[0].get_array().reshape(4, 4)
        np.testing.assert_allclose(shown, own[measure])
        assert blocks(axes) == [(group[0], group[0], len(group)) for group in groups]
        printed = [text.get_text() for text in axes.texts]
        assert printed == [f"{value:.2f}"[1:] for value in np.ravel(own[measure])]


def test_lines_are_the_artefacts_and_end_where_a_group_ends(directory: Path) -> None:
    rows, seeds = own_rows(directory), {row["layer"]: row for row in stored(directory)["yardstick"]}
    mmcs, concordance = figures.similarity_per_layer(rows, seeds).axes
    for axes, label, key in (
        (mmcs, "group → layer", "mmcs_group_to_layer"),
        (mmcs, "layer → group", "mmcs_layer_to_group"),
        (concordance, "layer → group", "concordance"),
    ):
        pieces = [own.get_ydata() for own in axes.get_lines() if own.get_label() == label]
        assert len(pieces) == 2
        np.testing.assert_array_equal(np.concatenate(pieces), [row[key] for row in rows])
    drawn = line(mmcs, "two seeds, one layer")
    np.testing.assert_array_equal(drawn.get_ydata(), [own["mmcs"] for own in seeds.values()])


def test_histograms_are_in_per_cent_of_the_latents(directory: Path) -> None:
    rows, seeds = own_rows(directory), {row["layer"]: row for row in stored(directory)["yardstick"]}
    panels = [axes for axes in figures.maxima(rows, seeds).axes if axes.get_visible()]
    for axes, row in zip(panels, rows, strict=True):
        counts = [
            row["histogram"]["group_to_layer"],
            row["histogram"]["layer_to_group"],
            seeds[row["layer"]]["histogram"]["counts"],
        ]
        for stairs, own in zip(axes.patches, counts, strict=True):
            np.testing.assert_allclose(stairs.get_data().values, 100 * np.array(own) / sum(own))


@pytest.mark.parametrize(
    "histogram", [None, [], {"edges": [0, 1], "group_to_layer": [1, 2]}, {"edges": 1}]
)
def test_a_histogram_that_is_none_is_not_drawn(histogram: object) -> None:
    row = {"layer": 0, "group": [0], "histogram": histogram}
    assert not figures.has_maxima(row)
    with pytest.raises(InputError, match="histogram"):
        figures.maxima([row], {})


def test_figures_fit_a_paper(directory: Path) -> None:
    for found in similarity_illustrations(read_run(directory)):
        drawn = found.draw()
        assert drawn.get_figwidth() <= 6.4
        assert 7 <= min(text_sizes(drawn)) <= max(text_sizes(drawn)) <= 9
        assert len(found.alt) > 30
        assert found.definitions


def test_definitions_are_escaped(directory: Path) -> None:
    change(directory, definitions={"<b>": "<img>\u202e"}, tokens="many")
    page = words(directory)
    assert not page.all("b")
    assert "\u202e" not in page.source
