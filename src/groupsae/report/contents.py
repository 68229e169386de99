"""What the page says in words and tables, as plain values for the template."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from groupsae import local
from groupsae.grouping.matrix import QUANTITIES, threshold_note
from groupsae.report.artefacts import Artefacts
from groupsae.report.circuits import circuit_contents
from groupsae.report.interpretation import interpretation_contents
from groupsae.report.metrics import METRICS, MISSING, LayerComparison, compare, means, number
from groupsae.report.similarity import similarity_contents
from groupsae.report.wording import choice, chosen_groups, duration, layer_range, si

TABLE = ("ce_loss_score", "r2", "l2", "l0")  # the columns of the table that is always open
_SAE_FIELDS = ("architecture", "d_model", "d_sae", "k")

Cell = dict[str, str]


def page_contents(run: Artefacts) -> dict[str, Any]:
    """Everything that the template names, besides the figures, the style and the script."""
    comparisons = _comparisons(run)
    return {
        "host": host_name(run),
        "provenance": _provenance(run),
        "config_text": run.config_text,
        "has": {
            "distances": run.distances is not None,
            "partition": run.partition is not None,
            "training": bool(run.metrics),
            "evaluation": bool(comparisons),
        },
        "summary": _summary(run, comparisons),
        "tiles": _tiles(run, comparisons),
        "groups": _groups(run),
        "saes": _saes(run),
        "equal": _equal(run),
        "comparison": comparison_table(comparisons),
        "every_metric": _every_metric(run, comparisons),
        "circuits": circuit_contents(run),
        "similarity": similarity_contents(run),
        "interpretation": interpretation_contents(run),
        "cost": _cost(run),
        "stages": _stages(run),
        "excluded": _excluded(run),
        "excluding": _excluding(run),
    }


def host_name(run: Artefacts) -> str:
    """The host model's name as the config has it, of a local path the last part."""
    return local.shown(str(run.section("host").get("name") or "host model"))


def comparison_table(comparisons: Sequence[LayerComparison]) -> dict[str, Any]:
    """Per layer: group's SAE, baseline and difference for the metrics of `TABLE`, and the means."""
    return {
        "metrics": [METRICS[key].label for key in TABLE],
        "rows": [
            {
                "layer": comparison.layer,
                "group": layer_range(comparison.group),
                "first": comparison.group[0],
                "cells": [cell for key in TABLE for cell in _triple(key, comparison.values(key))],
            }
            for comparison in comparisons
        ],
        "means": [cell for key in TABLE for cell in _triple(key, means(comparisons, key))],
        "layers_in_means": _layers_in_means(comparisons),
    }


def _summary(run: Artefacts, comparisons: Sequence[LayerComparison]) -> str:
    sentences = []
    if run.partition is not None:
        layers, chosen = run.partition["layers"], run.partition["chosen"]
        amad = number(_chosen_entry(run).get("amad"))
        sentences.append(
            f"Layers {layer_range(layers)} of {host_name(run)} were put into {chosen} "
            f"group{'s' * (chosen != 1)} ({choice(run.partition)}"
            + (f"; AMAD {amad:.3f}" if math.isfinite(amad) else "")
            + ")."
        )
        sentences += _threshold_note(run, run.partition)
    tokens = _tokens_per_sae(run)
    if tokens:
        sentences.append(f"Each SAE was trained on {tokens} tokens.")
    sentences += _reconstruction_sentence(comparisons)
    saved = _saving(run)
    if saved is not None:
        sentences.append(f"The cost model predicts {saved:.0%} fewer FLOPs than one SAE per layer.")
    return " ".join(sentences) or "No stage of this run has finished yet."


def _threshold_note(run: Artefacts, partition: Mapping[str, Any]) -> list[str]:
    """What to know of the threshold, where one chose among distances that are no angles."""
    similarity = (run.distances or {}).get("similarity", "angular")
    if similarity not in QUANTITIES or not math.isfinite(number(partition.get("threshold"))):
        return []
    note = threshold_note(similarity)
    return [] if note is None else [note]


