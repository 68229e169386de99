"""Which figures of circuits the report shows, with their captions and alternative texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from groupsae.report import circuit_figures as figures
from groupsae.report.artefacts import Artefact, Artefacts
from groupsae.report.circuit_figures import Drawn
from groupsae.report.circuit_picture import circuit_picture, shown_positions
from groupsae.report.circuits import drawn_tasks, slugs, task_name
from groupsae.report.curves import (
    CONTROLS,
    METHODS,
    SELECTIONS,
    Panel,
    Subject,
    entries,
    lines,
    mean_lines,
    panels_with_curves,
    subject_of,
)
from groupsae.report.illustration import Illustration
from groupsae.report.metrics import number
from groupsae.report.wording import signed, visible

_DEFINITIONS = (
    (
        "N",
        "Mean number of latents of each layer's SAE that make up the circuit. Per layer: the N "
        "most important of every layer. Over all layers: as many in all, so that layers compete.",
    ),
    (
        "Faithfulness",
        "(m(C) − m(∅)) / (m(M) − m(∅)), with m = logit(right answer) − logit(patched answer): "
        "C keeps only the N most important latents of every layer alive, ∅ none, M is the "
        "untouched model. 1 where they suffice, 0 where they do no more than their means: high is "
        "good.",
    ),
    (
        "Completeness",
        "The same ratio with all latents alive but the N most important: what is left without "
        "them. 0 where they are all that matters, 1 where they do not matter: low is good.",
    ),
    (
        "Alive",
        "All layers are spliced at once. A latent that is not alive has its mean over the task's "
        "other half of examples, at the same position.",
    ),
    (
        "Error nodes",
        "What the SAEs leave of the residual stream, x − x̂. Without: it is dropped. With: it is "
        "added back in every circuit, ∅ too, so that all latents together score 1.",
    ),
    (
        "Controls",
        "Random latents: as many, chosen at random. Untrained SAEs: the most important latents of "
        "SAEs of the same shape with random weights.",
    ),
)
_AGAIN = (*_DEFINITIONS[1:3], ("Other terms", "As in the first figure of circuits."))
_EFFECT = (
    "Effect",
    "What logit(patched answer) − logit(right answer) changes by when the latent at this position "
    "takes its value in the patched prompt: estimated by {method}, the mean over the examples of "
    "this length.",
)


def circuit_illustrations(run: Artefacts) -> list[Illustration]:
    """The figures of every task that was not refused, and the means over them, as on the page."""
    chosen = run.partition["chosen"] if run.partition is not None else None
    tasks = drawn_tasks(run)
    found: list[Illustration] = []
    if len(tasks) > 1:
        mean = f"the mean over {len(tasks)} tasks"
        found += _curves(_averaged(tasks), "mean", mean, chosen, _DEFINITIONS)
    for slug, task in slugs(run).items():
        if not task.get("refused"):
            name = task_name(task)
            panels = {panel: _of_task(task, panel) for panel in panels_with_curves([task])}
            definitions = _AGAIN if found else _DEFINITIONS
            curves = _curves(panels, f"task_{slug}", name, chosen, definitions)
            found += [*curves[:1], *_pictures(run, task, slug, chosen), *curves[1:]]
    return found


def _averaged(tasks: Sequence[Artefact]) -> dict[Panel, Drawn]:
    panels = {}
    for panel in panels_with_curves(tasks):
        counted, drawn = mean_lines(tasks, panel)
        whole = len(counted) == len(tasks)
        panels[panel] = Drawn(drawn, "" if whole else f"{len(counted)} of {len(tasks)} tasks")
    return panels


def _of_task(task: Artefact, panel: Panel) -> Drawn:
    drawn = lines(task, panel)
    flagged = {
        subject_of(curve)
        for curve in entries(task, panel)
        if curve.get("flag") is not None and curve["latents"] == "ranked"
    }
    names = [subject.label for subject in sorted(flagged, key=lambda subject: subject.order)]
    if len(names) > 3:
        names = [*names[:2], f"{len(names) - 2} more"]
    return Drawn(drawn, "flagged: " + ",\n".join(names) if names else "")


def _curves(
    panels: Mapping[Panel, Drawn],
    prefix: str,
    of: str,
    chosen: int | None,
    definitions: tuple[tuple[str, str], ...],
) -> list[Illustration]:
    """The figure of the first method and selection, and one of all the others."""
    if not panels:
        return []
    first = next(iter(panels))
    main = {
        panel: drawn
        for panel, drawn in panels.items()
        if (panel.method, panel.selection) == (first.method, first.selection)
    }
    others = {panel: drawn for panel, drawn in panels.items() if panel not in main}
    way = f"{METHODS[first.method]}, latents chosen {SELECTIONS[first.selection]}"
    found = [
        Illustration(
            name=f"{prefix}_curves",
            title=f"Faithfulness and completeness, {of}",
            draw=lambda: figures.circuit_curves(main, chosen),
            alt=f"Faithfulness and completeness against the latents per layer, {of}, for "
            f"{_subjects(main)}, {way}.",
            caption=f"{way[0].upper()}{way[1:]}.{_colours(main)}{_notes(main, prefix)}",
            definitions=definitions,
        )
    ]
    if others:
        ways = "; ".join(
            f"{METHODS[method]}, {SELECTIONS[selection]}"
            for method, selection in dict.fromkeys((p.method, p.selection) for p in others)
        )
        found.append(
            Illustration(
                name=f"{prefix}_other_curves",
                title=f"Other ways to choose the latents, {of}",
                draw=lambda: figures.other_curves(others, chosen),
                alt=f"Small panels of faithfulness and completeness against the latents per "
                f"layer, {of}: {ways}.",
                caption="The same scores for other estimates of the effects, and for latents "
                f"chosen over all layers.{_colours(others)}{_notes(others, prefix)}",
                definitions=(("Terms", "As in the figure before."),),
            )
        )
    return found


def _pictures(run: Artefacts, task: Artefact, slug: str, chosen: int | None) -> list[Illustration]:
    """The chosen groups' circuit (or, without it, the first G's), and the baseline's."""
    by_subject: dict[Subject, Mapping[str, Any]] = {}
    order = list(METHODS)
    known = [picture for picture in task["picture"] if picture["method"] in METHODS]
    for picture in sorted(known, key=lambda picture: order.index(picture["method"])):
        if any(math.isfinite(number(cell.get("effect"))) for cell in picture["cells"]):
            by_subject.setdefault(subject_of(picture), picture)
    groups = [subject for subject in by_subject if not subject.is_baseline]
    shown = [subject for subject in groups if subject.groups_total == chosen] or groups[:1]
    shown += [subject for subject in by_subject if subject.is_baseline][:1]
    layers = run.partition["layers"] if run.partition is not None else ()
    return [
        _picture(task_name(task), slug, subject, by_subject[subject], layers) for subject in shown
    ]


