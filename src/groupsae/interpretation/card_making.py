"""Making cards: which latents get one, what stands on it, and which are set beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int, Int64
from torch import Tensor

from groupsae.errors import InputError
from groupsae.evaluation.similarity import decoder_rows
from groupsae.interpretation.cards import Card, Neighbour, Pair, PairStratum, Shown
from groupsae.interpretation.contexts import (
    AFTER,
    BEFORE,
    Windows,
    contexts_of,
    never_fires,
    pooled,
)
from groupsae.interpretation.depth import DepthProfile
from groupsae.interpretation.latent_cache import Firings, LatentCache
from groupsae.interpretation.logit_attribution import LogitAttribution, logit_attribution
from groupsae.interpretation.matching import Matches, match, nearest_rows, strata
from groupsae.interpretation.unembedding import Unembedding
from groupsae.progress import progress
from groupsae.sae import SAE

BINS = 20  # of a histogram
LOGITS = 10  # at each end
NEIGHBOURS = 5  # in the same SAE
NEIGHBOURS_BY_LAYER = 3  # in each other SAE, by cosine and by firing


def choose_latents(
    cache: LatentCache,
    sae_name: str,
    *,
    wanted: int | Literal["all"],
    first: Sequence[int] = (),
    seed: int = 0,
) -> list[int]:
    """Which latents of an SAE get a card: some of those that fire, ascending.

    Args:
        wanted: How many, or all that fire.
        first: Those that come in any case, even if they are more than wanted, if they fire.
        seed: The others are drawn at random.

    Raises:
        InputError: If the cache has no such SAE, or the SAE no such latent.
    """
    _check(cache, sae_name, first)
    fires = _counts(cache, sae_name).sum(axis=1) > 0
    if wanted == "all":
        return np.flatnonzero(fires).tolist()
    given = {latent for latent in first if fires[latent]}
    others = np.setdiff1d(np.flatnonzero(fires), list(given))
    drawn = np.random.default_rng(seed).permutation(others)[: max(wanted - len(given), 0)]
    return sorted([*given, *drawn.tolist()])


def make_cards(
    cache: LatentCache,
    saes: Mapping[str, SAE],
    shown: Sequence[Shown],
    chosen: Mapping[str, Sequence[int]],
    unembedding: Unembedding | None,
    *,
    contexts: int,
    per_decile: int = 2,
    seed: int = 0,
    token_ids: Int[Tensor, " known"] | None = None,
    block_firings: int = 2**22,
) -> Iterator[Card]:
    """The cards of the chosen latents: SAE after SAE, each one's latents ascending.

    In memory: the firings of two SAEs at one layer while neighbours are looked for, about 30 bytes
    each; then `block_firings` of each layer.

    Args:
        saes: By their names in the cache.
        shown: Whose SAEs are set beside each other: a group's latents get neighbours among those of
            each layer's baseline, and a baseline's among those of the groups that have the layer.
        chosen: The latents of each SAE; all of them must fire (see :func:`choose_latents`).
        contexts: Strongest contexts over all layers, and as many of each layer.
        per_decile: Samples of each tenth of the firings.
        seed: Of the samples.
        token_ids: The vocabulary of the logits; see
            :func:`groupsae.interpretation.logit_attribution.logit_attribution`.
        block_firings: Firings at each layer that are read at a time, or those of one latent.

    Raises:
        InputError: If the cache has no such SAE or latent, or the latent never fires.
    """
    windows = Windows(cache.tokens, BEFORE, AFTER)
    with progress("cards", sum(map(len, chosen.values())), "latents") as bar:
        for name, own in chosen.items():
            if not own:
                continue
            latents = np.array(sorted(own), np.int64)
            known = _known(cache, saes, shown, name, latents, unembedding, token_ids)
            firings = _firings(cache, name, latents, block_firings)
            for row, of_layers in enumerate(firings):
                yield _card(known, row, of_layers, windows, contexts, per_decile, seed)
                bar.advance(1)


def pairs(
    cache: LatentCache,
    saes: Mapping[str, SAE],
    groups: Shown,
    baseline: Shown,
    *,
    parts: int = 10,
    per_part: int = 3,
    seed: int = 0,
) -> list[PairStratum]:
    """Pairs over the whole range of cosines, from below and layer by layer.

    A layer whose group is its own baseline has none, nor has one where no pair fires.

    Args:
        saes: By their names in the cache.
        parts: Equal parts of the cosines from 0 to 1; those below 0 count as 0.
        per_part: Pairs drawn from each.
        seed: Of the draw.

    Raises:
        InputError: If the cache lacks one of the SAEs at a layer.
    """
    found: list[PairStratum] = []
    for layer in sorted(groups.saes.keys() & baseline.saes.keys()):
        name, other = groups.saes[layer], baseline.saes[layer]
        if name == other:
            continue
        cosines, nearest = nearest_rows(
            decoder_rows(saes[name], layer), decoder_rows(saes[other], layer)
        )
        cosine, to = cosines[:, 0].double().cpu().numpy(), nearest[:, 0].cpu().numpy()
        eligible = (cache.index(name, layer).counts > 0) & (
            cache.index(other, layer).counts[to] > 0
        )
        if not eligible.any():
            continue
        for part in strata(cosine, eligible, parts=parts, per_part=per_part, seed=seed):
            drawn = tuple(
                Pair(
                    layer,
                    name,
                    latent,
                    other,
                    int(to[latent]),
                    cosine=float(cosine[latent]),
                    jaccard=_jaccard(
                        cache.firings(name, layer, latent),
                        cache.firings(other, layer, int(to[latent])),
                    ),
                )
                for latent in part.latents
            )
            found.append(PairStratum(layer, part.low, part.high, part.population, drawn))
    return found


@dataclass(frozen=True)
class _Known:
    """What is known of the chosen latents of one SAE before their firings are read.

    Attributes:
        logits_layer: Where each latent fires most.
        nearest: The latents of the same SAE that are nearest by cosine.
        matches: (layer, name of another SAE) -> the best matches among its latents.
    """

    name: str
    latents: Int64[np.ndarray, " latent"]
    layers: tuple[int, ...]
    density: Float64[np.ndarray, "latent layer"]
    mean: Float32[np.ndarray, "latent layer"]
    maximum: Float32[np.ndarray, "latent layer"]
    logits_layer: Int64[np.ndarray, " latent"]
    logits: LogitAttribution
    nearest: tuple[Float[Tensor, "latent n"], Int64[Tensor, "latent n"]]
    matches: Mapping[tuple[int, str], Matches]

    def neighbours(self, row: int) -> tuple[Neighbour, ...]:
        """Those of the same SAE; without the latent itself, which is the nearest as a rule."""
        own = int(self.latents[row])
        found = zip(*(each[row].tolist() for each in self.nearest), strict=True)
        others = [Neighbour(self.name, to, "cosine", cosine) for cosine, to in found if to != own]
        return tuple(others[:NEIGHBOURS])

    def neighbours_at(self, layer: int, row: int) -> tuple[Neighbour, ...]:
        """Those of the other partitions' SAEs."""
        return tuple(
            Neighbour(name, int(to), by, float(similarity))
            for (at, name), found in self.matches.items()
            if at == layer
            for by, similarities, latents in (
                ("cosine", found.cosine[row], found.nearest[row]),
                ("jaccard", found.jaccard[row], found.companions[row]),
            )
            for similarity, to in zip(similarities, latents, strict=True)
            if to >= 0
        )


