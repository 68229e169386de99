"""dictionary_learning: one folder per dictionary, `ae.pt` (a torch state dict) and `config.json`.

Facts of the format: dictionary-learning 0.1.0.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groupsae.errors import InputError
from groupsae.files import write_json
from groupsae.interop.fold import Folded, folded, training_options
from groupsae.interop.metadata import OWN, Metadata, layer_of, settings_in
from groupsae.interop.reading import checked, option, read_config, read_pickle
from groupsae.sae import SAE, SAEConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "ae.pt"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Class:
    """How one of its classes stores an SAE.

    Attributes:
        names: Its tensor for each of ours.
        turned: Ours that lie there transposed.
        subtracts: Whether its encoder sees x - b_dec, or x alone.
        normalizes: Whether its loader gives decoder rows unit norm.
    """

    architecture: str
    names: Mapping[str, str]
    turned: tuple[str, ...]
    subtracts: bool = True
    normalizes: bool = False


_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_CLASSES = {
    "AutoEncoder": _Class("relu", {**_LINEAR, "b_dec": "bias"}, ("W_dec",), normalizes=True),
    "AutoEncoderNew": _Class(
        "relu", {**_LINEAR, "b_dec": "decoder.bias"}, ("W_dec",), subtracts=False
    ),
    "AutoEncoderTopK": _Class("topk", {**_LINEAR, "b_dec": "b_dec"}, ("W_dec",)),
    "BatchTopKSAE": _Class("batchtopk", {**_LINEAR, "b_dec": "b_dec"}, ("W_dec",)),
    "MatryoshkaBatchTopKSAE": _Class("matryoshka", _PLAIN, ("W_enc",)),
    "JumpReluAutoEncoder": _Class(
        "jumprelu", {**_PLAIN, "threshold": "threshold"}, ("W_enc",), subtracts=False
    ),
    "GatedAutoEncoder": _Class(
        "gated",
        {
            **{"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_dec": "decoder_bias"},
            **{"b_enc": "mag_bias", "b_gate": "gate_bias", "r_mag": "r_mag"},
        },
        ("W_dec",),
    ),
}
_BY_COUNT = ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")
_FOR = {of.architecture: name for name, of in reversed(_CLASSES.items())}


def write(folder: Path, sae: SAE, layer: int, metadata: Metadata) -> None:
    """Write one layer's SAE into `folder`, for `dictionary_learning.utils.load_dictionary`."""
    one = folded(sae, layer)
    name = _FOR[one.config.architecture]
    of = _CLASSES[name]
    if of.normalizes:
        one = _normalized(one)
    if not of.subtracts:
        one = one.shifted(-one.b_dec)
    weights = {theirs: getattr(one, ours) for ours, theirs in of.names.items()}
    for ours in of.turned:
        weights[of.names[ours]] = weights[of.names[ours]].T
    weights = {theirs: tensor.float().contiguous() for theirs, tensor in weights.items()}
    trainer: dict[str, Any] = {}
    if name in _BY_COUNT:
        unset = torch.tensor(-1.0)
        weights["k"] = torch.tensor(one.config.k, dtype=torch.int32)
        weights["threshold"] = unset if one.threshold is None else one.threshold.float()
        trainer["k"] = one.config.k
    if one.config.prefixes is not None:
        ends = (0, *one.config.prefixes)
        trainer["group_sizes"] = [end - start for start, end in pairwise(ends)]
        weights["group_sizes"] = torch.tensor(trainer["group_sizes"])
    config = {
        "trainer": {
            "trainer_class": OWN,
            "dict_class": name,
            "activation_dim": one.config.d_model,
            "dict_size": one.config.d_sae,
            **trainer,
            "layer": layer,
            "lm_name": metadata.model_name,
            "submodule_name": submodule_name(layer),
            "device": "cpu",
        },
        "buffer": {
            "d_submodule": one.config.d_model,
            "io": "out",
            "ctx_len": metadata.context_size,
        },
        OWN: metadata.of_layer(sae, layer),
    }
    file = io.BytesIO()  # so that a full disk is an OSError, which torch.save's is not
    torch.save(weights, file)
    (folder / WEIGHTS_FILE).write_bytes(file.getbuffer())
    write_json(folder / CONFIG_FILE, config)


def submodule_name(layer: int) -> str:
    """Its trainers' name for a layer's residual stream."""
    return f"resid_post_layer_{layer}"


