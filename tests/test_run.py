from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from groupsae.config import Config
from groupsae.errors import InputError
from groupsae.grouping.matrix import Distances
from groupsae.run import Run
from groupsae.sae import SAE


@pytest.fixture(scope="module")
def module_config(tiny_host_folder, tiny_text) -> Config:
    return Config.parse(
        {
            "host": {"name": str(tiny_host_folder)},
            "tokens": {"source": str(tiny_text), "context_length": 16, "held_out": 0.2},
            "grouping": {"layers": "all", "distance_tokens": 2000, "groups": 2},
            "sae": {"k": 4, "d_sae": 48},
            "training": {
                "tokens": 4096,
                "batch_tokens": 256,
                "buffer_tokens": 1024,
                "log_every": 4,
            },
            "evaluation": {"tokens": 1000},
            "report": {"formats": ["png"]},
        }
    )


@pytest.fixture(scope="module")
def finished(module_config, tmp_path_factory) -> Run:
    """A whole run on the tiny host. Tests only read it."""
    run = Run(tmp_path_factory.mktemp("runs") / "finished", module_config)
    run.all()
    return run


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """The finished run, to be changed."""
    return shutil.copytree(finished.directory, tmp_path / "copy")


def changed(config: Config, **sections) -> Config:
    values = config.model_dump(mode="json")
    for name, keys in sections.items():
        values[name] |= keys
    return Config.parse(values)


def test_the_run_directory_is_laid_out_as_documented(finished):
    names = {
        path.relative_to(finished.directory).as_posix()
        for path in finished.directory.rglob("*")
        if path.is_file()
    }
    groups = finished.groups().partition.groups
    folders = [f"layers-{g[0]:02d}" + (f"-{g[-1]:02d}" if len(g) > 1 else "") for g in groups]
    folders += [f"baseline/layers-{layer:02d}" for layer in range(3)]
    expected = {
        "config.yaml",
        "distances.json",
        "partition.json",
        "metrics.jsonl",
        "evaluation/reconstruction.json",
        "report.html",
    } | {f"saes/{folder}/{file}" for folder in folders for file in ("cfg.json", "sae.safetensors")}
    assert expected <= names


def test_artefacts_have_the_keys_that_other_scripts_read(finished):
    read = lambda name: json.loads((finished.directory / name).read_text())  # noqa: E731
    assert {"layers", "matrix", "standard_error", "tokens", "center"} <= read(
        "distances.json"
    ).keys()
    partition = read("partition.json")
    assert {"layers", "method", "threshold", "chosen", "by_groups"} <= partition.keys()
    entry = partition["by_groups"]["2"]
    assert {"groups", "amad", "largest_diameter", "flops_per_token"} <= entry.keys()
    evaluation = read("evaluation/reconstruction.json")
    assert {"definitions", "rows"} <= evaluation.keys()
    assert {(row["partition"], row["layer"]) for row in evaluation["rows"]} == {
        (partition, layer) for partition in ("groups", "baseline") for layer in range(3)
    }
    lines = [json.loads(line) for line in (finished.directory / "metrics.jsonl").open()]
    assert {line["sae"] for line in lines} == set(finished.saes())
    assert {line["step"] for line in lines} == {4, 8, 12, 16}


def test_the_resolved_config_runs_again_as_it_is(finished, module_config):
    stored = Config.load(finished.directory / "config.yaml")
    assert stored.model_copy(update={"provenance": None}) == module_config
    assert {"groupsae", "torch", "host_fingerprint", "created"} <= stored.provenance.keys()


