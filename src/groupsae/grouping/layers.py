"""Lists of layer numbers: checked, and written for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral

from groupsae.errors import InputError


def checked_layers(layers: Sequence[object], name: str = "layers") -> tuple[int, ...]:
    """Layer numbers as a tuple of int, once they are known to be at least one, >= 0 and ascending.

    Raises:
        InputError: naming the list (`name`) and the first entry that cannot be.
    """
    numbers = []
    for layer in layers:
        if not isinstance(layer, Integral) or isinstance(layer, bool) or layer < 0:
            raise InputError(f"{name}: {layer!r} is no layer number; layers are integers from 0")
        numbers.append(int(layer))
    if not numbers:
        raise InputError(f"{name}: the list is empty; name at least one layer")
    for lower, upper in pairwise(numbers):
        if lower == upper:
            raise InputError(f"{name}: layer {lower} stands twice; name each layer once")
        if lower > upper:
            raise InputError(
                f"{name}: layer {upper} comes after layer {lower}; list layers in ascending order"
            )
    return tuple(numbers)


def format_layers(layers: Sequence[int]) -> str:
    """Ascending layer numbers in short: `(0, 1, 2, 5)` becomes `"0-2, 5"`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
