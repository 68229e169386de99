"""Artefacts as `groupsae circuits` and `groupsae similarity` write them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.integrate import trapezoid

PROMPTS = {
    "ioi": "When| Mary| and| John| went| to| the| store|,| John| gave| a| drink| to",
    "greater_than": "The| war| lasted| from| the| year| 17|32| to| the| year| 17",
    "subject_verb": "The| keys| that| the| man| holds",
}
METHODS = ("attribution", "integrated_gradients")
HARDNESS = {"ioi": 1.0, "greater_than": 0.45, "subject_verb": 0.7}

Groups = Sequence[Sequence[int]]


def circuits(
    task: str, partitions: Mapping[int, Groups], layers: Sequence[int], *, d_sae: int, seed: int = 0
) -> dict[str, Any]:
    """One task with its curves for every G of `partitions` and for the baseline.

    Latents that suffice are more the fewer the groups; the controls stay near 0 and 1.
    """
    generator = np.random.default_rng([seed, zlib.crc32(task.encode())])
    subjects: list[tuple[str, int, Groups]] = [
        ("groups", total, groups) for total, groups in sorted(partitions.items())
    ]
    subjects.append(("baseline", len(layers), [[layer] for layer in layers]))
    tokens = PROMPTS.get(task, "A| prompt| of| no| kind").split("|")
    return {
        "definitions": {
            "faithfulness": "(m(C) - m(empty)) / (m(M) - m(empty))",
            "m": "logit(a_clean) - logit(a_patch) at the last position",
        },
        "task": task,
        "source": "built in",
        "kept": 1024,
        "dropped": {"the answer is more than one token": 31},
        "examples": {"effects": 512, "scores": 512},
        "lengths": {str(len(tokens)): 1024},
        "model": {"m": 3.41, "accuracy": 0.987},
        "refused": None,
        "curves": [
            curve
            for partition, total, _ in subjects
            for method in METHODS
            for curve in _curves(task, partition, total, method, len(layers), d_sae, generator)
        ],
        "strongest": [
            entry
            for partition, total, groups in subjects
            for method in METHODS
            for entry in _strongest(partition, total, groups, method, d_sae, generator)
        ],
        "picture": [
            {
                "partition": partition,
                "groups_total": total,
                "method": method,
                "length": len(tokens),
                "tokens": tokens,
                "cells": _cells(layers, tokens, d_sae, generator),
            }
            for partition, total, _ in subjects
            for method in METHODS
        ],
        "error_effects": [],
    }


def refused(task: str) -> dict[str, Any]:
    """A task that the host model cannot do."""
    return {
        "definitions": {},
        "task": task,
        "source": "mine.jsonl",
        "kept": 70,
        "dropped": {"prompts of unequal length": 12},
        "examples": {"effects": 35, "scores": 35},
        "lengths": {"6": 70},
        "model": {"m": -0.02, "accuracy": 0.49},
        "refused": "the host model cannot do it: on 35 examples m(M) = -0.020 with a standard "
        "error of 0.051",
        "curves": [],
        "strongest": [],
        "picture": [],
        "error_effects": [],
    }


def similarity(
    partitions: Mapping[int, Groups],
    layers: Sequence[int],
    *,
    d_sae: int,
    yardstick: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Groups whose dictionaries are the less like a layer's own the wider the group."""
    generator = np.random.default_rng(seed)
    depth = np.arange(len(layers))
    own = 0.72 - 0.15 * depth / max(1, len(layers) - 1)
    rows, matrices = [], {}
    for total, groups in sorted(partitions.items()):
        group_of = {layer: list(group) for group in groups for layer in group}
        centre = np.array([np.mean(group_of[layer]) for layer in layers])
        distance = abs(depth[:, None] - centre[None, :])
        mmcs = own[:, None] * np.exp(-0.12 * distance) - 0.02 * (len(layers) - total) / 10
        matrices[str(total)] = {
            "mmcs": mmcs.tolist(),
            "concordance": (0.8 * mmcs**1.3).tolist(),
        }
        for at, layer in enumerate(layers):
            forward, back = float(mmcs[at, at]) + 0.03, float(mmcs[at, at])
            rows.append(
                {
                    "groups_total": total,
                    "layer": layer,
                    "group": group_of[layer],
                    "mmcs_group_to_layer": forward,
                    "mmcs_layer_to_group": back,
                    "above_0.9_group_to_layer": 0.4 * forward,
                    "above_0.9_layer_to_group": 0.4 * back,
                    "histogram": {
                        "edges": np.linspace(0, 1, 41).tolist(),
                        "group_to_layer": _maxima(forward, d_sae, generator),
                        "layer_to_group": _maxima(back, d_sae, generator),
                    },
                    "concordance": 0.8 * back**1.3,
                    "silent": 11 + at,
                }
            )
    return {
        "definitions": {"mmcs": "mean over latents of the largest cosine with a latent there"},
        "layers": list(layers),
        "tokens": 1_000_000,
        "rows": rows,
        "matrices": matrices,
        "yardstick": [
            {
                "layer": layer,
                "mmcs": float(own[at]) + 0.08,
                "above_0.9": 0.45,
                "histogram": {
                    "edges": np.linspace(0, 1, 41).tolist(),
                    "counts": _maxima(float(own[at]) + 0.08, d_sae, generator),
                },
                "concordance": 0.55,
                "silent": 9,
            }
            for at, layer in enumerate(layers)
        ]
        if yardstick
        else None,
    }


