"""Trains an SAE on rows with groupsae's `Learner`, by the config's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.drivers.quality import Forward, Trial, main
from groupsae.architectures import BY_BATCH, BY_COUNT
from groupsae.config import Config
from groupsae.sae import SAE
from groupsae.sae.sparsity import batch_cut
from groupsae.training.session import new_learner, sae_config


def train(trial: Trial) -> Mapping[str, Forward]:
    """Rows are normalised already: the SAE's own mean and scale stay 0 and 1."""
    config = config_of(trial)
    start = torch.Generator().manual_seed(trial.seed)
    sae = SAE(sae_config(config, (0,), trial.d_model), generator=start)
    learner = new_learner(sae, config, fresh=True)
    for x in trial.batches():
        learner.step(x)
    learner.finish()

    def inference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = sae.encode_normalized(x)
        return sae.decode_normalized(latents), latents.dense(trial.d_sae)

    def batch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = torch.relu(F.linear(sae.inputs(x), sae.W_enc, sae.b_enc))
        z = z * (z >= batch_cut(z, trial.k))
        return sae.outputs(z @ sae.W_dec), z

    return {"inference": inference} | ({"batch": batch} if trial.rule in BY_BATCH else {})


def config_of(trial: Trial) -> Config:
    """The defaults, but for sizes, seed and what the trial weighs sparsity with."""
    sae: dict[str, Any] = {"architecture": trial.rule, "d_sae": trial.d_sae}
    if trial.rule in BY_COUNT:
        sae["k"] = trial.k
    if trial.rule == "jumprelu":
        sae["target_l0"] = trial.k
    training = {
        "tokens": trial.steps * trial.batch_tokens,
        "batch_tokens": trial.batch_tokens,
        "buffer_tokens": trial.batch_tokens,
        "seed": trial.seed,
        "sparsity_weight": trial.weight,
    }
    return Config.model_validate({"sae": sae, "training": training})


if __name__ == "__main__":
    main(train)
