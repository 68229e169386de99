from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsae.errors import InputError
from groupsae.interpretation.cache_pass import write_latent_cache
from groupsae.interpretation.depth import DepthProfile, _blocks, depth_profile, persistence_of
from groupsae.interpretation.latent_cache import FiringRange
from tests.interpretation.cases import D_SAE, SILENT, dense, ids_of, made_sae

NAME = "layers-00-01"


def firing_range(active: np.ndarray) -> FiringRange:
    """From [latent, token]."""
    latents, positions = active.nonzero()
    offsets = np.concatenate([[0], active.sum(1).cumsum()])
    return FiringRange(offsets, positions.astype(np.int32), np.ones(len(latents), np.float32))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 30),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)
def test_persistence_counts_the_layers_of_each_token(layers, latents, tokens, density, seed):
    active = np.random.default_rng(seed).random((layers, latents, tokens)) < density
    found = persistence_of([firing_range(of_layer) for of_layer in active])
    at_once = active.sum(0)
    for latent in range(latents):
        expected = [int((at_once[latent] == n).sum()) for n in range(1, layers + 1)]
        assert found[latent].tolist() == expected


@pytest.mark.parametrize("block_firings", [1, 200, 10**6])
def test_the_profile_of_dense_latents(block_firings, host, corpus, saes, cache):
    active = np.stack(
        [(dense(host, corpus, saes[NAME], layer) > 0).numpy().T for layer in (0, 1)], axis=2
    )  # [latent, token, layer]
    tokens = int((ids_of(corpus) != 0).sum())
    profile = depth_profile(cache, NAME, block_firings=block_firings)
    assert profile.layers == (0, 1)
    np.testing.assert_allclose(profile.rate, active.sum(1) / tokens, rtol=1e-12)
    at_once = active.sum(2)
    expected = np.stack([(at_once == 1).sum(1), (at_once == 2).sum(1)], axis=1)
    assert profile.persistence.tolist() == expected.tolist()
    fires = at_once > 0
    np.testing.assert_allclose(
        profile.mean_persistence[~profile.silent],
        [row[on].mean() for row, on in zip(at_once, fires, strict=True) if on.any()],
    )
    assert np.flatnonzero(profile.silent).tolist() == np.flatnonzero(~fires.any(1)).tolist()
    assert set(SILENT) <= set(np.flatnonzero(profile.silent))
    np.testing.assert_array_equal(profile.mean[:, 1], cache.index(NAME, 1).mean)


def made_profile(rate) -> DepthProfile:
    rate = np.array(rate, np.float64)
    layers = tuple(range(3, 3 + rate.shape[1]))
    persistence = np.zeros(rate.shape, np.int64)
    persistence[:, 0] = 1
    return DepthProfile(layers, rate, rate.astype(np.float32), persistence)


def test_where_latents_live():
    profile = made_profile(
        [
            [0.5, 0.0, 0.0, 0.0],  # one
            [0.1, 0.5, 0.04, 0.0],  # the first two: 0.04 is below an eighth
            [0.25, 0.25, 0.25, 0.03125],  # all: an eighth is enough
            [0.0, 0.0, 0.0, 0.0],  # silent
            [0.3, 0.0, 0.0, 0.3],  # two, with a gap
        ]
    )
    assert profile.lives(0.125).astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 1],
        [0, 0, 0, 0],
        [1, 0, 0, 1],
    ]
    assert profile.span(0.125).tolist() == [[3, 3], [3, 4], [3, 6], [-1, -1], [3, 6]]
    assert profile.span(1)[1].tolist() == [4, 4]
    summary = profile.summary(0.125)
    assert [summary[key] for key in ("one", "some", "all", "silent")] == [0.25, 0.5, 0.25, 0.2]
    assert json.loads(json.dumps(summary)) == summary
    np.testing.assert_allclose(profile.share_of_firings.sum(1), [1, 1, 1, 0, 1])
    centres = [3, (0.3 + 2 + 0.2) / 0.64, (0.75 + 1 + 1.25 + 0.1875) / 0.78125, np.nan, 4.5]
    np.testing.assert_allclose(profile.centre, centres)
    assert profile.order.tolist() == [0, 1, 2, 4, 3]


def test_a_single_layer_is_one_and_not_all():
    summary = made_profile([[0.5], [0.1]]).summary()
    assert (summary["one"], summary["some"], summary["all"]) == (1, 0, 0)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(1, 20), st.floats(0.01, 1), st.integers(0, 2**32 - 1))
def test_fractions_add_up(layers, latents, share, seed):
    rate = np.random.default_rng(seed).random((latents, layers)) ** 8
    summary = made_profile(rate).summary(share)
    assert summary["one"] + summary["some"] + summary["all"] == pytest.approx(1)
    span = made_profile(rate).span(share)
    assert (span[:, 0] <= span[:, 1]).all()


@pytest.mark.parametrize("share", [0, -0.1, 1.1])
def test_an_impossible_share_is_refused(share):
    with pytest.raises(InputError, match=f"share={share}"):
        made_profile([[0.5]]).lives(share)


def test_blocks_cover_every_latent_once():
    counts = np.array([[3, 1], [3, 1], [1, 9], [0, 0], [2, 2]])
    assert list(_blocks(counts, 6)) == [(0, 2), (2, 3), (3, 5)]
    assert list(_blocks(counts, 1)) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert list(_blocks(counts, 100)) == [(0, 5)]


def test_an_sae_without_firings_is_said(host, corpus, tmp_path):
    sae = made_sae()
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    cache = write_latent_cache(
        tmp_path / "c", host, corpus.held_out(), {("dead", 0): sae}, tokens=64, batch_contexts=4
    )
    assert cache.d_sae("dead") == D_SAE
    with pytest.raises(InputError, match="no latent of dead fires on any of the 64 tokens"):
        depth_profile(cache, "dead")


def test_a_heat_map_has_every_firing_latent_by_depth(cache):
    profile = depth_profile(cache, NAME)
    whole = profile.heat_map(rows=10**6)
    firing = [i for i in profile.order if not profile.silent[i]]
    np.testing.assert_allclose(whole["share"], profile.share_of_firings[firing], atol=1e-5)
    assert (whole["latents_per_row"], whole["silent"]) == (1, len(SILENT))
    binned = profile.heat_map(rows=5)
    assert len(binned["share"]) == 5
    assert binned["latents_per_row"] == len(firing) / 5
    np.testing.assert_allclose(np.sum(binned["share"], axis=1), 1, atol=1e-4)
    assert np.all(np.diff(np.array(binned["share"]) @ [0, 1]) >= 0)  # ever deeper
