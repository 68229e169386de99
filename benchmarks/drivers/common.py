"""What every driver shares: the task it is given, its stopwatch, and the line it prints."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = dict[str, Any]
T = TypeVar("T")

AUXK_WEIGHT = 1 / 32
DEAD_AFTER_TOKENS = 10_000_000
"""Never reached within a benchmark: latents are dead only where `Task.dead` makes them so."""


@dataclass(frozen=True)
class Task:
    """The same work for every contestant.

    Attributes:
        host: Folder of the host model and its tokenizer.
        tokens: Folder of a saved data set; each row of `input_ids` is one context.
        layers: Layers whose residual streams are trained on.
        groups: Their partition; one SAE each. Peers train one SAE per layer whatever it says.
        steps: Steps that are timed, or the next multiple of a buffer's period.
        warm: Steps before them.
        buffer_batches: Size of the shuffle buffer in batches, for libraries that have one.
        dead: Share of latents that are made dead before every step.
        kernel: groupsae's `training.kernel`.
    """

    host: str
    tokens: str
    layers: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    context_length: int
    batch_tokens: int
    d_model: int
    d_sae: int
    k: int
    steps: int
    warm: int
    buffer_batches: int
    threads: int
    dead: float = 0.0
    device: str = "cpu"
    host_dtype: str = "float32"
    kernel: str = ""

    @property
    def contexts(self) -> int:
        """Contexts in one step."""
        return self.batch_tokens // self.context_length

    @property
    def dead_latents(self) -> int:
        return int(self.dead * self.d_sae)

    @property
    def learning_rate(self) -> float:
        """groupsae's, sparsify's and dictionary-learning's default (Gao et al. 2024)."""
        return 2e-4 / math.sqrt(self.d_sae / 2**14)

    def to_json(self) -> str:
        return json.dumps({field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def from_json(cls, text: str) -> Task:
        values = json.loads(text)
        values["layers"] = tuple(values["layers"])
        values["groups"] = tuple(tuple(group) for group in values["groups"])
        return cls(**values)


class Finished(Exception):  # noqa: N818, the name is what happened
    """Leaves a library's training loop when all steps are timed."""


class Stopwatch:
    """Times steps and their parts, from the outside, in whatever loop a library has.

    A part's time is what is spent in it less the parts inside it; what is in none is "rest". On a
    GPU, work goes on after a call has returned, so that only whole steps are timed there, between
    two synchronisations. Other threads are not watched.

    Args:
        period: Steps after which a library's buffer comes back to the same filling: a whole number
            of periods is timed, in which the host model reads as many tokens as are trained on.
    """

    def __init__(self, task: Task, period: int = 1) -> None:
        self.steps = -(-task.steps // period) * period
        self.total = task.warm + self.steps
        self.baseline_bytes = resident_bytes(task.device)
        self._task = task
        self._done = 0
        self._parts: dict[str, float] = {}
        self._calls: Counter[str] = Counter()
        self._inside: list[float] = []  # of each part that is open: time in the parts within it
        self._stamps: list[float] = []
        self._peak_bytes: int | None = None

    def time(self, part: str, owner: Any, name: str) -> None:
        """Count a function's or method's time to `part` from now on: `owner.name` is replaced."""
        patch(owner, name, self.timed(part, getattr(owner, name)))

    def timed(self, part: str, function: Callable[..., T]) -> Callable[..., T]:
        """A function that does the same and counts its time to `part`."""

        @functools.wraps(function)
        def timed_function(*arguments: Any, **keywords: Any) -> T:
            with self.part(part):
                return function(*arguments, **keywords)

        return timed_function

    def iterate(self, part: str, items: Iterator[T]) -> Iterator[T]:
        """The same items; what they take to make counts to `part`."""
        while True:
            with self.part(part):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of a block to `name`."""
        if self._done == self.total or not _in_main_thread():
            yield
            return
        self._calls[name] += 1
        if self._task.device != "cpu":
            yield
            return
        start = time.perf_counter()
        self._inside.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            own = elapsed - self._inside.pop()
            self._parts[name] = self._parts.get(name, 0.0) + own
            if self._inside:
                self._inside[-1] += elapsed

    def end_step(self) -> None:
        """Say that a step is done.

        Raises:
            Finished: It was the last.
        """
        if self._inside:
            raise RuntimeError("a step cannot end inside a part of it")
        self._done += 1
        if self._done in (self._task.warm, self.total):
            _synchronize(self._task.device)
        if self._done == self._task.warm:
            self._parts.clear()
            self._calls.clear()
        if self._done >= self._task.warm:
            self._stamps.append(time.perf_counter())
        if self._done == self.total:
            self._peak_bytes = peak_bytes(self._task.device)
            raise Finished

    def result(
        self,
        *,
        fvu: float,
        host_part: str = "host forward",
        contexts: int | None = None,
        **more: Any,
    ) -> Result:
        """What the driver prints.

        Args:
            fvu: Fraction of variance unexplained in the last step, mean over SAEs.
            host_part: The part that is entered once per forward of the host model.
            contexts: In one such forward; by default those of a step.
        """
        if self._done != self.total:
            raise RuntimeError(
                f"{self._done} of {self.total} steps ended: the library's loop is not the one that "
                "this driver was written for"
            )
        share = (contexts or self._task.contexts) / self._task.contexts
        milliseconds = 1e3 * (self._stamps[-1] - self._stamps[0]) / self.steps
        parts = {name: 1e3 * seconds / self.steps for name, seconds in self._parts.items()}
        if parts:
            parts["rest"] = parts.get("rest", 0.0) + milliseconds - sum(parts.values())
        pairs = zip(self._stamps, self._stamps[1:])  # noqa: B905
        return {
            "steps": self.steps,
            "ms_per_step": milliseconds,
            "step_ms": [1e3 * (end - start) for start, end in pairs],
            "parts_ms": parts,
            "forwards_per_step": self._calls[host_part] * share / self.steps,
            "peak_bytes": self._peak_bytes,
            "baseline_bytes": self.baseline_bytes,
            "fvu": fvu,
            **more,
        }


def main(drive: Callable[[Task], Result]) -> None:
    """Run a driver on the task in argv[1] and print its result as the last line of the output.

    What a library prints meanwhile goes to standard error.
    """
    task = Task.from_json(sys.argv[1])
    torch.set_num_threads(task.threads)
    with contextlib.redirect_stdout(sys.stderr):
        result = drive(task)
    print(json.dumps(result), flush=True)


def patch(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Put `function` in the place of `owner.name`, which must be there."""
    getattr(owner, name)
    setattr(owner, name, function)


def fvu(x: torch.Tensor, reconstruction: torch.Tensor) -> float:
    """Fraction of variance unexplained: squared error over the sum of squares about the mean."""
    variance = (x - x.mean(0)).square().sum()
    return float((x - reconstruction).square().sum() / variance)


def resident_bytes(device: str) -> int | None:
    """Memory in use now; None where the system does not tell."""
    return torch.cuda.memory_allocated() if device != "cpu" else _status("VmRSS")


def peak_bytes(device: str) -> int | None:
    """The most memory that was in use at once: of the process, or of tensors on the GPU."""
    return torch.cuda.max_memory_allocated() if device != "cpu" else _status("VmHWM")


def _status(key: str) -> int | None:
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    lines = (line.split() for line in path.read_text().splitlines())
    return next(int(line[1]) * 1024 for line in lines if line[0] == f"{key}:")


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
