"""The folder of pages: index.html, its code, and data files that it loads as they are needed."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from groupsae.errors import InputError
from groupsae.files import replacing
from groupsae.interpretation.browser.data import data_file, pair_strata, short
from groupsae.interpretation.browser.index import IndexColumns
from groupsae.interpretation.browser.shards import CardFiles, TextFiles
from groupsae.interpretation.cards import Card, PairStratum, Shown
from groupsae.report.page import THEME

_TEMPLATES = Path(__file__).with_name("templates")
_NUMBERS = ("human", "detection", "fuzzing", "auroc")
_TEXTS = ("explanation", "attribute")


@dataclass(frozen=True)
class About:
    """What is browsed.

    Attributes:
        of: A key of the latents: marks that a reader sets in the browser are kept under it.
        host: The host model's name.
        tokens: On how many tokens the latents were watched.
        special: How many special tokens were left out beside them.
        source: Where the text is from.
        shown: Whose SAEs are set side by side.
        sae_layers: The member layers of each SAE, in the order of the SAEs.
        definitions: What the figures mean, by term.
        pairs: A group's latents beside their most similar ones of the baseline.
        report_href: A link back to the report, relative to index.html.
    """

    of: str
    host: str
    tokens: int
    special: int
    source: str
    shown: Sequence[Shown]
    sae_layers: Mapping[str, Sequence[int]]
    definitions: Mapping[str, str]
    pairs: Sequence[PairStratum] = ()
    report_href: str | None = None


def write_browser(folder: Path, cards: Iterable[Card], about: About, texts: Sequence[str]) -> Path:
    """Write the pages about `cards`; an older browser in `folder` is replaced once all is written.

    They work from a disk as from any static server, and load nothing from elsewhere. The index of
    all latents is loaded at once, cards and text when they are looked at.

    Args:
        cards: Of SAEs that `about` names, the SAEs one after another. They are written as they
            come; only the index and the text that they show stay in memory.
        texts: How each token id is shown (:func:`~groupsae.interpretation.token_text.token_texts`).
            Untrusted.

    Returns:
        `folder / "index.html"`.

    Raises:
        InputError: If a card names an SAE that `about` lacks or gives other layers, or the folder
            cannot be written.
    """
    with replacing(folder) as aside:
        data = aside / "data"
        data.mkdir(parents=True)
        numbers = {name: i for i, name in enumerate(about.sae_layers)}
        columns, text, files = IndexColumns(), TextFiles(data), CardFiles(data)
        for card in cards:
            _check_layers(card, about.sae_layers)
            columns.add(card, numbers)
            text.add(card)
            files.add(card, numbers)
        files.close()
        text.close()
        index = {
            "about": _about(about),
            "pairs": pair_strata(about.pairs),
            "columns": columns.columns,
            "cards_per_file": files.per_file,
            "tokens_per_file": text.per_file,
        }
        data_file(data / "index.js", "index", index)
        shown = {i: texts[i] for i in sorted(columns.token_ids | text.token_ids) if i < len(texts)}
        data_file(data / "tokens.js", "tokens", shown)
        data_file(data / "scores.js", "scores", [])
        _write_code(aside)
    return folder / "index.html"


def write_scores(folder: Path, scores: Sequence[Mapping[str, Any]]) -> None:
    """Write what is known of how well latents can be interpreted beside the cards.

    Args:
        folder: As :func:`write_browser` made it. Only `data/scores.js` is replaced, as a whole.
        scores: Rows with "sae", "latent" and "layer" (None: all layers together), and any of
            "human", "detection", "fuzzing" and "auroc" (0 to 1, or None), "explanation" and
            "attribute" (texts), "notes" (a list of texts). Rows of latents without a card are kept
            and not shown.

    Raises:
        InputError: If there is no browser in the folder, or it cannot be written.
    """
    if not (folder / "data" / "index.js").exists():
        raise InputError(f"{folder} holds no latent browser; write one with `groupsae interpret`")
    with replacing(folder / "data" / "scores.js") as aside:
        data_file(aside, "scores", [_score(row) for row in scores])


def _check_layers(card: Card, sae_layers: Mapping[str, Sequence[int]]) -> None:
    """Raise InputError if the page would not know an SAE that a card names, or its layers."""
    near = (*card.neighbours, *chain.from_iterable(card.neighbours_by_layer.values()))
    unknown = {neighbour.sae for neighbour in near} - set(sae_layers)
    if tuple(sae_layers.get(card.sae, ())) != card.layers:
        unknown.add(card.sae)
    if unknown:
        raise InputError(
            f"sae_layers: {dict(sae_layers)} lacks {', '.join(sorted(unknown))}, or gives it other "
            f"layers than the card of {card.sae}/{card.latent}; name every SAE with its layers"
        )


def _score(row: Mapping[str, Any]) -> dict[str, Any]:
    layer = row.get("layer")
    kept: dict[str, Any] = {
        "sae": str(row["sae"]),
        "layer": None if layer is None else int(layer),
        "latent": int(row["latent"]),
    }
    kept |= {name: short(row[name]) for name in _NUMBERS if row.get(name) is not None}
    kept |= {name: str(row[name]) for name in _TEXTS if row.get(name)}
    if row.get("notes"):
        kept["notes"] = [str(note) for note in row["notes"]]
    return kept


def _about(about: About) -> dict[str, Any]:
    return {
        "of": about.of,
        "host": about.host,
        "tokens": about.tokens,
        "special": about.special,
        "source": about.source,
        "shown": [
            {"name": shown.name, "saes": {str(layer): sae for layer, sae in shown.saes.items()}}
            for shown in about.shown
        ],
        "saes": [
            {"name": name, "layers": list(layers)} for name, layers in about.sae_layers.items()
        ],
        "definitions": [list(item) for item in about.definitions.items()],
        "report_href": about.report_href,
    }


def _write_code(folder: Path) -> None:
    """The page, its scripts, and one style sheet of the theme, tokens and the browser's own."""
    code = folder / "code"
    code.mkdir()
    shutil.copyfile(_TEMPLATES / "index.html", folder / "index.html")
    for script in _TEMPLATES.glob("*.js"):
        shutil.copyfile(script, code / script.name)
    sheets = (THEME, _TEMPLATES / "tokens.css", _TEMPLATES / "browser.css")
    style = "\n".join(path.read_text(encoding="utf-8") for path in sheets)
    (code / "browser.css").write_text(style, encoding="utf-8")
