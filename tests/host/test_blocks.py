"""The blocks are found by what they do, and what is built otherwise is refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from groupsae.errors import InputError
from groupsae.host.blocks import find_blocks
from tests.host.tiny_models import (
    ARCHITECTURES,
    D_MODEL,
    N_LAYERS,
    VOCAB_SIZE,
    random_model,
    tiny_model,
)

_ENCODER = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": D_MODEL,
    "intermediate_size": 64,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_finds_the_blocks(architecture: str) -> None:
    model = tiny_model(architecture)
    found = find_blocks(model)
    assert found.path == ARCHITECTURES[architecture].blocks
    assert found.modules is model.get_submodule(found.path)
    assert found.d_model == D_MODEL


def test_finds_the_text_blocks_of_a_multimodal_model_as_deep_as_its_vision_tower() -> None:
    text = {**_ENCODER, "num_key_value_heads": 2, "head_dim": 8}
    vision = {**_ENCODER, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    model = random_model(transformers.AutoModelForImageTextToText, config)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == N_LAYERS]
    assert len(lists) == 2
    assert find_blocks(model).modules is model.get_submodule("model.language_model.layers")


def test_passes_over_a_list_of_experts_as_long_as_the_list_of_blocks() -> None:
    model = tiny_model("llama")
    for block in model.model.layers:
        experts = nn.ModuleList(nn.Linear(D_MODEL, D_MODEL) for _ in range(N_LAYERS))
        block.mlp = _Experts(experts)
    assert find_blocks(model).modules is model.model.layers


class _Experts(nn.Module):
    def __init__(self, experts: nn.ModuleList) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(expert(x) for expert in self.experts)


def test_an_encoder_is_refused_and_the_same_model_made_causal_is_not() -> None:
    encoder = random_model(
        transformers.AutoModelForCausalLM, transformers.BertConfig(**_ENCODER, is_decoder=False)
    )
    with pytest.raises(InputError, match=r"encoder.*decoder-only causal language models"):
        find_blocks(encoder)
    decoder = random_model(
        transformers.AutoModelForCausalLM, transformers.BertConfig(**_ENCODER, is_decoder=True)
    )
    assert find_blocks(decoder).path == "bert.encoder.layer"


def test_an_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(
        vocab_size=VOCAB_SIZE, d_model=D_MODEL, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    model = random_model(transformers.AutoModelForSeq2SeqLM, config)
    with pytest.raises(InputError, match=r"encoder-decoder.*decoder-only causal language models"):
        find_blocks(model)


def test_a_block_that_runs_twice_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[2] = model.model.layers[0]
    with pytest.raises(InputError, match="does not run once each and in order"):
        find_blocks(model)


def test_a_stream_that_is_changed_between_blocks_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
    with pytest.raises(InputError, match="does not take what the one before returned"):
        find_blocks(model)


def test_a_model_without_a_list_as_long_as_it_is_deep_is_refused() -> None:
    model = tiny_model("llama")
    model.config.num_hidden_layers = N_LAYERS + 1
    with pytest.raises(InputError, match="no list of 4 blocks"):
        find_blocks(model)


def test_a_model_that_cannot_run_is_refused_with_the_reason() -> None:
    model = tiny_model("llama")
    model.model.layers[1].self_attn.q_proj = nn.Linear(D_MODEL + 1, D_MODEL)
    with pytest.raises(InputError, match=r"cannot run on token ids alone.*shapes"):
        find_blocks(model)


def test_weights_that_are_not_finite_are_named_by_their_layer() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="after layer 1 holds NaN"):
        find_blocks(model)


def test_no_hook_stays_on_the_model() -> None:
    good, bad = tiny_model("llama"), tiny_model("llama")
    bad.model.layers[1].self_attn.q_proj = nn.Linear(D_MODEL + 1, D_MODEL)
    find_blocks(good)
    with pytest.raises(InputError):
        find_blocks(bad)
    for model in (good, bad):
        assert not any(module._forward_hooks for module in model.modules())
