from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupsae.report.wording import (
    choice,
    duration,
    layer_range,
    sae_label,
    si,
    signed,
    visible,
)


@pytest.mark.parametrize(
    ("layers", "text"), [([3], "3"), ([3, 4, 5, 8], "3–5, 8"), ([0, 2, 4], "0, 2, 4"), ([], "")]
)
def test_layer_range(layers: list[int], text: str) -> None:
    assert layer_range(layers) == text


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("layers-03-06", "layers 3–6"),
        ("layers-12", "layer 12"),
        ("mine", "mine"),
        ("x" * 40, "x" * 23 + "…"),
    ],
)
def test_sae_label(name: str, label: str) -> None:
    assert sae_label(name) == label


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.00 FLOP"), (999, "999 FLOP"), (8e6, "8.00 MFLOP"), (207.62e15, "208 PFLOP")],
)
def test_si(value: float, text: str) -> None:
    assert si(value, "FLOP") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(48, "48.0 s"), (59.99, "60.0 s"), (312.9, "5 min 13 s"), (7500, "2 h 05 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("partition", "said"),
    [
        ({"method": "linkage", "threshold": 0.2}, "the smallest G with AMAD below 0.2"),
        ({"method": "even", "threshold": None}, "G was given"),
        ({"method": "explicit", "threshold": None}, "the groups were given"),
    ],
)
def test_choice(partition: dict[str, object], said: str) -> None:
    assert choice(partition) == said


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain $x$ <b>", "plain $x$ <b>"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\u202etxt", "\\u202etxt"),
        ("\ud800", "\\ud800"),
        ("\U000e0001", "\\U000e0001"),
        ("x" * 61, "x" * 59 + "…"),
        ("", ""),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_what_a_font_lacks_is_escaped() -> None:
    assert visible("a中", drawable={ord("a")}) == "a\\u4e2d"


@given(st.text(st.characters()), st.integers(1, 80))
def test_visible_text_is_short_and_has_nothing_that_disturbs(text: str, most: int) -> None:
    shown = visible(text, most)
    assert len(shown) <= most
    shown.encode()
    assert all(unicodedata.category(character)[0] not in "C" for character in shown)
    assert len(shown.splitlines()) <= 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.01234, "+0.0123"),
        (-0.5, "−0.500"),
        (-4.1e-05, "−4.10e−05"),
        (123.0, "+123"),
        (0, "+0.00"),
    ],
)
def test_signed(value: float, text: str) -> None:
    assert signed(value) == text
