"""Which text a language model is shown of a latent: some to explain it, other to judge that."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int, Int64

from groupsae.interpretation.latent_cache import LatentCache

LENGTH = 32  # tokens of a window, at most
FEWEST = 10  # windows of each kind without which a latent is not explained
MARKED = 0.3  # of a window's largest activation, from which on a token is marked

DEFINITIONS = {
    "window": f"contexts are cut into windows of equal length, at most {LENGTH} tokens; of windows "
    "with the same tokens the first alone counts. Those of the first half of the contexts are for "
    "explaining, those of the second half for judging",
    "active, silent": "a window is active where the latent fires on any of its tokens, else silent",
    "eligible": f"latents that are active in at least {FEWEST} windows of each half, and silent in "
    "at least as many of the second; as many as are wanted are drawn among them",
    "marked": f"the tokens of a window whose activation is at least {MARKED} of its largest there",
}


@dataclass(frozen=True)
class Example:
    """A window of text as the language model sees it.

    Attributes:
        marked: Which tokens stand between << and >>.
        truth: What the right answer about it is.
    """

    token_ids: tuple[int, ...]
    marked: tuple[bool, ...]
    truth: bool


@dataclass(frozen=True)
class Examples:
    """What is shown of one latent.

    Attributes:
        explained: Its strongest windows of the first half, strongest first, marked.
        detection: Active and silent windows of the second half, as many of both; nothing is marked.
        fuzzing: Active windows of the second half; half of them with as many tokens marked on
            which the latent is silent.
    """

    explained: tuple[Example, ...]
    detection: tuple[Example, ...]
    fuzzing: tuple[Example, ...]


class Windows:
    """The text of a latent cache in windows: see :data:`DEFINITIONS`."""

    def __init__(self, cache: LatentCache) -> None:
        contexts, self.context_length = cache.tokens.shape
        self.per_context = -(-self.context_length // LENGTH)
        self.length = self.context_length // self.per_context
        cut = cache.tokens[:, : self.per_context * self.length]
        self.token_ids: Int[np.ndarray, "window token"] = cut.reshape(-1, self.length)
        first_half = np.arange(len(self.token_ids)) < contexts // 2 * self.per_context
        distinct = np.zeros(len(self.token_ids), bool)
        distinct[np.unique(self.token_ids, axis=0, return_index=True)[1]] = True
        self.to_explain: Bool[np.ndarray, " window"] = distinct & first_half
        self.to_judge: Bool[np.ndarray, " window"] = distinct & ~first_half

    def strengths(
        self, cache: LatentCache, sae_name: str, layer: int, latent: int
    ) -> Float32[np.ndarray, "window token"]:
        """A latent's activation on every token of every window."""
        firings = cache.firings(sae_name, layer, latent)
        window, place, inside = self._places(firings.positions)
        strengths = np.zeros(self.token_ids.shape, np.float32)
        strengths[window[inside], place[inside]] = firings.activations[inside]
        return strengths

    def eligible(
        self, cache: LatentCache, sae_name: str, layer: int, block: int = 512
    ) -> Int64[np.ndarray, " latent"]:
        """The latents that can be explained and judged at a layer.

        Args:
            block: Latents whose firings are in memory at a time.
        """
        d_sae = cache.d_sae(sae_name)
        found = [
            start + self._eligible(cache, sae_name, layer, start, min(start + block, d_sae))
            for start in range(0, d_sae, block)
        ]
        return np.concatenate(found)

    def _eligible(
        self, cache: LatentCache, sae_name: str, layer: int, start: int, stop: int
    ) -> Int64[np.ndarray, " latent"]:
        firings = cache.range(sae_name, layer, start, stop)
        window, _, inside = self._places(firings.positions)
        latent = np.repeat(np.arange(stop - start), np.diff(firings.offsets))
        pairs = (latent * len(self.token_ids) + window)[inside]  # ascending, by latent and position
        latent, window = np.divmod(pairs[np.diff(pairs, prepend=-1) > 0], len(self.token_ids))
        explained, judged = (
            np.bincount(latent[half[window]], minlength=stop - start)
            for half in (self.to_explain, self.to_judge)
        )
        enough = np.minimum(np.minimum(explained, judged), self.to_judge.sum() - judged) >= FEWEST
        return np.flatnonzero(enough)

    def _places(
        self, positions: Int[np.ndarray, " firing"]
    ) -> tuple[
        Int64[np.ndarray, " firing"], Int64[np.ndarray, " firing"], Bool[np.ndarray, " firing"]
    ]:
        """The window of each position, the place in it, and whether it is in a window at all."""
        context, place = np.divmod(positions.astype(np.int64), self.context_length)
        inside = place < self.per_context * self.length
        return (
            context * self.per_context + place // self.length,
            place % self.length,
            inside,
        )


