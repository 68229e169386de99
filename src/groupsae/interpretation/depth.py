"""At which depths of the network the latents of a group are alive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from groupsae.errors import InputError
from groupsae.interpretation.latent_cache import FiringRange, LatentCache

SHARE = 0.1  # of a latent's largest firing rate, from which on it lives at a layer

DEFINITIONS = {
    "rate": "share of the tokens on which a latent fires at a member layer; the same tokens at all "
    "layers",
    "mean": "mean activation over the tokens on which it fires there, in units of the normalised "
    "residual stream",
    "persistence": "of the tokens on which a latent fires at any member layer, how many fire it at "
    "exactly 1, 2, ... layers; mean_persistence is the mean number of layers",
    "lives": "a latent lives at a member layer where its rate is at least `share` of its largest "
    "rate at any of them; first and last are the outermost such layers",
    "one, some, all": "shares of the latents that fire at all which live at exactly one member "
    "layer, at several but not all, at all of several",
    "silent": "share of all latents that fire at no member layer",
    "heat map": "share of a latent's firings that falls on each member layer; the latents that "
    "fire are ordered by centre; where there are many, a row is the mean of latents_per_row",
    "centre": "mean of the member layers, weighted by the latent's rate there: its centre of mass",
}


@dataclass(frozen=True)
class DepthProfile:
    """Of each latent of a group, how it fires at each member layer; see :data:`DEFINITIONS`.

    Attributes:
        layers: The member layers, from below.
        persistence: Numbers of tokens; column i is of those that fire the latent at i + 1 layers.
    """

    layers: tuple[int, ...]
    rate: Float64[np.ndarray, "latent layer"]
    mean: Float32[np.ndarray, "latent layer"]
    persistence: Int64[np.ndarray, "latent layer"]

    @cached_property
    def silent(self) -> Bool[np.ndarray, " latent"]:
        """Which latents fire at no layer."""
        silent: np.ndarray = self.rate.max(axis=1) == 0
        return silent

    @cached_property
    def share_of_firings(self) -> Float64[np.ndarray, "latent layer"]:
        """The share of a latent's firings that falls on each layer (feature spreading).

        0 where it is silent.
        """
        return self.rate / np.where(self.silent, 1, self.rate.sum(1))[:, None]

    @cached_property
    def mean_persistence(self) -> Float64[np.ndarray, " latent"]:
        """At how many layers a token that fires a latent does so, on average; 0 where silent."""
        tokens = self.persistence.sum(1)
        layers = self.persistence @ np.arange(1, len(self.layers) + 1)
        return layers / np.where(tokens, tokens, 1)

    @cached_property
    def centre(self) -> Float64[np.ndarray, " latent"]:
        """Each latent's centre of mass, a layer; NaN where it is silent."""
        centre = self.share_of_firings @ np.array(self.layers, np.float64)
        return np.where(self.silent, np.nan, centre)

    @cached_property
    def order(self) -> Int64[np.ndarray, " latent"]:
        """The latents by centre of mass, from below; silent ones last. The rows of a heat map."""
        return np.argsort(self.centre, kind="stable")

    def lives(self, share: float = SHARE) -> Bool[np.ndarray, "latent layer"]:
        """At which layers each latent lives.

        Raises:
            InputError: If the share is not above 0 and at most 1.
        """
        if not 0 < share <= 1:
            raise InputError(
                f"share={share} of a latent's largest firing rate must lie above 0 and be at most 1"
            )
        largest = self.rate.max(axis=1, keepdims=True)
        lives: np.ndarray = (self.rate >= share * largest) & (largest > 0)
        return lives

    def span(self, share: float = SHARE) -> Int64[np.ndarray, "latent 2"]:
        """The first and the last layer at which each latent lives; -1 where it is silent."""
        lives, layers = self.lives(share), np.array(self.layers, np.int64)
        first = layers[lives.argmax(axis=1)]
        last = layers[::-1][lives[:, ::-1].argmax(axis=1)]
        return np.where(self.silent[:, None], -1, np.stack([first, last], axis=1))

    def summary(self, share: float = SHARE) -> dict[str, Any]:
        """Of the whole group, fit for JSON: the fractions that live at one, some, all layers."""
        living = self.lives(share).sum(axis=1)[~self.silent]
        several = len(self.layers) > 1
        return {
            "layers": list(self.layers),
            "latents": len(self.silent),
            "share": share,
            "silent": float(self.silent.mean()),
            "one": float((living == 1).mean()),
            "some": float(((living > 1) & (living < len(self.layers))).mean()),
            "all": float((living == len(self.layers)).mean()) if several else 0.0,
            "mean_persistence": float(self.mean_persistence[~self.silent].mean()),
            "persistence": self.persistence.sum(0).tolist(),
        }

    def heat_map(self, rows: int = 400) -> dict[str, Any]:
        """The shares of firings of the latents that fire, by centre of mass, fit for JSON.

        Args:
            rows: At most; where there are more latents, a row is the mean of neighbouring ones.
        """
        firing = self.order[: len(self.silent) - int(self.silent.sum())]
        bins = np.array_split(firing, min(rows, len(firing)))
        return {
            "layers": list(self.layers),
            "latents_per_row": len(firing) / len(bins),
            "silent": int(self.silent.sum()),
            "share": [self.share_of_firings[own].mean(0).round(5).tolist() for own in bins],
        }


