"""SAEs as after training, and activations of their layers."""

from __future__ import annotations

import torch
from torch import Tensor

from groupsae.interop import Metadata
from groupsae.sae import SAE
from tests.sae.kernels.cases import sae_with

LAYERS = (2, 3, 4)
D_MODEL, D_SAE = 12, 120

METADATA = Metadata(
    model_name="org/tiny-neox",
    block_path="gpt_neox.layers",
    context_size=16,
    prepend_bos=False,
    dataset="words.jsonl",
    exclude_special_tokens=True,
    amad=0.125,
)


def trained(rule: str, affine: str = "none", seed: int = 0) -> SAE:
    """An SAE of layers 2 to 4, each with a mean, a scale and, by rule, a threshold of its own."""
    sae = sae_with(rule, affine, seed=seed)
    generator = torch.Generator().manual_seed(3 + seed)
    sae.mean.copy_(torch.randn(3, D_MODEL, generator=generator))
    sae.scale.copy_(torch.tensor([0.5, 1.0, 0.03]))
    if "batchtopk" in rule or rule == "matryoshka":
        sae.threshold.copy_(torch.tensor([4.0, 5.0, 6.0]))
    return sae


def activations(sae: SAE, layer: int, tokens: int = 64, seed: int = 1) -> Tensor:
    """Residual streams of `layer` whose normalised form is standard normal, like a batch's."""
    member = sae.layers.index(layer)
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(tokens, D_MODEL, generator=generator, dtype=sae.W_enc.dtype)
    return normal / sae.scale[member] + sae.mean[member]
