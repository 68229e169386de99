"""What the drivers of the quality benchmark share: the trial, its rows, and how it is judged."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

Result = dict[str, Any]
Forward = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From rows [token, d_model] to their reconstruction and all latents [token, d_sae]."""

_LEAST_WARMUP = 0.05
"""Where a library's own warm-up is longer than the run: this share of it."""


@dataclass(frozen=True)
class Trial:
    """One SAE to train, the same for every library.

    Attributes:
        rule: As groupsae names it.
        train, held_out: .npy files of float32 rows, normalised, in the order of training.
        k: Active latents of a token; under a penalty the L0 that is aimed at.
        prefixes: matryoshka: ends of the nested dictionaries.
        settings: "equal": the numbers below, which are groupsae's defaults. "own": the library's
            own defaults wherever it has one.
        weight: Of the sparsity penalty, in the library's own terms; None: its default.
        warmup, decay, sparsity_warmup: In steps.
        dead_after_tokens: A latent that was silent for so long takes part in the auxiliary loss.
    """

    rule: str
    train: str
    held_out: str
    batch_tokens: int
    d_sae: int
    k: int
    seed: int
    learning_rate: float
    warmup: int
    decay: int
    sparsity_warmup: int
    auxk_weight: float
    dead_after_tokens: int
    adam_beta1: float
    prefixes: tuple[int, ...] = ()
    weight: float | None = None
    settings: str = "equal"
    threads: int = 1
    device: str = "cpu"

    @property
    def equal(self) -> bool:
        return self.settings == "equal"

    @property
    def steps(self) -> int:
        return len(_rows(self.train)) // self.batch_tokens

    @property
    def d_model(self) -> int:
        return int(_rows(self.train).shape[1])

    def batches(self) -> Iterator[torch.Tensor]:
        """The batches of training, in their order, each read when it is asked for."""
        return iterate(self.train, self.batch_tokens, self.steps)

    def fitting(self, steps: int) -> int:
        """A library's own warm-up, in steps, or a share of the run if that is shorter."""
        return min(steps, round(_LEAST_WARMUP * self.steps))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Trial:
        values = json.loads(text)
        return cls(**{**values, "prefixes": tuple(values["prefixes"])})


def main(train: Callable[[Trial], Mapping[str, Forward]]) -> None:
    """Run a driver on the trial in argv[1] and print its result as the last line of the output.

    Args:
        train: Trains the SAE and returns its forwards: "inference", and "batch" where the latents
            of a batch of tokens can be chosen together, as in training.
    """
    trial = Trial.from_json(sys.argv[1])
    torch.set_num_threads(trial.threads)
    torch.manual_seed(trial.seed)
    with contextlib.redirect_stdout(sys.stderr):
        start = time.perf_counter()
        forwards = train(trial)
        seconds = time.perf_counter() - start
        judged = {name: judge(forward, trial) for name, forward in forwards.items()}
    print(json.dumps({"seconds": seconds, "steps": trial.steps, **judged}), flush=True)


@torch.no_grad()
def judge(forward: Forward, trial: Trial) -> dict[str, float]:
    """On all held-out tokens, summed in float64.

    Returns:
        "r2": 1 - sum ||x - x_hat||^2 / sum ||x - mean x||^2; "l0": mean number of active latents;
        "dead": share of latents that no token activates.
    """
    error = squares = active = 0.0
    total = torch.zeros(trial.d_model, dtype=torch.float64)
    fired = torch.zeros(trial.d_sae, dtype=torch.bool)
    count = 0
    rows = len(_rows(trial.held_out))
    for x in iterate(trial.held_out, trial.batch_tokens, -(-rows // trial.batch_tokens)):
        x_hat, latents = forward(x)
        exact = x.double()
        error += float((exact - x_hat.double()).square().sum())
        squares += float(exact.square().sum())
        total += exact.sum(0)
        active += float((latents > 0).sum())
        fired |= (latents > 0).any(0)
        count += len(x)
    variance = squares - float(total.square().sum()) / count
    return {
        "r2": 1 - error / variance,
        "l0": active / count,
        "dead": float((~fired).double().mean()),
    }


def iterate(path: str, batch_tokens: int, batches: int) -> Iterator[torch.Tensor]:
    """The rows of a file, so many at a time."""
    rows = _rows(path)
    for start in range(0, batches * batch_tokens, batch_tokens):
        yield torch.from_numpy(np.array(rows[start : start + batch_tokens]))


def _rows(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="r")
