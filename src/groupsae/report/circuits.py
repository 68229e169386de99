"""What the page says of circuits, as plain values for the template."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from groupsae.report.artefacts import Artefact, Artefacts
from groupsae.report.curves import (
    CONTROLS,
    METHODS,
    SCORES,
    SELECTIONS,
    Panel,
    Subject,
    entries,
    mean_area,
    panels_with_curves,
    subject_of,
)
from groupsae.report.latent_links import latent_link
from groupsae.report.metrics import MISSING, number
from groupsae.report.wording import layer_range, signed, visible

Cell = dict[str, str]

FLAGGED = "flag"

_ABBREVIATIONS = {"attribution": "AtP", "integrated_gradients": "IG", "exact": "exact"}


def circuit_contents(run: Artefacts) -> dict[str, Any]:
    """Everything that the circuits' section of the template names, besides its figures."""
    drawn = drawn_tasks(run)
    tables = [
        table
        for selection in SELECTIONS
        for error_nodes in (False, True)
        if (table := _areas(drawn, selection, error_nodes))["rows"]
    ]
    return {
        "answer": _answer(run, drawn),
        "tasks": [
            {
                "name": task_name(task),
                "slug": slug,
                "cells": _task_cells(task),
                "refused": visible(task.get("refused") or "", 600),
                "numbers": _numbers(task),
            }
            for slug, task in slugs(run).items()
        ],
        "tables": tables,
        "flags": _flags(drawn),
        "latents": _latents(run, drawn),
        "definitions": _definitions(run.circuits),
    }


def task_name(task: Artefact) -> str:
    """The task's name, harmless and short."""
    return visible(task["task"], 40) or "a task without a name"


def drawn_tasks(run: Artefacts) -> list[Artefact]:
    """The tasks that were not refused."""
    return [task for task in run.circuits if not task.get("refused")]


def slugs(run: Artefacts) -> dict[str, Artefact]:
    """The tasks, each by a name that suits files and anchors."""
    found: dict[str, Artefact] = {}
    for task in run.circuits:
        plain = re.sub(r"[^a-z0-9]+", "_", str(task["file"]).lower())[:40].strip("_") or "task"
        slug, again = plain, 1
        while slug in found:
            again += 1
            slug = f"{plain}_{again}"
        found[slug] = task
    return found


def _answer(run: Artefacts, drawn: Sequence[Artefact]) -> str:
    """The main figures in one sentence: areas of the chosen G and of the baseline.

    Without error nodes, as published; with them where the ratios mean nothing otherwise.
    """
    for error_nodes in (False, True):
        table = _areas(drawn, "per_layer", error_nodes, only=("attribution",))
        said = _said_of_means(run, table["means"])
        if said:
            over = f"averaged over {_tasks(table['counted'])}"
            return (
                f"Mean score over the curve, {over}, attribution patching, latents chosen per "
                f"layer, {'with' if error_nodes else 'without'} error nodes: {'; '.join(said)}. "
                "Faithfulness is best at 1, completeness at 0."
            )
    return ""


def _said_of_means(run: Artefacts, means: Mapping[Subject, Mapping[str, float]]) -> list[str]:
    chosen = run.partition["chosen"] if run.partition is not None else None
    said = []
    for subject, areas in means.items():
        faithfulness = areas["faithfulness attribution"]
        completeness = areas["completeness attribution"]
        shown = subject.is_baseline or subject.groups_total == chosen
        if shown and math.isfinite(faithfulness) and math.isfinite(completeness):
            name = subject.label if subject.is_baseline else f"one SAE per group ({subject.label})"
            random = areas["faithfulness random"]
            control = f" (random latents {_plain(random)})" if math.isfinite(random) else ""
            said.append(
                f"{name}: faithfulness {_plain(faithfulness)}{control}, completeness "
                f"{_plain(completeness)}"
            )
    return said


def _tasks(count: int) -> str:
    return f"{count} task{'s' * (count != 1)}"