def read(folder: Path, layer: int | None = None) -> SAE:
    """Read an SAE that dictionary_learning, or an export, has written.

    Args:
        layer: Whose residual stream it reads; by default as its configuration says.

    Raises:
        InputError: If it cannot be read, or is of a kind that does not exist here.
    """
    config = read_config(folder / CONFIG_FILE)
    trainer = option(config, "trainer", dict)
    name = option(trainer, "dict_class", str)
    if name not in _CLASSES:
        raise InputError(
            f"its class {name!r} is none that exists here; of dictionary_learning's these do: "
            f"{', '.join(_CLASSES)}"
        )
    of = _CLASSES[name]
    d_model, d_sae = option(trainer, "activation_dim", int), option(trainer, "dict_size", int)
    content = read_pickle(folder / WEIGHTS_FILE)
    extra: dict[str, Any] = {}
    for key in ("k", "group_sizes"):
        if key in content:
            extra[key] = torch.as_tensor(content.pop(key)).tolist()
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_sae, d_model),
        "W_dec": (d_sae, d_model),
        "b_dec": (d_model,),
    }
    shapes |= {ours: (d_sae,) for ours in of.names if ours not in shapes}
    for ours in of.turned:
        shapes[ours] = shapes[ours][::-1]
    tensors = checked(
        content,
        {theirs: shapes[ours] for ours, theirs in of.names.items()},
        {"threshold": ()} if name in _BY_COUNT else None,
    )
    ours_of = {ours: tensors[theirs] for ours, theirs in of.names.items()}
    ours_of |= {ours: ours_of[ours].T.contiguous() for ours in of.turned}
    if of.architecture in ("batchtopk", "matryoshka"):
        ours_of["threshold"] = _inference_threshold(tensors, folder)
    one = Folded(
        SAEConfig(
            d_model=d_model,
            d_sae=d_sae,
            layers=(_layer(trainer) if layer is None else layer,),
            **_settings(of, trainer, extra, settings_in(config) or {}),
        ),
        **ours_of,
    )
    if not of.subtracts:
        one = one.shifted(one.b_dec)
    return (_normalized(one) if of.normalizes else one).sae()


def _normalized(one: Folded) -> Folded:
    """With decoder rows of unit norm, as the loader of AutoEncoder makes them where they differ."""
    norms = one.W_dec.norm(dim=1)
    return one if torch.allclose(norms, torch.ones_like(norms)) else one.with_unit_rows()


def _layer(trainer: Mapping[str, Any]) -> int:
    submodule = trainer.get("submodule_name")
    named = layer_of(submodule) if isinstance(submodule, str) else None
    if named is not None:
        return named
    stated = trainer.get("layer")
    if not isinstance(stated, int) or stated < 0:
        raise InputError("its configuration names no layer; say which layer it is of")
    return stated


def _settings(
    of: _Class, trainer: Mapping[str, Any], extra: Mapping[str, Any], exported: Mapping[str, Any]
) -> dict[str, Any]:
    """The options of its config here.

    Args:
        extra: What of its weights are no weights: k and the sizes of matryoshka's groups.
        exported: What an export has noted.
    """
    if of.architecture == "jumprelu":
        bandwidth = option(trainer, "bandwidth", float, 0.001)
        noted = exported if exported.get("architecture") == "jumprelu" else {}
        return {**training_options(bandwidth), **noted, "architecture": "jumprelu"}
    settings: dict[str, Any] = {"architecture": of.architecture}
    if of.architecture in ("topk", "batchtopk", "matryoshka"):
        settings["k"] = option({"k": trainer.get("k"), **extra}, "k", int)
    if of.architecture == "matryoshka":
        sizes = option({"group_sizes": trainer.get("group_sizes"), **extra}, "group_sizes", list)
        if not all(isinstance(size, int) for size in sizes):
            raise InputError(f"its group_sizes are {sizes}, not all whole numbers")
        settings["prefixes"] = tuple(accumulate(sizes))
    return settings


def _inference_threshold(tensors: Mapping[str, Tensor], folder: Path) -> Tensor:
    threshold = tensors.get("threshold", torch.tensor(-1.0))
    if threshold < 0:
        _log.warning(
            "%s: its threshold was never set (training ended before threshold_start_step): every "
            "positive latent is active, as in dictionary_learning itself",
            folder,
        )
    return threshold
