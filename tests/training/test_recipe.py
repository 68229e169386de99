"""What a step is made with: the schedules and every architecture's published settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from groupsae.architectures import ARCHITECTURES, BY_COUNT, BY_PENALTY
from groupsae.config import Config, TrainingConfig
from groupsae.sae import SAE, SAEConfig
from groupsae.training.learner import Learner
from groupsae.training.recipe import Recipe


def shape(architecture: str = "topk", d_sae: int = 32, **keys: Any) -> SAEConfig:
    if architecture in BY_COUNT:
        keys["k"] = 4
    if architecture == "matryoshka":
        keys["prefixes"] = (8, d_sae)
    if architecture == "jumprelu":
        keys = {"bandwidth": 0.001, "initial_threshold": 0.001, "target_l0": 4} | keys
    return SAEConfig(d_model=8, d_sae=d_sae, layers=(0,), architecture=architecture, **keys)


def training(steps: int = 100, **changes: Any) -> TrainingConfig:
    return TrainingConfig(tokens=10 * steps, batch_tokens=10, buffer_tokens=10, **changes)


def recipe(architecture: str = "topk", steps: int = 100, **changes: Any) -> Recipe:
    return Recipe.of(training(steps, **changes), shape(architecture))


@pytest.mark.parametrize(
    ("step", "factor"),
    [(1, 0.1), (5, 0.5), (10, 1), (50, 1), (80, 1), (81, 1), (91, 0.5), (99, 0.1), (100, 0.05)],
)
def test_the_rate_rises_stays_and_falls(step, factor):
    """Over 10 steps and over the last 20 of 100, one part of it with each step."""
    assert recipe(warmup=0.1, decay=0.2).rate_factor(step) == pytest.approx(factor)


@pytest.mark.parametrize(("step", "weight"), [(1, 0.075), (20, 1.5), (40, 3), (41, 3), (100, 3)])
def test_the_sparsity_weight_rises_and_stays(step, weight):
    found = recipe("relu", sparsity_weight=3, sparsity_warmup=0.4).sparsity_weight_at(step)
    assert found == pytest.approx(weight)


def test_without_warm_ups_all_is_at_its_height_from_the_first_step_to_the_last():
    flat = recipe("relu", warmup=0, decay=0, sparsity_warmup=0, sparsity_weight=3)
    assert {flat.rate_factor(step) for step in (1, 50, 100)} == {1.0}
    assert {flat.sparsity_weight_at(step) for step in (1, 50, 100)} == {3.0}


@given(st.integers(1, 500), st.floats(0, 1, allow_nan=False), st.floats(0, 1, allow_nan=False))
def test_the_rate_never_vanishes_exceeds_its_height_or_rises_again(steps, warmup, decay):
    found = recipe(steps=steps, warmup=warmup, decay=decay)
    factors = [found.rate_factor(step) for step in range(1, steps + 1)]
    assert all(0 < factor <= 1 for factor in factors)
    top = factors.index(max(factors))
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_s_defaults(architecture):
    """Gao et al. 2024: AuxK 1/32, a constant rate. Rajamanoharan et al. 2024: betas of 0, 0.999.

    Group-SAE v1: 5% of warm-up, 20% of decay.
    """
    found = recipe(architecture)
    penalised = architecture in BY_PENALTY
    assert (found.warmup, found.decay) == ((5, 20) if penalised else (0, 0))
    assert found.auxk_weight == (0 if penalised else 1 / 32)
    weights = {"jumprelu": 1.0, "relu": 0.05, "gated": 0.05}
    assert found.sparsity_weight == weights.get(architecture, 0)
    if penalised:
        assert found.sparsity_warmup == 5
    assert found.adam_betas == ((0, 0.999) if architecture == "jumprelu" else (0.9, 0.999))
    assert (found.adam_epsilon, found.gradient_clip) == (1e-8, 1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_the_config_says_is_taken_for_every_architecture(architecture):
    said = {
        **{"learning_rate": 0.1, "threshold_learning_rate": 0.2, "adam_betas": (0.5, 0.6)},
        **{"adam_epsilon": 1e-4, "gradient_clip": 7.0, "auxk_weight": 0.0, "sparsity_weight": 8.0},
    }
    found = recipe(architecture, warmup=0.0, decay=0.5, sparsity_warmup=0.25, **said)
    assert {name: getattr(found, name) for name in said} == said
    assert (found.warmup, found.decay, found.sparsity_warmup) == (0, 50, 25)


@pytest.mark.parametrize(
    ("d_sae", "rate"), [(2**14, 2e-4), (2**16, 1e-4), (2**12, 4e-4), (12288, 2.3094011e-4)]
)
def test_the_learning_rate_falls_with_the_root_of_the_width(d_sae, rate):
    """2e-4 / sqrt(d_sae / 2^14): Gao et al. 2024, as in Group-SAE v2; 12,288 = 16 x 768."""
    assert Recipe.of(training(), shape(d_sae=d_sae)).learning_rate == pytest.approx(rate)


@pytest.mark.parametrize(("steps", "rate"), [(100, 0.04), (400, 0.01)])
def test_a_threshold_can_move_by_a_factor_of_fifty_within_a_run(steps, rate):
    """Adam moves a parameter by at most about its rate each step: 4 in the logarithm."""
    assert recipe("jumprelu", steps).threshold_learning_rate == pytest.approx(rate)


def test_in_the_longest_runs_thresholds_do_not_move_slower_than_weights():
    found = recipe("jumprelu", 10**9)
    assert found.threshold_learning_rate == found.learning_rate


def test_presets_give_the_published_recipes():
    topk = Config.load(None, ["preset=group-sae-v2"])
    v2 = Recipe.of(topk.training, shape(d_sae=2**14))
    assert v2.steps == 10**9 // 131_072
    assert (v2.learning_rate, v2.adam_betas, v2.adam_epsilon) == (2e-4, (0.9, 0.999), 1e-8)
    assert (v2.auxk_weight, v2.gradient_clip, v2.warmup, v2.decay) == (1 / 32, 1, 0, 0)
    jumprelu = Config.load(None, ["preset=group-sae-v1"])
    v1 = Recipe.of(jumprelu.training, shape("jumprelu"))
    assert (v1.learning_rate, v1.adam_betas, v1.sparsity_weight) == (3e-5, (0, 0.999), 1)
    assert v1.steps == 10**9 // 4096
    assert (v1.warmup, v1.decay) == (round(0.05 * v1.steps), round(0.2 * v1.steps))


def new_learner(sae: SAEConfig, **changes: Any) -> Learner:
    new = SAE(sae, generator=torch.Generator().manual_seed(0))
    return Learner(new, training(10, kernel="torch", **changes))


def batches(n: int) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    return [torch.randn(10, 8, generator=draws) for _ in range(n)]


def test_the_metrics_tell_the_rate_of_the_step():
    learner = new_learner(shape(), learning_rate=0.01, warmup=0.4, decay=0.5)
    rates = []
    for x in batches(10):
        learner.step(x)
        rates.append(learner.metrics()["lr"])
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert rates == pytest.approx([0.01 * factor for factor in expected])


def test_thresholds_move_at_their_own_rate_and_the_rest_at_theirs():
    """Adam's first step is its rate times the gradient's sign."""
    rates = {"learning_rate": 1e-4, "threshold_learning_rate": 0.02}
    wide = shape("jumprelu", initial_threshold=0.5, bandwidth=1.0)  # some are inside the rectangle
    learner = new_learner(wide, warmup=0, decay=0, **rates)
    before = {name: p.detach().clone() for name, p in learner.sae.named_parameters()}
    learner.step(batches(1)[0])
    after = dict(learner.sae.named_parameters())
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert moved["log_threshold"] == pytest.approx(0.02, rel=1e-3)
    assert moved["W_enc"] == pytest.approx(1e-4, rel=1e-2)
    assert moved["b_enc"] == pytest.approx(1e-4, rel=1e-2)


def test_a_penalty_enters_the_loss_with_the_step_s_weight():
    learner = new_learner(shape("relu"), sparsity_weight=2.0, sparsity_warmup=0.4)
    for x, weight in zip(batches(6), [0.5, 1, 1.5, 2, 2, 2], strict=True):
        learner.step(x)
        found = learner.metrics()
        assert found["loss"] == pytest.approx(found["fvu"] + weight * found["penalty"], rel=1e-5)


def test_auxk_enters_the_loss_with_its_weight():
    learner = new_learner(shape(), auxk_weight=0.25, dead_after_tokens=10, learning_rate=1e-9)
    with torch.no_grad():
        learner.sae.b_enc[:16] = -100.0  # silent
    for x in batches(2):
        learner.step(x)
    learner.metrics()
    learner.step(batches(3)[2])
    found = learner.metrics()
    assert found["auxk"] > 0
    assert found["loss"] == pytest.approx(found["fvu"] + 0.25 * found["auxk"], rel=1e-5)
