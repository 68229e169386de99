"""What a trained SAE of each sparsity rule gives, for the tokens of any member layer."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from groupsae.errors import InputError
from groupsae.sae import SAE, SAEConfig
from tests.sae.kernels.cases import AFFINES, RULES, random_batch, sae_with

LAYERS = (2, 3, 4)

every_rule = pytest.mark.parametrize("rule", RULES)
every_affine = pytest.mark.parametrize("affine", AFFINES)


def trained(rule: str, affine: str = "none") -> SAE:
    """With means, scales and, where the rule has them, inference thresholds for each layer."""
    sae = sae_with(rule, affine)
    generator = torch.Generator().manual_seed(3)
    sae.mean.copy_(torch.randn(3, 12, generator=generator))
    sae.scale.copy_(torch.tensor([0.5, 1.0, 2.0]))
    if "batchtopk" in rule or rule == "matryoshka":
        sae.threshold.copy_(torch.tensor([4.0, 6.0, 8.0]))
    return sae


def formula(sae: SAE, row: Tensor, member: int) -> tuple[Tensor, Tensor]:
    """z and x_hat of one token, as in the docstring of SAE and in the papers."""
    config = sae.config
    row = sae.scale[member] * (row - sae.mean[member])
    if config.learned_affine == "gain":
        row = sae.gain_in[member] * row
    product = sae.W_enc @ (row - sae.b_dec)
    if config.learned_affine == "bias":
        product = product + sae.latent_bias[member]
    pre = product + sae.b_enc
    match config.architecture:
        case "topk":
            z = torch.where(pre >= pre.sort(descending=True).values[config.k - 1], pre.relu(), 0)
        case "batchtopk" | "matryoshka":
            z = torch.where(pre > sae.threshold[member], pre, 0)
        case "jumprelu":
            own = member if config.per_layer_threshold else 0
            z = torch.where(pre > sae.log_threshold[own].exp(), pre, 0)
        case "relu":
            z = pre.relu()
        case _:
            magnitude = (sae.r_mag.exp() * product + sae.b_enc).relu()
            z = torch.where(product + sae.b_gate > 0, magnitude, 0)
    output = sae.W_dec.T @ z + sae.b_dec
    if config.learned_affine == "gain":
        output = sae.gain_out[member] * output
    return z, output / sae.scale[member] + sae.mean[member]


@every_affine
@every_rule
@torch.no_grad()
def test_latents_and_reconstructions_are_those_of_the_formula(rule, affine):
    sae = trained(rule, affine).double()
    x = random_batch(14, 12, dtype=torch.float64)
    seen = []
    for member, layer in enumerate(LAYERS):
        expected = [formula(sae, row, member) for row in x]
        z = sae.encode(x, layer).dense(120)
        torch.testing.assert_close(z, torch.stack([latents for latents, _ in expected]))
        torch.testing.assert_close(sae(x, layer), torch.stack([output for _, output in expected]))
        contexts = sae.encode(x.reshape(2, 7, 12), layer).dense(120)
        torch.testing.assert_close(contexts.reshape(14, 120), z)
        assert 0 < (z > 0).double().mean() < 1
        seen.append(z)
    assert not torch.equal(seen[0], seen[1])


@every_affine
@every_rule
@torch.no_grad()
def test_a_token_s_latents_do_not_depend_on_the_others_in_its_batch(rule, affine):
    sae = trained(rule, affine).double()
    x = random_batch(9, 12, dtype=torch.float64)
    together = sae.encode(x, 3).dense(120)
    alone = torch.cat([sae.encode(row[None], 3).dense(120) for row in x])
    torch.testing.assert_close(together, alone)
    among_large = sae.encode(torch.cat([x, 100 * x]), 3).dense(120)[:9]
    torch.testing.assert_close(together, among_large)


@every_affine
@every_rule
@torch.no_grad()
def test_tokens_of_mixed_layers_are_encoded_as_each_by_its_own(rule, affine):
    sae = trained(rule, affine).double()
    members = torch.tensor([2, 0, 1, 1, 0, 2])
    x = random_batch(6, 12, dtype=torch.float64)
    mixed = sae.encode_normalized(x, members)
    output = sae.decode_normalized(mixed, members)
    for row, member in enumerate(members.tolist()):
        alone = sae.encode_normalized(x[row : row + 1], member)
        torch.testing.assert_close(mixed.dense(120)[row], alone.dense(120)[0])
        torch.testing.assert_close(output[row], sae.decode_normalized(alone, member)[0])


@every_rule
def test_no_tokens_and_no_active_latent(rule):
    sae = trained(rule)
    assert sae(torch.zeros(0, 12), 3).shape == (0, 12)
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    x = random_batch(5, 12)
    assert not sae.encode(x, 3).dense(120).any()
    expected = (sae.b_dec / sae.scale[1] + sae.mean[1]).expand(5, 12)
    torch.testing.assert_close(sae(x, 3), expected)


@every_affine
@every_rule
@torch.no_grad()
def test_save_and_load_give_the_same_sae(rule, affine, tmp_path):
    sae = trained(rule, affine)
    sae.save(tmp_path)
    loaded = SAE.load(tmp_path)
    assert loaded.config == sae.config
    assert loaded.state_dict().keys() == sae.state_dict().keys()
    x = random_batch(8, 12)
    for layer in LAYERS:
        assert torch.equal(loaded(x, layer), sae(x, layer))


def test_an_sae_saved_before_there_were_other_rules_loads(tmp_path):
    sae = sae_with("topk")
    sae.save(tmp_path)
    stored = {"d_model": 12, "d_sae": 120, "k": 4, "layers": [2, 3, 4], "architecture": "topk"}
    (tmp_path / "cfg.json").write_text(json.dumps(stored))
    loaded = SAE.load(tmp_path)
    assert loaded.config == sae.config
    x = random_batch(8, 12)
    assert torch.equal(loaded(x, 4), sae(x, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "vanilla"}, "sae.architecture: 'vanilla' is not known"),
        ({"architecture": "topk"}, "sae.k: an SAE of architecture topk needs one"),
        ({"architecture": "topk", "k": 21}, "sae.k: 21 must lie between 1 and d_sae = 20"),
        ({"architecture": "topk", "k": 4, "target_l0": 3.0}, r"sae.target_l0: 3.0 .*jumprelu"),
        (
            {"architecture": "topk", "k": 4, "per_layer_threshold": True},
            "sae.per_layer_threshold: True .*batchtopk, matryoshka, jumprelu",
        ),
        ({"architecture": "relu", "k": 4}, "sae.k: 4 .*topk, batchtopk, matryoshka"),
        ({"architecture": "gated", "bandwidth": 0.1}, r"sae.bandwidth: 0.1 .*jumprelu"),
        ({"architecture": "relu", "initial_threshold": 0.1}, "sae.initial_threshold: 0.1"),
        ({"architecture": "batchtopk", "k": 4, "prefixes": (5, 20)}, r"sae.prefixes: \(5, 20\)"),
        ({"architecture": "matryoshka", "k": 4}, "sae.prefixes: .* matryoshka needs one"),
        ({"architecture": "matryoshka", "k": 4, "prefixes": (5,)}, "rise from .* d_sae = 20"),
        ({"architecture": "matryoshka", "k": 4, "prefixes": (9, 5, 20)}, "sae.prefixes"),
        ({"architecture": "matryoshka", "k": 4, "prefixes": (5, 5, 20)}, "sae.prefixes"),
        ({"architecture": "matryoshka", "k": 4, "prefixes": (0, 20)}, "sae.prefixes"),
        ({"architecture": "matryoshka", "k": 4, "prefixes": ()}, "sae.prefixes"),
        ({"architecture": "jumprelu"}, "sae.bandwidth: .* jumprelu needs one"),
        ({"architecture": "relu", "learned_affine": "scale"}, "'scale' must be none, bias or gain"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(InputError, match=message) as error:
        SAEConfig(d_model=6, d_sae=20, layers=(0,), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("target_l0", 21.0), ("target_l0", 0.0), ("target_l0", float("nan"))],
        *[("bandwidth", 0.0), ("bandwidth", float("inf")), ("initial_threshold", -0.1), ("k", 0)],
    ],
)
def test_impossible_numbers_are_refused_by_name_and_value(name, value):
    options = {"architecture": "jumprelu", "bandwidth": 0.1, "initial_threshold": 0.1}
    with pytest.raises(InputError, match=rf"sae\.{name}: {value}"):
        SAEConfig(d_model=6, d_sae=20, layers=(0,), **(options | {name: value}))
