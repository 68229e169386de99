"""The training loop: every SAE, one step at a time, from one forward of the host model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from signal import Signals
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
from groupsae.training.team import Team

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
    team: Team | None = None,
) -> None:
    """Train every SAE for `config.steps` steps, from the newest checkpoint if there is one.

    Args:
        learners: By SAE name.
        log: Takes one record per SAE every `config.log_every` steps and at the end: step, tokens,
            sae, seconds, and the means since the last one.
        slots: The SAEs that learn from each of the mixed batches, by its name in `batches`; by
            default each from the one of its own name.
        team: The processes that train together, each with its own learners. The first one logs.

    Raises:
        Interrupted: A signal came; the step is finished and a checkpoint written.
        EndOfText, BrokenText: There is no more text, or it cannot be read; a checkpoint is written.
        InputError: More batches than `config.max_dropped_batches` were not finite; a checkpoint is
            written.
    """
    team = team or Team()
    slots = slots or {name: [name] for name in learners}
    start, seconds_before = checkpoints.restore(learners, batches)
    began = time.monotonic() - seconds_before
    total = config.steps * config.batch_tokens
    dropped = _Dropped()
    with (
        progress("train", total) as bar,
        stopping_on_signals() as request,
        _left(checkpoints),
    ):
        bar.skip(start * config.batch_tokens)
        for step in range(start + 1, config.steps + 1):
            try:
                mixed = batches.next()
            except (EndOfText, BrokenText):
                checkpoints.save(step - 1, time.monotonic() - began, learners, batches)
                checkpoints.close()
                raise
            for slot in tuple(mixed):  # a batch is released as soon as all have learnt from it
                here = [learners[name] for name in slots[slot] if name in learners]
                _learn(here, *mixed.pop(slot))

            note = ""
            if step % config.log_every == 0 or step == config.steps:
                found = _metrics(learners, team)
                seconds = round(time.monotonic() - began, 3)
                when = {"step": step, "tokens": step * config.batch_tokens, "seconds": seconds}
                for name, metrics in found.items():
                    log({"sae": name} | when | metrics)
                fvu = sum(metrics["fvu"] for metrics in found.values()) / len(found)
                note = f"mean FVU of {len(found)} SAEs {fvu:.4f}"
                dropped = dropped.now(found, batches, team, config.max_dropped_batches)
            bar.advance(config.batch_tokens, note)

            too_many = dropped.batches > config.max_dropped_batches
            signal, writing = team.largest(request.signal or 0, checkpoints.writing)
            if not writing:
                checkpoints.put_in_place()
            if step < config.steps and (step % config.checkpoint_every == 0 or signal or too_many):
                checkpoints.save(step, time.monotonic() - began, learners, batches)
            if too_many or signal or step == config.steps:
                checkpoints.close()
            if too_many:
                raise InputError(
                    f"training.max_dropped_batches={config.max_dropped_batches}: {dropped}. The "
                    "weights are those before; try host.dtype=float32, check the model's weights, "
                    "or allow more"
                )
            if signal and step < config.steps:
                raise Interrupted(Signals(signal), step)


@contextmanager
def _left(checkpoints: Checkpoints) -> Iterator[None]:
    try:
        yield
    finally:
        checkpoints.leave()


@dataclass(frozen=True)
class _Dropped:
    """The SAE of which most batches were left out.

    Attributes:
        layers: Those that gave what is not finite.
    """

    sae: str = ""
    batches: int = 0
    layers: tuple[int, ...] = ()
    host: str = ""

    def now(
        self, metrics: Mapping[str, Record], batches: MixedBatches, team: Team, allowed: int
    ) -> _Dropped:
        """By the metrics of all SAEs; more than before, if they are allowed, are warned of."""
        sae = max(metrics, key=lambda name: metrics[name]["dropped"])
        layers = sorted({layer for own in team.gather(batches.not_finite()) for layer in own})
        found = _Dropped(sae, metrics[sae]["dropped"], tuple(layers), batches.host.name)
        if self.batches < found.batches <= allowed:
            _log.warning("%s; training goes on without them", found)
        return found

    def __str__(self) -> str:
        cause = "gradients were NaN or infinite"
        if self.layers:
            layers = ", ".join(map(str, self.layers))
            cause = f"layer {layers} of {self.host} gave NaN or infinite activations"
        return f"{cause}: {self.batches} batches of {self.sae} were left out"


def _metrics(learners: Mapping[str, Learner], team: Team) -> dict[str, Record]:
    """Of all SAEs, by name; of one that several processes share, once."""
    own = {name: learner.metrics() for name, learner in learners.items()}
    return {name: found for of_rank in team.gather(own) for name, found in of_rank.items()}


def _learn(
    learners: Iterable[Learner], x: Float[Tensor, "row d_model"], members: Int[Tensor, " row"]
) -> None:
    for learner in learners:
        learner.step(x, members)
