"""The latent cache: where every latent of chosen SAEs fires, and how strongly, on disk.

A folder with `cache.json` (of which model, text and SAEs it is), `tokens.safetensors` (`tokens`,
int32 `[context, position]`) and a folder `SAE/layer-03` for every SAE and layer:

- `index.safetensors`: of every latent `offsets` (int64, d_sae + 1 of them), `mean` and `maximum` of
  its activation, the `first` and `last` position where it fires;
- `latents-00000-00511.safetensors` and so on: `positions` (int32) and `activations` (float32) of
  the latents that the name tells, latent after latent, and by position within a latent. Latent i's
  lie at offsets[i] to offsets[i + 1] of all files together.

A position counts all tokens of the cache: `divmod(position, context_length)` is the context and the
token's place in it.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from groupsae.errors import InputError

MANIFEST_FILE = "cache.json"
TOKENS_FILE = "tokens.safetensors"
INDEX_FILE = "index.safetensors"

DEFINITIONS = {
    "tokens": "tokens on which latents were looked at: special ones are left out where "
    "tokens.exclude_special holds",
    "excluded_special_tokens": "special tokens that were left out",
    "position": "number of a token among all tokens of the cache: its context times "
    "context_length, plus its place there",
    "activation": "value of an active latent, in the units of the normalised residual stream "
    "s_l (x - m_l)",
    "density": "share of the tokens on which a latent is active",
    "mean": "mean activation over the tokens on which a latent is active; 0 where it is silent",
    "maximum": "largest activation; 0 where a latent is silent",
    "first, last": "first and last position at which a latent is active; -1 where it is silent",
}


class Firings(NamedTuple):
    """Where one latent fires, from the first token on, and how strongly."""

    positions: Int32[np.ndarray, " firing"]
    activations: Float32[np.ndarray, " firing"]


class FiringRange(NamedTuple):
    """Firings of neighbouring latents: the i-th one's lie at offsets[i] to offsets[i + 1]."""

    offsets: Int64[np.ndarray, " offset"]
    positions: Int32[np.ndarray, " firing"]
    activations: Float32[np.ndarray, " firing"]


class Index(NamedTuple):
    """What is known of each latent of one SAE at one layer: see :data:`DEFINITIONS`."""

    offsets: Int64[np.ndarray, " offset"]
    mean: Float32[np.ndarray, " d_sae"]
    maximum: Float32[np.ndarray, " d_sae"]
    first: Int32[np.ndarray, " d_sae"]
    last: Int32[np.ndarray, " d_sae"]

    @property
    def counts(self) -> Int64[np.ndarray, " d_sae"]:
        """On how many tokens each latent is active."""
        return np.diff(self.offsets)


