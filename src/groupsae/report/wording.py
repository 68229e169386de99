"""Short phrases that the page and the figures share."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from groupsae.grouping.layers import format_layers
from groupsae.report.metrics import number


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
