from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmarks.peers_quality as command_line
from benchmarks.drivers import quality_groupsae
from benchmarks.drivers.quality import Trial, judge
from benchmarks.peers_quality import trial_of, weight_for
from benchmarks.peers_results import Found, Quality, tables, verdict
from benchmarks.peers_results import rows as rows_of
from benchmarks.peers_rows import Rows, Source, prepare_rows
from benchmarks.rounds import DriverFailed, launch
from groupsae.architectures import ARCHITECTURES

D_MODEL, FEATURES, ACTIVE = 16, 24, 3


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Rows:
    """Sums of 3 of 24 fixed directions, a fourth of them in the held-out part."""
    random = np.random.default_rng(0)
    directions = random.standard_normal((FEATURES, D_MODEL))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    chosen = np.argsort(random.random((40_000, FEATURES)), axis=1)[:, :ACTIVE]
    sizes = random.uniform(0.5, 1.5, (40_000, ACTIVE, 1))
    x = (sizes * directions[chosen]).sum(1)
    x -= x.mean(0)
    x = (x / np.linalg.norm(x, axis=1).mean()).astype(np.float32)
    folder = tmp_path_factory.mktemp("planted")
    np.save(folder / "train.npy", x[:30_000])
    np.save(folder / "held_out.npy", x[30_000:])
    return Rows(folder / "train.npy", folder / "held_out.npy", 0, D_MODEL, 30_000, 10_000)


def trial(planted: Rows, rule: str = "topk") -> Trial:
    return trial_of(rule, planted, d_sae=64, k=4, batch=256)


def test_ours_in_a_process_of_its_own_finds_the_planted_dictionary(planted):
    result = launch(Path(sys.executable), "quality_groupsae", trial(planted))
    assert result["steps"] == 30_000 // 256
    assert result["inference"]["r2"] > 0.7
    assert result["inference"]["l0"] == pytest.approx(4, abs=0.1)
    assert result["seconds"] > 0


def test_latents_chosen_by_batch_are_k_per_token(planted):
    forwards = quality_groupsae.train(trial(planted, "batchtopk"))
    judged = {name: judge(forward, trial(planted)) for name, forward in forwards.items()}
    assert judged["batch"]["l0"] == pytest.approx(4, abs=0.01)
    assert judged["inference"]["l0"] == pytest.approx(4, rel=0.2)
    assert judged["batch"]["r2"] > 0.7


@pytest.mark.parametrize("rule", ARCHITECTURES)
def test_ours_trains_by_every_rule(planted, rule):
    forwards = quality_groupsae.train(trial(planted, rule))
    assert all(math.isfinite(judge(f, trial(planted))["r2"]) for f in forwards.values())


def test_the_judge_counts_as_its_definitions_say(planted):
    x = torch.from_numpy(np.load(planted.held_out)).double()

    def forward(rows):
        latents = torch.zeros(len(rows), 64)
        latents[:, :2] = 1.0
        latents[0, 2] = 1.0  # once in each batch
        return 0.5 * rows, latents

    judged = judge(forward, trial(planted))
    residual = (0.5 * x).square().sum() / (x - x.mean(0)).square().sum()
    assert judged["r2"] == pytest.approx(1 - float(residual), abs=1e-9)
    assert judged["l0"] == pytest.approx(2 + math.ceil(10_000 / 256) / 10_000)
    assert judged["dead"] == pytest.approx(61 / 64)


def test_equal_settings_are_our_defaults(planted):
    topk, relu = trial(planted), trial(planted, "relu")
    assert topk.learning_rate == pytest.approx(2e-4 / math.sqrt(64 / 2**14))
    assert (topk.warmup, topk.decay, topk.auxk_weight) == (0, 0, 1 / 32)
    assert relu.auxk_weight == 0
    assert Trial.from_json(topk.to_json()) == topk
    assert trial(planted, "matryoshka").prefixes[-1] == 64


def test_a_weight_is_found_where_l0_falls_as_a_power():
    weight, tried = weight_for(32, 0.05, lambda weight: 3 * weight**-0.7)
    assert 3 * weight**-0.7 == pytest.approx(32, rel=0.05)
    assert len(tried) <= 5


def test_the_weight_that_came_nearest_is_taken_when_none_is_near():
    weight, tried = weight_for(32, 1.0, lambda weight: 100.0)
    assert len(tried) == 5
    assert weight == 1.0


def found(library, r2, *, rule="topk", settings="equal", seed=0, batch=None):
    judged = {"r2": r2, "l0": 32.0, "dead": 0.25}
    by_batch = {} if batch is None else {"batch": judged | {"r2": batch}}
    result = {"seconds": 60.0, "steps": 439, "inference": judged, **by_batch}
    return Found(library, rule, settings, seed, None, result)


OURS = [found("groupsae", 0.80), found("groupsae", 0.82, seed=1)]


def test_the_table_has_a_row_for_each_library_and_settings():
    peers = [found("sae-lens", 0.79), found("sae-lens", 0.7, settings="own")]
    failed = Found("sparsify", "topk", "equal", 0, None, None, "exit code 1")
    (table,) = tables(Quality(["heading"], [*peers, *OURS, failed]))
    assert [row[0] for row in table.rows] == [
        "groupsae",
        "sae-lens",
        "sae-lens, own defaults",
        "sparsify",
    ]
    assert table.rows[0][1:] == ["2", "0.8100 ± 0.0100", "32.0", "25.0%", "–", "60"]
    assert table.rows[3][1:3] == ["0", "–"]
    assert any("sparsify" in note and "exit code 1" in note for note in table.notes)


