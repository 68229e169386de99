"""SAELens: one folder per SAE, `cfg.json` and `sae_weights.safetensors`.

batchtopk and matryoshka are jumprelu there, with the same threshold for every latent, as in
SAELens's own exports for inference. Facts of the format: SAELens 6.54.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from groupsae.architectures import BY_BATCH
from groupsae.errors import InputError
from groupsae.interop.fold import Folded, folded, training_options
from groupsae.interop.metadata import OWN, Metadata, layer_of, settings_in
from groupsae.interop.reading import checked, option, read_config, read_safetensors
from groupsae.interop.writing import write_config_and_weights
from groupsae.sae import SAE, SAEConfig

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"

_VERSION = "6.54.12"  # whose format is written; without one SAELens takes it for one before 6.0
_NAMES = {  # of ours
    "relu": "standard",
    "topk": "topk",
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
    "jumprelu": "jumprelu",
    "gated": "gated",
}
_HERE = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
_TRAINING = ("batchtopk", "matryoshka_batchtopk")
_OLD_KEYS = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}


def write(folder: Path, sae: SAE, layer: int, metadata: Metadata) -> None:
    """Write one layer's SAE into `folder`, for `sae_lens.SAE.load_from_disk`."""
    one = folded(sae, layer)
    architecture = one.config.architecture
    weights = {"W_enc": one.W_enc.T, "W_dec": one.W_dec, "b_dec": one.b_dec}
    if architecture == "gated":
        assert one.r_mag is not None
        assert one.b_gate is not None
        weights |= {"b_mag": one.b_enc, "b_gate": one.b_gate, "r_mag": one.r_mag}
    else:
        weights["b_enc"] = one.b_enc
    if one.threshold is not None:
        weights["threshold"] = one.threshold.expand(one.config.d_sae)
    of_topk = {"k": one.config.k, "rescale_acts_by_decoder_norm": False}
    config = {
        "architecture": _NAMES[architecture],
        "d_in": one.config.d_model,
        "d_sae": one.config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **(of_topk if architecture == "topk" else {}),
        "metadata": {
            "sae_lens_version": _VERSION,
            "sae_lens_training_version": None,
            "model_name": metadata.model_name,
            "model_class_name": "HookedTransformer",
            # TransformerLens would else take each residual stream's mean over d_model off
            "model_from_pretrained_kwargs": {"center_writing_weights": False},
            "hook_name": metadata.hook_name(layer),
            "hook_head_index": None,
            "hf_hook_name": metadata.hf_hook_name(layer),
            "context_size": metadata.context_size,
            "prepend_bos": metadata.prepend_bos,
            "dataset_path": metadata.dataset,
            "exclude_special_tokens": metadata.exclude_special_tokens,
            OWN: metadata.of_layer(sae, layer),
        },
    }
    write_config_and_weights(folder / CONFIG_FILE, config, folder / WEIGHTS_FILE, weights)


