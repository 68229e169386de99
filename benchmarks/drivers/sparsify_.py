"""Drives eai-sparsify's Trainer (written for 1.3.3): one SAE per layer, no shuffle buffer."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from sparsify import SaeConfig, TrainConfig, Trainer
from sparsify.sparse_coder import SparseCoder
from transformers import AutoModel

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


def drive(task: Task) -> Result:
    """Train one SAE per layer; the trainer's hooks step each during the host's forward."""
    stopwatch = Stopwatch(task)
    model = AutoModel.from_pretrained(task.host, dtype=getattr(torch, task.host_dtype))
    rows = range(stopwatch.total * task.contexts)
    dataset = Dataset.load_from_disk(task.tokens).with_format("torch").select(rows)
    config = TrainConfig(
        SaeConfig(num_latents=task.d_sae, k=task.k),
        batch_size=task.contexts,
        layers=list(task.layers),
        optimizer="adam",
        lr=task.learning_rate,
        lr_warmup_steps=0,
        auxk_alpha=AUXK_WEIGHT,
        dead_feature_threshold=DEAD_AFTER_TOKENS,
        log_to_wandb=False,
    )
    trainer = Trainer(config, dataset, model.to(task.device))
    (optimizer,) = trainer.optimizers
    if type(optimizer) is not torch.optim.Adam:
        raise RuntimeError("sparsify took bitsandbytes's 8-bit Adam; uninstall bitsandbytes")

    def mark_dead(*_: Any) -> None:
        for silent_tokens in trainer.num_tokens_since_fired.values():
            silent_tokens[: task.dead_latents] = DEAD_AFTER_TOKENS + 1

    model.register_forward_pre_hook(mark_dead)
    last_fvus = _time_parts(stopwatch, trainer, optimizer)
    with contextlib.suppress(Finished):
        trainer.fit()
    return stopwatch.result(fvu=fmean(float(value) for value in last_fvus))


def _time_parts(
    stopwatch: Stopwatch, trainer: Trainer, optimizer: torch.optim.Adam
) -> deque[torch.Tensor]:
    """Time the parts of a step; the FVUs that are returned are those of the newest step."""
    stopwatch.time("host forward", trainer.model, "forward")
    for name in trainer.cfg.hookpoints:
        _time_hooks(stopwatch, trainer.model.base_model.get_submodule(name))
    stopwatch.time("encode", SparseCoder, "encode")
    stopwatch.time("decode", SparseCoder, "decode")
    stopwatch.time("backward", torch.Tensor, "backward")
    stopwatch.time("update", SparseCoder, "set_decoder_norm_to_unit_norm")
    stopwatch.time("update", SparseCoder, "remove_gradient_parallel_to_decoder_directions")
    stopwatch.time("update", optimizer, "step")

    fvus: deque[torch.Tensor] = deque(maxlen=len(trainer.saes))
    forward, zero_grad = SparseCoder.forward, optimizer.zero_grad

    def forward_and_keep(*arguments: Any, **keywords: Any) -> Any:
        output = forward(*arguments, **keywords)
        fvus.append(output.fvu.detach())
        return output

    def zero_grad_and_tell(*arguments: Any, **keywords: Any) -> None:
        zero_grad(*arguments, **keywords)
        stopwatch.end_step()

    patch(SparseCoder, "forward", forward_and_keep)
    patch(optimizer, "zero_grad", zero_grad_and_tell)
    return fvus


def _time_hooks(stopwatch: Stopwatch, block: torch.nn.Module) -> None:
    """What the trainer does inside a block's hook is no part of the host's forward."""
    register = block.register_forward_hook

    def register_timed(hook: Callable[..., Any]) -> Any:
        return register(stopwatch.timed("rest", hook))

    patch(block, "register_forward_hook", register_timed)


if __name__ == "__main__":
    main(drive)
