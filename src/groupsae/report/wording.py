"""Short phrases that the page and the figures share."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Container, Mapping, Sequence
from typing import Any

from groupsae.grouping.layers import format_layers
from groupsae.report.metrics import MISSING, number

# Controls, marks that turn the direction of text, lone surrogates, private use, unassigned.
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_SHORT_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def visible(text: str, most: int = 60, drawable: Container[int] | None = None) -> str:
    """Untrusted text on one line that disturbs nothing, of at most `most` characters.

    What is invisible, turns the direction of text or breaks lines stands as its escape, and so does
    what is not in `drawable`, the characters that a font has.
    """
    shown: list[str] = []
    length = 0
    for character in text:
        if unicodedata.category(character) in _INVISIBLE or (
            drawable is not None and ord(character) not in drawable
        ):
            code = ord(character)
            escape = f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
            character = _SHORT_ESCAPES.get(character, escape)
        length += len(character)
        if length > most:
            return "".join(shown)[: most - 1] + "…"
        shown.append(character)
    return "".join(shown)


def cell(value: float, form: str) -> dict[str, str]:
    """A number of a table: its text by a format such as "{:.1%}", and the value to sort by."""
    if not math.isfinite(value):
        return {"text": MISSING, "value": ""}
    return {"text": form.format(value), "value": repr(value)}


def chosen_groups(partition: Mapping[str, Any] | None) -> list[list[int]]:
    """The groups of the chosen partition; none where there is no partition."""
    if partition is None:
        return []
    return list(partition["by_groups"][str(partition["chosen"])]["groups"])


def choice(partition: Mapping[str, Any]) -> str:
    """How G came about: "the smallest G with AMAD below 0.2"."""
    if partition.get("method") == "explicit":
        return "the groups were given"
    threshold = number(partition.get("threshold"))
    if math.isfinite(threshold):
        return f"the smallest G with AMAD below {threshold:g}"
    return "G was given"


def signed(value: float) -> str:
    """A finite number with its sign and three digits: "+0.0123", "−4.10e−05"."""
    return f"{value:+#.3g}".rstrip(".").replace("-", "−")


def layer_range(layers: Sequence[int]) -> str:
    """[3, 4, 5, 8] as "3–5, 8"."""
    return format_layers(layers).replace("-", "–")


def sae_label(name: str) -> str:
    """An SAE's name for a legend: "layers-03-06" as "layers 3–6", another name cut short."""
    match = re.fullmatch(r"layers-(\d+)(?:-(\d+))?", name)
    if match is None:
        return name if len(name) <= 24 else name[:23] + "…"
    first, last = int(match[1]), int(match[2] or match[1])
    return f"layer {first}" if first == last else f"layers {first}–{last}"


def si_scale(largest: float) -> tuple[float, str]:
    """The power of 1000 that brings `largest` to between 1 and 1000, and its SI prefix."""
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= scale:
            return scale, prefix
    return 1.0, ""


def si(value: float, unit: str) -> str:
    """21.2e6 and "FLOP" as "21.2 MFLOP"."""
    scale, prefix = si_scale(abs(value))
    return f"{value / scale:#.3g}".rstrip(".") + f" {prefix}{unit}"


def duration(seconds: float) -> str:
    """Seconds as "48.0 s", "5 min 13 s" or "2 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
