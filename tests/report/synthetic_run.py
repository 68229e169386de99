"""Writes a run directory with every artefact that the report reads, of any size."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.report.synthetic_circuits import circuits as circuits_artefact
from tests.report.synthetic_circuits import refused as refused_artefact
from tests.report.synthetic_circuits import similarity as similarity_artefact
from tests.report.synthetic_interpretation import annotation, depth, explanation, ground_truth

D_MODEL, EXPANSION, CONTEXT = 128, 16, 128


def write_run(
    directory: Path,
    *,
    n_layers: int = 11,
    chosen: int = 6,
    host: str = "bundled",
    baseline: bool = True,
    seed: int = 0,
    steps: int = 240,
    batch_tokens: int = 4096,
    also_groups: Sequence[int] = (),
    tasks: Sequence[str] = (),
    refused_task: str | None = None,
    similarity: bool = False,
    interpretation: bool = False,
) -> Path:
    """A run over layers 0 .. n_layers-1 of a host with one layer more.

    `also_groups` are evaluated beside the chosen G. Circuits, similarity and interpretation are
    there if asked for.
    """
    generator = np.random.default_rng(seed)
    layers = list(range(n_layers))
    distances = distances_artefact(layers, generator)
    partition = partition_artefact(layers, np.array(distances["matrix"]), chosen)
    groups = partition["by_groups"][str(chosen)]["groups"]
    names = {sae_name(group): group for group in groups}
    if baseline:
        names |= {f"baseline/{sae_name([layer])}": [layer] for layer in layers}

    _write(directory / "config.yaml", yaml.safe_dump(config(host, baseline), sort_keys=False))
    _write_json(directory / "distances.json", distances)
    _write_json(directory / "partition.json", partition)
    lines = metrics(names, generator, steps, batch_tokens)
    _write(directory / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    for name, group in names.items():
        cfg = {
            "architecture": "topk",
            "d_model": D_MODEL,
            "d_sae": D_MODEL * EXPANSION,
            "k": 32,
            "layers": group,
        }
        _write_json(directory / "saes" / name / "cfg.json", cfg)
    totals = [chosen, *(total for total in also_groups if total != chosen)]
    partitions = {total: partition["by_groups"][str(total)]["groups"] for total in totals}
    evaluated = reconstruction(groups, layers if baseline else [], generator)
    for total in totals[1:]:
        evaluated["rows"] += reconstruction(partitions[total], [], generator)["rows"]
    _write_json(directory / "evaluation" / "reconstruction.json", evaluated)
    for index, task in enumerate(tasks):
        _write_json(
            directory / "evaluation" / "circuits" / f"{task_file(task, index)}.json",
            circuits_artefact(task, partitions, layers, d_sae=D_MODEL * EXPANSION),
        )
    if refused_task is not None:
        _write_json(
            directory / "evaluation" / "circuits" / f"{task_file(refused_task, len(tasks))}.json",
            refused_artefact(refused_task),
        )
    if similarity:
        _write_json(
            directory / "evaluation" / "similarity.json",
            similarity_artefact(partitions, layers, d_sae=D_MODEL * EXPANSION),
        )
    if interpretation:
        folder, d_sae = directory / "interpretation", D_MODEL * EXPANSION
        _write_json(folder / "depth.json", depth(partitions, layers, d_sae=d_sae))
        _write_json(folder / "ground_truth.json", ground_truth(partitions, layers, d_sae=d_sae))
        for by, scores in (("annotation", annotation), ("explanation", explanation)):
            _write_json(folder / by / "scores.json", scores(partitions, layers, of="0" * 16))
        _write(folder / "browser" / "index.html", "<!doctype html>")
    training = {
        "steps": steps,
        "tokens_per_sae": steps * batch_tokens,
        "saes": list(names),
        "seconds": 310.2,
        "tokens_kept": 981_000,
        "excluded_special_tokens": 2040,
        "excluded_long_tokens": 0,
    }
    _write_json(directory / "training.json", training)
    stages = {
        name: {"key": "0" * 16, "seconds": seconds, "finished": "2026-03-01T12:00:00+00:00"}
        for name, seconds in [
            ("distances", 21.4),
            ("groups", 0.1),
            ("train", 312.9),
            ("evaluate", 48.0),
            *([("circuits", 412.0)] if tasks or refused_task is not None else []),
            *([("similarity", 63.0)] if similarity else []),
            *([("interpret", 95.0)] if interpretation else []),
        ]
    }
    _write_json(directory / "stages.json", stages)
    return directory


def config(host: str, baseline: bool) -> dict[str, Any]:
    return {
        "host": {"name": host, "revision": None, "dtype": "auto", "device": "auto"},
        "tokens": {"source": "bundled", "context_length": CONTEXT, "exclude_special": True},
        "grouping": {"layers": "all_but_last", "center": True, "method": "linkage"},
        "sae": {"architecture": "topk", "k": 32, "expansion": EXPANSION, "d_sae": None},
        "training": {"tokens": 983_040, "dead_after_tokens": 10_000_000, "baseline": baseline},
        "evaluation": {"tokens": 100_000},
        "report": {"formats": ["pdf", "png"]},
        "provenance": {
            "groupsae": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "python": "3.11.2",
            "platform": "Linux-x86_64",
            "created": "2026-03-01T11:50:00+00:00",
            "host_fingerprint": "5d41402abc4b2a76b9719d911017c592",
        },
    }


def distances_artefact(layers: Sequence[int], generator: np.random.Generator) -> dict[str, Any]:
    """Angles of a stream to which every layer adds a part that is new, the ends the most."""
    n_layers = len(layers)
    depth = np.linspace(-1, 1, n_layers)
    added = 0.35 + 0.5 * depth**2 + 0.08 * generator.random(n_layers)
    stream = np.cumsum(np.diag(np.concatenate([[1.0], added[1:] * 1.3])), axis=0)
    unit = stream / np.linalg.norm(stream, axis=1, keepdims=True)
    matrix = np.arccos(np.clip(unit @ unit.T, -1, 1)) / np.pi
    np.fill_diagonal(matrix, 0)
    error = np.where(np.eye(n_layers, dtype=bool), 0, 3e-4)
    return {
        "layers": list(layers),
        "matrix": matrix.tolist(),
        "standard_error": error.tolist(),
        "tokens": 99_840,
        "center": True,
        "excluded_special_tokens": 160,
    }


def partition_artefact(layers: Sequence[int], matrix: np.ndarray, chosen: int) -> dict[str, Any]:
    groups = [[layer] for layer in layers]
    by_groups = {}
    n_layers = len(layers)
    while True:
        diameters = [_diameter(matrix, group) for group in groups]
        by_groups[str(len(groups))] = {
            "groups": [list(group) for group in groups],
            "amad": float(np.mean(diameters)),
            "largest_diameter": max(diameters),
            "flops_per_token": 24.0 * D_MODEL**2 * (n_layers + 1)
            + 4.0 * (n_layers + 1) * CONTEXT * D_MODEL
            + 10.0 * D_MODEL**2 * EXPANSION * len(groups),
            **{
                f"predicted_{metric}_loss": {"mean": loss, "low": 0.7 * loss, "high": 1.9 * loss}
                for metric, loss in (
                    ("explained_variance", 0.1 * float(np.mean(diameters))),
                    ("ce_loss_score", 0.01 * float(np.mean(diameters))),
                )
            },
        }
        if len(groups) == 1:
            break
        merged = [_diameter(matrix, a + b) for a, b in itertools.pairwise(groups)]
        at = int(np.argmin(merged))
        groups[at : at + 2] = [groups[at] + groups[at + 1]]
    amad = by_groups[str(chosen)]["amad"]
    above = by_groups.get(str(chosen - 1), {"amad": amad + 0.02})["amad"]
    return {
        "layers": list(layers),
        "method": "linkage",
        "threshold": round((amad + above) / 2, 3),
        "chosen": chosen,
        "prediction": "predicted from other models",
        "by_groups": by_groups,
    }


def metrics(
    names: dict[str, list[int]], generator: np.random.Generator, steps: int, batch_tokens: int
) -> list[dict[str, Any]]:
    """Curves that fall towards a floor which is higher for wider and for deeper groups."""
    lines = []
    for step in range(20, steps + 1, 20):
        for name, layers in names.items():
            floor = 0.05 + 0.006 * layers[-1] + 0.012 * len(layers)
            fvu = floor + 0.8 * np.exp(-step / 45) + 0.004 * generator.normal()
            lines.append(
                {
                    "step": step,
                    "tokens": step * batch_tokens,
                    "sae": name,
                    "loss": float(fvu * 1.01),
                    "fvu": float(fvu),
                    "auxk": float(0.3 * np.exp(-step / 60)),
                    "l0": 32.0,
                    "dead": float(0.01 * len(layers) * (1 - np.exp(-step / 120))),
                    "lr": 5.6e-4,
                    "gradient_norm": float(0.4 + 0.1 * generator.random()),
                    "seconds": 1.3 * step,
                }
            )
    return lines


def reconstruction(
    groups: Sequence[Sequence[int]], baseline_layers: Sequence[int], generator: np.random.Generator
) -> dict[str, Any]:
    rows = [
        _row("groups", len(groups), list(group), layer, generator)
        for group in groups
        for layer in group
    ]
    rows += [
        _row("baseline", len(baseline_layers), [layer], layer, generator)
        for layer in baseline_layers
    ]
    return {
        "definitions": {
            "kl": "mean KL divergence from the clean to the spliced distribution, nats",
            "tokens": "positions that were replaced and counted",
        },
        "tokens": 99_840,
        "equal": "training tokens per SAE (983,040), the same for all",
        "rows": rows,
    }


def _row(
    partition: str, total: int, group: list[int], layer: int, generator: np.random.Generator
) -> dict[str, Any]:
    spread = len(group) - 1
    score = 0.991 - 0.0012 * layer - 0.0025 * spread + 0.0008 * generator.normal()
    r2 = 0.95 - 0.008 * layer - 0.012 * spread + 0.003 * generator.normal()
    clean, zero = 2.617, 11.4
    edges = np.linspace(-5, 0, 41)
    latents = D_MODEL * EXPANSION
    log10_density = generator.normal(-2.3 + 0.05 * spread, 0.55, size=latents)
    counts, _ = np.histogram(log10_density, bins=edges)
    return {
        "partition": partition,
        "groups_total": total,
        "group": group,
        "layer": layer,
        "ce_loss_score": float(score),
        "ce_clean": clean,
        "ce_spliced": float(zero - score * (zero - clean)),
        "ce_zero": zero,
        "kl": float((1 - score) * 6),
        "r2": float(r2),
        "explained_variance": float(r2 - 0.02),
        "l2": float(3.0 * 1.18**layer * np.sqrt(1 - r2) * 2),
        "cosine": float(np.sqrt(r2)),
        "l0": 32.0,
        "dead": float(0.004 + 0.006 * spread),
        "dead_in_group": 0.004,
        "mse": 2.5e-4,
        "latent_density": {
            "edges": edges.tolist(),
            "counts": counts.tolist(),
            "silent": latents - int(counts.sum()),
        },
    }


def task_file(task: str, index: int) -> str:
    """A file name for a task of any name."""
    return task if task.isidentifier() else f"task-{index}"


def sae_name(group: Sequence[int]) -> str:
    return "layers-" + (f"{group[0]:02d}-{group[-1]:02d}" if len(group) > 1 else f"{group[0]:02d}")


def _diameter(matrix: np.ndarray, group: Sequence[int]) -> float:
    return float(matrix[np.ix_(group, group)].max())


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _write_json(path: Path, value: object) -> None:
    _write(path, json.dumps(value, indent=1))
