"""Writing a latent cache: one pass over the text for all SAEs, sorted by latent on the disk."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from safetensors import safe_open
from scipy.sparse import csr_array
from torch import Tensor

from groupsae.errors import InputError
from groupsae.files import replacing, save_tensors, write_text
from groupsae.host.model import HostModel
from groupsae.host.tokens import TokenStream
from groupsae.interpretation.latent_cache import (
    INDEX_FILE,
    MANIFEST_FILE,
    TOKENS_FILE,
    Entry,
    LatentCache,
    Manifest,
    block_name,
    entry_folder,
)
from groupsae.progress import progress
from groupsae.sae import SAE
from groupsae.sae.kernels.inference import encode

_log = logging.getLogger(__name__)


@torch.no_grad()
def write_latent_cache(
    path: Path,
    host: HostModel,
    stream: TokenStream,
    wanted: Mapping[tuple[str, int], SAE],
    *,
    tokens: int,
    batch_contexts: int,
    special: Iterable[int] = (),
    buffer_firings: int = 2**23,
) -> LatentCache:
    """Write where every latent of every wanted SAE fires, from one pass over the text.

    An earlier cache at `path` is replaced when the new one is whole.

    Memory, besides the host, the SAEs and one forward: 4 bytes a token, and at most about 30 for
    each of `buffer_firings`. Disk: 8 bytes a firing and 4 a token; those of one layer twice while
    they are sorted.

    Args:
        wanted: (name, layer) -> the SAE of that name, which is to encode that layer's residual
            streams.
        tokens: Tokens to read; rounded up to whole contexts.
        batch_contexts: Contexts in one forward of the host.
        special: Token ids to leave out.
        buffer_firings: Firings held in memory before they are sorted and written.

    Raises:
        InputError: If there is no SAE or no token, the disk cannot hold the cache, a residual
            stream is not finite, or something else lies at `path`.
        EndOfText: If the text is used up.
    """
    contexts = -(-tokens // stream.context_length)
    _check(path, wanted, tokens, contexts * stream.context_length)
    special = tuple(sorted(special))
    layers = sorted({layer for _, layer in wanted})
    with replacing(path) as aside:
        growing = {
            key: _Growing(sae, key[1], aside / entry_folder(*key)) for key, sae in wanted.items()
        }
        ids = np.empty((contexts, stream.context_length), np.int32)
        read = counted = 0
        with progress("latent cache", ids.size) as bar:
            for input_ids, mask in stream.batches(tokens, batch_contexts, special):
                ids[read : read + len(input_ids)] = input_ids
                where = mask.flatten().nonzero().squeeze(1) + read * stream.context_length
                streams, mask = host.residual_streams(input_ids, layers), mask.to(host.device)
                for firings in growing.values():
                    firings.add(streams[firings.layer][mask], where.to(torch.int32).numpy())
                read, counted = read + len(input_ids), counted + len(where)
                if read == len(input_ids):
                    _refuse_too_large(path, growing.values(), contexts / read, ids.nbytes)
                if sum(firings.buffered for firings in growing.values()) >= buffer_firings:
                    for firings in growing.values():
                        firings.write_shard()
                bar.advance(input_ids.numel())
        if not counted:
            raise InputError(
                f"all {ids.size:,} tokens read for the latent cache are special ones, which are "
                "left out; give more text, or set tokens.exclude_special=false"
            )
        save_tensors({"tokens": ids}, aside / TOKENS_FILE)
        manifest = Manifest(
            host=host.name,
            host_fingerprint=host.fingerprint(),
            tokenizer=None if host.tokenizer is None else str(host.tokenizer.name_or_path),
            text=stream.corpus.describe(),
            part=stream.part,
            context_length=stream.context_length,
            contexts=contexts,
            tokens=counted,
            excluded_special_tokens=ids.size - counted,
            special_token_ids=special,
            entries=tuple(
                firings.merge(name, max(buffer_firings // 4, 1))
                for (name, _), firings in growing.items()
            ),
        )
        write_text(aside / MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")
    return LatentCache(path)


_CHUNK_NUMBERS = 2**26  # pre-activations, [token d_sae], that one SAE computes at a time
_BYTES_PER_FIRING = 8


class _Growing:
    """The firings of one SAE at one layer: buffered, then in shards, then merged by latent."""

    def __init__(self, sae: SAE, layer: int, folder: Path) -> None:
        self.sae, self.layer, self.folder = sae, layer, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.buffered = self.seen = 0
        self._shards: list[Path] = []
        self._clear()

    def add(self, x: Float[Tensor, "token d_model"], where: np.ndarray) -> None:
        """Encode residual streams; `where` is the position of each."""
        if not bool(x.isfinite().all()):
            raise InputError(
                f"the residual streams of layer {self.layer} hold NaN or infinity, which latents "
                "cannot be taken of; try host.dtype=float32, and check the model's weights"
            )
        for part in torch.split(x, max(_CHUNK_NUMBERS // self.sae.config.d_sae, 1)):
            found = encode(self.sae, part, self.layer)
            active = found.values > 0
            self._latents.append(found.indices[active].to(torch.int32).cpu().numpy())
            self._values.append(found.values[active].float().cpu().numpy())
            self._counts.append(active.sum(-1).cpu().numpy())
            self.buffered += len(self._latents[-1])
            self.seen += len(self._latents[-1])
        self._where.append(where)

    def write_shard(self) -> None:
        """Sort what is buffered by latent, and put it on the disk."""
        if not self.buffered:
            return
        counts = np.concatenate(self._counts)
        bounds = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
        by_token = csr_array(
            (np.concatenate(self._values), np.concatenate(self._latents), bounds),
            shape=(len(counts), self.sae.config.d_sae),
        )
        by_latent = by_token.tocsc()  # a counting sort
        path = self.folder / f"shard-{len(self._shards)}.safetensors"
        save_tensors(
            {
                "offsets": by_latent.indptr.astype(np.int64),
                "positions": np.concatenate(self._where)[by_latent.indices],
                "activations": by_latent.data,
            },
            path,
        )
        self._shards.append(path)
        self._clear()

    def merge(self, name: str, most: int) -> Entry:
        """Put the shards together, in files of at most `most` firings or one latent; remove them.

        Of every latent, earlier shards hold earlier positions.
        """
        self.write_shard()
        d_sae = self.sae.config.d_sae
        with ExitStack() as open_files:
            shards = [open_files.enter_context(safe_open(path, "numpy")) for path in self._shards]
            offsets = [shard.get_tensor("offsets") for shard in shards]
            zeros = np.zeros(d_sae + 1, np.int64)
            total = np.sum(offsets, axis=0) if offsets else zeros
            blocks = _blocks(total, most)
            index = {
                "offsets": total,
                "mean": np.zeros(d_sae, np.float32),
                "maximum": np.zeros(d_sae, np.float32),
                "first": np.full(d_sae, -1, np.int32),
                "last": np.full(d_sae, -1, np.int32),
            }
            for start, stop in pairwise(blocks):
                own = total[start : stop + 1] - total[start]
                positions = np.empty(own[-1], np.int32)
                activations = np.empty(own[-1], np.float32)
                free = own[:-1].copy()  # where each latent's next firing goes
                for shard, bounds in zip(shards, offsets, strict=True):
                    source = bounds[start : stop + 1]
                    lengths, here = np.diff(source), slice(int(source[0]), int(source[-1]))
                    shift = np.repeat(free - (source[:-1] - source[0]), lengths)
                    target = shift + np.arange(here.stop - here.start)
                    positions[target] = shard.get_slice("positions")[here]
                    activations[target] = shard.get_slice("activations")[here]
                    free += lengths
                _describe(index, start, own, positions, activations)
                block = {"positions": positions, "activations": activations}
                save_tensors(block, self.folder / block_name(start, stop))
        save_tensors(index, self.folder / INDEX_FILE)
        for path in self._shards:
            path.unlink()
        return Entry(
            sae=name, layer=self.layer, d_sae=d_sae, firings=int(total[-1]), blocks=tuple(blocks)
        )

    def _clear(self) -> None:
        self._latents: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._where: list[np.ndarray] = []
        self.buffered = 0


def _describe(
    index: dict[str, np.ndarray],
    start: int,
    offsets: Int64[np.ndarray, " offset"],
    positions: np.ndarray,
    activations: np.ndarray,
) -> None:
    """Note of a block's latents what is known of each."""
    counts = np.diff(offsets)
    fires = np.flatnonzero(counts)
    if not len(fires):
        return
    begin, rows = offsets[fires], start + fires
    index["mean"][rows] = np.add.reduceat(activations.astype(np.float64), begin) / counts[fires]
    index["maximum"][rows] = np.maximum.reduceat(activations, begin)
    index["first"][rows] = positions[begin]
    index["last"][rows] = positions[offsets[fires + 1] - 1]


