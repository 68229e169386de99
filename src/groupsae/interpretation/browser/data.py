"""Data files of the pages: scripts, because a page that is opened from disk may fetch nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from groupsae.interpretation.cards import PairStratum


def data_file(path: Path, kind: str, value: object, number: int | None = None) -> None:
    """Write a script that hands `value` to the page's `groupsaeData`.

    It is ASCII without `<`, so that no text in it can end the script or begin another.
    """
    content = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    last = "" if number is None else f",{number}"
    path.write_text(f'groupsaeData("{kind}",{content}{last});\n', encoding="ascii")


def short(value: float) -> float | int | None:
    """Three significant digits, which is what is shown; None for what is no finite number."""
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.3g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e6 else rounded


def pair_strata(strata: Sequence[PairStratum]) -> list[dict[str, Any]]:
    """The pairs of all layers as the page reads them."""
    return [
        {
            "layer": stratum.layer,
            "low": stratum.low,
            "high": stratum.high,
            "population": stratum.population,
            "pairs": [
                {
                    "layer": pair.layer,
                    "sae": pair.sae,
                    "latent": pair.latent,
                    "baseline": pair.baseline,
                    "baseline_latent": pair.baseline_latent,
                    "cosine": short(pair.cosine),
                    "jaccard": short(pair.jaccard),
                }
                for pair in stratum.pairs
            ],
        }
        for stratum in strata
    ]
