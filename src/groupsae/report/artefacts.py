"""The artefacts of a run directory as plain dicts; what is missing is None or empty."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from groupsae.errors import InputError

Artefact = Mapping[str, Any]

_FILES = (
    "config.yaml",
    "distances.json",
    "partition.json",
    "metrics.jsonl",
    "evaluation/reconstruction.json",
    "evaluation/circuits",
    "evaluation/similarity.json",
    "interpretation/depth.json",
)

_BROWSER = "interpretation/browser/index.html"


@dataclass(frozen=True)
class Artefacts:
    """What lies in a run directory. Nothing in it is trusted: it may come from elsewhere.

    Attributes:
        browser: Where the pages of the latents begin, relative to the run directory.
    """

    config_text: str
    config: Artefact
    distances: Artefact | None
    partition: Artefact | None
    metrics: Sequence[Artefact]
    saes: Sequence[Artefact]
    training: Artefact
    reconstruction: Artefact | None
    circuits: Sequence[Artefact]
    similarity: Artefact | None
    depth: Artefact | None
    ground_truth: Artefact | None
    annotation: Artefact | None
    explanation: Artefact | None
    browser: str | None
    stages: Artefact

    def section(self, name: str) -> Artefact:
        """A section of the config; empty where it has none."""
        section = self.config.get(name)
        return section if isinstance(section, Mapping) else {}


def read_run(directory: Path) -> Artefacts:
    """Read every artefact that is there and up to date.

    Where `stages.json` is there but does not have a stage, what the stage wrote belongs to an
    earlier config and is passed over, and so are scores of another interpretation than the one that
    is there. An unfinished training's metrics are shown all the same.

    Raises:
        InputError: If `directory` is no run directory, or an artefact is broken; it names the file
            and what is wrong with it.
    """
    if not directory.is_dir():
        raise InputError(f"run directory {directory} does not exist; `groupsae run` makes one")
    if not any((directory / name).exists() for name in _FILES):
        raise InputError(
            f"{directory} is no run directory: it holds none of {', '.join(_FILES)}; "
            "give the folder that `groupsae run` wrote"
        )
    config_text = _text(directory / "config.yaml") or ""
    stages = _json(directory / "stages.json")

    def current(stage: str) -> bool:
        return stages is None or stage in stages

    interpretation, interpreted = directory / "interpretation", current("interpret")

    def scores(by: str) -> Artefact | None:
        found = _scores(interpretation / by / "scores.json") if interpreted else None
        return found if found is not None and _is_of(found, stages) else None

    return Artefacts(
        config_text=config_text,
        config=_parse_config(directory / "config.yaml", config_text),
        distances=_distances(directory / "distances.json") if current("distances") else None,
        partition=_partition(directory / "partition.json") if current("groups") else None,
        metrics=_metrics(directory / "metrics.jsonl"),
        saes=_saes(directory),
        training=(_json(directory / "training.json") or {}) if current("train") else {},
        reconstruction=_reconstruction(directory / "evaluation" / "reconstruction.json")
        if current("evaluate")
        else None,
        circuits=_circuits(directory / "evaluation" / "circuits") if current("circuits") else [],
        similarity=_similarity(directory / "evaluation" / "similarity.json")
        if current("similarity")
        else None,
        depth=_depth(interpretation / "depth.json") if interpreted else None,
        ground_truth=_ground_truth(interpretation / "ground_truth.json") if interpreted else None,
        annotation=scores("annotation"),
        explanation=scores("explanation"),
        browser=_BROWSER if interpreted and (directory / _BROWSER).is_file() else None,
        stages=stages or {},
    )


def _distances(path: Path) -> Artefact | None:
    distances = _json(path)
    if distances is not None:
        n_layers = len(_layers(distances, "layers", path))
        _square(distances, "matrix", n_layers, path)
    return distances


def _partition(path: Path) -> Artefact | None:
    partition = _json(path)
    if partition is not None:
        _layers(partition, "layers", path)
        by_groups = _need(partition, "by_groups", dict, path)
        chosen = _need(partition, "chosen", int, path)
        if str(chosen) not in by_groups:
            raise _broken(path, f"'chosen' is {chosen}, which 'by_groups' lacks")
        for groups_total, entry in by_groups.items():
            if not groups_total.isdigit() or not isinstance(entry, dict):
                raise _broken(path, f"'by_groups' has the entry {groups_total!r}; a G is wanted")
            for group in _need(entry, "groups", list, path):
                _layers({"groups": group}, "groups", path)
    return partition


def _reconstruction(path: Path) -> Artefact | None:
    reconstruction = _json(path)
    if reconstruction is not None:
        for row in _need(reconstruction, "rows", list, path):
            if not isinstance(row, dict):
                raise _broken(path, "a row is no object")
            _need(row, "layer", int, path)
            _need(row, "partition", str, path)
            if "group" in row:
                _layers(row, "group", path)
    return reconstruction


def _circuits(folder: Path) -> list[Artefact]:
    """Each task's artefact, with the "file" that it lies in, by that name."""
    found: list[Artefact] = []
    for path in sorted(folder.glob("*.json")):
        task = _json(path) or {}
        _need(task, "task", str, path)
        if not isinstance(task.get("refused"), str | None):
            raise _broken(path, f"'refused' is {task['refused']!r}; null or the reason is wanted")
        for key in ("model", "examples", "lengths", "dropped", "definitions"):
            _optional(task, key, dict, path)
        for curve in _objects(task, "curves", path):
            _need_subject(curve, path)
            for key in ("latents", "selection", "score"):
                _need(curve, key, str, path)
            if not isinstance(curve.get("error_nodes"), bool):
                raise _broken(path, "'error_nodes' of a curve is neither true nor false")
            if len(_need(curve, "n", list, path)) != len(_need(curve, "value", list, path)):
                raise _broken(path, "a curve's 'n' and 'value' differ in length")
            _optional(curve, "flag", str, path)
        for latent in _objects(task, "strongest", path):
            _need_subject(latent, path)
            _need(latent, "layer", int, path)
            _need(latent, "latent", int, path)
        for picture in _objects(task, "picture", path):
            _need_subject(picture, path)
            tokens = _need(picture, "tokens", list, path)
            if not tokens or not all(isinstance(token, str) for token in tokens):
                raise _broken(path, f"a picture's 'tokens' are {tokens!r}; texts are wanted")
            for cell in _objects(picture, "cells", path):
                _need(cell, "layer", int, path)
                _need(cell, "latent", int, path)
                if not 0 <= _need(cell, "position", int, path) < len(tokens):
                    raise _broken(path, f"a cell is at position {cell['position']}, past 'tokens'")
        found.append({**task, "file": path.stem})
    return found


