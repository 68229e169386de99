from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groupsae.report.artefacts import Artefacts, read_run
from groupsae.report.circuit_illustrations import circuit_illustrations
from groupsae.report.circuits import circuit_contents, slugs
from tests.report.synthetic_run import write_run
from tests.report.test_page import words

TASKS = ("greater_than", "ioi")
REASON = "m(M) − m(empty) = 0.02 is less than a tenth of m(M)"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_run(
        tmp_path,
        n_layers=4,
        chosen=2,
        steps=20,
        also_groups=(1,),
        tasks=TASKS,
        refused_task="mine",
    )


def task_file(directory: Path, task: str) -> Path:
    return directory / "evaluation" / "circuits" / f"{task}.json"


def stored(directory: Path, task: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(task_file(directory, task).read_text())
    return content


def flag(directory: Path, task: str, **chosen: Any) -> None:
    """Flag the curves of a task that have all of `chosen`."""
    content = stored(directory, task)
    for curve in content["curves"]:
        if chosen.items() <= curve.items():
            curve["flag"] = REASON
    task_file(directory, task).write_text(json.dumps(content))


def areas(directory: Path, **about: Any) -> dict[tuple[str, str, str, int], float]:
    return {
        (task, curve["score"], curve["method"], curve["groups_total"]): curve["area"]
        for task in TASKS
        for curve in stored(directory, task)["curves"]
        if about.items() <= curve.items()
    }


def names(run: Artefacts) -> list[str]:
    return [illustration.name for illustration in circuit_illustrations(run)]


PUBLISHED = {"selection": "per_layer", "error_nodes": False, "latents": "ranked"}


def test_the_table_holds_every_area_of_every_partition(directory: Path) -> None:
    table = circuit_contents(read_run(directory))["tables"][0]
    found = areas(directory, **PUBLISHED)
    assert table["methods"] == ["AtP", "IG"]
    assert [(row["task"], row["subject"]) for row in table["rows"]] == [
        (task, label) for task in TASKS for label in ("G = 1", "G = 2", "one SAE per layer")
    ]
    for row in table["rows"]:
        total = {"G = 1": 1, "G = 2": 2}.get(row["subject"], 4)
        for score in ("faithfulness", "completeness"):
            cells = [float(cell["value"]) for cell in row[score]]
            expected = [
                found[row["task"], score, method, total]
                for method in ("attribution", "integrated_gradients")
            ]
            assert cells[:2] == expected
    assert len(circuit_contents(read_run(directory))["tables"]) == 4


def test_the_means_are_of_the_tasks(directory: Path) -> None:
    contents = circuit_contents(read_run(directory))
    found = areas(directory, **PUBLISHED)
    own = {
        total: np.mean([found[task, "faithfulness", "attribution", total] for task in TASKS])
        for total in (1, 2, 4)
    }
    table = contents["tables"][0]
    first = [float(row["cells"][0].replace("−", "-")) for row in table["mean_rows"]]
    np.testing.assert_allclose(first, list(own.values()), atol=5.1e-4)
    assert f"one SAE per group (G = 2): faithfulness {own[2]:.3f}" in contents["answer"]
    assert f"one SAE per layer: faithfulness {own[4]:.3f}" in contents["answer"]
    assert "G = 1" not in contents["answer"]
    assert "averaged over 2 tasks" in contents["answer"]


def test_a_flagged_curve_has_no_area_and_leaves_its_task_out_of_every_mean(
    directory: Path,
) -> None:
    flag(directory, "ioi", partition="groups", groups_total=1, latents="ranked", error_nodes=False)
    contents = circuit_contents(read_run(directory))
    table, found = contents["tables"][0], areas(directory, **PUBLISHED)
    (row,) = (r for r in table["rows"] if (r["task"], r["subject"]) == ("ioi", "G = 1"))
    assert [cell["text"] for cell in row["faithfulness"][:2]] == ["flag", "flag"]
    assert row["faithfulness"][0]["value"] == ""
    assert row["faithfulness"][0]["why"] == REASON
    assert float(row["m"][0]["value"]) == pytest.approx(3.41)  # the numbers stay to be seen
    assert table["counted"] == 1
    means = [row["cells"][0] for row in table["mean_rows"]]
    expected = [found["greater_than", "faithfulness", "attribution", G] for G in (1, 2, 4)]
    assert means == [f"{area:.3f}".replace("-", "−") for area in expected]
    (listed,) = contents["flags"]
    assert listed == {"what": "ioi, G = 1, ranked latents", "count": "8 curves", "why": REASON}
    assert REASON in words(directory).text


def test_the_figures_say_which_curves_are_not_drawn(directory: Path) -> None:
    flag(directory, "ioi", partition="groups", groups_total=1, latents="ranked", error_nodes=False)
    found = {own.name: own for own in circuit_illustrations(read_run(directory))}
    without, _, with_errors, _ = found["mean_curves"].draw().axes
    assert [text.get_text() for text in without.texts] == ["1 of 2 tasks"]
    assert not with_errors.texts
    assert "averages fewer tasks" in found["mean_curves"].caption
    of_task = found["task_ioi_curves"].draw().axes[0]
    assert [text.get_text() for text in of_task.texts] == ["flagged: G = 1"]
    assert "G = 1" not in {line.get_label() for line in of_task.get_lines()}
    assert "Flagged curves are not drawn" in found["task_ioi_curves"].caption


def test_where_all_is_flagged_without_error_nodes_the_answer_is_with_them(directory: Path) -> None:
    for task in TASKS:
        flag(directory, task, error_nodes=False)
    answer = circuit_contents(read_run(directory))["answer"]
    assert "with error nodes" in answer
    for task in TASKS:
        flag(directory, task)
    assert circuit_contents(read_run(directory))["answer"] == ""


def test_a_refused_task_has_its_reason_and_numbers_and_no_figure(directory: Path) -> None:
    page = words(directory)
    assert stored(directory, "mine")["refused"] in page.text
    assert "m(M) −0.020, accuracy 49.0%, 70 usable examples (35 scored)" in page.text
    assert "prompts of unequal length: 12" in page.text
    assert not any("mine" in name for name in names(read_run(directory)))


def test_curves_of_a_refused_task_are_never_shown(directory: Path) -> None:
    content = stored(directory, "ioi") | {"refused": "the model cannot do it"}
    task_file(directory, "ioi").write_text(json.dumps(content))
    run = read_run(directory)
    assert names(run)[0] == "task_greater_than_curves"  # one task is left: no mean
    contents = circuit_contents(run)
    assert {row["task"] for table in contents["tables"] for row in table["rows"]} == {
        "greater_than"
    }
    assert {row["task"] for row in contents["latents"]} == {"greater_than"}


def test_every_strongest_latent_is_listed_and_can_be_linked_to(directory: Path) -> None:
    page = words(directory)
    (header, *rows) = page.tables["circuit-latents"]
    assert header == ["Task", "Method", "SAEs", "Layer", "Group", "Latent", "Effect"]
    strongest = [entry for task in TASKS for entry in stored(directory, task)["strongest"]]
    assert len(rows) == len(strongest)
    expected = {(str(e["layer"]), str(e["latent"])) for e in strongest}
    assert {(row[3], row[5]) for row in rows} == expected
    marked = {
        (
            cell["data-partition"],
            cell["data-groups-total"],
            cell["data-layer"],
            cell["data-latent"],
        )
        for cell in page.all("td")
        if "data-latent" in cell
    }
    assert marked == {
        (e["partition"], str(e["groups_total"]), str(e["layer"]), str(e["latent"]))
        for e in strongest
    }
    sizes = [abs(float(row[6].replace("−", "-"))) for row in rows[:20]]
    assert sizes == sorted(sizes, reverse=True)


def test_the_pictures_are_of_the_chosen_groups_and_the_baseline(directory: Path) -> None:
    found = {own.name: own for own in circuit_illustrations(read_run(directory))}
    assert "(G = 2)" in found["task_ioi_circuit"].title
    assert "one SAE per layer" in found["task_ioi_circuit_baseline"].title
    assert "When Mary and John went to the store" in found["task_ioi_circuit"].caption


def test_file_names_that_come_to_the_same_stay_apart(directory: Path) -> None:
    for name in ("IOI", "i o i", "i-o-i", "…"):
        task_file(directory, name).write_text(task_file(directory, "ioi").read_text())
    found = list(slugs(read_run(directory)))
    assert len(found) == len(set(found)) == 7
    assert all(slug.replace("_", "").isalnum() and slug.isascii() for slug in found)
    drawn = names(read_run(directory))
    assert len(drawn) == len(set(drawn))


def test_nothing_of_a_task_is_trusted(directory: Path) -> None:
    attack = "<img src=x>\u202e\ud800\n"
    content = stored(directory, "ioi")
    content |= {
        "task": attack,
        "source": attack,
        "dropped": {attack: 3},
        "lengths": {attack: 1},
        "definitions": {attack: attack},
        "model": {"m": attack, "accuracy": [1]},
        "examples": {"effects": attack},
    }
    content["strongest"][0] |= {"method": attack, "group": [attack], "effect": None}
    for curve in content["curves"]:
        curve |= {"area": attack, "flag": attack, "n_at_75": [], "m_model": {}}
    task_file(directory, "ioi").write_text(json.dumps(content))
    refused = stored(directory, "mine") | {"refused": attack}
    task_file(directory, "mine").write_text(json.dumps(refused))
    page = words(directory)
    page.source.encode()
    assert not page.all("img")
    assert "\u202e" not in page.source
    assert "<img src=x>\\u202e\\ud800\\n" in page.text


@pytest.mark.parametrize("missing", ["model", "examples", "lengths", "dropped", "definitions"])
def test_what_a_task_does_not_say_is_a_dash(directory: Path, missing: str) -> None:
    content = stored(directory, "ioi")
    del content[missing]
    task_file(directory, "ioi").write_text(json.dumps(content))
    assert "nan" not in words(directory).text.lower().replace("provenance", "")
