from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from groupsae.sae import SAE
from groupsae.sae.kernels import cpu, reference, sparse
from groupsae.sae.kernels.update import normalize_decoder, remove_parallel_component
from groupsae.sae.sparsity import Latents
from tests.sae.kernels.cases import random_batch, random_sae

NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("c++") is None, reason="no C++ compiler `c++` on the PATH"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The kernels, built into a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        cpu._library.cache_clear()
        if not cpu.available():
            pytest.skip("the kernels cannot be compiled here: no C++ compiler with OpenMP")
        yield
        cpu._library.cache_clear()


@pytest.fixture(params=["screened", "exact product"])
def product(request, library, monkeypatch):
    """Each way of making the encoder's product, whatever this CPU would choose."""
    screened = request.param == "screened"
    monkeypatch.setattr(cpu, "_worth_screening", lambda d_sae, k: screened)


@pytest.fixture
def unbuilt(monkeypatch, tmp_path):
    """As on a machine where nothing has been built yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    cpu._library.cache_clear()
    yield tmp_path / "groupsae"
    cpu._library.cache_clear()


def make_sae(d_model=24, d_sae=200, k=8, seed=0) -> SAE:
    return random_sae(d_model, d_sae, k, seed)


def make_batch(tokens=48, d_model=24, seed=1) -> Tensor:
    return random_batch(tokens, d_model, seed)


def assert_same(sae, x, dead=None, rtol=2e-4, atol=1e-5, auxk_weight=0.5) -> None:
    """Loss and gradients are those of dense autograd in float64, as near as float32 can be."""
    result = cpu.step(sae, x, dead=dead, auxk_weight=auxk_weight)
    expected = reference.step(sae.double(), x.double(), dead=dead, auxk_weight=auxk_weight)
    sae.float()
    for name in ("loss", "fvu", "auxk", "l0"):
        got = getattr(result, name)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), getattr(expected, name), rtol=rtol, atol=atol)
    assert torch.equal(result.fired, expected.fired)
    assert result.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        difference = (result.gradients[name].double() - gradient).norm()
        assert difference <= rtol * gradient.norm() + atol, f"{name}: {difference}"


def assert_top_k(latents: Latents, inputs: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> None:
    """The chosen are among the k largest, whatever ties there are, and their values are right."""
    exact = torch.relu(inputs.double() @ W_enc.double().T + b_enc.double())
    scale = inputs.double().norm(dim=1, keepdim=True) * W_enc.double().norm(dim=1).max() + 1e-30
    active = latents.values > 0
    chosen = exact.gather(1, latents.indices.long())
    assert ((latents.values.double() - chosen).abs() <= 1e-6 * scale)[active].all()
    expected = exact.topk(k, dim=1).values
    got = latents.values.double().sort(dim=1, descending=True).values
    assert ((got - expected).abs() <= 1e-6 * scale).all()
    for indices, is_active in zip(latents.indices, active, strict=True):
        assert len(indices[is_active].unique()) == int(is_active.sum())


# ---- loss and gradients -------------------------------------------------------------------------


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,  # a near tie that float32 rounds the other way would be found one day
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    tokens=st.integers(2, 60),
    d_model=st.integers(1, 40),
    d_sae=st.integers(1, 70),
    k=st.integers(1, 70),
    dead=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_same_as_dense_autograd(product, tokens, d_model, d_sae, k, dead, seed):
    sae = make_sae(d_model, d_sae, min(k, d_sae), seed)
    mask = torch.rand(d_sae, generator=torch.Generator().manual_seed(seed)) < dead
    assert_same(sae, make_batch(tokens, d_model, seed), mask)


@pytest.mark.parametrize("dead", [0, 1, 40, 600, 3000])
def test_same_as_dense_autograd_at_a_real_shape(product, dead):
    sae = make_sae(64, 3000, 16)
    mask = torch.zeros(3000, dtype=torch.bool)
    mask[torch.randperm(3000, generator=torch.Generator().manual_seed(3))[:dead]] = True
    assert_same(sae, make_batch(300, 64), mask)


@pytest.mark.parametrize("k", [1, 2, 199, 200])
def test_smallest_and_largest_k(product, k):
    assert_same(make_sae(k=k), make_batch())


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_smallest_batches(product, tokens):
    sae, x = make_sae(), make_batch(tokens)
    if tokens > 1:
        assert_same(sae, x)
    else:  # one token has no variance
        result, expected = cpu.step(sae, x), sparse.step(sae, x)
        torch.testing.assert_close(result.loss, expected.loss, equal_nan=True)


def test_no_token(product):
    sae, x = make_sae(), torch.empty(0, 24)
    assert cpu.step(sae, x).gradients["W_enc"].shape == sae.W_enc.shape


def test_one_latent_takes_every_token(product):
    sae, x = make_sae(k=2), make_batch(3000)
    with torch.no_grad():
        sae.b_enc[7] = 1e2
        sae.b_enc[9] = 5e1
    result = cpu.step(sae, x)
    assert result.fired[7]
    assert_same(sae, x)


def test_a_very_frequent_latent_among_rare_ones(product):
    sae, x = make_sae(k=8), make_batch(2500)
    with torch.no_grad():
        sae.b_enc[100:103] = 3e1
    assert_same(sae, x, torch.arange(200) % 3 == 0)


def test_no_latent_active(product):
    sae = make_sae()
    with torch.no_grad():
        sae.b_enc.fill_(-1e4)
    assert_same(sae, make_batch())


def test_all_latents_active(product):
    sae = make_sae(k=200)
    with torch.no_grad():
        sae.b_enc.fill_(1e2)
    assert_same(sae, make_batch())


def test_tokens_at_the_decoder_bias_and_equal_tokens(product):
    sae, x = make_sae(), make_batch()
    with torch.no_grad():
        x[:5] = sae.b_dec
        x[20:30] = x[20]
    assert_same(sae, x)


def test_ties_give_the_loss_of_any_choice(product):
    sae, x = make_sae(), make_batch()
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.b_enc, sae.W_dec):
            parameter[1::2] = parameter[::2]
    result, expected = cpu.step(sae, x), sparse.step(sae, x)
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(result.gradients["b_dec"], expected.gradients["b_dec"])


def test_input_that_is_not_contiguous(product):
    x = make_batch()
    for view in (x.T.contiguous().T, x.repeat(1, 2)[:, :24], x.repeat_interleave(2, 0)[::2]):
        assert not view.is_contiguous()
        for name, gradient in cpu.step(make_sae(), x).gradients.items():
            torch.testing.assert_close(cpu.step(make_sae(), view).gradients[name], gradient)


@pytest.mark.parametrize("broken", ["x", "W_enc", "b_enc", "W_dec", "b_dec"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_reaches_the_loss(product, broken, value):
    sae, x = make_sae(), make_batch()
    with torch.no_grad():
        (x if broken == "x" else sae.get_parameter(broken)).view(-1)[3] = value
    result, expected = cpu.step(sae, x), sparse.step(sae, x)
    assert torch.isfinite(result.loss) == torch.isfinite(expected.loss)


def test_other_dtypes_take_the_plain_path(library):
    sae, x = make_sae().double(), make_batch().double()
    result, expected = cpu.step(sae, x), reference.step(sae, x)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(result.gradients[name], gradient)


def test_equal_bits_every_time(product):
    sae, x = make_sae(64, 3000, 16), make_batch(700, 64)
    with torch.no_grad():
        sae.b_enc[5] = 1e2
    dead = torch.arange(3000) < 300
    first = cpu.step(sae, x, dead=dead)
    for _ in range(3):
        again = cpu.step(sae, x, dead=dead)
        assert torch.equal(first.loss, again.loss)
        assert all(
            torch.equal(first.gradients[name], again.gradients[name]) for name in again.gradients
        )


def test_a_token_is_encoded_the_same_wherever_it_stands(product):
    """Bit by bit and in the same order: which tokens a thread has searched before is chance."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(64, 64, generator=generator)
    W_enc = torch.randn(1024, 64, generator=generator) @ directions
    W_enc = torch.nn.functional.normalize(W_enc, dim=1)
    b_enc = 0.01 * torch.randn(1024, generator=generator)
    x = torch.randn(8192, 64, generator=generator) @ directions
    x *= torch.rand(8192, 1, generator=generator)
    expected = cpu.encode(x, W_enc, b_enc, 64)
    for _ in range(3):
        order = torch.randperm(8192, generator=generator)
        found = cpu.encode(x[order], W_enc, b_enc, 64)
        assert torch.equal(found.indices, expected.indices[order])
        assert torch.equal(found.values, expected.values[order])


