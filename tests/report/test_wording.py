from __future__ import annotations

import pytest

from groupsae.report.wording import choice, duration, layer_range, sae_label, si


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
