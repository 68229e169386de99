"""At which member layer a token is seen, and which rows make a balanced batch. All on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor


def draw(
    tokens: int, weights: Sequence[float], generator: torch.Generator
) -> Int[Tensor, " token"]:
    """A member for each token, independently, with probability in proportion to its weight.

    Equal weights take one `randint` (Group-SAE, arXiv 2410.21508, section 3.3). Others are drawn by
    inversion: the first member whose cumulative share is above a uniform number.
    """
    if len(set(weights)) == 1:
        return torch.randint(len(weights), (tokens,), generator=generator)
    shares = torch.tensor(weights, dtype=torch.float64) / max(weights)
    cumulative = shares.cumsum(0)
    uniform = torch.rand(tokens, dtype=torch.float64, generator=generator)
    return torch.searchsorted(cumulative / cumulative[-1], uniform, right=True)


def turns(start: int, tokens: int, members: int) -> Int[Tensor, " member"]:
    """How many of the tokens `start` to `start + tokens - 1` are each member's.

    The members take turns: the t-th token handed out is that of member t mod `members`. So any
    stretch of tokens has equally many of each, but for one more of some where it cannot be divided,
    and over successive stretches it is every member's turn to have one more.
    """
    before_first = (torch.arange(members) - start) % members
    return (tokens - before_first + members - 1) // members


def deal(
    tokens: int, dealt: Int[Tensor, " member"], generator: torch.Generator
) -> Int[Tensor, " token"]:
    """Members for new tokens, so that these and those dealt before fill the earliest turns.

    Args:
        dealt: How many of the tokens before, handed out or not, are each member's.

    Returns:
        The members of those turns, in random order.
    """
    members = len(dealt)
    end = int(dealt.sum()) + tokens  # at least `tokens` turns before it are free
    first = torch.arange(members) + members * dealt
    free = torch.cat([torch.arange(turn, max(turn, end), members) for turn in first.tolist()])
    earliest = free.sort().values[:tokens]
    return earliest[torch.randperm(tokens, generator=generator)] % members


def first_of_each(
    order: Int[Tensor, " row"], members: Int[Tensor, " row"], counts: Int[Tensor, " member"]
) -> Int[Tensor, " taken"]:
    """The first rows in `order` that are of each member, as many as `counts` says, in that order.

    Args:
        members: Of each row, not of each place in `order`.
    """
    in_order = members[order]
    places = [
        (in_order == member).nonzero().squeeze(1)[:count]
        for member, count in enumerate(counts.tolist())
    ]
    return order[torch.cat(places).sort().values]