def test_any_number_of_threads_gives_the_same_within_rounding(product):
    sae, x, threads = make_sae(64, 1000, 16), make_batch(700, 64), torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert_same(sae, x)
    finally:
        torch.set_num_threads(threads)


# ---- top k --------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 7, 64])
@pytest.mark.parametrize("d_sae", [64, 511, 513, 2100])
def test_top_k(product, d_sae, k):
    sae, x = make_sae(48, d_sae), make_batch(70, 48)
    assert_top_k(cpu.encode(x, sae.W_enc, sae.b_enc, k), x, sae.W_enc, sae.b_enc, k)


def test_top_k_of_whole_numbers_full_of_ties(product):
    generator = torch.Generator().manual_seed(0)
    W_enc = torch.randint(-1, 2, (900, 16), generator=generator).float()
    x = torch.randint(-2, 3, (50, 16), generator=generator).float()
    assert_top_k(cpu.encode(x, W_enc, torch.zeros(900), 20), x, W_enc, torch.zeros(900), 20)


@pytest.mark.parametrize("spread", [0.0, 1e-5, 1e-3, 1e-2, 0.1])
def test_top_k_of_latents_that_8_bits_cannot_tell_apart(product, spread):
    noise = make_sae(48, 1200).W_enc.detach()
    W_enc = torch.randn(1, 48, generator=torch.Generator().manual_seed(5)) + spread * noise
    x = make_batch(70, 48).abs()
    assert_top_k(cpu.encode(x, W_enc, torch.zeros(1200), 16), x, W_enc, torch.zeros(1200), 16)


