"""Random SAEs and batches that every kernel is tried on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from groupsae.sae import SAE, SAEConfig

# Every sparsity rule in every form that treats tokens differently; on inputs of 3 member layers.
RULES: dict[str, dict[str, Any]] = {
    "topk": {"architecture": "topk", "k": 4},
    "batchtopk": {"architecture": "batchtopk", "k": 4},
    "batchtopk by layer": {"architecture": "batchtopk", "k": 4, "per_layer_threshold": True},
    "matryoshka": {"architecture": "matryoshka", "k": 4, "prefixes": (5, 17, 90, 120)},
    "jumprelu": {"architecture": "jumprelu", "initial_threshold": 5.0, "bandwidth": 0.5},
    "jumprelu with target": {
        **{"architecture": "jumprelu", "initial_threshold": 5.0, "bandwidth": 0.5},
        "target_l0": 2.5,
    },
    "jumprelu by layer": {
        **{"architecture": "jumprelu", "initial_threshold": 5.0, "bandwidth": 0.5},
        **{"target_l0": 2.5, "per_layer_threshold": True},
    },
    "relu": {"architecture": "relu"},
    "gated": {"architecture": "gated"},
}
AFFINES = ("none", "bias", "gain")


def random_sae(d_model: int, d_sae: int, k: int, seed: int = 0) -> SAE:
    """A TopK SAE whose encoder and biases are no longer those of the start; float32."""
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(SAEConfig(d_model=d_model, d_sae=d_sae, k=k, layers=(0,)), generator=generator)
    with torch.no_grad():
        sae.W_enc.normal_(generator=generator)
        sae.b_enc.normal_(std=0.1, generator=generator)
        sae.b_dec.normal_(std=0.1, generator=generator)
    return sae


def sae_with(rule: str, affine: str = "none", *, d_model: int = 12, seed: int = 0) -> SAE:
    """An SAE of 120 latents and 3 member layers under one of the RULES; float32."""
    config = SAEConfig(
        d_model=d_model, d_sae=120, layers=(2, 3, 4), learned_affine=affine, **RULES[rule]
    )
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(config, generator=generator)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name == "W_enc":
                parameter.copy_(noise)
            elif name != "W_dec":
                parameter += 0.1 * noise
        if rule == "relu":
            sae.b_enc -= 5.0  # few active latents, as after training
    return sae


def random_batch(
    tokens: int, d_model: int, seed: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, d_model, generator=generator, dtype=dtype)


def random_members(tokens: int, n_members: int = 3, seed: int = 1) -> Tensor:
    """Which member layer each token is from."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(n_members, (tokens,), generator=generator)
