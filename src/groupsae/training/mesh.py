"""How SAEs and batches are dealt over the processes, or devices, that train together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from groupsae.errors import InputError


@dataclass(frozen=True)
class Mesh:
    """Processes in `data` rows of `groups` each.

    SAEs are dealt over the processes of a row. All processes of a column train the same SAEs, each
    on its share of every batch, and sum their gradients. Every process holds the whole host model
    and runs forwards in turn with the others.

    Attributes:
        data: How many processes share each SAE.
        groups: Over how many the SAEs are dealt.
    """

    data: int
    groups: int

    @classmethod
    def of(cls, devices: int, n_saes: int, data: int | None = None) -> Mesh:
        """The mesh of so many processes.

        Args:
            data: How many share each SAE; by default as many as leave none without one.

        Raises:
            InputError: `data` does not divide them.
        """
        if data is None:
            wanted = min(devices, n_saes)
            divisors = (d for d in range(devices, 0, -1) if devices % d == 0)
            data = next(d for d in divisors if devices // d >= wanted)
        if devices < 1 or devices % data:
            raise InputError(
                f"training.data_ranks: {data} does not divide {devices} devices; the mesh has "
                "data_ranks rows of equal length"
            )
        return cls(data, devices // data)

    @property
    def devices(self) -> int:
        """All of them."""
        return self.data * self.groups

    def column(self, rank: int) -> int:
        """Which SAEs a process trains."""
        return rank % self.groups

    def row(self, rank: int) -> int:
        """Which share of a batch it takes."""
        return rank // self.groups

    def ranks(self, column: int) -> list[int]:
        """The processes that train the same SAEs."""
        return [row * self.groups + column for row in range(self.data)]

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
