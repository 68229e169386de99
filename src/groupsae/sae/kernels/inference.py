"""Encoding without gradients, by the compiled kernels where they can."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from groupsae.sae.autoencoder import SAE
from groupsae.sae.kernels import cpu
from groupsae.sae.sparsity import Latents


@torch.no_grad()
def encode(sae: SAE, x: Float[Tensor, "*token d_model"], layer: int) -> Latents:
    """The active latents of residual streams x of `layer`, as `SAE.encode` gives them.

    TopK in float32 on the CPU goes through the compiled selection, most of whose time is the
    product. That may round otherwise, so that of two nearly equal latents at the end of the k
    another one is taken.
    """
    config = sae.config
    if config.architecture != "topk" or config.learned_affine == "bias" or not cpu.fits(sae):
        return sae.encode(x, layer)
    assert config.k is not None
    member = sae.layers.index(layer) if layer in sae.layers else None
    if member is None or not x.numel():
        return sae.encode(x, layer)
    inputs = sae.inputs(sae.normalize(x, layer), member)
    latents = cpu.encode(inputs.reshape(-1, config.d_model), sae.W_enc, sae.b_enc, config.k)
    shape = (*x.shape[:-1], config.k)
    return Latents(latents.values.view(shape), latents.indices.long().view(shape))
