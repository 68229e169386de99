from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsae.errors import InputError
from groupsae.evaluation.similarity import decoder_rows
from groupsae.interpretation.card_making import choose_latents, make_cards, pairs
from groupsae.interpretation.cards import Shown
from groupsae.interpretation.contexts import latent_contexts
from groupsae.interpretation.depth import depth_profile
from groupsae.interpretation.unembedding import unembedding_of
from tests.interpretation.cases import D_SAE, SILENT, dense, made_sae

GROUPS = Shown("groups", 1, dict.fromkeys((0, 1), "layers-00-01"))
BASELINE = Shown("baseline", 2, {0: "baseline/layers-00", 1: "baseline/layers-01"})


@pytest.fixture(scope="module")
def unembedding(host):
    return unembedding_of(host)


@pytest.fixture(scope="module")
def chosen(cache):
    return {name: choose_latents(cache, name, wanted="all") for name in cache.sae_names}


@pytest.fixture(scope="module")
def cards(cache, saes, chosen, unembedding):
    made = make_cards(
        cache, saes, [GROUPS, BASELINE], chosen, unembedding, contexts=4, per_decile=1, seed=5
    )
    return {(card.sae, card.latent): card for card in made}


@pytest.fixture(scope="module")
def tensors(host, corpus, saes):
    """(SAE, layer) -> [token, latent], by plain encoding."""
    return {
        (name, layer): dense(host, corpus, sae, layer).double().numpy()
        for name, sae in saes.items()
        for layer in sae.layers
    }


def test_every_latent_that_fires_has_a_card_in_order(cards, chosen, tensors):
    assert [*cards] == [(name, latent) for name, own in chosen.items() for latent in own]
    for name, own in chosen.items():
        fires = sum((x > 0).sum(0) for (of, _), x in tensors.items() if of == name)
        assert own == np.flatnonzero(fires).tolist()


def test_numbers_are_those_of_the_dense_tensors(cards, cache, tensors):
    for (name, latent), card in cards.items():
        own = [tensors[name, layer][:, latent] for layer in card.layers]
        tokens = cache.manifest.tokens
        assert card.layers == cache.layers(name)
        assert card.density == pytest.approx([(x > 0).sum() / tokens for x in own])
        assert card.maximum == pytest.approx([x.max() for x in own], rel=1e-5)
        means = [x[x > 0].mean() if x.any() else 0 for x in own]
        assert card.mean == pytest.approx(means, rel=1e-5)
        at_once = sum((x > 0).astype(int) for x in own)
        assert card.persistence == tuple(
            int((at_once == 1 + i).sum()) for i in range(len(card.layers))
        )
        assert card.centre == pytest.approx(np.average(card.layers, weights=card.density))
        assert card.histogram_edges == pytest.approx(np.linspace(0, max(card.maximum), 21))
        assert [sum(counts) for counts in card.histogram] == [(x > 0).sum() for x in own]
        edges = np.array(card.histogram_edges)
        for x, counts in zip(own, card.histogram, strict=True):
            below = (x[x > 0] < edges[1:, None] * (1 + 1e-6)).sum(1)
            assert (np.cumsum(counts) <= below).all()
            assert (np.cumsum(counts) >= (x[x > 0] < edges[1:, None] * (1 - 1e-6)).sum(1)).all()


def test_depth_is_that_of_the_profile(cards, cache):
    profile = depth_profile(cache, "layers-00-01")
    for latent, span in enumerate(profile.span().tolist()):
        if latent not in SILENT and ("layers-00-01", latent) in cards:
            card = cards["layers-00-01", latent]
            assert card.persistence == tuple(profile.persistence[latent])
            assert card.centre == pytest.approx(profile.centre[latent])
            assert card.span == tuple(span)


def test_contexts_are_those_of_the_latent(cards, cache):
    for (name, latent), card in cards.items():
        found = latent_contexts(cache, name, latent, top=4, per_decile=1, seed=5)
        assert card.top == found.overall.top
        assert card.deciles == found.overall.deciles
        several = len(card.layers) > 1
        assert card.top_by_layer == (
            {layer: of.top for layer, of in found.by_layer.items()} if several else {}
        )


