from __future__ import annotations

import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from groupsae.errors import InputError
from groupsae.host.model import HostModel
from groupsae.interpretation.cache_pass import _blocks, _Growing, write_latent_cache
from groupsae.interpretation.latent_cache import DEFINITIONS, LatentCache
from tests.host.tiny_models import tiny_model
from tests.interpretation.cases import CONTEXT, CONTEXTS, D_SAE, SILENT, dense, ids_of, made_sae

PAIRS = [
    ("layers-00-01", 0),
    ("layers-00-01", 1),
    ("baseline/layers-00", 0),
    ("baseline/layers-01", 1),
]


@pytest.mark.parametrize(("name", "layer"), PAIRS)
def test_it_holds_the_latents_of_every_token(name, layer, host, corpus, saes, cache):
    latents = dense(host, corpus, saes[name], layer)
    for latent, expected in enumerate(latents.T):
        positions, activations = cache.firings(name, layer, latent)
        assert positions.tolist() == expected.nonzero().flatten().tolist()
        np.testing.assert_allclose(activations, expected[expected > 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "layer"), PAIRS)
def test_what_is_known_of_each_latent(name, layer, host, corpus, saes, cache):
    latents = dense(host, corpus, saes[name], layer).double()
    index, active = cache.index(name, layer), latents > 0
    tokens = int((ids_of(corpus) != 0).sum())
    assert cache.manifest.tokens == tokens
    assert cache.density(name, layer).tolist() == (active.sum(0).double() / tokens).tolist()
    for latent, (values, fires) in enumerate(zip(latents.T, active.T, strict=True)):
        where = fires.nonzero().flatten().tolist() or [-1]
        assert (index.first[latent], index.last[latent]) == (where[0], where[-1])
        mean = values[fires].mean() if fires.any() else 0
        assert index.mean[latent] == pytest.approx(float(mean), rel=1e-5)
        assert index.maximum[latent] == pytest.approx(float(values.max()), rel=1e-5)
    for latent in SILENT:
        assert not cache.fires(name, latent)
        assert len(cache.firings(name, layer, latent).positions) == 0


def test_tokens_and_what_was_left_out(host, corpus, cache):
    ids = ids_of(corpus)
    assert cache.tokens.tolist() == ids.tolist()
    manifest = cache.manifest
    assert manifest.excluded_special_tokens == int((ids == 0).sum()) > 0
    assert manifest.tokens + manifest.excluded_special_tokens == ids.numel() == CONTEXTS * CONTEXT
    assert (manifest.host, manifest.host_fingerprint) == (host.name, host.fingerprint())
    assert manifest.definitions == DEFINITIONS
    assert cache.sae_names == ("layers-00-01", "baseline/layers-00", "baseline/layers-01")
    assert (cache.layers("layers-00-01"), cache.d_sae("baseline/layers-01")) == ((0, 1), 24)


@pytest.mark.parametrize(("start", "stop"), [(0, D_SAE), (5, 5), (7, 30), (39, 40)])
def test_neighbouring_latents_together(start, stop, cache):
    found = cache.range("layers-00-01", 1, start, stop)
    for i, latent in enumerate(range(start, stop)):
        own = slice(*found.offsets[i : i + 2])
        one = cache.firings("layers-00-01", 1, latent)
        assert found.positions[own].tolist() == one.positions.tolist()
        assert found.activations[own].tolist() == one.activations.tolist()
    assert found.offsets[-1] == len(found.positions)


def test_shards_and_batches_change_nothing(host, corpus, cache, saes, tmp_path):
    """Neither how often the buffer is emptied nor how large the files are shows in what is read."""
    name = "layers-00-01"
    for buffer_firings in (1, 10**6):
        other = write_latent_cache(
            tmp_path / str(buffer_firings),
            host,
            corpus.held_out(),
            {(name, layer): saes[name] for layer in (1, 0)},
            tokens=CONTEXTS * CONTEXT,
            batch_contexts=5,
            special=(0,),
            buffer_firings=buffer_firings,
        )
        for layer in (0, 1):
            ours, theirs = (each.range(name, layer, 0, D_SAE) for each in (cache, other))
            for one, another in zip(ours, theirs, strict=True):
                assert np.array_equal(one, another)
    files = sorted(path.name for path in (tmp_path / "1" / name / "layer-00").iterdir())
    assert len(files) == D_SAE - len(SILENT) + 1 + 1  # silent ones ride along; and the index
    assert not [file for file in files if file.startswith("shard")]


