"""A run of SAEs that were trained elsewhere: measured, evaluated and shown as any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from groupsae.config import Config
from groupsae.directory import RunDirectory
from groupsae.errors import InputError
from groupsae.files import write_json
from groupsae.host.model import HostModel
from groupsae.sae import SAE, directory_name


def config_of(saes: Mapping[str, SAE], config: Config) -> Config:
    """The config with the groups that the SAEs are of, and what is the same of all of them.

    SAEs of several layers are groups. One of a single layer is a group of its own where no other
    covers the layer, else a baseline.

    Raises:
        InputError: If two groups overlap, or some layers have a baseline and others none.
    """
    groups, baselines = partition_of(saes)
    layers = sorted(layer for group in groups for layer in group)
    shapes = [sae.config for sae in saes.values()]
    described: dict[str, Any] = {"expansion": None}
    for key in ("architecture", "k", "d_sae"):
        found = {getattr(shape, key) for shape in shapes}
        if len(found) == 1:
            described[key] = found.pop()
    values = config.model_dump(mode="json", exclude={"preset", "provenance"})
    architecture = described.get("architecture", values["sae"]["architecture"])
    own = {key: value for key, value in described.items() if value is not None}
    values["sae"] = {"architecture": architecture, **own}
    values["training"] |= {"baseline": bool(baselines), "also_groups": [], "twins": False}
    values["grouping"] |= {"layers": layers, "partition": [list(g) for g in groups], "groups": None}
    return Config.parse(values)


def partition_of(saes: Mapping[str, SAE]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The groups, from below, and the layers that have a baseline beside their group.

    Raises:
        InputError: As :func:`config_of`.
    """
    several = sorted(sae.layers for sae in saes.values() if len(sae.layers) > 1)
    singles = sorted(sae.layers[0] for sae in saes.values() if len(sae.layers) == 1)
    covered = [layer for group in several for layer in group]
    twice = sorted({layer for layer in covered if covered.count(layer) > 1})
    if twice:
        raise InputError(
            f"layers {', '.join(map(str, twice))} are in several groups; import the SAEs of one "
            "partition at a time"
        )
    baselines = [layer for layer in singles if layer in covered]
    if baselines and set(covered) - set(singles):
        raise InputError(
            f"layers {', '.join(map(str, sorted(set(covered) - set(singles))))} have no SAE of "
            "their own beside their group's, and others have one; name the missing folders too, or "
            "leave all of them out"
        )
    groups = sorted([*several, *((layer,) for layer in singles if layer not in covered)])
    return groups, singles if baselines else []


def check_host(saes: Mapping[str, SAE], host: HostModel) -> None:
    """Refuse SAEs of another host model, as far as their sizes tell."""
    for name, sae in saes.items():
        if sae.config.d_model != host.d_model or max(sae.layers) >= host.n_layers:
            raise InputError(
                f"{name} is of d_model = {sae.config.d_model} and layers up to {max(sae.layers)}, "
                f"but host.name={host.name} has d_model = {host.d_model} and {host.n_layers} "
                "layers; name the model that it was trained on"
            )


def place(saes: Mapping[str, SAE], stages: RunDirectory, sources: Sequence[Path]) -> None:
    """Put the SAEs where training would have put its own, and note that stage as done."""
    path = stages.path / "training.json"
    with stages.stage("train", path) as todo:
        if not todo:
            raise InputError(f"{stages.path} has SAEs already; choose another directory with --out")
        groups, baselines = partition_of(saes)
        of_layers = {sae.layers: sae for sae in saes.values()}
        names = {directory_name(group): of_layers[group] for group in groups}
        names |= {f"baseline/{directory_name([layer])}": of_layers[layer,] for layer in baselines}
        for name, sae in names.items():
            sae.save(stages.path / "saes" / name)
        write_json(
            path,
            {
                "saes": list(names),
                "imported": [str(source) for source in sources],
                "contexts_read": 0,
                "text_place": {"corpus": {}},  # of no text that is known here
                "cache_place": None,
            },
        )
