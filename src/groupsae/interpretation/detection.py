"""How well latents tell where an attribute is true: exact AUROC and F1 from sparse activations.

The activations of a whole text are one sparse array `[token, latent]`, whose entries are all
positive; what is not in it is 0. No array of all tokens by all latents is made.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float64, Int
from scipy.sparse import csc_array, csr_array

Activations: TypeAlias = csr_array


class Detectors(NamedTuple):
    """For every attribute the best latent of one half of a text, and its score on the other half.

    `latent` is the one of the largest AUROC; `f1_latent`, active at `threshold` or above, that of
    the largest F1.
    """

    auroc: Float64[np.ndarray, " attribute"]
    latent: Int[np.ndarray, " attribute"]
    f1: Float64[np.ndarray, " attribute"]
    f1_latent: Int[np.ndarray, " attribute"]
    threshold: Float64[np.ndarray, " attribute"]


def best_detectors(
    labels: Bool[np.ndarray, "token attribute"],
    activations: Activations,
    chosen_on: Bool[np.ndarray, " token"],
) -> Detectors:
    """Choose latents and thresholds on the tokens of `chosen_on`; score them on the others.

    On both sides every attribute is to be true of some tokens and false of others.
    """
    own, held_out = labels[chosen_on], labels[~chosen_on]
    chosen, judged = activations[chosen_on], activations[~chosen_on]
    latent = auroc(own, chosen).argmax(0)
    cut = best_f1(own, chosen)
    detected = judged[:, cut.latent].toarray() >= cut.threshold
    return Detectors(
        auroc=np.diagonal(auroc(held_out, judged[:, latent])).copy(),
        latent=latent,
        f1=f1(held_out, detected),
        f1_latent=cut.latent,
        threshold=cut.threshold,
    )


def auroc(
    labels: Bool[np.ndarray, "token attribute"], activations: Activations
) -> Float64[np.ndarray, "latent attribute"]:
    """The probability that a token with the attribute has a larger activation than one without.

    Equal activations count half, those of 0 among them (Mann and Whitney's U by midranks). A latent
    that is never active has 0.5. NaN where an attribute is true of all tokens, or of none.
    """
    firing = _sorted(activations)
    tokens, silent = len(labels), len(labels) - np.diff(firing.offsets)
    lengths = np.diff(np.append(firing.ties, len(firing.values)))
    latent = np.repeat(np.arange(len(silent)), np.diff(firing.offsets))
    midrank = np.repeat(firing.ties + (lengths + 1) / 2, lengths)  # from 1, among all firings
    rank = midrank - firing.offsets[latent] + silent[latent]
    shape = (len(silent), tokens)
    ranks = csr_array((rank, firing.tokens, firing.offsets), shape=shape)
    fires = csr_array((np.ones_like(rank), firing.tokens, firing.offsets), shape=shape)
    truth = labels.astype(np.float64)
    positives = truth.sum(0)
    silent_rank = (silent[:, None] + 1) / 2
    u = ranks @ truth + (positives - fires @ truth) * silent_rank - positives * (positives + 1) / 2
    pairs = np.broadcast_to(positives * (tokens - positives), u.shape)
    found: np.ndarray = np.divide(u, pairs, out=np.full(u.shape, np.nan), where=pairs > 0)
    return found


class Cut(NamedTuple):
    """For every attribute the latent and the threshold of the largest F1."""

    f1: Float64[np.ndarray, " attribute"]
    latent: Int[np.ndarray, " attribute"]
    threshold: Float64[np.ndarray, " attribute"]


def best_f1(labels: Bool[np.ndarray, "token attribute"], activations: Activations) -> Cut:
    """The largest F1 of "the latent's activation is at least the threshold", which is above 0.

    Where no latent is ever active: latent 0, a threshold of infinity, F1 0.
    """
    firing = _sorted(activations)
    attributes = labels.shape[1]
    best = Cut(np.zeros(attributes), np.zeros(attributes, np.int64), np.full(attributes, np.inf))
    if not len(firing.values):
        return best
    latent = np.searchsorted(firing.offsets, firing.ties, side="right") - 1
    ends = firing.offsets[latent + 1]
    for attribute, truth in enumerate(labels.T):
        hits = np.concatenate([[0], truth[firing.tokens].cumsum()])
        scores = 2 * (hits[ends] - hits[firing.ties]) / (ends - firing.ties + truth.sum())
        top = int(scores.argmax())
        best.f1[attribute] = scores[top]
        best.latent[attribute] = latent[top]
        best.threshold[attribute] = firing.values[firing.ties[top]]
    return best


def f1(
    labels: Bool[np.ndarray, "token attribute"], detected: Bool[np.ndarray, "token attribute"]
) -> Float64[np.ndarray, " attribute"]:
    """2 TP / (2 TP + FP + FN) of each attribute; 0 where there is none of them."""
    both, either = (labels & detected).sum(0), labels.sum(0) + detected.sum(0)
    found: np.ndarray = 2 * both / np.maximum(either, 1)
    return found


class _Firings(NamedTuple):
    """Latent i's lie at offsets[i] to offsets[i + 1], the weakest first."""

    offsets: np.ndarray
    tokens: np.ndarray
    values: np.ndarray
    ties: np.ndarray
    """Where each run of equal values of one latent begins."""


def _sorted(activations: Activations) -> _Firings:
    by_latent = csc_array(activations)
    offsets = by_latent.indptr.astype(np.int64)
    latent = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    order = np.lexsort((by_latent.data, latent))  # by latent, and by value within it
    values = by_latent.data[order]
    begins = np.ones(len(values), dtype=bool)
    begins[1:] = (values[1:] != values[:-1]) | (latent[1:] != latent[:-1])
    return _Firings(offsets, by_latent.indices[order], values, np.flatnonzero(begins))