def test_no_more_is_held_in_memory_than_asked(host, corpus, tmp_path, monkeypatch):
    """The buffer is emptied as soon as it is full: after one forward more at most."""
    held = []
    write_shard = _Growing.write_shard
    monkeypatch.setattr(
        _Growing, "write_shard", lambda self: held.append(self.buffered) or write_shard(self)
    )
    wanted = {("layers-00-01", layer): made_sae() for layer in (0, 1)}
    cache = write(tmp_path / "c", host, corpus, wanted, tokens=1500, buffer_firings=1500)
    forward = 4 * CONTEXT * 5
    assert max(held) <= (1500 + 2 * forward) / 2
    firings = [entry.firings for entry in cache.manifest.entries]
    assert sum(held) == sum(firings) > 8 * max(held)
    for entry in cache.manifest.entries:
        blocks = np.array(entry.blocks)
        in_block = np.diff(cache.index(entry.sae, entry.layer).offsets[blocks])
        assert ((in_block <= 1500 // 4) | (np.diff(blocks) == 1)).all()


def test_blocks_hold_no_more_than_asked():
    offsets = np.array([0, 0, 3, 5, 5, 25, 26])
    assert _blocks(offsets, 5) == [0, 4, 5, 6]
    assert _blocks(offsets, 100) == [0, 6]
    assert _blocks(np.zeros(4, np.int64), 5) == [0, 3]


def test_files_are_small(cache):
    """8 bytes a firing, and what is known of each latent."""
    folder = cache.path / "layers-00-01" / "layer-00"
    blocks = list(folder.glob("latents-*"))
    assert len(blocks) > 1
    firings, size = (
        cache.index("layers-00-01", 0).offsets[-1],
        sum(b.stat().st_size for b in blocks),
    )
    assert 8 * firings < size < 8 * firings + 300 * len(blocks)
    assert all(set(load_file(block)) == {"positions", "activations"} for block in blocks)


def write(path, host, corpus, wanted, **options):
    return write_latent_cache(
        path,
        host,
        corpus.held_out(),
        wanted,
        **{"tokens": 100, "batch_contexts": 4, **options},
    )


def test_an_sae_that_never_fires_can_be_read(host, corpus, tmp_path):
    sae = made_sae()
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    cache = write(tmp_path / "c", host, corpus, {("dead", 0): sae})
    assert not cache.density("dead", 0).any()
    assert len(cache.firings("dead", 0, 5).positions) == 0


def test_bad_input_leaves_nothing_behind(host, corpus, tmp_path, monkeypatch):
    wanted, path = {("layers-00-01", 0): made_sae()}, tmp_path / "c"
    with pytest.raises(InputError, match="train the run first"):
        write(path, host, corpus, {})
    with pytest.raises(InputError, match=r"layer 2 is no member of layers-00-01.* 0, 1"):
        write(path, host, corpus, {("layers-00-01", 2): made_sae()})
    with pytest.raises(InputError, match="tokens=0"):
        write(path, host, corpus, wanted, tokens=0)
    with pytest.raises(InputError, match="at most"):
        write(path, host, corpus, wanted, tokens=2**31)
    with pytest.raises(InputError, match=r"all 112 tokens .* special"):
        write(path, host, corpus, wanted, special=range(96))
    free = namedtuple("Usage", "free")(5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(InputError, match=r"would take about 9,408 bytes.* 5,000 bytes free"):
        write(path, host, corpus, wanted)
    assert not list(tmp_path.iterdir())


def test_a_host_that_gives_nan_is_refused(corpus, tmp_path):
    model = tiny_model("gpt_neox")
    host = HostModel(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[5:20] = float("nan")
    with pytest.raises(InputError, match="layer 0 hold NaN"):
        write(tmp_path / "c", host, corpus, {("layers-00-01", 0): made_sae()})


def test_only_a_cache_is_replaced(host, corpus, tmp_path):
    wanted, path = {("layers-00-01", 0): made_sae()}, tmp_path / "c"
    path.mkdir()
    (path / "thesis.tex").write_text("all of it")
    with pytest.raises(InputError, match="something else"):
        write(path, host, corpus, wanted)
    (path / "thesis.tex").unlink()
    write(path, host, corpus, wanted)
    assert write(path, host, corpus, wanted, tokens=32).manifest.contexts == 2


def test_what_is_not_there_is_said(cache, tmp_path):
    with pytest.raises(InputError, match=r"'layers-07' is not in .* layers-00-01, baseline"):
        cache.firings("layers-07", 0, 0)
    with pytest.raises(InputError, match=r"layer 7 of layers-00-01 .* 0, 1"):
        cache.density("layers-00-01", 7)
    for latent in (-1, 40):
        with pytest.raises(InputError, match=f"latent {latent} does not exist.* 0 to 39"):
            cache.firings("layers-00-01", 0, latent)
    with pytest.raises(InputError, match=r"holds no latent cache: cache.json is missing"):
        LatentCache(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "cache.json").write_text("{}"),
        lambda path: (path / "tokens.safetensors").write_bytes(b"12345678"),
        lambda path: (path / "layers-00-01" / "layer-00" / "index.safetensors").unlink(),
        lambda path: next((path / "layers-00-01" / "layer-00").glob("latents*")).write_bytes(b""),
    ],
)
def test_a_damaged_cache_is_said(damage, cache, tmp_path):
    path = shutil.copytree(cache.path, tmp_path / "c")
    damage(path)
    with pytest.raises(InputError, match=r"cannot be read: .*write it again"):
        damaged = LatentCache(path)
        assert damaged.tokens.size
        damaged.firings("layers-00-01", 0, 7)


def test_the_manifest_is_plain_json(cache):
    content = json.loads((cache.path / "cache.json").read_text())
    assert content["entries"][0]["sae"] == "layers-00-01"
    assert content["special_token_ids"] == [0]