def _task_cells(task: Artefact) -> list[str]:
    """Source, examples, lengths, m(M), accuracy, what was left out."""
    examples = task.get("examples") or {}
    model = task.get("model") or {}
    lengths = [visible(str(length), 8) for length in task.get("lengths") or {}]
    dropped = [
        f"{visible(str(why), 80)}: {_count(count)}"
        for why, count in (task.get("dropped") or {}).items()
    ]
    return [
        visible(str(task.get("source") or MISSING), 60),
        f"{_count(examples.get('effects'))} / {_count(examples.get('scores'))}",
        ", ".join(lengths) or MISSING,
        _plain(number(model.get("m"))),
        _percent(number(model.get("accuracy"))),
        "; ".join(dropped) or "none",
    ]


def _numbers(task: Artefact) -> str:
    """The numbers behind a refusal."""
    model, examples = task.get("model") or {}, task.get("examples") or {}
    return (
        f"m(M) {_plain(number(model.get('m')))}, accuracy "
        f"{_percent(number(model.get('accuracy')))}, {_count(task.get('kept'))} usable examples "
        f"({_count(examples.get('scores'))} scored)"
    )


def _areas(
    tasks: Sequence[Artefact],
    selection: str,
    error_nodes: bool,
    only: Sequence[str] = tuple(METHODS),
) -> dict[str, Any]:
    """Task by partition: areas of every method and control, N at 75%, m(M) and m(empty).

    A mean is over the tasks that have all areas of ranked latents, the same for every partition.
    """
    methods = [
        method
        for method in only
        if any(
            panel.method == method
            and (panel.selection, panel.error_nodes) == (selection, error_nodes)
            for panel in panels_with_curves(tasks)
        )
    ]
    columns = [*methods, *CONTROLS]
    by_task = [_by_subject(task, methods, selection, error_nodes) for task in tasks]
    rows = [
        {
            "task": task_name(task),
            "order": str(index),
            "subject": subject.label,
            "subject_order": repr(subject.order),
            **{
                score: [_area_cell(curves.get(f"{score} {column}")) for column in columns]
                for score in SCORES
            },
            "n_at_75": [_n_cell(curves.get(f"faithfulness {method}")) for method in methods],
            "m": [_m_cell(curves, key) for key in ("m_model", "m_empty")],
        }
        for index, (task, subjects) in enumerate(zip(tasks, by_task, strict=True))
        for subject, curves in sorted(subjects.items(), key=lambda item: item[0].order)
    ]
    means, counted = _mean_areas(by_task, methods, columns)
    return {
        "methods": [_ABBREVIATIONS[method] for method in methods],
        "controls": list(CONTROLS),
        "title": f"Latents chosen {SELECTIONS[selection]}, "
        f"{'with' if error_nodes else 'without'} error nodes",
        "rows": rows,
        "means": means,
        "counted": counted,
        "mean_rows": [
            {"subject": subject.label, "cells": [_plain(area) for area in areas.values()]}
            for subject, areas in means.items()
        ]
        if len(tasks) > 1
        else [],
        "of": len(tasks),
    }


def _by_subject(
    task: Artefact, methods: Sequence[str], selection: str, error_nodes: bool
) -> dict[Subject, dict[str, Artefact]]:
    """Of each partition the curves by "score method" for ranked latents, "score control" else.

    A control is that of the first method that has it.
    """
    found: dict[Subject, dict[str, Artefact]] = {}
    for method in methods:
        for score in SCORES:
            for curve in entries(task, Panel(score, method, selection, error_nodes)):
                ranked = curve["latents"] == "ranked"
                key = f"{score} {method if ranked else curve['latents']}"
                found.setdefault(subject_of(curve), {}).setdefault(key, curve)
    return found


def _mean_areas(
    by_task: Sequence[Mapping[Subject, Mapping[str, Artefact]]],
    methods: Sequence[str],
    columns: Sequence[str],
) -> tuple[dict[Subject, dict[str, float]], int]:
    """Means over tasks, the same tasks for every partition, and over how many tasks they are."""
    subjects = sorted({subject for own in by_task for subject in own}, key=lambda s: s.order)
    whole = [
        own
        for own in by_task
        if all(
            math.isfinite(_area(own.get(subject, {}).get(f"{score} {method}")))
            for subject in subjects
            for score in SCORES
            for method in methods
        )
    ]
    means = {
        subject: {
            f"{score} {column}": mean_area(
                _area(own[subject].get(f"{score} {column}")) for own in whole
            )
            for score in SCORES
            for column in columns
        }
        for subject in subjects
        if whole
    }
    return means, len(whole)


