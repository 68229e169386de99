"""Trains an SAE on rows with sae-lens's SAETrainer (written for 6.54.12)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.training.sae_trainer import SAETrainer

from benchmarks.drivers.quality import Forward, Trial, main

_CLASSES = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "matryoshka": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
    "relu": (StandardTrainingSAE, StandardTrainingSAEConfig),
    "gated": (GatedTrainingSAE, GatedTrainingSAEConfig),
}
_BY_BATCH = ("batchtopk", "matryoshka")
_WEIGHT = {"jumprelu": "l0", "relu": "l1", "gated": "l1"}
_RATE = 3e-4  # its default
_DEAD_AFTER_STEPS = 1000  # its default


def train(trial: Trial) -> Mapping[str, Forward]:
    """By `SAETrainer.fit`; initial norms and losses are the library's own under all settings."""
    sae_class, sae_config = _CLASSES[trial.rule]
    sae = sae_class(sae_config(d_in=trial.d_model, d_sae=trial.d_sae, **_options(trial)))
    SAETrainer(_config(trial), sae, data_provider=trial.batches()).fit()
    sae.eval()

    def chosen_as_in_training(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = sae.encode(x)
        return sae.decode(latents), latents

    def inference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, pre_activations = sae.encode_with_hidden_pre(x)
        above = pre_activations > sae.topk_threshold
        latents = torch.relu(pre_activations) * above
        return sae.decode(latents), latents

    if trial.rule in _BY_BATCH:
        return {"inference": inference, "batch": chosen_as_in_training}
    return {"inference": chosen_as_in_training}


def _options(trial: Trial) -> dict[str, Any]:
    """Of the SAE's configuration."""
    if trial.rule in _WEIGHT:
        name = _WEIGHT[trial.rule]
        options: dict[str, Any] = {f"{name}_warm_up_steps": trial.sparsity_warmup}
        return options if trial.weight is None else options | {f"{name}_coefficient": trial.weight}
    options = {"k": trial.k}
    if trial.equal:
        options["aux_loss_coefficient"] = trial.auxk_weight
    if trial.rule == "matryoshka":
        options["matryoshka_widths"] = list(trial.prefixes)
    return options


def _config(trial: Trial) -> SAETrainerConfig:
    steps = trial.steps
    rate = trial.learning_rate if trial.equal else _RATE
    dead_after_steps = -(-trial.dead_after_tokens // trial.batch_tokens)
    return SAETrainerConfig(
        total_training_samples=steps * trial.batch_tokens,
        train_batch_size_samples=trial.batch_tokens,
        lr=rate,
        lr_end=rate / 10,
        lr_warm_up_steps=trial.warmup if trial.equal else 0,
        lr_decay_steps=trial.decay if trial.equal else 0,
        adam_beta1=trial.adam_beta1 if trial.equal else 0.9,
        dead_feature_window=dead_after_steps if trial.equal else _DEAD_AFTER_STEPS,
    )


if __name__ == "__main__":
    main(train)
