"""What the list of all latents shows and searches, in columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from groupsae.interpretation.browser.data import short
from groupsae.interpretation.cards import Card

TOKENS = 5  # of each kind that a row of the list has


class IndexColumns:
    """One entry of each column per card, in the order of the cards."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {
            name: []
            for name in (
                "sae",
                "latent",
                "density",
                "density_by_layer",
                "centre",
                "first",
                "last",
                "maximum",
                "peaks",
                "logits",
            )
        }
        self.token_ids: set[int] = set()

    def add(self, card: Card, numbers: Mapping[str, int]) -> None:
        """Add a card; `numbers` is the place of each SAE in the index."""
        peaks = list(dict.fromkeys(context.token_ids[context.peak] for context in card.top))
        logits = [token for token, _ in card.largest[:TOKENS]]
        row = {
            "sae": numbers[card.sae],
            "latent": card.latent,
            "density": short(sum(card.density) / len(card.density)),
            "density_by_layer": [short(density) for density in card.density],
            "centre": short(card.centre),
            "first": card.span[0],
            "last": card.span[1],
            "maximum": short(max(card.maximum)),
            "peaks": peaks[:TOKENS],
            "logits": logits,
        }
        for name, value in row.items():
            self.columns[name].append(value)
        self.token_ids.update(
            peaks, logits, (token for token, _ in (*card.largest, *card.smallest))
        )
