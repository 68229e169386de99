"""The stages `circuits`, `similarity` and `interpret` of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

import pytest
import torch

from groupsae.config import Config
from groupsae.errors import InputError
from groupsae.host.model import HostModel
from groupsae.run import Run


@pytest.fixture(scope="module")
def task_file(tiny_host_folder, tmp_path_factory) -> Path:
    """A task that the random host can do: its own preferences after either of two prompts."""
    host = HostModel.load(tiny_host_folder)
    random = Random(0)
    lines = []
    while len(lines) < 64:
        words = [f"w{random.randrange(2, 96)}" for _ in range(6)]
        other = [*words[:3], f"w{random.randrange(2, 96)}", *words[4:]]
        ids = host.tokenizer([" ".join(words), " ".join(other)], return_tensors="pt").input_ids
        clean, patch = host.logits(ids, last=True)[:, 0, 2:].detach()
        a_clean, a_patch = int((clean - patch).argmax()) + 2, int((patch - clean).argmax()) + 2
        if clean[a_clean - 2] > clean[a_patch - 2]:
            lines.append(
                {
                    "clean_prefix": " ".join(words),
                    "patch_prefix": " ".join(other),
                    "clean_answer": f" w{a_clean}",
                    "patch_answer": f" w{a_patch}",
                }
            )
    path = tmp_path_factory.mktemp("task") / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def finished(tiny_host_folder, tiny_text, task_file, tmp_path_factory) -> Run:
    config = Config.parse(
        {
            "host": {"name": str(tiny_host_folder)},
            "tokens": {"source": str(tiny_text), "context_length": 16, "held_out": 0.2},
            "grouping": {"layers": "all", "distance_tokens": 2000, "groups": 2},
            "sae": {"k": 4, "d_sae": 48},
            "training": {
                "tokens": 4096,
                "batch_tokens": 256,
                "buffer_tokens": 1024,
                "also_groups": [1],
                "twins": True,
            },
            "circuits": {"tasks": [f"own={task_file}"], "examples": 64, "points": 2},
            "similarity": {"tokens": 1000},
            "interpretation": {"tokens": 1000},
            "evaluation": {"tokens": 1000},
            "report": {"formats": ["png"]},
        }
    )
    run = Run(tmp_path_factory.mktemp("runs") / "finished", config)
    run.distances()
    run.groups()
    run.train()
    run.circuits()
    run.similarity()
    return run


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished.directory, tmp_path / "copy")


def test_every_partition_is_judged_by_every_method(finished):
    (result,) = finished.circuits()
    assert result["task"] == "own"
    assert result["refused"] is None
    assert result["examples"] == {"effects": 32, "scores": 32}
    ranked = {
        (curve["partition"], curve["groups_total"], curve["method"], curve["selection"])
        for curve in result["curves"]
        if curve["latents"] == "ranked"
    }
    assert ranked == {
        (*partition, method, selection)
        for partition in (("groups", 2), ("groups", 1), ("baseline", 3))
        for method in ("attribution", "integrated_gradients")
        for selection in ("per_layer", "global")
    }
    controls = {(c["partition"], c["groups_total"], c["latents"]) for c in result["curves"]}
    assert controls - {(*key[:2], "ranked") for key in ranked} == {
        (*partition, latents)
        for partition in (("groups", 2), ("baseline", 3))
        for latents in ("random", "untrained")
    }


def test_the_strongest_latents_are_those_of_the_saved_effects(finished):
    (result,) = finished.circuits()
    effects = finished.effects(next(iter(finished.config.circuits.tasks)), "attribution")
    assert set(effects) == {"G=2", "G=1", "baseline"}
    for entry in result["strongest"]:
        if entry["method"] == "attribution":
            name = "baseline" if entry["partition"] == "baseline" else f"G={entry['groups_total']}"
            own = effects[name].latents[entry["layer"]][entry["latent"]]
            assert float(own) == entry["effect"]
            assert entry["layer"] in entry["group"]


def test_a_picture_shows_the_effects_at_their_positions(finished):
    (result,) = finished.circuits()
    assert [(p["partition"], p["groups_total"]) for p in result["picture"]] == [
        ("groups", 2),
        ("baseline", 3),
    ]
    for picture in result["picture"]:
        assert len(picture["tokens"]) == picture["length"] == 6
        assert {cell["position"] for cell in picture["cells"]} <= {3, 4, 5}  # from the change on


def test_curves_are_chosen_by_what_they_are(finished):
    curves = finished.faithfulness(
        next(iter(finished.config.circuits.tasks)), error_nodes=True, latents="ranked"
    )
    assert {curve.score for curve in curves} == {"faithfulness", "completeness"}
    assert all(curve.m_model == curves[0].m_model for curve in curves)


def test_an_unknown_attribute_of_curves_is_refused(finished):
    with pytest.raises(InputError, match=r"errors=True: a curve has no such attribute; known are"):
        finished.faithfulness(next(iter(finished.config.circuits.tasks)), errors=True)


def test_what_is_judged_is_not_judged_again(copy, monkeypatch):
    monkeypatch.setattr("groupsae.circuits.judge_task", lambda *_, **__: pytest.fail("again"))
    monkeypatch.setattr("groupsae.circuits.task_effects", lambda *_, **__: pytest.fail("again"))
    run = Run(copy)
    (result,) = run.circuits()
    run.effects(next(iter(run.config.circuits.tasks)), "integrated_gradients")
    stages = json.loads((copy / "stages.json").read_text())
    del stages["circuits"]  # stopped between the last task and the note that all are done
    (copy / "stages.json").write_text(json.dumps(stages))
    assert Run(copy).circuits() == [result]


def test_what_is_judged_is_read_without_the_host_model_and_the_saes(copy, monkeypatch):
    monkeypatch.setattr(HostModel, "load", lambda *_, **__: pytest.fail("loads the host model"))
    monkeypatch.setattr("groupsae.sae.SAE.load", lambda *_, **__: pytest.fail("loads an SAE"))
    run = Run(copy)
    (result,) = run.circuits()
    assert len(run.faithfulness(*run.config.circuits.tasks)) == len(result["curves"])


def test_a_task_whose_file_has_changed_is_judged_anew(copy, task_file):
    run = Run(copy)
    (name,) = run.config.circuits.tasks
    key = run._circuits._key(name)
    text = task_file.read_text()
    try:
        task_file.write_text(text.replace("w9 ", "w8 "))
        assert run._circuits._key(name) != key
    finally:
        task_file.write_text(text)


def test_a_task_that_the_host_cannot_do_is_refused_with_the_numbers(copy, task_file, tmp_path):
    lines = [json.loads(line) for line in task_file.open()]
    swapped = tmp_path / "swapped.jsonl"
    swapped.write_text(
        "".join(
            json.dumps(
                line | {"clean_answer": line["patch_answer"], "patch_answer": line["clean_answer"]}
            )
            + "\n"
            for line in lines
        )
    )
    values = Run(copy).config.model_dump(mode="json")
    values["circuits"]["tasks"] = [f"swapped={swapped}"]
    run = Run(copy, Config.parse(values), redo=True)
    (result,) = run.circuits()
    assert result["curves"] == []
    assert "cannot do swapped: on 32 examples m(M) = -" in result["refused"]
    assert not (copy / "evaluation" / "circuits" / "own.json").exists()
    assert not list((copy / "evaluation").rglob("swapped-*"))  # no effects of it


def test_a_file_that_is_not_there_is_refused_before_any_work(copy, tmp_path):
    values = Run(copy).config.model_dump(mode="json")
    values["circuits"]["tasks"] = ["ioi", f"other={tmp_path / 'none.jsonl'}"]
    run = Run(copy, Config.parse(values), redo=True)
    with pytest.raises(InputError, match=r"none\.jsonl"):
        run.circuits()


def test_built_in_tasks_that_cannot_be_asked_are_said_all_at_once(copy):
    values = Run(copy).config.model_dump(mode="json")
    values["circuits"]["tasks"] = ["ioi", "greater_than"]
    run = Run(copy, Config.parse(values), redo=True)
    with pytest.raises(InputError, match=r"circuits\.tasks: none can be asked here"):
        run.circuits()


def test_a_misspelt_task_beside_another_is_refused_before_any_work(copy, monkeypatch):
    values = Run(copy).config.model_dump(mode="json")
    values["circuits"]["tasks"] = [*values["circuits"]["tasks"], "greater-than"]
    monkeypatch.setattr(HostModel, "load", lambda *_, **__: pytest.fail("loads the host model"))
    run = Run(copy, Config.parse(values), redo=True)
    with pytest.raises(InputError, match=r"'greater-than' is unknown; did you mean greater_than"):
        run.circuits()


def test_similarity_has_every_layer_of_every_partition_and_the_twins(finished):
    result = finished.similarity()
    assert [(row["groups_total"], row["layer"]) for row in result["rows"]] == [
        (G, layer) for G in (1, 2) for layer in range(3)
    ]
    assert [row["layer"] for row in result["yardstick"]] == [0, 1, 2]
    assert set(result["matrices"]) == {"1", "2"}
    for row in result["rows"]:
        if row["group"] == [row["layer"]]:  # the group of one layer is its baseline
            assert row["mmcs_group_to_layer"] == pytest.approx(1, abs=1e-5)
            assert row["concordance"] == pytest.approx(1)


def test_similarity_without_baselines_says_what_is_missing(finished, tmp_path):
    values = finished.config.model_dump(mode="json")
    values["training"] |= {"baseline": False, "twins": False}
    run = Run(tmp_path / "run", Config.parse(values))
    run.distances()
    run.groups()
    run.train()
    with pytest.raises(InputError, match=r"training\.baseline=true"):
        run.similarity()


def test_the_report_shows_both(finished):
    page = finished.directory / "report.html"
    finished.evaluate()
    finished.report()
    html = page.read_text()
    assert "own" in html
    assert "faithfulness" in html.lower()
    assert "concordance" in html.lower()


def test_effects_are_those_of_one_forward_per_latent_where_asked(finished):
    (name,) = finished.config.circuits.tasks
    exact = finished.effects(name, "exact")["baseline"]
    linear = finished.effects(name, "attribution")["baseline"]
    assert exact.method == "exact"
    both = torch.stack([exact.latents[2], linear.latents[2]])
    assert float(torch.corrcoef(both)[0, 1]) > 0.9  # above the last layer there is little left


def test_the_command_line_prints_the_areas_and_the_similarities(groupsae, copy, monkeypatch):
    monkeypatch.setattr("groupsae.cli.out._width", 160)
    code, out, err = groupsae("circuits", copy)
    assert code == 0, err
    assert "own: 32 examples for effects, 32 for scores" in out
    for label in ("G = 2", "G = 1", "one per layer", "random", "untrained", "faithfulness"):
        assert label in out
    code, out, err = groupsae("similarity", copy)
    assert code == 0, err
    assert "MMCS" in out
    assert "twins" in out


def test_the_command_line_exports_layers(groupsae, copy, tmp_path):
    code, out, err = groupsae("export", copy, "--to", "sparsify", "--layers", "0-1", "-o", tmp_path)
    assert code == 0, err
    assert out.count("layer ") == 2
    assert len(list(tmp_path.glob("*/sae.safetensors"))) == 2
    for wrong, message in (
        (["--to", "onnx"], "known formats are sae-lens"),
        (["--to", "sparsify", "--layers", "x"], "'x' is no layer"),
    ):
        code, _, err = groupsae("export", copy, *wrong)
        assert code == 2
        assert message in err


def test_latents_are_kept_and_their_depths_said(groupsae, copy, tmp_path):
    code, out, err = groupsae("interpret", copy, "--delphi", tmp_path / "delphi")
    assert code == 0, err
    assert "layers-00" in out
    run = Run(copy)
    result = run.interpret()
    cache = run.latent_cache()
    assert set(result["saes"]) == set(cache.sae_names)
    for name, summaries in result["saes"].items():
        assert [row["share"] for row in summaries] == [0.1, 0.5]
        for row in summaries:
            assert row["one"] + row["some"] + row["all"] == pytest.approx(1)
            assert row["layers"] == list(cache.layers(name))
    assert len(list((tmp_path / "delphi").rglob("*.safetensors"))) == 3 * 5
    stages = json.loads((copy / "stages.json").read_text())
    assert {"circuits", "similarity", "interpret"} <= stages.keys()
