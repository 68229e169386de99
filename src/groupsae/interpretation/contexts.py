"""The text in which a latent fires: its strongest contexts, and samples of each decile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
from jaxtyping import Float32, Int32, Int64

from groupsae.errors import InputError
from groupsae.interpretation.latent_cache import Firings, LatentCache

DECILES = 10
BEFORE, AFTER = 24, 8  # tokens shown around a firing


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
    before: int = BEFORE,
    after: int = AFTER,
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
        raise never_fires(cache, sae_name, latent)
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


def never_fires(cache: LatentCache, sae_name: str, latent: int) -> InputError:
    """What is raised where contexts of a latent are asked for that has none."""
    return InputError(
        f"latent {latent} of {sae_name} fires on none of the {cache.manifest.tokens:,} tokens of "
        "the latent cache; choose another latent, or cache more tokens"
    )


@dataclass(frozen=True)
class Pooled:
    """A latent's firings at several layers, each position once with the largest activation.

    Attributes:
        layers: Where that is.
        n_layers: At how many of the layers it fires there.
    """

    positions: Int32[np.ndarray, " firing"]
    activations: Float32[np.ndarray, " firing"]
    layers: Int64[np.ndarray, " firing"]
    n_layers: Int64[np.ndarray, " firing"]


def pooled(firings: Mapping[int, Firings]) -> Pooled:
    """The firings of all layers together; of equal activations the lowest layer's."""
    if len(firings) == 1:
        ((layer, found),) = firings.items()
        n_layers = np.ones(len(found.positions), np.int64)
        return Pooled(*found, layer * n_layers, n_layers)
    positions = np.concatenate([found.positions for found in firings.values()])
    order = np.argsort(positions, kind="stable")  # quick: it merges parts that are sorted
    is_new = np.diff(positions[order], prepend=-1) > 0
    place = np.empty(len(order), np.int64)
    place[order] = is_new.cumsum() - 1
    n_layers = np.bincount(place)
    activations, layers = np.zeros(len(n_layers), np.float32), np.zeros_like(n_layers)
    ends = np.cumsum([len(found.positions) for found in firings.values()])
    places = dict(zip(firings, np.split(place, ends[:-1]), strict=True))
    for layer in sorted(firings, reverse=True):
        here, own = places[layer], firings[layer].activations
        largest = own >= activations[here]
        activations[here[largest]], layers[here[largest]] = own[largest], layer
    return Pooled(positions[order[is_new]], activations, layers, n_layers)


@dataclass(frozen=True)
class Windows:
    """Tokens around a position, within its context."""

    tokens: Int32[np.ndarray, "context position"]
    before: int
    after: int

    def of(
        self, positions: Int32[np.ndarray, " window"]
    ) -> tuple[Int32[np.ndarray, " window"], Int32[np.ndarray, " window"]]:
        """Where the windows begin, and before which positions they end."""
        length = self.tokens.shape[1]
        begin = positions - positions % length
        return (
            np.maximum(positions - self.before, begin),
            np.minimum(positions + self.after + 1, begin + length),
        )


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
    chosen = [_distinct(rising[::-1], firings, windows, top, set())]
    chosen += _samples(rising, firings, windows, per_decile, seed) if per_decile else [[]] * DECILES
    shown = _shown(np.array([*chain(*chosen)], np.int64), firings, windows)
    strongest, *deciles = (tuple(islice(shown, len(part))) for part in chosen)
    return Contexts(len(rising), strongest, tuple(deciles))


def _samples(
    rising: Int64[np.ndarray, " firing"],
    firings: Pooled,
    windows: Windows,
    wanted: int,
    seed: tuple[int, ...],
) -> list[list[int]]:
    """Firings of each tenth, weakest tenth first."""
    random, seen = np.random.default_rng(seed), set[bytes]()
    edges = len(rising) * np.arange(1, DECILES) // DECILES
    return [
        _distinct(random.permutation(part), firings, windows, wanted, seen)
        for part in np.split(rising, edges)
    ]


def _distinct(
    order: Int64[np.ndarray, " candidate"],
    firings: Pooled,
    windows: Windows,
    wanted: int,
    seen: set[bytes],
) -> list[int]:
    """The first `wanted` firings of `order` from different contexts whose windows are not seen.

    Their windows' tokens are added to those that are seen.
    """
    ids, length = windows.tokens.reshape(-1), windows.tokens.shape[1]
    chosen: list[int] = []
    contexts: set[int] = set()
    some = 4 * wanted  # most often enough
    while len(chosen) < wanted and len(order):
        candidates, order = order[:some], order[some:]
        positions = firings.positions[candidates]
        columns = (candidates, positions // length, *windows.of(positions))
        for i, context, first, last in zip(*(column.tolist() for column in columns), strict=True):
            window = ids[first:last].tobytes()
            if context not in contexts and window not in seen:
                contexts.add(context)
                seen.add(window)
                chosen.append(i)
                if len(chosen) == wanted:
                    break
    return chosen


def _shown(
    chosen: Int64[np.ndarray, " chosen"], firings: Pooled, windows: Windows
) -> Iterator[Context]:
    positions = firings.positions[chosen]
    starts, stops = windows.of(positions)
    columns = (
        firings.layers[chosen],
        positions,
        firings.activations[chosen],
        starts,
        stops,
        np.searchsorted(firings.positions, starts),
        np.searchsorted(firings.positions, stops),
    )
    ids = windows.tokens.reshape(-1)
    for layer, position, activation, start, stop, first, last in zip(
        *(column.tolist() for column in columns), strict=True
    ):
        strengths = np.zeros(stop - start, np.float32)
        strengths[firings.positions[first:last] - start] = firings.activations[first:last]
        yield Context(
            layer=layer,
            position=position,
            activation=activation,
            peak=position - start,
            token_ids=tuple(ids[start:stop].tolist()),
            strengths=tuple(strengths.tolist()),
        )
