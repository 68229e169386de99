"""Drives groupsae: `train_saes`, which the command `groupsae train` calls."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections import deque
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets  # noqa: F401
import torch
import transformers

from benchmarks.drivers.common import (
    AUXK_WEIGHT,
    DEAD_AFTER_TOKENS,
    Finished,
    Result,
    Stopwatch,
    Task,
    main,
    patch,
)
from groupsae.config import Config
from groupsae.grouping.distance import LayerMoments, Moments
from groupsae.host.model import HostModel
from groupsae.host.tokens import Corpus, open_corpus
from groupsae.training.batches import MixedBatches
from groupsae.training.learner import Learner
from groupsae.training.memory import MemoryAccount, host_bytes
from groupsae.training.session import train_saes

_SAMPLE_CONTEXTS = 4  # for the layers' scales

# groupsae imports these only where it needs them; the memory after imports is to hold them.
_ = transformers.GPTNeoXForCausalLM


def drive(task: Task) -> Result:
    """Train one SAE per group; returns its times, and what its memory is made of."""
    stopwatch = Stopwatch(task)
    host = HostModel.load(task.host, dtype=task.host_dtype, device=task.device)
    corpus = open_corpus(
        task.tokens,
        tokenizer=None,
        context_length=task.context_length,
        held_out=0.0,
        vocab_size=host.vocab_size,
    )
    moments = _moments(host, corpus, task)

    stopwatch.time("host forward", HostModel, "visit")
    stopwatch.time("buffer", MixedBatches, "next")
    stopwatch.time("SAE steps", Learner, "step")
    last_fvus: deque[torch.Tensor] = deque(maxlen=len(task.groups))
    step, numbers = Learner.step, itertools.count(1)

    def step_and_tell(learner: Learner, *arguments: Any, **keywords: Any) -> Any:
        if task.dead_latents:
            learner.tokens = DEAD_AFTER_TOKENS
            learner.silent_tokens[: task.dead_latents] = DEAD_AFTER_TOKENS
        result = step(learner, *arguments, **keywords)
        last_fvus.append(result.fvu)
        if next(numbers) % len(task.groups) == 0:
            stopwatch.end_step()
        return result

    patch(Learner, "step", step_and_tell)
    with tempfile.TemporaryDirectory() as directory, contextlib.suppress(Finished):
        train_saes(
            host,
            corpus.train(),
            moments,
            task.groups,
            _config(task, stopwatch.total),
            directory=Path(directory),
            key="benchmark",
        )
    return stopwatch.result(
        fvu=fmean(float(value) for value in last_fvus),
        contexts=_contexts(task),
        memory_bytes=_accounting(host, task, stopwatch.baseline_bytes),
    )


def _contexts(task: Task) -> int:
    """In one forward: on the CPU two a step are no slower than one, and take less memory."""
    return max(task.contexts // 2, 1) if task.device == "cpu" else task.contexts


def _config(task: Task, steps: int) -> Config:
    """More tokens than are trained on: the buffer stays full, every step has its forward."""
    return Config.parse(
        {
            "sae": {"k": task.k, "d_sae": task.d_sae, "affine": "scale"},
            "training": {
                "tokens": (steps + task.buffer_batches) * task.batch_tokens,
                "batch_tokens": task.batch_tokens,
                "buffer_tokens": task.buffer_batches * task.batch_tokens,
                "host_batch_contexts": _contexts(task),
                "baseline": False,
                "kernel": task.kernel,
                "learning_rate": task.learning_rate,
                "auxk_weight": AUXK_WEIGHT,
                "dead_after_tokens": DEAD_AFTER_TOKENS,
            },
        }
    )


def _moments(host: HostModel, corpus: Corpus, task: Task) -> Moments:
    """The layers' mean norms, from a few contexts."""
    streams = host.residual_streams(corpus.train().next_contexts(_SAMPLE_CONTEXTS), task.layers)
    moments = LayerMoments(task.layers)
    moments.update(torch.stack([streams[layer].flatten(0, 1).cpu() for layer in task.layers]))
    return moments.result()


def _accounting(host: HostModel, task: Task, baseline: int | None) -> dict[str, int | None]:
    """What memory must hold, in bytes. SAEs and buffer are float32 whatever the host is."""
    saes = len(task.groups)
    account = MemoryAccount.of(
        _config(task, steps=1),
        n_saes=saes,
        d_model=task.d_model,
        context_length=task.context_length,
        host=host_bytes(host),
    )
    return {
        "process after imports": baseline,
        "host weights": account.host,
        "SAE weights": account.saes,
        "Adam states": account.moments,
        "buffer": 4 * saes * task.buffer_batches * task.batch_tokens * task.d_model,
        "one chunk": account.chunk,
    }


if __name__ == "__main__":
    main(drive)
