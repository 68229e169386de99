from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import transformers
from torch import Tensor

from groupsae.attached import attached, named
from groupsae.errors import InputError
from groupsae.evaluation.subject import Subject
from groupsae.host.model import HostModel
from groupsae.sae import SAE, SAEConfig
from tests.host.tiny_models import D_MODEL, tiny_model

LAYERS = (0, 1, 2)
D_SAE = 64
ARCHITECTURES = ("gpt_neox", "llama")
PAD = 1


def sae_of(layers: tuple[int, ...], seed: int = 0, **options) -> SAE:
    """An SAE whose layers have different means and scales, its biases not zero."""
    generator = torch.Generator().manual_seed(seed)
    options = {"architecture": "topk", "k": 5, **options}
    sae = SAE(
        SAEConfig(d_model=D_MODEL, d_sae=D_SAE, layers=layers, **options),
        mean=0.3 * torch.randn(len(layers), D_MODEL, generator=generator),
        scale=torch.linspace(0.2, 0.9, len(layers)),
        generator=generator,
    )
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1, generator=generator)
        sae.b_dec.normal_(std=0.1, generator=generator)
    return sae.requires_grad_(False)


def saes_of_a_group() -> dict[int, SAE]:
    return dict.fromkeys(LAYERS, sae_of(LAYERS))


