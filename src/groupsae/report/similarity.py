"""What the page says of the dictionaries' similarity, as plain values for the template."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from groupsae.report.artefacts import Artefact, Artefacts
from groupsae.report.metrics import MISSING, number
from groupsae.report.wording import layer_range, visible

# (key of a row, key of the yardstick's row, heading, is a share)
_COLUMNS = (
    ("mmcs_group_to_layer", "MMCS", "group → layer", False),
    ("mmcs_layer_to_group", "MMCS", "layer → group", False),
    ("above_0.9_group_to_layer", "Above 0.9", "group → layer", True),
    ("above_0.9_layer_to_group", "Above 0.9", "layer → group", True),
    ("concordance", "Concordance", "layer → group", False),
)
_YARDSTICKS = {"MMCS": "mmcs", "Above 0.9": "above_0.9", "Concordance": "concordance"}


def similarity_contents(run: Artefacts) -> dict[str, Any] | None:
    """What the similarity section names, besides its figures; None where it was not measured."""
    similarity = run.similarity
    if similarity is None:
        return None
    totals = sorted({row["groups_total"] for row in similarity["rows"]})
    shown = shown_total(run)
    return {
        "shown": shown,
        "table": _table(similarity, [] if shown is None else [shown]),
        "every": _table(similarity, totals) if len(totals) > 1 else None,
        "yardstick": bool(similarity.get("yardstick")),
        "definitions": [
            (visible(str(term), 40), visible(str(meaning), 1000))
            for term, meaning in (similarity.get("definitions") or {}).items()
        ],
    }


def shown_total(run: Artefacts) -> int | None:
    """The G whose similarity is shown: the chosen one, or the first that was measured."""
    totals = [row["groups_total"] for row in (run.similarity or {"rows": []})["rows"]]
    chosen = run.partition["chosen"] if run.partition is not None else None
    return chosen if chosen in totals else min(totals, default=None)


def rows_of(similarity: Artefact, groups_total: int | None) -> list[Artefact]:
    """The rows of one G, in order of layers."""
    rows = [row for row in similarity["rows"] if row["groups_total"] == groups_total]
    return sorted(rows, key=lambda row: int(row["layer"]))


def yardsticks(similarity: Artefact) -> dict[int, Artefact]:
    """Layer to how similar two baselines of different seed are there."""
    return {int(row["layer"]): row for row in similarity.get("yardstick") or []}


def _table(similarity: Artefact, totals: list[int]) -> dict[str, Any]:
    """A row for each G and layer, with the yardstick beside each measure, and means."""
    with_yardstick = yardsticks(similarity)
    headings: dict[str, list[str]] = {}
    for _, measure, direction, _share in _COLUMNS:
        headings.setdefault(measure, []).append(direction)
    if with_yardstick:
        for directions in headings.values():
            directions.append("two seeds")
    rows, values = [], []
    for total in totals:
        for row in rows_of(similarity, total):
            cells = _cells(row, with_yardstick.get(int(row["layer"]), {}), bool(with_yardstick))
            silent = number(row.get("silent"))
            values.append([value for value, _ in cells])
            rows.append(
                {
                    "groups_total": total,
                    "layer": row["layer"],
                    "group": layer_range(row["group"]),
                    "first": row["group"][0],
                    "cells": [_cell(value, share) for value, share in cells],
                    "silent": {
                        "text": f"{silent:,.0f}" if math.isfinite(silent) else MISSING,
                        "value": repr(silent) if math.isfinite(silent) else "",
                    },
                }
            )
    shares = [share for _, share in cells] if rows else []
    columns = list(zip(*values, strict=True))
    return {
        "headings": list(headings.items()),
        "rows": rows,
        "means": [
            _cell(_mean(column), share)["text"]
            for column, share in zip(columns, shares, strict=True)
        ],
    }


def _cells(
    row: Artefact, yardstick: Mapping[str, Any], with_yardstick: bool
) -> list[tuple[float, bool]]:
    """(value, whether it is a share) of each column, a measure's yardstick after it."""
    cells = []
    for at, (key, measure, _, share) in enumerate(_COLUMNS):
        cells.append((number(row.get(key)), share))
        last = at + 1 == len(_COLUMNS) or _COLUMNS[at + 1][1] != measure
        if with_yardstick and last:
            cells.append((number(yardstick.get(_YARDSTICKS[measure])), share))
    return cells


def _mean(values: tuple[float, ...]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _cell(value: float, share: bool) -> dict[str, str]:
    if not math.isfinite(value):
        return {"text": MISSING, "value": ""}
    return {"text": f"{value:.1%}" if share else f"{value:.3f}", "value": repr(value)}
