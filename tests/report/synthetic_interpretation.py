"""Artefacts as `groupsae interpret`, `annotate` and `explain` write them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Groups = Sequence[Sequence[int]]
ATTRIBUTES = ("noun", "verb", "female name", "year of century", "recipient")
MARKED = 96


class _SAE(NamedTuple):
    """A layer's SAE of one partition."""

    partition: str
    groups_total: int
    group: Sequence[int]
    layer: int

    @property
    def name(self) -> str:
        ends = f"{self.group[0]:02d}" + f"-{self.group[-1]:02d}" * (len(self.group) > 1)
        return f"{'baseline/' * (self.partition == 'baseline')}layers-{ends}"


def depth(
    partitions: Mapping[int, Groups], layers: Sequence[int], *, d_sae: int, seed: int = 0
) -> dict[str, Any]:
    """Latents that are busiest at one depth and less so around it; the deeper the later."""
    generator = np.random.default_rng(seed)
    saes: dict[str, Any] = {}
    profiles: dict[str, Any] = {}
    for sae in _saes(partitions, layers):
        if sae.name not in saes:
            n_layers = len(sae.group)
            rows = 40
            centre = np.linspace(-0.3, n_layers - 0.7, rows)
            width = 0.3 + generator.random(rows) * n_layers / 3
            share = np.exp(-(((np.arange(n_layers) - centre[:, None]) / width[:, None]) ** 2))
            share /= share.sum(1, keepdims=True)
            silent = int(generator.integers(0, d_sae // 10))
            profiles[sae.name] = {
                "layers": list(sae.group),
                "latents_per_row": (d_sae - silent) / rows,
                "silent": silent,
                "share": share.round(5).tolist(),
            }
            saes[sae.name] = [
                {
                    "layers": list(sae.group),
                    "latents": d_sae,
                    "share": limit,
                    "silent": silent / d_sae,
                    "one": 0.2 + 0.5 * limit,
                    "some": 0.3,
                    "all": 0.5 - 0.5 * limit if n_layers > 1 else 0.0,
                    "mean_persistence": 1 + 0.6 * (n_layers - 1),
                    "persistence": [100] * n_layers,
                }
                for limit in (0.1, 0.5)
            ]
    by_subject: dict[tuple[str, int], dict[str, str]] = {}
    for sae in _saes(partitions, layers):
        own = by_subject.setdefault((sae.partition, sae.groups_total), {})
        own[str(sae.layer)] = sae.name
    return {
        "definitions": {"rate": "share of the tokens on which a latent fires at a member layer"},
        "saes": saes,
        "subjects": [
            {"partition": partition, "groups_total": total, "saes": own}
            for (partition, total), own in by_subject.items()
        ],
        "profiles": profiles,
    }


def ground_truth(
    partitions: Mapping[int, Groups], layers: Sequence[int], *, d_sae: int, seed: int = 0
) -> dict[str, Any]:
    """Attributes that a probe tells best, per-layer latents next, and untrained ones hardly."""
    generator = np.random.default_rng(seed)
    rows = []
    for source, own in (("trained", 0.86), ("untrained", 0.63)):
        for sae in _saes(partitions, layers):
            about = {
                "source": source,
                "partition": sae.partition,
                "groups_total": sae.groups_total,
                "layer": sae.layer,
            }
            level = own - 0.01 * (len(sae.group) - 1) + 0.02 * sae.layer / len(layers)
            rows += _attribute_rows(about, level, generator, d_sae)
    for layer in layers:
        about = {"source": "probe", "partition": None, "groups_total": None, "layer": layer}
        rows += _attribute_rows(about, 0.96, generator, None)
    subject = ("source", "partition", "groups_total")
    return {
        "definitions": {"auroc": "on the second half of the contexts"},
        "tokens": 19_840,
        "attributes": [
            {"attribute": name, "definition": f"a word that is a {name}", "positives": [812, 790]}
            for name in ATTRIBUTES
        ],
        "rows": rows,
        "coverage": _means(rows, (*subject, "layer")),
        "means": _means(rows, subject),
    }


def annotation(
    partitions: Mapping[int, Groups], layers: Sequence[int], *, of: str
) -> dict[str, Any]:
    """Two people's marks."""
    rows = []
    for sae in _rows(partitions, layers):
        score = 0.82 - 0.03 * (len(sae["group"] or [0]) - 1) - 0.005 * (sae["layer"] or 0)
        interpretable = round(score * MARKED)
        rows.append(
            {
                **sae,
                "latents": MARKED,
                "interpretable": interpretable,
                "not": MARKED - interpretable - 4,
                "unsure": 4,
                "score": score,
                "low": score - 0.08,
                "high": score + 0.07,
            }
        )
    return {
        "definitions": {"score": "marks interpretable over all marks"},
        "of": of,
        "sheet": "0f3a",
        "annotators": [{"name": "Ada", "marked": 1056}, {"name": "Grace", "marked": 1002}],
        "agreement": {"name": "Cohen's kappa", "value": 0.714, "items": 1002},
        "rows": rows,
        "latents": [],
    }


def explanation(
    partitions: Mapping[int, Groups], layers: Sequence[int], *, of: str
) -> dict[str, Any]:
    """What a model told from its own explanations."""
    rows = []
    for sae in _rows(partitions, layers):
        level = 0.78 - 0.02 * (len(sae["group"] or [0]) - 1)
        row = {**sae, "latents": MARKED}
        for measure, own in (("detection", level), ("fuzzing", level - 0.06)):
            row |= {measure: own, f"{measure}_low": own - 0.03, f"{measure}_high": own + 0.03}
        rows.append(row)
    return {
        "definitions": {"detection": "balanced accuracy over the judged contexts of a latent"},
        "of": of,
        "model": "some-model",
        "endpoint": "localhost:8000",
        "complete": False,
        "counts": {
            "requests": 4410,
            "from_before": 1200,
            "retries": 17,
            "failed": 2,
            "unparsed": 31,
            "prompt_tokens": 2_410_000,
            "completion_tokens": 88_000,
            "estimated_tokens": 0,
        },
        "rows": rows,
        "latents": [],
    }


def _saes(partitions: Mapping[int, Groups], layers: Sequence[int]) -> Iterator[_SAE]:
    """Every layer's SAE of every G and of the baseline."""
    for total, groups in sorted(partitions.items()):
        for group in groups:
            for layer in group:
                yield _SAE("groups", total, group, layer)
    for layer in layers:
        yield _SAE("baseline", len(layers), [layer], layer)


def _rows(partitions: Mapping[int, Groups], layers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """What scored rows begin with: of each layer, and of all layers of a partition."""
    for sae in _saes(partitions, layers):
        about = {"partition": sae.partition, "groups_total": sae.groups_total}
        yield {**about, "group": list(sae.group), "layer": sae.layer, "sae": sae.name}
    for partition, total in [*(("groups", own) for own in partitions), ("baseline", len(layers))]:
        about = {"partition": partition, "groups_total": total}
        yield {**about, "group": None, "layer": None, "sae": None}


def _attribute_rows(
    about: Mapping[str, Any], level: float, generator: np.random.Generator, d_sae: int | None
) -> list[dict[str, Any]]:
    rows = []
    for name in ATTRIBUTES:
        auroc = float(np.clip(level + 0.06 * generator.normal(), 0.5, 1))
        latent = None if d_sae is None else int(generator.integers(d_sae))
        rows.append(
            {
                **about,
                "attribute": name,
                "auroc": auroc,
                "latent": latent,
                "f1": auroc - 0.1,
                "f1_latent": latent,
                "threshold": 0.4,
            }
        )
    return rows


def _means(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    alike: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        alike.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        {
            **dict(zip(keys, about, strict=True)),
            "coverage": float(np.mean([row["auroc"] > 0.9 for row in own])),
            "auroc": float(np.mean([row["auroc"] for row in own])),
            "f1": float(np.mean([row["f1"] for row in own])),
        }
        for about, own in alike.items()
    ]
