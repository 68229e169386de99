"""Scores against known attributes, on the bundled model and its English."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from groupsae.errors import InputError
from groupsae.evaluation.subject import Subject
from groupsae.host.bundled import words
from groupsae.host.bundled.labels import LABELS
from groupsae.host.model import HostModel
from groupsae.host.tokens import open_corpus
from groupsae.interpretation.ground_truth import _logistic_regression, _read, ground_truth
from groupsae.sae import SAE, SAEConfig

TOKENS = 2000


@pytest.fixture(scope="module")
def english_host():
    return HostModel.load("bundled", device="cpu")


@pytest.fixture(scope="module")
def english(english_host):
    return open_corpus("bundled", tokenizer=english_host.tokenizer, context_length=64)


@pytest.fixture(scope="module")
def subjects(english_host):
    def made(layers, seed):
        config = SAEConfig(d_model=english_host.d_model, d_sae=96, layers=layers, k=8)
        return SAE(config, generator=torch.Generator().manual_seed(seed))

    group, alone = made((1, 2), 0), made((2,), 1)
    return [
        Subject("groups", {1: group, 2: group}),
        Subject("groups", {1: group, 2: alone}),
        Subject("baseline", {1: made((1,), 2), 2: alone}),
    ]


@pytest.fixture(scope="module")
def result(english_host, english, subjects):
    return ground_truth(english_host, english.held_out(), subjects, tokens=TOKENS, fewest=15)


@pytest.mark.parametrize("skipped", [0, 3])
def test_labels_lie_beside_their_tokens(english, english_host, skipped):
    stream = english.held_out()
    for _ in range(skipped):
        stream.next_contexts(1)
    expected = english.held_out().next_contexts(skipped + 20)[skipped:]
    text = _read(stream, 20 * 64, special=())
    assert torch.equal(text.contexts, expected)
    tokens = english_host.tokenizer.convert_ids_to_tokens(text.contexts[text.counted].tolist())
    pieces = [token.lstrip("Ġ") for token in tokens]
    assert len(pieces) == len(text.labels) > 1000
    for label, members in {
        "punctuation": {".", ","},
        "female name": words.FEMALE,
        "country": words.COUNTRIES,
    }.items():
        expected_here = [piece in members for piece in pieces]
        assert text.labels[:, LABELS.index(label)].tolist() == expected_here
    assert not (text.contexts[~text.counted] != english_host.tokenizer.bos_token_id).any()
    halves = text.first_half
    assert halves[0]
    assert not halves[-1]
    assert (np.diff(halves.astype(int)) <= 0).all()


def test_a_score_is_that_of_the_dense_latent(result, english_host, english, subjects):
    text = _read(english.held_out(), TOKENS, special=())
    x = english_host.residual_streams(text.contexts, [2])[2][text.counted]
    dense = subjects[2].saes[2].encode(x, 2).dense(96).detach().numpy()
    second = ~text.first_half
    rows = [
        row
        for row in result["rows"]
        if (row["source"], row["partition"], row["layer"]) == ("trained", "baseline", 2)
    ]
    assert len(rows) == len(result["attributes"]) > 20
    for row in rows:
        truth = text.labels[:, LABELS.index(row["attribute"])]
        z = dense[:, row["latent"]]
        assert row["auroc"] == pytest.approx(roc_auc_score(truth[second], z[second]), abs=1e-4)
        best = max(roc_auc_score(truth[~second], own[~second]) for own in dense.T)
        assert roc_auc_score(truth[~second], z[~second]) == pytest.approx(best, abs=1e-4)


def test_what_is_returned(result, subjects):
    assert json.loads(json.dumps(result)) == result
    attributes = [own["attribute"] for own in result["attributes"]]
    assert all(min(own["positives"]) >= 15 for own in result["attributes"])
    layers = 2 * 3 * 2 + 2  # trained and untrained at two layers of three subjects, and the probes
    assert len(result["coverage"]) == layers
    assert len(result["rows"]) == layers * len(attributes)
    assert len(result["means"]) == 2 * 3 + 1

    def rows(*about):
        keys = ("source", "partition", "groups_total", "layer")
        return [row for row in result["rows"] if tuple(row[key] for key in keys) == about]

    shared, own = rows("trained", "groups", 2, 2), rows("trained", "baseline", 2, 2)
    assert [row["auroc"] for row in shared] == [row["auroc"] for row in own]
    assert [row["attribute"] for row in own] == attributes
    for entry in result["coverage"]:
        about = (entry[key] for key in ("source", "partition", "groups_total", "layer"))
        scores = [row["auroc"] for row in rows(*about)]
        assert entry["coverage"] == np.mean([score > 0.9 for score in scores])
        assert entry["auroc"] == pytest.approx(np.mean(scores))
    probe = result["means"][-1]
    assert probe["source"] == "probe"
    assert probe["coverage"] > 0.9 > max(mean["coverage"] for mean in result["means"][:-1])


def test_the_probe_is_the_logistic_regression_of_scikit_learn():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 6))
    truth = x @ rng.normal(size=(6, 3)) + rng.normal(size=(300, 3)) > [0, 1, 3]
    weights = _logistic_regression(x, truth)
    for attribute in range(3):
        expected = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000).fit(x, truth[:, attribute])
        np.testing.assert_allclose(weights[:-1, attribute], expected.coef_[0], atol=2e-3)
        np.testing.assert_allclose(weights[-1, attribute], expected.intercept_[0], atol=2e-3)


def test_what_cannot_be_scored_is_refused(host, corpus, english_host, english, subjects):
    with pytest.raises(InputError, match="attributes of its words are not known"):
        ground_truth(host, corpus.held_out(), subjects, tokens=100)
    with pytest.raises(InputError, match="train the run first"):
        ground_truth(english_host, english.held_out(), [], tokens=100)
    with pytest.raises(InputError, match="tokens=0"):
        ground_truth(english_host, english.held_out(), subjects, tokens=0)
    with pytest.raises(InputError, match="ask for more tokens"):
        ground_truth(english_host, english.held_out(), subjects, tokens=100, fewest=500)
