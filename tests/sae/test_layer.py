from __future__ import annotations

import pytest
import torch

from groupsae.errors import InputError
from groupsae.sae import SAE
from tests.interop.cases import D_MODEL, D_SAE, LAYERS, activations, trained
from tests.sae.kernels.cases import AFFINES, RULES


@pytest.mark.parametrize("layer", LAYERS)
def test_it_is_the_groups_sae_at_that_layer(layer):
    sae = trained("jumprelu by layer", "gain")
    x = activations(sae, layer)
    view = sae.at(layer)
    latents, expected = view.encode(x), sae.encode(x, layer)
    assert torch.equal(latents.values, expected.values)
    assert torch.equal(latents.indices, expected.indices)
    assert torch.equal(view.decode(latents), sae.decode(expected, layer))
    assert torch.equal(view(x), sae(x, layer))


def test_its_reconstruction_has_the_dtype_of_the_stream():
    sae = trained("topk")
    assert sae.at(3)(activations(sae, 3).bfloat16()).dtype is torch.bfloat16


def test_weights_are_shared_and_not_copied():
    sae = trained("topk")
    of_two, of_three = sae.at(2), sae.at(3)
    own = {p.data_ptr() for p in sae.parameters()}
    assert {p.data_ptr() for p in of_two.parameters()} == own
    with torch.no_grad():
        of_two.sae.W_dec.mul_(2)
    x = activations(sae, 3)
    assert torch.equal(of_three(x), sae(x, 3))


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("rule", RULES)
def test_a_direction_is_what_one_unit_of_a_latent_adds(rule, affine):
    sae = trained(rule, affine).double()
    for layer in LAYERS:
        view = sae.at(layer)
        # The decoder's Jacobian, by autograd: it is linear in the latents.
        x = activations(sae, layer, tokens=2)
        latents = view.encode(x)
        values = latents.values.detach().requires_grad_()
        x_hat = view.decode(type(latents)(values, latents.indices))
        for j in range(D_MODEL):
            (gradient,) = torch.autograd.grad(x_hat[:, j].sum(), values, retain_graph=True)
            expected = view.directions(latents.indices[0])[:, j]
            torch.testing.assert_close(gradient[0], expected, rtol=1e-9, atol=1e-12)
    assert view.directions(torch.arange(D_SAE)).shape == (D_SAE, D_MODEL)


def test_a_layer_of_another_group_is_refused():
    with pytest.raises(InputError, match="layer 7 is no member of this SAE; its layers are 2, 3"):
        trained("topk").at(7)


def test_it_can_be_a_part_of_a_model_and_names_its_layer():
    sae = trained("topk")
    assert isinstance(sae, SAE)
    model = torch.nn.Sequential(sae.at(3))
    assert torch.equal(model(activations(sae, 3)), sae(activations(sae, 3), 3))
    assert "layer=3" in repr(model)