def depth_profile(cache: LatentCache, sae_name: str, *, block_firings: int = 2**22) -> DepthProfile:
    """The depth profile of every latent of an SAE, over the layers that the cache holds.

    Args:
        block_firings: Firings at each layer that are in memory at a time, or those of one latent.

    Raises:
        InputError: If the cache has no such SAE, or none of its latents fires.
    """
    layers = cache.layers(sae_name)
    index = {layer: cache.index(sae_name, layer) for layer in layers}
    counts = np.stack([index[layer].counts for layer in layers], axis=1)
    if not counts.any():
        raise InputError(
            f"no latent of {sae_name} fires on any of the {cache.manifest.tokens:,} tokens of the "
            "latent cache; look at how it was trained, or name another SAE"
        )
    persistence = [
        persistence_of([cache.range(sae_name, layer, start, stop) for layer in layers])
        for start, stop in _blocks(counts, block_firings)
    ]
    return DepthProfile(
        layers,
        rate=counts / cache.manifest.tokens,
        mean=np.stack([index[layer].mean for layer in layers], axis=1),
        persistence=np.concatenate(persistence),
    )


def persistence_of(of_layers: Sequence[FiringRange]) -> Int64[np.ndarray, "latent layer"]:
    """On how many tokens each latent fires at exactly 1, 2, ... of the layers.

    Args:
        of_layers: The firings of the same latents at each layer.
    """
    n_latents = len(of_layers[0].offsets) - 1
    span = 1 + max(int(found.positions.max(initial=0)) for found in of_layers)
    keys = np.concatenate(
        [
            np.repeat(np.arange(n_latents), np.diff(found.offsets)) * span + found.positions
            for found in of_layers
        ]
    )
    token_of_latent, n_layers = np.unique(keys, return_counts=True)
    cells = token_of_latent // span * len(of_layers) + n_layers - 1
    counts = np.bincount(cells, minlength=n_latents * len(of_layers))
    return counts.reshape(n_latents, len(of_layers))


def _blocks(counts: Int64[np.ndarray, "latent layer"], most: int) -> Iterator[tuple[int, int]]:
    """Ranges of latents with at most `most` firings at any layer, or of one latent."""
    start, held = 0, np.zeros(counts.shape[1], np.int64)
    for latent, own in enumerate(counts):
        if latent > start and (held + own > most).any():
            yield start, latent
            start, held = latent, np.zeros_like(held)
        held = held + own
    yield start, len(counts)