@pytest.mark.parametrize("factor", [1e-30, 1e-22, 1e-18, 1e-10, 1e12])
def test_top_k_of_very_small_and_large_numbers(product, factor):
    W_enc, x = make_sae(48, 1200).W_enc.detach(), make_batch(30, 48) * factor
    b_enc = torch.zeros(1200)
    assert_top_k(cpu.encode(x, W_enc, b_enc, 16), x, W_enc, b_enc, 16)


def test_top_k_with_norms_and_biases_of_all_sizes(product):
    sae, x = make_sae(48, 1200), make_batch(60, 48)
    with torch.no_grad():
        sae.W_enc *= torch.logspace(-4, 3, 1200).unsqueeze(1)
        sae.b_enc *= torch.logspace(3, -4, 1200)
    assert_top_k(cpu.encode(x, sae.W_enc, sae.b_enc, 16), x, sae.W_enc, sae.b_enc, 16)


def test_top_k_with_biases_that_dwarf_all_scores(product):
    """What is chosen is right to the rounding of the sums with the biases, and their values."""
    sae, x = make_sae(48, 1200), make_batch(60, 48)
    W_enc, b_enc = 1e-5 * sae.W_enc.detach(), 1e4 + sae.b_enc.detach().round()
    latents = cpu.encode(x, W_enc, b_enc, 16)
    exact = x.double() @ W_enc.double().T + b_enc.double()
    chosen = exact.gather(1, latents.indices.long())
    assert ((latents.values.double() - chosen).abs() <= 1e-3).all()
    assert (chosen.amin(1) >= exact.topk(16).values.amin(1) - 2e-3).all()


@pytest.mark.parametrize("order", ["falling", "rising", "mixed"])
def test_top_k_where_tokens_reach_less_than_those_before(product, order):
    sae, x = make_sae(48, 1200), make_batch(200, 48)
    towards = torch.linspace(3, 0, 200).unsqueeze(1)
    x = (
        x
        + {"falling": towards, "rising": towards.flip(0), "mixed": 4 * towards.frac()}[order]
        * sae.W_enc.detach()[:1]
    )
    x[50], x[100] = 0, float("nan")
    finite = torch.arange(200) != 100
    latents = cpu.encode(x, sae.W_enc, sae.b_enc, 16)
    kept = Latents(latents.values[finite], latents.indices[finite])
    assert_top_k(kept, x[finite], sae.W_enc, sae.b_enc, 16)