def _reconstruction_sentence(comparisons: Sequence[LayerComparison]) -> list[str]:
    score, r2 = METRICS["ce_loss_score"], METRICS["r2"]
    scores, r2s = means(comparisons, score.key), means(comparisons, r2.key)
    if not (math.isfinite(scores[0]) and math.isfinite(r2s[0])):
        return []
    sentence = (
        f"Averaged over layers, one SAE per group reaches a CE-loss score of "
        f"{score.format(scores[0])} and an R² of {r2.format(r2s[0])}"
    )
    if math.isfinite(scores[2]) and math.isfinite(r2s[2]):
        sentence += (
            f"; one SAE per layer reaches {score.format(scores[1])} and {r2.format(r2s[1])} "
            f"(differences {score.format(scores[2], signed=True)} and "
            f"{r2.format(r2s[2], signed=True)})"
        )
    return [sentence + "."]


def _tiles(run: Artefacts, comparisons: Sequence[LayerComparison]) -> list[Cell]:
    """The run's main figures, each with its context."""
    tiles = []
    if run.partition is not None:
        tiles.append(_tile("Groups", str(run.partition["chosen"]), f"of {_n_layers(run)} layers"))
        amad = number(_chosen_entry(run).get("amad"))
        if math.isfinite(amad):
            tiles.append(_tile("AMAD", f"{amad:.3f}", choice(run.partition)))
            tiles += _predicted_losses(run)
    for key in ("ce_loss_score", "r2"):
        metric, (ours, theirs, difference) = METRICS[key], means(comparisons, key)
        if math.isfinite(ours):
            note = (
                f"{metric.format(difference, signed=True)} against {metric.format(theirs)} with "
                "one SAE per layer"
                if math.isfinite(difference)
                else "no baseline"
            )
            tiles.append(_tile(f"Mean {metric.label}", metric.format(ours), note))
    saved = _saving(run)
    if saved is not None:
        tiles.append(_tile("Predicted saving", f"{saved:.0%}", "of FLOPs per token"))
    if tokens := _tokens_per_sae(run):
        tiles.append(_tile("Tokens per SAE", tokens, f"{_n_saes(run)} trained"))
    return tiles


def _predicted_losses(run: Artefacts) -> list[Cell]:
    """What the chosen partition was predicted to lose, where its distances allow to say so."""
    tiles = []
    basis = (run.partition or {}).get("prediction")
    for key in ("ce_loss_score", "explained_variance"):
        loss = _chosen_entry(run).get(f"predicted_{key}_loss")
        values = loss if isinstance(loss, Mapping) else {}
        mean, low, high = (number(values.get(name)) for name in ("mean", "low", "high"))
        if math.isfinite(mean + low + high) and isinstance(basis, str):
            note = f"mean over layers, {low:.4f} to {high:.4f}; {basis}"
            tiles.append(_tile(f"Predicted loss, {METRICS[key].label}", f"{mean:.4f}", note))
    return tiles


def _groups(run: Artefacts) -> list[Cell]:
    distances = run.distances
    rows = []
    for group in chosen_groups(run.partition):
        diameter = math.nan
        if distances is not None and set(group) <= set(distances["layers"]):
            at = [distances["layers"].index(layer) for layer in group]
            diameter = max(
                (number(distances["matrix"][a][b]) for a in at for b in at if a > b), default=0.0
            )
        rows.append(
            {
                "layers": layer_range(group),
                "size": str(len(group)),
                "diameter": f"{diameter:.3f}" if math.isfinite(diameter) else MISSING,
            }
        )
    return rows