def test_logits_are_the_outermost_of_the_direct_path(cards, saes, unembedding):
    for (name, latent), card in cards.items():
        assert card.logits_layer == card.layers[np.argmax(card.density)]
        row = saes[name].W_dec[latent].detach()
        logits = unembedding.W_U @ unembedding.directions(row[None])[0]
        ranked = (logits - logits.mean()).sort(descending=True)
        ends = [*card.largest, *card.smallest[::-1]]
        values = torch.cat([ranked.values[:10], ranked.values[-10:]])
        assert [value for _, value in ends] == pytest.approx(values.tolist(), abs=1e-5)
        assert [token for token, _ in card.largest] == ranked.indices[:10].tolist()


def test_neighbours_are_the_nearest(cards, saes):
    for (name, latent), card in cards.items():
        rows = saes[name].W_dec.detach()
        cosines = torch.cosine_similarity(rows[latent].double(), rows.double(), dim=1)
        cosines[latent] = -2
        expected = cosines.sort(descending=True)
        assert [n.latent for n in card.neighbours] == expected.indices[:5].tolist()
        found = [n.similarity for n in card.neighbours]
        assert found == pytest.approx(expected.values[:5].tolist(), abs=1e-5)
        assert {(n.sae, n.by) for n in card.neighbours} == {(name, "cosine")}


def test_neighbours_by_layer_are_those_of_the_other_partition(cards, saes, tensors):
    for (name, latent), card in cards.items():
        assert [*card.neighbours_by_layer] == [*card.layers]
        for layer, found in card.neighbours_by_layer.items():
            other = (BASELINE if name == "layers-00-01" else GROUPS).saes[layer]
            assert {neighbour.sae for neighbour in found} == {other}
            rows = saes[other].W_dec.detach()
            cosines = torch.cosine_similarity(saes[name].W_dec[latent].detach(), rows, dim=1)
            fires, theirs = tensors[name, layer][:, latent, None] > 0, tensors[other, layer] > 0
            jaccard = (fires & theirs).sum(0) / np.maximum((fires | theirs).sum(0), 1)
            for by, every in (("cosine", cosines.numpy()), ("jaccard", jaccard)):
                own = [neighbour for neighbour in found if neighbour.by == by]
                best = np.sort(every)[::-1][:3]
                best = best[best > 0] if by == "jaccard" else best
                assert [n.similarity for n in own] == pytest.approx(best.tolist(), abs=1e-5)
                assert [every[n.latent] for n in own] == pytest.approx(best.tolist(), abs=1e-5)


def test_cards_do_not_depend_on_what_is_read_at_a_time(cards, cache, saes, unembedding, chosen):
    some = {name: own[1::3] for name, own in chosen.items()}
    again = make_cards(
        cache,
        saes,
        [GROUPS, BASELINE],
        some,
        unembedding,
        contexts=4,
        per_decile=1,
        seed=5,
        block_firings=40,
    )
    made = {(card.sae, card.latent): card for card in again}
    assert [*made] == [(name, latent) for name, own in some.items() for latent in own]
    inexact = {"largest": (), "smallest": (), "neighbours": (), "neighbours_by_layer": {}}
    for key, card in made.items():  # products of other shapes are rounded otherwise
        one, other = (dataclasses.replace(each, **inexact) for each in (card, cards[key]))
        assert one == other


def test_a_group_that_is_its_own_baseline_has_nothing_beside_it(cache, saes, unembedding):
    name = "baseline/layers-00"
    shown = [Shown("groups", 1, {0: name}), Shown("baseline", 1, {0: name})]
    latents = choose_latents(cache, name, wanted=2)
    (card, _) = make_cards(cache, saes, shown, {name: latents}, unembedding, contexts=1)
    assert card.neighbours_by_layer == {0: ()}
    assert len(card.neighbours) == 5
    assert pairs(cache, saes, *shown) == []


def test_the_same_groups_latents_of_two_partitions_come_once(cache, saes, unembedding):
    shown = [GROUPS, dataclasses.replace(GROUPS, groups_total=2), BASELINE]
    name = "baseline/layers-00"
    latents = choose_latents(cache, name, wanted=1)
    (card,) = make_cards(cache, saes, shown, {name: latents}, unembedding, contexts=1)
    assert [n.by for n in card.neighbours_by_layer[0]].count("cosine") == 3