def test_many_chunks_are_the_same_as_one(product, monkeypatch):
    sae, x = make_sae(), make_batch()
    whole = cpu.step(sae, x)
    monkeypatch.setattr(cpu, "_CHUNK_BYTES", 200 * 4 * 5)
    for name, gradient in cpu.step(sae, x).gradients.items():
        torch.testing.assert_close(gradient, whole.gradients[name])


def left_by_screening(x: Tensor, W_enc: Tensor, k: int) -> int:
    latents = Latents(x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int32))
    return len(cpu._encode_screened(x, W_enc, torch.zeros(len(W_enc)), latents))


def test_screening_resolves_ordinary_tokens_and_leaves_hopeless_ones(library):
    W_enc, x = make_sae(48, 2000).W_enc.detach(), make_batch(300, 48)
    assert left_by_screening(x, W_enc, 16) == 0
    towards = x * torch.sign(x @ W_enc[0]).unsqueeze(1)
    assert left_by_screening(towards, W_enc[:1] + 1e-4 * W_enc, 16) == 300
    x[10] = 0  # every latent ties
    assert left_by_screening(x, W_enc, 16) in (0, 1)


def test_a_wrong_product_is_not_used(library, monkeypatch):
    W_enc, x = make_sae(48, 2000).W_enc.detach(), make_batch(8, 48)
    assert left_by_screening(x, W_enc, 16) == 0
    product = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b, out: product(a, b, out=out).add_(1))
    assert left_by_screening(x, W_enc, 16) == 8


def test_a_product_of_one_column(product):
    assert_same(make_sae(1, 300, 5), make_batch(40, 1))


def test_screening_does_not_mind_a_column_that_outlies(library):
    W_enc, x = make_sae(64, 2000).W_enc.detach(), make_batch(100, 64)
    x[:, 3] += 60 * torch.sign(x[:, 3])
    assert left_by_screening(x, W_enc, 16) == 0
    b_enc = torch.zeros(2000)
    assert_top_k(cpu.encode(x, W_enc, b_enc, 16), x, W_enc, b_enc, 16)


@pytest.mark.parametrize("width", [1, 2, 8, 16, 33, 48, 64, 192, 768])
def test_rows_are_turned_and_rounded(library, width):
    """Dot products of rounded rows err by no more than their bounds, and not by much less."""
    rows = torch.randn(200, width, generator=torch.Generator().manual_seed(width))
    rows[0], rows[1] = 0, 1e-20 * rows[1]
    rows[2] *= 1e15
    rounded = cpu._Rounded.of(rows)
    values = rounded.rows.double() * rounded.scales.double().unsqueeze(1)
    wide = rows.double()
    products, exact = values @ values.T, wide @ wide.T
    norms, errors = rounded.norms.double(), rounded.errors.double()
    bound = torch.outer(errors, norms) + torch.outer(norms + errors, errors)
    assert ((products - exact).abs() <= bound).all()
    torch.testing.assert_close(norms[2:], wide[2:].norm(dim=1), rtol=1e-5, atol=0.0)
    assert (errors[3:] <= 0.02 * norms[3:]).all()
    assert (rounded.rows.abs().amax(1)[2:] == 127).all()


# ---- the update ---------------------------------------------------------------------------------


def adam_of(sae: SAE) -> torch.optim.Adam:
    return torch.optim.Adam(sae.parameters(), lr=3e-3, betas=(0.8, 0.95), eps=1e-7, fused=True)


def plain_update(sae: SAE, gradients, adam, gradient_clip) -> Tensor:
    """What training does without a kernel."""
    for name, parameter in sae.named_parameters():
        parameter.grad = gradients[name].clone()
    norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), gradient_clip)
    remove_parallel_component(sae)
    adam.step()
    normalize_decoder(sae)
    return norm


