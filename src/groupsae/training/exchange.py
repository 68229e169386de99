"""What several processes give each other while they train: contexts, rows, gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from groupsae.errors import InputError
from groupsae.host.ahead import ContextsAhead
from groupsae.host.faults import BrokenText
from groupsae.host.tokens import EndOfText, TokenStream
from groupsae.sae import SAE
from groupsae.sae.kernels import Step, StepResult
from groupsae.training.team import Team


class SharedContexts:
    """The contexts of one stream for all processes: the first reads, all are given the same.

    Args:
        stream: Read in the first process alone; others know it by its shape.
    """

    def __init__(self, stream: TokenStream, team: Team, ahead: int) -> None:
        self.context_length = stream.context_length
        self._team = team
        self._open = ExitStack()
        self._contexts = ContextsAhead(stream, ahead) if team.first else None
        if self._contexts is not None:
            self._open.enter_context(self._contexts)

    def next_contexts(self, n: int) -> Int[Tensor, "n context"]:
        """The next `n` contexts; what the first process's stream raises, all raise."""
        contexts = torch.empty(n, self.context_length, dtype=torch.int64)
        failed = None
        if self._contexts is not None:
            try:
                contexts.copy_(self._contexts.next_contexts(n))
            except InputError as error:
                left = error.contexts_left if isinstance(error, EndOfText) else None
                failed = [str(error), left, isinstance(error, BrokenText)]
        failed = self._team.share(failed)
        if failed is None:
            self._team.share_tensor(contexts)
            return contexts
        message, left, broken = failed
        if left is not None:
            raise EndOfText(message, left)
        raise (BrokenText if broken else InputError)(message)

    @property
    def skipped(self) -> dict[str, int]:
        """Documents that were passed over, by kind; known to the first process."""
        return {} if self._contexts is None else self._contexts.skipped

    def state_dict(self) -> dict[str, Any]:
        """The place in the text; known to the first process."""
        return {} if self._contexts is None else self._contexts.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where `state_dict` was taken, in the first process."""
        if self._contexts is not None:
            self._contexts.load_state_dict(state)

    def __enter__(self) -> SharedContexts:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


class RowExchange:
    """Sends the rows of each forward to the processes that learn from them.

    Args:
        wanted: The mixtures that each process learns from, by rank.
    """

    def __init__(self, team: Team, wanted: Sequence[Sequence[str]]) -> None:
        self.rank, self.size = team.rank, team.size
        self.own = wanted[team.rank]
        self._team, self._wanted = team, wanted

    def rows(
        self,
        computed: Mapping[str, Tensor],
        received: Sequence[Mapping[str, Tensor]],
        too_long: Sequence[Bool[Tensor, " _"]],  # of each forward its own length
    ) -> None:
        """Fill what is received of each forward; the n-th one's comes from the n-th process."""
        sending, receiving = [], []
        for rank, names in enumerate(self._wanted):
            if rank != self.rank and self.rank < len(received):
                tensors = *(computed[name] for name in names), too_long[self.rank]
                sending += [(rank, tensor) for tensor in tensors]
            if rank != self.rank and rank < len(received):
                tensors = *received[rank].values(), too_long[rank]
                receiving += [(rank, tensor) for tensor in tensors]
        if self.rank < len(received):
            for name, rows in received[self.rank].items():
                rows.copy_(computed[name])
        self._team.exchange(sending, receiving)


class SharedStep:
    """A step of one SAE by several processes, each on its share of the batch's tokens.

    All of them hold the SAE and the whole batch. The loss is a sum over tokens divided by the
    variance of the whole batch: a process's own gradient, times its share's variance over the
    whole's, summed over the processes, is the gradient of the whole. That holds for topk alone:
    other rules choose latents, or pay for them, by the batch.

    Args:
        step: The kernel's.
        group: The processes.
        row: Which share is this process's.
        rows: How many there are.
    """

    def __init__(self, step: Step, group: dist.ProcessGroup, row: int, rows: int) -> None:
        self._step, self._group, self._row, self._rows = step, group, row, rows

    def __call__(
        self,
        sae: SAE,
        x: Float[Tensor, "token d_model"],
        *,
        members: Int[Tensor, " token"] | None = None,
        **options: Any,
    ) -> StepResult:
        """Loss and gradients of the whole batch, in every process."""
        share = slice(*(len(x) * row // self._rows for row in (self._row, self._row + 1)))
        own = self._step(
            sae, x[share], members=None if members is None else members[share], **options
        )
        weight = _variance(x[share]) / _variance(x)
        tokens = (share.stop - share.start) / len(x)
        numbers = torch.stack([own.loss * weight, own.fvu * weight, own.auxk * weight])
        numbers = torch.cat([numbers, (own.l0 * tokens).to(numbers.dtype)[None]])
        # b_dec apart from what shards have rows of: all of them must find the same bits.
        shared = torch.cat([numbers, own.gradients["b_dec"] * weight])
        dist.all_reduce(shared, group=self._group)
        names = [name for name in own.gradients if name != "b_dec"]
        flat = torch.cat([own.gradients[name].flatten() * weight for name in names])
        dist.all_reduce(flat, group=self._group)
        fired = own.fired.to(torch.uint8)
        dist.all_reduce(fired, dist.ReduceOp.MAX, group=self._group)
        loss, fvu, auxk, l0 = shared[: len(numbers)]
        sizes = [own.gradients[name].numel() for name in names]
        parts = torch.split(flat, sizes)
        gradients = {
            name: part.view_as(own.gradients[name]) for name, part in zip(names, parts, strict=True)
        }
        gradients["b_dec"] = shared[len(numbers) :]
        return replace(
            own, gradients=gradients, loss=loss, fvu=fvu, auxk=auxk, l0=l0, fired=fired.bool()
        )


def _variance(x: Float[Tensor, "token d_model"]) -> Float[Tensor, ""]:
    """The sum of squares about the mean."""
    return (x - x.mean(0)).square().sum()
