"""Which SAEs' depth profiles are shown, and what the page says of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from groupsae.report.artefacts import Artefact, Artefacts
from groupsae.report.metrics import number
from groupsae.report.wording import cell, layer_range

LIVES = {"one": "one", "some": "some", "all": "all"}  # key of a summary, heading


def depth_contents(run: Artefacts) -> dict[str, Any] | None:
    """The tables of where latents live; None where no group of several layers was profiled."""
    totals = profiled_totals(run)
    if run.depth is None or not totals:
        return None
    shown = shown_total(run)
    return {
        "shown": shown,
        "answer": _answer(run.depth, deep_groups(run, shown)),
        "table": _table(run, [shown]),
        "every": _table(run, totals) if len(totals) > 1 else None,
        "others": [f"depth_heat_maps_of_{total}" for total in totals if total != shown],
    }


def profiled_totals(run: Artefacts) -> list[int]:
    """Every G with a profiled group of several layers, ascending."""
    subjects = run.depth["subjects"] if run.depth is not None else []
    totals = {own["groups_total"] for own in subjects if own["partition"] == "groups"}
    return sorted(total for total in totals if deep_groups(run, total))


def shown_total(run: Artefacts) -> int:
    """The G that is shown first: the chosen one, or the fewest groups that were profiled."""
    totals = profiled_totals(run)
    chosen = run.partition["chosen"] if run.partition is not None else None
    return chosen if chosen in totals else totals[0]


def deep_groups(run: Artefacts, groups_total: int) -> list[str]:
    """The names of a partition's SAEs of several layers, from below."""
    if run.depth is None:
        return []
    names: dict[str, None] = {}
    for subject in run.depth["subjects"]:
        if (subject["partition"], subject["groups_total"]) == ("groups", groups_total):
            for _, name in sorted(subject["saes"].items(), key=lambda item: int(item[0])):
                names[name] = None
    return [name for name in names if any(len(own["layers"]) > 1 for own in _of(run.depth, name))]


def shares(depth: Artefact) -> list[float]:
    """The shares of a latent's largest rate from which on it counts as living at a layer."""
    found = {number(own.get("share")) for name in depth["saes"] for own in _of(depth, name)}
    return sorted(share for share in found if math.isfinite(share))


def _of(depth: Artefact, name: str) -> Sequence[Mapping[str, Any]]:
    summaries: Sequence[Mapping[str, Any]] = depth["saes"].get(name, [])
    return summaries


def _answer(depth: Artefact, names: Sequence[str]) -> str:
    """The mean fractions over the groups, for the smallest share."""
    smallest = shares(depth)[:1]
    found = [
        own for name in names for own in _of(depth, name) if [number(own.get("share"))] == smallest
    ]
    one, every = (
        [value for own in found if math.isfinite(value := number(own.get(key)))]
        for key in ("one", "all")
    )
    if not one or len(one) != len(every):
        return ""
    over = f"mean over the {len(one)} groups of several layers; " if len(one) > 1 else ""
    return (
        f"Of the latents that fire, {_mean(every):.0%} live at all layers of their group and "
        f"{_mean(one):.0%} at one alone ({over}a latent lives "
        f"where it fires at least {smallest[0]:g} times as often as at its busiest layer)."
    )


def _table(run: Artefacts, totals: Sequence[int]) -> dict[str, Any]:
    depth = run.depth or {}
    columns = shares(depth)
    rows = []
    for total in totals:
        for name in deep_groups(run, total):
            by_share = {number(own.get("share")): own for own in _of(depth, name)}
            first = _of(depth, name)[0]
            persistence = number(first.get("mean_persistence"))
            rows.append(
                {
                    "groups_total": total,
                    "group": layer_range(first["layers"]),
                    "first": first["layers"][0],
                    "latents": cell(number(first.get("latents")), "{:,.0f}"),
                    "silent": cell(number(first.get("silent")), "{:.1%}"),
                    "lives": [
                        cell(number(by_share.get(share, {}).get(key)), "{:.1%}")
                        for share in columns
                        for key in LIVES
                    ],
                    "persistence": cell(persistence, f"{{:.2f}} of {len(first['layers'])}"),
                }
            )
    return {
        "shares": [f"{share:g}" for share in columns],
        "headings": list(LIVES.values()),
        "rows": rows,
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
