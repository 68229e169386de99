"""A figure of the page, and the words that go with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Illustration:
    """A figure that is still to be drawn, and the words that go with it."""

    name: str
    title: str
    draw: Callable[[], Figure]
    alt: str
    caption: str
    definitions: tuple[tuple[str, str], ...] = ()
