"""Scores of sparse activations, against scikit-learn on dense ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from sklearn.metrics import f1_score, roc_auc_score

from groupsae.interpretation.detection import auroc, best_detectors, best_f1, f1


@st.composite
def cases(draw, most=40):
    """Labels [token, attribute], each with both classes, and activations with many ties."""
    n, latents, attributes = (
        draw(st.integers(4, most)),
        draw(st.integers(1, 5)),
        draw(st.integers(1, 4)),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    labels = rng.random((n, attributes)) < rng.random(attributes)
    labels[0], labels[1] = True, False
    values = rng.integers(0, draw(st.sampled_from([2, 4, 1000])), (n, latents)) / 8
    values[rng.random((n, latents)) < draw(st.sampled_from([0.0, 0.5, 0.95]))] = 0
    return labels, values


@settings(max_examples=50, deadline=None)
@given(cases())
def test_auroc_is_that_of_scikit_learn(case):
    labels, values = case
    expected = [[roc_auc_score(truth, z) for truth in labels.T] for z in values.T]
    np.testing.assert_allclose(auroc(labels, csr_array(values)), expected, rtol=1e-12)


@settings(max_examples=25, deadline=None)
@given(cases())
def test_the_best_f1_is_the_best_of_every_latent_and_threshold(case):
    labels, values = case
    found = best_f1(labels, csr_array(values))
    for attribute, truth in enumerate(labels.T):
        scores = [
            f1_score(truth, z >= threshold) for z in values.T for threshold in np.unique(z[z > 0])
        ]
        assert found.f1[attribute] == pytest.approx(max(scores, default=0.0), abs=1e-12)
        chosen = values[:, found.latent[attribute]] >= found.threshold[attribute]
        assert found.f1[attribute] == pytest.approx(f1_score(truth, chosen, zero_division=0))
        assert found.threshold[attribute] > 0


@settings(max_examples=25, deadline=None)
@given(cases(most=20), cases(most=20))
def test_latents_are_chosen_on_one_half_and_scored_on_the_other(one, other):
    latents = min(one[1].shape[1], other[1].shape[1])
    attributes = min(one[0].shape[1], other[0].shape[1])
    halves = [(labels[:, :attributes], values[:, :latents]) for labels, values in (one, other)]
    labels, values = (np.concatenate(parts) for parts in zip(*halves, strict=True))
    first = np.arange(len(labels)) < len(one[0])
    order = np.random.default_rng(0).permutation(len(labels))  # halves need not lie together
    found = best_detectors(labels[order], csr_array(values[order]), first[order])
    for attribute in range(attributes):
        truth = labels[:, attribute]
        of_first = [roc_auc_score(truth[first], z) for z in values[first].T]
        assert of_first[found.latent[attribute]] == pytest.approx(max(of_first))
        z = values[~first, found.latent[attribute]]
        assert found.auroc[attribute] == pytest.approx(roc_auc_score(truth[~first], z))
        detected = values[~first, found.f1_latent[attribute]] >= found.threshold[attribute]
        expected = f1_score(truth[~first], detected, zero_division=0)
        assert found.f1[attribute] == pytest.approx(expected)


def test_a_silent_latent_is_at_chance_and_detects_nothing():
    labels = np.array([[True], [False], [True]])
    silent = csr_array((3, 2))
    np.testing.assert_array_equal(auroc(labels, silent), [[0.5], [0.5]])
    found = best_f1(labels, silent)
    assert (found.f1[0], found.threshold[0]) == (0, np.inf)


def test_an_attribute_of_all_tokens_has_no_auroc():
    labels = np.array([[True, False], [True, False]])
    assert np.isnan(auroc(labels, csr_array(np.eye(2)))).all()
    np.testing.assert_array_equal(f1(labels, np.zeros((2, 2), bool)), [0, 0])


def test_a_detector_that_does_not_hold_on_the_other_half_is_not_rewarded():
    labels = np.array([[True], [False]] * 20)
    first = np.arange(40) < 20
    overfit = np.where(first[:, None], labels, ~labels).astype(float)
    found = best_detectors(labels, csr_array(overfit), first)
    assert (found.auroc[0], found.f1[0]) == (0, 0)
