"""The published Pythia runs of Group-SAE in the study's form: `python -m benchmarks.quality.published DIR`.

DIR holds the tables of the paper's public repository (`ghidav/group-sae`): `NAME_baseline.csv`,
`NAME_cluster.csv` and, where there is one, `groups-NAME.json`.
"""  # noqa: E501

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd

METRICS = {"explained_variance": "EV", "ce_loss_score": "CELS"}


def published(directory: Path, name: str) -> str:
    """Every G of one model: AMAD, means over layers, and what is lost beside per-layer SAEs."""
    alone = pd.read_csv(directory / f"{name}_baseline.csv").groupby("layer")[list(METRICS)].mean()
    tables = pd.read_csv(directory / f"{name}_cluster.csv")
    groups_file = directory / f"groups-{name}.json"
    groups = json.loads(groups_file.read_text()) if groups_file.exists() else {}
    lines = [_line("per layer", "0", alone, alone)]
    for G, table in tables.groupby("G"):
        shared = table.drop_duplicates("layer").set_index("layer")[list(METRICS)]
        layers = alone.index.intersection(shared.index)
        amad = f"{groups[str(G)]['amd']:.3f}" if str(G) in groups else ""
        lines.append(_line(str(G), amad, shared.loc[layers], alone.loc[layers]))
    head = ["G", "AMAD", *METRICS.values(), *(f"{label} lost" for label in METRICS.values())]
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _line(G: str, amad: str, shared: pd.DataFrame, alone: pd.DataFrame) -> list[str]:
    means = [f"{shared[metric].mean():.4f}" for metric in METRICS]
    lost = [f"{(alone[metric] - shared[metric]).mean():.4f}" for metric in METRICS]
    return [G, amad, *means, *lost]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for path in sorted(folder.glob("*_baseline.csv")):
        model = path.name.removesuffix("_baseline.csv")
        print(f"**{model}**\n\n{published(folder, model)}\n")
