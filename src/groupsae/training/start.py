"""Starting from a trained run: SAEs from its SAEs, and text behind what it has read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from groupsae.config import Config
from groupsae.directory import read_json, stored_config, trained
from groupsae.errors import InputError
from groupsae.host.ahead import ContextsAhead
from groupsae.host.model import HostModel
from groupsae.host.tokens import TokenStream
from groupsae.sae import SAE, SAEConfig
from groupsae.sae.autoencoder import CONFIG_FILE
from groupsae.training.activation_cache import CachedActivations
from groupsae.training.exchange import SharedContexts

_PER_LAYER = ("mean", "scale", "threshold", "log_threshold", "latent_bias", "gain_in", "gain_out")


class Source(NamedTuple):
    """An SAE to start from, as its `cfg.json` describes it."""

    name: str
    layers: tuple[int, ...]
    d_sae: int
    architecture: str
    per_layer_threshold: bool


@dataclass(frozen=True)
class Start:
    """The trained run that `training.init_from` names; made by :func:`open_start`.

    Attributes:
        path: Its directory.
        config: Its own.
        sources: Its SAEs.
        contexts_read: How many contexts of its training text it has read.
        text_place: Place in the text behind all that it can have read.
        cache_place: Place in the activation cache that it was trained from, and the order in which
            it read that; None where it ran the host model.
    """

    path: Path
    config: Config
    sources: tuple[Source, ...]
    contexts_read: int
    text_place: Mapping[str, Any]
    cache_place: Mapping[str, Any] | None

    def sae(self, shape: SAEConfig, affine: str) -> SAE:
        """An SAE of this shape that is the same function as its source at its layers.

        Args:
            affine: What `sae.affine` is to be.

        Raises:
            InputError: As :meth:`source_of`; or if the source cannot be read.
        """
        source = SAE.load(self.path / "saes" / self.source_of(shape, affine).name)
        weights = {name: _rows(name, w, source, shape) for name, w in source.state_dict().items()}
        sae = SAE(
            shape,
            mean=weights["mean"],
            scale=weights["scale"],
            generator=torch.Generator(),  # of weights to be overwritten; the global one stays
        )
        sae.load_state_dict(weights)
        return sae

    def source_of(self, shape: SAEConfig, affine: str) -> Source:
        """The SAE of the same layers, else the smallest that has them all.

        Raises:
            InputError: If there is none, or it is of another size or kind.
        """
        holding = [source for source in self.sources if set(shape.layers) <= set(source.layers)]
        if not holding:
            have = "; ".join(_listed(source.layers) for source in self.sources)
            raise InputError(
                f"training.init_from={self.path} has no SAE of layers {_listed(shape.layers)}: its "
                f"SAEs are of layers {have}; give such groups by grouping.partition, or name "
                "another run"
            )
        source = min(holding, key=lambda source: len(source.layers))
        self._refuse("d_sae", source, source.d_sae, shape.d_sae)
        self._refuse("architecture", source, source.architecture, shape.architecture)
        self._refuse("affine", source, self.config.sae.affine, affine)
        own = source.per_layer_threshold and not shape.per_layer_threshold
        if own and len(shape.layers) > 1:  # which of its thresholds would all layers have?
            self._refuse("per_layer_threshold", source, True, False)
        return source

    def tokens_read(self, stream: TokenStream) -> int:
        """How many tokens of this text the run was trained on, from the beginning; 0 of another."""
        return self.contexts_read * stream.context_length if stream.is_of(self.text_place) else 0

    def go_on(self, contexts: TokenStream | CachedActivations) -> int:
        """Move a text, or a cache of its activations, behind what the run has read of it.

        Returns:
            How many tokens are passed over: none of another text, which begins where it stands.

        Raises:
            InputError: If the run was trained from a cache of the same text with other files.
        """
        if isinstance(contexts, TokenStream):
            if not contexts.is_of(self.text_place):
                return 0
            contexts.load_state_dict(self.text_place)
            return contexts.tokens_seen
        if contexts.manifest.stream["corpus"] != self.text_place["corpus"]:
            return 0
        if self.cache_place is not None:
            contexts.shuffle, contexts.seed = self.cache_place["shuffle"], self.cache_place["seed"]
            contexts.load_state_dict(self.cache_place)
        else:  # in the order of the text, of which the run has read the beginning
            place = {"handed_out": self.contexts_read, "shards": 0, "contexts": 0}
            contexts.load_state_dict(place)
        return self.contexts_read * contexts.context_length

    def _refuse(self, key: str, source: Source, has: object, asked: object) -> None:
        if has != asked:
            raise InputError(
                f"sae.{key}: {asked} is asked for, but {source.name} in training.init_from="
                f"{self.path} has {has}; set sae.{key}={str(has).lower()}, or name another run"
            )


def open_start(config: Config, host: HostModel) -> Start | None:
    """What `training.init_from` names; None where it names nothing.

    Raises:
        InputError: If it is not the directory of a trained run, or of one of another host model.
    """
    if config.training.init_from is None:
        return None
    path = Path(config.training.init_from)
    own = None if trained(path) is None else stored_config(path)
    if own is None:
        raise InputError(
            f"training.init_from={path} holds no finished training; name a run whose stage 'train' "
            "is done"
        )
    there, here = (own.provenance or {}).get("host_fingerprint"), host.fingerprint()
    if there != here:
        raise InputError(
            f"training.init_from={path} is of another host model: {own.host.name}, whose "
            f"fingerprint is {str(there)[:12]}; that of host.name={host.name} in {host.dtype} is "
            f"{here[:12]}. Its SAEs fit that model alone; name a run of this one"
        )
    summary = read_json(
        path / "training.json",
        saes=list[str],
        contexts_read=int,
        text_place=dict[str, Any],
        cache_place=dict[str, Any] | None,
    )
    return Start(
        path=path,
        config=own,
        sources=tuple(_source(path / "saes", name) for name in summary["saes"]),
        contexts_read=summary["contexts_read"],
        text_place=summary["text_place"],
        cache_place=summary["cache_place"],
    )


def text_read(contexts: ContextsAhead | SharedContexts | CachedActivations) -> dict[str, Any]:
    """What `training.json` says of the text that training has read: see :class:`Start`.

    And what was passed over up to there by `tokens.on_error`, by kind.
    """
    place = contexts.state_dict()
    if isinstance(contexts, CachedActivations):
        return {
            "contexts_read": place["handed_out"],
            "text_place": contexts.manifest.stream,
            "cache_place": {**place, "shuffle": contexts.shuffle, "seed": contexts.seed},
            "skipped_documents": contexts.skipped,
        }
    return {
        "contexts_read": place["tokens_seen"] // contexts.context_length,
        "text_place": place,
        "cache_place": None,
        "skipped_documents": contexts.skipped,
    }


def _source(saes: Path, name: str) -> Source:
    stored = read_json(
        saes / name / CONFIG_FILE,
        layers=list[int],
        d_sae=int,
        architecture=str,
        per_layer_threshold=bool,
    )
    return Source(
        name,
        tuple(stored["layers"]),
        stored["d_sae"],
        stored["architecture"],
        stored["per_layer_threshold"],
    )


def _rows(name: str, tensor: Tensor, source: SAE, shape: SAEConfig) -> Tensor:
    """A parameter for the member layers of `shape`."""
    if name not in _PER_LAYER:
        return tensor
    if name == "log_threshold" and not source.config.per_layer_threshold:
        return tensor.expand(len(shape.layers) if shape.per_layer_threshold else 1, -1)
    return tensor[[source.layers.index(layer) for layer in shape.layers]]


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))
