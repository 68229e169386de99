from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from groupsae.config import Config
from groupsae.errors import InputError
from groupsae.grouping.distance import AngularDistances
from groupsae.grouping.methods import complete_linkage
from groupsae.grouping.similarity import CKADistances, SVCCADistances
from groupsae.host.model import HostModel
from groupsae.measurement import load_moments, measure_layers, save_moments
from groupsae.run import Run

# models/stories3M/README.md beside the checkout: per token, uncentred, BOS excluded.
STORIES3M = np.array(
    [
        [0, 0.202, 0.261, 0.31, 0.343, 0.414],
        [0.202, 0, 0.198, 0.271, 0.319, 0.397],
        [0.261, 0.198, 0, 0.214, 0.284, 0.373],
        [0.31, 0.271, 0.214, 0, 0.228, 0.336],
        [0.343, 0.319, 0.284, 0.228, 0, 0.268],
        [0.414, 0.397, 0.373, 0.336, 0.268, 0],
    ]
)


def streams_in_one_piece(host, corpus, contexts):
    ids = corpus.train().next_contexts(contexts)
    mask = ids != 0
    streams = host.residual_streams(ids, range(3))
    return [streams[layer][mask].double() for layer in range(3)], int((~mask).sum())


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("batch_contexts", [7, 100])
def test_distances_and_moments_over_all_tokens_at_once(host, corpus, center, batch_contexts):
    measured = measure_layers(
        host,
        corpus.train(),
        range(3),
        tokens=1000,
        batch_contexts=batch_contexts,
        center=center,
        special=(0,),
    )
    x, excluded = streams_in_one_piece(host, corpus, 63)  # 1,000 tokens, rounded up to contexts
    assert measured.excluded == excluded > 0
    assert measured.distances.tokens == len(x[0])
    for p in range(3):
        mean = x[p].mean(0)
        torch.testing.assert_close(measured.moments.mean[p], mean)
        torch.testing.assert_close(measured.moments.mean_norm[p], x[p].norm(dim=1).mean())
        torch.testing.assert_close(
            measured.moments.mean_centered_norm[p], (x[p] - mean).norm(dim=1).mean()
        )
        for q in range(p):
            a, b = (x[i] - x[i].mean(0) if center else x[i] for i in (p, q))
            expected = torch.cosine_similarity(a, b).clamp(-1, 1).arccos().mean() / np.pi
            assert measured.distances.matrix[p, q] == pytest.approx(expected.item(), abs=1e-9)


@pytest.mark.parametrize("kind", [CKADistances, SVCCADistances])
@pytest.mark.parametrize("center", [True, False])
def test_other_similarities_are_measured_on_the_same_tokens(host, corpus, kind, center):
    name = {CKADistances: "cka", SVCCADistances: "svcca"}[kind]
    measured = measure_layers(
        host,
        corpus.train(),
        range(3),
        tokens=1000,
        batch_contexts=100,
        center=center,
        similarity=name,
        special=(0,),
    )
    x, _ = streams_in_one_piece(host, corpus, 63)
    expected = kind(range(3))
    expected.update(torch.stack(x))
    result = measured.distances
    np.testing.assert_allclose(result.matrix, expected.result().matrix, rtol=0, atol=1e-9)
    assert (result.similarity, result.center, result.tokens) == (name, True, len(x[0]))
    assert result.matrix[0, 1] > 0.001
    torch.testing.assert_close(measured.moments.mean[1], x[1].mean(0))


@pytest.mark.parametrize("similarity", ["cka", "svcca"])
def test_a_run_groups_by_another_similarity_and_says_what_the_threshold_is_for(
    tiny_config, tmp_path, caplog, similarity
):
    by_threshold = [key for key in tiny_config if not key.startswith("grouping.groups")]
    config = Config.load(None, [*by_threshold, f"grouping.similarity={similarity}"])
    caplog.set_level("INFO", "groupsae")
    run = Run(tmp_path / "run", config)
    distances = run.distances()
    assert distances.similarity == similarity
    stored = json.loads((tmp_path / "run" / "distances.json").read_text())
    assert stored["similarity"] == similarity
    assert "0.2 on AMAD was chosen for angular distances" in stored["threshold_note"]
    assert caplog.text.count("0.2 on AMAD was chosen for angular distances") == 1
    for G, row in run.groups().by_groups.items():
        assert row.partition.groups == complete_linkage(distances)[G].groups
    with pytest.raises(InputError, match=r"grouping\.similarity was '\w+', is now 'angular'"):
        Run(tmp_path / "run", Config.load(None, by_threshold))


def test_nothing_is_said_of_the_threshold_where_it_does_not_choose(tiny_config, tmp_path, caplog):
    caplog.set_level("INFO", "groupsae")
    by_threshold = [key for key in tiny_config if not key.startswith("grouping.groups")]
    for name, keys in (
        ("fixed", [*tiny_config, "grouping.similarity=cka"]),
        ("angles", by_threshold),
    ):
        Run(tmp_path / name, Config.load(None, keys)).distances()
    assert "AMAD" not in caplog.text


def test_similarities_that_subtract_the_means_are_refused_without():
    with pytest.raises(InputError, match=r"false goes with grouping\.similarity=angular alone"):
        Config.load(None, ["grouping.similarity=cka", "grouping.center=false"])
    Config.load(None, ["grouping.similarity=angular", "grouping.center=false"])


def test_moments_survive_the_way_to_disk(host, corpus, tmp_path):
    moments = measure_layers(host, corpus.train(), (0, 2), tokens=500, batch_contexts=8).moments
    save_moments(moments, tmp_path / "moments.safetensors")
    loaded = load_moments(tmp_path / "moments.safetensors")
    assert loaded.layers == (0, 2)
    assert loaded.tokens == moments.tokens
    for name in ("mean", "mean_norm", "mean_centered_norm"):
        assert torch.equal(getattr(loaded, name), getattr(moments, name))


@pytest.mark.shared
def test_distances_of_a_real_model_are_those_measured_elsewhere(shared):
    """The same tokens: the first documents of the validation text, one by one, BOS left out."""
    host = HostModel.load(shared / "models" / "stories3M")
    distances = AngularDistances(range(6))
    tokens = 0
    with (shared / "text" / "tinystories" / "valid.jsonl").open() as file:
        while tokens < 20_040:
            ids = host.tokenizer(json.loads(next(file))["text"], return_tensors="pt").input_ids
            streams = host.residual_streams(ids[:, :512], range(6))
            distances.update(torch.stack([streams[layer][0, 1:] for layer in range(6)]))
            tokens += streams[0].shape[1] - 1
    assert np.abs(distances.result().matrix - STORIES3M).max() < 1e-3


@pytest.mark.parametrize(
    "content", [b"", b"\x08" + bytes(7) + b"{}      "], ids=["empty", "no tensors"]
)
def test_damaged_moments_are_named(tmp_path, content):
    path = tmp_path / "moments.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"moments\.safetensors is damaged .* remove it"):
        load_moments(path)
