"""SAEs on the tiny host, their latent cache, and the same latents as dense tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from groupsae.host.model import HostModel
from groupsae.host.tokens import Corpus
from groupsae.sae import SAE, SAEConfig

CONTEXTS, CONTEXT = 24, 16
D_SAE = 40
SILENT = (0, 1, 2)  # latents that never fire


def made_sae(layers=(0, 1), d_sae=D_SAE, seed=0, **changes) -> SAE:
    """An SAE with random weights, whose first three latents never fire."""
    generator = torch.Generator().manual_seed(seed)
    config = SAEConfig(d_model=32, d_sae=d_sae, layers=layers, **{"k": 5, **changes})
    sae = SAE(config, generator=generator)
    with torch.no_grad():
        sae.b_enc[list(SILENT)] = -1e6
    return sae


def ids_of(corpus: Corpus) -> Tensor:
    """The token ids that the cache is to hold."""
    return corpus.held_out().next_contexts(CONTEXTS)


@torch.no_grad()
def dense(host: HostModel, corpus: Corpus, sae: SAE, layer: int) -> Tensor:
    """[token, latent] of all tokens of the cache; zeros at special ones."""
    ids = ids_of(corpus)
    x = host.residual_streams(ids, [layer])[layer]
    latents = sae.encode(x.flatten(0, 1), layer).dense(sae.config.d_sae)
    return latents * (ids.flatten() != 0).unsqueeze(1)