def _blocks(offsets: Int64[np.ndarray, " offset"], most: int) -> list[int]:
    """Where blocks of latents begin, and the end: each of at most `most` firings or one latent."""
    blocks = [0]
    while blocks[-1] < len(offsets) - 1:
        end = int(np.searchsorted(offsets, offsets[blocks[-1]] + most, side="right")) - 1
        blocks.append(max(end, blocks[-1] + 1))
    return blocks


def _check(path: Path, wanted: Mapping[tuple[str, int], SAE], tokens: int, positions: int) -> None:
    if not wanted:
        raise InputError("there is no SAE whose latents could be cached; train the run first")
    if tokens < 1:
        raise InputError(f"tokens={tokens}: a latent cache needs at least one token")
    if positions > np.iinfo(np.int32).max:
        raise InputError(
            f"tokens={tokens}: a latent cache holds at most 2^31 - 1 tokens; ask for fewer"
        )
    for (name, layer), sae in wanted.items():
        if layer not in sae.layers:
            raise InputError(
                f"layer {layer} is no member of {name}; its layers are "
                f"{', '.join(map(str, sae.layers))}"
            )
    occupied = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if occupied and not (path / MANIFEST_FILE).exists():
        raise InputError(
            f"{path} holds something else than a latent cache; remove it, or name another folder"
        )


def _refuse_too_large(
    path: Path, growing: Iterable[_Growing], times: float, tokens_bytes: int
) -> None:
    """Say what the cache will take, from its first batch; raise where the disk cannot hold it.

    Args:
        times: How many times as long as the first batch the text is.
    """
    each = [int(firings.seen * times) * _BYTES_PER_FIRING for firings in growing]
    needed = sum(each) + max(each) + tokens_bytes
    folder = next(there for there in (path.absolute(), *path.absolute().parents) if there.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{path}: a latent cache of {len(each)} SAE layers would take about {needed:,} bytes, "
            f"and the disk has {free:,} bytes free; ask for fewer tokens or layers, or name a "
            "folder on another disk"
        )
    _log.info("latent cache: about %.1f MB; %.1f MB are free", needed / 1e6, free / 1e6)
