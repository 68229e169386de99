"""What is written beside the weights: where an SAE comes from, under the names of each library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic wants it below Python 3.12

from groupsae.errors import InputError
from groupsae.sae import SAE, directory_name

OWN = "groupsae"  # the key under which each format keeps what only this package knows

_TRANSFORMER_LENS = re.compile(r"blocks\.(\d+)\.(.+)")
_MODULE = re.compile(r"(?:.+\.)?(?:layers|layer|h|blocks|block)\.(\d+)(?:\.(.+))?")
_DICTIONARY_LEARNING = re.compile(r"(.+)_layer_(\d+)")


@dataclass(frozen=True)
class Metadata:
    """Where the SAEs of a run come from.

    Attributes:
        model_name: The host model: a name on the hub, or a folder.
        block_path: Where its list of blocks lies in the model: `gpt_neox.layers`.
        context_size: Tokens in one context.
        prepend_bos: Whether each context began with BOS.
        dataset: The text.
        exclude_special_tokens: Whether special tokens were left out.
        amad: Of the partition into groups.
    """

    model_name: str
    block_path: str
    context_size: int
    prepend_bos: bool
    dataset: str
    exclude_special_tokens: bool
    amad: float | None = None

    def hook_name(self, layer: int) -> str:
        """TransformerLens's name of the layer's residual stream."""
        return f"blocks.{layer}.hook_resid_post"

    def hf_hook_name(self, layer: int) -> str:
        """The block's path in the transformers model."""
        return f"{self.block_path}.{layer}"

    def hookpoint(self, layer: int) -> str:
        """The block's path under the base model, as sparsify and delphi name it: `layers.3`."""
        return f"{self.block_path.split('.', 1)[-1]}.{layer}"

    def of_layer(self, sae: SAE, layer: int) -> dict[str, Any]:
        """All that is known of one layer's SAE, for the key `groupsae` of its configuration.

        Latents there are those of the group's SAE over `scale`.
        """
        config = sae.config
        return {
            "version": version(OWN),
            "layer": layer,
            "hook_name": self.hook_name(layer),
            "hf_hook_name": self.hf_hook_name(layer),
            "group": directory_name(sae.layers),
            "group_layers": list(sae.layers),
            "scale": float(sae.scale[sae.layers.index(layer)]),
            **asdict(self),
            "sae": {name: getattr(config, name) for name in _Settings.__annotations__},
        }


class _Settings(TypedDict):
    """What of an :class:`SAEConfig` the formats have no place for."""

    architecture: str
    k: int | None
    prefixes: list[int] | None
    target_l0: float | None
    bandwidth: float | None
    initial_threshold: float | None


def settings_in(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an export of this package says of an SAE's config; None if it is of another program.

    Raises:
        InputError: If it is damaged.
    """
    if OWN not in config:
        return None
    try:
        found = config[OWN]["sae"]
        settings: dict[str, Any] = dict(TypeAdapter(_Settings).validate_python(found, strict=True))
    except (ValidationError, LookupError, TypeError) as error:
        raise InputError(
            f"its key {OWN!r}, which an export wrote, is damaged: {error}; remove the key"
        ) from error
    prefixes = settings["prefixes"]
    return settings | {"prefixes": None if prefixes is None else tuple(prefixes)}


def layer_of(name: str) -> int | None:
    """The layer whose residual stream goes by this name; None where it names no layer.

    Understands TransformerLens (`blocks.3.hook_resid_post`), module paths (`model.layers.3`, `h.3`)
    and dictionary_learning (`resid_post_layer_3`). What enters a block is what the one before
    returned.

    Raises:
        InputError: If the name is that of another place in the model.
    """
    if match := _TRANSFORMER_LENS.fullmatch(name):
        layer, place = int(match[1]), match[2].removeprefix("hook_")
    elif match := _MODULE.fullmatch(name):
        layer, place = int(match[1]), match[2] or "resid_post"
    elif match := _DICTIONARY_LEARNING.fullmatch(name):
        layer, place = int(match[2]), match[1]
    else:
        return None
    if place == "resid_pre" and layer > 0:
        return layer - 1
    if place != "resid_post":
        raise InputError(
            f"it reads {name}, which is not the residual stream that a block returns; only SAEs of "
            "residual streams are of use here"
        )
    return layer
