"""Starting from a trained run: the same functions, and the text behind what was read."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from groupsae.config import Config
from groupsae.directory import RunDirectory
from groupsae.errors import InputError
from groupsae.host.model import HostModel
from groupsae.host.tokens import EndOfText
from groupsae.run import Run
from groupsae.sae import SAE, SAEConfig, directory_name
from groupsae.training.batches import MixedBatches
from groupsae.training.start import Start, open_start
from tests.sae.kernels.cases import AFFINES, RULES, sae_with

PLACE = {"position": [0, 0, None], "offset": 0, "tokens_seen": 0, "corpus": {"documents": "none"}}


def run_of(directory: Path, host: HostModel, *saes: SAE, **sae_keys) -> Config:
    """A directory as a training of these SAEs leaves it; returns a config that starts from it."""
    for sae in saes:
        sae.save(directory / "saes" / directory_name(sae.layers))
    config = Config.parse({"sae": sae_keys})
    provenance = {"host_fingerprint": host.fingerprint()}
    written = config.model_copy(update={"provenance": provenance}).dump()
    (directory / "config.yaml").write_text(written)
    (directory / "stages.json").write_text(json.dumps({"train": {"key": "of a training"}}))
    summary = {
        "saes": [directory_name(sae.layers) for sae in saes],
        **{"contexts_read": 0, "text_place": PLACE, "cache_place": None},
    }
    (directory / "training.json").write_text(json.dumps(summary))
    return Config.parse({"sae": sae_keys, "training": {"init_from": str(directory)}})


def opened(config: Config, host: HostModel) -> Start:
    start = open_start(config, host)
    assert start is not None
    return start


def trained_sae(rule: str, affine: str = "none") -> SAE:
    """Nothing in it is as at the start, and every member layer is treated differently."""
    sae = sae_with(rule, affine)
    draws = torch.Generator().manual_seed(7)
    with torch.no_grad():
        sae.mean.normal_(generator=draws)
        sae.scale.uniform_(0.5, 2, generator=draws)
        if "batchtopk" in rule or rule == "matryoshka":
            rows = 3 if sae.config.per_layer_threshold else 1
            sae.threshold.copy_(4 + torch.rand(rows, generator=draws))
    return sae


def assert_same_function(sae: SAE, source: SAE) -> None:
    """At the layers of `sae`: the same latents and reconstructions, to the bit."""
    draws = torch.Generator().manual_seed(8)
    for layer in sae.layers:
        x = 3 * torch.randn(200, source.config.d_model, generator=draws)
        found, expected = sae.encode(x, layer), source.encode(x, layer)
        assert torch.equal(found.dense(120), expected.dense(120))
        assert expected.l0().mean() > 0.5
        assert torch.equal(sae(x, layer), source(x, layer))


@pytest.mark.parametrize("layers", [(2, 3, 4), (3, 4), (3,)], ids=str)
@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("rule", RULES)
def test_the_start_is_the_same_function_as_its_source(tmp_path, host, rule, affine, layers):
    source = trained_sae(rule, affine)
    kind = "center" if affine == "none" else affine
    config = run_of(tmp_path, host, source, architecture=source.config.architecture, affine=kind)
    shape = replace(source.config, layers=layers)
    sae = opened(config, host).sae(shape, kind)
    assert sae.config == shape
    assert_same_function(sae, source)


@pytest.mark.parametrize("rule", ["batchtopk", "jumprelu with target"])
def test_shared_thresholds_become_every_layer_s_own(tmp_path, host, rule):
    source = trained_sae(rule)
    config = run_of(tmp_path, host, source, architecture=source.config.architecture)
    shape = replace(source.config, per_layer_threshold=True)
    assert_same_function(opened(config, host).sae(shape, "center"), source)


@pytest.mark.parametrize("rule", ["batchtopk by layer", "jumprelu by layer"])
def test_thresholds_by_layer_become_those_of_a_single_layer_but_not_of_several(
    tmp_path, host, rule
):
    source = trained_sae(rule)
    config = run_of(tmp_path, host, source, architecture=source.config.architecture)
    start = opened(config, host)
    alone = replace(source.config, per_layer_threshold=False, layers=(4,))
    assert_same_function(start.sae(alone, "center"), source)
    with pytest.raises(InputError, match=r"sae\.per_layer_threshold: False is asked .* has True;"):
        start.sae(replace(alone, layers=(3, 4)), "center")


def topk(*layers: int, d_sae: int = 48, d_model: int = 12) -> SAE:
    return SAE(SAEConfig(d_model=d_model, d_sae=d_sae, layers=layers, k=4))


def test_the_source_is_of_the_same_layers_or_else_the_smallest_that_has_them(tmp_path, host):
    config = run_of(tmp_path, host, topk(0, 1, 2, 3), topk(2, 3, 4), topk(3))
    start = opened(config, host)

    def source(*layers: int) -> str:
        return start.source_of(topk(*layers).config, "center").name

    assert source(3) == "layers-03"
    assert source(2) == "layers-02-04"
    assert source(1) == source(1, 2) == "layers-00-03"
    with pytest.raises(InputError, match=r"no SAE of layers 3, 4, 5: .* 0, 1, 2, 3; 2, 3, 4; 3;"):
        source(3, 4, 5)


@pytest.mark.parametrize(
    ("changes", "affine", "message"),
    [
        ({"d_sae": 64}, "center", r"sae\.d_sae: 64 is asked .* has 48; set sae\.d_sae=48"),
        ({"architecture": "relu", "k": None}, "center", r"sae\.architecture: relu .* has topk"),
        ({}, "scale", r"sae\.affine: scale is asked for, but layers-00 .* has center"),
        ({"learned_affine": "gain"}, "gain", r"sae\.affine: gain .* set sae\.affine=center"),
    ],
)
def test_another_size_or_kind_is_refused_by_name(tmp_path, host, changes, affine, message):
    start = opened(run_of(tmp_path, host, topk(0)), host)
    with pytest.raises(InputError, match=message):
        start.sae(replace(topk(0).config, **changes), affine)


def test_another_k_is_taken(tmp_path, host):
    start = opened(run_of(tmp_path, host, topk(0)), host)
    assert start.sae(replace(topk(0).config, k=7), "center").config.k == 7


def test_another_host_model_is_refused(tmp_path, host):
    config = run_of(tmp_path, host, topk(0))
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace(host.fingerprint(), "of another"))
    with pytest.raises(InputError, match="is of another host model"):
        open_start(config, host)


def test_nothing_is_started_from_nothing(host):
    assert open_start(Config(), host) is None


@pytest.fixture(scope="module")
def settings(tiny_host_folder, tiny_text) -> dict[str, dict[str, Any]]:
    training = {"tokens": 768, "batch_tokens": 128, "buffer_tokens": 256, "log_every": 4}
    return {
        "host": {"name": str(tiny_host_folder)},
        "tokens": {"source": str(tiny_text), "context_length": 16, "held_out": 0.2},
        "grouping": {"layers": "all", "distance_tokens": 500, "partition": [[0, 1], [2]]},
        "sae": {"k": 4, "d_sae": 48},
        "training": training | {"kernel": "torch", "host_batch_contexts": 4},
        "evaluation": {"tokens": 1000},
        "report": {"formats": ["png"]},
    }


@pytest.fixture(scope="module")
def groups(settings, tmp_path_factory) -> Run:
    """A trained run without a baseline. Tests only read it."""
    return trained(tmp_path_factory.mktemp("runs") / "groups", settings, baseline=False)


def configured(settings: dict[str, Any], sections: dict[str, Any] | None = None, **training):
    merged = {name: keys | (sections or {}).get(name, {}) for name, keys in settings.items()}
    return Config.parse(merged | {"training": merged["training"] | training})


def trained(directory: Path, settings, sections=None, **training) -> Run:
    run = Run(directory, configured(settings, sections, **training))
    run.distances()
    run.groups()
    run.train()
    return run


def summary(run: Run) -> dict[str, Any]:
    return json.loads((run.directory / "training.json").read_text())


def contexts_seen(monkeypatch) -> list[torch.Tensor]:
    """Fills with the contexts that batches are made from."""
    seen: list[torch.Tensor] = []
    read = MixedBatches._read_contexts

    def reading(self, contexts):
        taken, self.stream.next_contexts = [], self.stream.next_contexts
        next_contexts = self.stream.next_contexts

        def taking(n):
            taken.append(next_contexts(n))
            return taken[-1]

        self.stream.next_contexts = taking
        read(self, contexts)
        self.stream.next_contexts = next_contexts
        seen.extend(taken)

    monkeypatch.setattr(MixedBatches, "_read_contexts", reading)
    return seen


def test_baselines_start_from_their_group_and_the_text_goes_on(
    groups, settings, tmp_path, monkeypatch, caplog
):
    read = summary(groups)["contexts_read"]
    assert read * 16 >= 768
    seen = contexts_seen(monkeypatch)
    still = {"init_from": str(groups.directory), "learning_rate": 1e-30, "tokens": 512}
    with caplog.at_level(logging.INFO):
        run = trained(tmp_path / "layers", settings, **still)
    assert f"continues after {read * 16:,} tokens" in caplog.text
    assert set(run.saes()) == {
        "layers-00-01",
        "layers-02",
        *[f"baseline/layers-0{i}" for i in (0, 1, 2)],
    }
    for name, sae in run.saes().items():  # which nothing has moved
        source = groups.sae(sae.layers[0])
        for layer in sae.layers:
            member = source.layers.index(layer)
            assert torch.equal(sae.scale[sae.layers.index(layer)], source.scale[member])
        torch.testing.assert_close(sae.W_dec, source.W_dec, msg=name)
    contexts = torch.cat(seen)
    expected = run.corpus.train().next_contexts(read + len(contexts))
    assert torch.equal(contexts, expected[read:])
    assert summary(run)["contexts_read"] == len(expected)


def test_a_run_that_was_continued_is_continued_behind_both(groups, settings, tmp_path, monkeypatch):
    second = trained(tmp_path / "second", settings, init_from=str(groups.directory))
    second.evaluate()
    evaluation = json.loads((second.directory / "evaluation" / "reconstruction.json").read_text())
    assert evaluation["equal"] == (
        "training tokens per SAE (768, after those of training.init_from)"
    )
    seen = contexts_seen(monkeypatch)
    third = trained(tmp_path / "third", settings, init_from=str(second.directory))
    places = [summary(run)["contexts_read"] for run in (groups, second, third)]
    assert all(later - earlier >= 768 / 16 for earlier, later in pairwise([0, *places]))
    expected = third.corpus.train().next_contexts(places[2])
    assert torch.equal(torch.cat(seen), expected[places[1] :])


@pytest.mark.parametrize("other", [{"seed": 1}, {"context_length": 8}], ids=str)
def test_other_text_begins_at_its_beginning(groups, settings, tmp_path, monkeypatch, caplog, other):
    seen = contexts_seen(monkeypatch)
    with caplog.at_level(logging.INFO):
        run = trained(
            tmp_path / "run", settings, {"tokens": other}, init_from=str(groups.directory)
        )
    contexts = torch.cat(seen)
    assert torch.equal(contexts, run.corpus.train().next_contexts(len(contexts)))
    assert summary(run)["contexts_read"] == len(contexts)
    assert "continues after" not in caplog.text


def test_a_killed_start_continues_to_the_same_bits(groups, settings, tmp_path, monkeypatch):
    start = {"init_from": str(groups.directory), "checkpoint_every": 3}
    whole = trained(tmp_path / "whole", settings, **start)
    next_batch, calls = MixedBatches.next, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return next_batch(self)

    with monkeypatch.context() as patched:
        patched.setattr(MixedBatches, "next", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "killed", settings, **start)
    continued = Run(tmp_path / "killed").train()
    for name, sae in whole.saes().items():
        for key, tensor in sae.state_dict().items():
            assert torch.equal(tensor, continued[name].state_dict()[key]), (name, key)
    time = {"seconds_for_checkpoints": 0}
    assert summary(whole) | time == summary(Run(tmp_path / "killed")) | time


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"sae": {"d_sae": 64}}, r"sae\.d_sae: 64 is asked for, but layers-00-01"),
        ({"grouping": {"partition": [[0], [1, 2]]}}, r"has no SAE of layers 1, 2"),
    ],
)
def test_what_cannot_be_started_is_refused_before_any_work(
    groups, settings, tmp_path, sections, message
):
    init = {"init_from": str(groups.directory), "baseline": False}
    run = Run(tmp_path / "run", configured(settings, sections, **init))
    with pytest.raises(InputError, match=message):
        run.all()
    assert not (run.directory / "distances.json").exists()


def test_too_little_text_behind_a_run_is_refused_before_any_work(groups, settings, tmp_path):
    with pytest.raises(EndOfText) as ended:
        groups.corpus.train().next_contexts(10**5)
    every_token = {"tokens": 16 * ended.value.contexts_left}
    Run(tmp_path / "alone", configured(settings, **every_token)).check()
    behind = configured(settings, init_from=str(groups.directory), **every_token)
    run = Run(tmp_path / "run", behind)
    with pytest.raises(InputError, match=r"training\.tokens=\d+: tokens\.source: the training"):
        run.all()
    assert not (run.directory / "distances.json").exists()


def test_a_folder_without_a_training_is_refused(groups, settings, tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError, match=r"training\.init_from=.*no finished training"):
            Run(tmp_path / "run", configured(settings, init_from=str(path)))
    with pytest.raises(InputError, match="is the run itself"):
        Run(groups.directory, configured(settings, init_from=str(groups.directory)))


def key(directory: Path, config: Config) -> str:
    return RunDirectory(directory, config, redo=True).key("train")


def test_what_is_started_from_counts_and_not_where_it_lies(groups, settings, tmp_path):
    moved = shutil.copytree(groups.directory, tmp_path / "moved")
    other = trained(tmp_path / "other", settings, baseline=False, seed=1)
    starts = [None, *map(str, (groups.directory, moved, other.directory))]
    keys = [key(tmp_path / "run", configured(settings, init_from=start)) for start in starts]
    assert keys[1] == keys[2]
    assert len(set(keys)) == 3


def test_a_run_outlives_what_it_was_started_from_but_not_its_exchange(groups, settings, tmp_path):
    source = shutil.copytree(groups.directory, tmp_path / "source")
    run = trained(tmp_path / "run", settings, init_from=str(source))
    shutil.rmtree(source)
    assert set(Run(run.directory).train()) == set(run.saes())
    trained(source, settings, baseline=False, seed=1)
    with pytest.raises(InputError, match=r"'train' of another config \(the run training\.init"):
        Run(run.directory)


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_cache_goes_on_behind_what_was_read_of_it(settings, tmp_path, monkeypatch, shuffle):
    """Whatever order it was read in, and though it has grown since."""
    monkeypatch.setattr("groupsae.training.cache_writer._SHARD_BYTES", 10_000)
    cached = {"activation_cache": str(tmp_path / "cache"), "cache_shuffle": shuffle}
    config = configured(settings, **cached, baseline=False)
    Run(tmp_path / "first", config).cache(tokens=1200)
    seen = contexts_seen(monkeypatch)
    first = trained(tmp_path / "first", settings, **cached, baseline=False)
    n = sum(map(len, seen))
    assert summary(first)["contexts_read"] == n
    more = configured(settings, **cached, init_from=str(first.directory), seed=3)
    with pytest.raises(InputError, match=f"training takes {768 + 16 * n:,}; write more"):
        Run(tmp_path / "second", more).check()
    Run(tmp_path / "second", more).cache()
    second = Run(tmp_path / "second")
    second.check()
    second.distances()
    second.groups()
    second.train()
    everything = torch.cat(seen)
    assert len(everything.unique(dim=0)) == len(everything) > 2 * 768 / 16


def test_a_cache_goes_on_behind_what_was_streamed_and_a_stream_behind_a_cache(
    groups, settings, tmp_path, monkeypatch
):
    read = summary(groups)["contexts_read"]
    cached = {"activation_cache": str(tmp_path / "cache")}
    config = configured(settings, **cached, init_from=str(groups.directory))
    Run(tmp_path / "cached", config).cache()
    seen = contexts_seen(monkeypatch)
    run = trained(tmp_path / "cached", settings, **cached, init_from=str(groups.directory))
    n = read + sum(map(len, seen))
    text = run.corpus.train().next_contexts(2 * n)
    assert torch.equal(torch.cat(seen), text[read:n])
    held = json.loads((tmp_path / "cache" / "manifest.json").read_text())["shards"]
    end = sum(shard["contexts"] for shard in held)
    seen.clear()
    trained(tmp_path / "streamed", settings, init_from=str(run.directory))
    streamed = torch.cat(seen)
    assert torch.equal(streamed, text[end : end + len(streamed)])
