from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groupsae.report import interpretation_figures as figures
from groupsae.report.artefacts import read_run
from groupsae.report.depths import depth_contents
from groupsae.report.ground_truth import by_layer, means
from groupsae.report.illustration import Illustration
from groupsae.report.interpretation_illustrations import interpretation_illustrations
from tests.report.conftest import HOSTILE
from tests.report.synthetic_run import sae_name, write_run
from tests.report.test_figures import line, text_sizes
from tests.report.test_page import words

ALL = [
    "depth_heat_maps",
    "depth_heat_maps_of_1",
    "depth_heat_maps_of_3",
    "ground_truth_per_layer",
    "ground_truth_by_groups",
    "interpretability_scores",
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_run(
        tmp_path,
        n_layers=5,
        chosen=2,
        steps=20,
        also_groups=(1, 3),
        tasks=("ioi",),
        interpretation=True,
    )


def path_of(directory: Path, name: str) -> Path:
    return directory / "interpretation" / f"{name}.json"


def stored(directory: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path_of(directory, name).read_text())
    return content


def change(directory: Path, name: str, **changes: Any) -> None:
    path_of(directory, name).write_text(json.dumps(stored(directory, name) | changes))


def drawn(directory: Path) -> dict[str, Illustration]:
    return {found.name: found for found in interpretation_illustrations(read_run(directory))}


def groups_of(directory: Path, total: int) -> list[list[int]]:
    partition = json.loads((directory / "partition.json").read_text())
    groups: list[list[int]] = partition["by_groups"][str(total)]["groups"]
    return groups


def deep(directory: Path, total: int) -> list[str]:
    """Names of the SAEs of several layers."""
    return [sae_name(group) for group in groups_of(directory, total) if len(group) > 1]


# Depth.


def test_the_table_of_depths_holds_both_shares_of_every_deep_group(directory: Path) -> None:
    body = words(directory).tables["living"][2:]
    saes = stored(directory, "depth")["saes"]
    assert len(body) == len(deep(directory, 2))
    for cells, name in zip(body, deep(directory, 2), strict=True):
        tenth, half = saes[name]
        assert cells[3:9] == [
            f"{own[key]:.1%}"
            for own in (tenth, half)
            for key in tenth
            if key in ("one", "some", "all")
        ]
        assert cells[1:3] == [f"{tenth['latents']:,}", f"{tenth['silent']:.1%}"]
        assert cells[9] == f"{tenth['mean_persistence']:.2f} of {len(tenth['layers'])}"


def test_the_answer_is_the_mean_over_the_deep_groups(directory: Path) -> None:
    saes = stored(directory, "depth")["saes"]
    for at, name in enumerate(deep(directory, 2)):
        saes[name][0] |= {"all": 0.6 - 0.2 * at, "one": 0.1 + 0.1 * at}
    change(directory, "depth", saes=saes)
    found = depth_contents(read_run(directory))
    n_groups = len(deep(directory, 2))
    every, one = (0.6, 0.1) if n_groups == 1 else (0.5, 0.15)
    assert found is not None
    assert f"{every:.0%} live at all layers of their group and {one:.0%} at one" in found["answer"]


def test_a_heat_map_is_the_profile(directory: Path) -> None:
    profiles = stored(directory, "depth")["profiles"]
    for name, total in (("depth_heat_maps", 2), ("depth_heat_maps_of_3", 3)):
        *panels, _bar = (axes for axes in drawn(directory)[name].draw().axes if axes.get_visible())
        for axes, sae in zip(panels, deep(directory, total), strict=True):
            share, (mesh,) = np.array(profiles[sae]["share"]), axes.collections
            np.testing.assert_allclose(mesh.get_array().reshape(share.shape), share)
            assert mesh.get_clim() == (0, 1)
            latents = 2048 - profiles[sae]["silent"]
            assert axes.get_ylim() == pytest.approx((0, latents))  # the shallowest below


def test_many_groups_stand_in_rows() -> None:
    profile = {"layers": [0, 1], "latents_per_row": None, "share": [[1.0, 0.0], [None, 0.5]]}
    found = figures.depth_heat_maps([profile] * 8)
    assert sum(axes.get_visible() for axes in found.axes) == 8 + 1
    assert len(found.axes) == 12 + 1
    assert found.get_figwidth() <= 6.4


def test_groups_of_one_layer_have_no_depth(tmp_path: Path) -> None:
    directory = write_run(tmp_path, n_layers=3, chosen=3, steps=20, interpretation=True)
    assert list(drawn(directory)) == ["ground_truth_per_layer", "interpretability_scores"]
    assert depth_contents(read_run(directory)) is None
    assert "No group of several layers was profiled" in words(directory).text


def test_where_no_latent_fires_no_heat_map_is_drawn(directory: Path) -> None:
    profiles = stored(directory, "depth")["profiles"]
    change(
        directory, "depth", profiles={name: own | {"share": []} for name, own in profiles.items()}
    )
    assert list(drawn(directory)) == ALL[3:]


# Ground truth.


def test_lines_of_ground_truth_are_the_artefacts(directory: Path) -> None:
    truth = stored(directory, "ground_truth")
    panels = drawn(directory)["ground_truth_per_layer"].draw().axes
    for axes, key in zip(panels, ("coverage", "auroc"), strict=True):
        for label, about in (
            ("G = 2", ("trained", "groups", 2)),
            ("one SAE per layer", ("trained", "baseline", 5)),
            ("linear probe", ("probe", None, None)),
        ):
            rows = [
                row
                for row in truth["coverage"]
                if (row["source"], row["partition"], row["groups_total"]) == about
            ]
            np.testing.assert_array_equal(line(axes, label).get_ydata(), [row[key] for row in rows])
        labels = [own.get_label() for own in axes.get_lines()]
        assert labels.count("untrained SAEs") == 4


def test_ground_truth_against_g_has_the_means(directory: Path) -> None:
    truth = stored(directory, "ground_truth")
    axes = drawn(directory)["ground_truth_by_groups"].draw().axes[1]
    expected = {
        row["groups_total"]: row["auroc"]
        for row in truth["means"]
        if (row["source"], row["partition"]) == ("trained", "groups")
    }
    own = line(axes, "one SAE per group")
    assert dict(zip(own.get_xdata(), own.get_ydata(), strict=True)) == expected
    (probe,) = (row["auroc"] for row in truth["means"] if row["source"] == "probe")
    assert set(line(axes, "linear probe").get_ydata()) == {probe}


def test_the_table_of_ground_truth_begins_with_what_was_trained(directory: Path) -> None:
    _, *body = words(directory).tables["ground-truth"]
    labels = [cells[0] for cells in body]
    assert labels[:5] == ["G = 1", "G = 2", "G = 3", "one SAE per layer", "linear probe"]
    assert labels[5] == "G = 1, untrained"
    own = {found.label: row for found, row in means(stored(directory, "ground_truth")).items()}
    for label, *cells in body:
        row = own[label]
        assert cells == [f"{row['coverage']:.1%}", f"{row['auroc']:.3f}", f"{row['f1']:.3f}"]
    coverage = own["G = 2"]["coverage"]
    assert f"mean over layers. G = 2: {coverage:.1%}; one SAE per layer:" in words(directory).text


def test_each_attribute_has_the_latent_of_its_best_layer(directory: Path) -> None:
    rows = stored(directory, "ground_truth")["rows"]
    page = words(directory)
    _, *body = page.tables["attributes"]
    assert len(body) == 5 * 5  # attributes by three G, the baseline, the probe
    assert not any("untrained" in cells[1] for cells in body)
    for cells in body:
        source, partition = {"linear probe": ("probe", None)}.get(
            cells[1], ("trained", "baseline" if cells[1] == "one SAE per layer" else "groups")
        )
        own = [
            row
            for row in rows
            if (row["source"], row["partition"], row["attribute"]) == (source, partition, cells[0])
            and (partition != "groups" or cells[1] == f"G = {row['groups_total']}")
        ]
        best = max(own, key=lambda row: row["auroc"])
        assert cells[2] == f"{np.mean([row['auroc'] for row in own]):.3f}"
        assert cells[4:6] == [f"{best['auroc']:.3f}", str(best["layer"])]
        assert cells[6] == ("–" if source == "probe" else str(best["latent"]))
    assert any(
        link["href"] == f"interpretation/browser/index.html#baseline/layers-{int(cells[5]):02d}/"
        f"{cells[6]}"
        for cells in body
        if cells[1] == "one SAE per layer"
        for link in page.all("a")
    )


def test_scores_that_are_no_numbers_are_left_out(directory: Path) -> None:
    truth = stored(directory, "ground_truth")
    truth["coverage"][0] |= {"auroc": None, "coverage": "high"}
    truth["rows"][0] |= {"auroc": None}
    truth["means"][0] |= {"auroc": None, "coverage": None}
    change(directory, "ground_truth", **truth)
    first = next(iter(by_layer(read_run(directory).ground_truth or {}, "auroc").values()))
    assert list(first) == [1, 2, 3, 4]
    assert words(directory).tables["ground-truth"][1][1:3] == ["–", "–"]


def test_without_ground_truth_the_page_says_why(directory: Path) -> None:
    path_of(directory, "ground_truth").unlink()
    assert "known of the bundled English alone" in words(directory).text
    assert list(drawn(directory)) == [*ALL[:3], ALL[5]]


# Scores.


def test_points_and_intervals_are_the_scores(directory: Path) -> None:
    panels = drawn(directory)["interpretability_scores"].draw().axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        "Human score",
        "Detection",
        "Fuzzing",
    ]
    for axes, (name, key, low, high) in zip(
        panels,
        (
            ("annotation/scores", "score", "low", "high"),
            ("explanation/scores", "detection", "detection_low", "detection_high"),
            ("explanation/scores", "fuzzing", "fuzzing_low", "fuzzing_high"),
        ),
        strict=True,
    ):
        rows = stored(directory, name)["rows"]
        for partition, label in (
            ("groups", "one SAE per group"),
            ("baseline", "one SAE per layer"),
        ):
            own = sorted(
                (row["layer"], row[key], row[low], row[high])
                for row in rows
                if row["layer"] is not None
                and row["partition"] == partition
                and (partition == "baseline" or row["groups_total"] == 2)
            )
            pieces = [found for found in axes.containers if found.get_label() == label]
            assert len(pieces) == (2 if partition == "groups" else 5)
            found = [
                (round(x), y, bottom, top)
                for piece in pieces
                for (x, y), ((_, bottom), (_, top)) in zip(
                    piece.lines[0].get_xydata(), piece.lines[2][0].get_segments(), strict=True
                )
            ]
            np.testing.assert_allclose(found, own)


