"""The training loop: every SAE, one step at a time, from one forward of the host model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from groupsae.config import TrainingConfig
from groupsae.errors import Interrupted
from groupsae.host.tokens import EndOfText
from groupsae.progress import progress
from groupsae.training.batches import MixedBatches
from groupsae.training.checkpoint import Checkpoints
from groupsae.training.interruption import stopping_on_signals
from groupsae.training.learner import Learner

Record = dict[str, Any]


def train(
    learners: Mapping[str, Learner],
    batches: MixedBatches,
    config: TrainingConfig,
    *,
    checkpoints: Checkpoints,
    log: Callable[[Record], None],
    slots: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Train every SAE for `config.steps` steps, from the newest checkpoint if there is one.

    Args:
        learners: By SAE name.
        log: Takes one record per SAE every `config.log_every` steps and at the end: step, tokens,
            sae, seconds, and the means since the last one.
        slots: The SAEs that learn from each of the mixed batches, by its name in `batches`; by
            default each from the one of its own name.

    Raises:
        Interrupted: A signal came; the step is finished and a checkpoint written.
        EndOfText: The text is used up; a checkpoint is written.
    """
    slots = slots or {name: [name] for name in learners}
    start, seconds_before = checkpoints.restore(learners, batches)
    began = time.monotonic() - seconds_before
    total = config.steps * config.batch_tokens
    with (
        progress(f"train {len(learners)} SAEs", total) as bar,
        stopping_on_signals() as request,
        closing(checkpoints),
    ):
        bar.skip(start * config.batch_tokens)
        for step in range(start + 1, config.steps + 1):
            try:
                mixed = batches.next()
            except EndOfText:
                checkpoints.save(step - 1, time.monotonic() - began, learners, batches)
                raise
            for slot in tuple(mixed):  # a batch is released as soon as all have learnt from it
                _learn([learners[name] for name in slots[slot]], *mixed.pop(slot))

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

            due = step % config.checkpoint_every == 0 or request.signal is not None
            if due and step < config.steps:
                batches.check_finite()
                checkpoints.save(step, time.monotonic() - began, learners, batches)
            if request.signal is not None and step < config.steps:
                raise Interrupted(request.signal, step)
            checkpoints.check()


def _learn(
    learners: Iterable[Learner], x: Float[Tensor, "row d_model"], members: Int[Tensor, " row"]
) -> None:
    for learner in learners:
        learner.step(x, members)
