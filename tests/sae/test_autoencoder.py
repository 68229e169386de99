from __future__ import annotations

import json

import pytest
import torch

from groupsae.errors import InputError
from groupsae.sae import SAE, SAEConfig, directory_name


def make_sae(layers=(3, 4, 5), d_model=6, d_sae=20, k=4, seed=0) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    return SAE(
        SAEConfig(d_model=d_model, d_sae=d_sae, k=k, layers=layers),
        mean=torch.randn(len(layers), d_model, generator=generator),
        scale=torch.rand(len(layers), generator=generator) + 0.5,
        generator=generator,
    )


def test_start():
    sae = make_sae()
    assert torch.equal(sae.W_enc, sae.W_dec), "the encoder starts as the decoder's transpose"
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(20))
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()


@pytest.mark.parametrize("layer", [3, 4, 5])
def test_forward_is_the_published_formula_on_normalised_input(layer):
    sae = make_sae().double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    m, s = sae.mean[layer - 3], sae.scale[layer - 3]

    pre = (s * (x - m) - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    kth = pre.sort(-1, descending=True).values[..., 3:4]
    z = torch.where(pre >= kth, pre.relu(), 0)
    expected = (z @ sae.W_dec + sae.b_dec) / s + m

    torch.testing.assert_close(sae.encode(x, layer).dense(20), z)
    torch.testing.assert_close(sae(x, layer), expected)


def test_normalize_and_denormalize_are_inverse():
    sae = make_sae().double()
    x = torch.randn(9, 6, dtype=torch.float64)
    torch.testing.assert_close(sae.denormalize(sae.normalize(x, 4), 4), x)


def test_reconstruction_keeps_the_dtype_of_its_input():
    assert make_sae()(torch.randn(3, 6).bfloat16(), 3).dtype == torch.bfloat16


def test_no_tokens_at_all():
    assert make_sae()(torch.randn(0, 6), 3).shape == (0, 6)


def test_save_and_load_give_the_same_sae(tmp_path):
    sae = make_sae()
    sae.save(tmp_path / "layers-03-05")
    random_state = torch.random.get_rng_state()
    loaded = SAE.load(tmp_path / "layers-03-05")
    assert torch.equal(torch.random.get_rng_state(), random_state), "loading draws nothing"
    assert loaded.config == sae.config
    for name, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    stored = json.loads((tmp_path / "layers-03-05" / "cfg.json").read_text())
    assert stored["layers"] == [3, 4, 5]
    assert stored["architecture"] == "topk"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 21}, "sae.k: 21 must lie between 1 and d_sae = 20"),
        ({"k": 0}, "sae.k: 0"),
        ({"layers": ()}, "at least one member layer"),
        ({"architecture": "vanilla"}, "'vanilla' is not known"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        SAEConfig(**({"d_model": 6, "d_sae": 20, "k": 4, "layers": (0,)} | change))


def test_a_layer_outside_the_group_is_refused_by_name():
    with pytest.raises(
        InputError, match="layer 7 is no member of this SAE; its layers are 3, 4, 5"
    ):
        make_sae().encode(torch.randn(1, 6), 7)


@pytest.mark.parametrize("damage", ["missing", "empty", "config", "shapes"])
def test_damaged_folders_are_refused(tmp_path, damage):
    sae = make_sae()
    sae.save(tmp_path)
    if damage == "missing":
        (tmp_path / "sae.safetensors").unlink()
    elif damage == "empty":
        (tmp_path / "sae.safetensors").write_bytes(b"")
    elif damage == "config":
        (tmp_path / "cfg.json").write_text("{}")
    else:
        stored = json.loads((tmp_path / "cfg.json").read_text()) | {"d_sae": 21}
        (tmp_path / "cfg.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="SAE"):
        SAE.load(tmp_path)


def test_folders_are_named_by_their_layers():
    assert directory_name([3, 4, 5, 6]) == "layers-03-06"
    assert directory_name([3]) == "layers-03"
