from __future__ import annotations

import json
import logging
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from groupsae.config import Config
from groupsae.errors import InputError
from groupsae.grouping.distance import Moments
from groupsae.host.model import HostModel
from groupsae.host.tokens import EndOfText, open_corpus
from groupsae.training.activation_cache import (
    CachedActivations,
    open_activation_cache,
    read_manifest,
)
from groupsae.training.cache_writer import write_activation_cache
from groupsae.training.session import train_saes
from tests.host.tiny_models import tiny_model

LAYERS = (0, 1, 2)
TOKENS = 1024
FORWARD = 4 * 16 * (3 * 32 * 4 + 4)  # bytes of four contexts in float32


def write(path, host, corpus, **changes):
    options = {
        "layers": LAYERS,
        "tokens": TOKENS,
        "dtype": "float32",
        "batch_contexts": 4,
        "shard_bytes": 2 * FORWARD,
    }
    return write_activation_cache(path, host, corpus.train(), **(options | changes))


def opened(path, host, corpus, **changes):
    options = {"layers": LAYERS, "tokens": TOKENS, "dtype": "float32"}
    return open_activation_cache(path, host, corpus.train(), **(options | changes))


def train(directory, host, corpus, cached=None, **training):
    sizes = {"batch_tokens": 128, "buffer_tokens": 256, "tokens": TOKENS, "host_batch_contexts": 4}
    config = Config(sae={"k": 4, "d_sae": 48}, training=sizes | training)
    ones = torch.ones(3, dtype=torch.float64)
    moments = Moments(LAYERS, torch.zeros(3, 32, dtype=torch.float64), ones, ones, 1000)
    directory.mkdir(exist_ok=True)
    groups = [[0, 1], [2]]
    special = host.special_token_ids
    train_saes(
        host,
        corpus.train(),
        moments,
        groups,
        config,
        directory=directory,
        key="key",
        special=special,
        cached=cached,
    )
    files = sorted((directory / "saes").rglob("sae.safetensors"))
    return {file.parent.name: load_file(file) for file in files}


def assert_same(these, those):
    assert these.keys() == those.keys()
    for name, weights in these.items():
        for key, weight in weights.items():
            assert torch.equal(weight, those[name][key]), (name, key)


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def folder(host, corpus, tmp_path_factory):
    """A float32 cache. Tests only read it."""
    path = tmp_path_factory.mktemp("activations") / "cache"
    write(path, host, corpus)
    return path


