"""The stage `interpret` of a run, and what people and language models say of its latents."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from groupsae.config import Config
from groupsae.errors import InputError
from groupsae.report.artefacts import read_run
from groupsae.run import Run
from tests.interpretation.explanation.server import knows, serving


@pytest.fixture(scope="module")
def finished(tiny_host_folder, tiny_text, tmp_path_factory) -> Run:
    config = Config.parse(
        {
            "host": {"name": str(tiny_host_folder)},
            "tokens": {"source": str(tiny_text), "context_length": 32, "held_out": 0.4},
            "grouping": {"layers": "all", "distance_tokens": 2000, "partition": "0-1,2"},
            "sae": {"k": 4, "d_sae": 48},
            "training": {"tokens": 4096, "batch_tokens": 256, "buffer_tokens": 1024},
            "interpretation": {"tokens": 6000, "contexts": 3},
            "evaluation": {"tokens": 1000},
            "report": {"formats": ["png"]},
        }
    )
    run = Run(tmp_path_factory.mktemp("runs") / "finished", config)
    run.all()
    run.interpret()
    return run


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished.directory, tmp_path / "copy")


def data(directory: Path, name: str) -> Any:
    """What a data file of the browser hands over."""
    text = (directory / "interpretation" / "browser" / "data" / name).read_text()
    return json.loads(text[text.index(",") + 1 : text.rindex(")")])


def test_groups_and_baselines_are_kept_once_each(finished):
    cache = finished.latent_cache()
    assert {name: cache.layers(name) for name in cache.sae_names} == {
        "layers-00-01": (0, 1),
        "layers-02": (2,),  # its own baseline
        "baseline/layers-00": (0,),
        "baseline/layers-01": (1,),
    }
    result = finished.interpret()
    assert result["subjects"] == [
        {
            "partition": "groups",
            "groups_total": 2,
            "saes": {"0": "layers-00-01", "1": "layers-00-01", "2": "layers-02"},
        },
        {
            "partition": "baseline",
            "groups_total": 3,
            "saes": {"0": "baseline/layers-00", "1": "baseline/layers-01", "2": "layers-02"},
        },
    ]
    assert result["profiles"].keys() == result["saes"].keys() == set(cache.sae_names)


def test_the_report_shows_it(finished):
    finished.report()
    run = read_run(finished.directory)
    assert run.depth is not None
    assert run.browser == "interpretation/browser/index.html"
    page = (finished.directory / "report.html").read_text(encoding="utf-8")
    assert 'href="interpretation/browser/index.html' in page


def test_what_an_interrupted_stage_has_cached_is_not_cached_again(copy, monkeypatch):
    values = Run(copy).config.model_dump(mode="json")
    values["interpretation"]["seed"] = 1

    def broken(*_, **__):
        raise RuntimeError("power cut")

    with monkeypatch.context() as stopped:
        stopped.setattr("groupsae.interpreting.write_browser", broken)
        with pytest.raises(RuntimeError, match="power cut"):
            Run(copy, Config.parse(values), redo=True).interpret()
    monkeypatch.setattr(
        "groupsae.interpreting.write_latent_cache", lambda *_, **__: pytest.fail("again")
    )
    assert not Run(copy).stages.is_done("interpret")
    Run(copy).interpret()
    assert Run(copy).stages.is_done("interpret")


def test_without_baselines_there_is_nothing_to_set_beside(copy):
    values = Run(copy).config.model_dump(mode="json")
    values["interpretation"] |= {"compare": "none", "cards": "all"}
    run = Run(copy, Config.parse(values), redo=True)
    assert {subject["partition"] for subject in run.interpret()["subjects"]} == {"groups"}
    fires = sum(
        run.latent_cache().fires(name, latent)
        for name in run.latent_cache().sae_names
        for latent in range(48)
    )
    assert len(data(copy, "index.js")["columns"]["latent"]) == fires


def test_sheets_and_their_scores_by_the_command_line(copy, groupsae, tmp_path):
    code, out, _ = groupsae("annotate", copy, "--latents", "5")
    assert code == 0
    assert "annotate.html" in out.replace("\n", "")
    folder = copy / "interpretation" / "annotation"
    key = json.loads((folder / "key.json").read_text())
    marks = {item: {"mark": "interpretable", "note": "ä"} for item in key["items"]}
    export = {"format": 1, "sheet": key["sheet"], "annotator": "A", "marks": marks}
    file = tmp_path / "a.json"
    file.write_text(json.dumps(export))
    code, out, err = groupsae("annotate", copy, "--score", file)
    assert (code, err) == (0, "")
    assert re.search(r"G=2 *│ *all *│ *15 *│ *15 ", out)
    scores = json.loads((folder / "scores.json").read_text())
    assert {row["score"] for row in scores["rows"]} == {1.0}
    assert Run(copy).report()
    assert read_run(copy).annotation is not None
    human = [row["human"] for row in data(copy, "scores.js") if "human" in row]
    assert human == [1.0] * len(marks)
    file.write_text("{}")
    code, _, err = groupsae("annotate", copy, "--score", file)
    assert code == 2
    assert str(file) in err


def test_an_sae_of_two_partitions_shows_what_it_captures_once(copy, groupsae, tmp_path):
    rows = [
        {"source": source, "partition": partition, "groups_total": G, "layer": 2, "latent": latent}
        | {"attribute": "noun", "auroc": 0.75}
        for source, partition, G, latent in (
            ("trained", "groups", 2, 7),
            ("trained", "baseline", 3, 7),  # layers-02 too
            ("untrained", "groups", 2, 8),
            ("probe", None, None, None),
        )
    ]
    (copy / "interpretation" / "ground_truth.json").write_text(json.dumps({"rows": rows}))
    assert groupsae("annotate", copy, "--latents", "1")[0] == 0
    key = json.loads((copy / "interpretation" / "annotation" / "key.json").read_text())
    marks = {item: {"mark": "not"} for item in key["items"]}
    file = tmp_path / "a.json"
    file.write_text(
        json.dumps({"format": 1, "sheet": key["sheet"], "annotator": "A", "marks": marks})
    )
    assert groupsae("annotate", copy, "--score", file)[0] == 0
    captured = [row for row in data(copy, "scores.js") if "attribute" in row]
    assert captured == [
        {"sae": "layers-02", "layer": 2, "latent": 7, "attribute": "noun", "auroc": 0.75}
    ]


def test_explanations_by_the_command_line(copy, groupsae):
    keys = ("explanation.latents=3", "explanation.examples=5", "explanation.model=m")
    with serving(knows) as server:
        asked = (copy, *keys, f"explanation.endpoint={server.url}")
        code, out, err = groupsae("explain", *asked)
        assert code == 0, err
        assert "Explanations by m" in out
        before = len(server.requests)
        assert before > 0
        code, out, _ = groupsae("explain", *asked)
        assert code == 0
        assert len(server.requests) == before
    scores = json.loads((copy / "interpretation" / "explanation" / "scores.json").read_text())
    index = data(copy, "index.js")
    assert scores["complete"]
    names = [index["about"]["saes"][i]["name"] for i in index["columns"]["sae"]]
    cards = set(zip(names, index["columns"]["latent"], strict=True))
    assert {(row["sae"], row["latent"]) for row in scores["latents"]} <= cards


def test_what_is_not_interpreted_yet_is_said(copy, groupsae):
    shutil.rmtree(copy / "interpretation")
    for command in ("annotate", "explain"):
        code, _, err = groupsae(command, copy)
        assert code == 2
        assert f"run `groupsae interpret {copy}` first" in err


def test_explaining_needs_an_endpoint(copy, groupsae):
    code, _, err = groupsae("explain", copy)
    assert code == 2
    assert "explanation.endpoint" in err


def test_an_unembedding_of_an_unknown_kind_leaves_the_logits_out(copy, monkeypatch):
    def unknown(host):
        raise InputError("its unembedding is strange")

    monkeypatch.setattr("groupsae.interpreting.unembedding_of", unknown)
    values = Run(copy).config.model_dump(mode="json")
    values["interpretation"]["cards"] = 5
    Run(copy, Config.parse(values), redo=True).interpret()
    assert not any(data(copy, "index.js")["columns"]["logits"])
