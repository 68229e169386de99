from __future__ import annotations

import pytest
import torch

from groupsae.errors import InputError
from groupsae.sae.kernels import cpu
from groupsae.sae.kernels.inference import encode
from tests.sae.kernels.cases import RULES, sae_with


@pytest.mark.parametrize("affine", ["none", "bias", "gain"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_gives_what_the_sae_does(rule, affine, dtype):
    sae = sae_with(rule, affine).to(dtype)
    x = torch.randn(3, 5, sae.config.d_model, dtype=dtype)
    for layer in sae.layers:
        ours, expected = encode(sae, x, layer), sae.encode(x, layer)
        d_sae = sae.config.d_sae
        torch.testing.assert_close(ours.dense(d_sae), expected.dense(d_sae))


@pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")
def test_topk_goes_through_the_compiled_selection(monkeypatch):
    sae = sae_with("topk", "none").float()
    called = []
    compiled = cpu.encode
    monkeypatch.setattr(cpu, "encode", lambda *a: called.append(1) or compiled(*a))
    encode(sae, torch.randn(4, sae.config.d_model), sae.layers[0])
    assert called


def test_another_layer_is_refused_as_the_sae_does():
    sae = sae_with("topk", "none").float()
    with pytest.raises(InputError, match="layer 77 is no member"):
        encode(sae, torch.randn(4, sae.config.d_model), 77)


def test_no_tokens_have_no_latents():
    sae = sae_with("topk", "none").float()
    assert encode(sae, torch.randn(0, sae.config.d_model), sae.layers[0]).values.numel() == 0
