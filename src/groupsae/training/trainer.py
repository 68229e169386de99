"""The training loop: every SAE, one step at a time, from one forward of the host model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from groupsae.config import TrainingConfig
from groupsae.host.tokens import EndOfText
from groupsae.progress import progress
from groupsae.training.batches import MixedBatches
from groupsae.training.checkpoint import Checkpoints
from groupsae.training.learner import Learner

Record = dict[str, Any]


def train(
    learners: Mapping[str, Learner],
    batches: MixedBatches,
    config: TrainingConfig,
    *,
    checkpoints: Checkpoints,
    log: Callable[[Record], None],
) -> None:
    """Train every SAE for `config.steps` steps, from the newest checkpoint if there is one.

    Args:
        learners: By SAE name; the same names as in `batches`.
        log: Takes one record per SAE every `config.log_every` steps and at the end: step, tokens,
            sae, seconds, and the means since the last one.
    """
    start, seconds_before = checkpoints.restore(learners, batches)
    began = time.monotonic() - seconds_before
    total = config.steps * config.batch_tokens
    with progress(f"train {len(learners)} SAEs", total) as bar:
        bar.skip(start * config.batch_tokens)
        for step in range(start + 1, config.steps + 1):
            try:
                mixed = batches.next()
            except EndOfText:
                checkpoints.save(step - 1, time.monotonic() - began, learners, batches)
                raise
            for name in tuple(mixed):  # a batch is released as soon as it is learnt from
                learners[name].step(*mixed.pop(name))

            note = ""
            if step % config.log_every == 0 or step == config.steps:
                batches.check_finite()
                seconds = round(time.monotonic() - began, 3)
                tokens = step * config.batch_tokens
                fvu = 0.0
                for name, learner in learners.items():
                    when = {"step": step, "tokens": tokens, "sae": name, "seconds": seconds}
                    metrics = learner.metrics()
                    log(when | metrics)
                    fvu += metrics["fvu"] / len(learners)
                note = f"mean FVU {fvu:.4f}"
            bar.advance(config.batch_tokens, note)

            if step % config.checkpoint_every == 0 and step < config.steps:
                batches.check_finite()
                checkpoints.save(step, time.monotonic() - began, learners, batches)
