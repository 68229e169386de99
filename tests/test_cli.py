from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from groupsae.config import keys

CONFIGS = Path(__file__).parents[1] / "configs"


def test_the_whole_job_and_then_every_stage_by_itself(groupsae, tiny_config, tmp_path):
    code, out, err = groupsae("run", *tiny_config, "--out", tmp_path / "run")
    assert code == 0, err
    assert "chosen: G = 2" in out
    assert "CELS" in out
    assert str(tmp_path / "run" / "report.html") in out
    for stage in ("distances", "groups", "train", "evaluate", "report"):
        code, _, err = groupsae(stage, tmp_path / "run")
        assert code == 0, err
        assert "already done" in err


def test_a_run_that_must_fail_late_is_refused_at_once(groupsae, tiny_config, tmp_path):
    code, _, err = groupsae("run", *tiny_config, "evaluation.tokens=50M", "-o", tmp_path / "run")
    assert code == 2
    assert "evaluation.tokens=50000000" in err
    assert not (tmp_path / "run" / "distances.json").exists()


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ([], "a sweep varies at least one key"),
        (["sae.k"], "--vary 'sae.k': write KEY=VALUE,VALUE"),
        (["sae.k=[1"], "--vary sae.k: '[1' cannot be read as values"),
        (["sae.k="], "sae.k: no value is given"),
        (["sae.k=4", "sae.k=8"], "--vary sae.k: given twice"),
        (["sae.k=4,4"], "k-4: given twice; give each value once"),
        (["sae.kk=4,8"], "sae.kk = None: there is no such key; did you mean sae.k?"),
        (["sae=4,8"], "sae = None: this is a section"),
        (["training.tokens=4096,8192"], "training.tokens: cannot vary within a sweep"),
        (["training.batch_tokens=128"], "training.batch_tokens: cannot vary within a sweep"),
        (["host.name=a,b"], "host.name: cannot vary within a sweep"),
        (["grouping.groups=1,2"], "grouping.groups: cannot vary within a sweep"),
        (["sae.k=4,many"], "sweep member sae.k=many: sae.k = 'many'"),
        (["sae.k=4,64"], "sweep member sae.k=64: sae.k: 64 is more than sae.d_sae = 48"),
        (
            ["sae.architecture=topk,jumprelu", "sae.k=8"],
            "sweep member sae.architecture=jumprelu sae.k=8: sae.k: 8 does not go with "
            "sae.architecture=jumprelu",
        ),
        (["sae.expansion=2,4"], "sae.expansion: 2 changes nothing beside sae.d_sae = 48"),
        (["sae.d_sae=8,null", "sae.k=2,600"], "sweep member sae.d_sae=8 sae.k=600"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_any_work(
    groupsae, tiny_config, tmp_path, vary, message
):
    options = [part for text in vary for part in ("--vary", text)]
    code, _, err = groupsae("sweep", *tiny_config, *options, "--out", tmp_path / "run")
    assert code == 2
    assert message in err
    assert not (tmp_path / "run" / "distances.json").exists()


def test_a_sweep_that_does_not_fit_the_host_is_refused_before_any_work(
    groupsae, tiny_config, tmp_path
):
    code, _, err = groupsae(
        "sweep", *tiny_config, "sae.d_sae=null", "--vary", "sae.k=4,600", "-o", tmp_path / "run"
    )
    assert code == 2
    assert "sweep member k-600: sae.k: 600 is more than d_sae = 512" in err
    assert not (tmp_path / "run" / "distances.json").exists()


def test_help_shows_every_key_with_meaning_and_default(groupsae):
    _, out, _ = groupsae("run", "--help")
    words = " ".join(out.split())
    for path, _, default, _ in keys():
        assert path in words
        assert re.search(rf"{re.escape(path)} \([^()]*\(?[^()]*\)?[^()]*default", words), path
        if isinstance(default, int | float | str):
            assert str(default) in words


@pytest.mark.parametrize(
    ("model", "A", "T", "G", "saved"),
    [
        ("160m", "207.62", "94.37", 6, "38%"),
        ("410m", "704.64", "167.77", 9, "51%"),
        ("1b", "1,744.83", "671.09", 6, "51%"),
    ],
)
def test_plan_prints_the_published_costs(groupsae, model, A, T, G, saved):
    code, out, _ = groupsae("plan", CONFIGS / f"pythia-{model}.yaml")
    assert code == 0
    assert f"A = {A} PFLOP" in out
    assert f"T = {T} PFLOP" in out
    row = next(line for line in out.splitlines() if re.match(rf"\W+{G} ", line))
    assert saved in row


def test_plan_prints_the_memory_without_loading_the_host(groupsae, monkeypatch):
    monkeypatch.setattr("groupsae.host.model.HostModel.load", None)
    file = CONFIGS / "pythia-160m.yaml"
    code, out, _ = groupsae("plan", file, "grouping.groups=6", "training.baseline=false")
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("memory"))
    blocks = 12 * 12 * 768**2 * 4
    weights = (2 * 768 * 12_288 + 768 + 12_288) * 4
    buffer = 6 * (262_144 + 16 * 1024) * 768 * 4
    assert line.startswith(f"memory for G = 6: host {blocks / 1e6:.0f} MB, 6 SAEs with Adam ")
    assert f"Adam {6 * 3 * weights / 1e9:.1f} GB" in line
    assert f"buffer {buffer / 1e9:.1f} GB" in line
    assert "without embeddings" in line
    total = re.search(r": ([\d.]+ GB) in all", line)[1]
    assert total in next(row for row in out.splitlines() if re.match(r"\W+6 ", row))