def _similarity(path: Path) -> Artefact | None:
    similarity = _json(path)
    if similarity is not None:
        n_layers = len(_layers(similarity, "layers", path))
        _optional(similarity, "definitions", dict, path)
        for row in _objects(similarity, "rows", path):
            _need(row, "groups_total", int, path)
            _need(row, "layer", int, path)
            _layers(row, "group", path)
        for groups_total, matrices in _need(similarity, "matrices", dict, path).items():
            if not groups_total.isdigit() or not isinstance(matrices, dict):
                raise _broken(path, f"'matrices' has the entry {groups_total!r}; a G is wanted")
            for key in ("mmcs", "concordance"):
                if matrices.get(key) is not None:
                    _square(matrices, key, n_layers, path)
        if similarity.get("yardstick") is not None:
            for row in _objects(similarity, "yardstick", path):
                _need(row, "layer", int, path)
    return similarity


def _depth(path: Path) -> Artefact | None:
    depth = _json(path)
    if depth is not None:
        _optional(depth, "definitions", dict, path)
        for name in _need(depth, "saes", dict, path):
            for summary in _objects(depth["saes"], name, path):
                _layers(summary, "layers", path)
        for subject in _objects(depth, "subjects", path):
            _need(subject, "partition", str, path)
            _need(subject, "groups_total", int, path)
            for layer, name in _need(subject, "saes", dict, path).items():
                if not layer.isdecimal() or not isinstance(name, str):
                    raise _broken(path, f"a subject's 'saes' has {layer!r}; layer: name is wanted")
        profiles = _need(depth, "profiles", dict, path)
        for name in profiles:
            profile = _need(profiles, name, dict, path)
            columns = len(_layers(profile, "layers", path))
            _matrix(profile, "share", len(_need(profile, "share", list, path)), columns, path)
    return depth


def _ground_truth(path: Path) -> Artefact | None:
    truth = _json(path)
    if truth is not None:
        _optional(truth, "definitions", dict, path)
        for attribute in _objects(truth, "attributes", path):
            _need(attribute, "attribute", str, path)
            _optional(attribute, "definition", str, path)
        for key, needed in (
            ("means", {}),
            ("coverage", {"layer": int}),
            ("rows", {"layer": int, "attribute": str}),
        ):
            for row in _objects(truth, key, path):
                source = _need(row, "source", str, path)
                if source not in ("trained", "untrained", "probe"):
                    raise _broken(path, f"'source' is {source!r}; trained, untrained or probe")
                if source != "probe":
                    _need(row, "partition", str, path)
                    _need(row, "groups_total", int, path)
                _optional(row, "latent", int, path)
                for name, kind in needed.items():
                    _need(row, name, kind, path)
    return truth


