"""The page on which latents are judged: one file that loads nothing and names no SAE."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from groupsae.interpretation import browser
from groupsae.interpretation.annotation.items import ShownItem
from groupsae.interpretation.contexts import Context
from groupsae.report.page import THEME

_TEMPLATES = Path(__file__).with_name("templates")
_BROWSER = Path(browser.__file__).with_name("templates")
_SCRIPTS = (_BROWSER / "tokens.js", _BROWSER / "dom.js", _TEMPLATES / "annotate.js")
_STYLES = (THEME, _BROWSER / "tokens.css", _TEMPLATES / "annotate.css")


def page(sheet_id: str, items: Iterable[ShownItem], texts: Sequence[str]) -> str:
    """The page's HTML.

    Its content security policy allows our own script and style alone, by their hashes, and no
    request. Strengths are in percent of an item's strongest firing: their unit would tell SAEs
    apart.

    Args:
        texts: How each token id is shown. Untrusted: the page's script draws it as text.
    """
    drawn = [_item(item) for item in items]
    used = {i for item in drawn for ids in _token_ids(item) for i in ids}
    data = {
        "sheet": sheet_id,
        "items": drawn,
        "texts": {i: texts[i] for i in sorted(used) if i < len(texts)},
    }
    script, style = _joined(_SCRIPTS), _joined(_STYLES)
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("annotate.html.j2").render(
        # ASCII without `<`: no text in it can end its element.
        data=json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        script=script,
        script_hash=_hash(script),
        style=style,
        style_hash=_hash(style),
    )


def _item(item: ShownItem) -> dict[str, Any]:
    strongest = max((context.activation for context in item.contexts), default=1.0)
    return {
        "id": item.id,
        "contexts": [_context(context, strongest) for context in item.contexts],
        "largest": item.largest,
        "smallest": item.smallest,
    }


def _context(context: Context, strongest: float) -> dict[str, Any]:
    return {
        "ids": context.token_ids,
        "peak": context.peak,
        "percent": [
            max(round(100 * strength / strongest), 1) if strength > 0 else 0
            for strength in context.strengths
        ],
    }


def _token_ids(item: dict[str, Any]) -> list[Sequence[int]]:
    return [item["largest"], item["smallest"], *(context["ids"] for context in item["contexts"])]


def _joined(paths: Iterable[Path]) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
