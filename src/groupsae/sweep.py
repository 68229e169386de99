"""A sweep: SAEs of several settings, trained side by side from the same activations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from groupsae.config import Config, keys
from groupsae.errors import InputError
from groupsae.evaluation.reconstruction import evaluate_reconstruction
from groupsae.evaluation.subject import Subject
from groupsae.files import replacing
from groupsae.host.model import HostModel
from groupsae.host.tokens import TokenStream
from groupsae.sae import SAE
from groupsae.training.session import OWN, Entry, distinct, entries_of

MEANS = ("ce_loss_score", "r2", "l2", "l0", "dead")

_DEFINITIONS = {
    "member": "one setting of the sweep; its SAEs lie below saes/<member>/",
    "overrides": "the keys that vary, as the member has them. training.seed is the seed of its "
    "weights: all members of a sweep see the same tokens, in batches drawn by the run's own seed",
    "means": "means over layers of the rows of one member and partition",
}


@dataclass(frozen=True)
class Member:
    """One setting of a sweep.

    Attributes:
        name: Its folder.
        overrides: The keys that vary, as it has them.
        config: The run's, but for these.
    """

    name: str
    overrides: Mapping[str, Any]
    config: Config


def members_of(config: Config, vary: Mapping[str, Sequence[Any]]) -> list[Member]:
    """Every combination of the values that `vary` gives for its keys, the last key fastest.

    Where `sae.architecture` changes, what the run's own has by default becomes the new one's.

    Raises:
        InputError: If a key cannot vary within one forward, a value is given twice, or values do
            not go together; it names the member.
    """
    if not vary:
        raise InputError(
            "a sweep varies at least one key; give --vary KEY=VALUE,VALUE, such as sae.k=16,32. "
            f"What can vary: {', '.join(_that_can_vary())}"
        )
    for key, values in vary.items():
        _check_key(key)
        if not values:
            raise InputError(f"{key}: no value is given; give several, such as --vary sae.k=16,32")
    combinations = product(*vary.values())
    members = [_member(config, dict(zip(vary, values, strict=True))) for values in combinations]
    for at, member in enumerate(members):
        if any(member.config == other.config for other in members[:at]):
            raise InputError(f"{member.name}: given twice; give each value once")
    return members


def read_vary(texts: Iterable[str]) -> dict[str, list[Any]]:
    """What `--vary` says: `sae.k=16,32`; a value that holds commas in brackets.

    Raises:
        InputError: If it is not of that form.
    """
    vary: dict[str, list[Any]] = {}
    for text in texts:
        key, separator, values = (part.strip() for part in text.partition("="))
        if not separator:
            raise InputError(f"--vary {text!r}: write KEY=VALUE,VALUE, such as sae.k=16,32")
        if key in vary:
            raise InputError(f"--vary {key}: given twice; give all its values at once")
        try:
            vary[key] = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError as error:
            raise InputError(f"--vary {key}: {values!r} cannot be read as values") from error
    return vary


def entries(members: Iterable[Member], groups: Sequence[Sequence[int]]) -> list[Entry]:
    """Every SAE of every member: one per group and, where its config asks, one per layer."""
    return [
        entry
        for member in members
        for entry in entries_of(groups, member.config, below=f"{member.name}/")
    ]


def judge(
    members: Sequence[Member],
    groups: Sequence[Sequence[int]],
    saes: Path,
    *,
    host: HostModel,
    stream: TokenStream,
    special: Iterable[int],
) -> dict[str, Any]:
    """Evaluate every SAE of a sweep at each of its layers, all on the same tokens.

    Args:
        saes: The folder that holds them.

    Returns:
        What :func:`evaluate_reconstruction` does, with the member and its overrides in each row,
        and the means over layers.
    """
    loaded: dict[str, SAE] = {}
    for same in distinct(entries(members, groups)):
        sae = SAE.load(saes / same[0].name, host.device)  # once: it is judged once
        loaded |= {entry.name: sae for entry in same}
    subjects = [
        (member, subject) for member in members for subject in _subjects(member, groups, loaded)
    ]
    config = members[0].config
    result = evaluate_reconstruction(
        host,
        stream,
        [subject for _, subject in subjects],
        tokens=config.evaluation.tokens,
        batch_contexts=config.evaluation.batch_contexts,
        special=special,
    )
    owners = [member for member, subject in subjects for _ in subject.saes]
    rows = [
        {"member": owner.name, "overrides": owner.overrides, **row}
        for owner, row in zip(owners, result["rows"], strict=True)
    ]
    return result | {
        "definitions": _DEFINITIONS | result["definitions"],
        "equal": "the host's forwards, training tokens per SAE "
        f"({config.training.steps * config.training.batch_tokens:,}), held-out tokens",
        "means": list(_means(members, rows)),
        "rows": rows,
    }


def draw(results: Mapping[str, Any], folder: Path, formats: Iterable[str]) -> list[Path]:
    """Write the sweep's figure; returns its files."""
    from groupsae.report.figures import encode, sweep_means

    figure = sweep_means(results["means"])
    paths = [folder / f"sweep-{results['name']}.{form}" for form in formats]
    for path in paths:
        with replacing(path) as aside:
            aside.write_bytes(encode(figure, path.suffix[1:]))
    return paths


