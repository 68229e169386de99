"""What the page says of the latents, as plain values for the template."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from groupsae.report.artefacts import Artefact, Artefacts
from groupsae.report.curves import subject_of
from groupsae.report.depths import depth_contents
from groupsae.report.ground_truth import ground_truth_contents
from groupsae.report.metrics import MISSING, number
from groupsae.report.wording import cell, layer_range, visible


class Measure(NamedTuple):
    """A score of interpretability, and where a row has it and its interval."""

    label: str
    key: str
    low: str
    high: str


HUMAN = (Measure("Human score", "score", "low", "high"),)
MODEL = (
    Measure("Detection", "detection", "detection_low", "detection_high"),
    Measure("Fuzzing", "fuzzing", "fuzzing_low", "fuzzing_high"),
)
_MARKS = {"interpretable": "Interpretable", "not": "Not", "unsure": "Unsure"}
_COUNTS = {
    "requests": "requests",
    "from_before": "of them from an earlier run",
    "retries": "retries",
    "failed": "failed",
    "unparsed": "answers that do not parse",
    "prompt_tokens": "prompt tokens",
    "completion_tokens": "completion tokens",
    "estimated_tokens": "tokens estimated, where the endpoint gave no usage",
}


def interpretation_contents(run: Artefacts) -> dict[str, Any]:
    """Everything that the interpretation's section of the template names, besides its figures."""
    return {
        "there": run.depth is not None,
        "browser": run.browser,
        "depth": depth_contents(run),
        "truth": ground_truth_contents(run),
        "people": _people(run.annotation),
        "model": _model(run.explanation),
        "definitions": [
            (heading, _definitions(artefact))
            for heading, artefact in (
                ("Definitions, as `groupsae interpret` gives them: depth", run.depth),
                ("Definitions, as `groupsae interpret` gives them: ground truth", run.ground_truth),
                ("Definitions, as `groupsae annotate` gives them", run.annotation),
                ("Definitions, as `groupsae explain` gives them", run.explanation),
            )
        ],
    }


def _people(scores: Artefact | None) -> dict[str, Any] | None:
    if scores is None:
        return None
    return {
        "said": [_annotators(scores), _agreement(scores)],
        "table": _table(scores, HUMAN, _MARKS),
    }


def _model(scores: Artefact | None) -> dict[str, Any] | None:
    if scores is None:
        return None
    counts = scores.get("counts") or {}
    named = [
        f"{count:,.0f} {name}"
        for key, name in _COUNTS.items()
        if math.isfinite(count := number(counts.get(key)))
    ]
    said = [
        f"Explained and judged by {visible(str(scores.get('model') or 'a model'), 60)} at "
        f"{visible(str(scores.get('endpoint') or 'an endpoint'), 60)}.",
        f"Counted: {', '.join(named)}." if named else "",
        ""
        if scores.get("complete") is True
        else "Not complete: `groupsae explain RUN` goes on from here.",
    ]
    return {"said": said, "table": _table(scores, MODEL, {})}


def _annotators(scores: Artefact) -> str:
    named = scores.get("annotators")
    people = [own for own in named if isinstance(own, dict)] if isinstance(named, list) else []
    said = []
    for own in people:
        marked = number(own.get("marked"))
        name = visible(str(own.get("name")), 40)
        said.append(f"{name} ({marked:,.0f} marks)" if math.isfinite(marked) else name)
    return f"Marked by {', '.join(said)}." if said else ""


def _agreement(scores: Artefact) -> str:
    agreement = scores.get("agreement") or {}
    value, items = number(agreement.get("value")), number(agreement.get("items"))
    if not math.isfinite(value):
        return ""
    name = visible(str(agreement.get("name") or "agreement"), 40)
    over = f", on the {items:,.0f} items that all marked" if math.isfinite(items) else ""
    return f"Agreement: {name} {value:.2f}{over}.".replace("-", "−")


def _table(
    scores: Artefact, measures: Sequence[Measure], counts: Mapping[str, str]
) -> dict[str, Any]:
    """Rows over all layers, and those of each layer; by partition."""
    ordered = sorted(
        scores["rows"],
        key=lambda row: (subject_of(row).order, -1 if row.get("layer") is None else row["layer"]),
    )
    rows = [
        {
            "subject": subject_of(row).label,
            "subject_order": repr(subject_of(row).order),
            "layer": row.get("layer"),
            "group": _group(row),
            "counts": [cell(number(row.get(key)), "{:,.0f}") for key in ("latents", *counts)],
            "scores": [_score(row, measure) for measure in measures],
        }
        for row in ordered
    ]
    return {
        "counts": ["Latents", *counts.values()],
        "measures": [measure.label for measure in measures],
        "all": [row for row in rows if row["layer"] is None],
        "layers": [row for row in rows if row["layer"] is not None],
    }


def _score(row: Artefact, measure: Measure) -> dict[str, str]:
    value, low, high = (number(row.get(key)) for key in (measure.key, measure.low, measure.high))
    interval = f"{low:.3f} to {high:.3f}" if math.isfinite(value + low + high) else ""
    return {**cell(value, "{:.3f}"), "interval": interval}


def _group(row: Artefact) -> str:
    group = row.get("group")
    if isinstance(group, list) and group and all(isinstance(layer, int) for layer in group):
        return layer_range(group)
    return MISSING


def _definitions(artefact: Artefact | None) -> list[tuple[str, str]]:
    return [
        (visible(str(term), 40), visible(str(meaning), 1000))
        for term, meaning in ((artefact or {}).get("definitions") or {}).items()
    ]
