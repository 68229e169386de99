"""Trains an SAE on rows with dictionary-learning's trainers (written for 0.1.0)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import TopKTrainer

from benchmarks.drivers.quality import Forward, Trial, main

_TRAINERS = {
    "topk": TopKTrainer,
    "batchtopk": BatchTopKTrainer,
    "matryoshka": MatryoshkaBatchTopKTrainer,
    "jumprelu": JumpReluTrainer,
    "relu": StandardTrainer,
    "gated": GatedSAETrainer,
}
_BY_BATCH = ("batchtopk", "matryoshka")
_BY_COUNT = ("topk", *_BY_BATCH)
_WARMUP, _SPARSITY_WARMUP, _THRESHOLD_START = 1000, 2000, 1000  # its defaults, in steps


def train(trial: Trial) -> Mapping[str, Forward]:
    """By the trainers' `update`."""
    trainer = _TRAINERS[trial.rule](
        steps=trial.steps,
        activation_dim=trial.d_model,
        dict_size=trial.d_sae,
        layer=0,
        lm_name="rows",
        seed=trial.seed,
        device="cpu",
        **_options(trial),
    )
    if trial.equal and trial.rule in _BY_COUNT:
        trainer.dead_feature_threshold = trial.dead_after_tokens
    for number, x in enumerate(trial.batches()):
        trainer.update(number, x)
    sae = trainer.ae

    def inference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = sae.encode(x)
        return sae.decode(latents), latents

    def batch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = sae.encode(x, use_threshold=False)
        return sae.decode(latents), latents

    return {"inference": inference} | ({"batch": batch} if trial.rule in _BY_BATCH else {})


def _options(trial: Trial) -> dict[str, Any]:
    """Of the trainer. A warm-up that is longer than the run is refused by the library."""
    options: dict[str, Any] = {"warmup_steps": trial.fitting(_WARMUP)}
    if trial.equal:
        options = {"lr": trial.learning_rate, "warmup_steps": trial.warmup}
        if trial.decay:
            options["decay_start"] = trial.steps - trial.decay
    if trial.rule in _BY_COUNT:
        options["k"] = trial.k
        options["threshold_start_step"] = min(_THRESHOLD_START, trial.steps // 2)
        if trial.equal:
            options["auxk_alpha"] = trial.auxk_weight
    else:
        options["sparsity_warmup_steps"] = (
            trial.sparsity_warmup if trial.equal else trial.fitting(_SPARSITY_WARMUP)
        )
    if trial.rule == "matryoshka":
        sizes = [end - start for start, end in itertools.pairwise((0, *trial.prefixes))]
        options["group_fractions"] = [size / trial.d_sae for size in sizes]
    if trial.rule == "jumprelu":
        options["target_l0"] = float(trial.k)
    elif trial.rule not in _BY_COUNT and trial.weight is not None:
        options["l1_penalty"] = trial.weight
    return options


if __name__ == "__main__":
    main(train)
