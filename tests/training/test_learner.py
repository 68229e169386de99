from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from groupsae.config import TrainingConfig
from groupsae.sae import SAE, SAEConfig
from groupsae.sae.kernels import reference
from groupsae.sae.kernels.update import normalize_decoder, remove_parallel_component
from groupsae.training.learner import Learner


def make_sae(d_model=8, d_sae=32, k=4, seed=0) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    return SAE(SAEConfig(d_model=d_model, d_sae=d_sae, k=k, layers=(0,)), generator=generator)


def make_config(**changes) -> TrainingConfig:
    settings = {"tokens": 640, "batch_tokens": 64, "buffer_tokens": 64, "learning_rate": 1e-2}
    return TrainingConfig(**(settings | changes))


def batches(n, tokens=64, d_model=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, d_model, generator=generator) for _ in range(n)]


def recipe(sae: SAE, xs, config: TrainingConfig) -> SAE:
    """The published recipe, written out in float64 with Adam by its formulas."""
    sae = copy.deepcopy(sae).double()
    parameters = dict(sae.named_parameters())
    m = {name: torch.zeros_like(p) for name, p in parameters.items()}
    v = {name: torch.zeros_like(p) for name, p in parameters.items()}
    silent = torch.zeros(sae.config.d_sae, dtype=torch.long)
    beta1, beta2 = 0.9, 0.999
    auxk_weight = 1 / 32 if config.auxk_weight is None else config.auxk_weight
    for t, x in enumerate(xs, start=1):
        dead = silent >= config.dead_after_tokens
        result = reference.step(sae, x.double(), dead=dead, auxk_weight=auxk_weight)
        gradients = result.gradients
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        factor = min(1.0, config.gradient_clip / float(norm))
        gradients = {name: g * factor for name, g in gradients.items()}
        along = (gradients["W_dec"] * sae.W_dec).sum(1, keepdim=True)
        gradients["W_dec"] = gradients["W_dec"] - along * sae.W_dec
        with torch.no_grad():
            for name, p in parameters.items():
                g = gradients[name]
                m[name] = beta1 * m[name] + (1 - beta1) * g
                v[name] = beta2 * v[name] + (1 - beta2) * g * g
                step = m[name] / (1 - beta1**t)
                p -= (
                    config.learning_rate
                    * step
                    / ((v[name] / (1 - beta2**t)).sqrt() + config.adam_epsilon)
                )
            sae.W_dec.copy_(sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True))
        silent = torch.where(result.fired, 0, silent + len(x))
    return sae


@pytest.mark.parametrize("kernel", ["reference", "torch", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "changes", [{}, {"gradient_clip": 0.05}, {"dead_after_tokens": 64, "auxk_weight": 1.0}]
)
def test_steps_follow_the_published_recipe(changes, dtype, kernel):
    config, sae, xs = make_config(kernel=kernel, **changes), make_sae(), batches(10)
    expected = dict(recipe(sae, xs, config).named_parameters())
    learner = Learner(sae.to(dtype), config)
    for x in xs:
        learner.step(x.to(dtype))
    tolerance = (
        {"rtol": 1e-7, "atol": 1e-7} if dtype == torch.float64 else {"rtol": 0, "atol": 1e-4}
    )
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], **tolerance)


def test_decoder_rows_keep_unit_norm():
    learner = Learner(make_sae(), make_config())
    for x in batches(5):
        learner.step(x)
    torch.testing.assert_close(learner.sae.W_dec.norm(dim=1), torch.ones(32))