def _area(curve: Artefact | None) -> float:
    """The area under a curve that means something; NaN otherwise."""
    if curve is None or curve.get("flag") is not None:
        return math.nan
    return number(curve.get("area"))


def _area_cell(curve: Artefact | None) -> Cell:
    if curve is not None and curve.get("flag") is not None:
        return {"text": FLAGGED, "value": "", "why": visible(str(curve["flag"]), 400)}
    return _number_cell(_area(curve))


def _n_cell(curve: Artefact | None) -> Cell:
    if curve is None or curve.get("flag") is not None:
        return _area_cell(curve)
    n = number(curve.get("n_at_75"))
    if not math.isfinite(n):
        return {"text": "not reached", "value": "", "why": ""}
    return {"text": f"{n:,.0f}", "value": repr(n), "why": ""}


def _m_cell(curves: Mapping[str, Artefact], key: str) -> Cell:
    ranked = [number(curve.get(key)) for curve in curves.values() if curve["latents"] == "ranked"]
    return _number_cell(ranked[0] if ranked else math.nan)


def _flags(tasks: Sequence[Artefact]) -> list[dict[str, str]]:
    """The curves that are not drawn: of which task and partition, how many, and why."""
    counts: dict[tuple[str, float, str, str, str], int] = {}
    for task in tasks:
        for curve in task["curves"]:
            if curve.get("flag") is not None:
                subject = subject_of(curve)
                key = (
                    task_name(task),
                    subject.order,
                    subject.label,
                    CONTROLS.get(curve["latents"], "ranked latents"),
                    visible(curve["flag"], 400),
                )
                counts[key] = counts.get(key, 0) + 1
    return [
        {
            "what": f"{task}, {label}, {latents}",
            "count": f"{count} curve{'s' * (count > 1)}",
            "why": why,
        }
        for (task, _, label, latents, why), count in sorted(counts.items())
    ]


def _latents(run: Artefacts, tasks: Sequence[Artefact]) -> list[dict[str, Any]]:
    """Every task's strongest latents, the strongest of each circuit first."""
    rows = []
    for index, task in enumerate(tasks):
        strongest = sorted(
            task["strongest"],
            key=lambda entry: (
                subject_of(entry).order,
                _method_order(entry["method"]),
                -abs(_or_zero(number(entry.get("effect")))),
            ),
        )
        for entry in strongest:
            subject, effect = subject_of(entry), number(entry.get("effect"))
            group = entry.get("group")
            rows.append(
                {
                    "task": task_name(task),
                    "order": str(index),
                    "method": METHODS.get(entry["method"], visible(entry["method"], 24)),
                    "method_order": str(_method_order(entry["method"])),
                    "subject": subject.label,
                    "subject_order": repr(subject.order),
                    "partition": "baseline" if subject.is_baseline else "groups",
                    "groups_total": subject.groups_total,
                    "layer": entry["layer"],
                    "group": layer_range(group)
                    if isinstance(group, list) and all(isinstance(layer, int) for layer in group)
                    else MISSING,
                    "latent": entry["latent"],
                    "link": latent_link(run, *subject, entry["layer"], entry["latent"]),
                    "effect": {
                        "text": signed(effect) if math.isfinite(effect) else MISSING,
                        "value": repr(effect) if math.isfinite(effect) else "",
                    },
                }
            )
    return rows


def _definitions(artefacts: Iterable[Artefact]) -> list[tuple[str, str]]:
    """The evaluation's own definitions, each once."""
    found: dict[str, str] = {}
    for artefact in artefacts:
        for term, meaning in (artefact.get("definitions") or {}).items():
            found.setdefault(visible(str(term), 40), visible(str(meaning), 1000))
    return list(found.items())


def _method_order(method: str) -> int:
    return list(METHODS).index(method) if method in METHODS else len(METHODS)


def _number_cell(value: float) -> Cell:
    return {
        "text": _plain(value),
        "value": repr(value) if math.isfinite(value) else "",
        "why": "",
    }


def _plain(value: float) -> str:
    """Three decimals, with a true minus sign."""
    return f"{value:.3f}".replace("-", "−") if math.isfinite(value) else MISSING


def _percent(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else MISSING


def _count(value: object) -> str:
    count = number(value)
    return f"{count:,.0f}" if math.isfinite(count) else MISSING


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0
