from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsae.errors import InputError
from groupsae.evaluation.concordance import concordance
from groupsae.evaluation.similarity import best_matches
from groupsae.interpretation.matching import companions, match, nearest_rows, strata
from tests.evaluation.test_concordance import firings_of, two_patterns
from tests.interpretation.cases import SILENT, dense
from tests.interpretation.test_depth import firing_range


@settings(max_examples=100, deadline=None)
@given(patterns=two_patterns(), n=st.integers(1, 6), block=st.integers(1, 15))
def test_companions_are_those_of_the_sets(patterns, n, block):
    a, b = patterns  # [token, latent]
    ranges = [firing_range(pattern.T) for pattern in patterns]
    best, which = companions(*ranges, n, positions=len(a), block=block)
    assert best[:, 0].tolist() == pytest.approx(
        concordance(firings_of(a), firings_of(b))[0].tolist()
    )
    both, either = (a[:, :, None] & b[:, None]).sum(0), (a[:, :, None] | b[:, None]).sum(0)
    jaccard = both / np.maximum(either, 1)
    order = np.argsort(-jaccard, axis=1, kind="stable")[:, :n]
    values = np.take_along_axis(jaccard, order, 1)
    assert which.tolist() == np.where(values > 0, order, -1).tolist()
    np.testing.assert_allclose(best, values)


@pytest.mark.parametrize("n", [1, 3, 20])
@pytest.mark.parametrize("block", [1, 3, 100])
def test_nearest_rows_are_those_of_all_cosines(block, n):
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(7, 5, generator=generator), torch.randn(11, 5, generator=generator)
    A[2] = -3 * B[4]
    cosines, which = nearest_rows(A, B, n, block)
    every = torch.cosine_similarity(A[:, None].double(), B[None].double(), dim=2)
    largest, at = every.topk(min(n, 11), dim=1)
    torch.testing.assert_close(cosines.double(), largest, rtol=1e-5, atol=1e-6)
    assert which.tolist() == at.tolist()
    torch.testing.assert_close(cosines[:, 0], best_matches(A, B)[0])


@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_of_equal_rows_the_first_are_taken(block):
    B = torch.tensor([[0.0, 1], [2, 0], [1, 0], [0, 1], [4, 0]])
    _, which = nearest_rows(torch.eye(2), B, 3, block)
    assert which.tolist() == [[1, 2, 4], [0, 3, 1]]


def test_a_group_against_a_baseline(host, corpus, saes, cache):
    name, baseline, layer = "layers-00-01", "baseline/layers-01", 1
    found = match(cache, name, saes[name], baseline, saes[baseline], layer)
    ours, theirs = (dense(host, corpus, saes[each], layer) > 0 for each in (name, baseline))
    both = ours.double().T @ theirs.double()
    either = ours.sum(0)[:, None] + theirs.sum(0) - both
    jaccard = torch.where(both > 0, both / either, 0)
    np.testing.assert_allclose(found.jaccard[:, 0], jaccard.amax(1), rtol=1e-12)
    assert (found.companions[list(SILENT)] == -1).all()
    rows = torch.cosine_similarity(
        saes[name].W_dec.detach()[:, None], saes[baseline].W_dec.detach()[None], dim=2
    )
    np.testing.assert_allclose(found.cosine[:, 0], rows.amax(1), rtol=1e-5)
    assert found.nearest[:, 0].tolist() == rows.argmax(1).tolist()


def test_an_sae_matches_itself(saes, cache):
    name = "baseline/layers-00"
    found = match(cache, name, saes[name], name, saes[name], 0)
    fires = cache.density(name, 0) > 0
    assert found.nearest[:, 0].tolist() == list(range(40))
    np.testing.assert_allclose(found.cosine, 1, rtol=1e-5)
    assert (found.jaccard[:, 0] == fires).all()


def test_several_matches_of_some_latents(saes, cache):
    name, baseline, layer = "layers-00-01", "baseline/layers-01", 1
    options = (cache, name, saes[name], baseline, saes[baseline], layer)
    every, some = match(*options, n=4), match(*options, n=4, latents=np.array([2, 9, 30]))
    assert every.nearest.shape == every.companions.shape == (40, 4)
    np.testing.assert_allclose(some.cosine, every.cosine[[2, 9, 30]], rtol=1e-5)
    assert some.nearest.tolist() == every.nearest[[2, 9, 30]].tolist()
    assert some.jaccard.tolist() == every.jaccard[[2, 9, 30]].tolist()
    assert some.companions.tolist() == every.companions[[2, 9, 30]].tolist()


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 12),
    st.integers(1, 4),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)
def test_strata_cover_the_range(latents, parts, per_part, eligible_share, seed):
    random = np.random.default_rng(seed)
    similarity = random.choice([-0.2, 0.0, 1.0, *random.random(5)], latents)
    eligible = random.random(latents) < eligible_share
    eligible[0] = True
    found = strata(similarity, eligible, parts=parts, per_part=per_part, seed=3)
    assert found == strata(similarity, eligible, parts=parts, per_part=per_part, seed=3)
    assert sum(stratum.population for stratum in found) == eligible.sum()
    for stratum in found:
        assert len(stratum.latents) == min(per_part, stratum.population)
        values = similarity[list(stratum.latents)].clip(0)
        assert ((stratum.low - 1e-12 <= values) & (values <= stratum.high + 1e-12)).all()
        assert values.tolist() == sorted(values)
        assert eligible[list(stratum.latents)].all()


def test_nothing_to_draw_from_is_said():
    with pytest.raises(InputError, match="no latent fires"):
        strata(np.ones(3), np.zeros(3, bool))
