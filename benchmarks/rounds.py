"""Rounds: contestants take turns, and a turn that others disturbed is repeated."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.drivers.common import Task
from benchmarks.drivers.quality import Trial
from benchmarks.machine import Quiet

ROOT = Path(__file__).resolve().parents[1]
Result = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """One run of one contestant.

    Attributes:
        label: Of the entry, or "ceiling".
        other_cores: Cores that other processes used meanwhile; None where that is unknown.
        noisy: That was too much, and repeating did not help.
        result: What the driver printed; None if it failed.
        error: Why it failed.
    """

    label: str
    round: int
    other_cores: float | None
    noisy: bool
    result: Result | None
    error: str = ""

    def to_json(self) -> str:
        return json.dumps({"kind": "turn", **asdict(self)})


class DriverFailed(Exception):  # noqa: N818, the name is what happened
    """A driver ended without a result; the message is the end of what it said."""


def take_turns(
    runs: Sequence[tuple[str, Callable[[], Result]]],
    *,
    rounds: int,
    repeats: int,
    quiet: Quiet,
    say: Callable[[str], None],
) -> Iterator[Turn]:
    """Run A B C A B C ...; yields every turn that counts.

    One that fails is not run again in later rounds.

    Args:
        runs: Labels and what they run, in child processes.
        repeats: How often a disturbed turn is repeated, at most.
    """
    failed: set[str] = set()
    for number in range(1, rounds + 1):
        for label, run in runs:
            if label in failed:
                continue
            turn = _turn(label, run, number, repeats, quiet, say)
            if turn.result is None:
                failed.add(label)
            yield turn


def launch(python: Path, driver: str, task: Task | Trial) -> Result:
    """Run a driver in a process of its own.

    Raises:
        DriverFailed: It failed, or printed no result.
    """
    environment = {
        "OMP_NUM_THREADS": str(task.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
    }
    if task.device == "cpu":  # where triton is installed, sparsify takes it on the CPU, too
        environment["SPARSIFY_DISABLE_TRITON"] = "1"
    answer = subprocess.run(
        [python, "-m", f"benchmarks.drivers.{driver}", task.to_json()],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    lines = answer.stdout.split("\n")
    results = [line for line in lines if line.startswith("{")]
    if answer.returncode or not results:
        said = (answer.stderr or answer.stdout).strip().splitlines()[-12:]
        raise DriverFailed("\n".join([f"exit code {answer.returncode}", *said]))
    result: Result = json.loads(results[-1])
    return result


def _turn(
    label: str,
    run: Callable[[], Result],
    number: int,
    repeats: int,
    quiet: Quiet,
    say: Callable[[str], None],
) -> Turn:
    """One turn: the first that was quiet, or the quietest of those that were allowed."""
    turns: list[Turn] = []
    for repeat in range(repeats + 1):
        if not quiet.wait():
            say(f"others keep the machine busy; {label} runs all the same")
        try:
            result, cores = quiet.watch(run)
        except DriverFailed as error:
            return Turn(label, number, None, noisy=False, result=None, error=str(error))
        noisy = cores is not None and cores > quiet.limit
        turns.append(Turn(label, number, cores, noisy, result))
        if not noisy:
            break
        again = "it is repeated" if repeat < repeats else "it counts as noisy"
        say(f"round {number}, {label}: others used {cores:.2f} of a core; {again}")
    return min(turns, key=lambda turn: (turn.noisy, turn.other_cores or 0.0))