def _scores(path: Path) -> Artefact | None:
    """Scores of people or of a language model."""
    scores = _json(path)
    if scores is not None:
        for key in ("definitions", "agreement", "counts"):
            _optional(scores, key, dict, path)
        for row in _objects(scores, "rows", path):
            _need(row, "partition", str, path)
            _need(row, "groups_total", int, path)
            _optional(row, "layer", int, path)
    return scores


def _is_of(scores: Artefact, stages: Artefact | None) -> bool:
    """Whether scores are of the interpretation that is there, as far as `stages.json` tells."""
    stage = {} if stages is None else stages.get("interpret")
    return stages is None or (isinstance(stage, dict) and scores.get("of") == stage.get("key"))


def _saes(directory: Path) -> list[Artefact]:
    """Each SAE's cfg.json, with the "folder" that it lies in; groups, baselines, their twins."""
    found: list[Artefact] = []
    for pattern in ("layers-*", "baseline/layers-*", "twin/layers-*"):
        for path in sorted((directory / "saes").glob(f"{pattern}/cfg.json")):
            config = _json(path) or {}
            _layers(config, "layers", path)
            found.append({**config, "folder": path.parent.relative_to(directory).as_posix()})
    return found


def _metrics(path: Path) -> list[Artefact]:
    """The lines of metrics.jsonl; of a step that was logged twice (a resumed run) the later."""
    lines = (_text(path) or "").split("\n")
    latest: dict[tuple[str, int], Artefact] = {}
    for position, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            if position == len(lines) - 1:  # no line end: the run was stopped while it wrote
                break
            raise _broken(path, f"line {position + 1} is not JSON ({error})") from error
        if not isinstance(entry, dict):
            raise _broken(path, f"line {position + 1} is no object")
        key = (_need(entry, "sae", str, path), _need(entry, "step", int, path))
        latest.pop(key, None)
        latest[key] = entry
    return list(latest.values())


def _parse_config(path: Path, text: str) -> Artefact:
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _broken(path, f"it is not YAML ({error})") from error
    if config is not None and not isinstance(config, dict):
        raise _broken(path, f"it holds a {type(config).__name__}, not sections of keys")
    return config or {}


def _json(path: Path) -> dict[str, Any] | None:
    text = _text(path)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise _broken(path, f"it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise _broken(path, f"it holds a {type(value).__name__}, not an object")
    return value


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _need(artefact: Artefact, key: str, kind: type, path: Path) -> Any:
    value = artefact.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        found = f"is a {type(value).__name__}" if key in artefact else "is missing"
        raise _broken(path, f"'{key}' {found}; a {kind.__name__} is wanted")
    return value


def _layers(artefact: Artefact, key: str, path: Path) -> list[int]:
    layers: list[int] = _need(artefact, key, list, path)
    if not layers or not all(isinstance(layer, int) for layer in layers):
        raise _broken(path, f"'{key}' is {layers!r}; a list of layers is wanted")
    return layers


def _square(artefact: Artefact, key: str, n_layers: int, path: Path) -> None:
    _matrix(artefact, key, n_layers, n_layers, path)


def _matrix(artefact: Artefact, key: str, n_rows: int, n_columns: int, path: Path) -> None:
    matrix = _need(artefact, key, list, path)
    if len(matrix) != n_rows or any(
        not isinstance(row, list) or len(row) != n_columns for row in matrix
    ):
        raise _broken(path, f"'{key}' is not {n_rows} x {n_columns}, as 'layers' has it")
    if any(not isinstance(entry, int | float | None) for row in matrix for entry in row):
        raise _broken(path, f"'{key}' has an entry that is no number")


def _objects(artefact: Artefact, key: str, path: Path) -> list[Artefact]:
    entries: list[Artefact] = _need(artefact, key, list, path)
    if not all(isinstance(entry, dict) for entry in entries):
        raise _broken(path, f"'{key}' has an entry that is no object")
    return entries


def _need_subject(entry: Artefact, path: Path) -> None:
    """Whose latents an entry is of, and the method that found them."""
    _need(entry, "partition", str, path)
    _need(entry, "groups_total", int, path)
    _need(entry, "method", str, path)


def _optional(artefact: Artefact, key: str, kind: type, path: Path) -> None:
    if artefact.get(key) is not None:
        _need(artefact, key, kind, path)


def _broken(path: Path, why: str) -> InputError:
    return InputError(f"{path} is broken: {why}; run the stage that writes it again")
