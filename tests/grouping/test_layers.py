from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsae.errors import InputError
from groupsae.grouping.layers import checked_layers, format_layers


def test_numbers_of_any_integer_type_become_plain_integers() -> None:
    layers = checked_layers(list(np.array([0, 2, 5])))
    assert layers == (0, 2, 5)
    assert all(type(layer) is int for layer in layers)


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ([], "empty"),
        ([0, -1], "-1 is no layer number"),
        ([0, 1.5], "1.5 is no layer number"),
        ([0, "1"], "'1' is no layer number"),
        ([False, True], "False is no layer number"),
        ([0, 1, 1], "layer 1 stands twice"),
        ([0, 2, 1], "layer 1 comes after layer 2"),
    ],
)
def test_what_is_no_list_of_layers_is_refused(layers: list[object], problem: str) -> None:
    with pytest.raises(InputError, match=f"^mine: .*{problem}"):
        checked_layers(layers, "mine")


@given(st.sets(st.integers(0, 30), min_size=1))
@settings(deadline=None)
def test_the_short_form_names_exactly_the_layers(layers: set[int]) -> None:
    named = []
    for run in format_layers(sorted(layers)).split(", "):
        first, _, last = run.partition("-")
        named += range(int(first), int(last or first) + 1)
    assert named == sorted(layers)


def test_runs_are_joined() -> None:
    assert format_layers((0, 1, 2, 5, 7, 8)) == "0-2, 5, 7-8"
