"""What a step must cost at least, and how its cost grows with the number of groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.workload import Shape
from groupsae.errors import InputError
from groupsae.grouping.cost import CostModel


@dataclass(frozen=True)
class StepCost:
    """Operations of one step that nobody can do without.

    Attributes:
        host: The host model's forward up to the last layer that is trained on: A of C(G).
        encoder: One SAE's encoder product, 2 d_model d_sae a token. A sparse step's other products
            shrink by k / d_sae and are left out; a dense step has five of this size.
        paper: C(G) of the paper, with a dense step.
    """

    host: float
    encoder: float
    model: CostModel

    @classmethod
    def of(cls, shape: Shape, *, context_length: int, batch_tokens: int) -> StepCost:
        model = CostModel(
            d_model=shape.d_model,
            n_layers=shape.n_layers,
            context_length=context_length,
            d_sae=shape.d_sae,
            last_layer=max(shape.layers),
        )
        return cls(
            host=float(batch_tokens * model.forward_flops),
            encoder=float(batch_tokens * 2 * shape.d_model * shape.d_sae),
            model=model,
        )

    def flops(self, saes: int) -> float:
        """Operations of a sparse step of so many SAEs, at least."""
        return self.host + saes * self.encoder

    def floor_ms(self, saes: int, *, host_gflops: float, encoder_gflops: float) -> float:
        """Milliseconds that these operations take at these rates of matrix products."""
        return 1e-6 * (self.host / host_gflops + saes * self.encoder / encoder_gflops)

    def dense_ratio(self, G: int) -> float:
        """C(G) / C(1) as the paper predicts it, with a dense step."""
        return self.model.flops_per_token(G) / self.model.flops_per_token(1)

    def sparse_ratio(self, G: int) -> float:
        """C(G) / C(1) of the operations that a sparse step cannot do without."""
        return self.flops(G) / self.flops(1)


def best_rate(gflops: Mapping[str, float], dtypes: Iterable[str]) -> float | None:
    """The fastest product of these data types; None if none was measured."""
    wanted = tuple(f"{dtype} " for dtype in dtypes)
    return max((rate for name, rate in gflops.items() if name.startswith(wanted)), default=None)


@dataclass(frozen=True)
class Line:
    """Cost of a step in milliseconds: A + T G."""

    A: float
    T: float

    @classmethod
    def through(cls, groups: Sequence[int], milliseconds: Sequence[float]) -> Line:
        """The line of least squares.

        Raises:
            InputError: There are not two different numbers of groups.
        """
        if len(set(groups)) < 2:
            raise InputError(
                f"--groups {sorted(set(groups))}: a line A + T G needs two different G"
            )
        design = np.stack([np.ones(len(groups)), np.asarray(groups, float)], axis=1)
        (A, T), *_ = np.linalg.lstsq(design, np.asarray(milliseconds, float))
        return cls(float(A), float(T))

    def at(self, G: int) -> float:
        return self.A + self.T * G


def read_groups(text: str, layers: int) -> list[int]:
    """Numbers of groups as in "1,2,3,all", ascending.

    Raises:
        InputError: One is no number from 1 to the number of layers.
    """
    found = set()
    for part in text.split(","):
        part = part.strip()
        number = layers if part == "all" else int(part) if part.isdecimal() else 0
        if not 1 <= number <= layers:
            raise InputError(
                f"--groups {text}: {part!r} is no number of groups; there are {layers} layers, so "
                f"give numbers from 1 to {layers}, or all"
            )
        found.add(number)
    return sorted(found)
