"""sparsify: one folder per hookpoint, `cfg.json` and `sae.safetensors`; delphi reads the same.

It knows topk alone. Facts of the format: eai-sparsify 1.3.3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from groupsae.errors import InputError
from groupsae.interop.fold import Folded, folded
from groupsae.interop.metadata import OWN, Metadata, layer_of
from groupsae.interop.reading import checked, option, read_config, read_safetensors
from groupsae.interop.writing import write_config_and_weights
from groupsae.sae import SAE, SAEConfig

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae.safetensors"


def write(folder: Path, sae: SAE, layer: int, metadata: Metadata) -> None:
    """Write one layer's SAE into `folder`, for `sparsify.SparseCoder.load_from_disk`.

    Raises:
        InputError: If it is no topk SAE.
    """
    if sae.config.architecture != "topk":
        raise InputError(
            f"sparsify cannot express an SAE of architecture {sae.config.architecture}: it keeps "
            "the k largest latents of each token, and knows no thresholds or gates; export to "
            "sae-lens or dictionary-learning"
        )
    one = folded(sae, layer)
    norms = one.W_dec.float().norm(dim=1)
    config = {
        "activation": "topk",
        "expansion_factor": max(one.config.d_sae // one.config.d_model, 1),
        "normalize_decoder": torch.allclose(norms, torch.ones_like(norms), rtol=1e-3),
        "num_latents": one.config.d_sae,
        "k": one.config.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": one.config.d_model,
        OWN: metadata.of_layer(sae, layer),
    }
    weights = {
        "encoder.weight": one.W_enc,
        "encoder.bias": one.b_enc,
        "W_dec": one.W_dec,
        "b_dec": one.b_dec,
    }
    write_config_and_weights(folder / CONFIG_FILE, config, folder / WEIGHTS_FILE, weights)


def read(folder: Path, layer: int | None = None) -> SAE:
    """Read an SAE that sparsify, or an export, has written.

    Args:
        layer: Whose residual stream it reads; by default as the folder's name says.

    Raises:
        InputError: If it cannot be read, or is of a kind that does not exist here.
    """
    config = read_config(folder / CONFIG_FILE)
    named = layer_of(folder.name)
    layer = named if layer is None else layer
    if layer is None:
        raise InputError(
            f"its folder's name {folder.name!r} is no module path such as layers.3; say which "
            "layer it is of"
        )
    _refuse_other_kinds(config)
    k = option(config, "k", int)
    d_model, d_sae = sizes(config)
    return from_tensors(
        read_safetensors(folder / WEIGHTS_FILE),
        SAEConfig(d_model=d_model, d_sae=d_sae, layers=(layer,), k=k),
    )


def sizes(config: dict[str, Any]) -> tuple[int, int]:
    """d_model and d_sae of a `cfg.json`."""
    d_model, stated = option(config, "d_in", int), option(config, "num_latents", int, 0)
    return d_model, stated or d_model * option(config, "expansion_factor", int)


def from_tensors(tensors: dict[str, torch.Tensor], config: SAEConfig) -> SAE:
    """The SAE of sparsify's tensors; of jumprelu with `log_threshold`, as Group-SAE has it.

    Raises:
        InputError: If tensors are missing, or are others.
    """
    d_model, d_sae = config.d_model, config.d_sae
    shapes = {
        "encoder.weight": (d_sae, d_model),
        "encoder.bias": (d_sae,),
        "W_dec": (d_sae, d_model),
        "b_dec": (d_model,),
    }
    if config.architecture == "jumprelu":
        shapes["log_threshold"] = (d_sae,)
    found = checked(tensors, shapes)
    return Folded(
        config,
        W_enc=found["encoder.weight"],
        b_enc=found["encoder.bias"],
        W_dec=found["W_dec"],
        b_dec=found["b_dec"],
        threshold=found["log_threshold"].double().exp() if "log_threshold" in found else None,
    ).sae()


def _refuse_other_kinds(config: dict[str, Any]) -> None:
    """Refuse what is more or other than a topk autoencoder. (multi_topk is a loss: it may be.)"""
    activation = option(config, "activation", str, "topk")
    if activation != "topk":
        raise InputError(f"its activation {activation!r} does not exist here: only topk does")
    for key, what in (
        ("transcode", "a transcoder: it predicts a module's output from its input"),
        ("skip_connection", "an SAE with a skip connection, which does not exist here"),
        ("signed", "an SAE of signed latents, which do not exist here"),
    ):
        if option(config, key, bool, False):
            raise InputError(f"it is {what} ({key} is true)")
