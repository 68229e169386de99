"""Latent caches of which everything is known: a latent fires on one word, strongly or weakly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

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

VOCABULARY = 60
TEXTS = [f" w{i}" for i in range(VOCABULARY)]
D_SAE = 12


def random_tokens(contexts: int = 60, length: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (contexts, length)).astype(np.int32)


def activations(tokens: np.ndarray, words: Mapping[int, int], seed: int = 0) -> np.ndarray:
    """[token, latent]: latent -> the token id on which it fires; the others are silent."""
    strengths = np.random.default_rng(seed).uniform(0.5, 5, tokens.size).astype(np.float32)
    dense = np.zeros((tokens.size, D_SAE), np.float32)
    for latent, word in words.items():
        dense[:, latent] = np.where(tokens.flatten() == word, strengths, 0)
    return dense


def made_cache(
    folder: Path, tokens: np.ndarray, dense: Mapping[tuple[str, int], np.ndarray]
) -> LatentCache:
    """A latent cache of dense activations `[token, latent]`, as `latent_cache.py` describes it."""
    entries = []
    for (sae, layer), values in dense.items():
        latents, positions = values.T.nonzero()
        offsets = np.searchsorted(latents, np.arange(values.shape[1] + 1)).astype(np.int64)
        place = folder / entry_folder(sae, layer)
        place.mkdir(parents=True)
        found = values.T[latents, positions]
        firings = {"positions": positions.astype(np.int32), "activations": found}
        save_file(firings, place / block_name(0, values.shape[1]))
        counts = np.diff(offsets)
        zeros = np.zeros(len(counts), np.int32)
        index = {
            "offsets": offsets,
            "mean": (values.sum(0) / np.maximum(counts, 1)).astype(np.float32),
            "maximum": values.max(0),
            "first": zeros,
            "last": zeros,
        }
        save_file(index, place / INDEX_FILE)
        d_sae = values.shape[1]
        entries.append(
            Entry(sae=sae, layer=layer, d_sae=d_sae, firings=len(found), blocks=(0, d_sae))
        )
    save_file({"tokens": tokens}, folder / TOKENS_FILE)
    manifest = Manifest(
        host="made up",
        host_fingerprint="0",
        tokenizer=None,
        text={},
        part="held out",
        context_length=tokens.shape[1],
        contexts=len(tokens),
        tokens=tokens.size,
        excluded_special_tokens=0,
        special_token_ids=(),
        entries=tuple(entries),
    )
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json())
    return LatentCache(folder)
