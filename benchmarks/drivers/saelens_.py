"""Drives sae-lens's MultiSAETrainingRunner (written for 6.54.12): one SAE per layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from sae_lens import LoggingConfig, TopKTrainingSAEConfig
from sae_lens.multi_sae_training_runner import (
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.saes.topk_sae import TopKTrainingSAE
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_neox_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.drivers.common import Finished, Result, Stopwatch, Task, fvu, main, patch

_DEAD_AFTER_STEPS = 1000  # the library's default, counted in steps


def drive(task: Task) -> Result:
    """Train one SAE per layer from sae-lens's mixing buffer."""
    # The mixing buffer keeps half of what it holds and serves the other half before it reads on.
    stopwatch = Stopwatch(task, period=max(1, task.buffer_batches // 2))
    hook_names = {f"layer{layer}": f"blocks.{layer}.hook_resid_post" for layer in task.layers}
    config = MultiSAETrainingRunnerConfig(
        saes={
            name: TopKTrainingSAEConfig(
                d_in=task.d_model, d_sae=task.d_sae, k=task.k, dtype="float32", device=task.device
            )
            for name in hook_names
        },
        hook_names=hook_names,
        model_name=task.host,
        streaming=False,
        context_size=task.context_length,
        training_tokens=(stopwatch.total + 1) * task.batch_tokens,
        train_batch_size_tokens=task.batch_tokens,
        store_batch_size_prompts=task.contexts,
        n_batches_in_buffer=task.buffer_batches * task.contexts,  # counted in contexts
        prepend_bos=False,
        lr=task.learning_rate,
        dead_feature_window=_DEAD_AFTER_STEPS,
        device=task.device,
        dtype="float32",
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
    )
    runner = MultiSAETrainingRunner(
        config,
        override_dataset=Dataset.load_from_disk(task.tokens),
        override_model=_hooked_transformer(task),
    )
    newest: dict[str, Any] = {}
    _time_parts(stopwatch, task, newest)
    with contextlib.suppress(Finished):
        runner.run()
    with torch.no_grad():
        last = fmean(fvu(output.sae_in.float(), output.sae_out) for output in newest.values())
    return stopwatch.result(fvu=last)


def _hooked_transformer(task: Task) -> HookedTransformer:
    """The host model with its own weights in transformer-lens's form, which can stop at a layer."""
    model = AutoModelForCausalLM.from_pretrained(task.host, dtype=getattr(torch, task.host_dtype))
    given = model.config
    d_head = given.hidden_size // given.num_attention_heads
    config = HookedTransformerConfig(
        n_layers=given.num_hidden_layers,
        d_model=given.hidden_size,
        n_ctx=given.max_position_embeddings,
        d_head=d_head,
        n_heads=given.num_attention_heads,
        d_mlp=given.intermediate_size,
        d_vocab=given.vocab_size,
        act_fn=given.hidden_act,
        eps=given.layer_norm_eps,
        normalization_type="LN",
        positional_embedding_type="rotary",
        rotary_dim=int(given.rope_parameters["partial_rotary_factor"] * d_head),
        rotary_base=given.rope_parameters["rope_theta"],
        rotary_adjacent_pairs=False,
        parallel_attn_mlp=given.use_parallel_residual,
        default_prepend_bos=False,
        init_weights=False,
        dtype=model.dtype,
        device=task.device,
    )
    tokenizer = AutoTokenizer.from_pretrained(task.host)
    hooked = HookedTransformer(config, tokenizer=tokenizer)
    hooked.load_state_dict(convert_neox_weights(model, config), strict=False)  # buffers stay
    return hooked


def _time_parts(stopwatch: Stopwatch, task: Task, newest: dict[str, Any]) -> None:
    """Time the parts of a step; `newest` takes each SAE's output of the newest step."""
    stopwatch.time("host forward", ActivationsStore, "get_multi_hook_activations")
    stopwatch.time("encode", TopKTrainingSAE, "encode_with_hidden_pre")
    stopwatch.time("decode", TopKTrainingSAE, "decode")
    stopwatch.time("backward", torch.Tensor, "backward")
    stopwatch.time("update", torch.nn.utils, "clip_grad_norm_")
    stopwatch.time("update", torch.optim.Adam, "step")
    loader = ActivationsStore.get_multi_hook_data_loader
    train_step, update_bar = SAETrainer._train_step, MultiSAETrainer._update_pbar

    def timed_loader(store: ActivationsStore) -> Iterator[dict[str, torch.Tensor]]:
        return stopwatch.iterate("buffer", loader(store))

    def train_step_with_dead(trainer: SAETrainer, *arguments: Any, **keywords: Any) -> Any:
        if task.dead_latents:
            trainer.n_forward_passes_since_fired[: task.dead_latents] = _DEAD_AFTER_STEPS + 1
        return train_step(trainer, *arguments, **keywords)

    def update_bar_and_tell(
        trainer: MultiSAETrainer, outputs: dict[str, Any], *arguments: Any, **keywords: Any
    ) -> None:
        newest.update(outputs)
        update_bar(trainer, outputs, *arguments, **keywords)
        stopwatch.end_step()

    patch(ActivationsStore, "get_multi_hook_data_loader", timed_loader)
    patch(SAETrainer, "_train_step", train_step_with_dead)
    patch(MultiSAETrainer, "_update_pbar", update_bar_and_tell)


if __name__ == "__main__":
    main(drive)
