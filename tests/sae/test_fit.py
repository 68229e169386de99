"""What a new SAE takes from its first batch."""

from __future__ import annotations

import pytest
import torch

from groupsae.config import Config
from groupsae.sae import SAE, SAEConfig
from groupsae.training.session import new_learner
from tests.sae.kernels.cases import random_batch, random_members

LAYERS = (0, 1, 2)


def new_sae(d_sae: int = 256, **options: object) -> SAE:
    config = SAEConfig(d_model=16, d_sae=d_sae, layers=LAYERS, **options)
    return SAE(config, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def error(sae: SAE, x: torch.Tensor) -> float:
    x_hat = sae.decode_normalized(sae.encode_normalized(x, 0), 0)
    return float((x - x_hat).square().sum())


@pytest.mark.parametrize(
    "options",
    [
        {"architecture": "topk", "k": 8},
        {"architecture": "topk", "k": 8, "learned_affine": "gain"},
    ],
)
def test_no_other_size_of_the_encoder_reconstructs_better(options):
    sae, x = new_sae(**options), random_batch(200, 16)
    before, directions = error(sae, x), sae.W_enc.detach().clone()
    sae.fit_encoder(x, torch.zeros(200, dtype=torch.long))
    fitted, weights = error(sae, x), sae.W_enc.detach().clone()
    assert fitted < 0.8 * before
    torch.testing.assert_close(
        torch.nn.functional.normalize(weights), torch.nn.functional.normalize(directions)
    )
    for factor in (0.9, 0.99, 1.01, 1.1):
        with torch.no_grad():
            sae.W_enc.copy_(factor * weights)
        assert error(sae, x) > fitted


@pytest.mark.parametrize("architecture", ["relu", "gated"])
def test_under_an_l1_penalty_rows_start_short(architecture):
    sae = new_sae(architecture=architecture)
    directions = sae.W_dec.detach().clone()
    sae.fit_encoder(random_batch(30, 16))
    torch.testing.assert_close(sae.W_enc.detach(), 0.05 * directions)


def test_activations_that_are_all_zero_change_nothing():
    sae = new_sae(architecture="topk", k=8)
    before = sae.W_enc.detach().clone()
    sae.fit_encoder(torch.zeros(10, 16))
    assert torch.equal(sae.W_enc, before)


@pytest.mark.parametrize("by_layer", [False, True])
def test_fitted_thresholds_leave_the_target_active(by_layer):
    sae = new_sae(
        architecture="jumprelu",
        target_l0=12.0,
        bandwidth=0.001,
        initial_threshold=0.001,
        per_layer_threshold=by_layer,
    )
    members = random_members(240)
    x = random_batch(240, 16) * (1 + members.unsqueeze(1))  # the layers differ
    sae.fit_encoder(x, members)
    sae.fit_thresholds(x, members)
    l0 = sae.encode_normalized(x, members).l0()
    for part in [members == layer for layer in range(3)] if by_layer else [members >= 0]:
        # the entry at the cut itself is not above it
        assert float(l0[part].sum()) == pytest.approx(12 * int(part.sum()), abs=2)


def test_a_layer_without_a_row_keeps_its_thresholds():
    sae = new_sae(
        architecture="jumprelu",
        target_l0=12.0,
        bandwidth=0.001,
        initial_threshold=0.001,
        per_layer_threshold=True,
    )
    sae.fit_thresholds(random_batch(30, 16), torch.zeros(30, dtype=torch.long))
    thresholds = sae.log_threshold.exp()
    assert bool((thresholds[0] > 0.01).all())
    torch.testing.assert_close(thresholds[1:], torch.full((2, 256), 0.001))


@pytest.mark.parametrize(
    ("overrides", "fresh", "fits"),
    [([], True, True), ([], False, False), (["sae.encoder_norm=0.5"], True, False)],
)
def test_only_a_fresh_sae_that_was_not_told_its_norm_is_fitted(overrides, fresh, fits):
    config = Config.load(None, ["sae.k=8", "training.learning_rate=1e-12", *overrides])
    sae, x = new_sae(architecture="topk", k=8), random_batch(64, 16)
    before = sae.W_enc.detach().clone()
    learner = new_learner(sae, config, fresh=fresh)
    learner.step(x)
    changed = not torch.allclose(sae.W_enc, before, rtol=1e-3)
    assert changed == fits
    after = sae.W_enc.detach().clone()
    learner.step(random_batch(64, 16, seed=2))  # the first batch alone decides
    torch.testing.assert_close(sae.W_enc, after)
