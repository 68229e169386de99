"""Checkpoints: written aside, checked, renamed; an older good one always exists."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from groupsae.training.batches import MixedBatches
from groupsae.training.learner import Learner

log = logging.getLogger(__name__)

_TENSORS = "state.safetensors"
_STATE = "state.json"


class Checkpoints:
    """The folder of a run's checkpoints, `step-000500` and so on.

    A checkpoint holds what determines the rest of the run: weights, Adam's moments, dead-latent
    counters, random states, the shuffle buffer and the data cursor, as one safetensors file and
    one JSON file with its checksum.

    Args:
        directory: Where they lie; made when the first is written.
        kept: How many of the newest stay.
    """

    def __init__(self, directory: Path, kept: int = 2) -> None:
        self.directory, self.kept = directory, kept

    def save(
        self,
        step: int,
        seconds: float,
        learners: Mapping[str, Learner],
        batches: MixedBatches,
    ) -> Path:
        """Write the checkpoint after `step`; `seconds` is the time trained so far."""
        batch_tensors, batch_state = batches.state()
        tensors = {f"batches.{name}": tensor for name, tensor in batch_tensors.items()}
        for sae, learner in learners.items():
            tensors |= {f"{sae}.{name}": tensor for name, tensor in learner.state().items()}
        final = self.directory / f"step-{step:06d}"
        aside = self.directory / f".{final.name}.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            aside / _TENSORS,
        )
        state = {
            "step": step,
            "seconds": seconds,
            "batches": batch_state,
            "sha256": _sha256(aside / _TENSORS),
        }
        (aside / _STATE).write_text(json.dumps(state, indent=2))
        for file in (aside / _TENSORS, aside / _STATE):
            _flush(file)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in self._newest_first()[self.kept :]:
            shutil.rmtree(old)
        return final

    def restore(self, learners: Mapping[str, Learner], batches: MixedBatches) -> tuple[int, float]:
        """Load the newest valid checkpoint; returns its step and seconds, (0, 0.0) if none."""
        for directory in self._newest_first():
            state = _valid_state(directory)
            if state is None:
                log.warning("%s is damaged and passed over", directory)
                continue
            tensors = load_file(directory / _TENSORS)
            batches.load_state(_part(tensors, "batches"), state["batches"])
            for sae, learner in learners.items():
                learner.load_state(_part(tensors, sae))
            return state["step"], state["seconds"]
        return 0, 0.0

    def step(self) -> int:
        """The step of the newest valid checkpoint, 0 if there is none."""
        states = map(_valid_state, self._newest_first())
        return next((state["step"] for state in states if state is not None), 0)

    def clear(self) -> None:
        """Remove all checkpoints."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _newest_first(self) -> list[Path]:
        return sorted(self.directory.glob("step-*"), key=lambda path: path.name, reverse=True)


def _valid_state(directory: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads((directory / _STATE).read_text())
        return state if state["sha256"] == _sha256(directory / _TENSORS) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    start = prefix + "."
    return {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