def prompts(seed: int = 0) -> dict[str, Tensor]:
    """Three prompts of 4, 7 and 2 tokens, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 96, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((4, 7, 2)):
        ids[row, : 7 - length], mask[row, : 7 - length] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model) -> Tensor:
    return model.generate(**prompts(), max_new_tokens=6, do_sample=False, pad_token_id=PAD)


@contextmanager
def by_hand(model, path: str, changes: dict[int, object]):
    """The reference: a hook of its own that puts changes[l](x) in the place of the stream."""
    blocks = model.get_submodule(path)

    def hook_of(change):
        def hook(_module, _args, output):
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        return hook

    handles = [blocks[layer].register_forward_hook(hook_of(fn)) for layer, fn in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def greedy_by_hand(model) -> Tensor:
    """Greedy decoding without a cache: the whole text is read again for every token."""
    found = prompts()
    ids, mask = found["input_ids"], found["attention_mask"]
    alive = torch.ones(len(ids), dtype=torch.bool)
    for _ in range(6):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        token = torch.where(alive, logits[:, -1].argmax(-1), PAD)
        alive &= token != model.generation_config.eos_token_id
        ids = torch.cat([ids, token[:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(token[:, None])], 1)
    return ids


def dense(sae: SAE, x: Tensor, layer: int) -> Tensor:
    return sae.encode(x.float(), layer).dense(D_SAE)


def row(sae: SAE, latent: int, layer: int) -> Tensor:
    return sae.W_dec[latent] / sae.scale[sae.layers.index(layer)]


def hooks_of(model) -> list[int]:
    return [
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    ]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def any_host(request) -> HostModel:
    return HostModel(tiny_model(request.param))


def test_nothing_happens_before_it_is_asked(host):
    before = generate(host.model)
    with attached(host, saes_of_a_group()) as sae:
        assert torch.equal(generate(host.model), before)
    assert sae.latents == {}


@pytest.mark.parametrize("what", ["add", "clamp", "ablate", "splice", "spliced and clamped"])
def test_generate_is_as_a_loop_by_hand_over_changed_streams(any_host, what):
    model, group, layer = any_host.model, sae_of(LAYERS), 1
    clean = generate(model)

    def change(x: Tensor) -> Tensor:
        z = dense(group, x, layer)
        if what == "add":
            return x + 9 * row(group, 7, layer) - 4 * row(group, 20, layer)
        if what == "clamp":
            return x + (8 - z[..., 7:8]) * row(group, 7, layer)
        if what == "ablate":
            return x - (z[..., :, None] * row(group, slice(0, 64), layer)).sum(-2)
        if what == "spliced and clamped":
            z[..., 7] = 8
        mean, scale = group.mean[layer], group.scale[layer]
        return (z @ group.W_dec + group.b_dec) / scale + mean

    with by_hand(model, any_host.block_path, {layer: change}):
        expected = greedy_by_hand(model)
    with attached(any_host, dict.fromkeys(LAYERS, group), layers=[layer]) as sae:
        if what == "add":
            sae.add(layer, 7, 4)
            sae.add(layer, 20, -4)
            sae.add(layer, 7, 5)
        if what in ("clamp", "spliced and clamped"):
            sae.clamp(layer, 7, 8)
        if what == "ablate":
            sae.ablate(layer, range(D_SAE))
        if what.startswith("splice"):
            sae.splice()
        found = generate(model)
    assert torch.equal(found, expected[:, : found.shape[1]])
    assert not torch.equal(found, clean)
    assert torch.equal(generate(model), clean)


def test_edits_at_several_layers_are_those_of_hooks_at_each(host):
    saes = {0: sae_of((0,), seed=1), 2: sae_of((2,), seed=2)}
    ids = prompts()["input_ids"]
    changes = {layer: lambda x, at=layer: x + 6 * row(saes[at], 3, at) for layer in saes}
    with by_hand(host.model, host.block_path, changes):
        expected = host.model(ids).logits
    with attached(host, saes) as sae:
        sae.add(0, 3, 6)
        sae.add(2, 3, 6)
        found = host.model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_later_clamp_takes_the_place_of_earlier_edits_and_add_adds_to_it(host):
    ids = prompts()["input_ids"]
    with attached(host, saes_of_a_group()) as sae:
        sae.add(1, 7, 100)
        sae.clamp(1, 7, 3)
        sae.add(1, 7, 2)
        found = host.model(ids).logits
        sae.reset()
        sae.clamp(1, 7, 5)
        assert torch.equal(host.model(ids).logits, found)
        sae.reset()
        unchanged = host.model(ids).logits
    assert torch.equal(unchanged, host.logits(ids))
    assert not torch.equal(unchanged, found)


def test_recorded_latents_are_those_of_the_residual_streams(any_host):
    group, ids = sae_of(LAYERS), prompts()["input_ids"]
    streams = any_host.residual_streams(ids, LAYERS)
    with attached(any_host, dict.fromkeys(LAYERS, group)) as sae:
        sae.record()
        any_host.model(ids)
        any_host.model(ids)
        sparse = sae.latents
        sae.record([1], dense=True)
        any_host.model(ids)
        assert len(sparse[2]) == 3
    for layer in (0, 2):
        expected = dense(group, streams[layer], layer)
        torch.testing.assert_close(sparse[layer][0].dense(D_SAE), expected)
        assert sparse[layer][0].values.shape == (3, 7, 5)
    (found,) = sae.latents[1]
    torch.testing.assert_close(found, dense(group, streams[1], 1))


def test_generate_records_the_prompt_and_then_every_token(host):
    group = sae_of(LAYERS)
    with attached(host, dict.fromkeys(LAYERS, group), layers=[1]) as sae:
        sae.record(dense=True)
        text = generate(host.model)
    recorded = sae.latents[1]
    assert [len(part[0]) for part in recorded] == [7] + [1] * (text.shape[1] - 8)
    length = text.shape[1] - 1  # the last token is never read
    mask = torch.ones(3, length, dtype=torch.int64)
    mask[:, :7] = prompts()["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    streams: list[Tensor] = []
    with by_hand(host.model, host.block_path, {1: lambda x: streams.append(x) or x}):
        host.model(input_ids=text[:, :length], attention_mask=mask, position_ids=positions)
    expected = dense(group, streams[0], 1)
    found = torch.cat(recorded, 1)
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)


def test_what_is_recorded_is_before_the_layers_own_edits_and_after_earlier_ones(host):
    group, ids = sae_of(LAYERS), prompts()["input_ids"]
    with attached(host, dict.fromkeys(LAYERS, group)) as sae:
        sae.add(0, 9, 30)
        sae.add(1, 9, 30)
        sae.record(dense=True)
        host.model(ids)
    streams: list[Tensor] = []
    changes = {
        0: lambda x: x + 30 * row(group, 9, 0),
        1: lambda x: streams.append(x) or x,
    }
    with by_hand(host.model, host.block_path, changes):
        host.model(ids)
    torch.testing.assert_close(sae.latents[1][0], dense(group, streams[0], 1), rtol=1e-4, atol=1e-4)


def test_special_tokens_are_left_alone(any_host):
    group, ids = sae_of(LAYERS), prompts()["input_ids"]
    ids[1, 0] = 0
    special = (ids == 0) | (ids == PAD)

    def change(x: Tensor) -> Tensor:
        x_hat = group(x, 1) + 5 * row(group, 3, 1)
        return torch.where(special[..., None], x, x_hat)

    with by_hand(any_host.model, any_host.block_path, {1: change}):
        expected = any_host.model(input_ids=ids).logits
    saes = dict.fromkeys(LAYERS, group)
    with attached(any_host, saes, layers=[1], special=(0, PAD)) as sae:
        sae.splice()
        sae.add(1, 3, 5)
        sae.record()
        found = any_host.model(input_ids=ids).logits
        by_position = any_host.model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(by_position, found)
    active = sae.latents[1][0].l0() > 0
    assert not active[special].any()
    assert active[~special].all()


def test_where_chooses_positions_such_as_the_generated_ones(host):
    def newest(ids: Tensor) -> Tensor:
        return torch.full_like(ids, ids.shape[1] == 1, dtype=torch.bool)

    clean = generate(host.model)
    with attached(host, saes_of_a_group(), where=newest) as sae:
        sae.clamp(1, 7, 50)
        found = generate(host.model)
        logits = host.model(prompts()["input_ids"]).logits
    assert torch.equal(found[:, 7], clean[:, 7])  # the prompt is read as it is
    assert not torch.equal(found, clean)
    assert torch.equal(logits, host.logits(prompts()["input_ids"]))


def test_a_mask_of_another_shape_is_refused(host):
    with attached(host, saes_of_a_group(), where=lambda ids: ids[:, :1] > 0) as sae:
        sae.splice()
        with pytest.raises(InputError, match=r"where: .* \[3, 1\] .* \[3, 7\]"):
            host.model(prompts()["input_ids"])


def test_embeddings_in_place_of_ids_are_all_treated(host):
    group, ids = sae_of(LAYERS), prompts()["input_ids"]
    saes = dict.fromkeys(LAYERS, group)
    with attached(host, saes, layers=[1], special=(0, PAD)) as sae:
        sae.record()
        host.model(ids)
        host.model(inputs_embeds=host.model.get_input_embeddings()(ids))
    of_ids, of_embeddings = sae.latents[1]
    assert (of_ids.l0() == 0).any()
    assert (of_embeddings.l0() > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_users_own_model_in_another_dtype(host, dtype):
    model = tiny_model("gpt_neox", seed=3).to(dtype)
    group, ids = sae_of(LAYERS), prompts()["input_ids"]

    def change(x: Tensor) -> Tensor:
        return (x.float() + 9 * row(group, 7, 1)).to(dtype)

    with by_hand(model, host.block_path, {1: change}):
        expected = model(ids).logits
    with attached(host, dict.fromkeys(LAYERS, group), model) as sae:
        sae.add(1, 7, 9)
        sae.record()
        found = model(ids).logits
        text = generate(model)
    assert found.dtype is dtype
    assert torch.equal(found, expected)
    assert text.shape[1] > 7
    assert sae.latents[1][0].values.dtype is torch.float32


def test_under_autocast_the_sae_keeps_its_precision(host):
    group, ids = sae_of(LAYERS), prompts()["input_ids"]
    streams: list[Tensor] = []
    with torch.autocast("cpu", torch.bfloat16):
        with by_hand(host.model, host.block_path, {1: lambda x: streams.append(x) or x}):
            host.model(ids)
        with attached(host, dict.fromkeys(LAYERS, group), layers=[1]) as sae:
            sae.record(dense=True)
            sae.splice()
            host.model(ids)
    assert torch.equal(sae.latents[1][0], dense(group, streams[0], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_splice_that_keeps_the_error_changes_no_bit(host, dtype):
    model, ids = tiny_model("gpt_neox").to(dtype), prompts()["input_ids"]
    with attached(host, saes_of_a_group(), model) as sae:
        sae.splice(keep_error=True)
        found = model(ids).logits
    assert torch.equal(found, model(ids).logits)


def test_gradients_flow_through_the_latents(host):
    """As autograd has them, in float64, through a splice that is written out by hand."""
    model, group = tiny_model("gpt_neox").double(), sae_of(LAYERS).double()
    ids = prompts()["input_ids"]
    leaves: list[Tensor] = []

    def change(x: Tensor) -> Tensor:
        latents = group.encode(x, 1)
        leaf = latents.values.detach().requires_grad_()
        leaves.append(leaf)
        x_hat = group.decode(type(latents)(leaf, latents.indices), 1)
        return x_hat + (x - x_hat).detach()

    with by_hand(model, host.block_path, {1: change}):
        model(ids).logits[:, -1, 5].sum().backward()
    with attached(host, dict.fromkeys(LAYERS, group), model, layers=[1]) as sae:
        sae.record()
        sae.splice(keep_error=True)
        model.requires_grad_(False).get_input_embeddings().requires_grad_(True)
        logits = model(ids).logits
        (values,) = (latents.values for latents in sae.latents[1])
        values.retain_grad()
        logits[:, -1, 5].sum().backward()
    assert values.grad.abs().sum() > 0
    torch.testing.assert_close(values.grad, leaves[0].grad, rtol=1e-9, atol=1e-12)


def test_no_graph_is_recorded_without_gradients(host):
    with attached(host, saes_of_a_group()) as sae, torch.no_grad():
        sae.record()
        sae.splice()
        host.model(prompts()["input_ids"])
    assert not sae.latents[0][0].values.requires_grad


def test_the_model_is_as_before_after_an_exception(host):
    before, ids = hooks_of(host.model), prompts()["input_ids"]
    clean = host.logits(ids)
    with pytest.raises(KeyError), attached(host, saes_of_a_group()) as sae:
        sae.splice()
        assert hooks_of(host.model) != before
        raise KeyError("the user's own")
    assert hooks_of(host.model) == before
    assert torch.equal(host.logits(ids), clean)


def test_contexts_nest(host):
    group, ids = sae_of(LAYERS), prompts()["input_ids"]
    saes = dict.fromkeys(LAYERS, group)
    streams = host.residual_streams(ids, [1])
    with attached(host, saes) as outer:
        outer.add(1, 7, 9)
        with attached(host, saes) as inner:
            inner.record([1], dense=True)
            both = host.model(ids).logits
        assert torch.equal(host.model(ids).logits, both)
    shifted = streams[1] + 9 * row(group, 7, 1)
    torch.testing.assert_close(inner.latents[1][0], dense(group, shifted, 1), rtol=1e-4, atol=1e-4)


def test_every_rule_records_and_splices(host):
    for options in (
        {"architecture": "relu", "k": None},
        {"architecture": "gated", "k": None},
        {"architecture": "batchtopk", "k": 3, "learned_affine": "gain"},
        {"architecture": "jumprelu", "k": None, "initial_threshold": 0.5, "bandwidth": 0.1},
    ):
        group, ids = sae_of(LAYERS, **options), prompts()["input_ids"]
        with by_hand(host.model, host.block_path, {1: lambda x, sae=group: sae(x, 1)}):
            expected = host.model(ids).logits
        with attached(host, dict.fromkeys(LAYERS, group), layers=[1]) as sae:
            sae.record()
            sae.splice()
            torch.testing.assert_close(host.model(ids).logits, expected)


def test_another_model_is_refused(host):
    saes = saes_of_a_group()

    def refused(model, match):
        with pytest.raises(InputError, match=match), attached(host, saes, model):
            pass

    refused(tiny_model("llama"), r"LlamaForCausalLM, which has no gpt_neox.layers; give a model as")
    refused(tiny_model("gpt_neox", n_layers=4), r"of 4 blocks and d_model = 32; give a model as")
    narrow = transformers.GPTNeoXConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, vocab_size=96,
        intermediate_size=16,
    )  # fmt: skip
    refused(transformers.GPTNeoXForCausalLM(narrow), r"of 3 blocks and d_model = 16")
    refused(torch.nn.Linear(2, 2), "no model of transformers")
    refused(torch.compile(tiny_model("gpt_neox")), "compiled")


def test_bad_requests_are_refused(host):
    saes = {1: sae_of((1,))}
    with pytest.raises(InputError, match="layers: there is no SAE for layer 2"):
        attached(host, saes, layers=[2]).__enter__()
    with attached(host, saes) as sae:
        with pytest.raises(InputError, match="layer 0: no SAE is attached there; they are at 1"):
            sae.record([0])
        with pytest.raises(InputError, match="latent 64: the SAE of layer 1 has the latents 0 to"):
            sae.clamp(1, D_SAE, 1)
        with pytest.raises(InputError, match="must be a finite number"):
            sae.add(1, 0, float("nan"))


def test_a_partition_is_found_by_name():
    one, two = sae_of(LAYERS), sae_of((0, 1), seed=1)
    chosen = Subject("groups", dict.fromkeys(LAYERS, one))
    other = Subject("groups", {0: two, 1: two, 2: one})
    baseline = Subject("baseline", {layer: sae_of((layer,)) for layer in LAYERS})
    subjects = [chosen, other, baseline]
    assert named(subjects, "groups") is chosen
    assert named(subjects, "G=2") is other
    assert named(subjects, "baseline") is baseline
    with pytest.raises(InputError, match="partition='twin': there are SAEs of groups, G=1, G=2, b"):
        named(subjects, "twin")
