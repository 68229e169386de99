"""How SAEs and batches are dealt over devices."""

from __future__ import annotations

from dataclasses import dataclass

from groupsae.errors import InputError


@dataclass(frozen=True)
class Mesh:
    """Devices in `data` rows of `groups` each, one process a device.

    SAEs are dealt evenly over the devices of a row. All devices of a column train the same SAEs,
    each on its share of every batch, and sum their gradients. Every device holds the whole host
    model and runs forwards in turn with the others.

    Attributes:
        data: How many devices share each SAE.
        groups: Over how many the SAEs are dealt.
    """

    data: int
    groups: int

    @classmethod
    def of(cls, devices: int, n_saes: int, data: int | None = None) -> Mesh:
        """The mesh of so many devices.

        Args:
            data: How many devices share each SAE; by default as many as leave none without one.

        Raises:
            InputError: `data` does not divide them.
        """
        if data is None:
            wanted = min(devices, n_saes)
            divisors = (d for d in range(devices, 0, -1) if devices % d == 0)
            data = next(d for d in divisors if devices // d >= wanted)
        if devices < 1 or devices % data:
            raise InputError(
                f"training.data_ranks: {data} does not divide --devices {devices}; the mesh has "
                "data_ranks rows of equal length"
            )
        return cls(data, devices // data)

    @property
    def devices(self) -> int:
        """All of them."""
        return self.data * self.groups

    def most_saes(self, n_saes: int) -> int:
        """SAEs of the fullest device."""
        return -(-n_saes // self.groups)

    def share(self, tokens: int) -> int:
        """Tokens of a batch, or of the buffer, that one row of the mesh has."""
        return -(-tokens // self.data)

    def forwards_in_turn(self, forwards: float) -> float:
        """Forwards that one device runs after another in a step, on average.

        Args:
            forwards: That a step takes of one row of the mesh; less than one where one forward
                serves several steps. A forward is not divided.
        """
        fewer = int(forwards)
        more = forwards - fewer  # the share of steps that take one forward more
        return (1 - more) * -(-fewer // self.groups) + more * -(-(fewer + 1) // self.groups)
