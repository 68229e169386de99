"""Training under every sparsity rule, and the traps that it has in other libraries."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from groupsae.config import TrainingConfig
from groupsae.sae import SAE, SAEConfig
from groupsae.training.learner import Learner

D_MODEL, D_SAE, K, BATCH = 16, 48, 3, 256
_JUMPRELU = {"architecture": "jumprelu", "bandwidth": 0.2, "initial_threshold": 0.2}

# All that matters is said, so that a change of the defaults changes nothing here.
RULES: dict[str, dict[str, Any]] = {
    "topk": {"architecture": "topk", "k": K},
    "batchtopk": {"architecture": "batchtopk", "k": K},
    "batchtopk by layer": {"architecture": "batchtopk", "k": K, "per_layer_threshold": True},
    "matryoshka": {"architecture": "matryoshka", "k": K, "prefixes": (8, 24, D_SAE)},
    "jumprelu": _JUMPRELU,
    "jumprelu with target": {**_JUMPRELU, "target_l0": 3.0},
    "jumprelu by layer": {**_JUMPRELU, "target_l0": 3.0, "per_layer_threshold": True},
    "relu": {"architecture": "relu"},
    "gated": {"architecture": "gated"},
}
SPARSITY_WEIGHTS = {"jumprelu": 0.003, "relu": 0.02, "gated": 0.02}
BY_BATCH = ["batchtopk", "batchtopk by layer", "matryoshka"]
JUMPRELU = [rule for rule in RULES if rule.startswith("jumprelu")]

every_rule = pytest.mark.parametrize("rule", RULES)
every_affine = pytest.mark.parametrize("affine", ["none", "bias", "gain"])


def learner_of(
    rule: str, affine: str = "none", *, steps: int = 60, seed: int = 0, **changes: Any
) -> Learner:
    config = SAEConfig(
        d_model=D_MODEL, d_sae=D_SAE, layers=(0, 1), learned_affine=affine, **RULES[rule]
    )
    settings = {
        "tokens": steps * BATCH,
        "batch_tokens": BATCH,
        "buffer_tokens": BATCH,
        "learning_rate": 1e-2,
        "sparsity_weight": SPARSITY_WEIGHTS.get(rule),
    }
    if rule.startswith("jumprelu"):
        settings["threshold_learning_rate"] = 0.03
        settings["sparsity_weight"] = SPARSITY_WEIGHTS.get(rule, 0.3)  # the latter of a target
    sae = SAE(config, generator=torch.Generator().manual_seed(seed))
    return Learner(sae, TrainingConfig(**(settings | changes)))


class Planted:
    """Tokens of two layers with the same 24 features, 2 a token; the second layer's are longer."""

    def __init__(self, seed: int = 1) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.truth = F.normalize(torch.randn(24, D_MODEL, generator=self.generator), dim=1)

    def draw(self, tokens: int = BATCH) -> tuple[Tensor, Tensor]:
        chosen = torch.rand(tokens, 24, generator=self.generator).topk(2).indices
        sizes = 0.5 + torch.rand(tokens, 2, generator=self.generator)
        members = torch.randint(2, (tokens,), generator=self.generator)
        x = torch.zeros(tokens, 24).scatter(1, chosen, sizes) @ self.truth
        noise = torch.randn(tokens, D_MODEL, generator=self.generator)
        return (x + 0.02 * noise) * (1 + 0.5 * members.unsqueeze(1)), members