class LatentCache:
    """Reads a latent cache.

    Firings are read from the disk when they are asked for; tokens and indices stay in memory.

    Args:
        path: The folder that :func:`groupsae.interpretation.cache_pass.write_latent_cache` wrote.

    Raises:
        InputError: If it holds no latent cache, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = _read_manifest(path)
        self._of = {(entry.sae, entry.layer): entry for entry in self.manifest.entries}
        self.index = lru_cache(maxsize=None)(self._read_index)

    @property
    def sae_names(self) -> tuple[str, ...]:
        """Its SAEs, in the order in which they were given."""
        return tuple(dict.fromkeys(entry.sae for entry in self.manifest.entries))

    def layers(self, sae_name: str) -> tuple[int, ...]:
        """The layers at which an SAE's firings are held, from below.

        Raises:
            InputError: If there is no such SAE.
        """
        layers = sorted(entry.layer for entry in self.manifest.entries if entry.sae == sae_name)
        if not layers:
            raise InputError(
                f"SAE {sae_name!r} is not in the latent cache {self.path}; there are "
                f"{', '.join(self.sae_names)}"
            )
        return tuple(layers)

    def d_sae(self, sae_name: str) -> int:
        """How many latents an SAE has."""
        return self._entry(sae_name, self.layers(sae_name)[0]).d_sae

    @cached_property
    def tokens(self) -> Int32[np.ndarray, "context position"]:
        """All token ids, special ones included."""
        tokens: np.ndarray = self._load(TOKENS_FILE)["tokens"]
        return tokens

    def firings(self, sae_name: str, layer: int, latent: int) -> Firings:
        """Where a latent fires at a layer, and how strongly; empty where it never does.

        Raises:
            InputError: If the cache has no such SAE, layer or latent.
        """
        found = self.range(sae_name, layer, latent, latent + 1)
        return Firings(found.positions, found.activations)

    def range(self, sae_name: str, layer: int, start: int, stop: int) -> FiringRange:
        """The firings of the latents from `start` to before `stop`.

        Raises:
            InputError: If the cache has no such SAE, layer or latent.
        """
        entry, offsets = self._entry(sae_name, layer), self.index(sae_name, layer).offsets
        if not 0 <= start <= stop <= entry.d_sae:
            raise InputError(
                f"latent {start if start < 0 else stop - 1} does not exist: {sae_name} has "
                f"{entry.d_sae} latents, 0 to {entry.d_sae - 1}"
            )
        parts = [(np.zeros(0, np.int32), np.zeros(0, np.float32))]
        for block in pairwise(entry.blocks):
            first, last = max(block[0], start), min(block[1], stop)
            if first < last and offsets[first] < offsets[last]:
                here = slice(*(int(offsets[i] - offsets[block[0]]) for i in (first, last)))
                name = f"{entry_folder(sae_name, layer)}/{block_name(*block)}"
                parts.append(self._slices(name, here))
        positions, activations = (np.concatenate(part) for part in zip(*parts, strict=True))
        return FiringRange(offsets[start : stop + 1] - offsets[start], positions, activations)

    def density(self, sae_name: str, layer: int) -> Float64[np.ndarray, " d_sae"]:
        """Share of the tokens on which each latent is active.

        Raises:
            InputError: If the cache has no such SAE or layer.
        """
        return self.index(sae_name, layer).counts / self.manifest.tokens

    def fires(self, sae_name: str, latent: int) -> bool:
        """Whether a latent is active at any of the layers that are held."""
        return any(
            self.index(sae_name, layer).counts[latent] > 0 for layer in self.layers(sae_name)
        )

    def _read_index(self, sae_name: str, layer: int) -> Index:
        """What is known of each latent; kept once read, as `index(sae_name, layer)`."""
        self._entry(sae_name, layer)
        return Index(**self._load(f"{entry_folder(sae_name, layer)}/{INDEX_FILE}"))

    def _entry(self, sae_name: str, layer: int) -> Entry:
        layers = self.layers(sae_name)
        if layer not in layers:
            raise InputError(
                f"layer {layer} of {sae_name} is not in the latent cache {self.path}; its layers "
                f"there are {', '.join(map(str, layers))}"
            )
        return self._of[sae_name, layer]

    def _load(self, name: str) -> dict[str, np.ndarray]:
        try:
            found: dict[str, np.ndarray] = load_file(self.path / name)
        except (OSError, SafetensorError) as error:
            raise _damaged(self.path, f"{name}: {error}") from error
        return found

    def _slices(self, name: str, here: slice) -> tuple[np.ndarray, np.ndarray]:
        try:
            with safe_open(self.path / name, "numpy") as file:
                return file.get_slice("positions")[here], file.get_slice("activations")[here]
        except (OSError, SafetensorError) as error:
            raise _damaged(self.path, f"{name}: {error}") from error


class Entry(BaseModel):
    """One SAE at one layer.

    Attributes:
        blocks: Where the files of firings begin and, last, d_sae.
        firings: Of all latents together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sae: str
    layer: int
    d_sae: int
    firings: int
    blocks: tuple[int, ...]


class Manifest(BaseModel):
    """What a cache holds; the content of `cache.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    definitions: dict[str, str] = DEFINITIONS
    host: str
    host_fingerprint: str
    tokenizer: str | None
    text: dict[str, Any]
    part: str
    context_length: int
    contexts: int
    tokens: int
    excluded_special_tokens: int
    special_token_ids: tuple[int, ...]
    entries: tuple[Entry, ...]


def entry_folder(sae_name: str, layer: int) -> str:
    """Where the firings of an SAE at a layer lie: `baseline/layers-03/layer-03`."""
    return f"{sae_name}/layer-{layer:02d}"


def block_name(start: int, stop: int) -> str:
    """The file of the firings of latents `start` to before `stop`."""
    return f"latents-{start:05d}-{stop - 1:05d}.safetensors"


def _read_manifest(path: Path) -> Manifest:
    try:
        return Manifest.model_validate_json((path / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{path} holds no latent cache: {MANIFEST_FILE} is missing; write one first, or name "
            "its folder"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "JSON"
        raise _damaged(path, f"{MANIFEST_FILE}: {key}: {first['msg']}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, f"{MANIFEST_FILE}: {error}") from error


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(
        f"the latent cache {path} cannot be read: {reason}; remove the folder and write it again"
    )