def test_decoder_gains_count_by_layer(host, corpus, cache, unembedding):
    sae = made_sae((0, 1), learned_affine="gain")
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if "gain" in name:
                parameter.copy_(torch.linspace(0.5, 2, parameter.numel()).view_as(parameter))
    name = "layers-00-01"
    latents = choose_latents(cache, name, wanted=6)
    cards = make_cards(cache, {name: sae}, [], {name: latents}, unembedding, contexts=1)
    for card in cards:
        row = decoder_rows(sae, card.logits_layer)[card.latent]
        logits = unembedding.W_U @ unembedding.directions(row[None])[0]
        assert card.largest[0][1] == pytest.approx(float((logits - logits.mean()).max()), abs=1e-5)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        ([5, SILENT[1]], r"latent 1 of layers-00-01 fires on none of the \d+ tokens"),
        ([5, D_SAE], "latent 40 does not exist: layers-00-01 has 40 latents, 0 to 39"),
    ],
)
def test_latents_without_contexts_are_said(cache, saes, unembedding, latents, message):
    made = make_cards(cache, saes, [], {"layers-00-01": latents}, unembedding, contexts=1)
    with pytest.raises(InputError, match=message):
        next(made)


@settings(max_examples=60, deadline=None)
@given(
    wanted=st.integers(0, 50),
    first=st.lists(st.integers(0, D_SAE - 1), max_size=8),
    seed=st.integers(0, 2**32 - 1),
)
def test_chosen_latents_fire_and_hold_the_first(cache, chosen, wanted, first, seed):
    name = "layers-00-01"
    found = choose_latents(cache, name, wanted=wanted, first=first, seed=seed)
    fires = set(chosen[name])
    assert found == sorted(set(found))
    assert set(found) <= fires
    assert fires & set(first) <= set(found)
    assert len(found) == min(max(wanted, len(fires & set(first))), len(fires))
    assert found == choose_latents(cache, name, wanted=wanted, first=first, seed=seed)


def test_drawn_latents_depend_on_the_seed(cache):
    drawn = {tuple(choose_latents(cache, "layers-00-01", wanted=5, seed=seed)) for seed in range(5)}
    assert len(drawn) > 1


@pytest.mark.parametrize("first", [[-1], [3, D_SAE]])
def test_a_latent_that_does_not_exist_is_refused(cache, first):
    with pytest.raises(InputError, match=f"latent {first[-1]} does not exist"):
        choose_latents(cache, "layers-00-01", wanted=3, first=first)


def test_pairs_lie_where_their_cosine_says(cache, saes, tensors):
    found = pairs(cache, saes, GROUPS, BASELINE, parts=4, per_part=2, seed=1)
    assert [(part.layer, part.low) for part in found] == [
        (layer, low) for layer in (0, 1) for low in (0, 0.25, 0.5, 0.75)
    ]
    name = GROUPS.saes[0]
    for layer, other in BASELINE.saes.items():
        cosines = torch.cosine_similarity(
            saes[name].W_dec.detach()[:, None], saes[other].W_dec.detach(), dim=2
        ).numpy()
        best, nearest = cosines.max(1), cosines.argmax(1)
        ours, theirs = (tensors[each, layer] > 0 for each in (name, other))
        eligible = ours.any(0) & theirs.any(0)[nearest]
        parts = [part for part in found if part.layer == layer]
        assert sum(part.population for part in parts) == eligible.sum()
        for part in parts:
            inside = (best.clip(0) >= part.low) & (best < part.high) & eligible
            assert part.population == inside.sum()
            assert len(part.pairs) == min(2, part.population)
            for pair in part.pairs:
                assert (pair.layer, pair.sae, pair.baseline) == (layer, name, other)
                assert inside[pair.latent]
                assert pair.baseline_latent == nearest[pair.latent]
                assert pair.cosine == pytest.approx(best[pair.latent], abs=1e-5)
                a, b = ours[:, pair.latent], theirs[:, pair.baseline_latent]
                assert pair.jaccard == pytest.approx((a & b).sum() / (a | b).sum())
