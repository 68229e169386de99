"""One task from its prompts to its curves: the proof that a few latents carry a computation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from groupsae.evaluation import circuits
from groupsae.evaluation.attribution import Effects, effects
from groupsae.evaluation.circuits import Curve, Ranking
from groupsae.evaluation.subject import Subject
from groupsae.evaluation.tasks import Pairs, Task
from groupsae.host.model import HostModel

DEFINITIONS = circuits.DEFINITIONS | {
    "effect": "mean over the first half's examples of a latent's indirect effect on "
    "logit(a_patch) - logit(a_clean), summed over positions: what the metric changes by when the "
    "latent takes its value in x_patch",
    "attribution": "effects estimated by attribution patching: the gradient at x_clean times the "
    "difference",
    "integrated_gradients": "effects estimated by the mean gradient on the way from x_clean to "
    "x_patch times the difference",
}

_STRONGEST = 20
_CELLS = 40


def judge_task(
    host: HostModel,
    task: Task,
    subjects: Sequence[Subject],
    effects_by: Callable[[str], Mapping[str, Effects]],
    *,
    methods: Sequence[str],
    steps: int = 10,
    points: int = 16,
    controls: bool = True,
    batch_tokens: int = 4096,
    seed: int = 0,
    special: Collection[int] = (),
) -> dict[str, Any]:
    """Judge circuits of the latents that carry a task, all on the same examples.

    Effects and mean latents come from one half of the examples, scores from the other.

    Args:
        subjects: The partitions to judge. The first and the baseline have controls and a picture.
        effects_by: Method to effects by the subjects' names: those of :func:`task_effects`.
        methods: How effects are estimated; see :mod:`groupsae.evaluation.attribution`.
        steps: Points of the integrated gradients.
        points: Sizes of a circuit.
        controls: Also judge random latents and those of untrained SAEs, chosen per layer.
        batch_tokens: Bounds the memory.
        special: Token ids whose positions are left alone.

    Returns:
        The content of `evaluation/circuits/<task>.json`.

    Raises:
        InputError: As :func:`effects` and :func:`circuits.evaluate_circuits`.
    """
    first, second = task.halves()
    m_model = circuits.answer_margins(host, second, batch_tokens=batch_tokens)
    refused = circuits.check_task(task.name, m_model)
    result: dict[str, Any] = {
        "definitions": DEFINITIONS,
        "task": task.name,
        "source": task.source,
        "kept": len(task),
        "dropped": dict(task.dropped),
        "examples": {"effects": len(first), "scores": len(second)},
        "lengths": {str(pairs.clean.shape[1]): len(pairs) for pairs in task.lengths},
        "model": {"m": float(m_model.mean()), "accuracy": circuits.accuracy(m_model)},
        "refused": refused,
        "curves": [],
        "strongest": [],
        "picture": [],
        "error_effects": [],
    }
    if refused is not None:
        return result

    shown = [subjects[0], *(s for s in subjects[1:] if s.partition == "baseline")]

    def judge(rankings: Sequence[Ranking], selections: Sequence[str]) -> list[dict[str, Any]]:
        curves = circuits.evaluate_circuits(
            host,
            first,
            second,
            rankings,
            m_model,
            selections=selections,
            points=points,
            batch_tokens=batch_tokens,
            special=special,
        )
        return [curve.to_json() for curve in curves]

    found = {method: effects_by(method) for method in methods}
    ranked = {
        (subject.name, method): Ranking.by_effects(subject, found[method][subject.name])
        for method in methods
        for subject in subjects
    }
    twins = _of_the_same_saes(subjects)
    own = [ranking for (name, _), ranking in ranked.items() if name not in twins]
    curves = judge(own, circuits.SELECTIONS)
    for subject in subjects:
        if subject.name in twins:
            same, about = twins[subject.name], {"groups_total": subject.groups_total}
            curves += [
                curve | about | {"partition": subject.partition}
                for curve in curves
                if (curve["partition"], curve["groups_total"])
                == (same.partition, same.groups_total)
            ]
    if controls:
        untrained = [
            circuits.untrained(host, first.clean_prompts, subject, seed=seed, special=special)
            for subject in shown
        ]
        rankings = [circuits.random_ranking(ranked[s.name, methods[0]], seed) for s in shown]
        for method in methods:
            of_untrained = task_effects(
                host,
                task,
                untrained,
                method=method,
                steps=steps,
                batch_tokens=batch_tokens,
                special=special,
            )
            rankings += [
                Ranking.by_effects(s, of_untrained[s.name], latents="untrained") for s in untrained
            ]
        curves += judge(rankings, ("per_layer",))
    result["curves"] = curves
    for method, by_subject in found.items():
        for subject in subjects:
            about = _about(subject, method)
            of_subject = by_subject[subject.name]
            result["strongest"] += [about | entry for entry in _strongest(subject, of_subject)]
            result["error_effects"] += [
                about | {"layer": layer, "effect": effect}
                for layer, effect in of_subject.error.items()
            ]
    result["picture"] = _pictures(host, first, shown, batch_tokens, special)
    return result


def task_effects(
    host: HostModel,
    task: Task,
    subjects: Sequence[Subject],
    *,
    method: str,
    steps: int = 10,
    batch_tokens: int = 4096,
    special: Collection[int] = (),
) -> dict[str, Effects]:
    """The effects of every subject's latents, by its name, on the task's first half."""
    return effects(
        host,
        task.halves()[0].lengths,
        {subject.name: subject.saes for subject in subjects},
        method=method,
        steps=steps,
        batch_tokens=batch_tokens,
        special=special,
    )


def curves_of(judged: Mapping[str, Any]) -> list[Curve]:
    """The curves of a task's stored result."""
    curves = []
    for stored in judged["curves"]:
        own: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        curves.append(Curve(**own))
    return curves


