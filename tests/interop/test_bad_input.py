"""What cannot be imported or exported is refused in one message, and nothing is half written."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from groupsae.errors import InputError
from groupsae.interop import dictionary_learning, export_saes, import_saes, load
from groupsae.interop.metadata import layer_of
from tests.interop.cases import METADATA, trained

CONFIGS = {"sae-lens": "cfg.json", "sparsify": "cfg.json", "dictionary-learning": "config.json"}
WEIGHTS = {
    "sae-lens": "sae_weights.safetensors",
    "sparsify": "sae.safetensors",
    "dictionary-learning": "ae.pt",
}
every_format = pytest.mark.parametrize("format", CONFIGS)


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Path]:
    """The folder of layer 2's topk SAE in a format."""

    def write(format: str, rule: str = "topk") -> Path:
        return export_saes({2: trained(rule)}, tmp_path / "export", format, METADATA)[2]

    return write


def edit(folder: Path, format: str, **changes: Any) -> None:
    """Change keys of a configuration; of its `trainer` in dictionary_learning."""
    path = folder / CONFIGS[format]
    content = json.loads(path.read_text())
    (content["trainer"] if format == "dictionary-learning" else content).update(changes)
    path.write_text(json.dumps(content))


def edit_weights(folder: Path, format: str, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / WEIGHTS[format]
    if format == "dictionary-learning":
        tensors = torch.load(path, weights_only=True)
        change(tensors)
        torch.save(tensors, path)
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)


