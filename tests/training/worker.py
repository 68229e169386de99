"""What each process of tests/training/test_team.py does: `torchrun worker.py JOB.json`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from groupsae.config import Config
from groupsae.run import Run
from groupsae.sae import SAE, SAEConfig
from groupsae.sae.kernels import reference
from groupsae.training.exchange import SharedStep
from groupsae.training.learner import Learner
from groupsae.training.team import Team, team


def train(job: dict, processes: Team) -> None:
    """Train runs one after another; one process may be disturbed."""
    for one in job["runs"]:
        directory = Path(one["directory"])
        if processes.rank == one.get("rank"):
            if one.get("signal_at"):
                at(one["signal_at"], partial(os.kill, os.getpid(), one["signal"]))
            if one.get("fail_at"):
                at(one["fail_at"], broken)
            if one.get("die_saving"):
                SAE.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        Run(directory, Config.load(directory / "config.yaml"), team=processes).train()


def at(step: int, do: Callable[[], object]) -> None:
    original = Learner.step

    def disturbed(self, x, members=None):
        if self.steps == step:
            Learner.step = original
            do()
        return original(self, x, members)

    Learner.step = disturbed


def broken() -> None:
    raise RuntimeError("it broke in step 9")


def share(job: dict, processes: Team) -> None:
    """A step by all processes on their shares, beside the whole; what they differ by."""
    (group,) = processes.groups([range(processes.size)])
    found = {}
    for dead in (False, True):
        sae = SAE(
            SAEConfig(d_model=16, d_sae=64, k=4, layers=(0, 1)),
            generator=torch.Generator().manual_seed(0),
        ).double()
        x = torch.randn(101, 16, generator=torch.Generator().manual_seed(1)).double() + 1
        options = {
            "members": torch.arange(101) % 2,
            "dead": torch.arange(64) < 40 if dead else None,
            "auxk_weight": 1 / 32,
        }
        whole = reference.step(sae, x, **options)
        step = SharedStep(reference.step, group=group, row=processes.rank, rows=processes.size)
        ours = step(sae, x, **options)
        assert torch.equal(ours.fired, whole.fired)
        numbers = ("loss", "fvu", "auxk", "l0")
        found |= {
            f"{name} {dead}": float((getattr(ours, name) - getattr(whole, name)).abs())
            for name in numbers
        }
        found |= {
            f"{name} {dead}": float((ours.gradients[name] - gradient).abs().max())
            for name, gradient in whole.gradients.items()
        }
    Path(job["found"]).with_suffix(f".{processes.rank}.json").write_text(json.dumps(found))


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    with team() as processes:
        {"train": train, "share": share}[job["what"]](job, processes)


if __name__ == "__main__":
    main()
