"""Kill training at random instants, resume it each time, and compare the bits at the end.

    python -m benchmarks.faults --kills 50

Each process is killed by SIGKILL, which it cannot see coming, some in the middle of writing a
checkpoint. Whatever the moments were, the SAEs must be those of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from random import Random

from groupsae.config import Config
from groupsae.run import Run

OVERRIDES = (
    "grouping.distance_tokens=20000",
    "grouping.groups=2",
    "sae.expansion=4",
    "training.tokens=100k",
    "training.batch_tokens=1024",
    "training.buffer_tokens=8192",
    "training.baseline=false",
    "training.checkpoint_every=2",
    "training.log_every=5",
)
_SLOW_TO_IMPORT = ("measurement", "training.session", "host.loading", "host.tokens")


@dataclass
class Campaign:
    """What happened.

    Attributes:
        kills: Processes that were killed while they trained.
        while_writing: Of these, how many left a checkpoint half written.
        resumed: Processes that went on from a checkpoint.
        finished: Runs that came to their end.
        different: Of these, how many have other weights than the undisturbed run.
    """

    kills: int = 0
    while_writing: int = 0
    resumed: int = 0
    finished: int = 0
    different: int = 0


def main() -> None:
    """Run a campaign and print what happened; exit code 1 if any bit differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--longest", type=float, default=10.0, help="seconds until a kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", default=[])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = Config.load(None, [*OVERRIDES, *asked.overrides])
        found = campaign(
            Path(folder), config, kills=asked.kills, longest=asked.longest, seed=asked.seed
        )
    print(
        f"{found.kills} kills, {found.while_writing} of them while a checkpoint was written; "
        f"{found.resumed} processes resumed; {found.finished} runs finished, {found.different} "
        "with other weights than the undisturbed one"
    )
    sys.exit(1 if found.different else 0)


def campaign(folder: Path, config: Config, *, kills: int, longest: float, seed: int) -> Campaign:
    """Kill and resume until there were so many kills and the run that was killed is finished."""
    for module in _SLOW_TO_IMPORT:  # so that children begin at once
        import_module(f"groupsae.{module}")
    prepared, undisturbed = folder / "prepared", folder / "undisturbed"
    _in_a_child(partial(_prepare, prepared, config))
    shutil.copytree(prepared, undisturbed)
    _in_a_child(partial(_train, undisturbed))
    expected = _weights(undisturbed)
    random, found = Random(seed), Campaign()
    while found.kills < kills:
        directory = folder / f"killed-{found.finished}"
        shutil.copytree(prepared, directory)
        while not _is_trained(directory):
            found.resumed += any(directory.glob("checkpoints/step-*"))
            wait = random.uniform(0, longest) if found.kills < kills else None
            if _in_a_child(partial(_train, directory), killed_after=wait):
                found.kills += 1
                found.while_writing += any(directory.glob("checkpoints/.step-*.tmp"))
        found.finished += 1
        found.different += _weights(directory) != expected
        shutil.rmtree(directory)
    return found


def _prepare(directory: Path, config: Config) -> None:
    run = Run(directory, config)
    run.distances()
    run.groups()


def _train(directory: Path) -> None:
    Run(directory).train()


def _in_a_child(work: Callable[[], None], *, killed_after: float | None = None) -> bool:
    """Do it in a process of its own; whether that was killed before it came to its end.

    The child is forked, so that it has nothing to import; this process computes nothing itself, as
    the threads of a pool would not be in the child.
    """
    child = os.fork()
    if child == 0:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stderr.fileno())
        try:
            work()
        except BaseException as error:
            print(f"the child failed: {error!r}", flush=True)
            os._exit(1)
        os._exit(0)
    deadline = None if killed_after is None else time.monotonic() + killed_after
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if os.waitstatus_to_exitcode(status) != 0:
                raise RuntimeError(f"training ended with status {status}")
            return False
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.002)


def _is_trained(directory: Path) -> bool:
    return Run(directory).stages.is_done("train")


def _weights(directory: Path) -> dict[str, str]:
    """The checksum of every SAE's weights; computed without a pool of threads (`_in_a_child`)."""
    saes = directory / "saes"
    return {
        str(path.relative_to(saes)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(saes.rglob("*.safetensors"))
    }


if __name__ == "__main__":
    main()