def test_the_gradient_along_decoder_rows_is_removed():
    sae = make_sae()
    sae.W_dec.grad = torch.randn_like(sae.W_dec)
    across = sae.W_dec.grad - (sae.W_dec.grad * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
    remove_parallel_component(sae)
    torch.testing.assert_close(sae.W_dec.grad, across)
    torch.testing.assert_close(
        (sae.W_dec.grad * sae.W_dec).sum(1), torch.zeros(32), atol=1e-5, rtol=0
    )


def test_a_latent_is_dead_after_so_many_silent_tokens_and_alive_when_it_fires():
    sae = make_sae()
    with torch.no_grad():
        sae.b_enc[3] = -1e6
    learner = Learner(sae, make_config(dead_after_tokens=128, auxk_weight=0, learning_rate=1e-9))
    xs = batches(3)
    learner.step(xs[0])
    assert learner.metrics()["dead"] == 0
    learner.step(xs[1])
    assert learner.silent_tokens[3] == 128
    assert learner.metrics()["dead"] >= 1 / 32
    with torch.no_grad():
        sae.b_enc[3] = 1e6
    learner.step(xs[2])
    assert learner.silent_tokens[3] == 0


def test_learning_rate_by_default_is_that_of_the_paper():
    config = make_config(learning_rate=None)
    assert config.rate(2**14) == pytest.approx(2e-4)
    assert config.rate(2**16) == pytest.approx(1e-4)
    learner = Learner(make_sae(), config)
    learner.step(batches(1)[0])
    assert learner.metrics()["lr"] == pytest.approx(2e-4 / (32 / 2**14) ** 0.5)


def test_the_learning_rate_rises_and_falls_by_shares_of_the_steps():
    learner, rates = Learner(make_sae(), make_config(warmup=0.2, decay=0.5)), []
    for x in batches(10):
        learner.step(x)
        rates.append(learner.metrics()["lr"] / 1e-2)
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
def test_the_averaged_weights_are_the_running_mean_of_the_steps(decay):
    """Of the first 1 / (1 - decay) steps the plain mean, and without the start."""
    learner, seen = Learner(make_sae(), make_config(weight_average=decay)), []
    for x in batches(10):
        learner.step(x)
        seen.append({name: p.detach().clone() for name, p in learner.sae.named_parameters()})
    learner.finish()
    for name, parameter in learner.sae.named_parameters():
        expected = torch.zeros_like(parameter)
        for t, weights in enumerate(seen, start=1):
            share = max(1 - decay, 1 / t)
            expected = (1 - share) * expected + share * weights[name]
        if name == "W_dec":
            expected = F.normalize(expected, dim=1)
        torch.testing.assert_close(parameter, expected, msg=name)
        if decay == 0.99 and name != "W_dec":
            mean = torch.stack([weights[name] for weights in seen]).mean(0)
            torch.testing.assert_close(parameter, mean, msg=name)


def test_without_an_average_the_last_weights_stay():
    learner = Learner(make_sae(), make_config())
    learner.step(batches(1)[0])
    last = copy.deepcopy(learner.sae.state_dict())
    learner.finish()
    assert all(torch.equal(last[name], t) for name, t in learner.sae.state_dict().items())


def test_metrics_are_means_since_they_were_last_asked_for():
    learner = Learner(make_sae(), make_config())
    results = [learner.step(x) for x in batches(4)]
    metrics = learner.metrics()
    assert metrics["fvu"] == pytest.approx(sum(float(r.fvu) for r in results) / 4)
    assert metrics["l0"] == pytest.approx(4)
    last = learner.step(batches(5)[4])
    assert learner.metrics()["fvu"] == pytest.approx(float(last.fvu))


def test_training_lowers_the_loss_on_data_with_sparse_structure():
    generator = torch.Generator().manual_seed(1)  # another than the SAE's
    truth = F.normalize(torch.randn(32, 8, generator=generator), dim=1)

    def draw():
        chosen = torch.rand(256, 32, generator=generator).topk(2).indices
        return torch.zeros(256, 32).scatter(1, chosen, 1.0) @ truth

    learner = Learner(make_sae(k=2), make_config())
    first = float(learner.step(draw()).fvu)
    for _ in range(300):
        last = float(learner.step(draw()).fvu)
    assert last < 0.5 * first


def test_state_continues_bit_for_bit():
    learner, xs = Learner(make_sae(), make_config(dead_after_tokens=64)), batches(8)
    for x in xs[:4]:
        learner.step(x)
    state = {name: tensor.clone() for name, tensor in learner.state().items()}
    other = Learner(make_sae(seed=5), make_config(dead_after_tokens=64))
    other.load_state(state)
    for x in xs[4:]:
        learner.step(x)
        other.step(x)
    for name, tensor in learner.state().items():
        assert torch.equal(tensor, other.state()[name]), name


def test_normalize_decoder_survives_a_row_of_zeros():
    sae = make_sae()
    with torch.no_grad():
        sae.W_dec[0] = 0
    normalize_decoder(sae)
    assert sae.W_dec.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kernel", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu"])
def test_a_batch_that_is_not_finite_changes_nothing(architecture, kernel, bad):
    """Three good batches with a broken one among them move the weights as the three alone."""
    k = {"k": 4} if architecture != "jumprelu" else {"target_l0": 4.0, "bandwidth": 0.1}
    shape = SAEConfig(
        d_model=8,
        d_sae=32,
        layers=(0,),
        architecture=architecture,
        initial_threshold=0.01 if architecture == "jumprelu" else None,
        **k,
    )
    settings = {"kernel": kernel, "dead_after_tokens": 100, "warmup": 0.0, "decay": 0.0}
    if architecture == "jumprelu":
        settings |= {"sparsity_weight": 1.0, "sparsity_warmup": 0.0}
    one, two, three = batches(3)
    broken = one.clone()
    broken[5, 2] = bad

    def learn(xs):
        sae = SAE(shape, generator=torch.Generator().manual_seed(0))
        learner = Learner(sae, make_config(**settings))
        for x in xs:
            learner.step(x, torch.zeros(len(x), dtype=torch.long))
        return learner

    expected, found = learn([one, two, three]), learn([one, broken, two, three])
    assert (expected.n_dropped, found.n_dropped) == (0, 1)
    left_out = {"dropped", "steps", "tokens"}
    for name, tensor in expected.state().items():
        if name not in left_out:
            assert torch.equal(tensor, found.state()[name]), name
    assert found.metrics() == expected.metrics() | {"dropped": 1}


def test_what_is_fitted_to_the_first_batch_is_fitted_to_its_finite_rows():
    x = batches(1)[0]
    broken = torch.cat([x, torch.full((3, 8), float("nan"))])
    plain, sae = make_sae(), make_sae()
    Learner(plain, make_config(), fit_encoder=True).step(x)
    Learner(sae, make_config(), fit_encoder=True).step(broken)
    size = sae.W_enc.norm(dim=1)
    assert bool(size.isfinite().all())
    torch.testing.assert_close(size, plain.W_enc.norm(dim=1), rtol=0.05, atol=0.05)
