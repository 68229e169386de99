"""The published Group-SAE weights, in a repository made up in their layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from groupsae.errors import InputError
from groupsae.interop import detect, import_saes, load

D, F = 12, 48
SCALES = {f"layers.{layer}": torch.tensor(0.1 * (layer + 1)) for layer in range(4)}


def weights(seed: int, *, jumprelu: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"encoder.weight": (F, D), "encoder.bias": (F,), "W_dec": (F, D), "b_dec": (D,)}
    shapes |= {"log_threshold": (F,)} if jumprelu else {}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def repository(root: Path, *, k: int = 5, jumprelu: bool = False) -> dict[str, dict[str, Tensor]]:
    """`baseline/layers.0`, `baseline/layers.3` and `cluster/k3-c1` of layers 1 and 2."""
    config = {"expansion_factor": 4, "normalize_decoder": True, "num_latents": 0, "d_in": D}
    config |= {"k": k, "jumprelu": jumprelu, "jumprelu_bandwidth": 0.01, "multi_topk": False}
    found = {}
    for seed, name in enumerate(("baseline/layers.0", "baseline/layers.3", "cluster/k3-c1")):
        (root / name).mkdir(parents=True)
        (root / name / "cfg.json").write_text(json.dumps(config))
        found[name] = weights(seed, jumprelu=jumprelu)
        save_file(found[name], root / name / "sae.safetensors")
    trainer: dict[str, Any] = {"max_seq_len": 1024, "normalize_activations": 1.0}
    (root / "baseline" / "config.json").write_text(json.dumps({**trainer, "clusters": None}))
    clusters = {"clusters": {"k3-c1": [1, 2]}}
    (root / "cluster" / "config.json").write_text(json.dumps({**trainer, **clusters}))
    torch.save(SCALES, root / "scaling_factors.pt")
    return found


def published(w: dict[str, Tensor], x: Tensor, scale: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction of x as the published code has them: sae(s x) / s."""
    pre = (scale * x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]
    if "log_threshold" in w:
        latents = pre * (pre > w["log_threshold"].exp())
    elif k > 0:
        largest = pre.relu().topk(k, dim=1)
        latents = torch.zeros_like(pre).scatter(1, largest.indices, largest.values)
    else:
        latents = pre.relu()
    return latents, (latents @ w["W_dec"] + w["b_dec"]) / scale


@pytest.mark.parametrize(
    ("k", "jumprelu", "architecture"),
    [(5, False, "topk"), (0, True, "jumprelu"), (-1, False, "relu")],
)
def test_baselines_and_groups_are_imported_with_their_scales(
    k: int, jumprelu: bool, architecture: str, tmp_path: Path
) -> None:
    found = repository(tmp_path, k=k, jumprelu=jumprelu)
    saes = import_saes([tmp_path])
    assert list(saes) == ["baseline/layers-00", "layers-01-02", "baseline/layers-03"]
    sources = ("baseline/layers.0", "cluster/k3-c1", "baseline/layers.3")
    generator = torch.Generator().manual_seed(9)
    for sae, source in zip(saes.values(), sources, strict=True):
        assert sae.config.architecture == architecture
        for layer in sae.layers:
            x = 10 * torch.randn(32, D, generator=generator)
            latents, x_hat = published(found[source], x, SCALES[f"layers.{layer}"], k)
            ours = sae.encode(x, layer)
            assert torch.equal(ours.dense(F) > 0, latents > 0)
            torch.testing.assert_close(ours.dense(F), latents, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(sae.decode(ours, layer), x_hat, rtol=1e-4, atol=1e-3)


def test_a_published_folder_without_jumprelu_keys_is_known_by_its_scaling_factors(
    tmp_path: Path,
) -> None:
    repository(tmp_path)
    path = tmp_path / "baseline" / "layers.3" / "cfg.json"
    path.write_text(json.dumps({"d_in": D, "expansion_factor": 4, "k": 5}))
    assert detect(path.parent) == "group-sae"
    assert load(path.parent).scale.item() == pytest.approx(0.4)


def test_members_may_be_given_where_no_file_lists_them(tmp_path: Path) -> None:
    repository(tmp_path)
    (tmp_path / "cluster" / "config.json").unlink()
    folder = tmp_path / "cluster" / "k3-c1"
    with pytest.raises(InputError, match="which layers k3-c1 is of is not to be found"):
        load(folder)
    assert load(folder, layers=(1, 2)).layers == (1, 2)


def test_missing_scaling_factors_are_refused(tmp_path: Path) -> None:
    repository(tmp_path)
    (tmp_path / "scaling_factors.pt").unlink()
    with pytest.raises(InputError, match=r"its scaling_factors.pt is missing"):
        load(tmp_path / "baseline" / "layers.0")
    config = {"normalize_activations": None}
    (tmp_path / "baseline" / "config.json").write_text(json.dumps(config))
    assert load(tmp_path / "baseline" / "layers.0").scale.item() == 1.0


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"layers.1": 1.0}, "no factor for the layers 0"),
        ({"layers.0": -1.0}, "not all positive numbers"),
        ({"layers.0": float("nan")}, "not all positive numbers"),
        ({"layers.0": torch.ones(3)}, "not all positive numbers"),
        ([1.0, 2.0], "no plain state dict"),
        ({"layers.0": Path("x")}, "no plain state dict"),
    ],
)
def test_scaling_factors_that_make_no_sense_are_refused(
    factors: Any, message: str, tmp_path: Path
) -> None:
    repository(tmp_path)
    torch.save(factors, tmp_path / "scaling_factors.pt")
    with pytest.raises(InputError, match=message):
        load(tmp_path / "baseline" / "layers.0")