@pytest.mark.parametrize("gradient_clip", [0.05, 1e6])
def test_update_is_clip_projection_adam_and_renormalisation(library, gradient_clip):
    sae, exact = make_sae(33), make_sae(33).double()
    adam, exact_adam = adam_of(sae), adam_of(exact)
    for seed in range(5):
        gradients = cpu.step(sae, make_batch(d_model=33, seed=seed)).gradients
        kept = {name: gradient.clone() for name, gradient in gradients.items()}
        norm = cpu.update(sae, gradients, adam, gradient_clip=gradient_clip)
        doubles = {name: gradient.double() for name, gradient in gradients.items()}
        expected = plain_update(exact, doubles, exact_adam, gradient_clip)
        torch.testing.assert_close(norm.double(), expected, rtol=1e-5, atol=1e-7)
        assert all(torch.equal(kept[name], gradient) for name, gradient in gradients.items())
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(200))
    for (name, weights), other in zip(sae.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(weights.double(), other, rtol=1e-5, atol=2e-6, msg=name)
        for key, value in exact_adam.state[other].items():
            got = adam.state[weights][key]
            torch.testing.assert_close(got.double(), value.double(), rtol=1e-4, atol=1e-7)


def test_an_adam_that_the_kernel_moved_goes_on_by_itself(library):
    sae, twin = make_sae(), make_sae()
    adam, twin_adam = adam_of(sae), adam_of(twin)
    gradients = [sparse.step(sae, make_batch(seed=seed)).gradients for seed in range(2)]
    for gradient in gradients:
        plain_update(twin, gradient, twin_adam, 1.0)
    cpu.update(sae, gradients[0], adam, gradient_clip=1.0)
    plain_update(sae, gradients[1], adam, 1.0)
    for got, expected in zip(sae.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_decoder_row_of_zeros_stays_finite(library):
    sae = make_sae()
    with torch.no_grad():
        sae.W_dec[3] = 0
    gradients = {name: torch.zeros_like(weights) for name, weights in sae.named_parameters()}
    cpu.update(sae, gradients, adam_of(sae), gradient_clip=1.0)
    assert torch.isfinite(sae.W_dec).all()


def test_what_fits(library):
    assert cpu.fits(make_sae())
    assert not cpu.fits(make_sae().double())
    assert not cpu.fits(make_sae().to("meta"))


# ---- the build ----------------------------------------------------------------------------------


def assert_falls_back(caplog, *words: str) -> None:
    """Unavailable, one log line that says why, and the step is the plain one."""
    sae, x = make_sae(), make_batch()
    with caplog.at_level(logging.INFO, logger="groupsae"):
        assert not cpu.available()
        result = cpu.step(sae, x)
    assert len(caplog.records) == 1
    assert all(word in caplog.text for word in words), caplog.text
    for name, gradient in sparse.step(sae, x).gradients.items():
        assert torch.equal(result.gradients[name], gradient)


def test_without_a_compiler(unbuilt, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert_falls_back(caplog, "no C++ compiler 'c++'", "CXX")


def test_with_a_compiler_that_fails(unbuilt, monkeypatch, caplog):
    monkeypatch.setenv("CXX", f"{sys.executable} -c 'raise SystemExit(\"no such option\")'")
    assert_falls_back(caplog, "failed: no such option")
    assert list(unbuilt.iterdir()) == []


def test_a_cache_folder_that_others_can_write_is_not_trusted(unbuilt, caplog):
    unbuilt.mkdir()
    unbuilt.chmod(0o777)
    assert_falls_back(caplog, "others than you can write", "chmod 700")


def test_a_cache_folder_that_cannot_be_made(unbuilt, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert_falls_back(caplog, "file")


@NEEDS_COMPILER
def test_what_is_built_needs_no_compiler_any_more(unbuilt, monkeypatch, tmp_path):
    assert cpu.available()
    cpu._library.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert cpu.available()


@NEEDS_COMPILER
def test_two_processes_may_build_at_once(unbuilt):
    code = "from groupsae.sae.kernels import cpu; raise SystemExit(not cpu.available())"
    environment = {**os.environ, "PYTHONPATH": str(Path(cpu.__file__).parents[3])}
    builds = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [build.wait(timeout=120) for build in builds] == [0, 0]
    assert [path.suffix for path in unbuilt.iterdir()] == [".so"]
