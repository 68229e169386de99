"""One layer's SAE with everything folded in is the same function, for every rule and affine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from groupsae.errors import InputError
from groupsae.interop.fold import Folded, folded
from tests.interop.cases import D_SAE, LAYERS, activations, trained
from tests.sae.kernels.cases import AFFINES, RULES

every_rule = pytest.mark.parametrize("rule", RULES)
every_affine = pytest.mark.parametrize("affine", AFFINES)


def plainly(one: Folded, x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense latents and reconstructions, as other libraries compute them."""
    products = (x - one.b_dec) @ one.W_enc.T
    pre = products + one.b_enc
    if one.b_gate is not None and one.r_mag is not None:
        magnitudes = products * one.r_mag.exp() + one.b_enc
        latents = magnitudes.relu() * (products + one.b_gate > 0)
    elif one.threshold is not None:
        latents = pre.relu() * (pre > one.threshold)
    elif one.config.k is not None:
        largest = pre.topk(one.config.k, dim=1)
        latents = torch.zeros_like(pre).scatter(1, largest.indices, largest.values.relu())
    else:
        latents = pre.relu()
    return latents, latents @ one.W_dec + one.b_dec


@given(
    rule=st.sampled_from(sorted(RULES)),
    affine=st.sampled_from(AFFINES),
    layer=st.sampled_from(LAYERS),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_the_folded_tensors_are_the_layers_sae(
    rule: str, affine: str, layer: int, seed: int
) -> None:
    sae = trained(rule, affine, seed).double()
    x = activations(sae, layer, tokens=16, seed=seed)
    latents, x_hat = plainly(folded(sae, layer), x)
    ours = sae.encode(x, layer)
    scale = sae.scale[sae.layers.index(layer)]
    torch.testing.assert_close(latents, ours.dense(D_SAE) / scale, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x_hat, sae.decode(ours, layer), rtol=1e-9, atol=1e-9)


@every_rule
@every_affine
def test_as_an_sae_again_it_gives_the_same(rule: str, affine: str) -> None:
    sae = trained(rule, affine)
    for layer in LAYERS:
        one, x = folded(sae, layer), activations(sae, layer)
        again = one.sae()
        assert again.config == replace(
            sae.config, layers=(layer,), learned_affine="none", per_layer_threshold=False
        )
        latents, x_hat = plainly(one, x)
        ours = again.encode(x, layer)
        size = latents.max()
        for found, expected in ((ours.dense(D_SAE), latents), (again.decode(ours, layer), x_hat)):
            torch.testing.assert_close(found / size, expected / size, rtol=0, atol=1e-5)


@pytest.mark.parametrize("affine", ["none", "bias"])
def test_without_gains_both_matrices_are_the_groups_own(affine: str) -> None:
    sae = trained("topk", affine)
    for layer in LAYERS:
        assert torch.equal(folded(sae, layer).W_enc, sae.W_enc)
        assert torch.equal(folded(sae, layer).W_dec, sae.W_dec)


@every_rule
def test_an_sae_of_raw_activations_is_folded_into_itself(rule: str) -> None:
    one = folded(trained(rule), 3).sae()
    again = folded(one, 3).sae()
    for name, tensor in one.state_dict().items():
        rounding = 1e-6 if name == "log_threshold" else 0.0
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=rounding, atol=0)


@pytest.mark.parametrize("rule", ["relu", "jumprelu", "gated"])
def test_rows_of_unit_norm_keep_the_function(rule: str) -> None:
    sae = trained(rule, "gain").double()
    one, x = folded(sae, 2), activations(sae, 2)
    normalized = one.with_unit_rows()
    torch.testing.assert_close(normalized.W_dec.norm(dim=1), torch.ones(D_SAE).double())
    latents, x_hat = plainly(one, x)
    rescaled, x_hat_again = plainly(normalized, x)
    torch.testing.assert_close(rescaled, latents * one.W_dec.norm(dim=1))
    torch.testing.assert_close(x_hat_again, x_hat)


@every_rule
def test_shifting_the_inputs_shifts_what_the_encoder_sees(rule: str) -> None:
    sae = trained(rule).double()
    one, x = folded(sae, 2), activations(sae, 2)
    torch.testing.assert_close(
        plainly(one.shifted(one.b_dec), x)[0], plainly(one, x + one.b_dec)[0]
    )


def test_thresholds_that_are_not_positive_let_every_positive_latent_through() -> None:
    one = folded(trained("jumprelu"), 2)
    assert one.threshold is not None
    sae = replace(one, threshold=torch.full_like(one.threshold, -1.0)).sae()
    x = activations(sae, 2)
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    torch.testing.assert_close(sae.encode(x, 2).dense(D_SAE), pre.relu())


def test_a_layer_of_another_group_is_refused() -> None:
    with pytest.raises(
        InputError, match="layer 7 is no member of this SAE; its layers are 2, 3, 4"
    ):
        folded(trained("topk"), 7)


def test_weights_that_are_not_finite_are_refused() -> None:
    sae = trained("topk")
    sae.b_enc.data[5] = float("nan")
    with pytest.raises(InputError, match="layers 2, 3, 4 holds NaN or infinity in b_enc"):
        folded(sae, 2)
