from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from groupsae.errors import InputError
from groupsae.evaluation import similarity
from groupsae.evaluation.similarity import (
    best_matches,
    chance,
    decoder_rows,
    evaluate_similarity,
)
from groupsae.host.tokens import EndOfText
from groupsae.sae import SAE, Latents, SAEConfig

LAYERS = (0, 1, 2)
TOKENS = 24 * 16
SEEDS = range(1, 401)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cosines(A, B) -> np.ndarray:
    """All of them, in float64; 0 for rows of zeros."""
    a, b = (np.asarray(x.detach(), np.float64) for x in (A, B))
    norms = np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
    return np.divide(a @ b.T, norms, out=np.zeros_like(norms), where=norms > 0)


def make_sae(layers, d_sae=48, seed=0, **changes) -> SAE:
    config = SAEConfig(d_model=32, d_sae=d_sae, layers=layers, **{"k": 4, **changes})
    sae = SAE(config, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        sae.b_enc[:2] = -1e6  # these never fire
        if config.learned_affine == "gain":
            sae.gain_out.copy_(normal(*sae.gain_out.shape, seed=seed).exp())
    return sae


class LargestTensor(TorchDispatchMode):
    """How many numbers the largest tensor holds that an operation makes: no view, no input."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {memory(x) for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)}
        result = func(*args, **kwargs)
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, torch.Tensor) and memory(made) not in given:
                self.numbers = max(self.numbers, made.numel())
        return result


def memory(tensor):
    return tensor.untyped_storage().data_ptr()


@settings(max_examples=60, deadline=None)
@given(
    a=st.integers(1, 20),
    b=st.integers(1, 20),
    d_model=st.integers(1, 9),
    block=st.integers(1, 25),
    seed=st.integers(0, 2**31),
    zeros=st.booleans(),
)
def test_best_matches_are_the_largest_cosines_both_ways(a, b, d_model, block, seed, zeros):
    A = normal(a, d_model, seed=seed) * normal(a, 1, seed=seed + 1).exp()
    B = normal(b, d_model, seed=seed + 2)
    if zeros:
        A[0], B[-1] = 0, 0
    best_a, best_b = best_matches(A, B, block)
    dense = cosines(A, B)
    assert best_a.numpy() == pytest.approx(dense.max(1), abs=2e-6)
    assert best_b.numpy() == pytest.approx(dense.max(0), abs=2e-6)


def test_order_and_size_of_rows_do_not_matter():
    A = normal(30, 8)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    sizes = torch.logspace(-30, 30, 30).unsqueeze(1)
    for best in best_matches(A, A[order] * sizes, block=7):
        assert best.numpy() == pytest.approx(np.ones(30), abs=1e-6)
        assert (best <= 1).all()
    for best in best_matches(A[:1], -A[:1]):
        assert best.item() == pytest.approx(-1, abs=1e-6)


def test_16_bit_rows_are_compared_in_float32():
    A = normal(20, 16).bfloat16()
    best, _ = best_matches(A, A)
    assert best.dtype == torch.float32
    assert best.numpy() == pytest.approx(np.ones(20), abs=1e-6)


def test_mmcs_of_random_dictionaries_is_that_of_random_directions():
    """In three dimensions the cosine with a random direction is uniform on [-1, 1] (Archimedes), so
    that the largest of n has the mean (n - 1) / (n + 1).
    """
    n = 20
    best = torch.cat(
        [best_matches(normal(50, 3, seed=s), normal(n, 3, seed=s + 1000))[0] for s in SEEDS]
    )
    # From the variance of the largest of n, as if the rows of one A were a single row.
    error = np.sqrt(4 * n / ((n + 1) ** 2 * (n + 2)) / len(SEEDS))
    assert best.mean().item() == pytest.approx((n - 1) / (n + 1), abs=5 * error)
    assert error < 0.005


def test_no_matrix_of_all_cosines_is_made():
    A, B = normal(600, 8), normal(500, 8, seed=1)
    with LargestTensor() as largest:
        best_matches(A, B, block=64)
    assert largest.numbers == 64 * 64
    with LargestTensor() as largest:
        best_matches(A, B, block=4096)
    assert largest.numbers == 600 * 500  # the mode does see them


@pytest.mark.parametrize("affine", ["none", "bias", "gain"])
def test_decoder_rows_are_what_a_latent_adds_to_the_residual_stream(affine):
    sae = make_sae((1, 2), learned_affine=affine)
    each = torch.arange(48).unsqueeze(1)
    for layer in sae.layers:
        on, off = (sae.decode(Latents(torch.full((48, 1), z), each), layer) for z in (1.0, 0.0))
        same = np.diag(cosines(decoder_rows(sae, layer), on - off))
        assert same == pytest.approx(np.ones(48), abs=1e-5)
    with pytest.raises(InputError, match="layer 0 is no member of this SAE; its layers are 1, 2"):
        decoder_rows(sae, 0)


@pytest.fixture(params=["none", "gain"])
def saes(request):
    """Baselines, partitions into one to three groups that share SAEs, and a yardstick."""
    affine = {"learned_affine": request.param}
    baselines = {layer: make_sae((layer,), seed=layer, **affine) for layer in LAYERS}
    all_layers = make_sae(LAYERS, d_sae=40, seed=3, **affine)
    upper = make_sae((1, 2), seed=4, **affine)
    groups = {
        3: dict(baselines),
        1: dict.fromkeys(LAYERS, all_layers),
        2: {0: baselines[0], 1: upper, 2: upper},
    }
    yardstick = {layer: make_sae((layer,), seed=5 + layer, **affine) for layer in (2, 0)}
    return baselines, groups, yardstick


def evaluate(host, corpus, baselines, groups, yardstick, **changes):
    settings = {"tokens": TOKENS, "batch_contexts": 7, "special": (0,), "matrix_groups": (2,)}
    return evaluate_similarity(
        host, corpus.held_out(), baselines, groups, yardstick, **(settings | changes)
    )


def reference(host, corpus):
    """The concordance and the silent latents of two SAEs, each at a layer, from dense arrays."""
    ids = corpus.held_out().next_contexts(TOKENS // 16)
    streams = host.residual_streams(ids, LAYERS)

    def active(sae, layer):
        with torch.no_grad():
            latents = sae.encode(streams[layer][ids != 0], layer)
        return (latents.dense(sae.config.d_sae) > 0).numpy().astype(float)

    def compare(sae_a, layer_a, sae_b, layer_b):
        a, b = active(sae_a, layer_a), active(sae_b, layer_b)
        both = a.T @ b
        either = len(a) - (1 - a).T @ (1 - b)
        fires = a.any(0)
        return (both[fires] / either[fires]).max(1).mean(), int((~fires).sum())

    return compare


def test_the_artefact_is_as_defined(host, corpus, saes):
    baselines, groups, yardstick = saes
    result = evaluate(host, corpus, *saes)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    ids = corpus.held_out().next_contexts(TOKENS // 16)
    assert result["tokens"] == (ids != 0).sum()
    assert result["excluded_special_tokens"] == (ids == 0).sum()
    assert result["layers"] == [0, 1, 2]
    compare = reference(host, corpus)

    rows = result["rows"]
    assert [(row["groups_total"], row["layer"]) for row in rows] == [
        (G, layer) for G in (1, 2, 3) for layer in LAYERS
    ]
    for row in rows:
        layer = row["layer"]
        sae, baseline = groups[row["groups_total"]][layer], baselines[layer]
        assert row["group"] == list(sae.layers)
        dense = cosines(decoder_rows(sae, layer), decoder_rows(baseline, layer))
        for way, best in (("group_to_layer", dense.max(1)), ("layer_to_group", dense.max(0))):
            assert row[f"mmcs_{way}"] == pytest.approx(best.mean(), abs=1e-6)
            assert row[f"above_0.9_{way}"] == (best > 0.9).mean()
            counts = np.histogram(np.clip(best, 0, 1), bins=40, range=(0, 1))[0]
            assert row["histogram"][way] == counts.tolist()
        assert row["histogram"]["edges"] == pytest.approx(np.linspace(0, 1, 41))
        mean, silent = compare(baseline, layer, sae, layer)
        assert (row["concordance"], row["silent"]) == (pytest.approx(mean), silent)
        if sae is baseline:
            assert row["mmcs_group_to_layer"] == pytest.approx(1, abs=1e-6)
            assert row["above_0.9_layer_to_group"] == row["concordance"] == 1

    assert list(result["matrices"]) == ["1", "2", "3"]
    for G, matrices in result["matrices"].items():
        expected = [
            [
                cosines(decoder_rows(groups[int(G)][b], b), decoder_rows(baselines[a], a))
                .max(1)
                .mean()
                for b in LAYERS
            ]
            for a in LAYERS
        ]
        assert np.array(matrices["mmcs"]) == pytest.approx(np.array(expected), abs=1e-6)
    assert result["matrices"]["1"]["concordance"] is result["matrices"]["3"]["concordance"] is None
    expected = [[compare(baselines[a], a, groups[2][b], b)[0] for b in LAYERS] for a in LAYERS]
    assert np.array(result["matrices"]["2"]["concordance"]) == pytest.approx(np.array(expected))

    assert [entry["layer"] for entry in result["yardstick"]] == [0, 2]
    for entry in result["yardstick"]:
        layer = entry["layer"]
        best = cosines(
            decoder_rows(baselines[layer], layer), decoder_rows(yardstick[layer], layer)
        ).max(1)
        assert entry["mmcs"] == pytest.approx(best.mean(), abs=1e-6)
        assert entry["above_0.9"] == (best > 0.9).mean()
        assert sum(entry["histogram"]["counts"]) == 48
        mean, silent = compare(baselines[layer], layer, yardstick[layer], layer)
        assert (entry["concordance"], entry["silent"]) == (pytest.approx(mean), silent)


def test_what_is_reported_is_defined(host, corpus, saes):
    result = evaluate(host, corpus, *saes)
    described = {*result["definitions"], "definitions", "layers", "layer", "group", "groups_total"}
    described |= {"rows", "mmcs", "above_0.9"}  # of a row, or said under matrices and yardstick
    entries = [result, *result["rows"], *result["matrices"].values(), *result["yardstick"]]
    assert set().union(*entries) - {"1", "2", "3"} <= described
    assert set(result["definitions"]) <= set().union(*entries)


def test_every_distinct_pair_is_compared_once(host, corpus, saes, monkeypatch):
    baselines, groups, _ = saes
    compared = {"best_matches": 0, "concordance": 0}
    for name in compared:
        plain = getattr(similarity, name)

        def counting(*args, name=name, plain=plain):
            compared[name] += 1
            return plain(*args)

        monkeypatch.setattr(similarity, name, counting)
    evaluate(host, corpus, baselines, groups, None)
    gains = baselines[0].config.learned_affine == "gain"
    # Every baseline with every baseline, the SAE of all layers and that of the upper two: with
    # gains these have other directions at each of their layers. And once for chance.
    assert compared["best_matches"] == 3 * (3 + (3 + 2 if gains else 1 + 1)) + 1
    # Of G = 2 the matrix, of G = 1 and 3 the diagonals; (0, 0) belongs to both 2 and 3.
    assert compared["concordance"] == 9 + 3 + 2


def test_without_a_yardstick_or_a_firing_latent_null_is_said(host, corpus):
    silent = make_sae((0,))
    with torch.no_grad():
        silent.b_enc.fill_(-1e6)
    result = evaluate(host, corpus, {0: silent}, {1: {0: make_sae((0,))}}, None, matrix_groups=())
    assert result["yardstick"] is None
    assert result["rows"][0]["concordance"] is None
    assert result["rows"][0]["silent"] == 48
    assert result["matrices"]["1"]["concordance"] is None


def test_bad_input_is_refused_before_any_forward(host, corpus, saes, monkeypatch):
    baselines, groups, _ = saes
    monkeypatch.setattr(type(host), "residual_streams", None)
    mend = r"train the run with training\.baseline=true"
    with pytest.raises(InputError, match=f"there is no baseline SAE .*{mend}"):
        evaluate(host, corpus, {}, {}, None)
    with pytest.raises(InputError, match=f"layers 1, 2 have no baseline SAE .*{mend}"):
        evaluate(host, corpus, {0: baselines[0]}, groups, None)
    with pytest.raises(InputError, match=r"partition of 2 groups covers layers \[0, 1\]"):
        evaluate(host, corpus, baselines, groups | {2: {0: groups[2][0], 1: groups[2][1]}}, None)
    with pytest.raises(InputError, match=r"matrix_groups=\[4\].*G = 1, 2, 3"):
        evaluate(host, corpus, *saes, matrix_groups=(4, 1))


def test_fewer_tokens_than_asked_are_refused(host, corpus, saes):
    with pytest.raises(EndOfText, match=r"contexts of 16 tokens .* are asked for"):
        evaluate(host, corpus, *saes, tokens=10**6, batch_contexts=64)


def test_chance_is_what_unrelated_dictionaries_have():
    sae, other = make_sae((0,), seed=3), make_sae((0,), seed=4)  # both new: random directions
    unrelated = float(best_matches(sae.W_dec.data, other.W_dec.data)[0].mean())
    assert chance(sae) == pytest.approx(unrelated, abs=0.05)
