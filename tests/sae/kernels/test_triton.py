"""The kernels against `reference`: on a CUDA device, or in Triton's interpreter on the CPU.

Whether Triton interprets is settled when it is imported, so without a CUDA device this file runs
itself once more, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from groupsae.errors import InputError
from groupsae.sae import SAE, SAEConfig
from groupsae.sae.kernels import reference
from groupsae.sae.kernels import triton as kernels
from tests.sae.kernels.cases import random_batch, random_sae

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if CUDA else "cpu"

needs_triton = pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
needs_kernels = pytest.mark.skipif(
    not kernels.available(), reason="neither a CUDA device nor Triton's interpreter"
)
needs_cuda = pytest.mark.skipif(not (CUDA and kernels.available()), reason="no CUDA device")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="Triton interprets in this process")


def make_sae(d_model=6, d_sae=17, k=3, seed=0) -> SAE:
    return random_sae(d_model, d_sae, k, seed).to(DEVICE)


def make_batch(tokens=4, d_model=6, seed=1):
    return random_batch(tokens, d_model, seed).to(DEVICE)


def make_exact(tokens, d_model, d_sae, k):
    """An SAE and a batch whose pre-activations have no rounding and no ties, in any precision.

    Operands are -1, 0 and 1, and each latent's bias is its own multiple of 2^-16.
    """
    sae = make_sae(d_model, d_sae, k)
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-1, 2, (tokens, d_model), generator=generator).float()
    with torch.no_grad():
        sae.W_enc.copy_(torch.randint(-1, 2, (d_sae, d_model), generator=generator))
        sae.b_enc.copy_(torch.randperm(d_sae, generator=generator) * 2**-16)
        sae.b_dec.zero_()
    return sae, x.to(DEVICE)


def make_dead(number, d_sae=17):
    dead = torch.zeros(d_sae, dtype=torch.bool)
    dead[torch.randperm(d_sae, generator=torch.Generator().manual_seed(2))[:number]] = True
    return dead.to(DEVICE)


def assert_same(sae, x, dead=None, rtol=1e-4, atol=1e-5, product_dtype=torch.float32):
    """The step of `kernels` in float32 is that of `reference` in float64."""
    result = kernels.step(sae, x, dead=dead, auxk_weight=0.5, product_dtype=product_dtype)
    expected = reference.step(sae.double(), x.double(), dead=dead, auxk_weight=0.5)
    sae.float()
    for name in ("loss", "fvu", "auxk", "l0"):
        torch.testing.assert_close(
            getattr(result, name).double(), getattr(expected, name), rtol=1e-5, atol=1e-6, msg=name
        )
    assert torch.equal(result.fired, expected.fired)
    assert result.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(
            result.gradients[name].double(),
            gradient,
            rtol=rtol,
            atol=atol * max(gradient.abs().max().item(), 1e-3),
            msg=lambda m, n=name: f"{n}: {m}",
        )


def adversarial_rows(d_sae: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    random = rng.standard_normal(d_sae).astype(np.float32)
    rows = {
        "random": random,
        "equal": np.full(d_sae, 0.5),
        "zero": np.zeros(d_sae),
        "minus zero": np.full(d_sae, -0.0),
        "negative": -np.abs(random) - 1,
        "one positive": np.where(np.arange(d_sae) == d_sae - 1, 1.0, -1.0),
        "two values": np.where(rng.random(d_sae) < 0.5, 2.0, 1.0),
        "three above equal ones": np.where(np.arange(d_sae) < 3, 3.0, 1.0),
        "neighbours": 1 + np.float32(2**-23) * rng.permutation(d_sae),
        "ascending": np.arange(d_sae),
        "tiny and infinite": np.where(np.arange(d_sae) % 7 == 0, np.inf, 1e-42),
        "large in one column": np.where(np.arange(d_sae) % 1024 < 2, 100 + random, random),
    }
    return torch.from_numpy(np.stack(list(rows.values())).astype(np.float32)).to(DEVICE)


@needs_kernels
@pytest.mark.parametrize(("d_sae", "k"), [(1, 1), (37, 1), (37, 37), (2051, 9)])
def test_exactly_the_largest_are_chosen_and_of_equal_ones_the_first(d_sae, k):
    rows = adversarial_rows(d_sae)
    chosen = kernels._empty_slots(rows, d_sae, k)
    kernels._select(rows, None, chosen, 0)
    for row, values, indices, count in zip(
        rows.cpu(), chosen.values.cpu(), chosen.indices.cpu(), chosen.counts.cpu(), strict=True
    ):
        expected = row.relu().argsort(descending=True, stable=True)[:k]
        expected = expected[row[expected] > 0]
        assert count == len(expected)
        assert set(indices[:count].tolist()) == set(expected.tolist())
        assert torch.equal(values[:count], row[indices[:count].long()])
        assert (values[count:] == 0).all()
        assert (indices[count:] == d_sae).all()


@needs_kernels
@pytest.mark.parametrize(
    ("tokens", "d_model", "d_sae", "k"),
    [(5, 6, 33, 3), (5, 5, 12, 12), (5, 3, 17, 1), (2, 1, 1, 1), (3, 70, 9, 4)],
)
def test_same_as_dense_autograd(tokens, d_model, d_sae, k):
    assert_same(make_sae(d_model, d_sae, k), make_batch(tokens, d_model))


@needs_kernels
@pytest.mark.parametrize("number", [0, 2, 9, 17])
def test_same_with_dead_latents(number):
    assert_same(make_sae(), make_batch(), make_dead(number))


@needs_kernels
def test_no_latent_active():
    sae = make_sae()
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    assert_same(sae, make_batch(), make_dead(5))


@needs_kernels
def test_one_latent_on_every_token_is_summed_in_pieces(monkeypatch):
    monkeypatch.setattr(kernels, "_PIECE", 4)
    sae = make_sae(d_sae=5, k=2)
    with torch.no_grad():
        sae.b_enc[3] = 50
        sae.b_enc[2] = 20
    assert_same(sae, make_batch(13), torch.arange(5, device=DEVICE) == 2)


@needs_kernels
@pytest.mark.parametrize("most", [100, 4])
def test_all_latents_of_many_pieces(most, monkeypatch):
    monkeypatch.setattr(kernels, "_PIECE", 1)
    monkeypatch.setattr(kernels, "_EXTRA_PIECES", most)
    sae = make_sae(d_sae=3, k=3)
    with torch.no_grad():
        sae.b_enc.fill_(50)
    assert_same(sae, make_batch(10))


@needs_kernels
def test_many_chunks_are_the_same_as_one(monkeypatch):
    sae, x, dead = make_sae(), make_batch(3), make_dead(4)
    whole = kernels.step(sae, x, dead=dead)
    monkeypatch.setattr(kernels, "_CHUNK_BYTES", 17 * 4 * 2)
    parts = kernels.step(sae, x, dead=dead)
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(parts.gradients[name], gradient)


@needs_kernels
def test_ties_give_the_loss_of_any_choice():
    sae = make_sae(d_sae=16)
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.b_enc, sae.W_dec):
            parameter[1::2] = parameter[::2]
    x = make_batch()
    expected, result = reference.step(sae, x), kernels.step(sae, x)
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(result.gradients["b_dec"], expected.gradients["b_dec"])


@needs_kernels
def test_a_transposed_batch_of_half_precision_gives_the_same_bits():
    sae, x = make_sae(), make_batch(3).half()
    turned = x.T.contiguous().T
    assert not turned.is_contiguous()
    result, expected = kernels.step(sae, turned), kernels.step(sae, x.float())
    for name, gradient in expected.gradients.items():
        assert torch.equal(result.gradients[name], gradient)


@needs_kernels
def test_the_bfloat16_product_is_that_of_rounded_operands_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 70, generator=generator).bfloat16().to(DEVICE)
    W_enc = torch.randn(131, 70, generator=generator).bfloat16().to(DEVICE)
    b_enc = torch.randn(131, generator=generator).to(DEVICE)
    out = torch.empty(5, 131, device=DEVICE)
    kernels._multiply(x, W_enc, b_enc, out)
    expected = x.double() @ W_enc.double().T + b_enc.double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_a_bfloat16_product_that_needs_no_rounding_changes_nothing():
    sae, x = make_exact(4, 20, 17, 3)
    assert_same(sae, x, make_dead(5), product_dtype=torch.bfloat16)


@needs_kernels
def test_what_cannot_be_trained_is_refused():
    sae, x = make_sae(), make_batch()
    with pytest.raises(InputError, match="empty"):
        kernels.step(sae, x[:0])
    with pytest.raises(InputError, match=r"product_dtype: torch\.float16"):
        kernels.step(sae, x, product_dtype=torch.float16)
    with pytest.raises(InputError, match=r"not torch\.float64"):
        kernels.step(sae.double(), x)


@needs_cuda
@pytest.mark.parametrize(
    ("tokens", "d_model", "d_sae", "k", "dead"),
    [(4096, 768, 12288, 128, 1200), (1000, 4096, 40000, 64, 100), (777, 65, 1001, 1001, 0)],
)
@pytest.mark.parametrize("product_dtype", [torch.float32, torch.bfloat16])
def test_same_as_dense_autograd_at_the_size_of_real_models(
    tokens, d_model, d_sae, k, dead, product_dtype
):
    sae, x = make_exact(tokens, d_model, d_sae, k)
    with torch.no_grad():
        sae.b_enc[:3] += 1e3  # active on every token
    assert_same(sae, x, make_dead(dead, d_sae), 1e-3, 1e-4, product_dtype)


@needs_cuda
def test_the_host_never_waits_and_the_step_can_be_captured():
    sae, x, dead = make_sae(64, 512, 8), make_batch(256, 64), make_dead(50, 512)
    expected = kernels.step(sae, x, dead=dead)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.step(sae, x, dead=dead)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = kernels.step(sae, x, dead=dead)
    graph.replay()
    for name, gradient in expected.gradients.items():
        assert torch.equal(result.gradients[name], gradient)


@needs_triton
@not_interpreted
def test_all_of_this_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", __file__],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        },
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]


FLOAT, NARROW, LONG, NUMBER = "*fp32", "*i16", "*i64", "i32"
COMPILED = {
    "_product_kernel": (
        {"inputs": "*bf16", "W_enc": "*bf16"},
        {"TOKENS": 128, "LATENTS": 128, "INNER": 64},
    ),
    "_select_kernel": (
        {"allowed": "*u8", "indices": NARROW, "counts": "*i32"},
        {"MASKED": True, "BLOCK": 1024},
    ),
    "_reconstruct_kernel": ({"indices": NARROW, "counts": "*i32"}, {"BLOCK": 1024, "ROWS": 4}),
    "_sum_pieces_kernel": ({}, {"BLOCK": 256, "ROWS": 8, "ADD": True}),
    "_add_extra_kernel": ({}, {"BLOCK": 256, "ROWS": 8}),
}


@needs_triton
@not_interpreted
@pytest.mark.parametrize("name", COMPILED)
def test_the_kernels_compile_for_a_device_that_is_not_there(name, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if kernels.triton.__version__.startswith("3.2."):
        pytest.skip("Triton 3.2 compiles through another interface")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(kernels, name)
    special, constants = COMPILED[name]
    numbers = dict.fromkeys(("tokens", "d_sae", "d_model", "k", "piece_length"), NUMBER)
    tables = dict.fromkeys(("order", "offsets", "first_piece", "owner"), LONG)
    types = numbers | tables | dict.fromkeys(constants, "constexpr") | special
    source = ASTSource(
        kernel,
        {argument: types.get(argument, FLOAT) for argument in kernel.arg_names},
        {(kernel.arg_names.index(n),): value for n, value in constants.items()},
    )
    compiled = kernels.triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]


def test_without_triton_the_module_imports_and_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("kernels_without_triton", kernels.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert not module.available()
    with pytest.raises(InputError, match="needs the package triton"):
        module.step(make_sae(), make_batch())


@needs_triton
@not_interpreted
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_device_the_step_says_so():
    assert not kernels.available()
    sae = SAE(SAEConfig(d_model=2, d_sae=4, k=1, layers=(0,)))
    with pytest.raises(InputError, match="CUDA device"):
        kernels.step(sae, torch.zeros(3, 2))
