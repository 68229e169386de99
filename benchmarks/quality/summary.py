"""What the study says, as tables and figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.quality.plan import AFFINES, MAIN, SAMPLINGS
from groupsae.grouping.prediction import predict

METRICS = {"r2": "R^2", "ce_loss_score": "CELS"}
Row = Mapping[str, Any]


class Study:
    """The figures of one model's study.

    Differences are made seed by seed, group less the layer's own SAE of the same setting and seed,
    over all layers; their spread is the standard deviation over seeds.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        self.rows: dict[tuple[str, int, tuple[int, ...], int], Row] = {
            (row["setting"], row["seed"], tuple(row["group"]), row["layer"]): row
            for row in content["rows"]
        }
        self.seeds = sorted({seed for _, seed, _, _ in self.rows})
        self.layers: list[int] = content["distances"]["layers"]

    @classmethod
    def load(cls, path: Path) -> Study:
        """Read a `study.json`."""
        return cls(json.loads(path.read_text()))

    @property
    def settings(self) -> list[str]:
        """Those that were trained for every G."""
        whole = tuple(self.layers)
        names = dict.fromkeys(setting for setting, _, group, _ in self.rows if group == whole)
        return [name for name in names if not name.startswith(f"{MAIN}-")]

    def partition(self, method: str, G: int | None = None) -> Mapping[str, Any]:
        """A method's partition into G groups, or the one that it chooses, with its measures."""
        found = self.content["partitions"][method]
        row: Mapping[str, Any] = found["by_groups"][str(found["chosen"] if G is None else G)]
        return row

    def mean(self, setting: str, groups: Iterable[Sequence[int]], metric: str, seed: int) -> float:
        """A metric's mean over the layers of these groups."""
        values = [
            self.rows[setting, seed, tuple(group), layer][metric]
            for group in groups
            for layer in group
        ]
        return fmean(values)

    def means(self, setting: str, groups: Sequence[Sequence[int]], metric: str) -> list[float]:
        """The same for every seed."""
        return [self.mean(setting, groups, metric, seed) for seed in self.seeds]

    def losses(
        self,
        setting: str,
        groups: Sequence[Sequence[int]],
        metric: str,
        beside: str | None = None,
    ) -> list[float]:
        """What the layers' own SAEs have more than these groups', for every seed.

        Args:
            beside: The setting of the layers' own SAEs; by default the same.
        """
        own = [[layer] for group in groups for layer in group]
        pairs = zip(
            self.means(beside or setting, own, metric),
            self.means(setting, groups, metric),
            strict=True,
        )
        return [alone - shared for alone, shared in pairs]


def write_summary(path: Path, figures: Path) -> str:
    """The tables, which are also written to `summary.md` beside the study, and the figures."""
    from benchmarks.quality.figures import write_figures

    study = Study.load(path)
    text = "\n\n".join(
        [
            f"### {study.content['model']}",
            *(table(study, setting) for setting in study.settings),
            by_layer(study),
            predictions(study),
            controls(study),
            stability(study),
        ]
    )
    (path.parent / "summary.md").write_text(text + "\n", encoding="utf-8")
    write_figures(study, figures)
    return text


def table(study: Study, setting: str) -> str:
    """Every G: what is lost, mean over layers, and what is not R^2 or CELS."""
    lines = []
    for G in sorted(map(int, study.content["partitions"]["linkage"]["by_groups"])):
        row = study.partition("linkage", G)
        groups = row["groups"]
        lines.append(
            [
                str(G),
                " ".join(_span(group) for group in groups),
                f"{row['amad']:.3f}",
                *(_figure(study.means(setting, groups, metric)) for metric in METRICS),
                *(_figure(study.losses(setting, groups, metric)) for metric in METRICS),
                f"{fmean(study.means(setting, groups, 'l0')):.1f}",
                f"{100 * fmean(study.means(setting, groups, 'dead')):.1f}%",
            ]
        )
    head = ["G", "groups", "AMAD", "R^2", "CELS", "R^2 lost", "CELS lost", "L0", "dead"]
    return f"**{setting}**, every G by complete linkage\n\n" + _markdown(head, lines)


def by_layer(study: Study) -> str:
    """The chosen partition, layer by layer."""
    groups = study.partition("linkage")["groups"]
    lines = []
    for group in groups:
        for layer in group:
            cells = [str(layer), _span(group)]
            for metric in METRICS:
                for members in ([layer], group):
                    values = [
                        study.rows[MAIN, seed, tuple(members), layer][metric]
                        for seed in study.seeds
                    ]
                    cells.append(_figure(values))
            lines.append(cells)
    head = ["layer", "group", "R^2 alone", "R^2 in group", "CELS alone", "CELS in group"]
    return f"**{MAIN}**, layer by layer at the chosen G = {len(groups)}\n\n" + _markdown(
        head, lines
    )


def predictions(study: Study) -> str:
    """What the law fitted on the published Pythia tables says, and what was measured here."""
    lines = []
    for G in sorted(map(int, study.content["partitions"]["linkage"]["by_groups"])):
        row = study.partition("linkage", G)
        found = predict(row["diameters"], [len(group) for group in row["groups"]])
        cells = [str(G), f"{row['amad']:.3f}"]
        for metric, loss in (
            ("explained_variance", found.explained_variance),
            ("ce_loss_score", found.ce_loss_score),
        ):
            cells.append(_figure(study.losses(MAIN, row["groups"], metric)))
            cells.append(f"{loss.mean:.4f} ({loss.low:.4f} to {loss.high:.4f})")
        lines.append(cells)
    head = ["G", "AMAD", "EV lost", "predicted", "CELS lost", "predicted"]
    return f"**{MAIN}**, measured and predicted from the published Pythia runs\n\n" + _markdown(
        head, lines
    )


def controls(study: Study) -> str:
    """What else could be trained, at the chosen G: what each loses beside a layer's own SAE."""
    chosen = study.partition("linkage")
    groups, G = chosen["groups"], len(chosen["groups"])
    lines = [_losses("linkage", study, MAIN, groups)]
    for method in ("optimal", "even"):
        other = study.partition(method, G)["groups"]
        label = f"{method}: {' '.join(map(_span, other))}"
        lines.append(_losses(label, study, MAIN, other))
    for variant in (*AFFINES, *SAMPLINGS):
        lines.append(_losses(variant, study, f"{MAIN}-{variant}", groups))
    own = [[layer] for layer in study.layers]
    for variant in ("narrower", "fewer-tokens"):
        setting = f"{MAIN}-{variant}"
        example = next(row for (name, *_), row in study.rows.items() if name == setting)
        label = f"per layer, {variant}: d_sae {example['d_sae']:,}, {example['tokens']:,} tokens"
        lines.append(_losses(label, study, setting, own))
    head = ["what is trained", "R^2 lost", "CELS lost"]
    return f"**{MAIN}** at G = {G}: less than a layer's own SAE on as many tokens\n\n" + _markdown(
        head, lines
    )


def stability(study: Study) -> str:
    """Which groups fewer tokens, and other similarities, would have given."""
    measured = study.content["by_distance_tokens"]
    last = [entry for entry in measured if entry["similarity"] == "angular"][-1]
    lines = []
    for entry in measured:
        differ = [G for G, groups in entry["by_groups"].items() if groups != last["by_groups"][G]]
        lines.append(
            [
                entry["similarity"],
                f"{entry['tokens']:,}",
                str(entry["chosen"]),
                ", ".join(differ) or "none",
            ]
        )
    head = [
        "similarity",
        "tokens",
        "G at 0.2",
        f"G whose groups differ from angular at {last['tokens']:,}",
    ]
    return "Groups by tokens that distances are measured on\n\n" + _markdown(head, lines)


def _losses(label: str, study: Study, setting: str, groups: Sequence[Sequence[int]]) -> list[str]:
    """One line: what these lose beside the layers' own SAEs of the main setting.

    Groups of one layer that were not trained under a setting are the main setting's.
    """
    cells = [label]
    for metric in METRICS:
        losses = []
        for seed in study.seeds:
            lost = []
            for group in groups:
                trained = (setting, seed, tuple(group), group[0]) in study.rows
                name = setting if trained else MAIN
                for layer in group:
                    alone = study.rows[MAIN, seed, (layer,), layer][metric]
                    lost.append(alone - study.rows[name, seed, tuple(group), layer][metric])
            losses.append(fmean(lost))
        cells.append(_figure(losses))
    return cells


def _figure(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{fmean(values):.4f}{spread}"


def _span(group: Sequence[int]) -> str:
    return str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}"


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
