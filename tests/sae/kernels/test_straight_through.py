"""The gradient of JumpReLU's thresholds: its definition, and what it estimates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from groupsae.sae import SAE, SAEConfig
from groupsae.sae.kernels import reference
from tests.sae.kernels.cases import AFFINES, RULES, random_batch, random_members, sae_with

SPARSITY = 0.3  # a weight that is no default
TOKENS, D_MODEL, D_SAE = 24, 12, 120


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.startswith("jumprelu")])
def test_thresholds_have_the_sums_of_the_estimators(rule, affine):
    """Rajamanoharan et al. 2024b (arXiv 2407.14435), equations 11 and 12, entry by entry."""
    sae = sae_with(rule, affine).double()
    x = random_batch(TOKENS, D_MODEL, dtype=torch.float64)
    members = random_members(TOKENS)
    result = reference.step(sae, x, members=members, sparsity_weight=SPARSITY)
    with torch.no_grad():
        expected = straight_through(sae, x, members)
    assert (expected != 0).sum() > 10
    torch.testing.assert_close(result.gradients["log_threshold"], expected)


def straight_through(sae: SAE, x: Tensor, members: Tensor) -> Tensor:
    """Of each latent's log threshold: theta times the estimate of the threshold's gradient."""
    config, width = sae.config, sae.config.bandwidth
    rows = [int(m) if config.per_layer_threshold else 0 for m in members]
    pre = torch.stack([pre_activations(sae, x[t], members[t]) for t in range(len(x))])
    theta = torch.stack([sae.log_threshold[row].exp() for row in rows])
    active = pre > theta
    z = pre * active
    variance = (x - x.mean(0)).square().sum()
    gradient = torch.zeros_like(sae.log_threshold)
    for t in range(len(x)):
        output, gain = sae.W_dec.T @ z[t] + sae.b_dec, torch.ones_like(x[t])
        if config.learned_affine == "gain":
            gain = sae.gain_out[members[t]]
        at_z = sae.W_dec @ (gain * (gain * output - x[t])) * 2 / variance
        per_active = 1 / len(x)
        if config.target_l0 is not None:
            same = [s for s in range(len(x)) if rows[s] == rows[t]]
            mean_l0 = float(active[same].sum()) / len(same)
            slope = 2 * (mean_l0 / config.target_l0 - 1) / config.target_l0
            per_active = slope / len(same) / len(set(rows))
        for i in range(D_SAE):
            if abs(float(pre[t, i] - theta[t, i])) / width < 1 / 2:
                jump = -theta[t, i] / width * at_z[i]  # equation 11
                step = -1 / width * SPARSITY * per_active  # equation 12
                gradient[rows[t], i] += theta[t, i] * (jump + step)
    return gradient


def pre_activations(sae: SAE, row: Tensor, member: Tensor) -> Tensor:
    if sae.config.learned_affine == "gain":
        row = sae.gain_in[member] * row
    pre = sae.W_enc @ (row - sae.b_dec) + sae.b_enc
    return pre + sae.latent_bias[member] if sae.config.learned_affine == "bias" else pre


@torch.no_grad()
def test_the_estimators_are_the_gradient_of_the_expected_loss():
    """Over many tokens they agree with finite differences of the mean loss.

    No token's loss has a gradient where a pre-activation crosses its threshold, but the expected
    loss has, and the estimators are its kernel density estimate (the same paper, section 4). The
    differences are taken over another width than the kernel's.
    """
    d_sae, width = 6, 0.15
    config = SAEConfig(
        **{"d_model": 4, "d_sae": d_sae, "layers": (0,), "architecture": "jumprelu"},
        **{"bandwidth": 0.1, "initial_threshold": 0.6},
    )
    sae = SAE(config, generator=torch.Generator().manual_seed(0)).double()
    sae.log_threshold += torch.linspace(-0.3, 0.3, d_sae)
    x = random_batch(200_000, 4, dtype=torch.float64)

    def parts(result: reference.StepResult) -> Tensor:
        return torch.stack([result.fvu, result.penalty])

    of_fvu = reference.step(sae, x).gradients["log_threshold"][0]
    with_penalty = reference.step(sae, x, sparsity_weight=1.0).gradients["log_threshold"][0]
    estimates = torch.stack([of_fvu, with_penalty - of_fvu])
    differences = torch.zeros(2, d_sae, dtype=torch.float64)
    for i in range(d_sae):
        start = sae.log_threshold[0, i].clone()
        for sign in (1, -1):
            sae.log_threshold[0, i] = (start.exp() + sign * width / 2).log()
            differences[:, i] += sign * parts(reference.step(sae, x)) / width * start.exp()
        sae.log_threshold[0, i] = start
    for estimate, difference in zip(estimates, differences, strict=True):
        assert (estimate - difference).abs().max() < 0.04 * difference.abs().max()
