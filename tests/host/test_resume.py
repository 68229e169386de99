"""A forward that goes on from a residual stream gives the logits of a whole one, bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from groupsae.errors import InputError
from groupsae.host.model import HostModel
from tests.host.tiny_models import (
    ARCHITECTURES,
    CONTEXT_LENGTH,
    D_MODEL,
    N_LAYERS,
    VOCAB_SIZE,
    random_ids,
    random_model,
    tiny_model,
)

every_layer = pytest.mark.parametrize("layer", range(N_LAYERS))


@pytest.fixture
def host() -> HostModel:
    return HostModel(tiny_model("gpt_neox"), name="tiny")


def bloom() -> transformers.PreTrainedModel:
    """Its blocks return a tuple."""
    config = transformers.BloomConfig(
        vocab_size=VOCAB_SIZE, hidden_size=D_MODEL, n_layer=N_LAYERS, n_head=4
    )
    return random_model(transformers.AutoModelForCausalLM, config)


def like_gpt(name: str) -> transformers.PreTrainedModel:
    shape = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": CONTEXT_LENGTH}
    config = transformers.AutoConfig.for_model(name, vocab_size=VOCAB_SIZE, rotary_dim=4, **shape)
    return random_model(transformers.AutoModelForCausalLM, config)


FAMILIES: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    **{name: lambda name=name: tiny_model(name) for name in ARCHITECTURES},
    "gptj": lambda: like_gpt("gptj"),  # blocks that return a tuple
    "openai-gpt": lambda: like_gpt("openai-gpt"),  # blocks that return a list
    "bloom": bloom,  # no limit to the context; blocks that return a tuple
}


def replacement_of(host: HostModel, layer: int, ids: Tensor) -> Tensor:
    x = host.residual_streams(ids, [layer])[layer]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(layer))
    return x + noise.to(x.dtype)


def spliced(host: HostModel, layer: int, x: Tensor, ids: Tensor) -> Tensor:
    with host.splice({layer: lambda _: x}):
        return host.logits(ids)


@every_layer
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_those_of_a_splice(family: str, layer: int) -> None:
    host, ids = HostModel(FAMILIES[family]()), random_ids()
    x = replacement_of(host, layer, ids)
    clean = host.logits(ids)
    expected = spliced(host, layer, x, ids)
    assert not torch.equal(expected, clean)
    host.logits_from(layer, x, ids)  # the first call also tries whether blocks can be skipped
    counter = _Counter(host)
    assert torch.equal(host.logits_from(layer, x, ids), expected)
    assert counter.layers == set(range(layer + 1, N_LAYERS))
    with torch.no_grad():
        assert torch.equal(host.logits_from(layer, x, ids), spliced(host, layer, x, ids))
    assert torch.equal(host.logits(ids), clean)


@every_layer
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "mixtral"])
def test_gradients_are_those_of_a_splice(family: str, layer: int) -> None:
    host, ids = HostModel(FAMILIES[family]()), random_ids()
    gradients = []
    for logits in (host.logits_from, lambda *args: spliced(host, *args)):
        x = replacement_of(host, layer, ids).requires_grad_()
        logits(layer, x, ids).square().sum().backward()
        gradients.append(x.grad)
    assert gradients[0].any()
    assert torch.equal(*gradients)
    assert all(p.grad is None for p in host.model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    host, ids = HostModel(tiny_model("llama").to(dtype)), random_ids()
    x = replacement_of(host, 1, ids)
    counter = _Counter(host)
    assert torch.equal(host.logits_from(1, x, ids), spliced(host, 1, x, ids))
    counter.layers.clear()
    host.logits_from(1, x, ids)
    assert counter.layers == {2}


# Other splices around it


@pytest.mark.parametrize("outer", range(N_LAYERS))
def test_a_splice_around_it_holds_above_and_has_no_effect_below(
    host: HostModel, outer: int
) -> None:
    ids = random_ids()
    x = replacement_of(host, 1, ids)
    alone = host.logits_from(1, x, ids)
    with host.splice({outer: lambda y: 2 * y}):
        both = host.logits_from(1, x, ids)
        assert torch.equal(both, spliced(host, 1, x, ids))
    assert torch.equal(both, alone) == (outer <= 1)


def test_the_trial_of_a_layer_runs_no_splice_that_is_open_around_it(host: HostModel) -> None:
    ids = random_ids(3, 5)
    x = replacement_of(host, 0, ids)
    shapes = []

    def constant(y: Tensor) -> Tensor:  # hides from the logits whatever came before
        shapes.append(tuple(y.shape))
        return torch.ones_like(y)

    with host.splice({2: constant}):
        for _ in range(2):
            host.logits_from(0, x, ids)
    assert shapes == [(3, 5, D_MODEL)] * 2


# The model is as before


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_an_exception_leaves_the_model_as_it_was(host: HostModel, error: BaseException) -> None:
    ids = random_ids()
    clean = host.logits(ids)
    x = replacement_of(host, 1, ids)
    before = _state(host)

    def failing(y: Tensor) -> Tensor:
        raise error

    for _ in range(2):  # with the trial, and without it
        with pytest.raises(type(error)) as caught, host.splice({2: failing}):
            host.logits_from(1, x, ids)
        assert caught.value is error
        assert _state(host) == before
        assert torch.equal(host.logits(ids), clean)


def test_a_forward_that_was_put_on_a_block_is_put_back(host: HostModel) -> None:
    block = host.blocks[0]
    own = block.forward
    doubled: Callable[..., Any] = lambda x, *args, **kwargs: own(2 * x, *args, **kwargs)  # noqa: E731
    block.forward = doubled
    ids = random_ids()
    clean = host.logits(ids)
    host.logits_from(1, replacement_of(host, 1, ids), ids)
    assert block.forward is doubled
    assert "forward" not in vars(host.blocks[1])
    assert torch.equal(host.logits(ids), clean)


# Where blocks cannot be skipped


class _Remembering(nn.Module):
    """A block that leaves its output where a later one takes it."""

    def __init__(self, block: nn.Module, memory: dict[str, Tensor], role: str) -> None:
        super().__init__()
        self.block, self.memory, self.role = block, memory, role

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = self.block(*args, **kwargs)
        if self.role == "store":
            self.memory["y"] = y
            return y
        return y + self.memory["y"] if self.role == "use" else y + self.memory.pop("y")


@pytest.mark.parametrize("use", ["use", "pop"])
def test_a_model_whose_later_blocks_take_more_than_the_stream_runs_whole(
    use: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With "use", the earlier forward's state is still there and must not pass for this one's."""
    model, memory = tiny_model("gpt2", n_layers=4), {}
    blocks = model.transformer.h
    blocks[1] = _Remembering(blocks[1], memory, "store")
    blocks[2] = _Remembering(blocks[2], memory, use)
    host, ids = HostModel(model, name="mine"), random_ids()
    host.logits(ids)
    counter = _Counter(host)
    with caplog.at_level(logging.INFO, logger="groupsae.host.model"):
        for layer, first in enumerate((1, 0, 3, 4)):
            x = replacement_of(host, layer, ids)
            expected = spliced(host, layer, x, ids)
            for _ in range(2):
                counter.layers.clear()
                assert torch.equal(host.logits_from(layer, x, ids), expected)
            assert counter.layers == set(range(first, 4))
    messages = [message for message in caplog.messages if "runs whole" in message]
    assert len(messages) == 1
    assert messages[0].startswith("mine runs whole for a splice after layer 1")


