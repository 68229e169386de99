"""Progress of long work: a bar with rate and ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts units done out of a total; made by :func:`progress`."""

    def __init__(self, description: str, total: int, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = 0
        self._skipped = 0
        self._note = ""
        self._start = time.monotonic()

    def advance(self, units: int, note: str = "") -> None:
        """Report `units` more as done; `note` is shown beside them (a loss, say)."""
        self.done += units
        self._note = note or self._note
        self._show()

    def skip(self, units: int) -> None:
        """Count `units` as done before the start, outside the rate."""
        self.done += units
        self._skipped += units
        self._show()

    def rate(self) -> float:
        """Units per second since the start."""
        return (self.done - self._skipped) / max(time.monotonic() - self._start, 1e-9)

    def _show(self) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError


class _Lines(Progress):
    """For logs: a line when it starts, every ten seconds, and when it ends."""

    def __init__(self, description: str, total: int, unit: str) -> None:
        super().__init__(description, total, unit)
        self._last = self._start

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            rate = self.rate()
            left = (self.total - self.done) / rate if rate else float("inf")
            _line(
                f"{self.description}: {self.done:,} of {self.total:,} {self.unit}, "
                f"{rate:,.0f} {self.unit}/s, {left:.0f} s left{_separated(self._note)}"
            )

    def _close(self) -> None:
        seconds = time.monotonic() - self._start
        _line(
            f"{self.description}: {self.done - self._skipped:,} {self.unit} in {seconds:.1f} s "
            f"({self.rate():,.0f} {self.unit}/s){_separated(self._note)}"
        )


class _Silent(Progress):
    """For all but the first of several processes."""

    def _show(self) -> None: ...

    def _close(self) -> None: ...


class _Bar(Progress):
    """For a terminal."""

    def __init__(self, description: str, total: int, unit: str) -> None:
        super().__init__(description, total, unit)
        from rich import progress as rich_progress
        from rich.console import Console

        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.TaskProgressColumn(),
            rich_progress.TextColumn("{task.fields[rate]}"),
            rich_progress.TimeRemainingColumn(),
            rich_progress.TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(description, total=total, rate="", note="")
        self._bar.start()

    def _show(self) -> None:
        self._bar.update(
            self._task,
            completed=self.done,
            rate=f"{self.rate():,.0f} {self.unit}/s",
            note=self._note,
        )

    def _close(self) -> None:
        self._bar.stop()


@contextmanager
def progress(description: str, total: int, unit: str = "tokens") -> Iterator[Progress]:
    """Show how far `description` is, on standard error, until the block ends."""
    shown: type[Progress] = _Bar if sys.stderr.isatty() else _Lines
    if os.environ.get("RANK", "0") != "0":  # of processes that torchrun started one speaks
        shown = _Silent
    bar = shown(description, total, unit)
    try:
        yield bar
    finally:
        bar._close()


def _line(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _separated(note: str) -> str:
    return f", {note}" if note else ""
