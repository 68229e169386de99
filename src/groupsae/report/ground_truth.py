"""What the page says of latents held against known attributes, as plain values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from groupsae.report.artefacts import Artefact, Artefacts
from groupsae.report.curves import Subject, subject_of
from groupsae.report.latent_links import latent_link
from groupsae.report.metrics import MISSING, number
from groupsae.report.wording import cell, visible

_ORDER = ("trained", "probe", "untrained")


class Detector(NamedTuple):
    """What was held against the attributes: a partition's latents, or a probe (no subject)."""

    source: str
    subject: Subject | None

    @property
    def is_baseline(self) -> bool:
        """Whether it is the latents of one SAE per layer."""
        return self.subject is not None and self.subject.is_baseline

    @property
    def groups_total(self) -> int | None:
        """G of a partition into groups; None for the baseline and a probe."""
        return None if self.subject is None or self.is_baseline else self.subject.groups_total

    @property
    def label(self) -> str:
        """The name in tables."""
        if self.subject is None:
            return "linear probe"
        return self.subject.label + ", untrained" * (self.source == "untrained")

    @property
    def order(self) -> tuple[int, float]:
        """Trained ones come first, then the probe, then what is untrained; by G each."""
        return _ORDER.index(self.source), self.subject.order if self.subject is not None else 0.0


def detector_of(row: Artefact) -> Detector:
    """Whose score a row is."""
    return Detector(row["source"], None if row["source"] == "probe" else subject_of(row))


def ground_truth_contents(run: Artefacts) -> dict[str, Any] | None:
    """The tables of ground truth; None where it was not measured."""
    truth = run.ground_truth
    if truth is None:
        return None
    return {
        "answer": _answer(run, truth),
        "means": [
            {
                "label": detector.label,
                "order": str(index),
                "cells": [
                    cell(number(row.get(key)), form)
                    for key, form in (("coverage", "{:.1%}"), ("auroc", "{:.3f}"), ("f1", "{:.3f}"))
                ],
            }
            for index, (detector, row) in enumerate(means(truth).items())
        ],
        "attributes": _attributes(run, truth),
        "known": [
            (visible(own["attribute"], 40), visible(own.get("definition") or MISSING, 300))
            for own in truth["attributes"]
        ],
        "tokens": cell(number(truth.get("tokens")), "{:,.0f}")["text"],
    }


def means(truth: Artefact) -> dict[Detector, Artefact]:
    """Each detector's means over layers, in order."""
    found = {detector_of(row): row for row in truth["means"]}
    return dict(sorted(found.items(), key=lambda item: item[0].order))


def by_layer(truth: Artefact, key: str) -> dict[Detector, dict[int, float]]:
    """Each detector's score at each layer, those without any left out."""
    found: dict[Detector, dict[int, float]] = {}
    for row in sorted(truth["coverage"], key=lambda row: int(row["layer"])):
        value = number(row.get(key))
        if math.isfinite(value):
            found.setdefault(detector_of(row), {})[row["layer"]] = value
    return dict(sorted(found.items(), key=lambda item: item[0].order))


def _answer(run: Artefacts, truth: Artefact) -> str:
    """The coverage of the chosen groups, the baseline, the floor and the ceiling."""
    chosen = run.partition["chosen"] if run.partition is not None else None
    said = []
    for detector, row in means(truth).items():
        coverage = number(row.get("coverage"))
        trained_baseline = detector.is_baseline and detector.source == "trained"
        if math.isfinite(coverage) and (
            detector.subject is None
            or trained_baseline
            or detector.groups_total == chosen is not None
        ):
            said.append(f"{detector.label}: {coverage:.1%}")
    if not said:
        return ""
    return (
        f"Share of the {len(truth['attributes'])} attributes that some latent tells with an AUROC "
        f"above 0.9, mean over layers. {'; '.join(said)}."
    )


def _attributes(run: Artefacts, truth: Artefact) -> list[dict[str, Any]]:
    """For every attribute and detector but untrained ones: the mean and the best layer."""
    found: dict[tuple[str, Detector], list[Artefact]] = {}
    for row in truth["rows"]:
        if row["source"] != "untrained" and math.isfinite(number(row.get("auroc"))):
            found.setdefault((row["attribute"], detector_of(row)), []).append(row)
    names = {own["attribute"]: index for index, own in enumerate(truth["attributes"])}
    ordered = sorted(
        found.items(), key=lambda item: (names.get(item[0][0], len(names)), item[0][1].order)
    )
    detectors = sorted({detector for _, detector in found}, key=lambda own: own.order)
    rows = []
    for (attribute, detector), own in ordered:
        best = max(own, key=lambda row: float(row["auroc"]))
        rows.append(
            {
                "attribute": visible(attribute, 40),
                "order": str(names.get(attribute, len(names))),
                "detector": detector.label,
                "detector_order": str(detectors.index(detector)),
                "mean": cell(_mean(row["auroc"] for row in own), "{:.3f}"),
                "best": cell(number(best["auroc"]), "{:.3f}"),
                "f1": cell(_mean(number(row.get("f1")) for row in own), "{:.3f}"),
                "layer": best["layer"],
                "latent": _latent(run, detector, best),
            }
        )
    return rows


def _latent(run: Artefacts, detector: Detector, row: Mapping[str, Any]) -> dict[str, str]:
    if row.get("latent") is None:
        return {"text": MISSING, "value": "", "link": ""}
    link = ""
    if detector.subject is not None:
        link = latent_link(run, *detector.subject, row["layer"], row["latent"])
    return {"text": str(row["latent"]), "value": str(row["latent"]), "link": link}


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan
