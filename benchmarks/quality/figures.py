"""The study's figures."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.quality.plan import MAIN
from benchmarks.quality.summary import METRICS, Study


def write_figures(study: Study, directory: Path) -> None:
    """`quality-NAME-amad.png`: loss against AMAD; `quality-NAME-layers.png`: layer by layer."""
    directory.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in study.content["model"].lower())
    _loss_by_amad(study, directory / f"quality-{name}-amad.png")
    _by_layer(study, directory / f"quality-{name}-layers.png")


def _loss_by_amad(study: Study, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    rows = [study.partition("linkage", G) for G in range(1, len(study.layers) + 1)]
    amads = [row["amad"] for row in rows]
    for axis, (metric, label) in zip(axes, METRICS.items(), strict=True):
        for setting in study.settings:
            losses = [study.losses(setting, row["groups"], metric) for row in rows]
            axis.errorbar(
                amads,
                [fmean(values) for values in losses],
                yerr=[stdev(values) if len(values) > 1 else 0 for values in losses],
                marker="o",
                markersize=3,
                linewidth=1,
                capsize=2,
                label=setting,
            )
        axis.axvline(0.2, color="0.6", linewidth=0.8, linestyle="--")
        axis.set(xlabel="AMAD", ylabel=f"{label} lost, mean over layers")
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(
        f"{study.content['model']}: what groups lose beside a layer's own SAE", fontsize=10
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _by_layer(study: Study, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    n = len(study.layers)
    for axis, (metric, label) in zip(axes, METRICS.items(), strict=True):
        for G in range(1, n + 1):
            groups = study.partition("linkage", G)["groups"]
            of_layer = {layer: group for group in groups for layer in group}
            means = [
                fmean(
                    study.rows[MAIN, seed, tuple(of_layer[layer]), layer][metric]
                    for seed in study.seeds
                )
                for layer in study.layers
            ]
            alone = n == G
            axis.plot(
                study.layers,
                means,
                color="black" if alone else plt.get_cmap("viridis")((G - 1) / max(n - 1, 1)),
                linewidth=1.6 if alone else 1,
                marker="o",
                markersize=3,
                label="per layer" if alone else f"G = {G}",
            )
        axis.set(xlabel="layer", ylabel=label, xticks=study.layers)
    axes[0].legend(fontsize=7, frameon=False)
    figure.suptitle(
        f"{study.content['model']}, {MAIN}: every number of groups, layer by layer", fontsize=10
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