@every_affine
@every_rule
def test_the_error_falls_and_decoder_rows_keep_unit_norm(rule, affine):
    """L1 does not shrink the decoder away, nor does anything else."""
    learner, data = learner_of(rule, affine), Planted()
    errors = []
    for _ in range(60):
        errors.append(float(learner.step(*data.draw()).fvu))
        torch.testing.assert_close(learner.sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert sum(errors[-5:]) < 0.6 * sum(errors[:5])
    metrics = learner.metrics()
    means = {"loss", "fvu", "auxk", "penalty", "l0", "gradient_norm"}
    assert means | {"dead", "lr", "dropped"} == set(metrics)
    assert all(value == value for value in metrics.values())
    for name, parameter in learner.sae.named_parameters():
        assert parameter.isfinite().all()
        assert parameter.dtype == torch.float32, name
    moved = {"bias": ["latent_bias"], "gain": ["gain_in", "gain_out"], "none": []}[affine]
    for name in moved:
        vectors = dict(learner.sae.named_parameters())[name]
        assert not torch.equal(vectors[0], vectors[1]), "each layer learns its own"


@pytest.mark.parametrize("rule", ["jumprelu", "jumprelu with target", "relu", "gated"])
def test_metrics_have_the_mean_penalty_before_its_weight(rule):
    learner, data = learner_of(rule, sparsity_warmup=0.5, steps=10), Planted()
    results = [learner.step(*data.draw()) for _ in range(10)]
    metrics = learner.metrics()
    assert metrics["penalty"] == pytest.approx(sum(float(r.penalty) for r in results) / 10)
    assert metrics["penalty"] > 0
    weight = learner.config.sparsity_weight
    for t, result in enumerate(results, start=1):
        alone = float(result.loss) - min(t / 5, 1) * weight * float(result.penalty)
        if rule != "gated":
            assert alone == pytest.approx(float(result.fvu), rel=1e-4), "the weight rises to step 5"


@pytest.mark.parametrize("kernel", ["reference", "torch", "auto"])
@pytest.mark.parametrize("rule", JUMPRELU)
def test_thresholds_have_a_learning_rate_of_their_own_and_are_not_clipped(rule, kernel):
    """With Adam's first beta 0 the first step is the learning rate, for whatever gradient."""
    learner = learner_of(
        rule, kernel=kernel, warmup=0, gradient_clip=1e-12, threshold_learning_rate=0.07
    )
    before = copy.deepcopy(learner.sae.state_dict())
    result = learner.step(*Planted().draw())
    after = learner.sae.state_dict()
    moved = after["log_threshold"] - before["log_threshold"]
    gradient = result.gradients["log_threshold"]
    clear = gradient.abs() > 1e-5
    assert clear.float().mean() > 0.5
    torch.testing.assert_close(moved[clear], -0.07 * gradient[clear].sign(), rtol=1e-2, atol=0)
    assert after["log_threshold"].dtype == torch.float32
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert (after[name] - before[name]).abs().max() < 1e-5, "these are clipped"


@pytest.mark.parametrize("rule", ["jumprelu with target", "jumprelu by layer"])
def test_thresholds_bring_the_l0_to_its_target(rule):
    learner, data = learner_of(rule, steps=300, sparsity_weight=1.0), Planted()
    start = learner.sae.log_threshold.detach().clone()
    for _ in range(300):
        learner.step(*data.draw())
    moved = (learner.sae.log_threshold - start).abs()
    assert (moved > 0.1).float().mean() > 0.5
    x, members = data.draw(20_000)
    l0 = learner.sae.encode_normalized(x, members).l0()
    if rule == "jumprelu by layer":
        for member in range(2):
            assert float(l0[members == member].mean()) == pytest.approx(3, rel=0.08)
    assert float(l0.mean()) == pytest.approx(3, rel=0.08)


@pytest.mark.parametrize(
    ("rule", "average"), [*((rule, None) for rule in BY_BATCH), ("batchtopk", 0.95)]
)
def test_the_estimated_threshold_leaves_k_active_latents_on_new_tokens(rule, average):
    learner, data = learner_of(rule, steps=200, weight_average=average, decay=0.3), Planted()
    for _ in range(200):
        learner.step(*data.draw())
    learner.finish()
    x, members = data.draw(20_000)
    l0 = learner.sae.encode_normalized(x, members).l0()
    assert float(l0.mean()) == pytest.approx(K, rel=0.04)
    if rule == "batchtopk by layer":
        for member in range(2):
            assert float(l0[members == member].mean()) == pytest.approx(K, rel=0.04)
    else:
        assert learner.sae.threshold[0] == learner.sae.threshold[1]


def test_the_threshold_is_at_first_the_plain_mean_of_each_layer_s_cuts():
    learner, data = learner_of("batchtopk by layer"), Planted()
    cuts: list[list[Tensor]] = [[], []]
    for step in range(8):
        x, members = data.draw()
        result = learner.step(x, members * (step % 3 > 0))  # none of the second layer at times
        for member in range(2):
            if step % 3 or member == 0:
                cuts[member].append(result.cuts[member])
    expected = torch.stack([torch.stack(own).mean() for own in cuts])
    torch.testing.assert_close(learner.sae.threshold, expected)


@pytest.mark.parametrize("kernel", ["reference", "torch", "auto"])
@pytest.mark.parametrize("rule", ["topk", *BY_BATCH])
def test_the_auxiliary_loss_reaches_the_encoder_of_dead_latents(rule, kernel):
    """A latent that is never among the largest moves in the encoder only through AuxK."""
    moved = {}
    for weight in (0.0, 1.0):
        learner = learner_of(rule, kernel=kernel, auxk_weight=weight, dead_after_tokens=BATCH)
        with torch.no_grad():
            learner.sae.W_enc[5] *= 1e-3
        data = Planted()
        learner.step(*data.draw())
        assert learner.silent_tokens[5] == BATCH
        before = learner.sae.W_enc[5].detach().clone()
        gradient = learner.step(*data.draw()).gradients["W_enc"][5]
        moved[weight] = float((learner.sae.W_enc[5].detach() - before).norm())
        assert bool(gradient.any()) == bool(weight)
    assert moved[1.0] > 1e-3 > moved[0.0]


@pytest.mark.parametrize("average", [None, 0.9])
@every_rule
def test_state_continues_bit_for_bit(rule, average):
    changes = {"weight_average": average, "dead_after_tokens": BATCH, "steps": 10}
    learner, data = learner_of(rule, "gain", **changes), Planted()
    batches = [data.draw() for _ in range(10)]
    for batch in batches[:5]:
        learner.step(*batch)
    state = {name: tensor.clone() for name, tensor in learner.state().items()}
    other = learner_of(rule, "gain", seed=5, **changes)
    other.load_state(state)
    for batch in batches[5:]:
        learner.step(*batch)
        other.step(*batch)
    for name, tensor in learner.state().items():
        assert torch.equal(tensor, other.state()[name]), name
    assert learner.metrics() == other.metrics()
    learner.finish()
    other.finish()
    for name, tensor in learner.sae.state_dict().items():
        assert torch.equal(tensor, other.sae.state_dict()[name]), name
