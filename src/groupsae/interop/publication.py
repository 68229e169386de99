"""What of a run is published: its SAEs and what was found, without the paths of its machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeAlias

from groupsae.config import Config
from groupsae.directory import RunDirectory, read_json, stored_config, trained
from groupsae.errors import InputError
from groupsae.local import is_local, is_path, last_name
from groupsae.sae.autoencoder import CONFIG_FILE, WEIGHTS_FILE

Content: TypeAlias = bytes | Path

# Where a run lies on its machine, and what it only read there: of no use elsewhere.
_DROPPED = ("training.init_from", "training.activation_cache")
_FIGURES = (".png", ".svg", ".pdf")
_UNPUBLISHED = ("interpret", "report")  # a large cache of latents, a page made on this machine


@dataclass(frozen=True)
class Publication:
    """The files of a run as they are published; together they are a run directory again.

    Attributes:
        files: Content by path: bytes, or the file that has it.
        config: The run's config without local paths.
        local: The config's keys whose value was a local path: of a host model and a text, only the
            last name of it is left.
    """

    files: Mapping[str, Content]
    config: Config
    local: tuple[str, ...]


def publication(directory: Path, *, host_name: str | None = None) -> Publication:
    """What of a trained run is published.

    The SAEs, the config, distances, partition, evaluations and figures.

    Args:
        host_name: The host model's name on the hub, where the run has it from a local folder.

    Raises:
        InputError: If the directory holds no trained run, or an artefact is broken.
    """
    if trained(directory) is None:
        raise InputError(
            f"{directory} holds no trained run; name the directory of a run whose stage 'train' is "
            "done"
        )
    stored = stored_config(directory)
    assert stored is not None
    config, local = _config(stored, host_name)
    stages = RunDirectory(directory)
    finished = read_json(directory / "stages.json")
    texts: dict[str, Any] = {  # a stage's key holds the config's values, which are others now
        "stages.json": {
            stage: {**entry, "key": stages.key(stage, config)}
            for stage, entry in finished.items()
            if stages.is_done(stage) and stage not in _UNPUBLISHED
        }
    }
    names = ["training.json", "partition.json", "distances.json"]
    evaluated = sorted((directory / "evaluation").rglob("*.json"))
    names += [path.relative_to(directory).as_posix() for path in evaluated]
    texts |= {name: read_json(directory / name) for name in names if (directory / name).exists()}
    files: dict[str, Content] = {"config.yaml": config.dump().encode()}
    files |= {name: _json(_without_paths(text)) for name, text in texts.items()}
    for name in read_json(directory / "training.json", saes=list[str])["saes"]:
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            path = directory / "saes" / name / file
            if not path.is_file():
                raise InputError(f"{path} is missing; train again, or fetch it again")
            files[f"saes/{name}/{file}"] = path
    for path in sorted((directory / "figures").glob("*")):
        if path.suffix in _FIGURES:
            files[f"figures/{path.name}"] = path
    return Publication(files, config, local)


def _config(config: Config, host_name: str | None) -> tuple[Config, tuple[str, ...]]:
    """The config without local paths, and the keys that had one."""
    values = config.model_dump(mode="json", exclude={"preset", "provenance"})
    local = []
    for key in ("host.name", "tokens.source", *_DROPPED):
        section, name = key.split(".")
        value = values[section][name]
        if value is not None and (key in _DROPPED or is_local(value)):
            local.append(key)
            values[section][name] = None if key in _DROPPED else last_name(value)
    if host_name is not None:
        values["host"]["name"] = host_name
        local = [key for key in local if key != "host.name"]
    tasks = [task.partition("=") for task in values["circuits"]["tasks"]]
    values["circuits"]["tasks"] = [name + mark + PurePath(file).name for name, mark, file in tasks]
    provenance = {key: v for key, v in (config.provenance or {}).items() if key != "init_from"}
    return Config.parse(values).model_copy(update={"provenance": provenance}), tuple(local)


def _without_paths(value: Any) -> Any:
    """The same with the last name in place of every string that is a path."""
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    if isinstance(value, str) and is_path(value):
        return last_name(value)
    return value


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