def test_plan_takes_the_weights_of_a_host_that_is_loaded(groupsae, tiny_host_folder):
    _, out, _ = groupsae("plan", f"host.name={tiny_host_folder}")
    weights = sum(
        tensor.nbytes for tensor in load_file(tiny_host_folder / "model.safetensors").values()
    )
    line = next(line for line in out.splitlines() if line.startswith("memory"))
    assert f"G = 2 with a baseline, at most: host {weights / 1e3:.0f} kB, 2 SAEs with" in line
    assert "without embeddings" not in line


@pytest.mark.parametrize("asked", ["grouping.groups=3", "grouping.partition=0-2,3,4-6"])
def test_plan_counts_the_planned_groups_and_their_baseline(groupsae, asked):
    _, out, _ = groupsae("plan", "host.n_layers=8", "host.d_model=128", asked)
    assert "memory for G = 3 with a baseline, at most: host 6 MB, 10 SAEs with Adam" in out


def test_groups_of_a_matrix_from_elsewhere(groupsae, tmp_path):
    path = tmp_path / "distances.npy"
    np.save(path, np.array([[0, 0, 0], [0.1, 0, 0], [0.4, 0.35, 0]]))
    code, out, _ = groupsae("groups", "--distances", path, "grouping.threshold=0.2")
    assert code == 0
    assert "chosen: G = 2" in out
    assert "0-1  2" in out
    assert not (tmp_path / "run").exists()
    code, _, _ = groupsae("groups", "--distances", path, "--out", tmp_path / "run")
    assert code == 0
    assert json.loads((tmp_path / "run" / "partition.json").read_text())["chosen"] == 2


