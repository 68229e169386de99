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

from groupsae.files import replacing
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
        config: Identifies the config that is trained; checkpoints of another are passed over.
        kept: How many of the newest stay.
    """

    def __init__(self, directory: Path, config: str, kept: int = 2) -> None:
        self.directory, self.config, self.kept = directory, config, kept

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
        with replacing(final) as aside:
            aside.mkdir()
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                aside / _TENSORS,
            )
            state = {
                "step": step,
                "config": self.config,
                "seconds": seconds,
                "batches": batch_state,
                "sha256": _sha256(aside / _TENSORS),
            }
            (aside / _STATE).write_text(json.dumps(state, indent=2))
            for file in (aside / _TENSORS, aside / _STATE):
                _flush(file)
        for old in self._newest_first()[self.kept :]:
            shutil.rmtree(old)
        return final

    def restore(self, learners: Mapping[str, Learner], batches: MixedBatches) -> tuple[int, float]:
        """Load the newest valid checkpoint; returns its step and seconds, (0, 0.0) if none.

        Those of another config are removed: whoever calls this has decided to train anew.
        """
        for directory in self._newest_first():
            state = _read_state(directory)
            if state is not None and state["config"] != self.config:
                shutil.rmtree(directory)
        for directory in self._newest_first():
            state = _read_state(directory)
            if state is None or not _is_whole(directory, state):
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
        for directory in self._newest_first():
            state = _read_state(directory)
            if state and state["config"] == self.config and _is_whole(directory, state):
                return int(state["step"])
        return 0

    def _newest_first(self) -> list[Path]:
        return sorted(self.directory.glob("step-*"), key=lambda path: path.name, reverse=True)


def _read_state(directory: Path) -> dict[str, Any] | None:
    """The JSON part of a checkpoint; None if it is damaged."""
    try:
        state: dict[str, Any] = json.loads((directory / _STATE).read_text())
        return state if {"step", "seconds", "config", "batches", "sha256"} <= state.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _is_whole(directory: Path, state: Mapping[str, Any]) -> bool:
    try:
        return bool(state["sha256"] == _sha256(directory / _TENSORS))
    except OSError:
        return False


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    start = prefix + "."
    return {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
