"""Trains and judges what the plan lists, session by session, and keeps every figure."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.plan import Session, sessions
from groupsae.config import Config
from groupsae.directory import read_json
from groupsae.errors import InputError
from groupsae.evaluation.reconstruction import evaluate_reconstruction
from groupsae.evaluation.subject import Subject
from groupsae.files import write_json
from groupsae.grouping.matrix import Distances
from groupsae.grouping.partition import amad, diameters
from groupsae.grouping.table import PartitionTable, group_layers
from groupsae.measurement import load_moments, measure_layers
from groupsae.run import Run
from groupsae.sae import SAE
from groupsae.training.session import train_entries

METHODS = ("linkage", "optimal", "even")
SIMILARITIES = ("cka", "svcca")
KEPT = ("ce_loss_score", "r2", "explained_variance", "l2", "l0", "dead", "kl")


@dataclass(frozen=True)
class Asked:
    """What to study.

    Attributes:
        name: Of the model, for tables and figures.
        base: Overrides of the config: host, text, sizes.
        distance_tokens: Ever more tokens to measure distances on; the last decides.
    """

    name: str
    base: tuple[str, ...]
    seeds: tuple[int, ...]
    rules: tuple[str, ...]
    distance_tokens: tuple[int, ...]
    held_out_tokens: int


def study(asked: Asked, directory: Path) -> Path:
    """Carry out what is not done yet; returns the path of `study.json`.

    A session that was interrupted goes on from its last checkpoint; one that is done is not
    repeated. The SAEs are removed once they are judged.
    """
    base = (*asked.base, f"grouping.distance_tokens={asked.distance_tokens[-1]}")
    run = Run(directory / "run", Config.load(None, base))
    distances = run.distances()
    tables = {method: group_layers(distances, method=method) for method in METHODS}
    planned = sessions(base, tables, run.cost(), seeds=asked.seeds, rules=asked.rules)
    rows: list[dict[str, Any]] = []
    for session in planned:
        path = directory / session.name / "rows.json"
        key = _key(session, asked)
        if not path.exists():
            found = _carry_out(run, session, asked, directory / session.name, key)
            write_json(path, {"key": key, "rows": found})
        done = read_json(path, key=str, rows=list)
        if done["key"] != key:
            raise InputError(f"{path} is of another study; choose another folder with --out")
        rows += done["rows"]
    result = {
        "model": asked.name,
        "config": list(base),
        "tokens_per_sae": run.config.training.steps * run.config.training.batch_tokens,
        "held_out_tokens": asked.held_out_tokens,
        "n_layers": run.host.n_layers,
        "d_model": run.host.d_model,
        "distances": distances.to_json(),
        "partitions": {method: _described(table, distances) for method, table in tables.items()},
        "by_distance_tokens": _by_tokens(run, asked, directory / "distances.json"),
        "rows": rows,
    }
    write_json(directory / "study.json", result)
    return directory / "study.json"


def _key(session: Session, asked: Asked) -> str:
    """Identifies a session's figures."""
    content = [session.overrides, [entry.name for entry in session.entries], asked.held_out_tokens]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _carry_out(
    run: Run, session: Session, asked: Asked, directory: Path, key: str
) -> list[dict[str, Any]]:
    """Train and judge one session's SAEs; one row for each SAE and member layer."""
    special = run.host.special_token_ids
    config = Config.load(None, session.overrides)
    trained = directory / "training.json"
    if not trained.exists():
        directory.mkdir(parents=True, exist_ok=True)
        summary = train_entries(
            run.host,
            run.corpus.train(),
            load_moments(run.directory / "moments.safetensors"),
            session.entries,
            config,
            directory=directory,
            key=key,
            special=special,
        )
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
        write_json(trained, summary)
    saes = [SAE.load(directory / "saes" / e.name, run.host.device) for e in session.entries]
    subjects = [Subject("groups", dict.fromkeys(sae.layers, sae)) for sae in saes]
    found = evaluate_reconstruction(
        run.host,
        run.corpus.held_out(),
        subjects,
        tokens=asked.held_out_tokens,
        batch_contexts=16,
        special=special,
    )["rows"]
    owners = [entry for entry in session.entries for _ in entry.layers]
    rows = []
    for entry, row in zip(owners, found, strict=True):
        setting, seed, _ = entry.name.split("/")
        rows.append(
            {
                "setting": setting,
                "seed": int(seed.removeprefix("seed-")),
                "group": list(entry.layers),
                "layer": row["layer"],
                "d_sae": entry.config.sae.width(run.host.d_model),
                "tokens": config.training.tokens,
                **{key: row[key] for key in KEPT},
            }
        )
    shutil.rmtree(directory / "saes")
    return rows


def _described(table: PartitionTable, distances: Distances) -> dict[str, Any]:
    """Every G of a table with its measures, and the diameter of each group."""
    by_groups = {
        str(G): {
            "groups": [list(group) for group in row.partition.groups],
            "amad": amad(distances, row.partition),
            "diameters": list(diameters(distances, row.partition)),
            "flops_per_token": row.flops_per_token,
        }
        for G, row in table.by_groups.items()
    }
    return {"chosen": table.chosen, "by_groups": by_groups}


def _by_tokens(run: Run, asked: Asked, path: Path) -> list[dict[str, Any]]:
    """Which groups distances on fewer tokens, and other similarities, would have given."""
    if path.exists():
        found: list[dict[str, Any]] = json.loads(path.read_text())["measured"]
        return found
    wanted: Sequence[tuple[str, int]] = [
        *(("angular", tokens) for tokens in asked.distance_tokens),
        *((similarity, asked.distance_tokens[-1]) for similarity in SIMILARITIES),
    ]
    measured = []
    for similarity, tokens in wanted:
        distances = measure_layers(
            run.host,
            run.corpus.train(),
            run.layers,
            tokens=tokens,
            batch_contexts=32,
            similarity=similarity,
            special=run.host.special_token_ids,
        ).distances
        table = group_layers(distances, method="linkage")
        measured.append(
            {
                "similarity": similarity,
                "tokens": tokens,
                "matrix": distances.matrix.tolist(),
                "chosen": table.chosen,
                "by_groups": {
                    str(G): [list(group) for group in row.partition.groups]
                    for G, row in table.by_groups.items()
                },
            }
        )
    write_json(path, {"measured": measured})
    return measured
