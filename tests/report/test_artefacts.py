from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from groupsae.errors import InputError
from groupsae.report.artefacts import read_run
from tests.report.synthetic_run import write_run


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    return write_run(
        tmp_path / "run",
        n_layers=3,
        chosen=2,
        steps=60,
        tasks=("ioi",),
        similarity=True,
        interpretation=True,
    )


def test_everything_is_read(run_directory: Path) -> None:
    run = read_run(run_directory)
    assert run.section("host")["name"] == "bundled"
    assert run.distances is not None
    assert run.partition is not None
    assert run.reconstruction is not None
    assert len(run.metrics) == 3 * (2 + 3)
    assert [sae["folder"] for sae in run.saes][:3] == [
        f"saes/{path.name}" for path in sorted((run_directory / "saes").glob("layers-*"))
    ] + ["saes/baseline/layers-00"]


def test_circuits_and_similarity_are_read(run_directory: Path) -> None:
    run = read_run(run_directory)
    assert [(task["file"], task["task"]) for task in run.circuits] == [("ioi", "ioi")]
    assert run.similarity is not None
    assert list(run.similarity["matrices"]) == ["2"]


@pytest.mark.parametrize("stage", ["circuits", "similarity"])
def test_circuits_and_similarity_of_an_earlier_config_are_passed_over(
    run_directory: Path, stage: str
) -> None:
    stages = json.loads((run_directory / "stages.json").read_text())
    del stages[stage]
    (run_directory / "stages.json").write_text(json.dumps(stages))
    run = read_run(run_directory)
    assert bool(run.circuits) == (stage != "circuits")
    assert (run.similarity is None) == (stage == "similarity")


def test_what_was_interpreted_is_read(run_directory: Path) -> None:
    run = read_run(run_directory)
    assert run.depth is not None
    assert run.ground_truth is not None
    assert run.annotation is not None
    assert run.explanation is not None
    assert run.browser == "interpretation/browser/index.html"
    shutil.rmtree(run_directory / "interpretation" / "browser")
    assert read_run(run_directory).browser is None


def test_an_interpretation_of_an_earlier_config_is_passed_over(run_directory: Path) -> None:
    stages = json.loads((run_directory / "stages.json").read_text())
    del stages["interpret"]
    (run_directory / "stages.json").write_text(json.dumps(stages))
    run = read_run(run_directory)
    assert run.depth is run.ground_truth is run.annotation is run.explanation is run.browser is None


@pytest.mark.parametrize("stage", [{"key": "1" * 16}, {}, "0" * 16, None])
def test_scores_of_another_interpretation_are_passed_over(
    run_directory: Path, stage: object
) -> None:
    stages = json.loads((run_directory / "stages.json").read_text())
    (run_directory / "stages.json").write_text(json.dumps(stages | {"interpret": stage}))
    run = read_run(run_directory)
    assert run.annotation is run.explanation is None
    assert run.depth is not None


