"""Which figures of interpretation the report shows, with their captions and alternative texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from groupsae.report import interpretation_figures as figures
from groupsae.report.artefacts import Artefact, Artefacts
from groupsae.report.depths import deep_groups, profiled_totals, shown_total
from groupsae.report.ground_truth import by_layer, means
from groupsae.report.illustration import Illustration
from groupsae.report.interpretation import HUMAN, MODEL, Measure
from groupsae.report.interpretation_figures import Point
from groupsae.report.metrics import number
from groupsae.report.wording import layer_range

_SHARE = (
    "Share of firings",
    "Of all tokens on which a latent fires, counted at each member layer on the same text, those "
    "at one layer. A latent that fires alike at all layers is pale throughout.",
)
_ORDER = (
    "Depth",
    "Latents are ordered by the mean of the member layers, weighted by how often the latent fires "
    "there. Latents that fire at no layer are left out{silent}.",
)
_TRUTHS = (
    (
        "Coverage",
        "Share of the attributes of the text's words, known from its generator, that some latent "
        "tells with an AUROC above 0.9.",
    ),
    (
        "AUROC",
        "The probability that a token with the attribute has a larger activation of the latent "
        "than one without; 0.5 is chance. The best latent is found on one half of the text and "
        "judged on the other; the mean is over the attributes.",
    ),
    (
        "Floor and ceiling",
        "Untrained: SAEs of the same shape with random weights. Linear probe: the residual "
        "stream's own best direction, by logistic regression, one for each attribute.",
    ),
)
_MEASURES = {
    "Human score": "Mean over latents of the share of people's marks that are “interpretable”, "
    "given without knowing whose the latent is. Bars: 95% Wilson intervals, a "
    "trial for each latent.",
    "Detection": "A language model tells from the explanation in which contexts the latent is "
    "active; mean over latents of the balanced accuracy. Bars: 95% intervals of the mean.",
    "Fuzzing": "A language model tells from the explanation in which contexts the tokens that "
    "are marked are those on which the latent is active; otherwise as detection.",
}
_CHANCE = {measure.label: 0.5 for measure in MODEL}


def interpretation_illustrations(run: Artefacts) -> list[Illustration]:
    """The figures that the interpretation's artefacts allow, in the order of the page."""
    found = _depths(run)
    if run.ground_truth is not None:
        found += _ground_truth(run, run.ground_truth)
    return found + _scores(run)


def _depths(run: Artefacts) -> list[Illustration]:
    """The groups of the shown G first, then those of every other."""
    found = []
    totals = profiled_totals(run)
    if totals:
        shown = shown_total(run)
        ordered = [shown, *(total for total in totals if total != shown)]
        for total in ordered:
            profiles = _profiles(run, total)
            if profiles:
                found.append(_depth(profiles, total, first=total == shown))
    return found


def _profiles(run: Artefacts, total: int) -> list[Artefact]:
    profiles = (run.depth or {"profiles": {}})["profiles"]
    own = [profiles[name] for name in deep_groups(run, total) if name in profiles]
    return [profile for profile in own if profile["share"]]


def _depth(profiles: Sequence[Artefact], total: int, *, first: bool) -> Illustration:
    groups = "; ".join(layer_range(profile["layers"]) for profile in profiles)
    silent = [number(profile.get("silent")) for profile in profiles]
    counted = (
        f" ({', '.join(f'{count:,.0f}' for count in silent)})"
        if all(map(math.isfinite, silent))
        else ""
    )
    return Illustration(
        name="depth_heat_maps" if first else f"depth_heat_maps_of_{total}",
        title=f"At which layers a group's latents fire, G = {total}",
        draw=lambda: figures.depth_heat_maps(profiles),
        alt=f"Heat maps of the share of each latent's firings at each member layer, one panel for "
        f"each of the groups {groups}, with the latents ordered by depth.",
        caption="A panel for each group of several layers. A row is a latent, or the mean of "
        "neighbouring ones where there are many; the shallowest is below. Dark: all of its firings "
        "are at that layer.",
        definitions=(_SHARE, (_ORDER[0], _ORDER[1].format(silent=counted)))
        if first
        else (("Terms", "As in the figure of the groups that were chosen."),),
    )


