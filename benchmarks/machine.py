"""The machine: what it is, and whether others use it."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TypeVar

import torch

_STAT = Path("/proc/stat")
T = TypeVar("T")


def busy_seconds() -> float | None:
    """Seconds that all CPUs together have been busy since the machine started.

    User, nice, system, interrupts and stolen time of /proc/stat; None where there is none.
    """
    if not _STAT.exists():
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = (
        int(ticks) for ticks in _STAT.read_text().split(maxsplit=9)[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def children_seconds() -> float:
    """CPU seconds of this process's children that have ended."""
    times = os.times()
    return times.children_user + times.children_system


@dataclass(frozen=True)
class Quiet:
    """The rule by which a measurement counts: others used no more than `limit` of a core meanwhile.

    Attributes:
        limit: In cores, mean over the measurement.
        patience: Seconds to wait for a quiet machine before a measurement, at most.
        busy, children, clock, sleep: Replaced in tests.
    """

    limit: float = 0.08
    patience: float = 600.0
    window: float = 3.0
    busy: Callable[[], float | None] = field(default=busy_seconds, repr=False)
    children: Callable[[], float] = field(default=children_seconds, repr=False)
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def wait(self) -> bool:
        """Wait until the machine is quiet; False if it was not within `patience`."""
        end = self.clock() + self.patience
        while True:
            _, cores = self.watch(lambda: self.sleep(self.window))
            if cores is None or cores <= self.limit:
                return True
            if self.clock() >= end:
                return False

    def watch(self, work: Callable[[], T]) -> tuple[T, float | None]:
        """What `work` gives, and the cores that other processes used on average meanwhile.

        What it computes must happen in child processes that end before it returns. The cores are
        None where the system does not tell.
        """
        busy, children, start = self.busy(), self.children(), self.clock()
        result = work()
        busy_then = self.busy()
        if busy is None or busy_then is None:
            return result, None
        own = self.children() - children
        return result, max(0.0, (busy_then - busy - own) / (self.clock() - start))


def description(device: str, threads: int) -> dict[str, str]:
    """Date, processor and versions, for the head of a table."""
    found = {
        "date": date.today().isoformat(),
        "CPU": f"{_cpu_name()}, {os.cpu_count()} cores, {threads} threads used",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    if device != "cpu":
        found["GPU"] = torch.cuda.get_device_name()
    return found


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
