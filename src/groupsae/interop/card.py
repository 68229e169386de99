"""The model card of a published run: what it is, how good it is, how to load it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from groupsae.errors import InputError
from groupsae.interop.publication import Publication
from groupsae.sae import directory_name
from groupsae.sae.autoencoder import CONFIG_FILE

_MEASURES = {"CELS": "ce_loss_score", "R²": "r2", "L0": "l0"}

_TEMPLATES = Path(__file__).with_name("templates")
_ON_THE_HUB = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
_SHOWN = ("per_layer.png", "distance_heatmap.png")


def model_card(published: Publication, repository: str, *, license: str | None = None) -> str:
    """The text of `README.md`, its metadata at the top.

    Everything that comes from the run is escaped.

    Args:
        repository: USER/REPO, where it will lie.
        license: The hub's identifier of a licence; None: the card names none.

    Raises:
        InputError: If the licence is no identifier.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9.-]+", license):
        raise InputError(
            f"license={license!r} is no identifier of the hub's; give one such as mit, apache-2.0 "
            "or cc-by-4.0"
        )
    config = published.config
    partition = _content(published, "partition.json")
    training = _content(published, "training.json")
    chosen = partition["by_groups"][str(partition["chosen"])]
    groups = [
        {
            **_content(published, f"saes/{directory_name(group)}/{CONFIG_FILE}"),
            "layers": _span(group),
            "folder": f"saes/{directory_name(group)}",
        }
        for group in chosen["groups"]
    ]
    local = "host.name" in published.local
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=False,  # Markdown: what is not ours goes through `plain`
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = _plain
    return environment.get_template("card.md.j2").render(
        front_matter=_front_matter(published, license),
        repository=repository,
        version=(config.provenance or {}).get("groupsae"),
        imported="imported" in training,
        host=_named(config.host.name, "model"),
        host_is_local=local,
        tokens=config.tokens,
        text=_named(config.tokens.source, "text"),
        tokens_are_local="tokens.source" in published.local,
        trained_tokens=training.get("tokens_per_sae"),
        groups=groups,
        layers=[layer for group in chosen["groups"] for layer in group],
        amad=chosen["amad"],
        threshold=partition.get("threshold"),
        baseline=any(name.startswith("baseline/") for name in training["saes"]),
        evaluation=_evaluation(published, partition["chosen"]),
        figures=[f"figures/{name}" for name in _SHOWN if f"figures/{name}" in published.files],
        topk=all(group["architecture"] == "topk" for group in groups),
    )


def _front_matter(published: Publication, license: str | None) -> str:
    """The metadata that the hub reads."""
    config = published.config
    metadata: dict[str, Any] = {} if license is None else {"license": license}
    metadata["library_name"] = "groupsae"
    metadata["tags"] = ["groupsae", "sparse-autoencoder", "mechanistic-interpretability"]
    for key, name, path in (
        ("base_model", config.host.name, "host.name"),
        ("datasets", config.tokens.source, "tokens.source"),
    ):
        known = name != "bundled" and path not in published.local
        if known and _ON_THE_HUB.fullmatch(name):
            metadata[key] = [name]
    return yaml.safe_dump(metadata, sort_keys=False)


def _evaluation(published: Publication, chosen: int) -> dict[str, Any] | None:
    """The table of what is lost per layer; None where it was not judged."""
    name = "evaluation/reconstruction.json"
    if name not in published.files:
        return None
    content = _content(published, name)
    by_partition: dict[str, dict[int, Any]] = {"groups": {}, "baseline": {}}
    for row in content["rows"]:
        if row["partition"] == "baseline" or row["groups_total"] == chosen:
            by_partition[row["partition"]][row["layer"]] = row
    shown = {key: rows for key, rows in by_partition.items() if rows}
    layers = sorted(by_partition["groups"])
    columns = [(label, measure, part) for label, measure in _MEASURES.items() for part in shown]
    values = {
        layer: [shown[part].get(layer, {}).get(measure) for _, measure, part in columns]
        for layer in layers
    }
    means = [_mean([values[layer][i] for layer in layers]) for i in range(len(columns))]
    return {
        "header": [f"{label}, {part}" for label, _, part in columns],
        "rows": [
            (layer, _span(by_partition["groups"][layer]["group"]), [*map(_number, values[layer])])
            for layer in layers
        ],
        "means": [*map(_number, means)],
        "definitions": {
            label: content["definitions"].get(measure, measure)
            for label, measure in _MEASURES.items()
        },
        "tokens": content.get("tokens"),
        "equal": content.get("equal"),
    }


def _content(published: Publication, name: str) -> dict[str, Any]:
    found = published.files[name]
    text = found.read_bytes() if isinstance(found, Path) else found
    content: dict[str, Any] = json.loads(text)
    return content


def _named(name: str, what: str) -> str:
    return f"groupsae's bundled {what}" if name == "bundled" else name


def _plain(text: object) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    line = " ".join(str(text).split())
    line = "".join(character for character in line if character.isprintable())
    return re.sub(r"([\\`*_\[\]<>|&#~$])", r"\\\1", line)


def _span(group: list[int]) -> str:
    return str(group[0]) if len(group) == 1 else f"{group[0]}–{group[-1]}"


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) and known else None


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.4g}"
