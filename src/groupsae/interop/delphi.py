"""A latent cache in the layout that EleutherAI's delphi reads.

One folder per hookpoint (`layers.3`: the block's path under the base model, as sparsify names it),
the width split over files `START_END.safetensors`, END inclusive, of

- `locations`, uint16 or uint32 `[firing, 3]`: context, position in it, latent less START;
- `activations`, float16 `[firing]`;
- `tokens`, int64 `[context, position]`, in every file;

and `config.json` with the fields of delphi's `CacheConfig` and `model_name`. As in the source of
eai-delphi 0.1.3 (`delphi/latents/cache.py` and `loader.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from groupsae.errors import InputError
from groupsae.files import replacing, save_tensors, write_text
from groupsae.interop.metadata import Metadata

CONFIG_FILE = "config.json"


@runtime_checkable
class LatentCache(Protocol):
    """What is needed of a latent cache."""

    @property
    def tokens(self) -> np.ndarray:
        """[context, position]."""

    def d_sae(self, sae_name: str) -> int:
        """How many latents an SAE has."""

    def range(self, sae_name: str, layer: int, start: int, stop: int) -> FiringRange:
        """Firings of the latents from `start` to before `stop`."""


@runtime_checkable
class FiringRange(Protocol):
    """Firings of neighbouring latents, latent after latent, by position within one."""

    @property
    def offsets(self) -> np.ndarray: ...
    @property
    def positions(self) -> np.ndarray: ...
    @property
    def activations(self) -> np.ndarray: ...


def write_delphi(
    directory: Path,
    cache: LatentCache,
    sae_names: Mapping[int, str],
    metadata: Metadata,
    *,
    splits: int = 5,
) -> dict[int, Path]:
    """Write layers of a latent cache for delphi's explainers and scorers: `raw_dir=directory`.

    A group's SAE is written once per member layer, each a hookpoint of its own. Activations are
    rounded to float16, and those of 1e-5 or less dropped, as delphi does; they become float32 where
    one is beyond float16's range. Contexts must be a multiple of delphi's `example_ctx_len` (32).

    Args:
        sae_names: Layer -> name, in the cache, of the SAE to write there.
        splits: Files per layer.

    Returns:
        Each layer's folder.

    Raises:
        InputError: If nothing is to be written, there are more splits than latents, the cache lacks
            an SAE or layer, or something else lies in the way. Then nothing is written.
    """
    if not sae_names:
        raise InputError("--layers: no layer is named to write for delphi")
    for name in sae_names.values():
        if not 1 <= splits <= cache.d_sae(name):
            raise InputError(
                f"splits={splits}: the {cache.d_sae(name)} latents of {name} are split over at "
                "least 1 file and at most as many as there are latents"
            )
    folders = {layer: directory / metadata.hookpoint(layer) for layer in sae_names}
    for folder in folders.values():
        if folder.exists() and not (folder / CONFIG_FILE).exists():
            raise InputError(
                f"{folder} holds something else; remove it, or choose another directory with -o"
            )
    for layer, name in sae_names.items():
        with replacing(folders[layer]) as aside:
            aside.mkdir()
            edges = np.linspace(0, cache.d_sae(name), splits + 1).astype(int).tolist()
            tokens = cache.tokens.astype(np.int64)
            for start, stop in pairwise(edges):
                split = _split(cache.range(name, layer, start, stop), tokens.shape[1])
                path = aside / f"{start}_{stop - 1}.safetensors"
                save_tensors({**split._asdict(), "tokens": tokens}, path)
            config = _config(name, tokens, metadata, splits)
            write_text(aside / CONFIG_FILE, json.dumps(config, indent=4) + "\n")
    return folders


_LEAST = 1e-5  # delphi takes what is not above it for silent


class _Split(NamedTuple):
    """What one file holds besides the tokens."""

    locations: Int[np.ndarray, "firing 3"]
    activations: Float[np.ndarray, " firing"]


def _split(found: FiringRange, context_length: int) -> _Split:
    latents = np.repeat(np.arange(len(found.offsets) - 1), np.diff(found.offsets))
    locations = np.stack([*np.divmod(found.positions, context_length), latents], axis=1)
    kept = found.activations > _LEAST
    locations, activations = locations[kept], found.activations[kept]
    small = locations.max(initial=0) < 2**16
    halves = activations.max(initial=0) <= np.finfo(np.float16).max
    return _Split(
        locations.astype(np.uint16 if small else np.uint32),
        activations.astype(np.float16 if halves else np.float32),
    )


def _config(name: str, tokens: np.ndarray, metadata: Metadata, splits: int) -> dict[str, Any]:
    return {
        "dataset_repo": metadata.dataset,
        "dataset_split": "train",
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": 1,
        "cache_ctx_len": tokens.shape[1],
        "n_tokens": tokens.size,
        "n_splits": splits,
        "model_name": metadata.model_name,
        "groupsae": {"sae": name, "text": "held out from training"},
    }
