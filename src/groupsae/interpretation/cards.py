"""What is shown of one latent: a card of plain values, which the browser and the sheets draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from groupsae.interpretation.contexts import Context


@dataclass(frozen=True)
class Shown:
    """Whose SAEs are set side by side: one partition's, by name of the SAE in the latent cache.

    Attributes:
        partition: "groups", or "baseline": one SAE per layer.
        groups_total: G.
        saes: The SAE's name at each layer. A group of one layer is its own baseline: both
            partitions have the same name there.
    """

    partition: str
    groups_total: int
    saes: Mapping[int, str]

    @property
    def name(self) -> str:
        """`baseline`, or `G=2`."""
        return self.partition if self.partition == "baseline" else f"G={self.groups_total}"


@dataclass(frozen=True)
class Neighbour:
    """Another latent, and how similar it is.

    Attributes:
        by: "cosine" of decoder rows, or "jaccard" of firing on the same tokens.
    """

    sae: str
    latent: int
    by: str
    similarity: float


@dataclass(frozen=True)
class Pair:
    """A group's latent beside the latent of a layer's baseline that it is most similar to.

    Attributes:
        cosine: Of their decoder rows, the largest of the group's latent with any of the baseline's.
        jaccard: Of their firing on the same tokens of the layer.
    """

    layer: int
    sae: str
    latent: int
    baseline: str
    baseline_latent: int
    cosine: float
    jaccard: float


@dataclass(frozen=True)
class PairStratum:
    """Pairs whose cosine lies in one part of its range, at one layer.

    Attributes:
        layer: Of the baseline.
        low, high: The part's ends.
        population: How many of the group's latents lie there; of those that fire at the layer, as
            does the baseline's nearest.
        pairs: Those that were drawn, the least similar first.
    """

    layer: int
    low: float
    high: float
    population: int
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Card:
    """What is known of one latent, over the layers that the cache holds of its SAE.

    Attributes:
        layers: The SAE's member layers.
        density: At each layer, the share of the tokens on which the latent fires.
        mean: At each layer, the mean activation where it fires; 0 where it is silent.
        maximum: At each layer, the largest activation.
        persistence: On how many tokens it fires at exactly 1, 2, ... of the layers.
        centre: Its centre of mass, a layer.
        span: The first and the last layer at which it lives (share 0.1).
        histogram_edges: Of activations at all layers; one more than there are bins.
        histogram: At each layer, how many firings fall into each bin.
        top: The strongest contexts over all layers, the strongest first.
        top_by_layer: The strongest contexts of each layer at which it fires; empty where the SAE
            has one layer.
        deciles: Samples of each tenth of its firings, over all layers, weakest tenth first.
        logits_layer: Whose decoder row the logits are of: where the latent fires most.
        largest, smallest: Token ids and logits, the outermost first.
        neighbours: The nearest latents of the same SAE by cosine, then, by layer, the nearest of
            the other partitions' SAEs by cosine and by firing.
    """

    sae: str
    latent: int
    layers: tuple[int, ...]
    density: tuple[float, ...]
    mean: tuple[float, ...]
    maximum: tuple[float, ...]
    persistence: tuple[int, ...]
    centre: float
    span: tuple[int, int]
    histogram_edges: tuple[float, ...]
    histogram: tuple[tuple[int, ...], ...]
    top: tuple[Context, ...]
    top_by_layer: Mapping[int, tuple[Context, ...]]
    deciles: tuple[tuple[Context, ...], ...]
    logits_layer: int
    largest: tuple[tuple[int, float], ...]
    smallest: tuple[tuple[int, float], ...]
    neighbours: Sequence[Neighbour]
    neighbours_by_layer: Mapping[int, Sequence[Neighbour]]