def draw_latents(
    cache: LatentCache, windows: Windows, sae_name: str, layer: int, wanted: int, seed: int
) -> list[int]:
    """As many eligible latents as are wanted, or all there are; ascending."""
    eligible = windows.eligible(cache, sae_name, layer)
    random = np.random.default_rng((seed, zlib.crc32(sae_name.encode()), layer))
    drawn = random.choice(eligible, min(wanted, len(eligible)), replace=False)
    return sorted(drawn.tolist())


def examples_of(
    cache: LatentCache,
    windows: Windows,
    sae_name: str,
    layer: int,
    latent: int,
    *,
    contexts: int,
    examples: int,
    seed: int,
) -> Examples:
    """Choose what is shown of an eligible latent.

    Active windows that are judged are drawn evenly over the range of activation: they are ordered
    by their largest, cut into as many equal parts as are wanted, and one is drawn of each.

    Args:
        contexts: Windows to explain it by, at most.
        examples: Windows of each kind that are judged, at most.
        seed: Of what is drawn.
    """
    strengths = windows.strengths(cache, sae_name, layer, latent)
    peak = strengths.max(1)
    rising = np.argsort(peak, kind="stable")
    active = rising[(peak > 0)[rising]]
    explained = active[windows.to_explain[active]][::-1][:contexts]
    judged = active[windows.to_judge[active]]
    silent = np.flatnonzero(windows.to_judge & (peak == 0))
    marked = (strengths >= MARKED * peak[:, None]) & (strengths > 0)
    random = np.random.default_rng((seed, zlib.crc32(sae_name.encode()), layer, latent))

    def shown(window: int, marks: Bool[np.ndarray, " token"], truth: bool) -> Example:
        ids = windows.token_ids[window].tolist()
        return Example(tuple(ids), tuple(marks.tolist()), truth)

    count = min(examples, len(judged), len(silent))
    nothing = np.zeros(windows.length, bool)
    detection = [shown(i, nothing, True) for i in _spread(judged, count, random)]
    detection += [shown(i, nothing, False) for i in _drawn(silent, count, random)]

    # Only where other tokens can be marked; of two neighbours by strength one is marked wrongly.
    free = judged[((strengths == 0).sum(1) >= marked.sum(1))[judged]]
    pairs = np.reshape(_spread(free, 2 * min(examples, len(free) // 2), random), (-1, 2))
    fuzzing = []
    for pair in pairs:
        right, wrong = random.permutation(pair).tolist()
        elsewhere = nothing.copy()
        places = np.flatnonzero(strengths[wrong] == 0)
        elsewhere[_drawn(places, int(marked[wrong].sum()), random)] = True
        fuzzing += [shown(right, marked[right], True), shown(wrong, elsewhere, False)]
    return Examples(
        tuple(shown(i, marked[i], True) for i in explained.tolist()),
        _shuffled(detection, random),
        _shuffled(fuzzing, random),
    )


def _spread(
    ordered: Int64[np.ndarray, " window"], count: int, random: np.random.Generator
) -> list[int]:
    """One of each of `count` equal parts."""
    parts = np.array_split(ordered, count) if count else []
    return [int(random.choice(part)) for part in parts]


def _drawn(among: Int64[np.ndarray, " some"], count: int, random: np.random.Generator) -> list[int]:
    drawn: list[int] = random.choice(among, count, replace=False).tolist()
    return drawn


def _shuffled(examples: Sequence[Example], random: np.random.Generator) -> tuple[Example, ...]:
    return tuple(examples[i] for i in random.permutation(len(examples)))
