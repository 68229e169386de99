"""Out and back in each format without its library; and what is written beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from groupsae import __version__
from groupsae.interop import detect, export_saes, import_saes, load
from groupsae.interop.fold import folded
from groupsae.sae import SAE
from tests.interop.cases import D_SAE, LAYERS, METADATA, activations, trained
from tests.sae.kernels.cases import RULES

FORMATS = {
    "sae-lens": tuple(RULES),
    "sparsify": ("topk",),
    "dictionary-learning": tuple(RULES),
}
CASES = [(format, rule) for format, rules in FORMATS.items() for rule in rules]


def exported(sae: SAE, directory: Path, format: str) -> dict[int, Path]:
    return export_saes(dict.fromkeys(sae.layers, sae), directory, format, METADATA)


@pytest.mark.parametrize(("format", "rule"), CASES)
def test_what_comes_back_is_what_went_out(format: str, rule: str, tmp_path: Path) -> None:
    one = folded(trained(rule), 3)
    sae = one.sae()
    back = load(exported(sae, tmp_path, format)[3])
    assert back.config == sae.config
    for name, tensor in sae.state_dict().items():
        # an exported threshold is no logarithm; a jumprelu encoder there does not subtract b_dec
        shifted = (format, name) == ("dictionary-learning", "b_enc") and "jumprelu" in rule
        rounding = 1e-6 if name == "log_threshold" or shifted else 0.0
        torch.testing.assert_close(back.state_dict()[name], tensor, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("rule", ["batchtopk", "matryoshka"])
def test_a_batchtopk_export_for_sae_lens_comes_back_as_one(rule: str, tmp_path: Path) -> None:
    sae = trained(rule)
    folder = exported(sae, tmp_path, "sae-lens")[2]
    assert load(folder).config.architecture == rule
    content = json.loads((folder / "cfg.json").read_text())
    del content["metadata"]["groupsae"]  # as another program would have written it
    (folder / "cfg.json").write_text(json.dumps(content))
    assert load(folder).config.architecture == "jumprelu"


def test_layers_lie_where_each_librarys_users_expect_them(tmp_path: Path) -> None:
    sae = trained("topk")
    names = {
        "sae-lens": "blocks.3.hook_resid_post",
        "sparsify": "layers.3",
        "dictionary-learning": "resid_post_layer_3",
    }
    for format, name in names.items():
        folders = exported(sae, tmp_path / format, format)
        assert folders[3] == tmp_path / format / name
        assert sorted(path.name for path in (tmp_path / format).iterdir()) == sorted(
            folder.name for folder in folders.values()
        )
        assert detect(folders[3]) == format


def test_sae_lens_is_told_where_the_sae_comes_from(tmp_path: Path) -> None:
    folder = exported(trained("topk"), tmp_path, "sae-lens")[4]
    config = json.loads((folder / "cfg.json").read_text())
    metadata = config["metadata"]
    assert (config["k"], config["rescale_acts_by_decoder_norm"]) == (4, False)
    expected = {
        "model_name": "org/tiny-neox",
        "hook_name": "blocks.4.hook_resid_post",
        "hf_hook_name": "gpt_neox.layers.4",
        "context_size": 16,
        "prepend_bos": False,
        "dataset_path": "words.jsonl",
        "exclude_special_tokens": True,
    }
    assert metadata | expected == metadata
    own = metadata["groupsae"]
    assert (own["version"], own["amad"]) == (__version__, 0.125)
    assert (own["group"], own["group_layers"]) == ("layers-02-04", [2, 3, 4])
    assert own["scale"] == pytest.approx(0.03)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_keeps_group_and_source(format: str, tmp_path: Path) -> None:
    folder = exported(trained("topk"), tmp_path, format)[2]
    name = "config.json" if format == "dictionary-learning" else "cfg.json"
    content = json.loads((folder / name).read_text())
    own = content.get("groupsae") or content["metadata"]["groupsae"]
    assert own["group_layers"] == [2, 3, 4]
    assert own["hf_hook_name"] == "gpt_neox.layers.2"


def test_rows_that_a_gain_has_scaled_are_not_said_to_be_normalised(tmp_path: Path) -> None:
    for affine, normalized in {"none": True, "gain": False}.items():
        folder = exported(trained("topk", affine), tmp_path / affine, "sparsify")[2]
        assert json.loads((folder / "cfg.json").read_text())["normalize_decoder"] is normalized


def test_a_folder_of_many_is_imported_at_once(tmp_path: Path) -> None:
    sae = trained("topk")
    exported(sae, tmp_path / "theirs", "sparsify")
    sae.save(tmp_path / "ours" / "layers-02-04")
    saes = import_saes([tmp_path / "theirs", tmp_path / "ours"])
    assert list(saes) == [
        "baseline/layers-02",
        "layers-02-04",
        "baseline/layers-03",
        "baseline/layers-04",
    ]
    for layer in LAYERS:
        x = activations(sae, layer)
        one, group = saes[f"baseline/layers-0{layer}"], saes["layers-02-04"]
        torch.testing.assert_close(one(x, layer), group(x, layer), rtol=1e-4, atol=1e-4)
        assert torch.equal(
            one.encode(x, layer).dense(D_SAE) > 0, group.encode(x, layer).dense(D_SAE) > 0
        )


def test_an_export_of_the_same_format_is_replaced(tmp_path: Path) -> None:
    exported(trained("topk"), tmp_path, "sparsify")
    other = trained("topk", seed=1)
    exported(other, tmp_path, "sparsify")
    assert torch.equal(load(tmp_path / "layers.2").W_enc, other.W_enc)