def test_finished_stages_are_not_repeated(finished, copy, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    monkeypatch.setattr("groupsae.host.model.HostModel.residual_streams", None)
    monkeypatch.setattr("groupsae.host.model.HostModel.visit", None)
    Run(copy).all()
    after = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    assert {p for p in after if after[p] != before.get(p)} <= {copy / "config.yaml"}


def test_distances_are_those_of_the_streams(finished, host):
    """Centred, over the same tokens, recomputed in one piece."""
    ids = finished.corpus.train().next_contexts(125)
    mask = ~torch.isin(ids, torch.tensor(sorted(finished.host.special_token_ids)))
    streams = finished.host.residual_streams(ids, range(3))
    x = [streams[layer][mask].double() for layer in range(3)]
    x = [rows - rows.mean(0) for rows in x]
    for p in range(3):
        for q in range(3):
            cosine = torch.cosine_similarity(x[p], x[q]).clamp(-1, 1)
            expected = (cosine.arccos() / np.pi).mean().item()
            assert finished.distances().matrix[p, q] == pytest.approx(expected, abs=1e-6)


def test_sae_normalises_each_layer_to_mean_norm_one(finished):
    ids = finished.corpus.train().next_contexts(125)
    mask = ~torch.isin(ids, torch.tensor(sorted(finished.host.special_token_ids)))
    for layer in range(3):
        x = finished.host.residual_streams(ids, [layer])[layer][mask]
        normalised = finished.sae(layer).normalize(x, layer)
        assert normalised.norm(dim=1).mean().item() == pytest.approx(1, abs=1e-3)
        assert normalised.mean(0).norm().item() < 1e-3


def test_a_stage_without_what_comes_before_it_says_so(module_config, tmp_path):
    run = Run(tmp_path / "run", module_config)
    with pytest.raises(
        InputError, match=r"holds no distances\.json of .*; run `groupsae distances"
    ):
        run.groups()
    with pytest.raises(InputError, match=r"holds no partition\.json of .*; run `groupsae groups"):
        run.train()
    with pytest.raises(InputError, match=r"holds no training\.json of .*; run `groupsae train"):
        run.evaluate()


def test_another_config_is_refused_and_nothing_is_touched(copy, module_config):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(
        InputError, match=r"stage 'train' of another config \(sae.k was 4, is now 5"
    ):
        Run(copy, changed(module_config, sae={"k": 5}))
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def test_the_size_of_a_forward_changes_the_explained_variance_and_counts(copy, module_config):
    with pytest.raises(InputError, match=r"evaluation\.batch_contexts was 32, is now 8"):
        Run(copy, changed(module_config, evaluation={"batch_contexts": 8}))


def test_redo_repeats_from_the_changed_stage_on(copy, module_config):
    distances = (copy / "distances.json").stat().st_mtime_ns
    run = Run(copy, changed(module_config, sae={"k": 5}), redo=True)
    run.all()
    assert (copy / "distances.json").stat().st_mtime_ns == distances
    assert run.sae(0).config.k == 5


def test_redo_destroys_nothing_before_the_stage_begins(copy, module_config):
    with pytest.raises(InputError, match=r"sae\.k"):
        Run(copy, changed(module_config, sae={"d_sae": None, "k": 5000}), redo=True).all()
    run = Run(copy, module_config)
    assert run.stages.is_done("report")
    assert set(run.saes()) == set(run.train())


def test_a_group_of_one_layer_is_that_layer_s_baseline(finished):
    groups = finished.groups().partition.groups
    alone = next(group[0] for group in groups if len(group) == 1)
    saes = finished.saes()
    for name, tensor in saes[f"layers-{alone:02d}"].state_dict().items():
        assert torch.equal(tensor, saes[f"baseline/layers-{alone:02d}"].state_dict()[name])
    rows = [row for row in finished.evaluate() if row["layer"] == alone]
    assert rows[0]["r2"] == rows[1]["r2"]
    assert rows[0]["ce_loss_score"] == rows[1]["ce_loss_score"]


def test_keys_that_change_no_result_do_not_count(copy, module_config):
    Run(copy, changed(module_config, training={"log_every": 1}, host={"device": "cpu"})).all()


def test_a_later_stage_may_change_while_it_is_not_done(module_config, tmp_path):
    Run(tmp_path / "run", module_config).distances()
    table = Run(tmp_path / "run", changed(module_config, grouping={"groups": 3})).groups()
    assert table.chosen == 3


def test_another_host_under_the_same_name_is_refused(
    copy, tiny_host_folder, tmp_path, module_config
):
    from tests.host.tiny_models import tiny_model

    folder = shutil.copytree(tiny_host_folder, tmp_path / "host")
    config = changed(module_config, host={"name": str(folder)})
    Run(tmp_path / "run", config).distances()
    tiny_model("gpt_neox", seed=1).save_pretrained(folder)
    with pytest.raises(InputError, match="is not the model that"):
        Run(tmp_path / "run", config).groups()


def test_other_folders_and_files_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="is no run directory"):
        Run(tmp_path)
    with pytest.raises(InputError, match="is no run directory"):
        Run(tmp_path / "thesis.tex")