def _member(config: Config, overrides: Mapping[str, Any]) -> Member:
    values = config.model_dump(mode="json", exclude={"preset", "provenance"})
    architecture = config.sae.architecture
    if overrides.get("sae.architecture", architecture) != architecture:
        usual = Config.parse({"sae": {"architecture": architecture}}).model_dump(mode="json")
        for key in [key for key, value in values["sae"].items() if value == usual["sae"][key]]:
            del values["sae"][key]
    for path, value in overrides.items():
        section, _, key = path.partition(".")
        values[section][key] = value
    try:
        own = Config.parse(values)
        if "sae.expansion" in overrides and own.sae.d_sae is not None:
            raise InputError(
                f"sae.expansion: {own.sae.expansion} changes nothing beside sae.d_sae = "
                f"{own.sae.d_sae}; vary sae.d_sae, or set sae.d_sae=null"
            )
    except InputError as error:
        setting = " ".join(f"{path}={value}" for path, value in overrides.items())
        raise InputError(f"sweep member {setting}: {error}") from error
    dumped = own.model_dump(mode="json")
    settled = {path: _at(dumped, path) for path in overrides}
    return Member(_name(settled), settled, own)


def _check_key(path: str) -> None:
    if path in _that_can_vary():
        return
    if path not in {known for known, *_ in keys()}:
        section, _, key = path.partition(".")
        Config.parse({section: {key: None}} if key else {path: None})  # says what is wrong with it
    raise InputError(
        f"{path}: cannot vary within a sweep, whose members share one forward, its tokens and the "
        f"batches; make a run for each value. What can vary: {', '.join(_that_can_vary())}"
    )


def _that_can_vary() -> list[str]:
    own = [f"training.{key}" for key in OWN]
    return [path for path, *_ in keys() if path.startswith("sae.") or path in own]


def _name(overrides: Mapping[str, Any]) -> str:
    """`k-16_learning_rate-0.0001`: a folder's name."""
    texts = (f"{path.partition('.')[2]}-{value}" for path, value in overrides.items())
    return "_".join(re.sub(r"[^\w.+]+", "-", text).strip("-") for text in texts)


def _at(values: Mapping[str, Any], path: str) -> Any:
    section, _, key = path.partition(".")
    return values[section][key]


def _subjects(
    member: Member, groups: Sequence[Sequence[int]], saes: Mapping[str, SAE]
) -> Iterator[Subject]:
    names = {entry.layers: entry.name for entry in entries([member], groups)}
    yield Subject("groups", {layer: saes[names[tuple(g)]] for g in groups for layer in g})
    if member.config.training.baseline:
        layers = sorted(layer for group in groups for layer in group)
        yield Subject("baseline", {layer: saes[names[layer,]] for layer in layers})


def _means(
    members: Iterable[Member], rows: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    for member in members:
        for partition in ("groups", "baseline"):
            own = [
                row for row in rows if (row["member"], row["partition"]) == (member.name, partition)
            ]
            if own:
                yield {
                    "member": member.name,
                    "overrides": member.overrides,
                    "partition": partition,
                    **{key: sum(row[key] for row in own) / len(own) for key in MEANS},
                }
