"""Every sparsity rule, in every kernel, has the gradients of the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsae.errors import InputError
from groupsae.sae.kernels import StepResult, cpu, reference, selection, sparse
from tests.sae.kernels.cases import AFFINES, RULES, random_batch, random_members, sae_with

SPARSE = [rule for rule in RULES if rule != "gated"]

every_rule = pytest.mark.parametrize("rule", RULES)
every_affine = pytest.mark.parametrize("affine", AFFINES)


def assert_same(result: StepResult, expected: StepResult, rtol: float, atol: float) -> None:
    for field in dataclasses.fields(StepResult):
        value, wanted = getattr(result, field.name), getattr(expected, field.name)
        if field.name == "fired":
            assert torch.equal(value, wanted)
        elif field.name == "gradients":
            assert value.keys() == wanted.keys()
            for name, gradient in wanted.items():
                torch.testing.assert_close(
                    value[name].to(gradient.dtype),
                    gradient,
                    rtol=rtol,
                    atol=atol,
                    msg=lambda m, n=name: f"{n}: {m}",
                )
        elif wanted is None:
            assert value is None
        else:
            torch.testing.assert_close(
                value.to(wanted.dtype),
                wanted,
                rtol=rtol,
                atol=atol,
                msg=lambda m, n=field.name: f"{n}: {m}",
            )


@every_affine
@every_rule
@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(3, 40), seed=st.integers(0, 1000), n_dead=st.sampled_from([0, 3, 60]))
def test_the_sparse_step_is_that_of_dense_autograd(rule, affine, tokens, seed, n_dead):
    sae = sae_with(rule, affine, seed=seed).double()
    x, members = random_batch(tokens, 12, seed, torch.float64), random_members(tokens, seed=seed)
    asked = {
        "members": members,
        "dead": torch.arange(120) < n_dead,
        "auxk_weight": 0.5,
        "sparsity_weight": 0.3,
    }
    assert_same(sparse.step(sae, x, **asked), reference.step(sae, x, **asked), 1e-9, 1e-11)


@every_affine
@pytest.mark.parametrize("rule", SPARSE)
def test_few_active_latents_take_no_dense_step(rule, affine, monkeypatch):
    monkeypatch.setattr(reference, "step", None)
    monkeypatch.setattr(selection, "_DENSE_BELOW", 3)
    sae, members = sae_with(rule, affine), random_members(30)
    assert float(sparse.step(sae, random_batch(30, 12), members=members).l0) > 0


@every_rule
def test_many_chunks_are_the_same_as_one(rule, monkeypatch):
    sae, members = sae_with(rule, "bias").double(), random_members(50)
    x = random_batch(50, 12, dtype=torch.float64)
    whole = sparse.step(sae, x, members=members, sparsity_weight=0.3)
    monkeypatch.setattr(selection, "_CHUNK_BYTES", 8 * 120 * 7)  # 7 tokens each
    parts = sparse.step(sae, x, members=members, sparsity_weight=0.3)
    assert_same(parts, whole, 1e-11, 1e-13)


@pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")
@every_affine
@every_rule
def test_the_compiled_step_is_that_of_dense_autograd(rule, affine):
    sae, members = sae_with(rule, affine), random_members(64)
    x = random_batch(64, 12)
    asked = {
        "members": members,
        "dead": torch.arange(120) < 20,
        "auxk_weight": 0.5,
        "sparsity_weight": 0.3,
    }
    result = cpu.step(sae, x, **asked)
    assert_same(result, reference.step(sae.double(), x.double(), **asked), 2e-4, 1e-5)


@pytest.mark.parametrize("step", [reference.step, sparse.step, cpu.step])
def test_a_token_that_takes_the_whole_batchs_latents(step):
    """All k n active latents on a few tokens: more than a first look at 2 k of each would see."""
    sae = sae_with("batchtopk")
    x = random_batch(40, 12) * 1e-3
    x[7] *= 1e4
    result = step(sae, x)
    z = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
    largest = z.flatten().topk(4 * 40).values
    torch.testing.assert_close(result.cuts, largest[-1].expand(3))
    assert float(result.l0) == pytest.approx(float((z >= largest[-1]).sum()) / 40)


@pytest.mark.parametrize("step", [reference.step, sparse.step, cpu.step])
@pytest.mark.parametrize(
    ("rule", "affine"),
    [
        *[("topk", "bias"), ("topk", "gain"), ("relu", "bias"), ("gated", "bias")],
        *[("batchtopk by layer", "none"), ("jumprelu by layer", "none")],
    ],
)
def test_tokens_of_unknown_layers_are_refused_where_it_matters(rule, affine, step):
    with pytest.raises(InputError, match="treats its member layers differently: say which"):
        step(sae_with(rule, affine), random_batch(8, 12))


@pytest.mark.parametrize("rule", ["batchtopk by layer", "jumprelu by layer"])
def test_a_batch_without_one_of_the_layers(rule):
    sae, members = sae_with(rule), torch.tensor([0, 2] * 10)
    x = random_batch(20, 12)
    result = sparse.step(sae, x, members=members, sparsity_weight=0.3)
    assert_same(result, reference.step(sae, x, members=members, sparsity_weight=0.3), 1e-4, 1e-5)
    assert all(gradient.isfinite().all() for gradient in result.gradients.values())
    if rule == "batchtopk by layer":
        assert result.cuts.isfinite().tolist() == [True, False, True]
    else:
        assert not result.gradients["log_threshold"][1].any()


@pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")
@pytest.mark.parametrize("rule", ["batchtopk", "batchtopk by layer"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.05, 1.3])
def test_whatever_the_cuts_of_batches_before(rule, share):
    """The compiled step looks above these first, and elsewhere where this batch's lies lower."""
    sae, members, x = sae_with(rule), random_members(64), random_batch(64, 12)
    expected = reference.step(sae, x, members=members)
    sae.threshold.copy_(share * expected.cuts)
    assert_same(cpu.step(sae, x, members=members), expected, 2e-4, 1e-5)