@pytest.mark.parametrize(
    ("section", "keys", "message"),
    [
        (
            "grouping",
            {"layers": [0, 3]},
            r"grouping\.layers: \[3\] does not fit .* layers are 0 to 2",
        ),
        ("grouping", {"groups": 9}, r"groups is 9; 3 layers make 1 to 3 groups"),
        ("grouping", {"groups": None, "partition": [[0], [2]]}, "layers 1 are in no group"),
        ("grouping", {"groups": None, "partition": [[0, 1], [1, 2]]}, "overlap: layer 1 is in"),
        ("sae", {"d_sae": None, "expansion": 1, "k": 33}, r"sae\.k: 33 .* d_sae = 32"),
        ("tokens", {"context_length": 100}, r"context_length.*100.*48"),
        ("tokens", {"source": "nowhere.jsonl"}, r"nowhere\.jsonl"),
        ("tokens", {"column": "words"}, "words.*text"),
        ("training", {"tokens": 10_000_000}, r"training\.tokens=10000000"),
        ("evaluation", {"tokens": 10_000_000}, r"evaluation\.tokens=10000000"),
        ("host", {"n_layers": 12}, r"host\.n_layers: 12 is declared, but .* has 3"),
        ("host", {"name": "./nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    module_config, tmp_path, section, keys, message
):
    run = Run(tmp_path / "run", changed(module_config, **{section: keys}))
    with pytest.raises(InputError, match=message):
        run.all()
    assert not (tmp_path / "run" / "distances.json").exists()


def test_distances_from_elsewhere_need_no_host(module_config, tmp_path):
    matrix = np.array([[0, 0.1, 0.4], [0.1, 0, 0.35], [0.4, 0.35, 0]])
    distances = Distances.from_matrix(matrix)
    run = Run(tmp_path / "run", changed(module_config, host={"name": "./nowhere"}))
    assert run.adopt(distances).partition.groups == ((0, 1), (2,))


def test_distances_from_elsewhere_may_be_given_again_but_not_others(module_config, tmp_path):
    matrix = np.array([[0, 0.1, 0.4], [0.1, 0, 0.35], [0.4, 0.35, 0]])
    for _ in range(2):
        run = Run(tmp_path / "run", module_config)
        assert run.adopt(Distances.from_matrix(matrix)).chosen == 2
    with pytest.raises(InputError, match="holds other distances"):
        run.adopt(Distances.from_matrix(matrix / 2))


def test_of_distances_from_elsewhere_the_listed_layers_are_grouped(module_config, tmp_path):
    matrix = np.array([[0, 0.1, 0.4], [0.1, 0, 0.35], [0.4, 0.35, 0]])
    config = changed(module_config, grouping={"layers": [2, 0]})
    table = Run(tmp_path / "run", config).adopt(Distances.from_matrix(matrix))
    assert table.layers == (0, 2)


def test_adopted_distances_may_cover_the_last_layer(module_config, tmp_path):
    """A matrix from elsewhere has it, though by default the last layer is not measured."""
    config = changed(module_config, grouping={"layers": "all_but_last"})
    run = Run(tmp_path / "run", config)
    run.adopt(Distances.from_matrix(np.array([[0, 0.4, 0.4], [0.4, 0, 0.1], [0.4, 0.1, 0]])))
    assert {"layers-00", "layers-01-02"} <= set(run.train())


def test_what_a_stage_left_for_another_config_is_not_taken(copy, module_config):
    run = Run(copy, changed(module_config, grouping={"distance_tokens": 1000}), redo=True)
    run.distances()
    with pytest.raises(InputError, match=r"holds no partition\.json of this config"):
        run.train()


def test_adopted_distances_can_be_trained_on(module_config, tmp_path):
    matrix = np.array([[0, 0.4, 0.4], [0.4, 0, 0.1], [0.4, 0.1, 0]])
    run = Run(tmp_path / "run", module_config)
    run.adopt(Distances.from_matrix(matrix))
    assert set(run.train()) == {
        "layers-00",
        "layers-01-02",
        *(f"baseline/layers-{layer:02d}" for layer in range(3)),
    }


def test_an_interrupted_training_continues_to_the_same_weights(
    finished, module_config, tmp_path, monkeypatch
):
    config = changed(module_config, training={"checkpoint_every": 5})
    run = Run(tmp_path / "run", config)
    run.distances()
    run.groups()

    from groupsae.training.batches import MixedBatches

    steps, next_batch = [], MixedBatches.next

    def interrupted(self):
        steps.append(time.monotonic())
        if len(steps) == 13:
            raise KeyboardInterrupt
        return next_batch(self)

    monkeypatch.setattr(MixedBatches, "next", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.groups().chosen == 2, "earlier artefacts are kept"
    monkeypatch.undo()
    continued = Run(tmp_path / "run").train()
    for name, sae in finished.saes().items():
        for key, tensor in sae.state_dict().items():
            assert torch.equal(tensor, continued[name].state_dict()[key]), (name, key)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert sorted({line["step"] for line in lines}) == [4, 8, 12, 16]
    assert len(lines) == 4 * len(continued)


def test_running_out_of_text_keeps_what_was_trained(module_config, tmp_path, tiny_text):
    config = changed(module_config, training={"tokens": 10_000_000})
    run = Run(tmp_path / "run", config)
    run.distances()
    run.groups()
    with pytest.raises(InputError, match="on_exhausted"):
        run.train()
    checkpoints = list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert len(checkpoints) == 1
    assert int(checkpoints[0].name.removeprefix("step-")) > 16


def test_groups_and_baseline_share_one_forward(module_config, tmp_path, monkeypatch):
    from groupsae.host.model import HostModel

    run = Run(tmp_path / "run", module_config)
    run.distances()
    run.groups()
    forwards, visit = [], HostModel.visit

    def counted(self, input_ids, visitors):
        forwards.append((input_ids.numel(), sorted(visitors)))
        return visit(self, input_ids, visitors)

    monkeypatch.setattr(HostModel, "visit", counted)
    run.train()
    assert all(layers == [0, 1, 2] for _, layers in forwards)
    assert sum(tokens for tokens, _ in forwards) < 4096 + 32 * 16 + 16 * 16


def test_saes_load_by_themselves(finished):
    for name, sae in finished.saes().items():
        alone = SAE.load(finished.directory / "saes" / name)
        assert torch.equal(alone.W_dec, sae.W_dec)
    with pytest.raises(InputError, match="layer 7 is in no group"):
        finished.sae(7)


@pytest.mark.parametrize(
    "name",
    [
        "distances.json",
        "partition.json",
        "training.json",
        "stages.json",
        "evaluation/reconstruction.json",
    ],
)
@pytest.mark.parametrize("content", ["", "[]", "{", '{"train": 3}', "\0"])
def test_damaged_artefacts_are_named(copy, name, content):
    (copy / name).write_text(content)
    with pytest.raises(InputError, match=Path(name).stem):
        Run(copy).all()


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("training.json", "saes", 3),
        ("training.json", "saes", [3]),
        ("evaluation/reconstruction.json", "rows", 3),
        ("evaluation/reconstruction.json", "rows", [3]),
        ("evaluation/reconstruction.json", "rows", [{"layer": 0}]),
    ],
)
def test_artefacts_of_another_form_are_named(copy, name, key, value):
    content = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps(content | {key: value}))
    with pytest.raises(InputError, match=rf"{Path(name).name} is damaged \('{key}': "):
        Run(copy).all()


@pytest.mark.parametrize("content", ["", "sae:\n  k: 4\n"])
def test_a_config_that_no_run_wrote_is_neither_taken_nor_touched(copy, module_config, content):
    (copy / "config.yaml").write_text(content)
    for config in (None, module_config):
        with pytest.raises(InputError, match=r"config\.yaml was not written by a run"):
            Run(copy, config, redo=True)
    assert (copy / "config.yaml").read_text() == content


def test_stages_made_otherwise_than_the_config_says_are_not_overwritten(copy):
    stages = json.loads((copy / "stages.json").read_text())
    stages["train"]["key"] = "of another version"
    (copy / "stages.json").write_text(json.dumps(stages))
    with pytest.raises(InputError, match=r"stage 'train' of another config \(.*version"):
        Run(copy)
    assert (copy / "saes").exists()
    Run(copy, redo=True)


def test_a_damaged_sae_is_named(finished, copy):
    (copy / "saes" / "baseline" / "layers-01" / "sae.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match=r"baseline/layers-01 holds no readable SAE.*damaged"):
        Run(copy).saes()


def test_there_is_no_report_of_nothing(module_config, tmp_path):
    with pytest.raises(InputError, match=r"holds no distances\.json"):
        Run(tmp_path / "run", module_config).report()


def test_checkpoints_stay_until_the_training_is_noted_as_done(module_config, tmp_path, monkeypatch):
    config = changed(module_config, training={"checkpoint_every": 5})
    run = Run(tmp_path / "run", config)
    run.distances()
    run.groups()
    with monkeypatch.context() as interrupted:

        def interrupt(*_):
            raise KeyboardInterrupt

        interrupted.setattr("groupsae.run.write_json", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run.train()
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    Run(tmp_path / "run").train()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_finished_run_writes_nothing(copy, monkeypatch):
    Run(copy).all()

    def read_only(path, _text):
        raise InputError(f"{path} cannot be written")

    monkeypatch.setattr("groupsae.directory.write_text", read_only)
    Run(copy).all()


@pytest.fixture(scope="module")
def every_partition(module_config, tmp_path_factory) -> Run:
    """A run with SAEs for every number of groups, and a second one of each layer."""
    config = changed(module_config, training={"also_groups": "all", "twins": True})
    run = Run(tmp_path_factory.mktemp("runs") / "every", config)
    run.distances()
    run.groups()
    run.train()
    return run


def test_every_partition_can_be_trained_at_once(every_partition):
    subjects = every_partition.subjects()
    assert [subject.name for subject in subjects] == ["G=2", "G=1", "G=3", "baseline"]
    for subject in subjects:
        assert list(subject.saes) == [0, 1, 2]
        assert all(layer in sae.layers for layer, sae in subject.saes.items())
    assert subjects[2].saes == subjects[3].saes  # one SAE each, as group and as baseline
    assert set(every_partition.saes()) >= {"layers-00-02", "baseline/layers-01", "twin/layers-01"}


def test_every_partition_is_judged(every_partition):
    rows = every_partition.evaluate()
    found = [(row["partition"], row["groups_total"], row["layer"]) for row in rows]
    wanted = [("groups", G, layer) for G in (2, 1, 3) for layer in range(3)]
    assert found == wanted + [("baseline", 3, layer) for layer in range(3)]


def test_twins_are_of_another_seed_and_have_the_same_scales(every_partition):
    saes = every_partition.saes()
    for layer in range(3):
        one, other = (saes[f"{folder}/layers-{layer:02d}"] for folder in ("baseline", "twin"))
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.scale, other.scale)
        assert (one.W_dec @ other.W_dec.T).diagonal().abs().mean() < 0.9


def test_a_number_of_groups_that_cannot_be_is_refused(copy, module_config):
    config = changed(module_config, training={"also_groups": [1, 7]})
    with pytest.raises(InputError, match=r"training\.also_groups: .* 7 groups; known are 1, 2, 3"):
        Run(copy, config, redo=True).train()


def test_evaluating_again_leaves_what_does_not_rest_on_it(copy, module_config):
    stages = json.loads((copy / "stages.json").read_text())
    run = Run(copy)
    key = run.stages.key("circuits")
    (copy / "stages.json").write_text(json.dumps(stages | {"circuits": {"key": key}}))
    config = changed(module_config, evaluation={"tokens": 900})
    run = Run(copy, config, redo=True)
    assert run.stages.key("circuits") == key
    run.evaluate()
    done = json.loads((copy / "stages.json").read_text())
    assert "circuits" in done
    assert "report" not in done


def test_fresh_starts_over(copy, groupsae):
    code, _, err = groupsae("run", copy)
    assert code == 0
    assert "train: already done" in err
    code, _, err = groupsae("train", copy, "--fresh")
    assert code == 0
    assert "distances" not in err
    assert "train: 4,096 tokens" in err
    assert not Run(copy).stages.is_done("evaluate")
    code, _, err = groupsae("run", copy, "--fresh", "sae.k=3")
    assert code == 0
    assert "distances: 2,0" in err
    assert "train: 4,096 tokens" in err
    assert Run(copy).sae(0).config.k == 3


def test_a_scheduler_that_stops_a_training_is_told_so_and_nothing_is_lost(copy, tmp_path):
    keys = [
        "training.tokens=100M",
        "tokens.on_exhausted=repeat",
        "training.checkpoint_every=1000000",
    ]
    directory = tmp_path / "run"
    started = subprocess.Popen(
        [sys.executable, "-m", "groupsae", "run", copy / "config.yaml", "--out", directory, *keys],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    metrics = directory / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    started.send_signal(signal.SIGTERM)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 128 + signal.SIGTERM
    said = re.search(r"stopped by SIGTERM after step (\d+); a checkpoint holds it", err)
    assert said is not None, err
    assert "Traceback" not in err
    assert (directory / "checkpoints" / f"step-{int(said[1]):06d}").is_dir()