CURVE = {
    "partition": "groups",
    "groups_total": 2,
    "method": "attribution",
    "latents": "ranked",
    "selection": "per_layer",
    "error_nodes": False,
    "score": "faithfulness",
    "n": [1],
    "value": [0.5],
    "flag": None,
}
SUBJECT = {"partition": "groups", "groups_total": 2, "method": "attribution"}
CELL = {"layer": 0, "position": 0, "latent": 1, "effect": 0.1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": None}, "'task' is a NoneType"),
        ({"refused": 1}, "'refused' is 1"),
        ({"model": []}, "'model' is a list"),
        ({"curves": None}, "'curves' is a NoneType"),
        ({"curves": [1]}, "'curves' has an entry that is no object"),
        ({"curves": [CURVE | {"groups_total": "2"}]}, "'groups_total' is a str"),
        ({"curves": [CURVE | {"error_nodes": 0}]}, "'error_nodes' of a curve"),
        ({"curves": [CURVE | {"n": [1, 2]}]}, "differ in length"),
        ({"curves": [CURVE | {"flag": True}]}, "'flag' is a bool"),
        ({"strongest": [SUBJECT | {"layer": 0}]}, "'latent' is missing"),
        ({"picture": [SUBJECT | {"tokens": [1], "cells": []}]}, "'tokens' are [1]"),
        (
            {"picture": [SUBJECT | {"tokens": ["a"], "cells": [CELL | {"position": 1}]}]},
            "position 1, past 'tokens'",
        ),
    ],
)
def test_a_broken_task_is_named(
    run_directory: Path, change: dict[str, object], message: str
) -> None:
    path = run_directory / "evaluation" / "circuits" / "ioi.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError) as caught:
        read_run(run_directory)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_what_is_missing_is_none_or_empty(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("host: {name: x}\n")
    run = read_run(tmp_path)
    assert run.distances is run.partition is run.reconstruction is None
    assert not run.metrics
    assert not run.saes
    assert run.section("tokens") == {}


def test_a_stage_of_an_earlier_config_is_passed_over(run_directory: Path) -> None:
    stages = json.loads((run_directory / "stages.json").read_text())
    del stages["evaluate"]
    (run_directory / "stages.json").write_text(json.dumps(stages))
    run = read_run(run_directory)
    assert run.reconstruction is None
    assert run.partition is not None


def test_a_line_that_was_cut_short_by_a_kill_is_passed_over(run_directory: Path) -> None:
    path = run_directory / "metrics.jsonl"
    whole = read_run(run_directory).metrics
    path.write_text(path.read_text() + '{"step": 80, "tok')
    assert read_run(run_directory).metrics == whole


def test_of_a_step_that_was_logged_twice_the_later_line_counts(run_directory: Path) -> None:
    path = run_directory / "metrics.jsonl"
    again = json.loads(path.read_text().splitlines()[-1]) | {"fvu": 0.123}
    path.write_text(path.read_text() + json.dumps(again) + "\n")
    lines = [line for line in read_run(run_directory).metrics if line["sae"] == again["sae"]]
    assert [line["step"] for line in lines] == [20, 40, 60]
    assert lines[-1]["fvu"] == 0.123


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere does not exist"):
        read_run(tmp_path / "nowhere")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.txt").touch()
    with pytest.raises(InputError, match="is no run directory"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "host: [", "is not YAML"),
        ("config.yaml", "[1]", "not sections"),
        ("distances.json", "{", "is not JSON"),
        ("distances.json", "[]", "not an object"),
        ("distances.json", '{"layers": [0, 1]}', "'matrix' is missing"),
        ("distances.json", '{"layers": [0, 1], "matrix": [[0, 1]]}', "not 2 x 2"),
        ("distances.json", '{"layers": [0], "matrix": [["a"]]}', "no number"),
        ("partition.json", '{"layers": [0], "by_groups": {}, "chosen": 1}', "lacks"),
        (
            "partition.json",
            '{"layers": [0], "chosen": 1, "by_groups": {"1": {"groups": [["0"]]}}}',
            "list of layers",
        ),
        (
            "partition.json",
            '{"layers": [0], "chosen": 1, "by_groups": {"1": {"groups": [[]]}}}',
            "list of layers",
        ),
        ("partition.json", '{"layers": [0], "by_groups": {"1": {}}, "chosen": 1}', "'groups'"),
        ("partition.json", '{"layers": [0], "by_groups": {"x": {}, "1": {}}, "chosen": 1}', "'x'"),
        ("metrics.jsonl", "nonsense\n", "line 1 is not JSON"),
        ("metrics.jsonl", "[]\n", "line 1 is no object"),
        ("metrics.jsonl", '{"sae": "x"}\n', "'step' is missing"),
        ("evaluation/reconstruction.json", "{}", "'rows' is missing"),
        ("evaluation/reconstruction.json", '{"rows": [1]}', "no object"),
        ("evaluation/reconstruction.json", '{"rows": [{"layer": true}]}', "'layer' is a bool"),
        (
            "evaluation/reconstruction.json",
            '{"rows": [{"layer": 0, "partition": "groups", "group": "ab"}]}',
            "'group' is a str",
        ),
        ("evaluation/circuits/ioi.json", "[", "is not JSON"),
        ("evaluation/similarity.json", '{"layers": [0], "rows": [1]}', "no object"),
        (
            "evaluation/similarity.json",
            '{"layers": [0], "rows": [], "matrices": {"1": {"mmcs": [[1, 2]]}}}',
            "'mmcs' is not 1 x 1",
        ),
        (
            "evaluation/similarity.json",
            '{"layers": [0], "rows": [], "matrices": {"G": {}}}',
            "a G is wanted",
        ),
        (
            "evaluation/similarity.json",
            '{"layers": [0], "rows": [], "matrices": {}, "yardstick": [{}]}',
            "'layer' is missing",
        ),
        ("interpretation/depth.json", "{", "is not JSON"),
        ("interpretation/depth.json", '{"saes": {"a": [1]}}', "no object"),
        ("interpretation/depth.json", '{"saes": {"a": [{"layers": []}]}}', "list of layers"),
        ("interpretation/depth.json", '{"saes": {}, "subjects": [{}]}', "'partition' is missing"),
        (
            "interpretation/depth.json",
            '{"saes": {}, "subjects": [{"partition": "groups", "groups_total": 1, '
            '"saes": {"x": "a"}}]}',
            "a subject's 'saes' has 'x'",
        ),
        (
            "interpretation/depth.json",
            '{"saes": {}, "subjects": [], '
            '"profiles": {"a": {"layers": [0, 1], "share": [[0.5, 0.5], [1]]}}}',
            "'share' is not 2 x 2",
        ),
        ("interpretation/ground_truth.json", '{"attributes": [{}]}', "'attribute' is missing"),
        (
            "interpretation/ground_truth.json",
            '{"attributes": [], "means": [], "coverage": [{"source": "probe"}]}',
            "'layer' is missing",
        ),
        (
            "interpretation/ground_truth.json",
            '{"attributes": [], "means": [], "coverage": [], '
            '"rows": [{"source": "probe", "latent": "7"}]}',
            "'latent' is a str",
        ),
        (
            "interpretation/ground_truth.json",
            '{"attributes": [], "means": [{"source": "trained", "partition": "groups"}]}',
            "'groups_total' is missing",
        ),
        (
            "interpretation/ground_truth.json",
            '{"attributes": [], "means": [{"source": "x"}]}',
            "'source' is 'x'",
        ),
        ("interpretation/annotation/scores.json", '{"rows": [{}]}', "'partition' is missing"),
        ("interpretation/explanation/scores.json", '{"rows": [], "counts": 1}', "'counts'"),
        ("saes/layers-00/cfg.json", '{"layers": null}', "'layers' is a NoneType"),
    ],
)
def test_a_broken_artefact_is_named(
    run_directory: Path, name: str, content: str, message: str
) -> None:
    path = run_directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        read_run(run_directory)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_file_that_is_not_text_is_named(run_directory: Path) -> None:
    shutil.rmtree(run_directory / "saes")
    (run_directory / "distances.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"distances\.json cannot be read"):
        read_run(run_directory)
