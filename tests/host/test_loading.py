"""Models are read from disk without network and without pickle, and refused in one message."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
import transformers

from groupsae.errors import InputError
from groupsae.host.model import HostModel
from tests.host.tiny_models import (
    D_MODEL,
    N_LAYERS,
    VOCAB_SIZE,
    random_ids,
    random_model,
    tiny_model,
    tiny_tokenizer,
)

_SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": D_MODEL,
    "intermediate_size": 64,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Llama in bfloat16 and its tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama").bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """The same folder, to be spoiled."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_a_saved_model_comes_back(saved: Path) -> None:
    host = HostModel.load(saved)
    assert host.name == str(saved)
    assert host.tokenizer("w7 w9").input_ids == [7, 9]
    assert host.model.config._attn_implementation == "sdpa"
    assert not host.model.training
    kept = tiny_model("llama")
    with torch.no_grad():
        for parameter in kept.parameters():  # not kept.bfloat16(), which rounds its positions too
            parameter.copy_(parameter.bfloat16())
    ids = random_ids()
    assert torch.equal(host.logits(ids), HostModel(kept).logits(ids))


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("auto", torch.float32),  # on the CPU
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("float64", torch.float64),
    ],
)
def test_dtypes(saved: Path, asked: str, given: torch.dtype) -> None:
    host = HostModel.load(saved, dtype=asked, device="cpu")
    assert host.dtype == given
    assert host.residual_streams(random_ids(), [1])[1].dtype == given


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_checkpoints_own_dtype_is_kept(saved: Path) -> None:
    host = HostModel.load(saved)
    assert host.device.type == "cuda"
    assert host.dtype == torch.bfloat16
    ids = random_ids()
    on_cpu = HostModel.load(saved, device="cpu").cross_entropy(ids).mean()
    assert float(host.cross_entropy(ids).mean()) == pytest.approx(float(on_cpu), rel=0.05)


def test_a_local_folder_never_touches_the_network(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    HostModel.load(saved)


def test_the_bundled_model_is_a_folder_of_the_package(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("groupsae.host.bundled.MODEL", saved, raising=False)
    host = HostModel.load("bundled", device="cpu")
    assert host.name == "bundled"
    assert host.dtype == torch.float32
    assert host.fingerprint() == HostModel.load(saved, device="cpu").fingerprint()


def test_a_folder_without_a_tokenizer_gives_a_model_for_token_ids(copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert HostModel.load(copy).tokenizer is None


# Refusals


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere': there is no such folder"):
        HostModel.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"'\./nowhere': there is no such folder"):
        HostModel.load("./nowhere")


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"host\.name .* has no config\.json\. Give"):
        HostModel.load(tmp_path)


def test_a_name_that_the_hub_cannot_give() -> None:
    with pytest.raises(
        InputError, match=r"host\.name 'nobody/nothing' is no local folder .*hf download"
    ):
        HostModel.load("nobody/nothing")
    with pytest.raises(InputError, match=r"'nobody/nothing' at revision 'step1'"):
        HostModel.load("nobody/nothing", revision="step1")


def test_a_revision_of_a_local_folder(saved: Path) -> None:
    with pytest.raises(InputError, match=r"host\.revision 'main' .*leave the revision out"):
        HostModel.load(saved, revision="main")


def test_an_unknown_dtype(saved: Path) -> None:
    with pytest.raises(InputError, match=r"host\.dtype 'float8' is not one of auto, float32"):
        HostModel.load(saved, dtype="float8")


def test_an_unknown_device(saved: Path) -> None:
    with pytest.raises(InputError, match=r"host\.device 'gpu' is not one of auto, cpu, cuda"):
        HostModel.load(saved, device="gpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_a_cuda_device_that_is_not_there(
    saved: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=rf"host\.device is '{device}', and PyTorch finds 0 CUDA"):
        HostModel.load(saved, device=device)


@pytest.mark.parametrize(
    ("auto_class", "config"),
    [
        ("AutoModelForMaskedLM", transformers.BertConfig(**_SMALL)),
        (
            "AutoModelForMaskedLM",
            transformers.DistilBertConfig(
                vocab_size=VOCAB_SIZE, dim=D_MODEL, hidden_dim=64, n_layers=2, n_heads=4
            ),
        ),
        (
            "AutoModelForSeq2SeqLM",
            transformers.T5Config(
                vocab_size=VOCAB_SIZE, d_model=D_MODEL, d_kv=8, d_ff=64, num_layers=2, num_heads=4
            ),
        ),
    ],
    ids=["bert", "distilbert", "t5"],
)
def test_models_that_are_no_decoders(
    auto_class: str, config: transformers.PretrainedConfig, tmp_path: Path
) -> None:
    random_model(getattr(transformers, auto_class), config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="decoder-only causal language models"):
        HostModel.load(tmp_path)


def test_a_tokenizer_of_another_model(copy: Path) -> None:
    tiny_tokenizer(VOCAB_SIZE + 10).save_pretrained(copy)
    with pytest.raises(InputError, match="is another model's"):
        HostModel.load(copy)


def test_weights_that_are_cut_short(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be loaded"):
        HostModel.load(copy)


def test_weights_that_are_missing(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama").model.save_pretrained(copy)  # without its head
    capfd.readouterr()
    with pytest.raises(InputError, match=r"lack 1 .*\(such as lm_head\.weight\)"):
        HostModel.load(copy)
    assert capfd.readouterr().err == "", "one message, and it is the error"


def test_a_tokenizer_that_is_no_json(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="its tokenizer cannot be loaded"):
        HostModel.load(copy)


def test_weights_of_another_size(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(InputError, match=r"do not fit .* shape \[32, 64\], and \[32, 48\]"):
        HostModel.load(copy)


def test_pickled_weights_are_not_read(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save(tiny_model("llama").state_dict(), copy / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no \*\.safetensors\. .* pickled .* save it again"):
        HostModel.load(copy)


def test_code_that_comes_with_a_model_is_not_run(copy: Path) -> None:
    marker = copy / "ran"
    (copy / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\n")
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config"}}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="runs no code of a model"):
        HostModel.load(copy)
    assert not marker.exists()


def test_a_config_that_is_no_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot be loaded: .*not a valid JSON"):
        HostModel.load(copy)
