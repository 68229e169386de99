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
@given(patterns=two_patterns(), block=st.integers(1, 15))
def test_companions_are_those_of_the_sets(patterns, block):
    a, b = patterns  # [token, latent]
    best, which = companions(firing_range(a.T), firing_range(b.T), positions=len(a), block=block)
    assert best.tolist() == pytest.approx(concordance(firings_of(a), firings_of(b))[0].tolist())
    for latent, (jaccard, other) in enumerate(zip(best, which, strict=True)):
        if other < 0:
            assert jaccard == 0
            assert not (a[:, latent, None] & b).any()
        else:
            one, two = (set(np.flatnonzero(x)) for x in (a[:, latent], b[:, other]))
            assert jaccard == pytest.approx(len(one & two) / len(one | two))


@pytest.mark.parametrize("block", [1, 3, 100])
def test_nearest_rows_are_those_of_all_cosines(block):
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(7, 5, generator=generator), torch.randn(11, 5, generator=generator)
    A[2] = -3 * B[4]
    cosines, which = nearest_rows(A, B, block)
    every = torch.cosine_similarity(A[:, None].double(), B[None].double(), dim=2)
    torch.testing.assert_close(cosines.double(), every.amax(1), rtol=1e-5, atol=1e-6)
    assert which.tolist() == every.argmax(1).tolist()
    torch.testing.assert_close(cosines, best_matches(A, B)[0])


def test_a_group_against_a_baseline(host, corpus, saes, cache):
    name, baseline, layer = "layers-00-01", "baseline/layers-01", 1
    found = match(cache, name, saes[name], baseline, saes[baseline], layer)
    ours, theirs = (dense(host, corpus, saes[each], layer) > 0 for each in (name, baseline))
    both = ours.double().T @ theirs.double()
    either = ours.sum(0)[:, None] + theirs.sum(0) - both
    jaccard = torch.where(both > 0, both / either, 0)
    np.testing.assert_allclose(found.jaccard, jaccard.amax(1), rtol=1e-12)
    assert (found.companion[list(SILENT)] == -1).all()
    rows = torch.cosine_similarity(
        saes[name].W_dec.detach()[:, None], saes[baseline].W_dec.detach()[None], dim=2
    )
    np.testing.assert_allclose(found.cosine, rows.amax(1), rtol=1e-5)
    assert found.nearest.tolist() == rows.argmax(1).tolist()


def test_an_sae_matches_itself(saes, cache):
    name = "baseline/layers-00"
    found = match(cache, name, saes[name], name, saes[name], 0)
    fires = cache.density(name, 0) > 0
    assert found.nearest.tolist() == list(range(40))
    np.testing.assert_allclose(found.cosine, 1, rtol=1e-5)
    assert (found.jaccard == fires).all()


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
