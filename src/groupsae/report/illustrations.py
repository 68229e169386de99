"""Which figures a run's report shows, each with its caption, definitions and alternative text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from groupsae.report import figures
from groupsae.report.artefacts import Artefacts
from groupsae.report.circuit_illustrations import circuit_illustrations
from groupsae.report.illustration import Illustration
from groupsae.report.interpretation_illustrations import interpretation_illustrations
from groupsae.report.metrics import METRICS, evaluated_totals, number
from groupsae.report.similarity_illustrations import similarity_illustrations
from groupsae.report.wording import (
    choice,
    chosen_groups,
    layer_range,
)

PER_LAYER = ("ce_loss_score", "r2", "l2", "l0")


def illustrations(run: Artefacts) -> list[Illustration]:
    """The figures that the run's artefacts allow, in the order of the page."""
    found: list[Illustration] = []
    if run.distances is not None:
        found += _of_distances(run, run.distances)
    if run.partition is not None and figures.has_measures(run.partition):
        found.append(_of_partition(run.partition))
    if run.metrics:
        found.append(_of_training(run))
    if run.reconstruction is not None and run.reconstruction["rows"]:
        found += _of_reconstruction(run, run.reconstruction)
    return (
        found
        + circuit_illustrations(run)
        + similarity_illustrations(run)
        + interpretation_illustrations(run)
    )


_DEFINITIONS = {
    "angular": "Mean over tokens of arccos(cosine of the two residual streams) / π: 0 for the same "
    "direction, 0.5 for orthogonal, 1 for opposite",
    "cka": "CKA is the average of unbiased HSIC between the two residual streams over minibatches "
    "of tokens, over the geometric mean of each with itself, negative ones taken as 0. The "
    "distance is 0 for streams that are the same but for a rotation and one scale",
    "svcca": "SVCCA is the mean canonical correlation between the principal directions that hold "
    "99% of each residual stream's variance. The distance is 0 where an invertible linear map "
    "takes the directions of the one to those of the other",
}
_METHODS = {
    "linkage": "agglomerative clustering with complete linkage, joining neighbours only",
    "optimal": "dynamic programming over contiguous cuts (smallest largest diameter first)",
    "even": "contiguous groups of equal length, without regard to similarity",
    "explicit": "the groups that the config names",
}


def _of_distances(run: Artefacts, distances: Mapping[str, Any]) -> list[Illustration]:
    layers, partition = distances["layers"], run.partition
    similarity = distances.get("similarity", "angular")
    quantity = figures.quantity(distances)
    name = quantity[0].upper() + quantity[1:]
    groups = [layer_range(group) for group in chosen_groups(partition)]
    errors = [number(entry) for row in distances.get("standard_error") or [] for entry in row]
    largest_error = max((error for error in errors if math.isfinite(error)), default=math.nan)
    tokens = number(distances.get("tokens"))
    if distances.get("center") is None:
        centred = "the file does not say whether means were subtracted"
    else:
        centred = (
            "each layer's mean was subtracted first"
            if distances["center"]
            else "no mean was subtracted"
        )
    heatmap = Illustration(
        name="distance_heatmap",
        title=f"{name} between layers",
        draw=lambda: figures.distance_heatmap(distances, partition),
        alt=f"Heat map of the {quantity} between the {len(layers)} layers "
        f"{layer_range(layers)}." + (f" Outlined groups: {'; '.join(groups)}." if groups else ""),
        caption="Each cell compares the residual streams of two layers; pale is similar."
        + (" Blue squares are the chosen groups." if groups else ""),
        definitions=(
            (
                name,
                f"{_DEFINITIONS.get(similarity, 'Not known to this version')}; {centred}"
                + (f"; {tokens:,.0f} tokens" if math.isfinite(tokens) else "")
                + (
                    f"; the largest standard error of an entry is {largest_error:.1g}"
                    if math.isfinite(largest_error)
                    else ""
                )
                + ".",
            ),
        ),
    )
    covered = [layer for layer in partition["layers"] if layer in layers] if partition else layers
    if len(covered) < 2:
        return [heatmap]
    tree = Illustration(
        name="dendrogram",
        title="Linkage of the layers",
        draw=lambda: figures.dendrogram(distances, partition),
        alt="Dendrogram of contiguous complete linkage over the layers"
        + (f", with the {len(groups)} chosen groups as bars below the leaves." if groups else "."),
        caption="Contiguous complete linkage."
        + (
            " Bars below the leaves are the chosen groups; the dashed line, where there is one, is "
            "the cut that gives them."
            if groups
            else ""
        ),
        definitions=(
            (
                "Height of a join",
                f"The largest {quantity} between two layers inside the group that the join "
                "makes. Only neighbouring groups join, the pair with the lowest join first.",
            ),
        ),
    )
    return [heatmap, tree]