def _known(
    cache: LatentCache,
    saes: Mapping[str, SAE],
    shown: Sequence[Shown],
    name: str,
    latents: Int64[np.ndarray, " latent"],
    unembedding: Unembedding | None,
    token_ids: Int[Tensor, " known"] | None,
) -> _Known:
    sae, layers = saes[name], cache.layers(name)
    _check(cache, name, latents.tolist())
    counts = _counts(cache, name)[latents]
    silent = latents[~counts.any(axis=1)]
    if len(silent):
        raise never_fires(cache, name, int(silent[0]))
    index = [cache.index(name, layer) for layer in layers]
    logits_layer = np.array(layers)[counts.argmax(axis=1)]
    rows = sae.W_dec.detach()
    return _Known(
        name,
        latents,
        layers,
        density=counts / cache.manifest.tokens,
        mean=np.stack([of.mean[latents] for of in index], axis=1),
        maximum=np.stack([of.maximum[latents] for of in index], axis=1),
        logits_layer=logits_layer,
        logits=_logits(sae, latents, logits_layer, unembedding, token_ids),
        nearest=nearest_rows(rows[torch.from_numpy(latents)], rows, NEIGHBOURS + 1),
        matches={
            (layer, other): match(
                cache, name, sae, other, saes[other], layer, n=NEIGHBOURS_BY_LAYER, latents=latents
            )
            for layer in layers
            for other in _others(shown, name, layer)
        },
    )


def _others(shown: Sequence[Shown], name: str, layer: int) -> list[str]:
    """The SAEs whose latents are set beside those of one: a group and its layer's baseline."""
    by_partition: dict[str, list[str]] = {"groups": [], "baseline": []}
    for each in shown:
        if layer in each.saes:
            by_partition[each.partition].append(each.saes[layer])
    found = [
        *(by_partition["baseline"] if name in by_partition["groups"] else []),
        *(by_partition["groups"] if name in by_partition["baseline"] else []),
    ]
    return [other for other in dict.fromkeys(found) if other != name]


