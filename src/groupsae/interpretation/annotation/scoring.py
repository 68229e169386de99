"""The Human Interpretability Score of annotated sheets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from groupsae.files import write_json
from groupsae.interpretation.annotation.key import KEY_FILE, Key, KeyItem, read_key
from groupsae.interpretation.annotation.marks import MARKS, Annotation, read_annotations
from groupsae.interpretation.cards import Shown

SCORES_FILE = "scores.json"

DEFINITIONS = {
    "score": "Human Interpretability Score (Group-SAE v1, section 6): the mean over latents of the "
    "share of a latent's marks that are 'interpretable'; with one annotator, or where all marked "
    "the same latents, the share of all marks. 'unsure' counts as not interpretable. None where "
    "nothing is marked",
    "low, high": "Wilson's 95% interval for a share of as many trials as latents were marked. "
    "Marks of one latent by several annotators are one trial: it is their share that counts, so "
    "that there are no ties to break; the interval is then rather too wide than too narrow",
    "latents": "latents that somebody marked, of those drawn at the layer; a latent that was drawn "
    "at several layers counts at each",
    "interpretable, not, unsure": "marks, of all annotators",
    "layer": "at which the latents' contexts were shown; null: all layers together",
    "group": "the layers that share the SAE",
    "agreement": "Cohen's kappa of two annotators, Fleiss' kappa of more, on the items that all "
    "marked; 'unsure' is a category of its own. None where there is nothing to compare: one "
    "annotator, no item in common, or one and the same mark everywhere",
    "marked": "items that the annotator marked",
}


def score_files(folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Score annotations of the sheet in `folder`, and write `folder / "scores.json"`.

    Raises:
        InputError: As :func:`score`, and if the folder cannot be written.
    """
    scores = score(folder / KEY_FILE, files)
    write_json(folder / SCORES_FILE, scores)
    return scores


def score(key: Path, files: Sequence[Path]) -> dict[str, Any]:
    """The Human Interpretability Score of each partition, by layer, with how far annotators agree.

    Args:
        key: The sheet's `key.json`.
        files: What annotators exported from its page. Untrusted.

    Returns:
        "definitions", "of", "sheet", "annotators" (name, marked), "agreement" (name, value,
        items), "rows" (one per partition and layer, and one with layer None over all layers) and
        "latents" (score and notes of each item that has any). Fit for JSON.

    Raises:
        InputError: If the key is missing or damaged, there is no file, or a file is not an
            annotation of this sheet, marks nothing, or is of an annotator whom another file has.
    """
    read = read_key(key)
    annotations = read_annotations(files, read)
    judged = Judged(read, annotations)
    return {
        "definitions": DEFINITIONS,
        "of": read.of,
        "sheet": read.sheet,
        "annotators": [
            {"name": annotation.annotator, "marked": len(annotation.marked)}
            for annotation in annotations
        ],
        "agreement": agreement(annotations),
        "rows": [
            judged.row(shown, layer)
            for shown in read.shown
            for layer in (*sorted(shown.saes), None)
        ],
        "latents": judged.latents(),
    }


class Judged:
    """All annotators' marks and notes, by latent."""

    def __init__(self, key: Key, annotations: Sequence[Annotation]) -> None:
        self._key, self._annotations = key, annotations

    @cached_property
    def _marks(self) -> dict[str, Counter[str]]:
        """How often each item was marked as what; items that nobody marked are left out."""
        found: dict[str, Counter[str]] = {}
        for annotation in self._annotations:
            for item, mark in annotation.marked.items():
                found.setdefault(item, Counter())[mark] += 1
        return found

    def row(self, shown: Shown, layer: int | None) -> dict[str, Any]:
        """The score of one partition at a layer, or over all layers."""
        layers = sorted(shown.saes) if layer is None else [layer]
        entries = {(shown.saes[each], each) for each in layers}
        own = [
            marks
            for item, marks in self._marks.items()
            if (self._key.items[item].sae, self._key.items[item].layer) in entries
        ]
        total = sum(own, Counter[str]())
        value, low, high = _score(own)
        sae = None if layer is None else shown.saes[layer]
        return {
            "partition": shown.partition,
            "groups_total": shown.groups_total,
            "group": None if sae is None else sorted(i for i, s in shown.saes.items() if s == sae),
            "layer": layer,
            "sae": sae,
            "latents": len(own),
            **{mark: total[mark] for mark in MARKS},
            "score": value,
            "low": low,
            "high": high,
        }

    def latents(self) -> list[dict[str, Any]]:
        """The score and the notes of each item that has any, by SAE, layer and latent."""
        notes: dict[str, list[str]] = {}
        for annotation in self._annotations:
            for item, note in annotation.notes.items():
                notes.setdefault(item, []).append(note)
        judged = {item: self._key.items[item] for item in {*self._marks, *notes}}
        return [
            {
                "sae": at.sae,
                "layer": at.layer,
                "latent": at.latent,
                "score": _share(self._marks[item]) if item in self._marks else None,
                "notes": notes.get(item, []),
            }
            for item, at in sorted(judged.items(), key=lambda pair: _place(pair[1]))
        ]


def agreement(annotations: Sequence[Annotation]) -> dict[str, Any]:
    """Cohen's or Fleiss' kappa; see :data:`DEFINITIONS`."""
    from statsmodels.stats.inter_rater import cohens_kappa, fleiss_kappa  # slow to import

    if len(annotations) < 2:
        return {"name": None, "value": None, "items": 0}
    common = set.intersection(*(set(annotation.marked) for annotation in annotations))
    marks = np.array(
        [[MARKS.index(each.marked[item]) for each in annotations] for item in sorted(common)],
        dtype=int,
    )
    value = None
    if len(annotations) == 2:
        name = "Cohen's kappa"
        if len(np.unique(marks)) > 1:
            table = np.zeros((len(MARKS), len(MARKS)))
            np.add.at(table, tuple(marks.T), 1)
            value = float(cohens_kappa(table, return_results=False))
    else:
        name = "Fleiss' kappa"
        if len(np.unique(marks)) > 1:
            counts = np.stack([(marks == i).sum(1) for i in range(len(MARKS))], axis=1)
            value = float(fleiss_kappa(counts))
    return {"name": name, "value": value, "items": len(common)}


def _score(marks: Sequence[Counter[str]]) -> tuple[float | None, float | None, float | None]:
    """The mean share over latents, and Wilson's interval for as many trials."""
    from statsmodels.stats.proportion import proportion_confint  # slow to import

    if not marks:
        return None, None, None
    hits = sum(_share(each) for each in marks)
    low, high = proportion_confint(hits, len(marks), alpha=0.05, method="wilson")
    return hits / len(marks), max(float(low), 0.0), min(float(high), 1.0)


def _share(marks: Counter[str]) -> float:
    return marks["interpretable"] / marks.total()


def _place(item: KeyItem) -> tuple[str, int, int]:
    return item.sae, item.layer, item.latent
