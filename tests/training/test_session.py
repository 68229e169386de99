from __future__ import annotations

import json
import threading

import pytest
import torch

from groupsae.config import Config
from groupsae.errors import InputError
from groupsae.grouping.distance import Moments
from groupsae.host.tokens import EndOfText
from groupsae.sae import SAE
from groupsae.sae.kernels import cpu
from groupsae.training.batches import MixedBatches
from groupsae.training.memory import MemoryAccount
from groupsae.training.session import Entry, train_entries, train_saes

GROUPS = [(0, 1), (2,)]
TRAINING = {
    "batch_tokens": 128,
    "buffer_tokens": 256,
    "tokens": 512,
    "host_batch_contexts": 4,
    "kernel": "torch",
}

METRICS = {"fvu": 0.5, "dropped": 0}


def make_config(**keys):
    """Overrides by path, with `__` for the dot."""
    values = {"sae": {"k": 4, "d_sae": 48}, "training": dict(TRAINING)}
    for path, value in keys.items():
        section, _, key = path.partition("__")
        values[section][key] = value
    if values["sae"].get("architecture", "topk") in ("relu", "jumprelu", "gated"):
        del values["sae"]["k"]
    return Config.parse(values)


def moments():
    """Of three layers, each with a mean and a scale of its own."""
    mean = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norms = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    return Moments((0, 1, 2), mean, norms, norms / 2, 1000)


def train(host, corpus, directory, **training):
    """One SAE per group and layer, as a run trains them."""
    config = make_config(**{f"training__{key}": value for key, value in training.items()})
    directory.mkdir()
    return train_saes(
        host, corpus.train(), moments(), GROUPS, config, directory=directory, key="key"
    )


def train_side_by_side(host, corpus, directory, configs, config=None):
    """The groups under each config, below its name, from one forward."""
    directory.mkdir(exist_ok=True)
    entries = [
        Entry(f"{name}/{group[0]}", group, own) for name, own in configs.items() for group in GROUPS
    ]
    config = config or next(iter(configs.values()))
    return train_entries(
        host, corpus.train(), moments(), entries, config, directory=directory, key="key"
    )


def tensors(directory, *names):
    """The weights of some saved SAEs."""
    return {
        f"{name}/{key}": tensor
        for name in names
        for key, tensor in SAE.load(directory / "saes" / name).state_dict().items()
    }


def assert_same(found, expected):
    assert len(found) == len(expected)
    for (name, one), other in zip(found.items(), expected.values(), strict=True):
        assert torch.equal(one, other), name


def readers():
    return [thread for thread in threading.enumerate() if "contexts-ahead" in thread.name]


def test_its_reader_is_ended_when_it_is_done_and_when_it_fails(host, corpus, tmp_path):
    assert train(host, corpus, tmp_path / "done")["steps"] == 4
    assert not readers()
    with pytest.raises(EndOfText):
        more = {"tokens": 10**7, "buffer_tokens": 10**5, "host_batch_contexts": 512}
        train(host, corpus, tmp_path / "fails", **more)
    assert not readers()


@pytest.mark.parametrize("sampling", ["uniform", "balanced", "all"])
def test_saes_of_several_settings_are_those_of_separate_runs(host, corpus, tmp_path, sampling):
    """Shared batches change no bit, whatever the rule, width, rate or seed of the others."""
    shared = {"training__layer_sampling": sampling}
    settings = {
        "plain": {},
        "k": {"sae__k": 8},
        "wide": {"sae__d_sae": 64, "training__learning_rate": 1e-2},
        "gain": {"sae__affine": "gain"},  # its fixed part is the same
        "batchtopk": {"sae__architecture": "batchtopk"},
        "jumprelu": {"sae__architecture": "jumprelu"},
        "average": {"training__weight_average": 0.5},
    }
    configs = {name: make_config(**shared, **own) for name, own in settings.items()}
    train_side_by_side(host, corpus, tmp_path / "all", configs)
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        train_saes(
            host,
            corpus.train(),
            moments(),
            GROUPS,
            config,
            directory=tmp_path / name,
            key="key",
        )
        assert_same(
            tensors(tmp_path / "all", f"{name}/0", f"{name}/2"),
            tensors(tmp_path / name, "layers-00-01", "layers-02"),
        )


@pytest.mark.parametrize(
    "kernel",
    [
        "reference",
        pytest.param("cpu", marks=pytest.mark.skipif(not cpu.available(), reason="no compiler")),
    ],
)
def test_no_kernel_changes_the_batch_for_those_after_it(host, corpus, tmp_path, kernel):
    settings = [{"training__learning_rate": 1e-2}, {"sae__k": 8}, {}]
    configs = {str(i): make_config(training__kernel=kernel, **s) for i, s in enumerate(settings)}
    train_side_by_side(host, corpus, tmp_path / "all", configs)
    train_side_by_side(host, corpus, tmp_path / "alone", {"2": configs["2"]})
    names = ("2/0", "2/2")
    assert_same(tensors(tmp_path / "all", *names), tensors(tmp_path / "alone", *names))


def test_a_seed_of_its_own_is_that_of_the_weights(host, corpus, tmp_path):
    configs = {"0": make_config(), "1": make_config(training__seed=1)}
    train_side_by_side(host, corpus, tmp_path / "both", configs)
    first, second = (tensors(tmp_path / "both", f"{seed}/0") for seed in "01")
    assert not torch.equal(first["0/0/W_enc"], second["1/0/W_enc"])
    train_side_by_side(host, corpus, tmp_path / "1", {"1": configs["1"]}, configs["0"])
    assert_same(tensors(tmp_path / "1", "1/0"), second)


def test_batches_are_held_once_for_the_saes_that_share_them(host, corpus, tmp_path, monkeypatch):
    made = []

    class Kept(MixedBatches):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr("groupsae.training.session.MixedBatches", Kept)
    accounts = []
    monkeypatch.setattr(
        "groupsae.training.session._log.info", lambda _, account: accounts.append(account)
    )
    configs = {f"k{k}": make_config(sae__k=k, sae__d_sae=48 + k) for k in range(1, 9)}
    configs["bias"] = make_config(sae__affine="bias")
    configs["scale"] = make_config(sae__affine="scale")
    train_side_by_side(host, corpus, tmp_path, configs)
    (batches,) = made
    assert list(batches.mixtures) == ["k1/0", "k1/2", "scale/0", "scale/2"]
    (account,) = accounts
    assert isinstance(account, MemoryAccount)
    assert account.n_saes == 20
    assert account.buffer == batches.buffer.nbytes + batches.members.nbytes
    assert account.batch == 4 * 128 * (32 * 4 + 8)
    assert account.counters == 8 * 2 * (sum(range(49, 57)) + 2 * 48)


def test_entries_that_differ_in_nothing_but_their_names_are_trained_once(
    host, corpus, tmp_path, monkeypatch
):
    steps = []
    step = "groupsae.training.learner.Learner.step"
    monkeypatch.setattr(step, lambda self, x, members: steps.append(len(x)))
    monkeypatch.setattr("groupsae.training.learner.Learner.metrics", lambda self: METRICS)
    summary = train_side_by_side(host, corpus, tmp_path, {"a": make_config(), "b": make_config()})
    assert summary["saes"] == ["a/0", "b/0", "a/2", "b/2"]
    assert len(steps) == 2 * 4
    assert_same(tensors(tmp_path, "a/0"), tensors(tmp_path, "b/0"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["sae"] for line in lines] == summary["saes"]


def test_side_by_side_training_that_was_stopped_continues_to_the_same_bits(
    host, corpus, tmp_path, monkeypatch
):
    keys = {"training__checkpoint_every": 2, "training__tokens": 128 * 7}
    configs = {
        "plain": make_config(**keys),
        "k": make_config(**keys, sae__k=8),
        "jumprelu": make_config(**keys, sae__architecture="jumprelu", sae__affine="none"),
    }
    names = [f"{name}/{first}" for name in configs for first in (0, 2)]
    train_side_by_side(host, corpus, tmp_path / "whole", configs)
    asked = []
    give = MixedBatches.next

    def stopping(self):
        asked.append(1)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return give(self)

    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(MixedBatches, "next", stopping)
        train_side_by_side(host, corpus, tmp_path / "stopped", configs)
    assert (tmp_path / "stopped/checkpoints/step-000004").is_dir()
    train_side_by_side(host, corpus, tmp_path / "stopped", configs)
    assert_same(tensors(tmp_path / "stopped", *names), tensors(tmp_path / "whole", *names))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"training__batch_tokens": 64}, "training.batch_tokens: 64 for b/0"),
        ({"training__layer_sampling": "all"}, "training.layer_sampling: 'all' for b/0"),
    ],
)
def test_what_one_forward_shares_cannot_differ(host, corpus, tmp_path, keys, message):
    with pytest.raises(InputError, match=message):
        train_side_by_side(host, corpus, tmp_path, {"a": make_config(), "b": make_config(**keys)})


def test_two_entries_of_one_name_are_refused(host, corpus, tmp_path):
    entries = [Entry("x", (0,), make_config()), Entry("x", (1,), make_config())]
    with pytest.raises(InputError, match="x: given twice"):
        train_entries(
            host, corpus.train(), moments(), entries, make_config(), directory=tmp_path, key="key"
        )
