"""Cards and the text that they show, in files small enough to be loaded when one is looked at.

A token stands in the text files once, however many contexts of however many latents show it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from groupsae.interpretation.browser.data import data_file, short
from groupsae.interpretation.cards import Card, Neighbour
from groupsae.interpretation.contexts import Context

CARDS = 50
TOKENS = 2**16


class CardFiles:
    """Writes `cards-00000.js` and so on, each as soon as it is full."""

    def __init__(self, folder: Path, per_file: int = CARDS) -> None:
        self.folder = folder
        self.per_file = per_file
        self._files = 0
        self._cards: list[dict[str, Any]] = []

    def add(self, card: Card, numbers: Mapping[str, int]) -> None:
        """Add a card; `numbers` is the place of each SAE in the index."""
        self._cards.append(_card(card, numbers))
        if len(self._cards) == self.per_file:
            self.close()

    def close(self) -> None:
        """Write what is not written yet."""
        if self._cards:
            path = self.folder / f"cards-{self._files:05d}.js"
            data_file(path, "cards", self._cards, self._files)
            self._files += 1
            self._cards = []


class TextFiles:
    """Writes `text-00000.js` and so on: token ids by position, 0 where no context shows any."""

    def __init__(self, folder: Path, per_file: int = TOKENS) -> None:
        self.folder = folder
        self.per_file = per_file
        self.token_ids: set[int] = set()
        self._text: dict[int, array[int]] = {}

    def add(self, card: Card) -> None:
        """Keep the text of a card's contexts; all cards' positions are of one latent cache."""
        for context in contexts_of_card(card):
            ids = array("q", context.token_ids)
            start = context.position - context.peak
            while ids:
                number, place = divmod(start, self.per_file)
                if number not in self._text:
                    self._text[number] = array("q", bytes(8 * self.per_file))
                here = ids[: self.per_file - place]
                self._text[number][place : place + len(here)] = here
                ids, start = ids[len(here) :], start + len(here)

    def close(self) -> None:
        """Write the text, and note which tokens occur in it."""
        for number, ids in self._text.items():
            self.token_ids.update(ids)
            data_file(self.folder / f"text-{number:05d}.js", "text", ids.tolist(), number)


def contexts_of_card(card: Card) -> Iterator[Context]:
    """All contexts that a card shows."""
    return chain(card.top, *card.top_by_layer.values(), *card.deciles)


def _card(card: Card, numbers: Mapping[str, int]) -> dict[str, Any]:
    return {
        "density": [short(value) for value in card.density],
        "mean": [short(value) for value in card.mean],
        "maximum": [short(value) for value in card.maximum],
        "persistence": list(card.persistence),
        "centre": short(card.centre),
        "span": list(card.span),
        "histogram_edges": [short(edge) for edge in card.histogram_edges],
        "histogram": [list(counts) for counts in card.histogram],
        "top": [_context(context) for context in card.top],
        "top_by_layer": {
            str(layer): [_context(context) for context in contexts]
            for layer, contexts in card.top_by_layer.items()
        },
        "deciles": [[_context(context) for context in contexts] for contexts in card.deciles],
        "logits_layer": card.logits_layer,
        "largest": [[token, short(logit)] for token, logit in card.largest],
        "smallest": [[token, short(logit)] for token, logit in card.smallest],
        "neighbours": [_neighbour(near, numbers) for near in card.neighbours],
        "neighbours_by_layer": {
            str(layer): [_neighbour(near, numbers) for near in found]
            for layer, found in card.neighbours_by_layer.items()
        },
    }


def _context(context: Context) -> list[Any]:
    """`[layer, start, peak, length, [place, activation, ...]]` of the tokens that fire it."""
    firing = [
        value
        for place, strength in enumerate(context.strengths)
        if strength
        for value in (place, short(strength))
    ]
    start = context.position - context.peak
    return [context.layer, start, context.peak, len(context.token_ids), firing]


def _neighbour(near: Neighbour, numbers: Mapping[str, int]) -> list[Any]:
    return [numbers[near.sae], near.latent, near.by, short(near.similarity)]
