"""Shards of SAEs: latents of one SAE that several processes hold together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from groupsae.config import SAEConfig as AskedSAE
from groupsae.errors import InputError
from groupsae.sae import SAE, SAEConfig
from groupsae.sae.kernels import check_takes_shards
from groupsae.training.team import Team

OF_LATENTS = frozenset(("W_enc", "b_enc", "W_dec"))  # parameters with a row for each latent


class ShardRanks:
    """The processes that hold the shards of the same SAEs.

    The :class:`groupsae.sae.kernels.sharded.Shards` of a training: all call the same in the same
    order.

    Args:
        ranks: Theirs, by shard; this process's is among them.
        group: For sums within them.
    """

    def __init__(self, team: Team, ranks: Sequence[int], group: dist.ProcessGroup) -> None:
        self.index, self.count = list(ranks).index(team.rank), len(ranks)
        self._team, self._ranks, self._group = team, ranks, group

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all shards, in its place."""
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """That of each shard, one after another along a new first dimension."""
        gathered = tensor.new_empty(self.count, *tensor.shape)
        dist.all_gather(list(gathered), tensor.contiguous(), group=self._group)
        return gathered

    def to_first(self, tensor: Tensor, rows: Sequence[int]) -> Tensor | None:
        """The rows of all shards, in the first one; None elsewhere.

        Args:
            tensor: On the CPU.
            rows: How many each shard has.
        """
        if self.index:
            self._team.exchange([(self._ranks[0], tensor)], [])
            return None
        parts = [tensor, *(tensor.new_empty(n, *tensor.shape[1:]) for n in rows[1:])]
        self._team.exchange([], list(zip(self._ranks[1:], parts[1:], strict=True)))
        return torch.cat(parts)


@dataclass(frozen=True)
class Shard:
    """The latents of an SAE that this process holds: all of them where it has it whole.

    Attributes:
        whole: The undivided SAE's.
        ranks: Those that hold the others; None where there are none.
    """

    whole: SAEConfig
    ranks: ShardRanks | None = None

    @property
    def latents(self) -> range:
        """Their numbers."""
        return self._latents_of(0 if self.ranks is None else self.ranks.index)

    def part_of(self, sae: SAE) -> SAE:
        """An SAE of these latents alone, from the undivided one."""
        if self.ranks is None:
            return sae
        rows = slice(self.latents.start, self.latents.stop)
        start = torch.Generator()  # of weights to be overwritten; the global one stays
        config = replace(sae.config, d_sae=len(self.latents))
        part = SAE(config, mean=sae.mean, scale=sae.scale, generator=start)
        weights = sae.state_dict()
        part.load_state_dict(
            {name: w[rows] if name in OF_LATENTS else w for name, w in weights.items()}
        )
        return part

    def joined(self, part: SAE) -> SAE | None:
        """The undivided SAE on the CPU, in the process that has its first latents; else None."""
        if self.ranks is None:
            return part
        rows = [len(self._latents_of(index)) for index in range(self.ranks.count)]
        weights = {name: weight.cpu() for name, weight in part.state_dict().items()}
        for name in sorted(OF_LATENTS):  # in the same order everywhere
            whole = self.ranks.to_first(weights[name], rows)
            if whole is not None:
                weights[name] = whole
        if self.ranks.index:
            return None
        start = torch.Generator()
        sae = SAE(self.whole, mean=part.mean.cpu(), scale=part.scale.cpu(), generator=start)
        sae.load_state_dict(weights)
        return sae

    def _latents_of(self, index: int) -> range:
        count = 1 if self.ranks is None else self.ranks.count
        start, stop = (self.whole.d_sae * i // count for i in (index, index + 1))
        return range(start, stop)


def check_shards(asked: AskedSAE, kernel: str, d_model: int, count: int) -> None:
    """Refuse SAEs that cannot be divided into so many shards.

    Args:
        asked: The config's `sae`.
        kernel: Its `training.kernel`.

    Raises:
        InputError: Their architecture, what their layers learn, or the kernel is not known for
            shards, or a shard would have fewer than k latents.
    """
    check_takes_shards(kernel)
    given = f"training.latent_ranks: {count}"
    if asked.architecture not in ("topk", "batchtopk"):
        raise InputError(
            f"{given} goes with sae.architecture=topk or batchtopk, not with {asked.architecture}; "
            "set training.latent_ranks=1"
        )
    if asked.affine in ("bias", "gain"):
        raise InputError(
            f"{given} goes with sae.affine=none, scale or center, not with {asked.affine}; set "
            "training.latent_ranks=1"
        )
    d_sae, k = asked.width(d_model), asked.k or 0
    if d_sae // count < k:
        raise InputError(
            f"{given} leaves {d_sae // count} of {d_sae} latents to a process, and a token has "
            f"sae.k={k} of them; set training.latent_ranks={max(d_sae // k, 1)} or less"
        )
