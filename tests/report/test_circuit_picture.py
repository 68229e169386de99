from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import same_color

from groupsae.errors import InputError
from groupsae.report import figures as common
from groupsae.report.circuit_picture import MOST_LABELS, circuit_picture, drawable
from groupsae.report.style import GROUP, THRESHOLD


def picture(n_tokens: int = 5, cells: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    own = [
        {"layer": layer, "position": layer % n_tokens, "latent": 100 + layer, "effect": effect}
        for layer, effect in enumerate([0.8, -0.4, 0.2, -0.1])
    ]
    return {"tokens": [f" w{i}" for i in range(n_tokens)], "cells": own if cells is None else cells}


def test_circles_stand_at_their_layer_and_position_and_show_size_and_sign() -> None:
    shown = picture()
    axes = circuit_picture(shown, layers=range(6)).axes[0]
    circles = axes.get_lines()
    ticks = list(axes.get_xticks())
    for own, cell in zip(circles, shown["cells"], strict=True):
        assert own.get_xdata()[0] == pytest.approx(ticks[cell["position"]])
        assert own.get_ydata()[0] == cell["layer"]
    areas = np.array([own.get_markersize() ** 2 for own in circles])
    effects = np.array([abs(cell["effect"]) for cell in shown["cells"]])
    np.testing.assert_allclose(areas / areas[0], effects / effects[0])
    signs = [GROUP, THRESHOLD, GROUP, THRESHOLD]
    assert all(same_color(own.get_color(), sign) for own, sign in zip(circles, signs, strict=True))
    assert [text.get_text() for text in axes.get_yticklabels()] == list("012345")
    assert [text.get_text() for text in axes.get_xticklabels()] == [f"␣w{i}" for i in range(5)]
    assert [text.get_text() for text in axes.texts] == ["100", "101", "102", "103"]


def test_latents_at_one_place_stand_side_by_side_and_numbers_never_overlap() -> None:
    cells = [
        {"layer": layer, "position": 1, "latent": 12_345 + i, "effect": 1 / (i + 1)}
        for layer in (0, 1)
        for i in range(20)
    ]
    drawn = circuit_picture(picture(cells=cells))
    axes = drawn.axes[0]
    drawn.canvas.draw()
    ticks = axes.get_xticks()
    for layer in (0, 1):
        circles = [own for own in axes.get_lines() if own.get_ydata()[0] == layer]
        assert len(circles) == 20
        x = np.array([axes.transData.transform((own.get_xdata()[0], 0))[0] for own in circles])
        radii = np.array([own.get_markersize() for own in circles]) / 2 * drawn.dpi / 72
        assert all(np.diff(x) > radii[1:] + radii[:-1])  # none covers its neighbour
        assert ticks[0] < circles[0].get_xdata()[0] < circles[-1].get_xdata()[0] < ticks[2]
    assert 2 <= len(axes.texts) <= MOST_LABELS
    boxes = [text.get_window_extent() for text in axes.texts]
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[i + 1 :])


def test_of_a_long_prompt_the_positions_with_latents_are_shown() -> None:
    cells = [
        {"layer": 0, "position": position, "latent": 1, "effect": 0.5} for position in (99, 3, 50)
    ]
    axes = circuit_picture(picture(100, cells)).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["␣w3", "␣w50", "␣w99"]
    ticks = list(axes.get_xticks())
    x = [own.get_xdata()[0] for own in axes.get_lines()]
    assert x == pytest.approx([ticks[2], ticks[0], ticks[1]])


def test_a_picture_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="finite effect"):
        circuit_picture(picture(cells=[]))
    cell = {"layer": 0, "position": 0, "latent": 1, "effect": None}
    with pytest.raises(InputError, match="finite effect"):
        circuit_picture(picture(cells=[cell]))


def test_effects_of_zero_are_drawn_as_dots() -> None:
    cell = {"layer": 0, "position": 0, "latent": 1, "effect": 0.0}
    assert len(circuit_picture(picture(cells=[cell])).axes[0].get_lines()) == 1


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", "␣the"),
        ("a b ", "a b␣"),
        ("  ", "␣␣"),
        ("", "∅"),
        ("\n", "\\n"),
        ("$x$", "$x$"),
        ("\u202eabc", "\\u202eabc"),
        ("中", "\\u4e2d"),
        ("x" * 40, "x" * 13 + "…"),
    ],
)
def test_tokens_are_shown_harmlessly(token: str, shown: str) -> None:
    assert drawable(token, 14) == shown


@settings(max_examples=15, deadline=None)
@given(st.lists(st.text(st.characters(), max_size=20), min_size=5, max_size=5))
def test_any_tokens_can_be_drawn(tokens: list[str]) -> None:
    """None is a formula, and the font has all characters that are drawn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert common.encode(circuit_picture(picture() | {"tokens": tokens}), "svg")
