from __future__ import annotations

import pytest
import torch

from groupsae.errors import InputError
from groupsae.sae.kernels import choose, cpu, reference, sparse
from groupsae.sae.kernels.update import update
from tests.sae.kernels.cases import random_batch, random_sae

CPU = torch.device("cpu")
NAMES = ["reference", "torch", "auto"]


def test_kernels_are_found_by_name():
    assert (choose("reference", CPU).name, choose("torch", CPU).name) == ("reference", "torch")
    assert choose("reference", CPU).update is choose("torch", CPU).update is update


def test_auto_is_compiled_where_that_can_be(monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: True)
    assert choose("auto", CPU).name == "cpu"
    assert choose("auto", CPU).update is cpu.update
    assert choose("auto", torch.device("cuda")).name == "torch"
    monkeypatch.setattr(cpu, "available", lambda: False)
    assert choose("auto", CPU).name == "torch"


@pytest.mark.parametrize(("name", "module"), [("reference", reference), ("torch", sparse)])
def test_a_kernel_is_its_modules_step(name, module):
    sae, x = random_sae(24, 200, 8), random_batch(40, 24)
    dead = torch.arange(200) < 20
    result = choose(name, CPU).step(sae, x, dead=dead, auxk_weight=0.5)
    expected = module.step(sae, x, dead=dead, auxk_weight=0.5)
    assert torch.equal(result.loss, expected.loss)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_batches_of_any_floating_dtype(name, dtype):
    sae, x = random_sae(24, 200, 8), random_batch(40, 24).to(dtype)
    got, expected = choose(name, CPU).step(sae, x), reference.step(sae, x.float())
    torch.testing.assert_close(got.loss, expected.loss)
    for parameter, gradient in expected.gradients.items():
        torch.testing.assert_close(got.gradients[parameter], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "x",
    [torch.empty(0, 24), torch.randn(24), torch.randn(40, 23), torch.ones(40, 24).long()],
    ids=["empty", "one token without its axis", "another width", "whole numbers"],
)
def test_what_is_no_batch_is_refused(name, x):
    with pytest.raises(InputError, match=r"is no batch of activations: \[token, 24\] is wanted"):
        choose(name, CPU).step(random_sae(24, 200, 8), x)


def test_what_was_asked_for_by_name_and_cannot_run_is_refused(monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: False)
    with pytest.raises(InputError, match=r"training\.kernel=cpu needs a C\+\+ compiler"):
        choose("cpu", CPU)
    with pytest.raises(InputError, match=r"training\.kernel=triton needs an NVIDIA GPU"):
        choose("triton", CPU)