@pytest.mark.parametrize(
    ("peer", "word"), [(0.80, "as good"), (0.825, "as good"), (0.78, "better"), (0.84, "worse")]
)
def test_the_verdict_weighs_the_difference_against_the_seeds(peer, word):
    line = verdict(rows_of([*OURS, found("sae-lens", peer), found("sparsify", 0.1)], "topk"))
    assert "sae-lens" in line
    assert line.endswith(word)


def test_own_defaults_are_weighed_apart_from_equal_settings():
    peers = [found("sae-lens", 0.7), found("sparsify", 0.9, settings="own")]
    equal, own = verdict(rows_of([*OURS, *peers], "topk")).split("; ")
    assert "(sae-lens): +0.1100" in equal
    assert equal.endswith("better")
    assert "(sparsify, own defaults): -0.0900" in own
    assert own.endswith("worse")


def test_one_seed_each_has_no_spread():
    line = verdict(rows_of([OURS[0], found("sae-lens", 0.7)], "topk"))
    assert line.endswith("+0.1000, one seed each")


def test_rules_by_batch_are_compared_at_k_latents():
    ours = found("groupsae", 0.7, rule="batchtopk", batch=0.8)
    peer = found("sae-lens", 0.9, rule="batchtopk", batch=0.75)
    assert "+0.0500" in verdict(rows_of([ours, peer], "batchtopk"))


def test_results_come_back_from_their_file(tmp_path):
    quality = Quality(["one line"], OURS)
    quality.save(tmp_path / "quality.json")
    assert Quality.read(tmp_path / "quality.json") == quality


def run(monkeypatch, *arguments: object) -> int:
    """Exit code of `python -m benchmarks.peers_quality ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["peers_quality", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        command_line.main()
    return stop.value.code or 0


@pytest.fixture
def launched(monkeypatch, planted):
    """Rows are there and every driver answers at once; what was asked of them."""
    asked = []

    def answer(python, driver, trial):
        asked.append((driver, trial))
        if driver == "quality_sparsify":
            raise DriverFailed("exit code 1")
        return found("", 0.5).result

    monkeypatch.setattr(command_line, "launch", answer)
    monkeypatch.setattr(command_line, "prepare_rows", lambda source, work: planted)
    return asked


def test_a_peer_without_an_environment_is_named_and_left_out(
    monkeypatch, tmp_path, capsys, launched
):
    nowhere = {"groupsae": {"groupsae": "1.0", "torch": "2.0"}}
    monkeypatch.setattr(
        "benchmarks.contestants.installed", lambda python, names: nowhere.get(names[0], {})
    )
    code = run(monkeypatch, "--work", tmp_path, "--rules", "topk", "--seeds", 2, "--k", 4)
    said = capsys.readouterr()
    assert code == 0
    assert [driver for driver, _ in launched] == ["quality_groupsae"] * 2
    assert [trial.seed for _, trial in launched] == [0, 1]
    for name in ("sparsify", "sae-lens", "dictionary-learning"):
        assert f"left out: {name}" in said.err
    assert "| groupsae | 2 |" in said.out
    assert len(Quality.read(tmp_path / "quality.json").found) == 2


def test_a_peer_that_fails_is_named_and_the_others_go_on(monkeypatch, tmp_path, capsys, launched):
    monkeypatch.setattr(
        "benchmarks.contestants.installed", lambda _, names: dict.fromkeys(names, "1.0")
    )
    code = run(monkeypatch, "--work", tmp_path, "--rules", "topk,relu", "--seeds", 1, "--k", 32)
    assert code == 0
    assert "failed: sparsify, seed 0: exit code 1" in capsys.readouterr().out
    by_rule = [(driver, trial.rule) for driver, trial in launched]
    assert ("quality_sparsify", "relu") not in by_rule
    assert ("quality_dictionary_learning", "relu") in by_rule


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rules", "topk,toppk"], "--rules toppk: give some of topk, batchtopk"),
        (["--contestants", "saelens"], "--contestants saelens: give some of groupsae, sparsify"),
        (["--settings", "best"], "--settings best: give equal, own or both"),
        (["--seeds", "0"], "--seeds 0: give at least 1"),
        (["--tokens", "many"], "--tokens many: give a number such as 900k"),
        (["--tokens", "1k"], "--tokens 1k: less than one batch of --batch 2048"),
        (["--python", "sparsify=/nowhere/python"], "there is no such file"),
        (["--show", "/nowhere/quality.json"], "--show /nowhere/quality.json: cannot be read"),
    ],
)
def test_bad_input_is_one_message(monkeypatch, tmp_path, capsys, arguments, message):
    assert run(monkeypatch, "--work", tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


def test_rows_are_normalised_shuffled_and_made_once(tmp_path, tiny_host_folder, tiny_text):
    source = Source(str(tiny_host_folder), str(tiny_text), None, 3000, 500, 16)
    rows = prepare_rows(source, tmp_path)
    train, held_out = np.load(rows.train), np.load(rows.held_out)
    assert (rows.layer, rows.d_model) == (1, 32)  # of layers 0, 1, 2
    assert train.shape == (3000, 32)
    assert held_out.shape == (500, 32)
    assert np.abs(train.mean(0)).max() < 1e-5
    assert np.linalg.norm(train, axis=1).mean() == pytest.approx(1, abs=1e-5)
    written = rows.train.stat().st_mtime_ns
    assert prepare_rows(source, tmp_path).train.stat().st_mtime_ns == written
