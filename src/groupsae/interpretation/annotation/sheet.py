"""A sheet: latents of several partitions, mixed, which are judged without knowing whose they are.

Its folder holds `annotate.html`, the page, and `key.json`, which says what each item of it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int
from torch import Tensor

from groupsae.errors import InputError
from groupsae.files import write_text
from groupsae.interpretation.annotation.items import Item, shown_items
from groupsae.interpretation.annotation.key import KEY_FILE, Key, KeyItem, Subject
from groupsae.interpretation.annotation.page import page
from groupsae.interpretation.cards import Shown
from groupsae.interpretation.latent_cache import LatentCache
from groupsae.interpretation.unembedding import Unembedding
from groupsae.sae import SAE

PAGE_FILE = "annotate.html"


@dataclass(frozen=True)
class Sheet:
    """Which latents are judged, in the order in which they are shown.

    Attributes:
        id: The same for the same latents of the same interpretation.
        of: Identifies the interpretation whose latents they are.
        shown: Whose SAEs they are.
    """

    id: str
    of: str
    seed: int
    shown: tuple[Shown, ...]
    items: tuple[Item, ...]


def annotate(
    folder: Path,
    cache: LatentCache,
    saes: Mapping[str, SAE],
    shown: Sequence[Shown],
    unembedding: Unembedding | None,
    texts: Sequence[str],
    *,
    latents: int = 96,
    contexts: int = 20,
    seed: int = 0,
    of: str,
    token_ids: Int[Tensor, " known"] | None = None,
) -> Path:
    """Draw a sheet and write its page and its key.

    Args:
        folder: Where to; `interpretation/annotation` of a run directory.
        saes: By their name in the cache.
        shown: Whose SAEs are set side by side.
        unembedding: The host's; None leaves the logits out.
        texts: How each token id is shown
            (:func:`~groupsae.interpretation.token_text.token_texts`). Untrusted.
        latents: Of each SAE and layer (paper: 96); all that fire, where there are fewer.
        contexts: The strongest ones of each latent at its layer.
        of: Identifies the interpretation whose latents they are.
        token_ids: The vocabulary of the logits, where the unembedding was padded.

    Returns:
        The page, `folder / "annotate.html"`.

    Raises:
        InputError: If no latent fires, the cache lacks one of the SAEs, or the folder cannot be
            written.
    """
    sheet = draw_sheet(cache, shown, latents=latents, seed=seed, of=of)
    items = shown_items(
        cache, saes, sheet.items, unembedding, contexts=contexts, token_ids=token_ids
    )
    html = page(sheet.id, items, texts)
    write_text(folder / KEY_FILE, key_of(sheet).model_dump_json(indent=2) + "\n")
    write_text(folder / PAGE_FILE, html)
    return folder / PAGE_FILE


def draw_sheet(
    cache: LatentCache, shown: Sequence[Shown], *, latents: int = 96, seed: int, of: str
) -> Sheet:
    """Draw latents that fire, from each SAE at each layer, and shuffle them all.

    An SAE that stands in several partitions is drawn from once. Whom else is shown changes no
    SAE's latents.

    Raises:
        InputError: If no latent fires, or the cache lacks an SAE or layer.
    """
    entries = sorted({(name, layer) for subject in shown for layer, name in subject.saes.items()})
    drawn = [
        (name, layer, latent)
        for name, layer in entries
        for latent in _draw(cache, name, layer, latents, seed)
    ]
    if not drawn:
        raise InputError(
            f"no latent of {', '.join(dict(entries)) or 'any SAE'} fires on the "
            f"{cache.manifest.tokens:,} tokens of the latent cache: there is nothing to annotate; "
            "raise interpretation.tokens, or train the SAEs for longer"
        )
    sheet_id = _hash(of, seed, drawn)[:16]
    order = np.random.default_rng(int(sheet_id, 16)).permutation(len(drawn))
    items = (Item(_hash(sheet_id, *drawn[i])[:12], *drawn[i]) for i in order)
    return Sheet(sheet_id, of, seed, tuple(shown), tuple(items))


def key_of(sheet: Sheet) -> Key:
    """What the page does not tell: which latent each item is."""
    return Key(
        of=sheet.of,
        sheet=sheet.id,
        seed=sheet.seed,
        subjects=tuple(
            Subject(partition=s.partition, groups_total=s.groups_total, saes=dict(s.saes))
            for s in sheet.shown
        ),
        items={
            item.id: KeyItem(sae=item.sae, layer=item.layer, latent=item.latent)
            for item in sheet.items
        },
    )


def _draw(cache: LatentCache, name: str, layer: int, wanted: int, seed: int) -> list[int]:
    firing = np.flatnonzero(cache.index(name, layer).counts)
    random = np.random.default_rng([seed, layer, *name.encode()])
    drawn: list[int] = random.permutation(firing)[:wanted].tolist()
    return sorted(drawn)


def _hash(*values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
