"""The work: a random-weight host model of a known shape, and a file of Zipf-distributed tokens."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from groupsae.errors import InputError

EXPANSION = 16
"""d_sae / d_model."""


@dataclass(frozen=True)
class Shape:
    """A GPT-NeoX model's sizes, and how its SAEs are trained by default.

    Attributes:
        dtype: Of the weights as they are saved.
        hidden: Not offered on the command line: for tests.
    """

    name: str
    n_layers: int
    d_model: int
    heads: int
    k: int
    vocab_size: int = 50_304
    max_context: int = 2048
    dtype: str = "float32"
    hidden: bool = False

    @property
    def d_sae(self) -> int:
        return EXPANSION * self.d_model

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that SAEs are trained on: all but the last."""
        return tuple(range(self.n_layers - 1))


_ALL = (
    Shape("pythia-70m", n_layers=6, d_model=512, heads=8, k=32),
    Shape("pythia-160m", n_layers=12, d_model=768, heads=12, k=128),
    Shape("wide-4096", n_layers=4, d_model=4096, heads=32, k=64, dtype="bfloat16"),
    Shape("tiny", 3, d_model=32, heads=4, k=4, vocab_size=96, max_context=64, hidden=True),
)
SHAPES = {shape.name: shape for shape in _ALL}


def shape(name: str) -> Shape:
    """The shape of that name.

    Raises:
        InputError: There is none.
    """
    if name not in SHAPES:
        known = ", ".join(shape.name for shape in _ALL if not shape.hidden)
        raise InputError(f"--shape {name}: there is no such shape; known are {known}")
    return SHAPES[name]


@dataclass(frozen=True)
class Workload:
    """Where the work lies: the folder of the host model and that of the tokens."""

    host: Path
    tokens: Path


def prepare(of: Shape, directory: Path, *, context_length: int, contexts: int) -> Workload:
    """The workload's folders under `directory`, made where they are not there yet.

    Args:
        contexts: How many contexts there must be at least.

    Raises:
        InputError: The context is longer than the model can read.
    """
    if not 2 <= context_length <= of.max_context:
        raise InputError(
            f"--context {context_length}: {of.name} reads contexts of 2 to {of.max_context} tokens"
        )
    directory.mkdir(parents=True, exist_ok=True)
    host = directory / f"host-{of.name}"
    if not host.exists():
        with made_aside(host) as folder:
            _save_host(of, folder)
    count = max(4096, 2 ** (contexts - 1).bit_length())
    tokens = directory / f"tokens-{of.vocab_size}-{count}x{context_length}"
    if not tokens.exists():
        with made_aside(tokens) as folder:
            _save_tokens(zipf_tokens(count, context_length, of.vocab_size), folder)
    return Workload(host, tokens)


def zipf_tokens(contexts: int, context_length: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    """Token ids, (contexts, context_length), of which the r-th most frequent has weight 1 / r.

    Independent draws, like no text, but with text's frequencies. Id 0 begins and ends documents
    and is left out.
    """
    ranks = np.arange(1, vocab_size)
    weights = 1 / ranks
    draws = np.random.default_rng(seed).choice(
        ranks, size=(contexts, context_length), p=weights / weights.sum()
    )
    return draws.astype(np.int64)


def _save_host(of: Shape, folder: Path) -> None:
    """A model with the initial weights that transformers gives it, and a tokenizer for its ids."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=of.vocab_size,
        hidden_size=of.d_model,
        num_hidden_layers=of.n_layers,
        num_attention_heads=of.heads,
        intermediate_size=4 * of.d_model,
        max_position_embeddings=of.max_context,
        bos_token_id=0,
        eos_token_id=0,
        dtype=of.dtype,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, of.dtype))
    try:
        model = GPTNeoXForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    _save_tokenizer(of, folder)


def _save_tokenizer(of: Shape, folder: Path) -> None:
    """Words t0, t1, ... for the ids 0, 1, ...: dictionary-learning is given text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{number}": number for number in range(of.vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="t0",
        eos_token="t0",
        pad_token="t0",
        unk_token="t1",
        model_max_length=of.max_context,
    ).save_pretrained(folder)


def _save_tokens(ids: np.ndarray, folder: Path) -> None:
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        datasets.Dataset.from_dict({"input_ids": ids}).save_to_disk(folder)
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def made_aside(folder: Path) -> Iterator[Path]:
    """A folder that takes its name only when the block ends well."""
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield aside
        aside.replace(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
