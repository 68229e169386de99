from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.stats import spearmanr
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from groupsae.errors import InputError
from groupsae.evaluation.attribution import METHODS, Effects, effects, logit_difference
from groupsae.evaluation.tasks import Pairs
from groupsae.host.model import HostModel
from groupsae.sae import SAE, SAEConfig
from tests.host.tiny_models import ARCHITECTURES, D_MODEL, random_ids, tiny_model
from tests.sae.kernels.cases import AFFINES, RULES, sae_with

LAYERS = (2, 3, 4)  # of sae_with's SAEs
CONTEXT = 7
FEW = settings(max_examples=4, deadline=None, derandomize=True)
seeds = st.integers(0, 1000)


@pytest.fixture(scope="module")
def deep() -> HostModel:
    """Five layers, float64."""
    return HostModel(tiny_model("gpt_neox", n_layers=5).double())


@pytest.fixture(scope="module")
def linear() -> HostModel:
    """Linear, also across positions, above layer 2; float64."""
    model = tiny_model("gpt_neox", n_layers=5).double()
    generator = torch.Generator().manual_seed(0)

    def matrix():
        layer = nn.Linear(D_MODEL, D_MODEL).double()
        with torch.no_grad():
            layer.weight.copy_(torch.randn(D_MODEL, D_MODEL, generator=generator) / D_MODEL**0.5)
            layer.bias.zero_()
        return layer

    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = matrix()

        def forward(self, hidden_states, *_args, **_options):
            return self.matrix(hidden_states.cumsum(1)), None

    for block in model.gpt_neox.layers[3:]:
        block.input_layernorm = block.post_attention_layernorm = nn.Identity()
        block.attention, block.mlp = Mixing(), matrix()
    model.gpt_neox.final_layer_norm = nn.Identity()
    return HostModel(model)


def make_pairs(n=3, context=CONTEXT, seed=0, vocab=96) -> Pairs:
    """Prompts that differ from the second token on, and in no token before it."""
    clean, patch = (random_ids(n, context, seed=2 * seed + i) % vocab for i in range(2))
    patch[:, 0] = clean[:, 0]
    answers = random_ids(2, n, seed=seed + 5000) % vocab
    answers[1] = 2 + (answers[0] - 1) % (vocab - 2)  # never the same
    return Pairs(clean, patch, answers[0], answers[1], ("",) * n)


def make_sae(rule="topk", affine="none", seed=0, dtype=torch.float64, **options) -> SAE:
    """An SAE of layers 2 to 4 that leaves an error, with means and scales."""
    sae = sae_with(rule, affine, d_model=D_MODEL, seed=seed, **options).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        sae.mean.copy_(torch.randn(sae.mean.shape, generator=generator))
        sae.scale.copy_(0.5 + torch.rand(sae.scale.shape, generator=generator))
        if hasattr(sae, "threshold"):
            sae.threshold.copy_(5 + torch.rand(sae.threshold.shape, generator=generator))
    return sae


def spliced_in(sae, layers=LAYERS):
    return dict.fromkeys(layers, sae)


def directions(sae, layer):
    """d x_hat / d f, [d_sae, d_model], by the formula in SAE's docstring."""
    member = sae.layers.index(layer)
    rows = sae.W_dec.detach() / sae.scale[member]
    return rows * sae.gain_out[member].detach() if sae.config.learned_affine == "gain" else rows


def latents_of(sae, x, layer):
    with torch.no_grad():
        return sae.encode(x, layer).dense(sae.config.d_sae)


def naively(host, pairs, changes, metric=logit_difference):
    """m of every example with `changes[l]` added to the stream of layer l."""
    splices = {layer: lambda x, layer=layer: x + changes[layer] for layer in changes}
    with torch.no_grad(), host.splice(splices):
        return metric(host.logits(pairs.clean)[:, -1], pairs)


