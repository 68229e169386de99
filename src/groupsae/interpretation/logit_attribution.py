"""Which next tokens a latent speaks for: its decoder row through the unembedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from groupsae.errors import InputError
from groupsae.interpretation.unembedding import Unembedding

DEFINITION = (
    "W_U (g * d) less its mean over the vocabulary: W_U the unembedding, g the gain of the final "
    "norm, d the latent's decoder row at the layer (a LayerNorm's removal of the mean applied). "
    "The norm's bias, and its division by the size of the residual stream, are left out, as are "
    "all blocks between the layer and the end: the direct path alone. Only the order, and the "
    "ratio of two of a latent's entries, mean something"
)


@dataclass(frozen=True)
class LogitAttribution:
    """The ends of each latent's logit attribution, the outermost first.

    Attributes:
        largest, smallest: Token ids.
        largest_values, smallest_values: Their logits less the mean over the vocabulary.
    """

    largest: Int[Tensor, "latent n"]
    largest_values: Float[Tensor, "latent n"]
    smallest: Int[Tensor, "latent n"]
    smallest_values: Float[Tensor, "latent n"]


@torch.no_grad()
def logit_attribution(
    rows: Float[Tensor, "latent d_model"],
    unembedding: Unembedding,
    *,
    n: int = 10,
    token_ids: Int[Tensor, " known"] | None = None,
    block: int = 1024,
) -> LogitAttribution:
    """The n largest and smallest entries of each row's logit attribution; see :data:`DEFINITION`.

    Args:
        rows: Decoder rows, as :func:`groupsae.evaluation.similarity.decoder_rows` gives them for a
            layer.
        token_ids: The vocabulary: those that the tokenizer knows, where the unembedding was padded
            to more. By default all.
        block: Rows whose logits, `[block, vocab]`, are in memory at a time.

    Raises:
        InputError: If there are fewer than n tokens, or n is not positive.
    """
    ids = torch.arange(len(unembedding.W_U)) if token_ids is None else token_ids
    if not 0 < n <= len(ids):
        raise InputError(
            f"n={n} tokens at each end of a logit attribution: it must lie between 1 and the "
            f"{len(ids):,} tokens of the vocabulary"
        )
    ids = ids.to(unembedding.W_U.device)
    W_U = unembedding.W_U[ids]
    W_U = W_U - W_U.mean(0)  # so that each row's logits have mean 0
    parts: list[tuple[Tensor, ...]] = []
    for some in torch.split(rows, block):
        logits = unembedding.directions(some) @ W_U.T
        high, low = logits.topk(n), logits.topk(n, largest=False)
        parts.append((ids[high.indices], high.values, ids[low.indices], low.values))
    return LogitAttribution(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))