def _ground_truth(run: Artefacts, truth: Artefact) -> list[Illustration]:
    chosen = run.partition["chosen"] if run.partition is not None else None
    by_measure = {key: own for key in figures.TRUTHS if (own := by_layer(truth, key))}
    labels = list(dict.fromkeys(own.label for found in by_measure.values() for own in found))
    found = []
    if by_measure:
        found.append(
            Illustration(
                name="ground_truth_per_layer",
                title="Known attributes that latents tell, layer by layer",
                draw=lambda: figures.ground_truth_per_layer(by_measure, chosen),
                alt="Coverage and mean AUROC of known attributes at each layer, for "
                f"{', '.join(labels)}.",
                caption="Blue: one SAE per group, light for few groups and dark for many. Black: "
                "one SAE per layer. Orange: a linear probe, the ceiling. Grey: untrained SAEs, the "
                "floor, one line for each partition.",
                definitions=_TRUTHS,
            )
        )
    totals = {
        own.groups_total
        for own in means(truth)
        if own.source == "trained" and own.groups_total is not None
    }
    if len(totals) > 1:
        found.append(
            Illustration(
                name="ground_truth_by_groups",
                title="Known attributes against the number of groups",
                draw=lambda: figures.ground_truth_by_groups(means(truth), chosen),
                alt="Coverage and mean AUROC, means over layers, for G = "
                f"{', '.join(map(str, sorted(totals)))}, with one SAE per layer, untrained SAEs "
                "and a linear probe.",
                caption="Means over the layers. The chosen G has the largest mark.",
                definitions=(("Terms", "As in the figure before."),),
            )
        )
    return found


def _scores(run: Artefacts) -> list[Illustration]:
    by_measure = {
        measure.label: points
        for artefact, measures in ((run.annotation, HUMAN), (run.explanation, MODEL))
        for measure in measures
        if artefact is not None and (points := _points(run, artefact, measure))
    }
    if not by_measure:
        return []
    total = _scored_total(run)
    names = " and ".join(by_measure).lower()
    return [
        Illustration(
            name="interpretability_scores",
            title=f"How interpretable latents are, layer by layer, G = {total}",
            draw=partial(
                figures.scores_per_layer,
                by_measure,
                {label: level for label, level in _CHANCE.items() if label in by_measure},
            ),
            alt=f"{names.capitalize()} of each layer's latents with 95% intervals, for one SAE per "
            "group and one SAE per layer.",
            caption="One SAE per group (blue) against one SAE per layer (grey), side by side at "
            "each layer. Lines join layers that share an SAE; shaded and white bands are the "
            "groups.",
            definitions=tuple((label, _MEASURES[label]) for label in by_measure),
        )
    ]


def _scored_total(run: Artefacts) -> int | None:
    """The chosen G where it was scored, or else the fewest groups."""
    totals = {
        row["groups_total"]
        for artefact in (run.annotation, run.explanation)
        for row in (artefact or {"rows": []})["rows"]
        if row["partition"] == "groups"
    }
    chosen = run.partition["chosen"] if run.partition is not None else None
    return chosen if chosen in totals else min(totals, default=None)


def _points(run: Artefacts, scores: Artefact, measure: Measure) -> dict[str, list[Point]]:
    """The measured layers of the shown groups and of the baseline; without an interval a dot."""
    total = _scored_total(run)
    found: dict[str, list[Point]] = {}
    for row in scores["rows"]:
        value, low, high = (number(row.get(key)) for key in measure[1:])
        shown = row["partition"] == "baseline" or row["groups_total"] == total
        if shown and row.get("layer") is not None and math.isfinite(value):
            interval = (low, high) if math.isfinite(low + high) else (value, value)
            point = Point(row["layer"], value, *interval, str(row.get("sae")))
            found.setdefault(row["partition"], []).append(point)
    return {name: sorted(points) for name, points in found.items()}
