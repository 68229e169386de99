"""Which figures of similarity the report shows, with their captions and alternative texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from groupsae.report import similarity_figures as figures
from groupsae.report.artefacts import Artefact, Artefacts
from groupsae.report.illustration import Illustration
from groupsae.report.metrics import number
from groupsae.report.similarity import rows_of, shown_total, yardsticks

_DEFINITIONS = {
    "mmcs": (
        "MMCS",
        "Mean over the latents of one SAE of the largest cosine of a latent's decoder direction "
        "with one of the other SAE.",
    ),
    "concordance": (
        "Concordance",
        "Mean over the latents of the layer's own SAE that fire at all of the largest Jaccard "
        "index of the tokens that it fires on with those of a latent of the group's SAE{tokens}.",
    ),
    "yardstick": (
        "Two seeds, one layer",
        "The same measure between two SAEs of the layer that were trained from different seeds: "
        "what “the same dictionary” gives.",
    ),
}


def similarity_illustrations(run: Artefacts) -> list[Illustration]:
    """The figures that `evaluation/similarity.json` allows, in the order of the page."""
    similarity = run.similarity
    if similarity is None:
        return []
    shown = shown_total(run)
    rows = rows_of(similarity, shown)
    found: list[Illustration] = []
    if any(math.isfinite(number(row.get("mmcs_group_to_layer"))) for row in rows):
        found.append(_per_layer(similarity, rows, shown))
    if any(figures.has_maxima(row) for row in rows):
        found.append(_maxima(similarity, rows, shown))
    found += _matrices(run, similarity, shown)
    return found


def _per_layer(
    similarity: Artefact, rows: Sequence[Mapping[str, Any]], shown: int | None
) -> Illustration:
    seeds = yardsticks(similarity)
    return Illustration(
        name="similarity_per_layer",
        title=f"How alike the dictionaries are, layer by layer, G = {shown}",
        draw=lambda: figures.similarity_per_layer(rows, seeds),
        alt="MMCS of each layer's own SAE and its group's, both ways, and the concordance of their "
        "latents" + (", with what two seeds of one layer have." if seeds else "."),
        caption="Group → layer: for every latent of the group's SAE the most similar one of the "
        "layer's own. Layer → group: the other way round. Shaded and white bands are the groups."
        + (" Grey: two SAEs of the same layer from different seeds." if seeds else ""),
        definitions=(
            _definition("mmcs", similarity),
            _definition("concordance", similarity),
            *([_definition("yardstick", similarity)] if seeds else []),
        ),
    )


def _maxima(
    similarity: Artefact, rows: Sequence[Mapping[str, Any]], shown: int | None
) -> Illustration:
    seeds = yardsticks(similarity)
    return Illustration(
        name="similarity_maxima",
        title=f"Distribution of the largest cosines, G = {shown}",
        draw=lambda: figures.maxima(rows, seeds),
        alt="One histogram a layer of the largest cosine that a latent's decoder direction has "
        "with one of the other SAE.",
        caption="Filled: every latent of the group's SAE against the layer's own. Orange: every "
        "latent of the layer's own SAE against the group's."
        + (" Dashed: two SAEs of the same layer from different seeds." if seeds else ""),
        definitions=(
            (
                "Largest cosine",
                "Of a latent's decoder direction with any of the other SAE; MMCS is the mean. The "
                "first bin holds what is below it, too.",
            ),
        ),
    )


def _matrices(run: Artefacts, similarity: Artefact, shown: int | None) -> list[Illustration]:
    layers = similarity["layers"]
    groups_of = {
        int(total): entry["groups"]
        for total, entry in (run.partition or {"by_groups": {}})["by_groups"].items()
    }
    by_groups = {
        int(total): {
            key: matrices[key] for key in figures.MEASURES if _is_measured(matrices.get(key))
        }
        for total, matrices in similarity["matrices"].items()
    }
    found = []
    own = by_groups.get(shown, {}) if shown is not None else {}
    if own and shown is not None:
        names = " and ".join(figures.MEASURES[key] for key in own)
        found.append(
            Illustration(
                name="similarity_matrices",
                title=f"Every layer's own SAE against every group's, G = {shown}",
                draw=lambda: figures.matrices(layers, own, groups_of.get(shown, ())),
                alt=f"{names} of the {len(layers)} layers' own SAEs with the SAEs of all layers' "
                "groups, as heat maps.",
                caption="Row: a layer's own SAE. Column: the SAE of a layer's group, so that "
                "columns of one group have the same MMCS (group → layer). Dark is alike. Orange "
                "squares are the groups.",
                definitions=tuple(_definition(key, similarity) for key in own),
            )
        )
    for key, label in figures.MEASURES.items():
        every = {total: found_of[key] for total, found_of in by_groups.items() if key in found_of}
        if len(every) > 1:
            found.append(
                Illustration(
                    name=f"similarity_{key}_of_every_g",
                    title=f"{label} for every number of groups",
                    draw=partial(figures.matrices_of_every_g, layers, every, groups_of, key),
                    alt=f"Small heat maps of {label} between layers' own SAEs and groups' SAEs for "
                    f"G = {', '.join(map(str, sorted(every)))}.",
                    caption="As the figure before, on one colour scale.",
                    definitions=(_definition(key, similarity),),
                )
            )
    return found


def _definition(key: str, similarity: Artefact) -> tuple[str, str]:
    term, meaning = _DEFINITIONS[key]
    tokens = number(similarity.get("tokens"))
    measured = f", on the same {tokens:,.0f} tokens" if math.isfinite(tokens) else ""
    return term, meaning.format(tokens=measured) if key == "concordance" else meaning


def _is_measured(matrix: object) -> bool:
    return isinstance(matrix, list) and any(
        math.isfinite(number(entry)) for row in matrix for entry in row
    )
