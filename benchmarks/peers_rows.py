"""The rows that every library is trained on: one layer's residual streams, normalised, shuffled."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.workload import made_aside
from groupsae.errors import InputError
from groupsae.host.model import HostModel
from groupsae.host.tokens import TokenStream, open_corpus, special_mask

_CONTEXTS = 32  # in one forward of the host model
_HELD_OUT = 0.1  # share of the documents
_SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Rows:
    """Where the rows lie, and what they are.

    Attributes:
        train, held_out: .npy files of float32 rows.
        layer: Whose residual streams they are.
    """

    train: Path
    held_out: Path
    layer: int
    d_model: int
    train_tokens: int
    held_out_tokens: int


@dataclass(frozen=True)
class Source:
    """What rows are made of.

    Attributes:
        layer: None for the middle one.
        tokens: For training, without special ones.
        held_out_tokens: For the figures; drawn from documents that training never sees.
    """

    model: str
    text: str
    layer: int | None
    tokens: int
    held_out_tokens: int
    context_length: int


def prepare_rows(source: Source, work: Path) -> Rows:
    """The rows of a source, made where they are not there yet.

    Training's rows have their mean subtracted and a mean norm of 1 (`affine = center`), held-out
    rows the same mean and scale. Training's are shuffled once, over all of them; where the text is
    shorter than what is asked for, it is read again in another order.

    Raises:
        InputError: The model, the text or the layer is not there.
    """
    folder = work / f"rows-{_key(source)}"
    if not folder.exists():
        work.mkdir(parents=True, exist_ok=True)
        with made_aside(folder) as aside:
            _save(source, aside)
    values = json.loads((folder / "rows.json").read_text())
    return Rows(train=folder / "train.npy", held_out=folder / "held_out.npy", **values)


def _save(source: Source, folder: Path) -> None:
    host = HostModel.load(source.model, dtype="float32", device="cpu")
    layer = (host.n_layers - 1) // 2 if source.layer is None else source.layer
    if not 0 <= layer < host.n_layers:
        raise InputError(
            f"--layer {layer}: {source.model} has layers 0 to {host.n_layers - 1}; give one of them"
        )
    corpus = open_corpus(
        source.text,
        tokenizer=host.tokenizer,
        context_length=source.context_length,
        held_out=_HELD_OUT,
        on_exhausted="repeat",
        vocab_size=host.vocab_size,
        model_context_length=host.context_length,
    )
    train = _streams(host, corpus.train(), layer, source.tokens)
    held_out = _streams(host, corpus.held_out(), layer, source.held_out_tokens)
    mean = train.mean(0, dtype=np.float64)
    train -= mean.astype(np.float32)
    held_out -= mean.astype(np.float32)
    scale = np.float32(1 / np.linalg.norm(train, axis=1).mean(dtype=np.float64))
    train *= scale
    held_out *= scale
    np.random.default_rng(_SHUFFLE_SEED).shuffle(train)
    np.save(folder / "train.npy", train)
    np.save(folder / "held_out.npy", held_out)
    values = {
        "layer": layer,
        "d_model": host.d_model,
        "train_tokens": len(train),
        "held_out_tokens": len(held_out),
    }
    (folder / "rows.json").write_text(json.dumps(values))


def _streams(host: HostModel, stream: TokenStream, layer: int, tokens: int) -> np.ndarray:
    """The residual streams of the next so many tokens that are not special."""
    rows = np.empty((tokens, host.d_model), dtype=np.float32)
    filled = 0
    while filled < tokens:
        contexts = min(_CONTEXTS, math.ceil((tokens - filled) / stream.context_length))
        input_ids = stream.next_contexts(contexts)
        kept = ~special_mask(input_ids, host.special_token_ids)
        x = host.residual_streams(input_ids, [layer])[layer][kept][: tokens - filled]
        rows[filled : filled + len(x)] = x.to(torch.float32).numpy()
        filled += len(x)
    return rows


def _key(source: Source) -> str:
    return hashlib.sha256(json.dumps(asdict(source)).encode()).hexdigest()[:12]
