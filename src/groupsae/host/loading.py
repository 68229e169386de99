"""Reading a pretrained model and its tokenizer from disk or from the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from groupsae.errors import InputError
from groupsae.host.blocks import PreTrainedModel

PreTrainedTokenizer: TypeAlias = Any  # transformers' PreTrainedTokenizerBase, imported on loading

BUNDLED = "bundled"
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Pretrained:
    """A model in evaluation mode on its device, and its tokenizer if it has one."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizer | None


def load_pretrained(
    name: str | Path, *, revision: str | None, dtype: str, device: str
) -> Pretrained:
    """See `HostModel.load`, which this serves."""
    torch_device = resolve_device(device)
    if dtype not in DTYPES:
        raise InputError(f"host.dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    if dtype == "auto" and torch_device.type == "cpu":
        dtype = "float32"
    source = _source(name, revision)
    loader = _Loader(str(name), source, revision)

    import transformers

    config = loader.read("config", transformers.AutoConfig)
    model_class = _model_class(str(name), config)
    model, report = loader.read(
        "weights",
        model_class,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are in the report
        output_loading_info=True,
    )
    if mismatched := sorted(report["mismatched_keys"]):
        key, found, wanted = mismatched[0]
        raise InputError(
            f"The weight files of host.name {str(name)!r} do not fit its config.json: {key} has "
            f"the shape {list(found)}, and {list(wanted)} is wanted. Put the model's own "
            "config.json beside its weights."
        )
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"The weight files of host.name {str(name)!r} lack {len(missing)} of the weights of "
            f"{type(model).__name__} (such as {missing[0]}), which would be random: give a "
            "complete causal language model."
        )
    tokenizer = (
        loader.read("tokenizer", transformers.AutoTokenizer) if _has_tokenizer(source) else None
    )
    return Pretrained(model.eval().to(torch_device), tokenizer)


def resolve_device(device: str) -> torch.device:
    """The torch device of that name, if this machine has it; "auto" is cuda where there is one.

    Raises:
        InputError: another name, or a device that is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise InputError(f"host.device {device!r} is not one of auto, cpu, cuda, cuda:0, ..., mps.")
    found = torch.device(device)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"host.device is {device!r}, and PyTorch finds {torch.cuda.device_count()} CUDA "
            'devices: use "auto" or "cpu", or install a build of PyTorch for this machine\'s GPU.'
        )
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise InputError('host.device is "mps", which this machine does not have: use "auto".')
    return found


@dataclass(frozen=True)
class _Loader:
    """Reads parts of one pretrained model; what goes wrong becomes one message that names it."""

    name: str
    source: Path | str
    revision: str | None

    def read(self, part: str, reader: Any, **options: Any) -> Any:
        local = isinstance(self.source, Path)
        try:
            with _quiet(bars=not local):
                return reader.from_pretrained(
                    str(self.source),
                    revision=self.revision or "main",
                    local_files_only=local,
                    trust_remote_code=False,
                    **options,
                )
        except Exception as error:  # whatever a library raises on a file that it cannot read
            reason = " ".join(str(error).split())
            if "trust_remote_code" in reason:
                reason = "it brings code of its own, and groupsae runs no code of a model."
            if local:
                raise InputError(
                    f"host.name {self.name!r}: its {part} cannot be loaded: {reason.rstrip('.')}. "
                    "Give the folder of a model that is complete and of a known kind."
                ) from error
            at = f" at revision {self.revision!r}" if self.revision else ""
            raise InputError(
                f"host.name {self.name!r}{at} is no local folder and cannot be loaded from the "
                f"Hugging Face hub: {reason} Check the name, or download the model first "
                f"(`hf download {self.name}`) and give its folder."
            ) from error


@contextmanager
def _quiet(*, bars: bool) -> Iterator[None]:
    """Without what transformers logs beside what it raises and reports; `bars` keeps its bars.

    Reading from a disk is quick and needs no bar; a download keeps its own.
    """
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _source(name: str | Path, revision: str | None) -> Path | str:
    """The folder of a local model, or the name of one on the hub."""
    if name == BUNDLED:
        from groupsae.host.bundled import MODEL

        folder = Path(MODEL)
    else:
        folder = Path(name).expanduser()
        looks_like_a_path = isinstance(name, Path) or re.match(r"[./~\\]|[A-Za-z]:\\", name)
        if not folder.exists() and not looks_like_a_path:
            return str(name)
    if not folder.is_dir():
        raise InputError(f"host.name {str(name)!r}: there is no such folder.")
    if not (folder / "config.json").is_file():
        raise InputError(
            f"host.name {str(name)!r}: the folder has no config.json. Give the folder of a Hugging "
            "Face model: config.json, *.safetensors and the tokenizer's files."
        )
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"host.name {str(name)!r}: the folder has no *.safetensors. Download the weights; if "
            "they are pickled (*.bin, *.pt), load the model with transformers and save it again, "
            "since groupsae unpickles nothing."
        )
    if revision is not None:
        raise InputError(
            f"host.revision {revision!r} belongs to a model on the hub, and host.name "
            f"{str(name)!r} is a local folder: leave the revision out."
        )
    return folder


def _model_class(name: str, config: Any) -> Any:
    import transformers

    if not getattr(config, "is_encoder_decoder", False):
        if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            return transformers.AutoModelForCausalLM
        if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return transformers.AutoModelForImageTextToText
    raise InputError(
        f"host.name {name!r} is a {config.model_type} model: groupsae reads decoder-only causal "
        "language models."
    )


def _has_tokenizer(source: Path | str) -> bool:
    """Whether there is a tokenizer to read. A local model without one is fed token ids."""
    patterns = ("tokenizer*", "vocab.*", "*.tiktoken", "spiece.model")
    return isinstance(source, str) or any(any(source.glob(pattern)) for pattern in patterns)