def mask_of(pairs, special=()):
    masked = torch.isin(pairs.clean, torch.tensor(special)) | torch.isin(
        pairs.patch, torch.tensor(special)
    )
    return ~masked.unsqueeze(-1)


def dense_attribution(host, pairs, saes, special=()):
    """Latents' effects [example, context, d_sae] and the errors', by a splice at all layers at once
    whose pass-through is an autograd function of its own.
    """
    leaves, values = {}, {}

    class PassThrough(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, f, error, rows):
            ctx.rows = rows
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient, gradient.to(ctx.rows.dtype) @ ctx.rows.T, gradient, None

    def splicing(layer, sae):
        def splice(x):
            f = latents_of(sae, x.detach(), layer).requires_grad_()
            error = (x.detach() - sae(x.detach(), layer).detach()).requires_grad_()
            leaves[layer] = (f, error)
            if not x.requires_grad:
                x = x.detach().requires_grad_()
            return PassThrough.apply(x, f, error, directions(sae, layer))

        return splice

    with host.splice({layer: splicing(layer, sae) for layer, sae in saes.items()}):
        m = logit_difference(host.logits(pairs.clean)[:, -1], pairs)
    m.sum().backward()
    streams = host.residual_streams(pairs.patch, list(saes))
    mask = mask_of(pairs, special)
    for layer, sae in saes.items():
        f, error = leaves[layer]
        x = streams[layer]
        f_patch, error_patch = latents_of(sae, x, layer), x - sae(x, layer).detach()
        values[layer] = (
            ((f_patch - f.detach()) * f.grad * mask),
            ((error_patch - error.detach()) * error.grad * mask).sum((1, 2)),
        )
    return values


def naive_exact(host, pairs, sae, layer, special=()):
    """Latents' effects [example, d_sae] and the errors' [example]: every latent by itself."""
    x, y = (host.residual_streams(ids, [layer])[layer] for ids in (pairs.clean, pairs.patch))
    mask, rows = mask_of(pairs, special), directions(sae, layer)
    change = (latents_of(sae, y, layer) - latents_of(sae, x, layer)) * mask
    error = ((y - sae(y, layer)) - (x - sae(x, layer))).detach() * mask
    m_clean = naively(host, pairs, {})
    latents = [
        naively(host, pairs, {layer: change[..., i, None] * rows[i]}) - m_clean
        for i in range(sae.config.d_sae)
    ]
    return torch.stack(latents, 1), naively(host, pairs, {layer: error}) - m_clean


def one(host, pairs, saes, method, **options) -> Effects:
    pairs = [pairs] if isinstance(pairs, Pairs) else pairs
    return effects(host, pairs, {"it": saes}, method=method, **options)["it"]


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max() + 1e-12))


def assert_same(a: Effects, b: Effects, tolerance=1e-9):
    assert list(a.latents) == list(b.latents)
    for layer in a.latents:
        close(a.latents[layer], b.latents[layer], tolerance)
        assert a.error[layer] == pytest.approx(b.error[layer], rel=tolerance, abs=tolerance)


# What attribution patching is


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("rule", RULES)
def test_attribution_is_the_gradient_through_a_splice_at_all_layers_at_once(deep, rule, affine):
    pairs, sae = make_pairs(), make_sae(rule, affine)
    found = one(deep, pairs, spliced_in(sae), "attribution", by_position=True)
    assert found.by_position is not None
    for layer, (latents, error) in dense_attribution(deep, pairs, spliced_in(sae)).items():
        assert latents.count_nonzero() > 20
        close(found.latents[layer], latents.sum(1).mean(0))
        close(found.by_position[CONTEXT][layer], latents.mean(0))
        assert found.error[layer] == pytest.approx(float(error.mean()), rel=1e-9)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attribution_in_every_host_architecture(architecture):
    experts = "num_experts_per_tok" in ARCHITECTURES[architecture].extra  # none in float64
    model = tiny_model(architecture)
    host = HostModel(model if experts else model.double())
    pairs, sae = make_pairs(), make_sae()
    sae.config = replace(sae.config, layers=(0, 1, 2))
    saes, tolerance = spliced_in(sae, (0, 2)), 1e-4 if experts else 1e-9
    found = one(host, pairs, saes, "attribution")
    for layer, (latents, error) in dense_attribution(host, pairs, saes).items():
        close(found.latents[layer], latents.sum(1).mean(0), tolerance)
        assert found.error[layer] == pytest.approx(float(error.mean()), rel=tolerance)