class TestTraining:
    @pytest.mark.parametrize("contexts", [4, 7])  # of which a shard's number is no multiple
    def test_from_float32_in_the_texts_order_it_is_streaming_bit_for_bit(
        self, contexts, host, corpus, tmp_path
    ):
        write(tmp_path / "cache", host, corpus, batch_contexts=contexts)
        streamed = train(tmp_path / "a", host, corpus, host_batch_contexts=contexts)
        cached = opened(tmp_path / "cache", host, corpus)
        assert len(cached.manifest.shards) > 4
        assert_same(
            train(tmp_path / "b", host, corpus, cached, host_batch_contexts=contexts), streamed
        )
        first, second = ((tmp_path / x / "metrics.jsonl").read_text() for x in "ab")
        fvus = [[json.loads(line)["fvu"] for line in text.splitlines()] for text in (first, second)]
        assert fvus[0] == fvus[1]

    @pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 8e-3)])
    def test_from_sixteen_bits_it_is_close_to_streaming(
        self, dtype, tolerance, host, corpus, tmp_path
    ):
        """Rounding is 2^-11 and 2^-8 of a value: FVUs differ by less than twice that."""
        write(tmp_path / "cache", host, corpus, dtype=dtype)
        train(tmp_path / "a", host, corpus)
        train(tmp_path / "b", host, corpus, opened(tmp_path / "cache", host, corpus, dtype=dtype))
        lines = [(tmp_path / x / "metrics.jsonl").read_text().splitlines() for x in "ab"]
        for streamed, cached in zip(*lines, strict=True):
            expected = json.loads(streamed)["fvu"]
            assert json.loads(cached)["fvu"] == pytest.approx(expected, rel=tolerance)

    def test_runs_no_forward(self, host, corpus, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(HostModel, "_forward", None)
        assert train(tmp_path / "run", host, corpus, opened(folder, host, corpus))

    @pytest.mark.parametrize("shuffle", [False, True])
    def test_killed_and_continued_it_is_the_same(
        self, shuffle, host, corpus, folder, tmp_path, monkeypatch
    ):
        from groupsae.training.batches import MixedBatches

        def cached():
            return opened(folder, host, corpus, shuffle=shuffle, seed=1)

        whole = train(tmp_path / "whole", host, corpus, cached())
        times, plain = [], MixedBatches.next

        def killed(self):
            times.append(self)
            if len(times) == 5:
                raise KeyboardInterrupt
            return plain(self)

        monkeypatch.setattr(MixedBatches, "next", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", host, corpus, cached(), checkpoint_every=2)
        assert_same(train(tmp_path / "run", host, corpus, cached(), checkpoint_every=2), whole)

    def test_ends_with_the_mend_where_long_tokens_leave_too_few(
        self, host, corpus, folder, tmp_path
    ):
        with pytest.raises(EndOfText, match=r"max_norm_multiple.*groupsae cache --tokens"):
            train(
                tmp_path / "run",
                host,
                corpus,
                opened(folder, host, corpus),
                max_norm_multiple=1.000001,
            )


class TestReading:
    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.booleans(), st.integers(0, 9))
    def test_streams_are_those_of_the_contexts_that_were_handed_out(
        self, host, corpus, folder, sizes, shuffle, seed
    ):
        manifest = read_manifest(folder)
        cached = CachedActivations(folder, manifest, host.device, shuffle=shuffle, seed=seed)
        total = sum(shard.contexts for shard in manifest.shards)
        for n in sizes:
            if n > total:
                break
            total -= n
            ids, found = cached.next_contexts(n), {}
            assert ids.shape == (n, 16)
            cached.visit(ids, {layer: partial(found.setdefault, layer) for layer in (2, 0)})
            assert list(found) == [0, 2]
            expected = host.residual_streams(ids, [0, 2])
            for layer, x in found.items():
                torch.testing.assert_close(x, expected[layer], rtol=1e-4, atol=1e-5)

    def test_shuffled_every_context_comes_once_and_shards_stay_whole(self, host, corpus, folder):
        manifest = read_manifest(folder)
        total = sum(shard.contexts for shard in manifest.shards)
        text = corpus.train().next_contexts(total)
        orders = []
        for seed in (0, 0, 1):
            cached = CachedActivations(folder, manifest, host.device, shuffle=True, seed=seed)
            ids = torch.cat([cached.next_contexts(n) for n in (5, 1, total - 6)])
            position = (ids[:, None] == text).all(-1).int().argmax(1)
            assert sorted(position.tolist()) == list(range(total))
            steps = (position.diff() != 1).sum().item()
            assert 0 < steps < len(manifest.shards)
            orders.append(position.tolist())
        assert orders[0] == orders[1] != orders[2]
        with pytest.raises(EndOfText) as end:
            cached.next_contexts(1)
        assert end.value.contexts_left == 0

    @pytest.mark.parametrize("shuffle", [False, True])
    @pytest.mark.parametrize("place", [0, 3, 8, 29])
    def test_a_saved_place_gives_the_same_next_contexts(self, shuffle, place, host, corpus, folder):
        options = {"shuffle": shuffle, "seed": 2}
        cached = opened(folder, host, corpus, **options)
        if place:
            cached.next_contexts(place)
        state = json.loads(json.dumps(cached.state_dict()))
        expected = cached.next_contexts(12)
        other = opened(folder, host, corpus, **options)
        other.next_contexts(1)
        other.load_state_dict(state)
        assert torch.equal(other.next_contexts(12), expected)

    def test_a_cache_that_grew_goes_on_in_the_order_that_was_begun(self, host, corpus, tmp_path):
        write(tmp_path / "cache", host, corpus)
        begun = opened(tmp_path / "cache", host, corpus, shuffle=True)
        total = sum(shard.contexts for shard in begun.manifest.shards)
        begun.next_contexts(10)
        state, rest = begun.state_dict(), begun.next_contexts(total - 10)
        write(tmp_path / "cache", host, corpus, tokens=TOKENS + 300)
        grown = opened(tmp_path / "cache", host, corpus, shuffle=True)
        grown.load_state_dict(state)
        assert torch.equal(grown.next_contexts(total - 10), rest)
        after = grown.next_contexts(5)
        assert torch.equal(after, corpus.train().next_contexts(total + 5)[-5:])

    def test_a_place_in_another_cache_is_refused(self, host, corpus, folder):
        cached = opened(folder, host, corpus)
        with pytest.raises(InputError, match=r"not the cache that this training was begun with"):
            cached.load_state_dict({"handed_out": 4, "shards": 3, "contexts": 5})

    def test_only_the_contexts_given_last_can_be_visited(self, host, corpus, folder):
        cached = opened(folder, host, corpus)
        before = cached.next_contexts(2)
        cached.next_contexts(2)
        with pytest.raises(RuntimeError, match="last"):
            cached.visit(before, {0: print})


class TestWriting:
    def test_the_manifest_says_what_is_held(self, host, corpus, folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        shards = manifest["shards"]
        ids = corpus.train().next_contexts(sum(shard["contexts"] for shard in shards))
        assert manifest["fingerprint"] == host.fingerprint()
        assert manifest["layers"] == [0, 1, 2]
        assert (manifest["dtype"], manifest["context_length"]) == ("float32", 16)
        assert manifest["tokens"] == ids.numel()
        special = torch.isin(ids, torch.tensor([*host.special_token_ids]))
        assert manifest["special_tokens"] == special.sum().item() > 0
        assert manifest["tokens"] - manifest["special_tokens"] >= TOKENS
        for shard in shards:
            assert (folder / shard["file"]).stat().st_size == shard["bytes"]

    @pytest.mark.parametrize("killed_at", [1, 2, 3, 7])
    def test_killed_it_goes_on_at_the_next_whole_shard(
        self, killed_at, host, corpus, folder, tmp_path, monkeypatch
    ):
        plain, times = HostModel.visit, []

        def visit(self, *arguments):
            times.append(self)
            if len(times) == killed_at:
                raise KeyboardInterrupt
            return plain(self, *arguments)

        monkeypatch.setattr(HostModel, "visit", visit)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "cache", host, corpus)
        files = [*(tmp_path / "cache").glob("*.safetensors")]
        assert len(files) == (killed_at - 1) // 2
        write(tmp_path / "cache", host, corpus)
        forwards = len(times) - 1 - (killed_at - 1) % 2  # what was lost of a shard is done again
        times[:] = [None] * killed_at
        write(tmp_path / "whole", host, corpus)
        assert forwards == len(times) - killed_at
        assert contents(tmp_path / "cache") == contents(folder)

    def test_a_shard_is_whole_or_not_there(self, host, corpus, folder, tmp_path, monkeypatch):
        from groupsae.training import cache_writer

        plain, times = cache_writer.save_tensors, []

        def save(tensors, path):
            times.append(path)
            if len(times) == 3:
                path.write_bytes(b"half of it")
                raise OSError(28, "No space left on device")
            plain(tensors, path)

        monkeypatch.setattr(cache_writer, "save_tensors", save)
        with pytest.raises(InputError, match="No space left on device"):
            write(tmp_path / "cache", host, corpus)
        names = ["manifest.json", "shard-000000.safetensors", "shard-000001.safetensors"]
        assert sorted(contents(tmp_path / "cache")) == names
        write(tmp_path / "cache", host, corpus)
        assert contents(tmp_path / "cache") == contents(folder)

    def test_what_is_there_is_not_written_again_and_more_is_added(
        self, host, corpus, folder, tmp_path, monkeypatch
    ):
        copy = shutil.copytree(folder, tmp_path / "cache")
        write(copy, host, corpus, tokens=TOKENS + 200)
        before, after = contents(folder), contents(copy)
        assert len(after) > len(before)
        assert all(after[name] == before[name] for name in before if name != "manifest.json")
        monkeypatch.setattr(HostModel, "visit", None)
        write(copy, host, corpus)
        assert contents(copy) == after

    def test_its_size_is_told_beforehand(self, host, corpus, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("groupsae"), "propagate", True)
        told = []
        monkeypatch.setattr(
            "groupsae.training.cache_writer.size", lambda n: told.append(n) or str(n)
        )
        with caplog.at_level(logging.INFO):
            write(tmp_path / "cache", host, corpus, tokens=20_000, batch_contexts=64)
        assert "tokens at 3 layers in float32" in caplog.text
        real = sum(file.stat().st_size for file in (tmp_path / "cache").iterdir())
        assert told[0] == pytest.approx(real, rel=0.03)

    def test_a_disk_too_small_is_refused_before_any_forward(
        self, host, corpus, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(HostModel, "visit", None)
        usage = SimpleNamespace(free=100_000)
        monkeypatch.setattr("groupsae.training.cache_writer.shutil.disk_usage", lambda _: usage)
        with pytest.raises(InputError) as refusal:
            write(tmp_path / "deep" / "cache", host, corpus)
        message = str(refusal.value)
        for part in ("float32 take", "100,000 bytes", "training.tokens", "grouping.layers"):
            assert part in message
        assert "training.cache_dtype=float16" in message
        assert not (tmp_path / "deep").exists()

    def test_a_value_beyond_float16_is_refused_and_fits_bfloat16(self, corpus, tmp_path):
        host = HostModel(tiny_model("gpt_neox"))
        host.blocks[1].mlp.dense_4h_to_h.bias.data[3] = 80_000.0
        with pytest.raises(InputError) as refusal:
            write(tmp_path / "cache", host, corpus, dtype="float16")
        assert "layer 1" in str(refusal.value)
        assert "65,504" in str(refusal.value)
        assert "training.cache_dtype=bfloat16" in str(refusal.value)
        assert not (tmp_path / "cache").exists()
        write(tmp_path / "cache", host, corpus, dtype="bfloat16")

    def test_activations_that_are_not_finite_are_not_kept(self, corpus, tmp_path):
        host = HostModel(tiny_model("gpt_neox"))
        host.blocks[2].mlp.dense_4h_to_h.bias.data[3] = float("nan")
        with pytest.raises(InputError, match=r"layer 2 of .* NaN or infinite"):
            write(tmp_path / "cache", host, corpus)


class TestRefusals:
    def test_another_model(self, corpus, folder):
        other = HostModel(tiny_model("gpt_neox", seed=1), name="other")
        for call in (opened, write):
            with pytest.raises(InputError, match=r"another model: .*host.name=other"):
                call(folder, other, corpus)

    @pytest.mark.parametrize(("key", "value"), [("context_length", 8), ("seed", 5)])
    def test_another_text_or_way_of_reading_it(self, key, value, host, corpus, folder, tmp_path):
        options = {"context_length": 16, "held_out": 0.2} | {key: value}
        other = open_corpus(corpus.source, tokenizer=None, **options)
        for call in (opened, write):
            with pytest.raises(
                InputError, match=rf"another text.*{key} \(there .*, here {value}\)"
            ):
                call(folder, host, other)

    def test_another_dtype(self, host, corpus, folder):
        for call in (opened, write):
            with pytest.raises(
                InputError, match=r"stored in float32, .* set training.cache_dtype="
            ):
                call(folder, host, corpus, dtype="float16")

    def test_other_layers(self, host, corpus, folder, tmp_path):
        with pytest.raises(InputError, match=r"holds the layers \[0, 1, 2\].*asks for \[0, 2\]"):
            write(folder, host, corpus, layers=(0, 2))
        write(tmp_path / "cache", host, corpus, layers=(0, 2))
        assert opened(tmp_path / "cache", host, corpus, layers=(2,))
        with pytest.raises(InputError, match=r"holds the layers 0, 2, and 1 are .*grouping.layers"):
            opened(tmp_path / "cache", host, corpus)

    def test_too_few_tokens(self, host, corpus, folder):
        manifest = read_manifest(folder)
        assert opened(folder, host, corpus, tokens=manifest.tokens, exclude_special=False)
        with pytest.raises(InputError, match=r"training takes .*training\.tokens"):
            opened(folder, host, corpus, tokens=manifest.tokens)

    def test_none_there(self, host, corpus, tmp_path):
        with pytest.raises(
            InputError, match=r"no activation cache; write it with `groupsae cache`"
        ):
            opened(tmp_path / "none", host, corpus)

    def test_a_folder_of_something_else(self, host, corpus, tmp_path):
        (tmp_path / "letter.txt").write_text("dear")
        for call in (opened, write):
            with pytest.raises(InputError, match="something else than an activation cache"):
                call(tmp_path, host, corpus)
        for call in (opened, write):
            with pytest.raises(InputError, match=r"letter\.txt cannot be read"):
                call(tmp_path / "letter.txt", host, corpus)

    @pytest.mark.parametrize("damage", ["cut", "lost", "manifest", "text"])
    def test_damage(self, damage, host, corpus, folder, tmp_path):
        copy = shutil.copytree(folder, tmp_path / "cache")
        shard, manifest = copy / "shard-000001.safetensors", copy / "manifest.json"
        if damage == "cut":
            shard.write_bytes(shard.read_bytes()[:-100])
        elif damage == "lost":
            shard.unlink()
        elif damage == "manifest":
            manifest.write_text(manifest.read_text()[:-100])
        else:
            values = json.loads(manifest.read_text())
            manifest.write_text(json.dumps(values | {"stream": {}}))
        with pytest.raises(InputError, match=r"is damaged .*remove the folder"):
            opened(copy, host, corpus)

    def test_a_shard_damaged_while_training_is_named(self, host, corpus, folder, tmp_path):
        copy = shutil.copytree(folder, tmp_path / "cache")
        cached = opened(copy, host, corpus)
        (copy / "shard-000000.safetensors").write_bytes(b"nothing")
        with pytest.raises(InputError, match=r"damaged \(shard-000000"):
            cached.next_contexts(1)