def test_what_was_not_scored_has_no_panel(directory: Path) -> None:
    path_of(directory, "explanation/scores").unlink()
    assert len(drawn(directory)["interpretability_scores"].draw().axes) == 1
    path_of(directory, "annotation/scores").unlink()
    assert "interpretability_scores" not in drawn(directory)
    rows = [{"partition": "groups", "groups_total": 2, "layer": 0, "score": None}]
    (directory / "interpretation" / "annotation" / "scores.json").write_text(
        json.dumps({"of": "0" * 16, "rows": rows})
    )
    assert "interpretability_scores" not in drawn(directory)
    assert "What people found" in words(directory).text


def test_where_the_chosen_groups_were_not_scored_the_fewest_are_shown(directory: Path) -> None:
    for name in ("annotation/scores", "explanation/scores"):
        rows = [row for row in stored(directory, name)["rows"] if row["groups_total"] != 2]
        change(directory, name, rows=rows)
    assert "G = 1" in drawn(directory)["interpretability_scores"].title


def test_agreement_and_counts_are_said(directory: Path) -> None:
    text = words(directory).text
    assert "Marked by Ada (1,056 marks), Grace (1,002 marks)." in text
    assert "Agreement: Cohen's kappa 0.71, on the 1,002 items that all marked." in text
    assert "Explained and judged by some-model at localhost:8000." in text
    assert (
        "4,410 requests, 1,200 of them from an earlier run, 17 retries, 2 failed, 31 answers"
        in text
    )
    assert "Not complete" in text
    change(directory, "explanation/scores", complete=True, counts=None)
    change(directory, "annotation/scores", agreement={"name": None, "value": None}, annotators=None)
    text = words(directory).text
    assert "Not complete" not in text
    assert "Agreement:" not in text


