from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsae.interpretation.explanation.examples import (
    FEWEST,
    LENGTH,
    MARKED,
    Windows,
    draw_latents,
    examples_of,
)
from groupsae.interpretation.latent_cache import LatentCache
from tests.interpretation.explanation.cases import D_SAE, activations, made_cache, random_tokens
from tests.interpretation.explanation.conftest import WORDS

SAE = "baseline/layers-00"


def sparse(tokens: np.ndarray, seed: int = 0) -> np.ndarray:
    """[token, latent]: latents of every density, from silent to nearly always active."""
    random = np.random.default_rng(seed)
    rates = np.array([0, 0.001, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3, 0.6, 0.9, 1.0])
    values = random.exponential(1, (tokens.size, D_SAE)).astype(np.float32) + 0.01
    return np.where(random.random(values.shape) < rates, values, 0).astype(np.float32)


def windowed(values: np.ndarray, contexts: int, length: int) -> np.ndarray:
    """[window, token, latent], window by window."""
    count = -(-length // LENGTH)
    size = length // count
    own = values.reshape(contexts, length, -1)
    cut = [own[c, w * size : (w + 1) * size] for c in range(contexts) for w in range(count)]
    return np.stack(cut)


@settings(max_examples=15, deadline=None)
@given(
    length=st.sampled_from([1, 16, 32, 33, 64, 100]),
    seed=st.integers(0, 100),
    examples=st.integers(1, 30),
    contexts=st.integers(1, 25),
)
def test_what_is_shown_is_what_the_activations_say(length, seed, examples, contexts):
    tokens = random_tokens(contexts=81, length=length, seed=seed)
    dense = sparse(tokens, seed)
    with TemporaryDirectory() as folder:
        cache = made_cache(Path(folder), tokens, {(SAE, 0): dense})
        check_examples(cache, tokens, dense, examples, contexts)


def check_examples(cache, tokens, dense, examples, contexts):
    windows = Windows(cache)
    strengths = windowed(dense, *tokens.shape)
    ids = windowed(tokens.reshape(-1, 1), *tokens.shape)[..., 0]
    per_context = len(ids) // len(tokens)
    seen, kept = set(), []
    for i, own in enumerate(map(tuple, ids.tolist())):
        if own not in seen:
            kept.append(i)
        seen.add(own)
    first = [i for i in kept if i // per_context < len(tokens) // 2]
    second = [i for i in kept if i // per_context >= len(tokens) // 2]
    of = {tuple(ids[i].tolist()): i for i in kept}

    fires = (strengths > 0).any(1)
    enough = (
        (fires[first].sum(0) >= FEWEST)
        & (fires[second].sum(0) >= FEWEST)
        & ((~fires[second]).sum(0) >= FEWEST)
    )
    eligible = windows.eligible(cache, SAE, 0, block=5)
    assert eligible.tolist() == np.flatnonzero(enough).tolist()
    assert draw_latents(cache, windows, SAE, 0, 1000, seed=3) == eligible.tolist()

    for latent in eligible.tolist()[:3]:
        shown = examples_of(
            cache, windows, SAE, 0, latent, contexts=contexts, examples=examples, seed=1
        )
        own = strengths[..., latent]
        peak = own.max(1)
        marks = (own > 0) & (own >= np.float32(MARKED) * peak[:, None])
        strongest = sorted((i for i in first if peak[i] > 0), key=lambda i: -peak[i])[:contexts]
        at = [of[example.token_ids] for example in shown.explained]
        assert [peak[i] for i in at] == [peak[i] for i in strongest]
        for i, example in zip(at, shown.explained, strict=True):
            assert example.marked == tuple(marks[i].tolist())

        active = [i for i in second if peak[i] > 0]
        silent = [i for i in second if peak[i] == 0]
        count = min(examples, len(active), len(silent))
        at = [of[example.token_ids] for example in shown.detection]
        assert len(set(at)) == len(at) == 2 * count
        for i, example in zip(at, shown.detection, strict=True):
            assert i in second
            assert example.truth == (peak[i] > 0)
            assert not any(example.marked)
        assert sum(example.truth for example in shown.detection) == count

        at = [of[example.token_ids] for example in shown.fuzzing]
        assert len(set(at)) == len(at)
        assert sum(example.truth for example in shown.fuzzing) * 2 == len(at) <= 2 * examples
        for i, example in zip(at, shown.fuzzing, strict=True):
            assert i in active
            assert sum(example.marked) == marks[i].sum()
            if example.truth:
                assert example.marked == tuple(marks[i].tolist())
            else:
                assert not (np.array(example.marked) & (own[i] > 0)).any()


def test_judged_windows_are_of_all_strengths(words_cache: LatentCache):
    windows = Windows(words_cache)
    peak = windows.strengths(words_cache, "layers-02-03", 2, 3).max(1)
    ordered = np.sort(peak[windows.to_judge & (peak > 0)])
    shown = examples_of(words_cache, windows, "layers-02-03", 2, 3, contexts=5, examples=10, seed=0)
    of = {tuple(own): i for i, own in enumerate(windows.token_ids.tolist())}
    judged = sorted(peak[of[own.token_ids]] for own in shown.detection if own.truth)
    for tenth, strength in zip(np.array_split(ordered, 10), judged, strict=True):
        assert tenth[0] <= strength <= tenth[-1]


def test_text_that_comes_again_is_not_judged(tmp_path: Path):
    tokens = random_tokens(contexts=60)
    tokens[30:45] = tokens[:15]  # the second half repeats a part of the first
    cache = made_cache(tmp_path, tokens, {(SAE, 0): activations(tokens, {0: 7})})
    windows = Windows(cache)
    explained = {tuple(ids) for ids in windows.token_ids[windows.to_explain].tolist()}
    judged = {tuple(ids) for ids in windows.token_ids[windows.to_judge].tolist()}
    assert not explained & judged
    assert len(judged) == 15 * 2


def test_draws_are_random_by_seed_alone(words_cache: LatentCache):
    windows = Windows(words_cache)
    assert draw_latents(words_cache, windows, "layers-02-03", 3, 96, seed=0) == sorted(WORDS)
    drawn = {
        tuple(draw_latents(words_cache, windows, "layers-02-03", 3, 2, seed=seed))
        for seed in range(20)
    }
    assert len(drawn) > 1
    again = [draw_latents(words_cache, windows, "layers-02-03", 3, 2, seed=5) for _ in range(2)]
    assert again[0] == again[1]
