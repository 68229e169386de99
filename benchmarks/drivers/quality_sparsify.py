"""Trains an SAE on rows with eai-sparsify's SparseCoder (written for 1.3.3).

Its Trainer reads token ids and runs the host model itself. This is that Trainer's step, with its
own parts, on rows that are there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.sign_sgd import SignSGD

from benchmarks.drivers.quality import Forward, Trial, main

_RATE, _MOMENTUM = 5e-3, 0.95  # of the Trainer's default optimiser, for 2^14 latents


def train(trial: Trial) -> Mapping[str, Forward]:
    """With Adam at an equal rate, or the library's default: schedule-free signum, no AuxK."""
    coder = SparseCoder(trial.d_model, SparseCoderConfig(num_latents=trial.d_sae, k=trial.k))
    if trial.equal:
        optimizer = torch.optim.Adam(coder.parameters(), lr=trial.learning_rate)
    else:
        rate = _RATE / (trial.d_sae / 2**14) ** 0.5
        optimizer = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=rate), momentum=_MOMENTUM)
        optimizer.train()
    auxk_weight = trial.auxk_weight if trial.equal else 0.0
    silent_tokens = torch.zeros(trial.d_sae, dtype=torch.long)
    for number, x in enumerate(trial.batches()):
        if number == 0:
            coder.b_dec.data = x.mean(0)
        coder.set_decoder_norm_to_unit_norm()
        dead = silent_tokens > trial.dead_after_tokens if auxk_weight else None
        output = coder(x, dead_mask=dead)
        (output.fvu + auxk_weight * output.auxk_loss).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        silent_tokens += len(x)
        silent_tokens[output.latent_indices.flatten()] = 0
    if not trial.equal:
        optimizer.eval()

    def inference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = coder(x)
        empty = torch.zeros(len(x), trial.d_sae)
        latents = empty.scatter(1, output.latent_indices, output.latent_acts)
        return output.sae_out, latents

    return {"inference": inference}


if __name__ == "__main__":
    main(train)
