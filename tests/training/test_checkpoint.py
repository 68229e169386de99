from __future__ import annotations

import json

import pytest
import torch

from groupsae.config import TrainingConfig
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


def run(host, corpus, directory, *, stop_at=None, config="this", sampling="uniform"):
    """Train two SAEs; stop with an exception when the given step would be logged."""
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
    learners = {name: Learner(sae, CONFIG) for name, sae in saes.items()}
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
    assert Checkpoints(tmp_path / "stopped", "this").step() == stop_at // 6 * 6
    continued, records = run(host, corpus, tmp_path / "stopped", sampling=sampling)
    assert records[0]["step"] > stop_at // 6 * 6
    for name, tensor in weights(expected).items():
        assert torch.equal(tensor, weights(continued)[name]), name


def test_only_the_newest_checkpoints_stay(host, corpus, tmp_path):
    run(host, corpus, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000012", "step-000018"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no state", "half state"])
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(host, corpus, tmp_path, damage):
    run(host, corpus, tmp_path)
    newest = tmp_path / "step-000018"
    tensors, state = newest / "state.safetensors", newest / "state.json"
    if damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "flipped":
        content = bytearray(tensors.read_bytes())
        content[-5] ^= 1
        tensors.write_bytes(content)
    elif damage == "no state":
        state.unlink()
    else:
        state.write_text(state.read_text()[:50])
    assert Checkpoints(tmp_path, "this").step() == 12


def test_checkpoints_of_another_config_are_never_continued(host, corpus, tmp_path):
    run(host, corpus, tmp_path)
    assert Checkpoints(tmp_path, "other").step() == 0
    with pytest.raises(Stopped):
        run(host, corpus, tmp_path, config="other", stop_at=4)
    assert not list(tmp_path.iterdir())


def test_a_half_written_checkpoint_is_never_taken_for_one(tmp_path):
    aside = tmp_path / ".step-000030.tmp"
    aside.mkdir()
    (aside / "state.json").write_text(json.dumps({"step": 30}))
    assert Checkpoints(tmp_path, "this").step() == 0


def test_records_hold_one_line_per_sae_and_logged_step(host, corpus, tmp_path):
    _, records = run(host, corpus, tmp_path)
    assert [record["step"] for record in records] == [4, 4, 8, 8, 12, 12, 16, 16, 20, 20]
    assert {record["sae"] for record in records} == {"layers-00-01", "baseline/layers-01"}
    for record in records:
        assert record["tokens"] == record["step"] * 128
        assert 0 < record["fvu"] < 2