def refused(folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(folder, **options)
    assert str(folder) in str(caught.value)


@every_format
def test_a_missing_tensor(format: str, export: Callable[..., Path]) -> None:
    folder = export(format)
    edit_weights(folder, format, lambda tensors: tensors.pop("b_dec"))
    refused(folder, r"the file lacks b_dec; expected are")


@every_format
def test_an_extra_tensor(format: str, export: Callable[..., Path]) -> None:
    folder = export(format)
    edit_weights(folder, format, lambda tensors: tensors.update(W_skip=torch.zeros(12, 12)))
    refused(folder, "the file has besides W_skip")


@every_format
def test_a_tensor_of_another_shape(format: str, export: Callable[..., Path]) -> None:
    folder = export(format)
    edit_weights(folder, format, lambda tensors: tensors.update(b_dec=torch.zeros(11)))
    refused(folder, r"its tensor b_dec has the shape \(11,\), not \(12,\)")


@every_format
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(
    format: str, value: float, export: Callable[..., Path]
) -> None:
    folder = export(format)
    edit_weights(folder, format, lambda tensors: tensors["b_dec"].fill_(value))
    refused(folder, "its tensor b_dec holds NaN or infinity")


@every_format
def test_weights_that_are_cut_off(format: str, export: Callable[..., Path]) -> None:
    folder = export(format)
    path = folder / WEIGHTS[format]
    path.write_bytes(path.read_bytes()[:200])
    refused(folder, "cannot be read as safetensors|is no plain state dict")


@every_format
def test_a_configuration_that_is_no_json(format: str, export: Callable[..., Path]) -> None:
    folder = export(format)
    (folder / CONFIGS[format]).write_text("{")
    refused(folder, "is no JSON")


@every_format
@pytest.mark.parametrize("k", [0, 121, "4", True])
def test_a_k_that_cannot_be(format: str, k: Any, export: Callable[..., Path]) -> None:
    folder = export(format)
    edit(folder, format, k=k)
    if format == "dictionary-learning":
        edit_weights(folder, format, lambda tensors: tensors.pop("k"))
    refused(folder, r"sae\.k: |'k' in its configuration")


class Malice:
    """What a pickle from the net may hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("was-run"),))


@pytest.mark.parametrize("content", [Malice(), {"encoder.weight": Malice()}, torch.nn.Linear(2, 2)])
def test_a_pickle_that_is_no_state_dict_is_not_run(
    content: Any,
    export: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = export("dictionary-learning")
    torch.save(content, folder / "ae.pt")
    refused(folder, r"ae.pt is no plain state dict, and is not read")
    (folder / "ae.pt").write_bytes(pickle.dumps(content, protocol=2))
    refused(folder, r"ae.pt is no plain state dict, and is not read")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"a": "b"}, {1: torch.zeros(2)}])
def test_a_plain_pickle_of_something_else(content: Any, export: Callable[..., Path]) -> None:
    folder = export("dictionary-learning")
    torch.save(content, folder / "ae.pt")
    refused(folder, "it must be a dict of tensors by name")


@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        ("sae-lens", {"architecture": "transcoder"}, "architecture 'transcoder' is none"),
        ("sae-lens", {"architecture": "temporal"}, "architecture 'temporal' is none"),
        ("sae-lens", {"architecture": "batchtopk"}, "write it with save_inference_model"),
        ("sae-lens", {"normalize_activations": "layer_norm"}, "normalises every token"),
        (
            "sae-lens",
            {"normalize_activations": "expected_average_only_in"},
            r"fold_activation_norm_scaling_factor\(factor\)",
        ),
        ("sae-lens", {"reshape_activations": "hook_z"}, "attention's heads"),
        ("sae-lens", {"d_in": "12"}, "'d_in' in its configuration is '12', not of type int"),
        ("sparsify", {"transcode": True}, "a transcoder"),
        ("sparsify", {"skip_connection": True}, "a skip connection"),
        ("sparsify", {"signed": True}, "signed latents"),
        ("sparsify", {"activation": "groupmax"}, "'groupmax' does not exist here"),
        ("sparsify", {"num_latents": 240}, "the two files do not belong together"),
        ("dictionary-learning", {"dict_class": "CrossCoder"}, "class 'CrossCoder' is none"),
        ("dictionary-learning", {"dict_class": None}, "'dict_class' in its configuration is None"),
        ("dictionary-learning", {"submodule_name": "mlp_out_layer_2"}, "not the residual stream"),
    ],
)
def test_kinds_that_do_not_exist_here(
    format: str, changes: dict[str, Any], message: str, export: Callable[..., Path]
) -> None:
    folder = export(format)
    edit(folder, format, **changes)
    refused(folder, message)


def test_a_folder_of_another_format_is_named(export: Callable[..., Path]) -> None:
    refused(export("sparsify"), "looks like sparsify, not sae-lens", format="sae-lens")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("config.json", "model.safetensors"), "it looks like a language model"),
        (("config.yaml", "stages.json"), "it looks like a run directory of groupsae"),
        (("params.npz",), "it looks like Gemma Scope"),
        (("sae_weights.safetensors",), "SAELens without its cfg.json"),
        (("cfg.json",), "an SAE without its weights"),
        (("notes.txt",), "it holds notes.txt"),
        ((), "it holds nothing"),
    ],
)
def test_a_folder_of_something_else(files: tuple[str, ...], message: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    refused(tmp_path, message)


def test_no_folder_at_all(tmp_path: Path) -> None:
    refused(tmp_path / "none", "is no folder")
    with pytest.raises(InputError, match="is no folder"):
        import_saes([tmp_path / "none"])


def test_two_saes_of_the_same_layer(export: Callable[..., Path]) -> None:
    folder = export("sparsify")
    with pytest.raises(InputError, match="are both SAEs of baseline/layers-02; name one"):
        import_saes([folder, folder])


def test_layers_must_be_as_many_as_saes(export: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="--layers: 2 are given, but there are 1 SAEs"):
        import_saes([export("sparsify")], layers=[(2,), (3,)])
    refused(export("sparsify"), "it is of one layer, not of 2, 3", layers=(2, 3))


@pytest.mark.parametrize("rule", ["batchtopk", "matryoshka", "jumprelu", "relu", "gated"])
def test_sparsify_cannot_express_other_rules(rule: str, tmp_path: Path) -> None:
    saes = {2: trained("topk"), 3: trained(rule)}
    with pytest.raises(InputError, match=f"cannot express an SAE of architecture {rule}"):
        export_saes(saes, tmp_path, "sparsify", METADATA)
    assert not list(tmp_path.iterdir())


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dictionary_learning, "write_json", full)
    with pytest.raises(InputError, match="cannot be written: No space left on device"):
        export_saes({2: trained("topk")}, tmp_path, "dictionary-learning", METADATA)
    assert not list(tmp_path.iterdir())


def test_what_lies_in_the_way_stays(tmp_path: Path) -> None:
    (tmp_path / "layers.2").mkdir()
    (tmp_path / "layers.2" / "thesis.txt").write_text("three years")
    with pytest.raises(InputError, match="holds something else; remove it"):
        export_saes({2: trained("topk")}, tmp_path, "sparsify", METADATA)
    assert (tmp_path / "layers.2" / "thesis.txt").read_text() == "three years"


def test_formats_and_layers_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--to gguf: known formats are sae-lens"):
        export_saes({2: trained("topk")}, tmp_path, "gguf", METADATA)
    with pytest.raises(InputError, match="no layer is named"):
        export_saes({}, tmp_path, "sparsify", METADATA)
    with pytest.raises(InputError, match="layer 9 is no member"):
        export_saes({9: trained("topk")}, tmp_path, "sparsify", METADATA)
    with pytest.raises(InputError, match="--from gguf: known formats are sae-lens"):
        load(tmp_path, format="gguf")


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blocks.3.hook_resid_post", 3),
        ("blocks.3.hook_resid_pre", 2),
        ("layers.3", 3),
        ("gpt_neox.layers.11", 11),
        ("transformer.h.0", 0),
        ("resid_post_layer_7", 7),
        ("trainer_0", None),
    ],
)
def test_names_of_residual_streams(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


@pytest.mark.parametrize(
    "name",
    ["blocks.0.hook_resid_pre", "blocks.3.hook_mlp_out", "layers.3.mlp", "mlp_out_layer_3"],
)
def test_names_of_other_places(name: str) -> None:
    with pytest.raises(InputError, match="not the residual stream that a block returns"):
        layer_of(name)
