from __future__ import annotations

import sys

import pytest

import benchmarks.__main__ as command_line
from benchmarks import contestants
from benchmarks.rounds import DriverFailed
from tests.benchmarks.made_up import turn


def run(monkeypatch, *arguments: str) -> int:
    """Exit code of `python -m benchmarks ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as stop:
        command_line.main()
    return stop.value.code or 0


@pytest.fixture
def launched(monkeypatch):
    """Every library is installed, and its driver answers at once; the tasks that it was given."""
    given = []

    def launch(python, driver, task):
        given.append((driver, task))
        if driver == "ceiling":
            return {"gflops": {"float32 F.linear": 400.0}}
        return turn("", 1, {"sparsify_": 30.0}.get(driver, 10.0)).result

    monkeypatch.setattr(command_line, "launch", launch)
    monkeypatch.setattr(contestants, "installed", lambda _, names: dict.fromkeys(names, "1.0"))
    monkeypatch.setattr(command_line, "busy_seconds", lambda: None)
    monkeypatch.setattr(command_line.Quiet, "wait", lambda _: True)
    return given


@pytest.fixture
def tiny(tmp_path):
    return (
        *("--shape", "tiny", "--context", "16", "--tokens", "64", "--work", str(tmp_path)),
        *("--repeats", "0", "--threads", "1"),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "gpt2"], "--shape gpt2: there is no such shape"),
        (["--device", "tpu"], "--device tpu: give cpu or cuda"),
        (["--rounds", "0"], "--rounds 0: give at least 1"),
        (["--warm", "0"], "--warm 0: give at least 1"),
        (["--tokens", "1000"], "--tokens 1000: a step takes whole contexts"),
        (["--k", "9000"], "--k 9000: there are only 8192 latents"),
        (["--dead", "1"], "--dead 1.0: a share of latents"),
        (["--groups", "6"], "--groups 6: '6' is no number of groups; there are 5 layers"),
        (["--contestants", "sparsfy"], "--contestants sparsfy: .* did you mean sparsify"),
        (["--python", "sparsify=/no"], "--python sparsify=/no: there is no such file"),
        (["--busy", "0"], "--busy 0.0: a number of cores"),
        (["--repeats", "-1"], "--repeats -1: give 0 or more"),
        (["--show", "/no/where"], "--show /no/where: cannot be read"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(monkeypatch, capsys, arguments, message):
    assert run(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert message.partition(" .* ")[0] in said[0]
    assert message.rpartition(" .* ")[2] in said[0]


def test_a_gpu_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(command_line.torch.cuda, "is_available", lambda: False)
    assert run(monkeypatch, "--device", "cuda") == 2
    assert "--device cuda: PyTorch finds no GPU here" in capsys.readouterr().err


def test_everyone_gets_the_same_work(monkeypatch, launched, tiny):
    assert run(monkeypatch, *tiny, "--rounds", "2", "--steps", "3") == 0
    drivers = [driver for driver, _ in launched]
    assert drivers[: len(drivers) // 2] == drivers[len(drivers) // 2 :]  # in turns
    assert drivers[:5] == ["ceiling", "groupsae_", "groupsae_", "groupsae_", "sparsify_"]
    for _, task in launched:
        assert (task.layers, task.groups) == ((0, 1), ((0,), (1,)))
        assert (task.batch_tokens, task.k, task.d_sae, task.steps) == (64, 4, 512, 3)
    assert {task.kernel for driver, task in launched if driver == "groupsae_"} == {"torch", "cpu"}


def test_tables_and_lines_are_written_and_can_be_shown_again(
    monkeypatch, capsys, launched, tiny, tmp_path
):
    out = tmp_path / "out"
    assert (
        run(monkeypatch, *tiny, "--contestants", "groupsae-torch,sparsify", "--out", str(out)) == 0
    )
    printed = capsys.readouterr().out
    assert "| groupsae-torch | 1.00 (1.00–1.00) | 3.00 (3.00–3.00) |" in printed
    assert (out / "benchmark.md").read_text().strip() == printed.strip()
    assert len((out / "benchmark.jsonl").read_text().splitlines()) == 1 + 3 * 3

    launched.clear()
    assert run(monkeypatch, "--show", str(out / "benchmark.jsonl")) == 0
    assert capsys.readouterr().out == printed
    assert launched == []


def test_groups_are_run_by_groupsae_alone(monkeypatch, launched, tiny):
    assert run(monkeypatch, *tiny, "--rounds", "1", "--groups", "1,all") == 0
    tasks = [task for driver, task in launched if driver == "groupsae_"]
    assert [driver for driver, _ in launched].count("groupsae_") == len(launched) - 1 == 6
    assert [task.groups for task in tasks[:2]] == [((0, 1),), ((0,), (1,))]


def test_dead_latents_are_a_second_run_of_everyone(monkeypatch, launched, tiny):
    names = "groupsae-torch,sparsify"
    assert run(monkeypatch, *tiny, "--rounds", "1", "--contestants", names, "--dead", "0.1") == 0
    dead = [(driver, task.dead) for driver, task in launched[1:]]
    assert dead == [("groupsae_", 0.0), ("sparsify_", 0.0), ("groupsae_", 0.1), ("sparsify_", 0.1)]


def test_a_failure_is_told_and_is_the_exit_code(monkeypatch, capsys, launched, tiny):
    launch = command_line.launch

    def fail(python, driver, task):
        if driver == "sparsify_":
            raise DriverFailed("exit code 1\nno memory")
        return launch(python, driver, task)

    monkeypatch.setattr(command_line, "launch", fail)
    names = "groupsae-torch,sparsify"
    assert run(monkeypatch, *tiny, "--contestants", names) == 1
    assert "failed: sparsify: exit code 1" in capsys.readouterr().out