def read(folder: Path, layer: int | None = None) -> SAE:
    """Read an SAE that SAELens, or an export, has written.

    Args:
        layer: Whose residual stream it reads; by default as its metadata say.

    Raises:
        InputError: If it cannot be read, or is of a kind that does not exist here.
    """
    config = _modern(read_config(folder / CONFIG_FILE))
    metadata = option(config, "metadata", dict, {})
    architecture = _architecture(config)
    d_model, d_sae = option(config, "d_in", int), option(config, "d_sae", int)
    shapes = {"W_enc": (d_model, d_sae), "W_dec": (d_sae, d_model), "b_dec": (d_model,)}
    shapes |= dict.fromkeys(_vectors(architecture), (d_sae,))
    old = {"scaling_factor": (d_sae,)}  # ones, where an early SAELens did not finetune them
    tensors = checked(read_safetensors(folder / WEIGHTS_FILE), shapes, old)
    if bool((tensors.get("scaling_factor", torch.ones(1)) != 1).any()):
        raise InputError("its latents have a finetuned scaling_factor, which does not exist here")
    hook_name = metadata.get("hook_name")
    named = layer_of(hook_name) if isinstance(hook_name, str) else None
    layer = named if layer is None else layer
    if layer is None:
        raise InputError("its metadata name no layer; say which layer it is of")
    settings = _settings(config, architecture, settings_in(metadata), tensors)
    one = Folded(
        SAEConfig(d_model=d_model, d_sae=d_sae, layers=(layer,), **settings),
        W_enc=tensors["W_enc"].T.contiguous(),
        b_enc=tensors["b_mag" if architecture == "gated" else "b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        threshold=tensors.get("threshold"),
        r_mag=tensors.get("r_mag"),
        b_gate=tensors.get("b_gate"),
    )
    if one.threshold is not None and settings["architecture"] in BY_BATCH:
        one = replace(one, threshold=one.threshold[0])
    if not option(config, "apply_b_dec_to_input", bool, True):
        one = one.shifted(one.b_dec)
    if option(config, "rescale_acts_by_decoder_norm", bool, False):
        one = one.with_unit_rows()
    return one.sae()


def _vectors(architecture: str) -> tuple[str, ...]:
    if architecture == "gated":
        return ("b_gate", "b_mag", "r_mag")
    return ("b_enc", "threshold") if architecture == "jumprelu" else ("b_enc",)


def _architecture(config: Mapping[str, Any]) -> str:
    """Ours of a configuration, if there is one."""
    name = option(config, "architecture", str, "standard")
    if name in _TRAINING:
        raise InputError(
            f"it is a checkpoint in the middle of SAELens's training (architecture {name!r}), "
            "without the threshold of inference; write it with save_inference_model"
        )
    if name not in _HERE:
        raise InputError(
            f"its architecture {name!r} is none that exists here; of SAELens's these do: "
            f"{', '.join(_HERE)}"
        )
    normalization = option(config, "normalize_activations", str, "none")
    if normalization == "expected_average_only_in":
        raise InputError(
            "its activations are scaled by a factor that is not in the folder "
            "(normalize_activations 'expected_average_only_in'); fold it in with "
            "fold_activation_norm_scaling_factor(factor) and save_model in SAELens"
        )
    if normalization != "none":
        raise InputError(
            f"it normalises every token's activations (normalize_activations {normalization!r}), "
            "which is not done here"
        )
    if option(config, "reshape_activations", str, "none") != "none":
        raise InputError("it reads an attention's heads (reshape_activations), no residual stream")
    activation = option(config, "activation_fn", str, "relu")
    if activation not in ("relu", "topk"):
        raise InputError(f"its activation function {activation!r} does not exist here")
    return _HERE[name]


def _settings(
    config: Mapping[str, Any],
    architecture: str,
    exported: Mapping[str, Any] | None,
    tensors: Mapping[str, Any],
) -> dict[str, Any]:
    """The options of its config here.

    Args:
        exported: What an export has noted of them: believed where the weights allow it.
    """
    if exported is not None and _HERE.get(_NAMES.get(exported["architecture"], "")) == architecture:
        threshold = tensors.get("threshold")
        same = threshold is None or bool((threshold == threshold[0]).all())
        if same or exported["architecture"] not in BY_BATCH:
            return {**exported, "k": option(config, "k", int, exported["k"])}
    if architecture == "topk":
        return {"architecture": "topk", "k": option(config, "k", int)}
    if architecture == "jumprelu":
        bandwidth = option(config, "jumprelu_bandwidth", float, 0.001)
        return {"architecture": "jumprelu", **training_options(bandwidth)}
    return {"architecture": architecture}


def _modern(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration in the form of SAELens 6: until then the metadata stood among the rest."""
    metadata = config.get("metadata")
    version = config.get("sae_lens_version") or (
        metadata.get("sae_lens_version") if isinstance(metadata, dict) else None
    )
    major = version.split(".")[0] if isinstance(version, str) else ""
    if major.isdecimal() and int(major) >= 6:
        return dict(config)
    old = {_OLD_KEYS.get(key, key): value for key, value in config.items() if value is not None}
    kwargs = old.get("activation_fn_kwargs")
    if old.get("activation_fn") == "topk" and isinstance(kwargs, dict):
        old |= {"architecture": "topk", "k": kwargs.get("k")}
    if isinstance(old.get("normalize_activations"), bool):
        scaled = old["normalize_activations"]
        old["normalize_activations"] = "expected_average_only_in" if scaled else "none"
    return {**old, "metadata": {"hook_name": old.get("hook_name")}}
