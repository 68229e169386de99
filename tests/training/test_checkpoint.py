from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file

from groupsae.config import TrainingConfig
from groupsae.errors import InputError, Interrupted
from groupsae.files import save_tensors
from groupsae.sae import SAE, SAEConfig
from groupsae.training.batches import MixedBatches
from groupsae.training.checkpoint import Checkpoints
from groupsae.training.learner import Learner
from groupsae.training.trainer import train

CONFIG = TrainingConfig(
    tokens=2560,
    batch_tokens=128,
    buffer_tokens=512,
    learning_rate=1e-3,
    log_every=4,
    checkpoint_every=6,
    dead_after_tokens=256,
)


class Stopped(Exception):
    pass


def learners_and_batches(host, corpus, sampling="uniform"):
    saes = {
        name: SAE(
            SAEConfig(d_model=32, d_sae=64, k=4, layers=layers),
            generator=torch.Generator().manual_seed(len(layers)),
        )
        for name, layers in {"layers-00-01": (0, 1), "baseline/layers-01": (1,)}.items()
    }
    batches = MixedBatches(
        host,
        corpus.train(),
        saes,
        total_tokens=CONFIG.tokens,
        batch_tokens=CONFIG.batch_tokens,
        buffer_tokens=CONFIG.buffer_tokens,
        contexts=8,
        special=(0,),
        layer_sampling=sampling,
    )
    return {name: Learner(sae, CONFIG) for name, sae in saes.items()}, batches


def run(host, corpus, directory, *, stop_at=None, config="this", sampling="uniform"):
    """Train two SAEs; stop with an exception when the given step would be logged."""
    learners, batches = learners_and_batches(host, corpus, sampling)
    records = []

    def log(record):
        if stop_at is not None and record["step"] >= stop_at:
            raise Stopped
        records.append(record)

    train(learners, batches, CONFIG, checkpoints=Checkpoints(directory, config), log=log)
    return learners, records


def weights(learners):
    return {
        f"{name}.{key}": tensor
        for name, learner in learners.items()
        for key, tensor in learner.state().items()
    }


@pytest.mark.parametrize(
    ("stop_at", "sampling"), [(8, "uniform"), (16, "uniform"), (16, "balanced"), (16, "all")]
)
def test_a_stopped_run_continues_to_the_same_bits(host, corpus, tmp_path, stop_at, sampling):
    expected, _ = run(host, corpus, tmp_path / "whole", sampling=sampling)
    with pytest.raises(Stopped):
        run(host, corpus, tmp_path / "stopped", stop_at=stop_at, sampling=sampling)
    assert Checkpoints(tmp_path / "stopped", "this").begun == stop_at // 6 * 6
    continued, records = run(host, corpus, tmp_path / "stopped", sampling=sampling)
    assert records[0]["step"] > stop_at // 6 * 6
    for name, tensor in weights(expected).items():
        assert torch.equal(tensor, weights(continued)[name]), name


def test_only_the_newest_checkpoints_stay(host, corpus, tmp_path):
    run(host, corpus, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000012", "step-000018"]


@pytest.fixture(scope="module")
def trained(host, corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    run(host, corpus, directory)
    return directory


FILES = [
    "state.json",
    "batches.safetensors",
    "batches.layers-00-01.safetensors",
    "batches.baseline.layers-01.safetensors",
    "layers-00-01.safetensors",
    "baseline.layers-01.safetensors",
]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "deleted", "empty"])
@pytest.mark.parametrize("name", FILES)
def test_whichever_file_is_damaged_is_named_and_an_older_checkpoint_continues(
    host, corpus, trained, tmp_path, caplog, monkeypatch, damage, name
):
    monkeypatch.setattr(logging.getLogger("groupsae"), "propagate", True)
    copy = shutil.copytree(trained, tmp_path / "copy")
    file = copy / "step-000018" / name
    content = bytearray(file.read_bytes())
    if damage == "deleted":
        file.unlink()
    else:
        half = len(content) // 2
        content[half] ^= 1
        file.write_bytes({"truncated": content[:half], "flipped": content, "empty": b""}[damage])
    flipped_json = name == "state.json" and damage == "flipped"
    if not flipped_json:  # which may be as good as before
        assert Checkpoints(copy, "this").begun == 12
        assert f"step-000018 is damaged ({name}) and passed over" in caplog.text


