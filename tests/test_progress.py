from __future__ import annotations

import io
import sys

import pytest

from groupsae import progress as module
from groupsae.progress import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = {"seconds": 0.0}
    monkeypatch.setattr(module.time, "monotonic", lambda: now["seconds"])
    return now


def test_plain_lines_where_there_is_no_terminal(clock, capsys):
    with progress("train", 100) as bar:
        for _ in range(4):
            clock["seconds"] += 6
            bar.advance(25, "loss 0.5")
    assert capsys.readouterr().err.splitlines() == [
        "train: 50 of 100 tokens, 4 tokens/s, 12 s left, loss 0.5",
        "train: 100 of 100 tokens, 4 tokens/s, 0 s left, loss 0.5",
        "train: 100 tokens in 24.0 s (4 tokens/s), loss 0.5",
    ]


def test_a_bar_with_rate_and_time_left_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress("measure [layers]", 100) as bar:
        bar.advance(100, "done [well]")
    shown = terminal.getvalue()
    assert "tokens/s" in shown
    assert "100%" in shown
    assert "done [well]" in shown


def test_what_was_done_before_does_not_count_into_the_rate(clock):
    with progress("train", 1000) as bar:
        bar.skip(800)
        clock["seconds"] = 20.0
        bar.advance(100)
        assert bar.done == 900
        assert bar.rate() == pytest.approx(5)


def test_the_end_is_shown_when_the_work_fails(capsys):
    with pytest.raises(ZeroDivisionError), progress("train", 100) as bar:
        bar.advance(30)
        raise ZeroDivisionError
    assert "train: 30 tokens in" in capsys.readouterr().err