# Links into the browser.


def links(directory: Path) -> list[str]:
    hrefs = [link["href"] or "" for link in words(directory).all("a")]
    return [href for href in hrefs if href.startswith("interpretation/")]


def test_the_circuits_latents_lead_to_their_cards(directory: Path) -> None:
    strongest = json.loads((directory / "evaluation" / "circuits" / "ioi.json").read_text())
    group_of = {
        total: {layer: group for group in groups_of(directory, total) for layer in group}
        for total in (1, 2, 3)
    }
    found = set(links(directory))
    for entry in strongest["strongest"]:
        name = (
            f"baseline/{sae_name([entry['layer']])}"
            if entry["partition"] == "baseline"
            else sae_name(group_of[entry["groups_total"]][entry["layer"]])
        )
        assert f"interpretation/browser/index.html#{name}/{entry['latent']}" in found


def test_where_there_is_no_browser_nothing_leads_there(directory: Path) -> None:
    shutil.rmtree(directory / "interpretation" / "browser")
    assert links(directory) == []
    assert "Browse the latents" not in words(directory).text


def test_latents_of_saes_that_were_not_interpreted_have_no_link(directory: Path) -> None:
    subjects = stored(directory, "depth")["subjects"]
    change(directory, "depth", subjects=[own for own in subjects if own["groups_total"] == 2])
    found = links(directory)
    assert not any("baseline" in href for href in found)
    names = {sae_name(group) for group in groups_of(directory, 2)}
    cards = {match[1] for href in found if (match := re.search(r"#(.+)/\d+$", href))}
    assert cards == names


