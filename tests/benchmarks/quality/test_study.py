"""The study's plan, its arithmetic, and all of it on a tiny scale."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.quality.__main__ import app
from benchmarks.quality.plan import MAIN, sessions
from benchmarks.quality.published import published
from benchmarks.quality.summary import Study, controls, table
from groupsae.grouping.cost import CostModel
from groupsae.grouping.matrix import Distances
from groupsae.grouping.table import group_layers

BASE = ["training.tokens=4096", "training.batch_tokens=512", "training.buffer_tokens=1024"]


def tables_of_four_layers():
    places = np.array([0.0, 0.05, 0.3, 0.4])
    distances = Distances.from_matrix(np.abs(places[:, None] - places))
    return {name: group_layers(distances, method=name) for name in ("linkage", "optimal", "even")}


def plan(**changes):
    cost = CostModel(d_model=16, n_layers=5, context_length=32, d_sae=64)
    asked = {"seeds": [0, 1], "rules": ["topk-16"], **changes}
    return {s.name: s for s in sessions(BASE, tables_of_four_layers(), cost, **asked)}


def test_every_group_of_every_partition_is_trained_once_for_every_seed():
    names = [entry.name for entry in plan()["main"].entries]
    assert len(names) == len(set(names))
    of_main = {name for name in names if name.startswith(f"{MAIN}/")}
    groups = {
        g
        for t in tables_of_four_layers().values()
        for row in t.by_groups.values()
        for g in row.partition.groups
    }
    wanted = {f"{MAIN}/seed-{s}/{'-'.join(map(str, g))}" for s in (0, 1) for g in groups}
    assert of_main == wanted
    seeds = {entry.name: entry.config.training.seed for entry in plan()["main"].entries}
    assert seeds[f"{MAIN}/seed-1/0"] == 1


def test_what_costs_the_same_is_never_dearer_and_nearly_as_dear():
    found, cost = plan(), CostModel(d_model=16, n_layers=5, context_length=32, d_sae=64)
    G = tables_of_four_layers()["linkage"].chosen
    budget = cost.flops_per_token(G) * 4096
    narrow = next(e for e in found["main"].entries if e.name.startswith(f"{MAIN}-narrower"))
    narrow_cost = CostModel(
        d_model=16, n_layers=5, context_length=32, d_sae=narrow.config.sae.d_sae
    )
    assert 0.9 * budget < narrow_cost.flops_per_token(4) * 4096 <= budget
    tokens = found["fewer-tokens"].entries[0].config.training.tokens
    assert budget - cost.flops_per_token(4) * 512 < cost.flops_per_token(4) * tokens <= budget


def made_up_study() -> Study:
    """Layers 0 to 2, groups 0-1 and 2; in a group 0.1 of R^2 less, and 0.01 more a seed."""
    groups = {"1": [[0, 1, 2]], "2": [[0, 1], [2]], "3": [[0], [1], [2]]}
    by_groups = {
        G: {"groups": found, "amad": 0.0, "diameters": [0.1] * len(found), "flops_per_token": 1}
        for G, found in groups.items()
    }
    rows = [
        {
            "setting": setting,
            "seed": seed,
            "group": group,
            "layer": layer,
            "d_sae": 8,
            "tokens": 64,
            "r2": 0.9 - (0.1 + 0.01 * seed) * (len(group) > 1),
            "ce_loss_score": 1.0,
            "l0": 4.0,
            "dead": 0.0,
            "explained_variance": 0.5,
        }
        for setting in (MAIN, f"{MAIN}-bias", f"{MAIN}-narrower", f"{MAIN}-fewer-tokens")
        for seed in (0, 1)
        for found in groups.values()
        for group in found
        for layer in group
    ]
    partition = {"chosen": 2, "by_groups": by_groups}
    return Study(
        {
            "model": "made up",
            "rows": rows,
            "distances": {"layers": [0, 1, 2]},
            "partitions": dict.fromkeys(("linkage", "optimal", "even"), partition),
        }
    )


def test_losses_are_differences_seed_by_seed():
    study = made_up_study()
    assert study.settings == [MAIN]
    losses = study.losses(MAIN, [[0, 1], [2]], "r2")
    assert losses == pytest.approx([0.2 / 3, 0.22 / 3])
    assert "0.0700 ± 0.0047" in table(study, MAIN)
    assert "| bias | 0.0700 ± 0.0047 | 0.0000 ± 0.0000 |" in controls(study)


def test_the_whole_study_on_a_tiny_scale(tmp_path: Path, tiny_config: list[str]):
    left_out = ("grouping.groups", "grouping.distance_tokens", "sae.k", "evaluation")
    tiny = [override for override in tiny_config if not override.startswith(left_out)]
    arguments = [
        *("--out", str(tmp_path), "--seeds", "1", "--rules", "jumprelu-32"),
        *("--distance-tokens", "2000", "--held-out-tokens", "500", *tiny),
        "training.tokens=1024",
    ]
    first = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert first.exit_code == 0
    content = json.loads((tmp_path / "study.json").read_text())
    settings = {row["setting"] for row in content["rows"]}
    assert {MAIN, "jumprelu-32", f"{MAIN}-balanced", f"{MAIN}-fewer-tokens"} <= settings
    assert "every G by complete linkage" in first.output
    assert (tmp_path / "quality-bundled-amad.png").stat().st_size > 10_000
    assert not list(tmp_path.glob("*/saes"))
    before = (tmp_path / "main" / "rows.json").stat().st_mtime_ns
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert again.exit_code == 0
    assert (tmp_path / "main" / "rows.json").stat().st_mtime_ns == before


def test_an_unknown_rule_is_named():
    result = CliRunner().invoke(app, ["--rules", "topk-32,topq"])
    assert result.exit_code == 2
    assert "topq" in result.output


@pytest.mark.shared
def test_the_published_table_has_the_published_means(shared: Path):
    text = published(shared / "reference" / "group-sae", "pythia-160m")
    assert "| per layer | 0 | 0.9030 | 0.9837 |" in text
    assert "| 6 | 0.179 | 0.8922 | 0.9816 | 0.0109 | 0.0021 |" in text
