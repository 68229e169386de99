"""Sparsity rules: how the active latents of a token are chosen, and what they cost in training.

| architecture | z | in training | source |
| --- | --- | --- | --- |
| topk | the k largest of relu(pre) | AuxK | Gao et al. 2024, arXiv 2406.04093 |
| batchtopk | pre above a threshold that leaves k on average | the k n largest of a batch of n tokens; AuxK | Bussmann et al. 2024, arXiv 2412.06410 |
| matryoshka | as batchtopk | the same, every prefix of the latents reconstructs | Bussmann et al. 2025, arXiv 2503.17547 |
| jumprelu | pre above a threshold of its own | L0 penalty, straight-through estimators | Rajamanoharan et al. 2024b, arXiv 2407.14435 |
| relu | relu(pre) | L1 penalty | Bricken et al. 2023; Group-SAE, arXiv 2410.21508, equations 2 to 4 |
| gated | magnitude where a gate is open | L1 penalty on the gate, which reconstructs alone, too | Rajamanoharan et al. 2024a, arXiv 2404.16014 |

pre = W_enc x + b_enc. Decoder rows have unit norm under every rule, so that an L1 penalty is the
one weighted by the decoder's norms and cannot be lowered by scaling.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Latents:
    """The active latents of each token, at most k of them; every other latent is zero.

    Attributes:
        values: Activations, all >= 0. A zero fills a place that no active latent takes.
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


def positive(z: Float[Tensor, "*token d_sae"]) -> Latents:
    """The positive entries of z, in as many places as the token with most of them needs."""
    most = int((z > 0).sum(-1).max()) if z.numel() else 0
    values, indices = torch.topk(z, max(most, 1), dim=-1, sorted=False)
    return Latents(torch.relu(values), indices)


def batch_cut(
    values: Float[Tensor, "token candidate"],
    k: int,
    members: Int[Tensor, " token"] | None = None,
    n_members: int = 1,
) -> Float[Tensor, " cut"]:
    """The activation from which on a latent is active: the (k n)-th largest of n tokens' values.

    Values that equal the cut are active, too, so that a batch can have a few more than k n.

    Args:
        values: Activations >= 0: at least the k n largest must be among them.
        members: If given, each member layer's tokens have their own cut.
        n_members: How many cuts there are.

    Returns:
        One cut per member layer, or a single one. Infinity for a layer without tokens.
    """
    if members is None:
        return _largest(values, k * len(values)).unsqueeze(0)
    parts = [values[members == member] for member in range(n_members)]
    return torch.stack([_largest(part, k * len(part)) for part in parts])


def _largest(values: Float[Tensor, "token candidate"], n: int) -> Float[Tensor, ""]:
    """The n-th largest; not zero, since a zero is not active."""
    flat = values.flatten()
    if not len(flat):
        return values.new_full((), float("inf"))
    nth = torch.kthvalue(flat, max(len(flat) - n, 0) + 1).values
    return nth.clamp_min(torch.finfo(flat.dtype).tiny)


def l0_penalty(
    l0: Float[Tensor, " token"],
    target: float | None,
    members: Int[Tensor, " token"] | None = None,
    n_members: int = 1,
) -> Float[Tensor, ""]:
    """The mean L0, or its squared relative distance from a target.

    Rajamanoharan et al. 2024b, equation 9, and section 5 ("(L0 / target - 1)^2").

    Args:
        members: If given, each member layer has the target for itself; the mean over the layers.
    """
    if target is None:
        return l0.mean()
    if members is None:
        return (l0.mean() / target - 1).square()
    tokens = torch.zeros(n_members, dtype=l0.dtype, device=l0.device)
    counts = tokens.index_add(0, members, torch.ones_like(l0))
    sums = tokens.index_add(0, members, l0)
    seen = counts > 0
    excess = (sums / counts.clamp_min(1) / target - 1).square() * seen
    return excess.sum() / seen.sum()


def kernel(
    pre: Float[Tensor, "*token"], threshold: Float[Tensor, "*token"], bandwidth: float
) -> Float[Tensor, "*token"]:
    """1 where pre is within half a bandwidth of its threshold: the estimators' rectangle."""
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype)


class JumpReLU(torch.autograd.Function):
    """z = pre where pre > threshold, else 0.

    The threshold's gradient is the straight-through estimate -threshold / bandwidth inside the
    rectangle about it (Rajamanoharan et al. 2024b, equation 11).
    """

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        """Both of shape [token, d_sae]."""
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of pre and threshold."""
        (gradient,) = gradients
        pre, threshold = ctx.saved_tensors
        near = kernel(pre, threshold, ctx.bandwidth)
        return (
            gradient * (pre > threshold),
            gradient * near * (-threshold / ctx.bandwidth),
            None,
        )


class Active(torch.autograd.Function):
    """1 where pre > threshold, else 0.

    The threshold's gradient is the straight-through estimate -1 / bandwidth inside the rectangle
    about it (Rajamanoharan et al. 2024b, equation 12); pre has none.
    """

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        """Both of shape [token, d_sae]."""
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        """Gradients of pre and threshold."""
        (gradient,) = gradients
        pre, threshold = ctx.saved_tensors
        return None, gradient * kernel(pre, threshold, ctx.bandwidth) * (-1 / ctx.bandwidth), None