def test_damaged_checkpoints_do_not_crowd_out_new_ones(host, corpus, trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    for directory in copy.iterdir():
        (directory / "batches.safetensors").write_bytes(b"")
    with pytest.raises(Stopped):
        run(host, corpus, copy, stop_at=8)  # from the beginning, to the checkpoint of step 6
    assert [path.name for path in copy.iterdir()] == ["step-000006"]
    assert Checkpoints(copy, "this").begun == 6


def test_the_newest_checkpoint_is_that_of_the_highest_step(host, corpus, tmp_path):
    learners, batches = learners_and_batches(host, corpus)
    learners["layers-00-01"].step(torch.randn(64, 32))
    checkpoints = Checkpoints(tmp_path, "this", kept=1)
    for step in (999_500, 1_000_000):
        checkpoints.save(step, 0.0, learners, batches)
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step-1000000"]
    assert Checkpoints(tmp_path, "this").begun == 1_000_000


def test_every_file_of_a_checkpoint_is_tested(trained):
    assert {path.name for path in (trained / "step-000018").iterdir()} == set(FILES)


def test_from_behind_a_damaged_checkpoint_the_same_bits_come(host, corpus, trained, tmp_path):
    expected, _ = run(host, corpus, tmp_path / "whole")
    copy = shutil.copytree(trained, tmp_path / "copy")
    (copy / "step-000018" / "batches.safetensors").write_bytes(b"")
    continued, _ = run(host, corpus, copy)
    for name, tensor in weights(expected).items():
        assert torch.equal(tensor, weights(continued)[name]), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_step_and_loses_nothing(host, corpus, tmp_path, monkeypatch, number):
    expected, _ = run(host, corpus, tmp_path / "whole")
    before = signal.signal(
        number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler
    )
    original = Learner.step

    def signalled(self, x, members=None):
        if self.steps == 9 and len(self.sae.layers) == 1:  # at the end of step 10
            os.kill(os.getpid(), number)
        return original(self, x, members)

    monkeypatch.setattr(Learner, "step", signalled)
    try:
        with pytest.raises(Interrupted, match=number.name) as stopped:
            run(host, corpus, tmp_path / "stopped")
    finally:
        signal.signal(number, before)
    assert stopped.value.exit_code == 128 + number
    monkeypatch.undo()
    assert Checkpoints(tmp_path / "stopped", "this").begun == 10
    continued, _ = run(host, corpus, tmp_path / "stopped")
    for name, tensor in weights(expected).items():
        assert torch.equal(tensor, weights(continued)[name]), name


def test_a_disk_that_fills_up_costs_at_most_an_interval(host, corpus, tmp_path, monkeypatch):
    expected, _ = run(host, corpus, tmp_path / "whole")
    saves = []

    def full(tensors, path):
        saves.append(path)
        if ".step-000012" in str(path) and "baseline" in path.name:
            path.write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_tensors(tensors, path)

    monkeypatch.setattr("groupsae.training.checkpoint.save_tensors", full)
    with pytest.raises(InputError, match=r"step-000012 cannot be written: No space left"):
        run(host, corpus, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["step-000006"]
    monkeypatch.undo()
    continued, _ = run(host, corpus, tmp_path / "full")
    for name, tensor in weights(expected).items():
        assert torch.equal(tensor, weights(continued)[name]), name


@pytest.mark.parametrize("in_background", [True, False])
def test_a_checkpoint_holds_the_moment_it_was_asked_for(
    host, corpus, tmp_path, monkeypatch, in_background
):
    """Training goes on while it is written, and must not change it."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(tensors, path):
        begun.set()
        assert go_on.wait(20) or not in_background
        save_tensors(tensors, path)

    learners, batches = learners_and_batches(host, corpus)
    learners["layers-00-01"].step(torch.randn(64, 32))
    expected = {key: t.clone() for key, t in learners["layers-00-01"].state().items()}
    monkeypatch.setattr("groupsae.training.checkpoint.save_tensors", slow)
    if not in_background:
        go_on.set()
    checkpoints = Checkpoints(tmp_path, "this", in_background=in_background)
    checkpoints.save(1, 0.0, learners, batches)
    assert begun.wait(20)
    learners["layers-00-01"].step(torch.randn(64, 32))
    go_on.set()
    checkpoints.close()
    found = load_file(tmp_path / "step-000001" / "layers-00-01.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_checkpoints_of_another_config_are_never_continued(host, corpus, tmp_path):
    run(host, corpus, tmp_path)
    assert Checkpoints(tmp_path, "other").begun == 0
    with pytest.raises(Stopped):
        run(host, corpus, tmp_path, config="other", stop_at=4)
    assert not list(tmp_path.iterdir())


def test_checkpoints_of_another_version_are_named_and_passed_over(
    trained, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("groupsae"), "propagate", True)
    copy = shutil.copytree(trained, tmp_path / "copy")
    for file in copy.glob("step-*/state.json"):
        state = json.loads(file.read_text())
        del state["format"]  # as before there were formats
        file.write_text(json.dumps(state))
    assert Checkpoints(copy, "this").begun == 0
    assert "step-000018 is of another version of groupsae and passed over" in caplog.text


def test_a_half_written_checkpoint_is_never_taken_for_one(tmp_path):
    aside = tmp_path / ".step-000030.tmp"
    aside.mkdir()
    (aside / "state.json").write_text(json.dumps({"step": 30}))
    assert Checkpoints(tmp_path, "this").begun == 0


def test_records_hold_one_line_per_sae_and_logged_step(host, corpus, tmp_path):
    _, records = run(host, corpus, tmp_path)
    assert [record["step"] for record in records] == [4, 4, 8, 8, 12, 12, 16, 16, 20, 20]
    assert {record["sae"] for record in records} == {"layers-00-01", "baseline/layers-01"}
    for record in records:
        assert record["tokens"] == record["step"] * 128
        assert 0 < record["fvu"] < 2


def broken_from(host, monkeypatch, step, until=10**6):
    """Let the host model give NaN at layer 1 in the batches of some steps."""
    original = MixedBatches.next
    taken = []

    def next_(self):
        taken.append(None)
        batch = original(self)
        if step <= len(taken) < until:
            self.finite[1] = False
            for mixed in batch.values():
                mixed.x[3] = float("nan")
        return batch

    monkeypatch.setattr(MixedBatches, "next", next_)


def test_a_few_broken_batches_are_dropped_and_counted(host, corpus, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("groupsae"), "propagate", True)
    broken_from(host, monkeypatch, step=3, until=6)
    learners, records = run(host, corpus, tmp_path)
    assert [learner.n_dropped for learner in learners.values()] == [3, 3]
    assert all(t.isfinite().all() for t in weights(learners).values())
    assert [r["dropped"] for r in records if r["sae"] == "layers-00-01"] == [2, 3, 3, 3, 3]
    assert "gave NaN or infinite activations: 3 batches of" in caplog.text


def test_too_many_end_the_run_and_the_good_weights_are_kept(host, corpus, tmp_path, monkeypatch):
    broken_from(host, monkeypatch, step=3)
    with pytest.raises(InputError, match=r"max_dropped_batches=10: layer 1 .* 14 batches"):
        run(host, corpus, tmp_path)
    monkeypatch.undo()
    assert Checkpoints(tmp_path, "this").begun == 16
    learners, batches = learners_and_batches(host, corpus)
    Checkpoints(tmp_path, "this").restore(learners, batches)
    assert all(t.isfinite().all() for t in weights(learners).values())
