"""The training loop: every SAE, one step at a time, from one forward of the host model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from groupsae.config import TrainingConfig
from groupsae.errors import InputError, Interrupted
from groupsae.host.faults import BrokenText
from groupsae.host.tokens import EndOfText
from groupsae.progress import progress
from groupsae.training.batches import MixedBatches
from groupsae.training.checkpoint import Checkpoints
from groupsae.training.interruption import stopping_on_signals
from groupsae.training.learner import Learner

_log = logging.getLogger(__name__)

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
        EndOfText, BrokenText: There is no more text, or it cannot be read; a checkpoint is written.
        InputError: More batches than `config.max_dropped_batches` were not finite; a checkpoint is
            written.
    """
    slots = slots or {name: [name] for name in learners}
    start, seconds_before = checkpoints.restore(learners, batches)
    began = time.monotonic() - seconds_before
    total = config.steps * config.batch_tokens
    said = 0  # batches that were dropped, of the SAE that has most
    with (
        progress(f"train {len(learners)} SAEs", total) as bar,
        stopping_on_signals() as request,
        closing(checkpoints),
    ):
        bar.skip(start * config.batch_tokens)
        for step in range(start + 1, config.steps + 1):
            try:
                mixed = batches.next()
            except (EndOfText, BrokenText):
                checkpoints.save(step - 1, time.monotonic() - began, learners, batches)
                raise
            for slot in tuple(mixed):  # a batch is released as soon as all have learnt from it
                _learn([learners[name] for name in slots[slot]], *mixed.pop(slot))

            note = ""
            if step % config.log_every == 0 or step == config.steps:
                said = _warn_of_dropped(learners, batches, config, said)
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

            too_many = said > config.max_dropped_batches
            due = step % config.checkpoint_every == 0 or request.signal is not None or too_many
            if due and step < config.steps:
                checkpoints.save(step, time.monotonic() - began, learners, batches)
            if too_many:
                raise InputError(
                    f"training.max_dropped_batches={config.max_dropped_batches}: "
                    f"{_dropped(learners, batches)}. The weights are those before; try "
                    "host.dtype=float32, check the model's weights, or allow more"
                )
            if request.signal is not None and step < config.steps:
                raise Interrupted(request.signal, step)
            checkpoints.check()


def _warn_of_dropped(
    learners: Mapping[str, Learner], batches: MixedBatches, config: TrainingConfig, said: int
) -> int:
    """How many batches the SAE that lost most has dropped; more than were said before are told."""
    most = max(learner.n_dropped for learner in learners.values())
    if said < most <= config.max_dropped_batches:
        _log.warning("%s; training goes on without them", _dropped(learners, batches))
    return most


def _dropped(learners: Mapping[str, Learner], batches: MixedBatches) -> str:
    name, learner = max(learners.items(), key=lambda item: item[1].n_dropped)
    layers = ", ".join(map(str, batches.not_finite()))
    cause = f"layer {layers} of {batches.host.name} gave NaN or infinite activations"
    return (
        f"{cause if layers else 'gradients were NaN or infinite'}: {learner.n_dropped} batches of "
        f"{name} were left out"
    )


def _learn(
    learners: Iterable[Learner], x: Float[Tensor, "row d_model"], members: Int[Tensor, " row"]
) -> None:
    for learner in learners:
        learner.step(x, members)