@given(seed=seeds)
@FEW
def test_latents_and_error_sum_to_the_gradient_times_the_change_of_the_stream(deep, seed):
    pairs, sae = make_pairs(seed=seed), make_sae(seed=seed)
    found = one(deep, pairs, spliced_in(sae), "attribution")
    for layer in LAYERS:
        x, y = (deep.residual_streams(i, [layer])[layer] for i in (pairs.clean, pairs.patch))
        x.requires_grad_()
        logits = deep.logits_from(layer, x, pairs.clean)
        (g,) = torch.autograd.grad(logit_difference(logits[:, -1], pairs).sum(), x)
        expected = float((g * (y - x.detach())).sum()) / len(pairs)
        total = float(found.latents[layer].sum()) + found.error[layer]
        assert total == pytest.approx(expected, rel=1e-9, abs=1e-12)


# What exact effects are


@pytest.mark.parametrize(("rule", "affine", "layer"), [("topk", "gain", 2), ("gated", "bias", 3)])
def test_exact_is_one_forward_per_latent(deep, rule, affine, layer):
    pairs, sae = make_pairs(2, context=4), make_sae(rule, affine)
    found = one(deep, pairs, spliced_in(sae), "exact")
    latents, error = naive_exact(deep, pairs, sae, layer)
    assert latents.count_nonzero() > 10
    close(found.latents[layer], latents.mean(0))
    assert found.error[layer] == pytest.approx(float(error.mean()), rel=1e-9)


def test_exact_by_position_changes_one_position_at_a_time(deep):
    pairs, sae = make_pairs(2, context=4), make_sae()
    found = one(deep, pairs, spliced_in(sae, (3,)), "exact", by_position=True)
    x, y = (deep.residual_streams(i, [3])[3] for i in (pairs.clean, pairs.patch))
    change = latents_of(sae, y, 3) - latents_of(sae, x, 3)
    m_clean = naively(deep, pairs, {})
    assert found.by_position is not None
    for position in range(4):
        for latent in change[:, position].any(0).nonzero().flatten().tolist():
            added = torch.zeros_like(x)
            added[:, position] = change[:, position, latent, None] * directions(sae, 3)[latent]
            m = naively(deep, pairs, {3: added})
            assert float(found.by_position[4][3][position, latent]) == pytest.approx(
                float((m - m_clean).mean()), rel=1e-9, abs=1e-12
            )
    assert torch.equal(found.latents[3], found.by_position[4][3].sum(0))


# Where they agree


@given(seed=seeds, rule=st.sampled_from(list(RULES)), affine=st.sampled_from(AFFINES))
@FEW
def test_all_methods_agree_on_a_linear_read_out(linear, seed, rule, affine):
    pairs, saes = make_pairs(2, context=4, seed=seed), spliced_in(make_sae(rule, affine, seed=seed))
    exact = one(linear, pairs, saes, "exact", by_position=True)
    for method in ("attribution", "integrated_gradients"):
        found = one(linear, pairs, saes, method, by_position=True, steps=2)
        assert_same(found, exact)
        for layer in LAYERS:
            close(found.by_position[4][layer], exact.by_position[4][layer])


def patched(host, pairs, layer, metric=logit_difference, special=()):
    """Mean of m(patched stream at the layer) - m(clean)."""
    x, y = (host.residual_streams(ids, [layer])[layer] for ids in (pairs.clean, pairs.patch))
    change = (y - x) * mask_of(pairs, special)
    m, m_clean = (naively(host, pairs, {layer: c}, metric) for c in (change, 0 * x))
    return float((m - m_clean).mean())