def _picture(
    task: str, slug: str, subject: Subject, picture: Mapping[str, Any], layers: Sequence[int]
) -> Illustration:
    cells = sorted(
        (cell for cell in picture["cells"] if math.isfinite(number(cell.get("effect")))),
        key=lambda cell: -abs(cell["effect"]),
    )
    strongest = cells[0]
    whose = "one SAE per layer" if subject.is_baseline else f"one SAE per group ({subject.label})"
    prompt = visible("".join(picture["tokens"]), 300)
    left_out = len(shown_positions(picture)) < len(picture["tokens"])
    return Illustration(
        name=f"task_{slug}_circuit{'_baseline' * subject.is_baseline}",
        title=f"The circuit of {task}, {whose}",
        draw=lambda: circuit_picture(picture, layers),
        alt=f"The {len(cells)} strongest latents of {task} with {whose}, as circles at their layer "
        f"and position. The strongest is latent {strongest['latent']} of layer "
        f"{strongest['layer']}, with an effect of {signed(strongest['effect'])}.",
        caption=f"The {len(cells)} strongest latents. A circle's area is the size of the effect; "
        f"the largest is {signed(strongest['effect'])}. Numbers: the strongest latents'. "
        "Those of one layer and position stand side by side, in a column that is the wider for it. "
        f"One of the examples: “{prompt}”."
        + (" Positions without a circle are left out." if left_out else ""),
        definitions=((_EFFECT[0], _EFFECT[1].format(method=METHODS[picture["method"]])),),
    )


def _subjects(panels: Mapping[Panel, Drawn]) -> str:
    subjects = {line.subject for drawn in panels.values() for line in drawn.lines}
    names = [subject.label for subject in sorted(subjects, key=lambda subject: subject.order)]
    return ", ".join(names) or "no partition"


def _colours(panels: Mapping[Panel, Drawn]) -> str:
    drawn = [line for own in panels.values() for line in own.lines]
    kinds = {line.latents for line in drawn}
    controls = [name for kind, name in CONTROLS.items() if kind in kinds]
    said = ""
    if any(not line.subject.is_baseline for line in drawn):
        said += " Blue: one SAE per group, light for few groups and dark for many."
    if any(line.subject.is_baseline for line in drawn):
        said += " Black: one SAE per layer."
    if controls:
        said += f" Grey: the controls, {' and '.join(controls)}, one line for each partition."
    return said


def _notes(panels: Mapping[Panel, Drawn], prefix: str) -> str:
    """What of the curves is not to be seen."""
    said = ""
    if prefix == "mean" and any(drawn.note for drawn in panels.values()):
        said += (
            " A panel that says so averages fewer tasks, the same for all lines: those whose "
            "curves are not flagged."
        )
    elif any("flagged" in drawn.note for drawn in panels.values()):
        said += " Flagged curves are not drawn: why stands under the table of areas."
    if any(figures.runs_off(drawn.lines) for drawn in panels.values()):
        said += " Scores far from 0 and 1 run off the panels."
    return said