def _saes(run: Artefacts) -> list[Cell]:
    return [
        {
            "folder": sae["folder"],
            "layers": layer_range(sae["layers"]),
            **{
                key: str(sae.get(key, MISSING)) for key in ("architecture", "d_model", "d_sae", "k")
            },
        }
        for sae in run.saes
    ]


def _equal(run: Artefacts) -> str:
    """What was held equal between groups and baseline, and how much was evaluated."""
    reconstruction = run.reconstruction or {}
    parts = []
    if isinstance(reconstruction.get("equal"), str) and reconstruction["equal"]:
        parts.append(f"What was equal: {reconstruction['equal'].rstrip('.')}.")
    tokens = number(reconstruction.get("tokens"))
    if math.isfinite(tokens):
        parts.append(f"Measured on {tokens:,.0f} held-out tokens.")
    return " ".join(parts)


def _every_metric(run: Artefacts, comparisons: Sequence[LayerComparison]) -> dict[str, Any]:
    """One row for each layer and kind of SAE; the metrics that no row has are left out."""
    rows = [
        (comparison, kind, row)
        for comparison in comparisons
        for kind, row in (("group", comparison.groups), ("layer", comparison.baseline))
        if row
    ]
    shown = [
        metric
        for metric in METRICS.values()
        if any(math.isfinite(number(row.get(metric.key))) for _, _, row in rows)
    ]
    return {
        "metrics": [metric.label for metric in shown],
        "definitions": [
            (metric.label, _given_definition(run, metric.key) or metric.definition)
            for metric in shown
        ]
        + [("Tokens", text) for text in [_given_definition(run, "tokens")] if text],
        "rows": [
            {
                "layer": comparison.layer,
                "sae": f"group {layer_range(comparison.group)}" if kind == "group" else "own",
                "cells": [_cell(metric.key, number(row.get(metric.key))) for metric in shown],
            }
            for comparison, kind, row in rows
        ],
    }


def _cost(run: Artefacts) -> list[tuple[str, str, str]]:
    """Predicted FLOPs: (of what, per token, for the tokens of this run)."""
    if run.partition is None:
        return []
    by_groups = run.partition["by_groups"]
    tokens = _training_tokens(run)
    total = tokens[0] if len(set(tokens)) == 1 else math.nan
    rows = []
    for groups_total, label in (
        (run.partition["chosen"], f"One SAE per group, G = {run.partition['chosen']}"),
        (_n_layers(run), f"One SAE per layer, {_n_layers(run)} SAEs"),
    ):
        flops = number(by_groups.get(str(groups_total), {}).get("flops_per_token"))
        if math.isfinite(flops):
            all_tokens = si(flops * total, "FLOP") if math.isfinite(total) else MISSING
            rows.append((label, si(flops, "FLOP"), all_tokens))
    return rows


def _stages(run: Artefacts) -> list[tuple[str, str]]:
    """Measured wall-clock time of each stage."""
    return [
        (str(name), duration(seconds))
        for name, stage in run.stages.items()
        if isinstance(stage, Mapping) and math.isfinite(seconds := number(stage.get("seconds")))
    ]


def _excluded(run: Artefacts) -> list[tuple[str, str, str]]:
    """Counts of what was left out: (stage, what, how many tokens).

    Artefacts have them as `excluded_special_tokens` and the like.
    """
    return [
        (stage, key.removeprefix("excluded_").replace("_", " "), f"{count:,}")
        for stage, artefact in (
            ("distances", run.distances or {}),
            ("train", run.training),
            ("evaluate", run.reconstruction or {}),
        )
        for key, count in artefact.items()
        if key.startswith("excluded_") and isinstance(count, int)
    ]