def incompleteness(host, pairs, saes, steps):
    found = one(host, pairs, saes, "integrated_gradients", steps=steps)
    return max(
        abs(float(found.latents[layer].sum()) + found.error[layer] - patched(host, pairs, layer))
        for layer in saes
    )


@given(seed=seeds)
@FEW
def test_integrated_gradients_are_complete(deep, seed):
    pairs, saes = make_pairs(2, seed=seed), spliced_in(make_sae("gated", "gain", seed=seed), (3,))
    coarse, fine = (incompleteness(deep, pairs, saes, steps) for steps in (4, 16))
    assert fine < 5e-3 * abs(patched(deep, pairs, 3)) + 2e-3
    assert fine < coarse / 8 + 1e-3  # by 16 where the steps are short enough


def square(logits, pairs):
    return logit_difference(logits, pairs) ** 2


def test_midpoints_integrate_a_gradient_that_is_linear_on_the_path_without_error(linear):
    pairs, saes = make_pairs(), spliced_in(make_sae())
    pairs.clean[0, 3] = pairs.clean[1, 5] = 0
    for special in ((), (0,)):
        options = {"steps": 1, "metric": square, "special": special}
        found = one(linear, pairs, saes, "integrated_gradients", **options)
        for layer in LAYERS:
            total = float(found.latents[layer].sum()) + found.error[layer]
            expected = patched(linear, pairs, layer, square, special)
            assert total == pytest.approx(expected, rel=1e-9)


def test_of_a_quadratic_metric_integrated_gradients_are_the_exact_effects_from_both_ends(linear):
    pairs, saes = make_pairs(2, context=4), spliced_in(make_sae(), (2, 3))
    back = replace(pairs, clean=pairs.patch, patch=pairs.clean)  # the answers stay
    there, returned = (one(linear, p, saes, "exact", metric=square) for p in (pairs, back))
    found = one(linear, pairs, saes, "integrated_gradients", metric=square)
    alone = one(linear, pairs, saes, "attribution", metric=square)
    for layer in (2, 3):
        close(found.latents[layer], (there.latents[layer] - returned.latents[layer]) / 2)
        assert found.error[layer] == pytest.approx((there.error[layer] - returned.error[layer]) / 2)
        assert (alone.latents[layer] - found.latents[layer]).abs().max() > 0.1


# What does not change them


def test_subjects_together_are_as_each_alone(deep):
    pairs = make_pairs(1, context=4)
    shared, own, other = (
        make_sae(),
        make_sae("batchtopk", seed=1),
        make_sae("jumprelu", "gain", seed=2),
    )
    subjects = {
        "G=1": spliced_in(shared),
        "G=2": {2: shared, 3: own, 4: own},
        "one layer": {3: other},
    }
    for method in METHODS:
        together = effects(deep, [pairs], subjects, method=method)
        for name, saes in subjects.items():
            assert_same(together[name], one(deep, pairs, saes, method))
        assert torch.equal(together["G=1"].latents[2], together["G=2"].latents[2])


@pytest.mark.parametrize("method", METHODS)
def test_batches_do_not_change_them(deep, method):
    pairs = [make_pairs(3, context=5), make_pairs(2, context=3, seed=1)]
    saes, options = spliced_in(make_sae(), (3,)), {"steps": 2, "by_position": True}
    whole = one(deep, pairs, saes, method, **options)
    assert whole.examples == 5
    assert {length: rows[3].shape[0] for length, rows in whole.by_position.items()} == {3: 3, 5: 5}
    for batch_tokens in (1, 33):
        assert_same(whole, one(deep, pairs, saes, method, batch_tokens=batch_tokens, **options))
    rows = {n: whole.by_position[n][3].sum(0) for n in (3, 5)}  # means over their own length
    close(whole.latents[3], (2 * rows[3] + 3 * rows[5]) / 5)


