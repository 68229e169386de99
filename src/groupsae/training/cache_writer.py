"""Writing an activation cache: one forward after another into shards, each whole or not at all."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from groupsae.errors import InputError
from groupsae.files import replacing, save_tensors, write_text
from groupsae.host.model import HostModel
from groupsae.host.tokens import TokenStream, special_mask
from groupsae.progress import progress
from groupsae.training.activation_cache import IDS, MANIFEST, Manifest, Shard, read_manifest
from groupsae.training.memory import size

_log = logging.getLogger(__name__)

_SHARD_BYTES = 64 * 2**20  # or one forward, where that is more; held in memory
_SAMPLE = 64  # contexts whose share of special tokens is taken for that of the text


def write_activation_cache(
    path: Path,
    host: HostModel,
    stream: TokenStream,
    *,
    layers: Sequence[int],
    tokens: int,
    dtype: str,
    batch_contexts: int,
    exclude_special: bool = True,
    shard_bytes: int = _SHARD_BYTES,
) -> Manifest:
    """Write the residual streams of a text's beginning, or go on where an earlier call ended.

    The forwards are those of a training on `tokens` tokens with the same `batch_contexts`, of the
    same contexts together, so that a float32 cache holds the bits that training would see.

    Args:
        path: The cache's folder, made where it is missing.
        stream: The text, from the beginning.
        tokens: How many to hold; special ones are not counted where training leaves them out.
        dtype: "float16", "bfloat16" or "float32".
        batch_contexts: Contexts in one forward.
        exclude_special: Whether special tokens are left out of training.
        shard_bytes: About how large a shard is; at least one forward.

    Raises:
        InputError: The folder holds the cache of another model or text, or with other layers; the
            disk cannot hold it; a residual stream is not finite, or beyond the dtype's range.
        EndOfText: The text is used up. Whole shards stay.
    """
    manifest = _begin(path, host, stream, tuple(layers), dtype)
    held = manifest.counted(exclude_special=exclude_special)
    if held >= tokens:
        _log.info("activation cache: %s holds %s tokens already", path, f"{held:,}")
        return manifest
    special = host.special_token_ids if exclude_special else frozenset()
    _refuse_too_large(path, manifest, _contexts_left(stream, manifest, tokens, held, special))
    forwards = max(1, shard_bytes // (batch_contexts * manifest.bytes_per_context))
    with progress(f"activations of {len(layers)} layers", tokens) as bar:
        bar.skip(held)
        while (missing := tokens - manifest.counted(exclude_special=exclude_special)) > 0:
            shard = _NewShard(manifest, forwards * batch_contexts)
            for _ in range(forwards):
                n = min(batch_contexts, -(-missing // stream.context_length))
                counted = int((~special_mask(shard.add(host, stream, n), special)).sum())
                missing -= counted
                bar.advance(counted)
                if missing <= 0:
                    break
            manifest = shard.write(path, manifest, stream)
    return manifest


class _NewShard:
    """The shard that is being filled."""

    def __init__(self, manifest: Manifest, contexts: int) -> None:
        shape, self.dtype = (contexts, manifest.context_length), getattr(torch, manifest.dtype)
        self.contexts = self.special_tokens = 0
        self.input_ids = torch.zeros(shape, dtype=torch.int32)
        self.rows = {
            layer: torch.zeros(*shape, manifest.d_model, dtype=self.dtype)
            for layer in manifest.layers
        }

    def add(self, host: HostModel, stream: TokenStream, n: int) -> Int[Tensor, "n context"]:
        """Run the host model on the text's next `n` contexts, and return these."""
        input_ids = stream.next_contexts(n)
        new = slice(self.contexts, self.contexts + n)

        def keep(layer: int, x: Float[Tensor, "batch context d_model"]) -> None:
            stored = x.to(self.dtype)
            if not bool(stored.isfinite().all()):
                raise _not_finite(x, layer, host.name, self.dtype)
            self.rows[layer][new] = stored

        host.visit(input_ids, {layer: partial(keep, layer) for layer in self.rows})
        self.input_ids[new] = input_ids
        self.contexts += n
        self.special_tokens += int(special_mask(input_ids, host.special_token_ids).sum())
        return input_ids

    def write(self, path: Path, manifest: Manifest, stream: TokenStream) -> Manifest:
        """Write the shard, then the manifest that names it, which is returned."""
        file = path / f"shard-{len(manifest.shards):06d}.safetensors"
        tensors = {IDS: self.input_ids} | {f"layers.{layer}": x for layer, x in self.rows.items()}
        with replacing(file) as aside:
            save_tensors({name: tensor[: self.contexts] for name, tensor in tensors.items()}, aside)
        shard = Shard(
            file=file.name,
            contexts=self.contexts,
            special_tokens=self.special_tokens,
            bytes=file.stat().st_size,
        )
        update = {"shards": (*manifest.shards, shard), "stream": stream.state_dict()}
        manifest = manifest.model_copy(update=update)
        write_text(path / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        return manifest


def _begin(
    path: Path, host: HostModel, stream: TokenStream, layers: tuple[int, ...], dtype: str
) -> Manifest:
    """The manifest that is there, with the stream behind what it holds, or a new one."""
    manifest = read_manifest(path)
    if manifest is None:
        return Manifest(
            model=host.name,
            fingerprint=host.fingerprint(),
            n_layers=host.n_layers,
            d_model=host.d_model,
            layers=layers,
            dtype=dtype,
            source=stream.corpus.source,
            stream=stream.state_dict(),
        )
    manifest.refuse_other(path, host, stream, dtype)
    if manifest.layers != layers:
        raise InputError(
            f"training.activation_cache={path} holds the layers {list(manifest.layers)}, and "
            f"grouping.layers asks for {list(layers)}; ask for the same, or name another folder"
        )
    stream.load_state_dict(manifest.stream)
    return manifest


def _contexts_left(
    stream: TokenStream, manifest: Manifest, tokens: int, held: int, special: frozenset[int]
) -> int:
    """About how many contexts are still to be written.

    The share of tokens that count is that of what the cache holds, or of the text's next contexts.
    """
    missing = tokens - held
    if held:
        return -(-missing * manifest.tokens // (held * stream.context_length))
    beginning = stream.state_dict()
    sample = stream.next_contexts(min(_SAMPLE, -(-missing // stream.context_length)))
    stream.load_state_dict(beginning)
    counted = max(int((~special_mask(sample, special)).sum()), 1)
    return -(-missing * sample.numel() // (counted * stream.context_length))


def _refuse_too_large(path: Path, manifest: Manifest, contexts: int) -> None:
    """Say what the cache will take, and raise where the disk cannot hold it."""
    tokens, needed = contexts * manifest.context_length, contexts * manifest.bytes_per_context
    folder = next(there for there in (path.absolute(), *path.absolute().parents) if there.exists())
    free = shutil.disk_usage(folder).free
    what = f"{tokens:,} tokens at {len(manifest.layers)} layers in {manifest.dtype}"
    if needed > free:
        mends = "fewer training.tokens or grouping.layers"
        if manifest.dtype == "float32":
            mends += ", or training.cache_dtype=float16,"
        raise InputError(
            f"training.activation_cache={path}: {what} take {needed:,} bytes ({size(needed)}), and "
            f"the disk has {free:,} bytes ({size(free)}) free; {mends} take less, or name a folder "
            "on another disk"
        )
    _log.info("activation cache: %s, %s; %s are free", what, size(needed), size(free))


def _not_finite(x: Tensor, layer: int, host: str, dtype: torch.dtype) -> InputError:
    if not bool(x.isfinite().all()):
        return InputError(
            f"layer {layer} of {host} gave NaN or infinite activations, which are not to be kept. "
            "Try host.dtype=float32, and check the model's weights"
        )
    name = str(dtype).removeprefix("torch.")
    mend = "bfloat16 or float32" if dtype == torch.float16 else "float32"
    return InputError(
        f"training.cache_dtype={name}: layer {layer} of {host} holds values up to "
        f"{float(x.abs().max()):,.0f}, and {name} ends at {torch.finfo(dtype).max:,.0f}; set "
        f"training.cache_dtype={mend}"
    )