def _logits(
    sae: SAE,
    latents: Int64[np.ndarray, " latent"],
    layers: Int64[np.ndarray, " latent"],
    unembedding: Unembedding | None,
    token_ids: Int[Tensor, " known"] | None,
) -> LogitAttribution:
    """The outermost logits of each latent's decoder row at its layer; none without unembedding."""
    if unembedding is None:
        none = torch.zeros(len(latents), 0)
        return LogitAttribution(none.long(), none, none.long(), none)
    rows = torch.empty_like(sae.W_dec[torch.from_numpy(latents)])
    for layer in np.unique(layers).tolist():
        here = np.flatnonzero(layers == layer)
        rows[torch.from_numpy(here)] = decoder_rows(sae, layer)[torch.from_numpy(latents[here])]
    n = min(LOGITS, len(unembedding.W_U if token_ids is None else token_ids))
    return logit_attribution(rows, unembedding, n=n, token_ids=token_ids)


def _firings(
    cache: LatentCache, name: str, latents: Int64[np.ndarray, " latent"], most: int
) -> Iterator[dict[int, Firings]]:
    """The firings of each latent in turn at all layers, read `most` of each layer at a time."""
    layers = cache.layers(name)
    offsets = np.stack([cache.index(name, layer).offsets for layer in layers])
    start = stop = 0
    for latent in latents.tolist():
        if latent >= stop:
            fit = (offsets[:, latents + 1] - offsets[:, [latent]] <= most).all(axis=0)
            start, stop = latent, 1 + max(latent, int(latents[fit].max(initial=0)))
            held = [cache.range(name, layer, start, stop) for layer in layers]
        own = [slice(*found.offsets[latent - start :][:2]) for found in held]
        yield {
            layer: Firings(found.positions[here], found.activations[here])
            for layer, found, here in zip(layers, held, own, strict=True)
        }


def _card(
    known: _Known,
    row: int,
    of_layers: Mapping[int, Firings],
    windows: Windows,
    contexts: int,
    per_decile: int,
    seed: int,
) -> Card:
    latent, layers = int(known.latents[row]), known.layers
    firings = {layer: found for layer, found in of_layers.items() if len(found.positions)}
    together = pooled(firings)
    overall = contexts_of(
        windows, together, top=contexts, per_decile=per_decile, seed=(seed, latent, 0)
    )
    by_layer = {
        layer: contexts_of(windows, pooled({layer: found}), top=contexts, per_decile=0, seed=()).top
        for layer, found in firings.items()
        if len(layers) > 1
    }
    persistence = np.bincount(together.n_layers - 1, minlength=len(layers))
    depth = DepthProfile(layers, known.density[[row]], known.mean[[row]], persistence[None])
    edges = np.linspace(0, float(known.maximum[row].max()), BINS + 1)
    return Card(
        sae=known.name,
        latent=latent,
        layers=layers,
        density=tuple(known.density[row].tolist()),
        mean=tuple(known.mean[row].tolist()),
        maximum=tuple(known.maximum[row].tolist()),
        persistence=tuple(persistence.tolist()),
        centre=float(depth.centre[0]),
        span=(int(depth.span()[0, 0]), int(depth.span()[0, 1])),
        histogram_edges=tuple(edges.tolist()),
        histogram=tuple(
            tuple(np.histogram(found.activations, edges)[0].tolist())
            for found in of_layers.values()
        ),
        top=overall.top,
        top_by_layer=by_layer,
        deciles=overall.deciles,
        logits_layer=int(known.logits_layer[row]),
        largest=_numbered(known.logits.largest[row], known.logits.largest_values[row]),
        smallest=_numbered(known.logits.smallest[row], known.logits.smallest_values[row]),
        neighbours=known.neighbours(row),
        neighbours_by_layer={layer: known.neighbours_at(layer, row) for layer in layers},
    )


def _numbered(ids: Int[Tensor, " n"], values: Float[Tensor, " n"]) -> tuple[tuple[int, float], ...]:
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))


def _jaccard(a: Firings, b: Firings) -> float:
    both = len(np.intersect1d(a.positions, b.positions, assume_unique=True))
    return both / (len(a.positions) + len(b.positions) - both)


def _counts(cache: LatentCache, name: str) -> Int64[np.ndarray, "d_sae layer"]:
    return np.stack([cache.index(name, layer).counts for layer in cache.layers(name)], axis=1)


def _check(cache: LatentCache, name: str, latents: Sequence[int]) -> None:
    d_sae = cache.d_sae(name)
    absent = [latent for latent in latents if not 0 <= latent < d_sae]
    if absent:
        raise InputError(
            f"latent {absent[0]} does not exist: {name} has {d_sae} latents, 0 to {d_sae - 1}"
        )