def test_a_mean_over_lengths_weighs_examples_equally(deep):
    parts = [make_pairs(5), make_pairs(2, context=4, seed=1)]
    saes = spliced_in(make_sae(), (3,))
    each = [one(deep, part, saes, "attribution") for part in parts]
    both = one(deep, parts, saes, "attribution")
    close(both.latents[3], (5 * each[0].latents[3] + 2 * each[1].latents[3]) / 7)
    assert both.error[3] == pytest.approx((5 * each[0].error[3] + 2 * each[1].error[3]) / 7)


# What has no effect


@pytest.mark.parametrize("method", METHODS)
def test_special_positions_are_not_spliced(deep, method):
    pairs, sae = make_pairs(2, context=5), make_sae()
    pairs.clean[0, 3], pairs.patch[1, 4], pairs.clean[:, 2] = 0, 1, 0
    saes, special = spliced_in(sae, (2, 3)), (0, 1)
    found = one(deep, pairs, saes, method, special=special, by_position=True)
    assert not found.by_position[5][3][2].any()
    assert found.by_position[5][3][3:].any(1).all()
    if method == "attribution":
        for layer, (latents, error) in dense_attribution(deep, pairs, saes, special).items():
            close(found.by_position[5][layer], latents.mean(0))
            assert found.error[layer] == pytest.approx(float(error.mean()), rel=1e-9)
    if method == "exact":
        latents, error = naive_exact(deep, pairs, sae, 3, special)
        close(one(deep, pairs, saes, method, special=special).latents[3], latents.mean(0))
        assert found.error[3] == pytest.approx(float(error.mean()), rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_has_an_effect_before_the_prompts_differ_or_where_they_never_do(deep, method):
    pairs = make_pairs(2)
    pairs.patch[:, :4] = pairs.clean[:, :4]
    pairs.patch[0] = pairs.clean[0]
    found = one(deep, pairs, spliced_in(make_sae(), (3,)), method, by_position=True)
    assert not found.by_position[CONTEXT][3][:4].any()
    assert found.by_position[CONTEXT][3][4:].any(1).all()
    same = replace(pairs, patch=pairs.clean)
    found = one(deep, same, spliced_in(make_sae(), (3,)), method)
    assert not found.latents[3].any()
    assert found.error[3] == 0


def test_the_metric_is_the_users(deep):
    def probability(logits, pairs):
        return logits.softmax(-1).gather(1, pairs.a_patch.unsqueeze(1)).squeeze(1)

    pairs, saes = make_pairs(), spliced_in(make_sae(), (4,))
    found = one(deep, pairs, saes, "integrated_gradients", steps=40, metric=probability)
    total = float(found.latents[4].sum()) + found.error[4]
    assert total == pytest.approx(patched(deep, pairs, 4, probability), rel=0.01, abs=1e-4)


# What it takes


class Largest(TorchDispatchMode):
    """The most elements that any tensor had."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.numel())
        return result


@pytest.mark.parametrize("method", METHODS)
def test_no_tensor_is_larger_than_one_encoding_of_a_batch(deep, method):
    d_sae, batch_tokens = 1024, 40
    sae = SAE(SAEConfig(d_model=D_MODEL, d_sae=d_sae, k=2, layers=LAYERS)).double()
    options = {"batch_tokens": batch_tokens, "steps": 2}
    with Largest() as largest:
        one(deep, make_pairs(24, context=4), spliced_in(sae), method, **options)
    assert batch_tokens * d_sae > sae.W_dec.numel()
    assert largest.numel <= batch_tokens * d_sae


def test_attribution_takes_two_forwards_and_one_backward_for_all_subjects(deep, monkeypatch):
    calls = {"forward": 0, "backward": 0}
    block, head = deep.blocks[3], deep.model.get_output_embeddings()
    handles = [
        block.register_forward_hook(lambda *_: calls.update(forward=calls["forward"] + 1)),
        head.register_full_backward_hook(lambda *_: calls.update(backward=calls["backward"] + 1)),
    ]
    try:
        subjects = {str(i): spliced_in(make_sae(seed=i)) for i in range(4)}
        effects(deep, [make_pairs()], subjects, method="attribution")
    finally:
        for handle in handles:
            handle.remove()
    assert calls == {"forward": 2, "backward": 1}


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])  # with and without tied weights
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_a_host_in_16_bit_gives_about_the_same(architecture, dtype, method):
    exact = HostModel(tiny_model(architecture))
    host = HostModel(copy.deepcopy(exact.model).to(dtype))
    sae = make_sae("relu", dtype=torch.float32)  # chooses its latents without jumps
    sae.config = replace(sae.config, layers=(0, 1, 2))
    pairs, saes = make_pairs(), spliced_in(sae, (1,))
    found, expected = (one(h, pairs, saes, method) for h in (host, exact))
    assert found.latents[1].dtype == torch.float64
    both = torch.stack([found.latents[1], expected.latents[1]])
    assert float(torch.corrcoef(both)[0, 1]) > 0.9


def test_grad_mode_and_weights_are_left_alone(deep):
    sae = make_sae()
    with torch.no_grad():
        inside = one(deep, make_pairs(), spliced_in(sae), "attribution")
    assert torch.is_grad_enabled()
    assert_same(inside, one(deep, make_pairs(), spliced_in(sae), "attribution"))
    assert all(p.grad is None for p in (*sae.parameters(), *deep.model.parameters()))


def test_on_the_bundled_model_the_approximations_rank_latents_as_exact_effects_do():
    from groupsae.host.bundled.tasks import prompts

    host = HostModel.load("bundled", device="cpu")
    examples = prompts("ioi", 20)
    ids = [
        [host.tokenizer(example[key])["input_ids"] for key in ("x_clean", "x_patch")]
        for example in examples
    ]
    length = len(ids[0][0])
    kept = [i for i, (one, other) in enumerate(ids) if len(one) == len(other) == length][:3]
    answers = [
        [host.tokenizer(examples[i][key])["input_ids"][0] for key in ("a_clean", "a_patch")]
        for i in kept
    ]
    pairs = Pairs(
        *(torch.tensor([ids[i][side] for i in kept]) for side in range(2)),
        *torch.tensor(answers).T,
        ("",) * len(kept),
    )
    layer = host.n_layers - 2
    x = host.residual_streams(pairs.clean, [layer])[layer].flatten(0, 1)
    sae = SAE(
        SAEConfig(d_model=host.d_model, d_sae=4 * host.d_model, k=8, layers=(layer,)),
        mean=x.mean(0, keepdim=True),
        generator=torch.Generator().manual_seed(0),
    )
    found = {method: one(host, pairs, {layer: sae}, method) for method in METHODS}
    exact = found["exact"].importance(layer)
    top = exact.topk(50).indices
    for method in ("attribution", "integrated_gradients"):
        assert spearmanr(found[method].importance(layer)[top], exact[top])[0] > 0.8


# Files


def test_effects_come_back_from_their_file(deep, tmp_path):
    for by_position in (False, True):
        pairs = [make_pairs(), make_pairs(2, context=4, seed=1)]
        saved = one(deep, pairs, spliced_in(make_sae()), "attribution", by_position=by_position)
        saved.save(tmp_path / "new" / "effects.safetensors")
        read = Effects.load(tmp_path / "new" / "effects.safetensors")
        assert (read.method, read.examples, read.error) == ("attribution", 5, dict(saved.error))
        assert list(read.latents) == list(LAYERS)
        for layer in LAYERS:
            assert torch.equal(read.latents[layer], saved.latents[layer])
            assert torch.equal(read.importance(layer), saved.latents[layer].abs())
        assert (read.by_position is None) is not by_position
        for length, rows in (saved.by_position or {}).items():
            for layer in LAYERS:
                assert torch.equal(read.by_position[length][layer], rows[layer])


def test_a_file_that_holds_no_effects_is_refused(tmp_path):
    path = tmp_path / "effects.safetensors"
    with pytest.raises(InputError, match="no such file"):
        Effects.load(path)
    foreign = {"latents.2": torch.zeros(3, dtype=torch.float64)}
    save_file(foreign, path)
    with pytest.raises(InputError, match="no readable effects"):
        Effects.load(path)
    described = {"method": "exact", "examples": 1, "layers": [2, 3], "error": [0, 0]}
    for metadata in ("{", json.dumps([]), json.dumps(described | {"lengths": None})):
        save_file(foreign, path, metadata={"groupsae.effects": metadata})
        with pytest.raises(InputError, match="no readable effects"):
            Effects.load(path)
    whole = Effects("exact", 1, {2: foreign["latents.2"]}, {2: 0.5})
    whole.save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="no readable effects"):
        Effects.load(path)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "gradient"}, "method: 'gradient' is unknown; choose one of attribution"),
        ({"steps": 0}, "steps: 0 must be at least 1"),
        ({"batch_tokens": 0}, "batch_tokens: 0 must be at least 1"),
        ({"pairs": []}, "there is no example"),
        ({"subjects": {"it": {1: make_sae()}}}, "layers 2, 3, 4 at layer 1"),
        ({"subjects": {"it": {2: sae_with("topk")}}}, "d_model = 12"),
        ({"metric": lambda logits, pairs: logits}, "one floating-point number per example"),
        ({"metric": lambda logits, pairs: logits.argmax(-1)}, "one floating-point number"),
        ({"metric": lambda logits, pairs: logits.argmax(-1).double()}, "metric: it has no gradi"),
        ({"metric": lambda logits, pairs: (0 * logits[:, 0]).sqrt()}, "layer 2 holds NaN or inf"),
    ],
)
def test_what_cannot_work_is_refused(deep, changes, message):
    settled = {
        "pairs": [make_pairs()],
        "subjects": {"it": spliced_in(make_sae())},
        "method": "attribution",
        **changes,
    }
    pairs, subjects = settled.pop("pairs"), settled.pop("subjects")
    with pytest.raises(InputError, match=message):
        effects(deep, pairs, subjects, **settled)


def test_a_metric_without_gradient_has_exact_effects(deep):
    def right(logits, pairs):
        return (logit_difference(logits, pairs) < 0).double()

    found = one(
        deep, make_pairs(10, context=3), spliced_in(make_sae(), (4,)), "exact", metric=right
    )
    assert set((10 * found.latents[4]).round(decimals=9).tolist()) <= set(range(-10, 11))


def test_a_metric_that_is_not_finite_is_refused_in_exact_effects(deep):
    def infinite(logits, pairs):
        return logits[:, 0] / 0

    with pytest.raises(InputError, match="the metric is NaN or infinite after a change at layer 2"):
        one(deep, make_pairs(), spliced_in(make_sae()), "exact", metric=infinite)


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("this kernel has no backward")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda x: x.detach(), "gpt_neox in torch.float64 carries no gradient to layer 2"),
        (NoBackward.apply, "carries no gradient to layer 2: this kernel has no backward"),
    ],
)
@pytest.mark.parametrize("method", ["attribution", "integrated_gradients"])
def test_a_host_that_carries_no_gradient_is_refused(broken, message, method):
    host = HostModel(tiny_model("gpt_neox", n_layers=5).double(), name="gpt_neox")
    inner = host.blocks[3].forward
    host.blocks[3].forward = lambda *args, **options: broken(inner(*args, **options))
    with pytest.raises(InputError, match=message + ".*host.dtype=float32.*method='exact'"):
        one(host, make_pairs(), spliced_in(make_sae()), method)
    assert one(host, make_pairs(), spliced_in(make_sae(), (3,)), "exact").latents[3].any()