def _of_the_same_saes(subjects: Sequence[Subject]) -> dict[str, Subject]:
    """By name, subjects whose SAEs are all another's before them: as many groups as layers."""
    found: dict[str, Subject] = {}
    for i, subject in enumerate(subjects):
        for earlier in subjects[:i]:
            if earlier.saes == subject.saes:
                found.setdefault(subject.name, earlier)
    return found


def _about(subject: Subject, method: str) -> dict[str, Any]:
    return {
        "partition": subject.partition,
        "groups_total": subject.groups_total,
        "method": method,
    }


def _strongest(subject: Subject, found: Effects) -> list[dict[str, Any]]:
    """The latents with the largest effects over all layers."""
    layers = sorted(found.latents)
    sizes = [len(found.latents[layer]) for layer in layers]
    signed = torch.cat([found.latents[layer] for layer in layers])
    at = [(layer, i) for layer, size in zip(layers, sizes, strict=True) for i in range(size)]
    order = signed.abs().argsort(descending=True, stable=True)[:_STRONGEST].tolist()
    return [
        {
            "layer": at[i][0],
            "group": list(subject.saes[at[i][0]].layers),
            "latent": at[i][1],
            "effect": float(signed[i]),
        }
        for i in order
        if signed[i] != 0
    ]


def _pictures(
    host: HostModel,
    task: Task,
    subjects: Sequence[Subject],
    batch_tokens: int,
    special: Collection[int],
) -> list[dict[str, Any]]:
    """Layers against positions: the strongest effects on prompts of the most frequent length."""
    pairs = max(task.lengths, key=len)
    by_subject = effects(
        host,
        [pairs],
        {subject.name: subject.saes for subject in subjects},
        method="attribution",
        batch_tokens=batch_tokens,
        by_position=True,
        special=special,
    )
    context = pairs.clean.shape[1]
    pictures = []
    for subject in subjects:
        by_position = by_subject[subject.name].by_position
        assert by_position is not None
        cells = [
            {"layer": layer, "position": position, "latent": latent, "effect": effect}
            for layer, values in by_position[context].items()
            for position, latent, effect in _largest(values)
        ]
        cells.sort(key=lambda cell: -abs(cell["effect"]))
        pictures.append(
            _about(subject, "attribution")
            | {"length": context, "tokens": _tokens(host, pairs), "cells": cells[:_CELLS]}
        )
    return pictures


def _largest(values: torch.Tensor) -> list[tuple[int, int, float]]:
    """Position, latent and effect of a layer's strongest."""
    flat = values.flatten()
    order = flat.abs().argsort(descending=True, stable=True)[:_CELLS].tolist()
    d_sae = values.shape[1]
    return [(i // d_sae, i % d_sae, float(flat[i])) for i in order if flat[i] != 0]


def _tokens(host: HostModel, pairs: Pairs) -> list[str]:
    """The text of each token of the first example."""
    assert host.tokenizer is not None  # without one there is no task
    return [host.tokenizer.decode([i]) for i in pairs.clean[0].tolist()]