def _of_partition(partition: Mapping[str, Any]) -> Illustration:
    method = str(partition.get("method"))
    return Illustration(
        name="amad_and_cost",
        title="AMAD and predicted cost",
        draw=lambda: figures.amad_and_cost(partition),
        alt=f"AMAD and predicted FLOPs per token against the number of groups; G = "
        f"{partition['chosen']} is marked.",
        caption=f"The choice, G = {partition['chosen']}: {choice(partition)}. "
        f"Method: {_METHODS.get(method, method)}.",
        definitions=(
            (
                "AMAD(G)",
                "Average maximum (angular) distance: the mean over the G groups of the largest "
                "distance between two layers of the group. A group of one layer counts 0.",
            ),
            (
                "Predicted cost",
                "C(G) = A + T·G FLOPs per token, with A = 24·d²·L + 4·L·c·d for the host model's "
                "forward and T = 10·d·d_sae for the step of one SAE (d = d_model, L layers, "
                "c tokens of context). A model of the cost, not a measurement.",
            ),
        ),
    )


def _of_training(run: Artefacts) -> Illustration:
    baseline = any(figures.is_of_a_layer(str(line["sae"])) for line in run.metrics)
    dead_after = number(run.section("training").get("dead_after_tokens"))
    dead = "Share of the latents that were silent for longer than the config allows."
    if math.isfinite(dead_after):
        dead = f"Share of the latents that were silent for the last {dead_after:,.0f} tokens."
        if all(number(line.get("tokens")) < dead_after for line in run.metrics):
            dead += " Training has not been that long, so none counts as dead yet."
    return Illustration(
        name="training_curves",
        title="Training",
        draw=lambda: figures.training_curves(run.metrics),
        alt="Fraction of variance unexplained and fraction of dead latents of every SAE against "
        "the training tokens.",
        caption="Blue: one SAE per group, light for shallow and dark for deep groups."
        + (" Grey: one SAE per layer, on the same tokens." if baseline else ""),
        definitions=(
            (
                "FVU",
                "Fraction of variance unexplained in a training batch: sum of squared errors over "
                "sum of squares about the batch mean. A group's batch mixes its member layers, one "
                "drawn for each token.",
            ),
            ("Dead latents", dead),
        ),
    )


def _of_reconstruction(run: Artefacts, reconstruction: Mapping[str, Any]) -> list[Illustration]:
    rows = reconstruction["rows"]
    chosen = run.partition["chosen"] if run.partition is not None else None
    baseline = any(row["partition"] == "baseline" for row in rows)
    against = " against one SAE per layer (grey)" if baseline else ""
    found = [
        Illustration(
            name="per_layer",
            title="Reconstruction, layer by layer",
            draw=lambda: figures.per_layer(rows, PER_LAYER, chosen),
            alt="CE-loss score, R², L2 and L0 of each layer"
            + (", with one SAE per group and one SAE per layer." if baseline else "."),
            caption=f"One SAE per group (blue){against}, each judged on every member layer. "
            "Shaded and white bands are the groups. The vertical axes do not begin at 0.",
            definitions=tuple((METRICS[key].label, METRICS[key].definition) for key in PER_LAYER),
        )
    ]
    totals = evaluated_totals(rows)
    if len(totals) > 1:
        found.append(_of_several_g(rows, totals, chosen))
    if any(figures.histogram(row) for row in rows):
        found.append(
            Illustration(
                name="latent_density",
                title="How often latents are active",
                draw=lambda: figures.latent_density(rows, chosen),
                alt="One histogram a layer of the share of tokens on which a latent is active.",
                caption="Filled: the group's SAE on this layer."
                + (" Outline: the layer's own SAE." if baseline else "")
                + " In per cent of the latents that the histogram counts.",
                definitions=(
                    (
                        "Latent density",
                        "Share of the evaluated tokens of the layer on which a latent is "
                        "active; log10, so −2 is one token in a hundred. Latents that are never "
                        "active have no place on this axis: the table of every metric has their "
                        "share, as dead.",
                    ),
                ),
            )
        )
    return found


def _of_several_g(
    rows: Sequence[Mapping[str, Any]], totals: Sequence[int], chosen: int | None
) -> Illustration:
    baseline = any(row["partition"] == "baseline" for row in rows)
    return Illustration(
        name="by_number_of_groups",
        title="Reconstruction against the number of groups",
        draw=lambda: figures.by_number_of_groups(rows, chosen),
        alt="Mean CE-loss score and R² over layers for G = "
        f"{', '.join(map(str, totals))}" + (", and one SAE per layer." if baseline else "."),
        caption="Means over the layers."
        + (" Dashed: one SAE per layer, on the same layers." if baseline else "")
        + " The vertical axes do not begin at 0.",
        definitions=tuple(
            (METRICS[key].label, METRICS[key].definition) for key in ("ce_loss_score", "r2")
        ),
    )