@pytest.mark.skipif(
    not hasattr(transformers, "Gemma4TextConfig"), reason="this transformers has no Gemma 4"
)
def test_layers_that_share_keys_and_values() -> None:
    """Gemma 4's last two layers take keys and values of layers 2 and 3."""
    config = transformers.Gemma4TextConfig(
        vocab_size=VOCAB_SIZE,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size=D_MODEL,
        hidden_size_per_layer_input=8,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=8,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"] * 3,
        num_kv_shared_layers=2,
        max_position_embeddings=CONTEXT_LENGTH,
        initializer_range=0.2,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=0,
    )
    host = HostModel(random_model(transformers.AutoModelForCausalLM, config))
    ids = random_ids()
    counter = _Counter(host)
    for layer, first in enumerate((1, 2, 0, 0, 0, 6)):
        x = replacement_of(host, layer, ids)
        expected = spliced(host, layer, x, ids)
        for _ in range(2):
            counter.layers.clear()
            assert torch.equal(host.logits_from(layer, x, ids), expected)
        assert counter.layers == set(range(first, 6))


# What is refused


@pytest.mark.parametrize(
    ("change", "found"),
    [(lambda x: x[..., :-1], r"float32 \[2, 12, 31\]"), (lambda x: x.double(), "float64")],
)
def test_a_stream_of_another_kind_is_refused(host: HostModel, change, found: str) -> None:
    ids = random_ids()
    x = change(replacement_of(host, 1, ids))
    for _ in range(2):
        with pytest.raises(InputError, match=rf"layer 1 is .*{found}"):
            host.logits_from(1, x, ids)


def test_a_layer_or_token_that_the_model_does_not_have_is_refused(host: HostModel) -> None:
    ids = random_ids()
    x = replacement_of(host, 1, ids)
    with pytest.raises(InputError, match="Layer 3 is out of range"):
        host.logits_from(3, x, ids)
    with pytest.raises(InputError, match="Token id 96 is not in the vocabulary"):
        host.logits_from(1, x, torch.full_like(ids, 96))


# Helpers


class _Counter:
    """Which layers computed anything, since `layers` was last cleared."""

    def __init__(self, host: HostModel) -> None:
        self.layers: set[int] = set()
        for layer, block in enumerate(host.blocks):
            for child in block.children():
                child.register_forward_pre_hook(lambda *_, i=layer: self.layers.add(i))


def _state(host: HostModel) -> list[tuple[list[str], list[int], int]]:
    """What may be changed on a block: its own attributes, and its hooks."""
    return [
        (sorted(vars(block)), list(block._forward_hooks), id(block._forward_hooks))
        for block in host.blocks
    ]