@pytest.mark.parametrize(
    ("kind", "predicted"),
    [
        ({"center": True}, True),
        ({"center": False}, False),
        ({"center": True, "similarity": "cka"}, False),
        ({}, False),
    ],
)
def test_groups_and_plan_predict_losses_from_centred_angles_alone(
    groupsae, tmp_path, kind, predicted
):
    path = tmp_path / "distances.json"
    matrix = [[0, 0.2, 0.4], [0.2, 0, 0.3], [0.4, 0.3, 0]]
    path.write_text(json.dumps({"layers": [0, 1, 2], "matrix": matrix, **kind}))
    sizes = ["host.n_layers=4", "host.d_model=32", "sae.k=8"]
    _, groups, _ = groupsae("groups", "--distances", path, "-o", tmp_path / "run", *sizes)
    code, plan, err = groupsae("plan", tmp_path / "run", "training.tokens=1M")
    assert code == 0, err
    for out in (groups, plan):
        said = " ".join(out.split())
        if predicted:  # 0.138 * 0.4 * 2/3, 0.0496 * 0.4^2; G = 2: 0.2 * 1/2 * 2/3, 0.2^2 * 2/3
            assert re.search(r"0\.0368 \(0\.0287–0\.0684\).*0\.0079 \(0\.0054–0\.0103\)", said)
            assert re.search(r"0\.0092 \(0\.0072–0\.0171\).*0\.0013 \(0\.0009–0\.0017\)", said)
            assert "predicted from Pythia TopK SAEs at 1B tokens, angular centred distances" in said
        else:
            assert "No loss is predicted" in said
            assert "of CELS" not in said
    _, other, _ = groupsae("plan", tmp_path / "run", "grouping.distance_tokens=1M")
    assert "redicted loss" not in other  # other distances than the run's are asked for
    assert "oss is predicted" not in other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "sae.kk=3"], "did you mean sae.k?"),
        (["run", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["run", "nowhere"], "nowhere is neither a config file nor the directory of a run"),
        (["run", "a.yaml", "b.yaml"], "'b.yaml' is no KEY=VALUE"),
        (["run", "host.name=./nowhere"], "nowhere"),
        (["groups", "--distances", "nowhere.npy"], "nowhere.npy"),
        (["frobnicate"], "No such command"),
        (["run", "--frobnicate"], "No such option"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    groupsae, arguments, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, _, err = groupsae(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_an_interrupt_is_exit_code_130(groupsae, tiny_config, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("groupsae.run.Run.distances", interrupt)
    code, _, err = groupsae("run", *tiny_config, "--out", tmp_path / "run")
    assert code == 130
    assert "the same command continues" in err
    assert "Traceback" not in err


def test_a_full_disk_is_said_and_costs_nothing_finished(
    groupsae, tiny_config, tmp_path, monkeypatch
):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device", "state.safetensors")

    monkeypatch.setattr("groupsae.training.session.train", full)
    code, _, err = groupsae("run", *tiny_config, "--out", tmp_path / "run")
    assert code == 2
    assert "state.safetensors cannot be read or written: No space left on device" in err
    assert (tmp_path / "run" / "partition.json").exists()


def test_an_error_of_the_program_itself_is_not_hidden(groupsae, tiny_config, tmp_path, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("groupsae.run.Run.distances", broken)
    with pytest.raises(ZeroDivisionError):
        groupsae("run", *tiny_config, "--out", tmp_path / "run")


def test_a_narrow_terminal_costs_no_digits(groupsae, tmp_path, monkeypatch):
    matrix = np.linspace(0.101, 0.9, 20 * 20).reshape(20, 20)
    np.save(tmp_path / "distances.npy", np.tril(matrix, -1))
    monkeypatch.setenv("COLUMNS", "40")
    code, out, _ = groupsae("groups", "--distances", tmp_path / "distances.npy")
    assert code == 0
    assert "…" not in out
    assert "  ".join(map(str, range(20))) in out


def test_names_are_no_markup(groupsae, tiny_config, tmp_path):
    directory = tmp_path / "[red]x [bold]"
    code, _, err = groupsae("evaluate", *tiny_config, "--out", directory)
    assert code == 2
    assert "[red]x [bold] holds no training.json" in err
    code, out, _ = groupsae("plan", "host.name='[red]x'", "host.n_layers=4", "host.d_model=64")
    assert code == 0
    assert out.startswith("[red]x: 4 layers")


def test_a_plan_of_what_cannot_be_is_refused(groupsae):
    code, _, err = groupsae("plan", "host.n_layers=4", "host.d_model=8", "sae.k=200")
    assert code == 2
    assert "sae.k: 200 is more than d_sae = 128" in err


def test_as_a_program_of_its_own(tmp_path):
    def call(*arguments, **environment):
        return subprocess.run(
            [sys.executable, "-c", "from groupsae.cli import main; main()", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "NO_COLOR": "1", **environment},
            timeout=120,
        )

    wrong = call("run", "training.tokn=3")
    assert wrong.returncode == 2
    assert wrong.stderr.strip() == (
        "groupsae: training.tokn = 3: there is no such key; did you mean training.tokens?"
    )
    assert call("--version").stdout.strip() == "groupsae 0.1.0"
    ascii_only = call("run", "--help", PYTHONIOENCODING="ascii")
    assert ascii_only.returncode == 0
    assert ascii_only.stderr == ""
