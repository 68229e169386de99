"""The items of a sheet, and what its page shows of them: contexts and logits, and no name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from groupsae.evaluation.similarity import decoder_rows
from groupsae.interpretation.contexts import Context, Windows, contexts_of, pooled
from groupsae.interpretation.latent_cache import LatentCache
from groupsae.interpretation.logit_attribution import logit_attribution
from groupsae.interpretation.unembedding import Unembedding
from groupsae.progress import progress
from groupsae.sae import SAE

_LOGITS = 10  # at each end
_BEFORE, _AFTER = 24, 8  # tokens of a window around the firing


@dataclass(frozen=True)
class Item:
    """One latent at one layer.

    Attributes:
        id: What the page calls it; it tells nothing of the rest.
    """

    id: str
    sae: str
    layer: int
    latent: int


@dataclass(frozen=True)
class ShownItem:
    """One item as the page shows it.

    Attributes:
        contexts: The strongest at the item's layer, the strongest first.
        largest, smallest: Token ids of the outermost logits; empty where they are left out.
    """

    id: str
    contexts: tuple[Context, ...]
    largest: tuple[int, ...]
    smallest: tuple[int, ...]


def shown_items(
    cache: LatentCache,
    saes: Mapping[str, SAE],
    items: Sequence[Item],
    unembedding: Unembedding | None,
    *,
    contexts: int,
    token_ids: Int[Tensor, " known"] | None = None,
) -> Iterator[ShownItem]:
    """What is shown of each item, in their order."""
    windows = Windows(cache.tokens, _BEFORE, _AFTER)
    logits = {} if unembedding is None else _logits(saes, items, unembedding, token_ids)
    with progress("annotation sheet", len(items), "latents") as bar:
        for item in items:
            firings = cache.firings(item.sae, item.layer, item.latent)
            found = contexts_of(
                windows, pooled({item.layer: firings}), top=contexts, per_decile=0, seed=(0,)
            )
            yield ShownItem(item.id, found.top, *logits.get(item.id, ((), ())))
            bar.advance(1)


def _logits(
    saes: Mapping[str, SAE],
    items: Sequence[Item],
    unembedding: Unembedding,
    token_ids: Int[Tensor, " known"] | None,
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The largest and the smallest logits' token ids, by item."""
    by_entry: dict[tuple[str, int], list[Item]] = {}
    for item in items:
        by_entry.setdefault((item.sae, item.layer), []).append(item)
    known = len(unembedding.W_U if token_ids is None else token_ids)
    ends: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for (name, layer), own in by_entry.items():
        rows = decoder_rows(saes[name], layer)[[item.latent for item in own]]
        found = logit_attribution(rows, unembedding, n=min(_LOGITS, known), token_ids=token_ids)
        for item, largest, smallest in zip(
            own, found.largest.tolist(), found.smallest.tolist(), strict=True
        ):
            ends[item.id] = tuple(largest), tuple(smallest)
    return ends
