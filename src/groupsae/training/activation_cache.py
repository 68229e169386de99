"""The activation cache: residual streams and their contexts on disk, read in a host model's place.

A folder with one safetensors file per shard, which holds whole contexts in the order of the text
(`input_ids` as int32 `[context, token]`, `layers.3` and so on `[context, token, d_model]`), and
`manifest.json`, which says of which model, layers and text they are.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Int
from pydantic import BaseModel, ConfigDict, ValidationError, computed_field, field_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from groupsae.errors import InputError
from groupsae.host.model import HostModel, Visitor
from groupsae.host.tokens import EndOfText, TokenStream

MANIFEST = "manifest.json"
IDS = "input_ids"


class CachedActivations:
    """Gives what a token stream and a host model give, from an activation cache.

    `next_contexts` hands out the contexts as the text has them, or shard by shard in an order drawn
    from `seed`; `visit` then gives the residual streams of these contexts, in the cache's dtype.
    Shards are mapped into memory, and the system is asked to read the next one in advance.

    Args:
        path: The cache's folder.
        manifest: What it holds.
        device: Where `visit` gives the streams.
        shuffle: Read the shards in random order. The contexts of a shard stay together.
        seed: Of that order.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        device: torch.device,
        *,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        self.path, self.manifest, self.device = path, manifest, device
        self.shuffle, self.seed = shuffle, seed
        self.name, self.d_model = manifest.model, manifest.d_model
        self.n_layers, self.context_length = manifest.n_layers, manifest.context_length
        self._handed_out = 0
        self._given = torch.zeros(0, self.context_length, dtype=torch.int64)
        self._pieces: list[_Piece] = []
        self._mapped: dict[int, dict[str, Tensor]] = {}
        self._arrange(len(manifest.shards))

    @property
    def skipped(self) -> dict[str, int]:
        """What was passed over in the text when the cache was written, by kind of fault."""
        return dict(self.manifest.stream.get("skipped", {}))

    def next_contexts(self, n: int) -> Int[Tensor, "n context"]:
        """The next `n` contexts of token ids, int64 on the CPU.

        Raises:
            EndOfText: The cache holds fewer. Nothing is consumed.
            InputError: A shard is damaged.
        """
        left = self._bounds[-1] - self._handed_out
        if n > left:
            raise EndOfText(
                f"The activation cache {self.path} is used up: of its {self.manifest.tokens:,} "
                f"tokens too many are left out (special ones, or by training.max_norm_multiple). "
                "Write more with `groupsae cache --tokens N` and continue.",
                contexts_left=left,
            )
        self._pieces = self._cut(n)
        used = {piece.place for piece in self._pieces}
        self._mapped = {place: shard for place, shard in self._mapped.items() if place in used}
        self._given = self._rows(IDS).long()
        self._handed_out += n
        return self._given

    def visit(
        self, input_ids: Int[Tensor, "batch context"], visitors: Mapping[int, Visitor]
    ) -> None:
        """Call `visitors[l](x)` with the residual stream x after each asked layer l, in order.

        x is mapped from a file: copy what is to be kept, change nothing.

        Args:
            input_ids: The contexts that `next_contexts` gave last: there are no others here.
        """
        if not torch.equal(input_ids, self._given):
            raise RuntimeError("an activation cache visits the contexts that it gave last")
        for layer in sorted(visitors):
            visitors[layer](self._moved(self._rows(f"layers.{layer}")))

    def state_dict(self) -> dict[str, Any]:
        """The place after the last context that was handed out, fit for JSON."""
        begun = self.manifest.shards[: self._begun]
        return {
            "handed_out": self._handed_out,
            "shards": self._begun,
            "contexts": sum(shard.contexts for shard in begun),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where `state_dict` was taken. Shards that were written since come last.

        Raises:
            InputError: The cache was exchanged for another since.
        """
        begun = self.manifest.shards[: state["shards"]]
        found = sum(shard.contexts for shard in begun)
        if len(begun) < state["shards"] or found != state["contexts"]:
            raise InputError(
                f"training.activation_cache={self.path} is not the cache that this training was "
                f"begun with, whose {state['shards']} shards held {state['contexts']:,} contexts; "
                "name that one, or add --redo to train anew"
            )
        self._arrange(len(begun))
        self._handed_out = state["handed_out"]

    def close(self) -> None:
        """Let go of the files. A later `next_contexts` opens them again."""
        self._pieces, self._mapped = [], {}

    def __enter__(self) -> CachedActivations:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _arrange(self, begun: int) -> None:
        """Draw the order of the first `begun` shards; those behind them keep theirs."""
        self._begun = begun
        self._order = list(range(len(self.manifest.shards)))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed)
            self._order[:begun] = torch.randperm(begun, generator=generator).tolist()
        sizes = [self.manifest.shards[shard].contexts for shard in self._order]
        self._bounds = list(accumulate(sizes, initial=0))  # contexts before each place in the order
        self.close()

    def _cut(self, n: int) -> list[_Piece]:
        """Where the next `n` contexts lie."""
        pieces, start, end = [], self._handed_out, self._handed_out + n
        while start < end:
            place = bisect_right(self._bounds, start) - 1
            first, stop = self._bounds[place], min(end, self._bounds[place + 1])
            pieces.append(_Piece(place, start - first, stop - first))
            start = stop
        return pieces

    def _rows(self, name: str) -> Tensor:
        """A tensor's rows of the contexts that are being handed out."""
        parts = [self._shard(place)[name][start:stop] for place, start, stop in self._pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _shard(self, place: int) -> dict[str, Tensor]:
        """The tensors of the shard at a place in the order, mapped into memory."""
        if place not in self._mapped:
            path = self.path / self.manifest.shards[self._order[place]].file
            try:
                with safe_open(path, "pt") as file:
                    self._mapped[place] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            except (SafetensorError, OSError) as error:
                raise damaged(self.path, f"{path.name}: {error}") from error
            if place + 1 < len(self._order):
                _expect(self.path / self.manifest.shards[self._order[place + 1]].file)
        return self._mapped[place]

    def _moved(self, x: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return x.pin_memory().to(self.device, non_blocking=True)
        return x.to(self.device)


def open_activation_cache(
    path: Path,
    host: HostModel,
    stream: TokenStream,
    *,
    layers: Sequence[int],
    tokens: int,
    dtype: str,
    exclude_special: bool = True,
    shuffle: bool = False,
    seed: int = 0,
) -> CachedActivations:
    """Open a cache for training, if it is one of this model and text that suffices.

    Args:
        host: The model that it must be of.
        stream: The text that it must be of, from the beginning.
        layers: Layers that it must hold; it may hold more.
        tokens: How many it must hold, special ones not counted where they are left out.
        dtype: What it must be stored in.
        exclude_special: Whether special tokens are left out of training.
        shuffle, seed: As of :class:`CachedActivations`.

    Raises:
        InputError: There is none, it is damaged, or of another model, text, dtype or other layers,
            or too small.
    """
    manifest = read_manifest(path)
    if manifest is None:
        raise InputError(
            f"training.activation_cache={path}: there is no activation cache; write it with "
            "`groupsae cache` and the same arguments"
        )
    manifest.refuse_other(path, host, stream, dtype)
    lacking = sorted(set(layers) - set(manifest.layers))
    if lacking:
        raise InputError(
            f"training.activation_cache={path} holds the layers {_listed(manifest.layers)}, and "
            f"{_listed(lacking)} are to be trained on too; leave them out of grouping.layers, or "
            "write another cache with `groupsae cache`"
        )
    held = manifest.counted(exclude_special=exclude_special)
    if held < tokens:
        kind = "tokens that are not special" if exclude_special else "tokens"
        raise InputError(
            f"training.activation_cache={path} holds {held:,} {kind}, and training takes "
            f"{tokens:,}; write more of it with `groupsae cache` and the same arguments, or lower "
            "training.tokens"
        )
    for shard in manifest.shards:
        found = (path / shard.file).stat().st_size if (path / shard.file).exists() else None
        if found != shard.bytes:
            is_now = "is missing" if found is None else f"has {found:,} bytes, not {shard.bytes:,}"
            raise damaged(path, f"{shard.file} {is_now}")
    return CachedActivations(path, manifest, host.device, shuffle=shuffle, seed=seed)


class Shard(BaseModel):
    """One file of a cache."""

    model_config = ConfigDict(frozen=True)

    file: str
    contexts: int
    special_tokens: int
    bytes: int


class Manifest(BaseModel):
    """What a cache holds, as its `manifest.json` says.

    Attributes:
        model, fingerprint: The host model's name and :meth:`HostModel.fingerprint`.
        n_layers, d_model: Its sizes.
        layers: Whose residual streams are kept.
        dtype: What they are stored in.
        source: Where the text came from.
        stream: Place in the text after the last shard, and what identifies the text.
        shards: In the order of the text.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    fingerprint: str
    n_layers: int
    d_model: int
    layers: tuple[int, ...]
    dtype: Literal["float16", "bfloat16", "float32"]
    source: str
    stream: dict[str, Any]
    shards: tuple[Shard, ...] = ()

    @field_validator("stream")
    @classmethod
    def _names_its_text(cls, place: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(place.get("corpus", {}).get("context_length"), int):
            raise ValueError("'stream' does not say of which text it is")
        return place

    @computed_field  # type: ignore[prop-decorator]
    @property
    def context_length(self) -> int:
        """Tokens in a context."""
        return int(self.stream["corpus"]["context_length"])

    @computed_field  # type: ignore[prop-decorator]
    @property
    def tokens(self) -> int:
        """Of all contexts, special ones too."""
        return self.context_length * sum(shard.contexts for shard in self.shards)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def special_tokens(self) -> int:
        """How many of the tokens are special ones of the host model."""
        return sum(shard.special_tokens for shard in self.shards)

    @property
    def bytes_per_context(self) -> int:
        """What a context takes on the disk."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        streams = len(self.layers) * self.d_model * dtype.itemsize
        return self.context_length * (streams + torch.int32.itemsize)

    def counted(self, *, exclude_special: bool) -> int:
        """Tokens that training sees."""
        return self.tokens - self.special_tokens if exclude_special else self.tokens

    def refuse_other(self, path: Path, host: HostModel, stream: TokenStream, dtype: str) -> None:
        """Raise where this is the cache of another model or text, or stored in another dtype.

        Raises:
            InputError: Naming what differs.
        """
        start = f"training.activation_cache={path} is"
        mend = "Name another folder, and write the cache there with `groupsae cache`."
        if self.fingerprint != (fingerprint := host.fingerprint()):
            raise InputError(
                f"{start} of another model: {self.model}, whose fingerprint is "
                f"{self.fingerprint[:12]}; that of host.name={host.name} in {host.dtype} is "
                f"{fingerprint[:12]}. {mend}"
            )
        here, there = stream.state_dict()["corpus"], self.stream["corpus"]
        differing = [
            f"{key} (there {there.get(key)!r}, here {value!r})"
            for key, value in here.items()
            if there.get(key) != value
        ]
        if differing:
            raise InputError(
                f"{start} of another text ({self.source!r}), or of another way of reading it: "
                f"{', '.join(differing)} differ. Set these keys of tokens as they were, or: {mend}"
            )
        if self.dtype != dtype:
            raise InputError(
                f"{start} stored in {self.dtype}, and training.cache_dtype is {dtype}; set "
                f"training.cache_dtype={self.dtype}, or: {mend}"
            )


def read_manifest(path: Path) -> Manifest | None:
    """What the cache in a folder holds; None where nothing is yet.

    Raises:
        InputError: The folder holds something else, or the manifest is damaged.
    """
    try:
        return Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        if not path.exists() or not any(path.iterdir()):
            return None
        raise InputError(
            f"training.activation_cache={path} holds something else than an activation cache (it "
            f"has no {MANIFEST}); name another folder"
        ) from None
    except ValidationError as error:
        raise damaged(path, f"{MANIFEST}: {error.errors()[0]['msg']}") from error
    except OSError as error:
        raise InputError(
            f"training.activation_cache={path} cannot be read: {error.strerror}"
        ) from error


def damaged(path: Path, why: str) -> InputError:
    """The error of a cache that cannot be read."""
    return InputError(
        f"The activation cache {path} is damaged ({why}); remove the folder and write it again "
        "with `groupsae cache`"
    )


class _Piece(NamedTuple):
    """Contexts start:stop of the shard at a place in the order."""

    place: int
    start: int
    stop: int


def _expect(path: Path) -> None:
    """Ask the system, where it can be asked, to read a file in advance."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers))
