from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsae.errors import InputError
from groupsae.interpretation.contexts import (
    Windows,
    contexts_of,
    latent_contexts,
    pooled,
)
from groupsae.interpretation.latent_cache import Firings
from tests.interpretation.cases import CONTEXT, SILENT, dense, ids_of


@st.composite
def firings(draw):
    """Tokens of a small vocabulary, so that windows repeat; and a latent's firings."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    contexts, length = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    tokens = random.integers(0, draw(st.integers(1, 4)), (contexts, length), np.int32)
    fires = np.flatnonzero(random.random(tokens.size) < draw(st.floats(0.05, 1)))
    fires = fires if len(fires) else np.array([tokens.size - 1])
    activations = random.choice([0.5, *random.random(9)], len(fires)).astype(np.float32)
    return tokens, Firings(fires.astype(np.int32), activations)


def window(tokens, position, before, after):
    """The ids by plain slicing of a context."""
    context, place = divmod(position, tokens.shape[1])
    return tuple(tokens[context][max(place - before, 0) : place + after + 1].tolist())


@settings(max_examples=150, deadline=None)
@given(firings(), st.integers(0, 5), st.integers(0, 3), st.integers(0, 6), st.integers(0, 3))
def test_top_contexts_and_deciles(case, before, after, top, per_decile):
    tokens, found = case
    strength = dict(zip(found.positions.tolist(), found.activations.tolist(), strict=True))
    contexts = contexts_of(
        Windows(tokens, before, after),
        pooled({3: found}),
        top=top,
        per_decile=per_decile,
        seed=(0,),
    )
    assert contexts.firings == len(strength)
    shown = [*contexts.top, *(context for decile in contexts.deciles for context in decile)]
    for context in shown:
        assert context.layer == 3
        assert context.activation == strength[context.position]
        assert context.token_ids == window(tokens, context.position, before, after)
        assert context.strengths[context.peak] == context.activation
        start = context.position - context.peak
        near = [strength.get(start + i, 0) for i in range(len(context.token_ids))]
        assert list(context.strengths) == near

    # Top: no context and no window twice, and what is left out is no stronger, or not new.
    chosen = [context.position for context in contexts.top]
    windows = {context.token_ids for context in contexts.top}
    places = {position // tokens.shape[1] for position in chosen}
    assert len(chosen) == len(windows) == len(places) <= top
    assert [c.activation for c in contexts.top] == sorted(map(strength.get, chosen), reverse=True)
    weakest = min((c.activation for c in contexts.top), default=np.inf)
    for position, activation in strength.items():
        known = window(tokens, position, before, after) in windows
        if position // tokens.shape[1] not in places and not known:
            assert len(chosen) == top
            assert activation <= weakest

    # Deciles: the tenths of the sorted activations, no window twice.
    ranked = sorted(strength.values())
    edges = [len(ranked) * i // 10 for i in range(11)]
    assert len(contexts.deciles) == 10
    for decile, (first, last) in zip(contexts.deciles, pairwise(edges), strict=True):
        assert len(decile) <= min(per_decile, last - first)
        assert all(ranked[first] <= c.activation <= ranked[last - 1] for c in decile)
    samples = [context.token_ids for decile in contexts.deciles for context in decile]
    assert len(samples) == len(set(samples))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.permutations([1, 4, 6]))
def test_firings_are_pooled_by_position(seed, tokens, layers):
    random = np.random.default_rng(seed)
    table = random.choice([0, 0.5, 1, 2], (len(layers), tokens)).astype(np.float32)
    table[0, 0] = 0.5
    firings = {
        layer: Firings(np.flatnonzero(row).astype(np.int32), row[row > 0])
        for layer, row in zip(layers, table, strict=True)
    }
    found = pooled(firings)
    assert found.positions.tolist() == np.flatnonzero(table.any(0)).tolist()
    assert found.activations.tolist() == table.max(0)[found.positions].tolist()
    lowest_first = table[np.argsort(layers)]
    assert (
        found.layers.tolist() == np.sort(layers)[lowest_first.argmax(0)][found.positions].tolist()
    )
    assert found.n_layers.tolist() == (table > 0).sum(0)[found.positions].tolist()


def test_layers_are_pooled_by_the_larger_activation(host, corpus, saes, cache):
    by_layer = {layer: cache.firings("layers-00-01", layer, 7) for layer in (0, 1)}
    both = np.stack([dense(host, corpus, saes["layers-00-01"], at)[:, 7].numpy() for at in (0, 1)])
    found = pooled(by_layer)
    assert found.positions.tolist() == np.flatnonzero(both.any(0)).tolist()
    np.testing.assert_allclose(found.activations, both.max(0)[found.positions], rtol=1e-5)
    assert found.layers.tolist() == both.argmax(0)[found.positions].tolist()


def test_a_latents_contexts_overall_and_by_layer(corpus, cache):
    latent = int(np.argmax(cache.density("layers-00-01", 1)))
    contexts = latent_contexts(cache, "layers-00-01", latent, top=5, before=4, after=2)
    assert set(contexts.by_layer) == {
        layer for layer in (0, 1) if cache.density("layers-00-01", layer)[latent]
    }
    tokens = ids_of(corpus).numpy()
    for context in (*contexts.overall.top, *contexts.by_layer[1].top):
        assert context.token_ids == window(tokens, context.position, 4, 2)
        held = cache.firings("layers-00-01", context.layer, latent)
        at = held.positions.tolist().index(context.position)
        assert held.activations[at] == pytest.approx(context.activation)
        assert context.position // CONTEXT < len(tokens)
    strongest = max(cache.index("layers-00-01", layer).maximum[latent] for layer in (0, 1))
    assert contexts.overall.top[0].activation == pytest.approx(strongest)


def test_samples_depend_on_the_seed_alone(cache):
    latent = int(np.argmax(cache.density("layers-00-01", 1)))

    def deciles(seed):
        found = latent_contexts(cache, "layers-00-01", latent, per_decile=1, seed=seed)
        return found.overall.deciles

    assert deciles(0) == deciles(0)
    assert deciles(0) != deciles(1)


def test_a_latent_that_never_fires_is_said(cache):
    with pytest.raises(InputError, match=r"latent 1 of layers-00-01 fires on none of the \d+ tok"):
        latent_contexts(cache, "layers-00-01", SILENT[1])
