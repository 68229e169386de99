"""The text in which a latent fires: its strongest contexts, and samples of each decile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64

from groupsae.errors import InputError
from groupsae.interpretation.latent_cache import Firings, LatentCache

DECILES = 10


@dataclass(frozen=True)
class Context:
    """A window of tokens around one firing, within one context of the host model.

    Attributes:
        layer: The member layer at which the latent fires so strongly there.
        position: Of the firing, among all tokens of the cache.
        activation: At that position.
        peak: The firing's place in the window.
        token_ids: Of the window.
        strengths: Activation at each token of the window, 0 where the latent is silent. Over
            several layers, the largest.
    """

    layer: int
    position: int
    activation: float
    peak: int
    token_ids: tuple[int, ...]
    strengths: tuple[float, ...]


@dataclass(frozen=True)
class Contexts:
    """Where a latent fires, at one layer or at all member layers together.

    Attributes:
        firings: How many tokens it fires on.
        top: The strongest firings, strongest first: one of each context, no window twice.
        deciles: Samples of each tenth of its firings by activation, weakest tenth first: one of
            each context in a tenth, no window twice in all tenths. They may be among the top ones.
    """

    firings: int
    top: tuple[Context, ...]
    deciles: tuple[tuple[Context, ...], ...]


@dataclass(frozen=True)
class LatentContexts:
    """The contexts of one latent: over all member layers, and of each at which it fires."""

    overall: Contexts
    by_layer: Mapping[int, Contexts]


def latent_contexts(
    cache: LatentCache,
    sae_name: str,
    latent: int,
    *,
    top: int = 20,
    per_decile: int = 5,
    before: int = 24,
    after: int = 8,
    seed: int = 0,
) -> LatentContexts:
    """The contexts of one latent. Activations of several layers are compared as they are.

    Args:
        top: How many of the strongest.
        per_decile: How many samples of each tenth.
        before: Tokens shown before the firing; fewer where the context begins.
        after: Tokens shown after it.
        seed: Of the samples.

    Raises:
        InputError: If the cache has no such SAE or latent, or the latent never fires.
    """
    firings = {layer: cache.firings(sae_name, layer, latent) for layer in cache.layers(sae_name)}
    firings = {layer: found for layer, found in firings.items() if len(found.positions)}
    if not firings:
        raise InputError(
            f"latent {latent} of {sae_name} fires on none of the {cache.manifest.tokens:,} tokens "
            "of the latent cache; choose another latent, or cache more tokens"
        )
    windows = Windows(cache.tokens, before, after)
    options = {"top": top, "per_decile": per_decile}
    by_layer = {
        layer: contexts_of(
            windows, pooled({layer: found}), seed=(seed, latent, layer + 1), **options
        )
        for layer, found in firings.items()
    }
    overall = contexts_of(windows, pooled(firings), seed=(seed, latent, 0), **options)
    return LatentContexts(overall, by_layer)


@dataclass(frozen=True)
class Pooled:
    """A latent's firings at several layers, each position once with the largest activation.

    Attributes:
        layers: Where that is.
    """

    positions: Int32[np.ndarray, " firing"]
    activations: Float32[np.ndarray, " firing"]
    layers: Int[np.ndarray, " firing"]


def pooled(firings: Mapping[int, Firings]) -> Pooled:
    """The firings of all layers together; of equal activations the lowest layer's."""
    positions = np.concatenate([found.positions for found in firings.values()])
    activations = np.concatenate([found.activations for found in firings.values()])
    layers = np.repeat([*firings], [len(found.positions) for found in firings.values()])
    order = np.lexsort((layers, -activations, positions))
    _, first = np.unique(positions[order], return_index=True)
    chosen = order[first]
    return Pooled(positions[chosen], activations[chosen], layers[chosen])


@dataclass(frozen=True)
class Windows:
    """Tokens around a position, within its context."""

    tokens: Int32[np.ndarray, "context position"]
    before: int
    after: int

    def of(self, position: int) -> slice:
        """The positions of the window."""
        length = self.tokens.shape[1]
        begin = position - position % length
        return slice(
            max(position - self.before, begin), min(position + self.after + 1, begin + length)
        )

    def ids(self, position: int) -> tuple[int, ...]:
        """The token ids of the window."""
        return tuple(self.tokens.reshape(-1)[self.of(position)].tolist())


def contexts_of(
    windows: Windows,
    firings: Pooled,
    *,
    top: int,
    per_decile: int,
    seed: tuple[int, ...],
) -> Contexts:
    """Choose among a latent's firings; see :class:`Contexts`."""
    rising = np.argsort(firings.activations, kind="stable")
    strongest = _distinct(rising[::-1], firings, windows, top, set())
    random, seen = np.random.default_rng(seed), set[tuple[int, ...]]()
    edges = len(rising) * np.arange(DECILES + 1) // DECILES
    deciles = [
        _distinct(random.permutation(part), firings, windows, per_decile, seen)
        for part in np.split(rising, edges[1:-1])
    ]
    return Contexts(
        len(rising),
        tuple(_shown(i, firings, windows) for i in strongest),
        tuple(tuple(_shown(i, firings, windows) for i in decile) for decile in deciles),
    )


def _distinct(
    order: Int64[np.ndarray, " candidate"],
    firings: Pooled,
    windows: Windows,
    wanted: int,
    seen: set[tuple[int, ...]],
) -> list[int]:
    """The first `wanted` firings of `order` from different contexts whose windows are not seen."""
    chosen: list[int] = []
    contexts: set[int] = set()
    candidates: Iterable[int] = order if wanted else ()
    for i in map(int, candidates):
        position = int(firings.positions[i])
        context, ids = position // windows.tokens.shape[1], windows.ids(position)
        if context not in contexts and ids not in seen:
            contexts.add(context)
            seen.add(ids)
            chosen.append(i)
            if len(chosen) == wanted:
                break
    return chosen


def _shown(i: int, firings: Pooled, windows: Windows) -> Context:
    position = int(firings.positions[i])
    window = windows.of(position)
    strengths = np.zeros(window.stop - window.start, np.float32)
    first, last = np.searchsorted(firings.positions, (window.start, window.stop))
    strengths[firings.positions[first:last] - window.start] = firings.activations[first:last]
    return Context(
        layer=int(firings.layers[i]),
        position=position,
        activation=float(firings.activations[i]),
        peak=position - window.start,
        token_ids=windows.ids(position),
        strengths=tuple(strengths.tolist()),
    )
