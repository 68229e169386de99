"""Drives dictionary-learning's trainSAE (written for 0.1.0): one layer, from text.

The library has no shared forward: L layers are L runs. The middle layer is run, whose forward costs
what the layers' forwards cost on average.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from datasets import Dataset
from dictionary_learning import ActivationBuffer
from dictionary_learning.trainers import top_k
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE
from nnsight import LanguageModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.drivers.common import (
    AUXK_WEIGHT,
    DEAD_AFTER_TOKENS,
    Finished,
    Result,
    Stopwatch,
    Task,
    fvu,
    main,
    patch,
)


def drive(task: Task) -> Result:
    """Train one SAE on the middle layer; `runs` says how many such runs all layers take."""
    # The buffer is refilled once it is less than half full.
    stopwatch = Stopwatch(task, period=task.buffer_batches // 2 + 1)
    tokenizer = AutoTokenizer.from_pretrained(task.host)
    tokenizer.padding_side = "right"
    model = AutoModelForCausalLM.from_pretrained(task.host, dtype=getattr(torch, task.host_dtype))
    language_model = LanguageModel(model.to(task.device), tokenizer=tokenizer)
    layer = task.layers[len(task.layers) // 2]
    buffer = ActivationBuffer(
        iter(_texts(task, stopwatch.total + 2 * task.buffer_batches)),
        language_model,
        language_model.gpt_neox.layers[layer],
        d_submodule=task.d_model,
        n_ctxs=task.buffer_batches * task.contexts,
        ctx_len=task.context_length,
        refresh_batch_size=task.contexts,
        out_batch_size=task.batch_tokens,
        device=task.device,
    )
    newest: dict[str, Any] = {}
    _time_parts(stopwatch, task, newest)
    trainer = {
        "trainer": TopKTrainer,
        "steps": 10 * stopwatch.total,
        "activation_dim": task.d_model,
        "dict_size": task.d_sae,
        "k": task.k,
        "layer": layer,
        "lm_name": task.host,
        "lr": task.learning_rate,
        "warmup_steps": 0,
        "auxk_alpha": AUXK_WEIGHT,
        "device": task.device,
        "seed": 0,
    }
    with contextlib.suppress(Finished):
        trainSAE(buffer, [trainer], steps=stopwatch.total + 1, device=task.device)
    with torch.no_grad():
        last = fvu(newest["x"], newest["trainer"].ae(newest["x"]))
    return stopwatch.result(fvu=last, host_part="text", runs=len(task.layers))


def _texts(task: Task, batches: int) -> list[str]:
    """The contexts as text; the tokenizer's words are t0, t1 and so on."""
    dataset = Dataset.load_from_disk(task.tokens).select(range(batches * task.contexts))
    return [" ".join(f"t{token}" for token in ids) for ids in dataset["input_ids"]]


def _time_parts(stopwatch: Stopwatch, task: Task, newest: dict[str, Any]) -> None:
    """Time the parts of a step; `newest` takes the newest batch and the trainer."""
    stopwatch.time("text", ActivationBuffer, "text_batch")
    stopwatch.time("host forward", ActivationBuffer, "refresh")
    stopwatch.time("buffer", ActivationBuffer, "__next__")
    stopwatch.time("encode", AutoEncoderTopK, "encode")
    stopwatch.time("decode", AutoEncoderTopK, "decode")
    stopwatch.time("backward", torch.Tensor, "backward")
    stopwatch.time("update", torch.nn.utils, "clip_grad_norm_")
    stopwatch.time("update", torch.optim.Adam, "step")
    stopwatch.time("update", top_k, "remove_gradient_parallel_to_decoder_directions")
    stopwatch.time("update", top_k, "set_decoder_norm_to_unit_norm")
    update = TopKTrainer.update

    def update_and_tell(trainer: TopKTrainer, step: int, x: torch.Tensor) -> float:
        if task.dead_latents:
            trainer.num_tokens_since_fired[: task.dead_latents] = DEAD_AFTER_TOKENS
        loss: float = update(trainer, step, x)
        newest.update(trainer=trainer, x=x)
        stopwatch.end_step()
        return loss

    patch(TopKTrainer, "update", update_and_tell)


if __name__ == "__main__":
    main(drive)
