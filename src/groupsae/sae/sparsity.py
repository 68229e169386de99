"""How the active latents of a token are chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Latents:
    """The at most k active latents of each token; every other latent is zero.

    Attributes:
        values: Activations, all >= 0. A zero fills the place of a latent that is not active: fewer
            than k pre-activations were positive.
        indices: Which latents, in [0, d_sae); in no particular order within a token.
    """

    values: Float[Tensor, "*token k"]
    indices: Int[Tensor, "*token k"]

    def dense(self, d_sae: int) -> Float[Tensor, "*token d_sae"]:
        """All d_sae latents, the inactive ones as zeros."""
        empty = self.values.new_zeros(*self.values.shape[:-1], d_sae)
        return empty.scatter(-1, self.indices, self.values)

    def l0(self) -> Float[Tensor, "*token"]:
        """Number of active latents of each token."""
        return (self.values > 0).sum(-1).to(self.values.dtype)


def topk(pre_activations: Float[Tensor, "*token d_sae"], k: int) -> Latents:
    """z = TopK(relu(pre_activations)): Gao et al. 2024 (arXiv 2406.04093), section 2.3.

    Differentiable in the chosen values. Where fewer than k are positive the rest of the k are 0.
    """
    values, indices = torch.topk(pre_activations, k, dim=-1, sorted=False)
    return Latents(torch.relu(values), indices)