# Nothing is trusted.


def test_markup_in_what_was_interpreted_is_escaped(directory: Path) -> None:
    depth = stored(directory, "depth")
    for subject in depth["subjects"]:
        subject["saes"] = dict.fromkeys(subject["saes"], HOSTILE)
    change(directory, "depth", subjects=depth["subjects"], definitions={HOSTILE: HOSTILE})
    truth = stored(directory, "ground_truth")
    truth["rows"][0]["attribute"] = truth["attributes"][0]["attribute"] = HOSTILE
    truth["attributes"][0]["definition"] = f"{HOSTILE}\u202e"
    change(directory, "ground_truth", **truth)
    people = {"annotators": [{"name": HOSTILE}], "agreement": {"name": HOSTILE, "value": -0.1}}
    change(directory, "annotation/scores", **people)
    change(directory, "explanation/scores", model=HOSTILE, endpoint=HOSTILE)
    page = words(directory)
    assert len(page.all("script")) == 1
    assert HOSTILE not in page.source
    assert "\u202e" not in page.source
    assert page.text.count("document.title=") >= 5
    assert all(re.fullmatch(r"[\w./#%-]+", href) for href in links(directory))


def test_figures_fit_a_paper_and_have_words(directory: Path) -> None:
    found = drawn(directory)
    assert list(found) == ALL
    for own in found.values():
        figure = own.draw()
        assert figure.get_figwidth() <= 6.4
        assert 7 <= min(text_sizes(figure)) <= max(text_sizes(figure)) <= 9
        assert len(own.alt) > 30
        assert own.definitions
