from __future__ import annotations

import pytest
import torch
from torch import Tensor

from groupsae.sae import SAE, SAEConfig
from groupsae.sae.kernels import reference


def make_sae(d_model=6, d_sae=24, k=3) -> SAE:
    torch.manual_seed(0)
    sae = SAE(SAEConfig(d_model=d_model, d_sae=d_sae, k=k, layers=(0,))).double()
    with torch.no_grad():
        sae.W_enc.normal_()
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_(std=0.1)
    return sae


def straightforward_loss(sae: SAE, x: Tensor, dead: Tensor | None, weight: float) -> Tensor:
    """The definition, token by token, without the code under test."""
    error = variance = auxk = x.new_zeros(())
    for row in x:
        pre = torch.relu(sae.W_enc @ (row - sae.b_dec) + sae.b_enc)
        z = torch.zeros_like(pre)
        chosen = pre.argsort(descending=True)[: sae.config.k]
        z = z.index_put((chosen,), pre[chosen])
        residual = row - (sae.W_dec.T @ z + sae.b_dec)
        error = error + residual.square().sum()
        variance = variance + (row - x.mean(0)).square().sum()
        if dead is not None and dead.any():
            k_aux = sae.config.d_model // 2
            candidates = dead.nonzero().squeeze(1)
            chosen = candidates[pre[candidates].argsort(descending=True)[:k_aux]]
            z = torch.zeros_like(pre).index_put((chosen,), pre[chosen])
            share = min(len(candidates) / k_aux, 1)
            auxk = auxk + share * (residual.detach() - sae.W_dec.T @ z).square().sum()
    return error / variance + weight * auxk / variance


@pytest.mark.parametrize("n_dead", [0, 1, 2, 3, 10, 24])
def test_loss_and_gradients_are_those_of_the_definition(n_dead):
    sae = make_sae()
    x = torch.randn(16, 6, dtype=torch.float64)
    dead = torch.zeros(24, dtype=torch.bool)
    dead[torch.randperm(24)[:n_dead]] = True
    result = reference.step(sae, x, dead=dead, auxk_weight=1 / 32)
    expected = straightforward_loss(sae, x, dead, 1 / 32)
    torch.testing.assert_close(result.loss, expected.detach())
    gradients = torch.autograd.grad(expected, list(sae.parameters()))
    for (name, _), gradient in zip(sae.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(result.gradients[name], gradient, msg=name)


def test_the_auxiliary_loss_moves_the_encoder_of_dead_latents():
    sae = make_sae()
    with torch.no_grad():
        sae.b_enc[5] = 0.5
    x = torch.randn(64, 6, dtype=torch.float64)
    dead = torch.zeros(24, dtype=torch.bool)
    dead[5] = True
    with_aux = reference.step(sae, x, dead=dead).gradients["W_enc"][5]
    without = reference.step(sae, x).gradients["W_enc"][5]
    assert (with_aux - without).norm() > 1e-6


def test_fvu_is_one_for_the_batch_mean_and_zero_for_a_perfect_reconstruction():
    x = torch.randn(32, 6, dtype=torch.float64)
    sae = make_sae()
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
        sae.b_dec.copy_(x.mean(0))
    torch.testing.assert_close(reference.step(sae, x).fvu.item(), 1.0)

    perfect = SAE(SAEConfig(d_model=6, d_sae=12, k=6, layers=(0,))).double()
    with torch.no_grad():
        perfect.W_enc.copy_(torch.cat([torch.eye(6), -torch.eye(6)]))
        perfect.W_dec.copy_(perfect.W_enc)
    assert reference.step(perfect, x).fvu.item() < 1e-20


def test_what_fired_and_how_much():
    sae = make_sae()
    x = torch.randn(32, 6, dtype=torch.float64)
    result = reference.step(sae, x)
    z = sae.encode_normalized(x).dense(24)
    assert torch.equal(result.fired, (z > 0).any(0))
    assert result.l0.item() == pytest.approx((z > 0).sum(1).double().mean().item())
