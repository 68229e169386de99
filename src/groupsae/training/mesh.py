"""How SAEs and batches are dealt over the processes, or devices, that train together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from groupsae.config import TrainingConfig
from groupsae.errors import InputError


@dataclass(frozen=True)
class Mesh:
    """Processes in `data` rows of `groups` places, each place of `latents` processes.

    SAEs are dealt over the places of a row. The places of a column train the same SAEs, each on its
    share of every batch, and sum their gradients. The processes of a place, neighbours in rank,
    hold a shard of the latents of each of its SAEs. Every process holds the whole host model and
    runs forwards in turn with the others.

    Attributes:
        data: How many places share each SAE's batches.
        groups: Over how many the SAEs are dealt.
        latents: Over how many processes the latents of each SAE are divided.
    """

    data: int
    groups: int
    latents: int = 1

    @classmethod
    def of(cls, devices: int, n_saes: int, data: int | None = None, latents: int = 1) -> Mesh:
        """The mesh of so many processes.

        Args:
            data: How many share each SAE's batches; by default as many as leave none without one.
            latents: Over how many the latents of each are divided.

        Raises:
            InputError: `latents`, or the two together, do not divide them.
        """
        if devices < 1 or devices % latents:
            raise InputError(
                f"training.latent_ranks: {latents} does not divide {devices} devices; each SAE is "
                "held by latent_ranks of them"
            )
        places = devices // latents
        if data is None:
            wanted = min(places, n_saes)
            divisors = (d for d in range(places, 0, -1) if places % d == 0)
            data = next(d for d in divisors if places // d >= wanted)
        if places % data:
            among = f"{devices} devices" if latents == 1 else f"{places} times {latents} devices"
            raise InputError(
                f"training.data_ranks: {data} does not divide {among}; the mesh has data_ranks "
                "rows of equal length"
            )
        return cls(data, places // data, latents)

    @classmethod
    def for_training(
        cls, devices: int, n_saes: int, training: TrainingConfig, architectures: Collection[str]
    ) -> Mesh:
        """The mesh that a config asks for.

        Args:
            architectures: The SAEs'. All but topk choose latents, or pay for them, by the batch,
                which cannot be shared then.

        Raises:
            InputError: As :meth:`of`; or batches are to be shared that cannot be.
        """
        by_batch = sorted({*architectures} - {"topk"})
        data, fewer_tokens = training.data_ranks, training.batch_tokens < devices
        if data is None and (by_batch or fewer_tokens):
            data = 1
        mesh = cls.of(devices, n_saes, data, training.latent_ranks)
        if mesh.data > 1 and by_batch:
            raise InputError(
                f"training.data_ranks: {mesh.data} goes with sae.architecture=topk alone, not with "
                f"{', '.join(by_batch)}, which looks at the whole batch; set training.data_ranks=1"
            )
        if training.batch_tokens < mesh.data:
            raise InputError(
                f"training.batch_tokens: {training.batch_tokens} leaves some of {mesh.data} "
                "processes without a token; raise it, or lower training.data_ranks"
            )
        return mesh

    @property
    def devices(self) -> int:
        """All of them."""
        return self.data * self.groups * self.latents

    def column(self, rank: int) -> int:
        """Which SAEs a process trains."""
        return rank // self.latents % self.groups

    def row(self, rank: int) -> int:
        """Which share of a batch it takes."""
        return rank // (self.latents * self.groups)

    def shard(self, rank: int) -> int:
        """Which latents it holds."""
        return rank % self.latents

    def sharing_batches(self) -> list[list[int]]:
        """The processes that hold the same latents of the same SAEs, each group by row."""
        step = self.groups * self.latents
        return [list(range(first, self.devices, step)) for first in range(step)]

    def sharing_latents(self) -> list[list[int]]:
        """The processes that hold the shards of the same SAEs, each group by shard."""
        firsts = range(0, self.devices, self.latents)
        return [list(range(first, first + self.latents)) for first in firsts]

    def deal(self, costs: Mapping[str, float]) -> dict[str, int]:
        """The column of each SAE, so that they have about as much to do: the dearest go first."""
        loads = [0.0] * self.groups
        dealt = {}
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            column = loads.index(min(loads))
            loads[column] += costs[name]
            dealt[name] = column
        return {name: dealt[name] for name in costs}

    def most_saes(self, n_saes: int) -> int:
        """SAEs of the fullest process, where all cost the same."""
        return -(-n_saes // self.groups)

    def share(self, tokens: int) -> int:
        """Tokens of a batch that one process learns from."""
        return -(-tokens // self.data)