def _excluding(run: Artefacts) -> list[str]:
    """The settings that leave tokens out."""
    tokens, training = run.section("tokens"), run.section("training")
    said = []
    if "exclude_special" in tokens:
        said.append(
            "Special tokens (BOS, EOS) are kept out of distances, training and metrics."
            if tokens["exclude_special"]
            else "Special tokens are treated as any others."
        )
    multiple = number(training.get("max_norm_multiple"))
    if math.isfinite(multiple):
        said.append(
            f"Tokens whose residual stream is longer, at any layer, than {multiple:g} times the "
            "layer's mean norm are kept out of training."
        )
    elif "max_norm_multiple" in training:
        said.append("No token is dropped for the length of its residual stream.")
    return said


def _provenance(run: Artefacts) -> list[tuple[str, str]]:
    return [
        (str(key).replace("_", " "), str(value))
        for key, value in run.section("provenance").items()
        if isinstance(value, str | int | float) and value != ""
    ]


def _given_definition(run: Artefacts, key: str) -> str | None:
    """The evaluation's own sentence about a key of its rows."""
    definitions = (run.reconstruction or {}).get("definitions")
    given = definitions.get(key) if isinstance(definitions, Mapping) else None
    return given if isinstance(given, str) else None


def _comparisons(run: Artefacts) -> list[LayerComparison]:
    if run.reconstruction is None:
        return []
    chosen = run.partition["chosen"] if run.partition is not None else None
    return compare(run.reconstruction["rows"], chosen)


def _chosen_entry(run: Artefacts) -> Mapping[str, Any]:
    partition = run.partition or {}
    entry: Mapping[str, Any] = partition["by_groups"][str(partition["chosen"])]
    return entry


def _n_layers(run: Artefacts) -> int:
    return len((run.partition or {"layers": ()})["layers"])


def _saving(run: Artefacts) -> float | None:
    """Share of the predicted FLOPs of one SAE per layer that the groups save."""
    if run.partition is None:
        return None
    per_layer = run.partition["by_groups"].get(str(_n_layers(run)), {})
    ours, theirs = (
        number(entry.get("flops_per_token")) for entry in (_chosen_entry(run), per_layer)
    )
    return 1 - ours / theirs if math.isfinite(ours) and theirs > 0 else None


def _training_tokens(run: Artefacts) -> list[float]:
    """Tokens that each SAE has seen, from its last line of metrics."""
    last: dict[str, float] = {}
    for line in run.metrics:
        last[str(line["sae"])] = max(last.get(str(line["sae"]), 0), number(line.get("tokens")))
    return [tokens for tokens in last.values() if math.isfinite(tokens)]


def _tokens_per_sae(run: Artefacts) -> str:
    tokens = _training_tokens(run)
    if not tokens:
        return ""
    low, high = min(tokens), max(tokens)
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def _n_saes(run: Artefacts) -> str:
    names = {str(line["sae"]) for line in run.metrics}
    baselines = sum(name.startswith("baseline/") for name in names)
    twins = sum(name.startswith("twin/") for name in names)
    counts = [f"{len(names) - baselines - twins} group"]
    counts += [
        f"{count} {kind}" for count, kind in ((baselines, "baseline"), (twins, "twin")) if count
    ]
    return " and ".join(counts) + " SAEs"


def _layers_in_means(comparisons: Sequence[LayerComparison]) -> str:
    with_both = sum(bool(comparison.groups and comparison.baseline) for comparison in comparisons)
    if not with_both:
        return "Means over all layers."
    if with_both == len(comparisons):
        return "Means and differences over all layers."
    return f"Means over the {with_both} layers that have both."


def _triple(key: str, values: tuple[float, float, float]) -> list[Cell]:
    ours, theirs, difference = values
    return [_cell(key, ours), _cell(key, theirs), _cell(key, difference, signed=True)]


def _cell(key: str, value: float, *, signed: bool = False) -> Cell:
    """A table cell: the text, and the value to sort by (empty where missing)."""
    return {
        "text": METRICS[key].format(value, signed=signed),
        "value": repr(value) if math.isfinite(value) else "",
    }


def _tile(label: str, value: str, note: str) -> Cell:
    return {"label": label, "value": value, "note": note}
