"""The host model gives the residual streams that Hugging Face's own forward computes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from groupsae import products
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
    tiny_tokenizer,
)

LAST = N_LAYERS - 1
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture
def host() -> HostModel:
    return HostModel(tiny_model("gpt_neox"), tiny_tokenizer(), name="tiny")


# Reading


@pytest.fixture(autouse=True)
def pytorchs_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit what Hugging Face computes is to be had with the same products only."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda threads: False)


@every_architecture
def test_the_faster_product_changes_no_more_than_the_rounding(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not products._has_onednn():
        pytest.skip("this PyTorch is built without oneDNN")
    model = tiny_model(architecture)
    host, ids = HostModel(model), random_ids()
    expected = host.residual_streams(ids, [LAST])[LAST]
    product, made = products._onednn, []
    monkeypatch.setattr(products, "onednn_is_faster", lambda threads: True)
    monkeypatch.setattr(products, "_onednn", lambda *a: made.append(1) or product(*a))
    torch.testing.assert_close(host.residual_streams(ids, [LAST])[LAST], expected)
    assert made


@every_architecture
def test_residual_streams_are_hugging_faces_hidden_states(architecture: str) -> None:
    model = tiny_model(architecture)
    ids = random_ids()
    streams = HostModel(model).residual_streams(ids, range(N_LAYERS))
    assert list(streams) == list(range(N_LAYERS))

    hidden = _hidden_states(model, ids)
    for layer in range(LAST):  # hidden[0] is the embedding
        torch.testing.assert_close(streams[layer], hidden[layer + 1], rtol=0, atol=0)

    # The last hidden state is after the final norm, so the last stream is not among them.
    assert not torch.equal(streams[LAST], hidden[N_LAYERS])
    final_norm = model.get_submodule(ARCHITECTURES[architecture].final_norm)
    torch.testing.assert_close(final_norm(streams[LAST]), hidden[N_LAYERS], rtol=0, atol=0)
    torch.testing.assert_close(streams[LAST], _output_of_last_block(model, architecture, ids))


@every_architecture
@pytest.mark.parametrize("layers", [[0], [1, 0], [LAST]])
def test_nothing_after_the_last_asked_layer_is_computed(
    architecture: str, layers: list[int]
) -> None:
    model = tiny_model(architecture)
    host = HostModel(model)
    where = ARCHITECTURES[architecture]
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    with _counting_calls(model) as calls:
        host.residual_streams(random_ids(), layers)
    for layer in range(N_LAYERS):
        assert calls[f"{where.blocks}.{layer}"] == (1 if layer <= max(layers) else 0)
    assert calls[where.final_norm] == 0
    assert calls[head] == 0
    assert not any(
        name.startswith(f"{where.blocks}.{layer}.")
        for name in calls
        for layer in range(max(layers) + 1, N_LAYERS)
    )

    with _counting_calls(model) as calls:  # the counter does see the norm and the head
        host.logits(random_ids())
    assert calls[where.final_norm] == calls[head] == 1


@every_architecture
def test_the_last_logits_alone_are_the_last_of_all(architecture: str) -> None:
    host, ids = HostModel(tiny_model(architecture)), random_ids()
    everywhere = host.logits(ids)
    torch.testing.assert_close(host.logits(ids, last=True), everywhere[:, -1:])
    x = host.residual_streams(ids, [1])[1]
    torch.testing.assert_close(host.logits_from(1, x, ids, last=True), everywhere[:, -1:])


def test_the_unembedding_of_other_positions_is_spared(host: HostModel) -> None:
    read: list[int] = []
    head = host.model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    host.logits(random_ids(), last=True)
    handle.remove()
    assert read == [1]


def test_only_the_asked_layers_are_given_once_each(host: HostModel) -> None:
    streams = host.residual_streams(random_ids(), [2, 0, 2])
    assert sorted(streams) == [0, 2]


def test_no_layers_need_no_forward(host: HostModel) -> None:
    with _counting_calls(host.model) as calls:
        assert host.residual_streams(random_ids(), []) == {}
    assert not calls


def test_streams_carry_no_gradient_and_may_be_trained_on(host: HostModel) -> None:
    streams = host.residual_streams(random_ids(), [1])
    assert not streams[1].requires_grad
    weight = torch.zeros(D_MODEL, requires_grad=True)
    (streams[1] @ weight).sum().backward()  # refused for tensors made in inference mode
    assert weight.grad is not None


def test_visit_calls_in_the_order_of_layers_in_one_forward(host: HostModel) -> None:
    ids = random_ids()
    seen: list[tuple[int, Tensor]] = []
    visitors = {layer: lambda x, i=layer: seen.append((i, x.clone())) for layer in (1, 0)}
    with _counting_calls(host.model) as calls:
        host.visit(ids, visitors)
    assert [layer for layer, _ in seen] == [0, 1]
    assert calls["gpt_neox.layers.0"] == calls["gpt_neox.layers.1"] == 1
    streams = host.residual_streams(ids, [0, 1])
    for layer, x in seen:
        assert torch.equal(x, streams[layer])


@pytest.mark.parametrize("layer", [0, LAST])
@pytest.mark.parametrize("error", [ValueError("mine"), TypeError("mine"), KeyboardInterrupt()])
def test_what_a_visitor_raises_arrives_unchanged_and_leaves_no_hook(
    host: HostModel, layer: int, error: BaseException
) -> None:
    cause = LookupError("before")

    def visitor(x: Tensor) -> None:
        raise error from cause

    before = _hooks(host.model)
    with pytest.raises(type(error)) as caught:
        host.visit(random_ids(), {layer: visitor, LAST: visitor})
    assert caught.value is error
    assert error.__cause__ is cause
    assert _hooks(host.model) == before


def test_no_hook_outlives_reading(host: HostModel) -> None:
    before = _hooks(host.model)
    host.residual_streams(random_ids(), [0, LAST])
    assert _hooks(host.model) == before


def test_a_forward_that_does_not_pass_the_layer_is_an_error(host: HostModel) -> None:
    host.blocks = nn.ModuleList(nn.Identity() for _ in range(N_LAYERS))
    with pytest.raises(RuntimeError, match="without passing layer 1"):
        host.residual_streams(random_ids(), [1])


# Splicing


@every_architecture
def test_splicing_the_identity_changes_nothing(architecture: str) -> None:
    host = HostModel(tiny_model(architecture))
    ids = random_ids()
    clean = host.logits(ids)
    with host.splice({layer: lambda x: x.clone() for layer in range(N_LAYERS)}):
        assert torch.equal(host.logits(ids), clean)
    assert torch.equal(host.logits(ids), clean)


@every_architecture
@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_splicing_zeros_is_a_block_that_returns_zeros(architecture: str, layer: int) -> None:
    model = tiny_model(architecture)
    host = HostModel(model)
    ids = random_ids()
    with host.splice({layer: torch.zeros_like}):
        spliced = host.logits(ids)
        assert not host.residual_streams(ids, [layer])[layer].any()
    assert not torch.equal(spliced, host.logits(ids))
    block = model.get_submodule(f"{ARCHITECTURES[architecture].blocks}.{layer}")
    block.forward = _zeros_from(block.forward)
    torch.testing.assert_close(spliced, host.logits(ids), rtol=0, atol=0)


def test_splices_at_several_layers_build_on_one_another(host: HostModel) -> None:
    ids = random_ids()
    first, second = torch.randn(2, 1, 1, D_MODEL)
    with host.splice({0: lambda x: x + first}):
        after_first = host.residual_streams(ids, [1])[1]
    with host.splice({0: lambda x: x + first, 1: lambda x: x * second}):
        both = host.residual_streams(ids, [1])[1]
        logits = host.logits(ids)
    torch.testing.assert_close(both, after_first * second)
    with host.splice({1: lambda x: both}):
        torch.testing.assert_close(host.logits(ids), logits)


def test_an_inner_splice_takes_what_the_outer_one_gave(host: HostModel) -> None:
    ids = random_ids()
    clean = host.residual_streams(ids, [1])[1]
    with host.splice({1: lambda x: x + 1}):
        with host.splice({1: lambda x: x * 2}):
            torch.testing.assert_close(host.residual_streams(ids, [1])[1], (clean + 1) * 2)
        torch.testing.assert_close(host.residual_streams(ids, [1])[1], clean + 1)
    torch.testing.assert_close(host.residual_streams(ids, [1])[1], clean)


@pytest.mark.parametrize("error", [ValueError("mine"), TypeError("mine"), KeyboardInterrupt()])
def test_a_splice_ends_with_an_exception_in_the_replacement_or_in_the_body(
    host: HostModel, error: BaseException
) -> None:
    def replacement(x: Tensor) -> Tensor:
        raise error

    clean = host.logits(random_ids())
    before = _hooks(host.model)
    with pytest.raises(type(error)) as caught, host.splice({0: torch.zeros_like, 1: replacement}):
        host.logits(random_ids())
    assert caught.value is error
    with pytest.raises(type(error)) as caught, host.splice({0: torch.zeros_like}):
        raise error
    assert caught.value is error
    assert _hooks(host.model) == before
    assert torch.equal(host.logits(random_ids()), clean)


@pytest.mark.parametrize(
    ("replacement", "found"),
    [
        (lambda x: x[:, :-1], r"float32 \[2, 11, 32\]"),
        (lambda x: x.double(), r"float64 \[2, 12, 32\]"),
        (lambda x: None, "NoneType"),
    ],
)
def test_a_replacement_of_another_kind_is_refused(host: HostModel, replacement, found) -> None:
    wanted = rf"layer 1 is .*{found}.*; .*float32 \[2, 12, 32\]"
    with pytest.raises(InputError, match=wanted), host.splice({1: replacement}):
        host.logits(random_ids())


def test_gradients_flow_through_a_splice(host: HostModel) -> None:
    ids = random_ids()
    scale = torch.ones((), requires_grad=True)
    with host.splice({0: lambda x: x * scale}):
        host.cross_entropy(ids).mean().backward()
    step = 1e-2
    losses = []
    for value in (1 + step, 1 - step):
        with host.splice({0: lambda x, v=value: x * v}):
            losses.append(host.cross_entropy(ids).double().mean())
    assert scale.grad is not None
    expected = float(losses[0] - losses[1]) / (2 * step)
    assert float(scale.grad) == pytest.approx(expected, rel=1e-2)
    assert all(p.grad is None for p in host.model.parameters())


@pytest.mark.parametrize("architecture", ["gptj", "openai-gpt"])
def test_blocks_that_return_a_tuple_or_a_list_are_read_and_spliced(architecture: str) -> None:
    shape = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": CONTEXT_LENGTH}
    config = transformers.AutoConfig.for_model(
        architecture, vocab_size=VOCAB_SIZE, rotary_dim=4, **shape
    )
    model = random_model(transformers.AutoModelForCausalLM, config)
    kinds = []
    handle = model.transformer.h[0].register_forward_hook(lambda *a: kinds.append(type(a[-1])))
    host = HostModel(model)
    handle.remove()
    assert kinds[0] in (tuple, list)

    ids = random_ids()
    clean = host.logits(ids)
    streams = host.residual_streams(ids, range(N_LAYERS))
    hidden = model(ids, output_hidden_states=True).hidden_states
    for layer in range(LAST):
        assert torch.equal(streams[layer], hidden[layer + 1])
    with host.splice({0: lambda x: x.clone()}):
        assert torch.equal(host.logits(ids), clean)
    with host.splice({0: torch.zeros_like}):
        assert not host.residual_streams(ids, [0])[0].any()
        assert not torch.equal(host.logits(ids), clean)


# Logits and cross-entropy


@every_architecture
def test_cross_entropy_is_hugging_faces_loss(architecture: str) -> None:
    host = HostModel(tiny_model(architecture))
    ids = random_ids()
    losses = host.cross_entropy(ids)
    assert losses.dtype == torch.float32
    assert losses.shape == (2, 11)
    theirs = host.model(ids, labels=ids)
    assert torch.equal(host.logits(ids), theirs.logits)
    assert float(losses.double().mean()) == pytest.approx(float(theirs.loss), rel=1e-6)
    per_token = F.cross_entropy(
        theirs.logits[:, :-1].double().transpose(1, 2), ids[:, 1:], reduction="none"
    )
    torch.testing.assert_close(losses.double(), per_token, rtol=1e-5, atol=1e-6)


def test_cross_entropy_in_chunks_is_cross_entropy_at_once(
    host: HostModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_ids(3, 11)
    whole = host.cross_entropy(ids)
    monkeypatch.setattr("groupsae.host.model._CHUNK", 7)
    torch.testing.assert_close(host.cross_entropy(ids), whole)


def test_cross_entropy_of_a_single_token_is_empty(host: HostModel) -> None:
    assert host.cross_entropy(random_ids(2, 1)).shape == (2, 0)


@pytest.mark.parametrize(
    ("dtype", "loss_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_other_dtypes(dtype: torch.dtype, loss_dtype: torch.dtype) -> None:
    exact = HostModel(tiny_model("llama").double())
    host = HostModel(tiny_model("llama").to(dtype))
    ids = random_ids()
    assert host.dtype == dtype
    assert host.residual_streams(ids, [1])[1].dtype == dtype
    losses = host.cross_entropy(ids)
    assert losses.dtype == loss_dtype
    assert float(losses.mean()) == pytest.approx(float(exact.cross_entropy(ids).mean()), rel=0.05)


# What the model says of itself, and what it refuses


def test_properties(host: HostModel) -> None:
    assert host.n_layers == N_LAYERS
    assert host.d_model == D_MODEL
    assert host.vocab_size == VOCAB_SIZE
    assert host.context_length == CONTEXT_LENGTH
    assert host.block_path == "gpt_neox.layers"
    assert host.device == torch.device("cpu")
    assert host.dtype == torch.float32
    assert host.name == "tiny"
    # Attention 4 d^2, MLP 2 d * 64, their biases, and two layer norms.
    d = D_MODEL
    assert host.block_parameters == 4 * d**2 + 4 * d + 2 * d * 64 + 64 + d + 4 * d


@every_architecture
def test_the_context_limit_is_found(architecture: str) -> None:
    assert HostModel(tiny_model(architecture)).context_length == CONTEXT_LENGTH


def test_a_model_without_positions_has_no_context_limit() -> None:
    config = transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)
    host = HostModel(random_model(transformers.AutoModelForCausalLM, config))
    assert host.context_length is None
    assert host.residual_streams(random_ids(1, 200), [0])[0].shape == (1, 200, 32)


def test_the_model_is_frozen() -> None:
    model = tiny_model("llama").train()
    HostModel(model)
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


def test_special_tokens_come_from_the_config_and_the_tokenizer() -> None:
    model = tiny_model("llama")
    model.config.eos_token_id = [0, 5]
    model.config.pad_token_id = -1  # "none", in some published configs
    assert HostModel(model).special_token_ids == {0, 5}
    tokenizer = tiny_tokenizer(VOCAB_SIZE - 1)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved|>", "<|beyond|>"]})
    assert tokenizer.convert_tokens_to_ids("<|beyond|>") == VOCAB_SIZE
    assert HostModel(model, tokenizer).special_token_ids == {0, 1, 5, VOCAB_SIZE - 1}


def test_a_tokenizer_may_know_fewer_tokens_than_the_model_and_not_more() -> None:
    HostModel(tiny_model("llama"), tiny_tokenizer(VOCAB_SIZE - 20))
    with pytest.raises(InputError, match=r"tokenizer of mine is another model's.*up to 96.*96 tok"):
        HostModel(tiny_model("llama"), tiny_tokenizer(VOCAB_SIZE + 1), name="mine")


@pytest.mark.parametrize("layer", [-1, N_LAYERS])
def test_a_layer_out_of_range_is_refused(host: HostModel, layer: int) -> None:
    message = rf"Layer {layer} is out of range: tiny has 3 layers, 0 to 2"
    with pytest.raises(InputError, match=message):
        host.residual_streams(random_ids(), [0, layer])
    with pytest.raises(InputError, match=message), host.splice({layer: torch.zeros_like}):
        pass


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE])
def test_a_token_outside_the_vocabulary_is_refused(host: HostModel, token: int) -> None:
    ids = random_ids()
    ids[1, 3] = token
    for use in (host.logits, host.cross_entropy, lambda ids: host.residual_streams(ids, [0])):
        with pytest.raises(InputError, match=rf"Token id {token} .*tiny \(0 to 95\)"):
            use(ids)


def test_a_context_longer_than_the_models_is_refused(host: HostModel) -> None:
    host.logits(random_ids(1, CONTEXT_LENGTH))
    with pytest.raises(InputError, match=r"49 tokens .*tokens.context_length to 48"):
        host.logits(random_ids(1, CONTEXT_LENGTH + 1))


def test_an_empty_batch_is_refused(host: HostModel) -> None:
    with pytest.raises(InputError, match="no tokens"):
        host.logits(torch.zeros(0, 4, dtype=torch.int64))


def test_ids_may_be_of_any_integer_type(host: HostModel) -> None:
    ids = random_ids()
    assert torch.equal(host.cross_entropy(ids.int()), host.cross_entropy(ids))


def test_a_compiled_model_is_read_uncompiled() -> None:
    model = tiny_model("llama")
    host = HostModel(torch.compile(model))
    assert host.model is model
    assert list(host.residual_streams(random_ids(), [1])) == [1]


# Fingerprint


def test_the_fingerprint_follows_the_weights_and_the_config(tmp_path: Path) -> None:
    host = HostModel(tiny_model("llama"))
    fingerprint = host.fingerprint()
    assert len(fingerprint) == 64
    assert fingerprint == host.fingerprint()
    assert fingerprint == HostModel(tiny_model("llama")).fingerprint()
    assert fingerprint != HostModel(tiny_model("llama", seed=1)).fingerprint()
    assert fingerprint != HostModel(tiny_model("llama").bfloat16()).fingerprint()

    host.model.save_pretrained(tmp_path)
    reloaded = HostModel.load(tmp_path)
    assert reloaded.fingerprint() == fingerprint
    with torch.no_grad():
        reloaded.model.model.norm.weight[0] += 1e-6
    assert reloaded.fingerprint() != fingerprint

    host.model.config.rms_norm_eps *= 2
    assert host.fingerprint() != fingerprint


# A real model


@pytest.fixture(scope="module")
def stories(shared: Path) -> tuple[HostModel, list[str]]:
    """A model of children's stories, and its validation text of 900 stories."""
    lines = (shared / "text" / "tinystories" / "valid.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    return HostModel.load(shared / "models" / "stories3M", device="cpu"), texts


@pytest.mark.shared
def test_a_real_model_is_described(stories: tuple[HostModel, list[str]]) -> None:
    host, _ = stories
    assert (host.n_layers, host.d_model) == (6, 192)
    assert (host.vocab_size, host.context_length) == (4096, 512)
    assert host.block_path == "model.layers"
    assert host.special_token_ids == {0, 1, 2}
    # 2 d^2 for queries and outputs, 2 d * 64 for keys and values, 3 d * 512 for the MLP, two norms.
    assert host.block_parameters == 2 * 192**2 + 2 * 192 * 64 + 3 * 192 * 512 + 2 * 192


@pytest.mark.shared
def test_a_real_model_predicts_its_text(stories: tuple[HostModel, list[str]]) -> None:
    """The model's README: 1.472 nats a token on all 900 stories; uniform would be 8.318."""
    host, texts = stories
    losses = [host.cross_entropy(_encoded(host, text)).flatten() for text in texts[::30]]
    assert float(torch.cat(losses).mean()) == pytest.approx(1.472, abs=0.15)


@pytest.mark.shared
def test_a_real_models_streams_have_the_published_norms(
    stories: tuple[HostModel, list[str]],
) -> None:
    """The model's README: mean norm after each layer over the first stories, without BOS."""
    host, texts = stories
    norms: list[list[Tensor]] = [[] for _ in range(host.n_layers)]
    for text in texts[:30]:
        streams = host.residual_streams(_encoded(host, text), range(host.n_layers))
        for layer, x in streams.items():
            norms[layer].append(x[0, 1:].norm(dim=-1))
    means = [float(torch.cat(norm).mean()) for norm in norms]
    assert means == pytest.approx([0.74, 0.96, 1.37, 2.11, 3.19, 4.15], rel=0.02)


# Helpers


def _encoded(host: HostModel, text: str) -> Tensor:
    return host.tokenizer(text, return_tensors="pt", truncation=True, max_length=512).input_ids


def _hidden_states(model: transformers.PreTrainedModel, ids: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return model(ids, output_hidden_states=True).hidden_states


def _output_of_last_block(model, architecture: str, ids: Tensor) -> Tensor:
    """What goes into the final norm of a plain forward."""
    taken: list[Tensor] = []
    norm = model.get_submodule(ARCHITECTURES[architecture].final_norm)
    handle = norm.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return taken[0]


def _zeros_from(forward):
    def zeros(*args, **kwargs):
        output = forward(*args, **kwargs)
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    return zeros


@contextmanager
def _counting_calls(model: nn.Module) -> Iterator[Counter[str]]:
    """Counts the starts of each module's forward, by the module's name."""
    calls: Counter[str] = Counter()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
        for name, module in model.named_modules()
    ]
    yield calls
    for handle in handles:
        handle.remove()


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
