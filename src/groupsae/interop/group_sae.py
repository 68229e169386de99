"""The published Group-SAE weights: `baseline/layers.N` and `cluster/kG-cI`, read only.

Each folder is like one of sparsify, with jumprelu or relu besides topk. An SAE sees x times its
layer's factor in `scaling_factors.pt`, which lies in the folder above or the one above that. The
member layers of `kG-cI` are those that the trainer's `config.json` beside it lists under
`clusters`. Source: github.com/ghidav/group-sae (Ghilardi et al. 2025, arXiv 2410.21508).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from groupsae.errors import InputError
from groupsae.interop.fold import training_options
from groupsae.interop.metadata import layer_of
from groupsae.interop.reading import option, read_config, read_pickle, read_safetensors
from groupsae.interop.sparsify import CONFIG_FILE, WEIGHTS_FILE, from_tensors, sizes
from groupsae.sae import SAE, SAEConfig

SCALES_FILE = "scaling_factors.pt"

_TRAINER_FILE = "config.json"
_CLUSTER = re.compile(r"k\d+-c\d+")


def read(folder: Path, layers: tuple[int, ...] | None = None) -> SAE:
    """Read a published SAE, with the scale of each of its layers.

    Args:
        layers: Its member layers; by default as the folder's name or the trainer's file says.

    Raises:
        InputError: If it cannot be read, or layers or factors are not to be found.
    """
    config = read_config(folder / CONFIG_FILE)
    layers = layers or _layers(folder)
    k, jumprelu = option(config, "k", int), option(config, "jumprelu", bool, False)
    options: dict[str, Any] = {"architecture": "relu"}
    if k > 0:
        options = {"architecture": "topk", "k": k}
    if jumprelu:
        if k > 0:
            raise InputError(f"its configuration asks for jumprelu and k = {k} at once")
        bandwidth = option(config, "jumprelu_bandwidth", float, 0.001)
        options = {"architecture": "jumprelu", **training_options(bandwidth)}
    tensors = {
        name: tensor.squeeze() for name, tensor in read_safetensors(folder / WEIGHTS_FILE).items()
    }
    d_model, d_sae = sizes(config)
    shape = SAEConfig(d_model=d_model, d_sae=d_sae, layers=layers, **options)
    sae = from_tensors(tensors, shape)
    sae.scale.copy_(_scales(folder, layers))
    return sae


def scales_file(folder: Path) -> Path | None:
    """Where the factors of the SAE in `folder` lie; None if nowhere."""
    places = (folder, folder.parent, folder.parent.parent)
    return next((place / SCALES_FILE for place in places if (place / SCALES_FILE).is_file()), None)


def _layers(folder: Path) -> tuple[int, ...]:
    if not _CLUSTER.fullmatch(folder.name):
        layer = layer_of(folder.name)
        if layer is None:
            raise InputError(
                f"its folder's name {folder.name!r} is neither layers.N nor kG-cI; say which "
                "layers it is of"
            )
        return (layer,)
    path = folder.parent / _TRAINER_FILE
    clusters = option(read_config(path), "clusters", dict, {}) if path.is_file() else {}
    members = clusters.get(folder.name)
    if not isinstance(members, list) or not all(str(layer).isdecimal() for layer in members):
        raise InputError(
            f"which layers {folder.name} is of is not to be found: {path} lists no clusters; say "
            "which they are"
        )
    return tuple(sorted(int(layer) for layer in members))


def _scales(folder: Path, layers: tuple[int, ...]) -> Float[Tensor, " layer"]:
    path = scales_file(folder)
    if path is None:
        return _unscaled(folder, layers)
    factors = {_layer_in(name): value for name, value in read_pickle(path).items()}
    missing = [layer for layer in layers if layer not in factors]
    if missing:
        raise InputError(f"{path} has no factor for the layers {', '.join(map(str, missing))}")
    values = [torch.as_tensor(factors[layer]).flatten().tolist() for layer in layers]
    if not all(len(value) == 1 and 0 < value[0] < math.inf for value in values):
        raise InputError(f"{path} has the factors {values}, which are not all positive numbers")
    return torch.tensor(values).squeeze(1)


def _unscaled(folder: Path, layers: tuple[int, ...]) -> Float[Tensor, " layer"]:
    """Ones, if the trainer's file says that nothing was scaled."""
    path = folder.parent / _TRAINER_FILE
    config = read_config(path) if path.is_file() else {"normalize_activations": "?"}
    if config.get("normalize_activations"):
        raise InputError(
            f"its {SCALES_FILE} is missing: each layer's activations are multiplied by a factor; "
            f"put that file of the same repository into {folder.parent}"
        )
    return torch.ones(len(layers))


def _layer_in(name: str) -> int | None:
    last = name.rsplit(".", 1)[-1]
    return int(last) if last.isdecimal() else None
