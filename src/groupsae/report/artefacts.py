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
)


@dataclass(frozen=True)
class Run:
    """What lies in a run directory. Nothing in it is trusted: it may come from elsewhere."""

    config_text: str
    config: Artefact
    distances: Artefact | None
    partition: Artefact | None
    metrics: Sequence[Artefact]
    saes: Sequence[Artefact]
    reconstruction: Artefact | None
    stages: Artefact


def read_run(directory: Path) -> Run:
    """Read every artefact that is there.

    Raises
    ------
    InputError
        If `directory` is no run directory, or an artefact is broken; it names the file and what
        is wrong with it.
    """
    if not directory.is_dir():
        raise InputError(f"run directory {directory} does not exist; `groupsae run` makes one")
    if not any((directory / name).exists() for name in _FILES):
        raise InputError(
            f"{directory} is no run directory: it holds none of {', '.join(_FILES)}; "
            "give the folder that `groupsae run` wrote"
        )
    config_text = _text(directory / "config.yaml") or ""
    return Run(
        config_text=config_text,
        config=_parse_config(directory / "config.yaml", config_text),
        distances=_distances(directory / "distances.json"),
        partition=_partition(directory / "partition.json"),
        metrics=_metrics(directory / "metrics.jsonl"),
        saes=[
            {**config, "folder": path.parent.relative_to(directory).as_posix()}
            for path in sorted((directory / "saes").glob("**/cfg.json"))
            if (config := _json(path)) is not None
        ],
        reconstruction=_reconstruction(directory / "evaluation" / "reconstruction.json"),
        stages=_json(directory / "stages.json") or {},
    )


def _distances(path: Path) -> Artefact | None:
    distances = _json(path)
    if distances is not None:
        n_layers = len(_need(distances, "layers", list, path))
        matrix = _need(distances, "matrix", list, path)
        if len(matrix) != n_layers or any(
            not isinstance(row, list) or len(row) != n_layers for row in matrix
        ):
            raise _broken(path, f"'matrix' is not {n_layers} x {n_layers}, as 'layers' has it")
    return distances


def _partition(path: Path) -> Artefact | None:
    partition = _json(path)
    if partition is not None:
        _need(partition, "layers", list, path)
        by_groups = _need(partition, "by_groups", dict, path)
        chosen = _need(partition, "chosen", int, path)
        if str(chosen) not in by_groups:
            raise _broken(path, f"'chosen' is {chosen}, which 'by_groups' lacks")
        for groups_total, entry in by_groups.items():
            if not groups_total.isdigit() or not isinstance(entry, dict):
                raise _broken(path, f"'by_groups' has the entry {groups_total!r}; a G is wanted")
            groups = _need(entry, "groups", list, path)
            if not groups or not all(isinstance(group, list) and group for group in groups):
                raise _broken(path, f"'groups' of G = {groups_total} has an empty group")
    return partition


def _reconstruction(path: Path) -> Artefact | None:
    reconstruction = _json(path)
    if reconstruction is not None:
        for row in _need(reconstruction, "rows", list, path):
            if not isinstance(row, dict):
                raise _broken(path, "a row is no object")
            _need(row, "layer", int, path)
            _need(row, "partition", str, path)
    return reconstruction


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


def _broken(path: Path, why: str) -> InputError:
    return InputError(f"{path} is broken: {why}; run the stage that writes it again")
