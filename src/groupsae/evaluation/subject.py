"""What is evaluated: the SAEs of one partition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from groupsae.sae import SAE


@dataclass(frozen=True)
class Subject:
    """A partition's SAEs.

    Attributes:
        partition: "groups", or "baseline": one SAE per layer.
        saes: The SAE of each layer, from below; layers of a group share one.
    """

    partition: str
    saes: Mapping[int, SAE]

    @property
    def groups_total(self) -> int:
        """G: how many SAEs there are."""
        return len(set(self.saes.values()))

    @property
    def name(self) -> str:
        """`baseline`, or `G=2`."""
        return self.partition if self.partition == "baseline" else f"G={self.groups_total}"
