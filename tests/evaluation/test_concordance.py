from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score

from groupsae.errors import InputError
from groupsae.evaluation.concordance import (
    Firings,
    concordance,
    firing_sets,
    mean_concordance,
)
from groupsae.host.tokens import EndOfText
from groupsae.sae import SAE, SAEConfig
from tests.evaluation.test_similarity import LargestTensor

TOKENS = 24 * 16


def firings_of(active: np.ndarray) -> Firings:
    """From [token, d_sae], the latents of a token in any order."""
    order = np.random.default_rng(0)
    latents = [order.permutation(np.flatnonzero(row)) for row in active]
    bounds = np.cumsum([0, *map(len, latents)])
    return Firings(bounds, np.concatenate(latents).astype(np.int32), active.shape[1])


def by_sets(a: np.ndarray, b: np.ndarray) -> list[float]:
    """The largest Jaccard index of each column of a with a column of b, from Python's sets."""
    sets_a, sets_b = ([set(np.flatnonzero(column)) for column in x.T] for x in (a, b))
    return [
        max(len(one & other) / len(one | other) if one else 0.0 for other in sets_b)
        for one in sets_a
    ]


def made_sae(layers=(0, 1), d_sae=40, seed=0, **changes) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    config = SAEConfig(d_model=32, d_sae=d_sae, layers=layers, **{"k": 5, **changes})
    sae = SAE(config, generator=generator)
    with torch.no_grad():
        sae.b_enc[:3] = -1e6  # these never fire
    return sae


@st.composite
def two_patterns(draw):
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens = draw(st.integers(1, 40))
    return [
        random.random((tokens, draw(st.integers(1, 12)))) < draw(st.floats(0, 1)) for _ in range(2)
    ]


@settings(max_examples=100, deadline=None)
@given(patterns=two_patterns(), block=st.integers(1, 50))
def test_the_largest_jaccard_index_of_every_latent(patterns, block):
    a, b = patterns
    best, silent = concordance(firings_of(a), firings_of(b), block)
    assert best.tolist() == pytest.approx(by_sets(a, b), abs=1e-15)
    assert silent.tolist() == (~a.any(0)).tolist()
    mean, count = mean_concordance(best, silent)
    firing = [value for value, fires in zip(by_sets(a, b), a.any(0), strict=True) if fires]
    assert count == a.shape[1] - len(firing)
    assert mean == (pytest.approx(np.mean(firing)) if firing else None)


@settings(max_examples=25, deadline=None)
@given(patterns=two_patterns())
def test_it_is_scikit_learns_jaccard_score(patterns):
    a, b = patterns
    best, _ = concordance(firings_of(a), firings_of(b))
    expected = [max(jaccard_score(one, other, zero_division=0) for other in b.T) for one in a.T]
    assert best.tolist() == pytest.approx(expected, abs=1e-12)


def test_it_is_not_symmetric():
    # Two latents of A split the only latent of B between them.
    a, b = np.array([[1, 0], [1, 0], [1, 0], [0, 1]]), np.ones((4, 1))
    one, other = firings_of(a), firings_of(b)
    assert mean_concordance(*concordance(one, other)) == ((0.75 + 0.25) / 2, 0)
    assert mean_concordance(*concordance(other, one)) == (0.75, 0)


def test_firing_sets_of_different_length_are_refused():
    with pytest.raises(InputError, match=r"on 3 and on 2 tokens"):
        concordance(firings_of(np.ones((3, 2))), firings_of(np.ones((2, 2))))


def test_memory_is_bounded_by_the_firings_and_the_block():
    """Neither d_sae x d_sae numbers nor all of B's firings beside A's are held at any time."""
    tokens, k, d_sae, block = 4000, 8, 1024, 128
    first = np.random.default_rng(0).integers(0, d_sae - 1, (tokens, 1))
    latents = 1 + (first + 50 * np.arange(k)) % (d_sae - 1)
    latents[:, 0] = 0  # fires on every token
    bounds = np.arange(0, tokens * k + 1, k)
    firings = Firings(bounds, latents.astype(np.int32).ravel(), d_sae)
    with LargestTensor() as largest:
        concordance(firings, firings, block)
    assert largest.numbers == max(block * k, d_sae)
    tracemalloc.start()  # sees numpy's arrays
    concordance(firings, firings, block)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 7 * tokens * k + 8 * tokens + 5 * block * k + 100_000 < d_sae**2 / 2


@pytest.mark.parametrize("options", [{}, {"architecture": "relu", "k": None}])
def test_firings_are_those_of_the_encoder(host, corpus, options):
    wanted = [
        (sae, layer)
        for sae in (made_sae((0, 1), **options), made_sae((1, 2), seed=1, **options))
        for layer in sae.layers
    ]
    sets = firing_sets(
        host, corpus.held_out(), wanted, tokens=TOKENS - 3, batch_contexts=7, special=(0,)
    )
    ids = corpus.held_out().next_contexts(TOKENS // 16)
    assert (sets.tokens, sets.excluded) == (int((ids != 0).sum()), int((ids == 0).sum()))
    assert set(sets.of) == set(wanted)
    for sae, layer in wanted:
        x = host.residual_streams(ids, [layer])[layer][ids != 0]
        active = (sae.encode(x, layer).dense(40) > 0).numpy()
        firings = sets.of[sae, layer]
        assert firings.tokens == sets.tokens
        assert firings.counts().tolist() == active.sum(0).tolist()
        for row, (start, stop) in zip(active, pairwise(firings.bounds), strict=True):
            assert sorted(firings.latents[start:stop]) == np.flatnonzero(row).tolist()


def test_one_forward_of_the_host_serves_all(host, corpus, monkeypatch):
    calls = []
    residual_streams = type(host).residual_streams
    monkeypatch.setattr(
        type(host),
        "residual_streams",
        lambda self, ids, layers: calls.append(layers) or residual_streams(self, ids, layers),
    )
    wanted = [(made_sae((0, 2), seed=seed), layer) for seed in range(3) for layer in (2, 0)]
    firing_sets(host, corpus.held_out(), wanted, tokens=10 * 16, batch_contexts=5)
    assert calls == [[0, 2], [0, 2]]


def test_an_sae_agrees_with_itself_and_a_permutation_of_it(host, corpus):
    sae, other = made_sae(), made_sae()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weights in (other.W_enc, other.W_dec, other.b_enc):
            weights.copy_(weights[order])
    sets = firing_sets(
        host, corpus.held_out(), [(sae, 1), (other, 1)], tokens=TOKENS, batch_contexts=8
    )
    for b in (sae, other):
        best, silent = concordance(sets.of[sae, 1], sets.of[b, 1])
        mean, count = mean_concordance(best, silent)
        assert mean == 1
        assert count == silent.sum() >= 3
        assert silent[:3].all()
    best, _ = concordance(sets.of[other, 1], sets.of[sae, 1])
    assert (best == 0).tolist() == silent[order].tolist()


def test_too_little_text_and_text_of_special_tokens_only_are_refused(host, corpus):
    wanted = [(made_sae(), 0)]
    with pytest.raises(EndOfText, match=r"is used up: it holds .* contexts of 16 tokens"):
        firing_sets(host, corpus.held_out(), wanted, tokens=10**6, batch_contexts=64)
    with pytest.raises(InputError, match=r"all 32 tokens read are special"):
        firing_sets(host, corpus.held_out(), wanted, tokens=20, batch_contexts=2, special=range(96))
    with pytest.raises(InputError, match=r"similarity\.tokens=0"):
        firing_sets(host, corpus.held_out(), wanted, tokens=0, batch_contexts=2)
