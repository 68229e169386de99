"""Random SAEs and batches that every kernel is tried on."""

from __future__ import annotations

import torch
from torch import Tensor

from groupsae.sae import SAE, SAEConfig


def random_sae(d_model: int, d_sae: int, k: int, seed: int = 0) -> SAE:
    """An SAE whose encoder and biases are no longer those of the start; float32."""
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(SAEConfig(d_model=d_model, d_sae=d_sae, k=k, layers=(0,)), generator=generator)
    with torch.no_grad():
        sae.W_enc.normal_(generator=generator)
        sae.b_enc.normal_(std=0.1, generator=generator)
        sae.b_dec.normal_(std=0.1, generator=generator)
    return sae


def random_batch(
    tokens: int, d_model: int, seed: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, d_model, generator=generator, dtype=dtype)
