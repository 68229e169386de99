"""Small language models with random weights, one per architecture, made without any file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

VOCAB_SIZE = 96
CONTEXT_LENGTH = 48
D_MODEL = 32
N_LAYERS = 3

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": CONTEXT_LENGTH,
    "hidden_size": D_MODEL,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "initializer_range": 0.2,  # ten times the usual: every block changes its stream visibly
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
_GROUPED = {"num_key_value_heads": 2}
_EXPERTS = {"num_experts_per_tok": 2}


@dataclass(frozen=True)
class Architecture:
    """A model family's config class, what its config needs, and where its parts lie."""

    config: str
    blocks: str
    final_norm: str
    extra: dict[str, Any] = field(default_factory=dict)


ARCHITECTURES = {
    "gpt_neox": Architecture("GPTNeoXConfig", "gpt_neox.layers", "gpt_neox.final_layer_norm"),
    "gpt2": Architecture("GPT2Config", "transformer.h", "transformer.ln_f"),
    "llama": Architecture("LlamaConfig", "model.layers", "model.norm", extra=_GROUPED),
    "mistral": Architecture(
        "MistralConfig", "model.layers", "model.norm", extra={**_GROUPED, "sliding_window": 5}
    ),
    "qwen3": Architecture(
        "Qwen3Config", "model.layers", "model.norm", extra={**_GROUPED, "head_dim": 8}
    ),
    "gemma3": Architecture(
        "Gemma3TextConfig",
        "model.layers",
        "model.norm",
        extra={
            **_GROUPED,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "opt": Architecture(
        "OPTConfig",
        "model.decoder.layers",
        "model.decoder.final_layer_norm",
        extra={"ffn_dim": 64, "word_embed_proj_dim": D_MODEL, "init_std": 0.2},
    ),
    "phi": Architecture("PhiConfig", "model.layers", "model.final_layernorm"),
    "olmo2": Architecture("Olmo2Config", "model.layers", "model.norm"),
    "mixtral": Architecture(
        "MixtralConfig",
        "model.layers",
        "model.norm",
        extra={**_GROUPED, **_EXPERTS, "num_local_experts": 4},
    ),
    # As many experts as layers: its lists of experts are as long as its list of blocks.
    "qwen3_moe": Architecture(
        "Qwen3MoeConfig",
        "model.layers",
        "model.norm",
        extra={
            **_GROUPED,
            **_EXPERTS,
            "num_experts": N_LAYERS,
            "moe_intermediate_size": 16,
            "head_dim": 8,
        },
    ),
}


def tiny_model(
    architecture: str, *, n_layers: int = N_LAYERS, seed: int = 0
) -> transformers.PreTrainedModel:
    """A causal language model with random weights, in evaluation mode, in float32 on the CPU.

    `ARCHITECTURES` lists what there is. Another number of layers than `N_LAYERS` works for all but
    gemma3, which names the kind of each layer.
    """
    found = ARCHITECTURES[architecture]
    options = {**_COMMON, "num_hidden_layers": n_layers, **found.extra}
    config_class = getattr(transformers, found.config)
    for alias, own in config_class.attribute_map.items():
        if alias in options:  # some configs take only their own name for a common option
            options.setdefault(own, options.pop(alias))
    return random_model(transformers.AutoModelForCausalLM, config_class(**options), seed=seed)


def random_model(
    auto_class: Any, config: transformers.PretrainedConfig, *, seed: int = 0
) -> transformers.PreTrainedModel:
    """The model of a config, its biases and norms random too (they start as zeros and ones)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto_class.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def tiny_tokenizer(vocab_size: int = VOCAB_SIZE) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of the words w2, w3, ...: id 0 begins and ends a document, id 1 pads."""
    words = ["<|endoftext|>", "<|padding|>", *(f"w{i}" for i in range(2, vocab_size))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[1]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=words[0], eos_token=words[0], pad_token=words[1]
    )


def random_ids(batch: int = 2, context: int = 12, *, seed: int = 0) -> torch.Tensor:
    """Token ids of text, `[batch, context]`: no special token among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB_SIZE, (batch, context), generator=generator)