def _curves(
    task: str,
    partition: str,
    total: int,
    method: str,
    n_layers: int,
    d_sae: int,
    generator: np.random.Generator,
) -> list[dict[str, Any]]:
    found = []
    for latents in ("ranked", "random", "untrained"):
        if latents != "ranked" and method != "attribution":
            continue
        for selection in ("per_layer", "global"):
            for error_nodes in (False, True):
                for score, share in (("faithfulness", 0.2), ("completeness", 0.05)):
                    n = np.linspace(4, share * d_sae, 16).round()
                    scale = 0.06 * d_sae * HARDNESS.get(task, 0.8) * (1.6 - 0.6 * total / n_layers)
                    scale *= {"ranked": 1, "random": 30, "untrained": 12}[latents]
                    scale *= 0.6 if error_nodes else 1
                    scale *= 0.85 if method == "integrated_gradients" else 1
                    scale *= 0.8 if selection == "global" else 1
                    reached = 1 - np.exp(-((n / scale) ** 0.8))
                    reached = reached + 0.015 * generator.normal(size=16)
                    value = reached if score == "faithfulness" else 1 - 0.9 * reached.clip(0) ** 0.5
                    value = value + 0.02 * generator.normal(size=16)
                    m_model, m_empty = 3.41, 0.11 + 0.5 * error_nodes
                    area = trapezoid(value, n) / (n[-1] - n[0])
                    past = np.flatnonzero(value >= 0.75)
                    reaches = score == "faithfulness" and past.size > 0
                    found.append(
                        {
                            "partition": partition,
                            "groups_total": total,
                            "method": method,
                            "latents": latents,
                            "selection": selection,
                            "error_nodes": error_nodes,
                            "score": score,
                            "n": n.tolist(),
                            "value": value.tolist(),
                            "m_circuit": (m_empty + value * (m_model - m_empty)).tolist(),
                            "m_model": m_model,
                            "m_empty": m_empty,
                            "area": float(area),
                            "n_at_75": float(n[past[0]]) if reaches else None,
                            "flag": None,
                        }
                    )
    return found


def _strongest(
    partition: str,
    total: int,
    groups: Groups,
    method: str,
    d_sae: int,
    generator: np.random.Generator,
) -> list[dict[str, Any]]:
    group_of = {layer: list(group) for group in groups for layer in group}
    layers = generator.choice(list(group_of), size=20)
    effects = 0.6 * 0.85 ** np.arange(20) * generator.choice([-1, 1], size=20)
    return [
        {
            "partition": partition,
            "groups_total": total,
            "method": method,
            "layer": int(layer),
            "group": group_of[int(layer)],
            "latent": int(generator.integers(d_sae)),
            "effect": float(effect),
        }
        for layer, effect in zip(layers, effects, strict=True)
    ]


def _cells(
    layers: Sequence[int], tokens: Sequence[str], d_sae: int, generator: np.random.Generator
) -> list[dict[str, Any]]:
    """Circles that move from early names to the last position, as effects do."""
    cells = []
    for rank in range(40):
        depth = float(generator.random())
        late = generator.random() < depth
        position = len(tokens) - 1 if late else int(generator.integers(1, max(2, len(tokens) - 2)))
        cells.append(
            {
                "layer": int(layers[round(depth * (len(layers) - 1))]),
                "position": min(position, len(tokens) - 1),
                "latent": int(generator.integers(d_sae)),
                "effect": float(0.5 * 0.9**rank * generator.choice([-1, 1], p=[0.3, 0.7])),
            }
        )
    return cells


def _maxima(mean: float, d_sae: int, generator: np.random.Generator) -> list[int]:
    """Largest cosines: a part near 1, the rest spread about what is left of the mean."""
    share = 0.45 * mean
    spread = generator.beta(5, 6, size=round((1 - share) * d_sae))
    near = generator.beta(40, 2, size=round(share * d_sae))
    counts, _ = np.histogram(np.concatenate([spread, near]), bins=np.linspace(0, 1, 41))
    return [int(count) for count in counts]
