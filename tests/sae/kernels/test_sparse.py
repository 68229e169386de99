from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsae.sae import SAE
from groupsae.sae.kernels import reference, selection, sparse
from tests.sae.kernels.cases import random_batch, random_sae


def make_sae(d_model=6, d_sae=24, k=3, seed=0, dtype=torch.float64) -> SAE:
    return random_sae(d_model, d_sae, k, seed).to(dtype)


def make_batch(tokens=32, d_model=6, seed=1, dtype=torch.float64):
    return random_batch(tokens, d_model, seed, dtype)


def assert_same(sae, x, dead=None, rtol=1e-9, atol=1e-11, auxk_weight=0.5):
    expected = reference.step(sae, x, dead=dead, auxk_weight=auxk_weight)
    result = sparse.step(sae, x, dead=dead, auxk_weight=auxk_weight)
    for name in ("loss", "fvu", "auxk", "l0"):
        torch.testing.assert_close(
            getattr(result, name), getattr(expected, name), rtol=rtol, atol=atol, msg=name
        )
    assert torch.equal(result.fired, expected.fired)
    assert result.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(
            result.gradients[name],
            gradient,
            rtol=rtol,
            atol=atol,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(2, 40),
    d_model=st.integers(1, 9),
    d_sae=st.integers(1, 40),
    k=st.integers(1, 40),
    dead=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_same_as_dense_autograd_in_float64(tokens, d_model, d_sae, k, dead, seed):
    sae = make_sae(d_model, d_sae, min(k, d_sae), seed)
    mask = torch.rand(d_sae, generator=torch.Generator().manual_seed(seed)) < dead
    assert_same(sae, make_batch(tokens, d_model, seed), mask)


@pytest.mark.parametrize("few", [0, 10**9])
@pytest.mark.parametrize("dead", [1, 40, 300])
def test_both_ways_to_the_auxiliary_loss_are_that_of_dense_autograd(monkeypatch, few, dead):
    monkeypatch.setattr(sparse, "FEW", few)
    monkeypatch.setattr(selection, "_CHUNK_BYTES", 8 * 1000)  # several chunks
    sae = random_sae(24, 400, 8).double()
    mask = torch.zeros(400, dtype=torch.bool)
    mask[torch.randperm(400, generator=torch.Generator().manual_seed(3))[:dead]] = True
    assert_same(sae, random_batch(96, 24, dtype=torch.float64), mask)


@pytest.mark.parametrize("dead", [0, 5, 300])
def test_same_as_dense_autograd_in_float32(dead):
    sae = make_sae(32, 512, 16, dtype=torch.float32)
    mask = torch.zeros(512, dtype=torch.bool)
    mask[:dead] = True
    x = make_batch(256, 32, dtype=torch.float32)
    assert_same(sae, x, mask, rtol=1e-4, atol=1e-6)


def test_many_chunks_are_the_same_as_one(monkeypatch):
    sae, x = make_sae(), make_batch()
    whole = sparse.step(sae, x)
    monkeypatch.setattr(selection, "_CHUNK_BYTES", 24 * 8 * 5)
    parts = sparse.step(sae, x)
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(parts.gradients[name], gradient)


def test_no_latent_active():
    sae = make_sae()
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    assert_same(sae, make_batch())


def test_one_latent_takes_every_token():
    sae = make_sae(k=1)
    with torch.no_grad():
        sae.b_enc[7] = 1e3
    assert_same(sae, make_batch())


def test_all_latents_active():
    sae = make_sae(k=24)
    with torch.no_grad():
        sae.b_enc.fill_(1e3)
    assert_same(sae, make_batch())


def test_equal_rows_of_tokens():
    x = make_batch()
    x[5:20] = x[5]
    assert_same(make_sae(), x)


def test_ties_give_the_loss_of_any_choice():
    sae = make_sae()
    with torch.no_grad():
        sae.W_enc[1::2] = sae.W_enc[::2]
        sae.b_enc[1::2] = sae.b_enc[::2]
        sae.W_dec[1::2] = sae.W_dec[::2]
    x = make_batch()
    expected = reference.step(sae, x)
    result = sparse.step(sae, x)
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(result.gradients["b_dec"], expected.gradients["b_dec"])


def test_a_transposed_batch_is_read_as_it_is_meant():
    x = make_batch().T.contiguous().T
    assert not x.is_contiguous()
    assert_same(make_sae(), x)
