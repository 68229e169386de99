"""Checkpoints: written aside while training goes on, checked, renamed; an older one always exists.

`step-000500/` holds `state.json` and safetensors files: one for the draws of batches, one for each
part of the shuffle buffer, one for each SAE, or for each shard of its latents. Their checksums
stand in `state.json`. Of several processes each writes what it has, and the first puts the whole in
place: any number of processes can go on from it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from groupsae.errors import InputError
from groupsae.files import flush, load_tensors, save_tensors, writing
from groupsae.training.batches import MixedBatches, State
from groupsae.training.learner import Learner
from groupsae.training.shards import OF_LATENTS, Shard
from groupsae.training.team import Team

log = logging.getLogger(__name__)

_FORMAT = 2  # of what is written, which another version of groupsae may not understand
_NAME = re.compile(r"step-(\d+)")
_STATE = "state.json"
_BATCHES = "batches"


class Checkpoints:
    """The folder of a run's checkpoints, `step-000500` and so on.

    A checkpoint holds what determines the rest of the run: weights, Adam's moments, dead-latent
    counters, random states, the shuffle buffer and the data cursor.

    Args:
        directory: Where they lie; made when the first is written.
        config: Identifies the config that is trained; checkpoints of another are passed over.
        kept: How many of the newest stay.
        in_background: Copy what is to be written, and write it while training goes on. Else
            training waits for the disk, and no copy is held.
        team: The processes that train together. All call the same methods in the same order.
        writes: The SAEs, or shards of them, that this process writes: each is written by one of
            those that hold it. By default all that it holds.
        writes_rows: The mixtures whose part of the buffer it writes; likewise.
    """

    def __init__(
        self,
        directory: Path,
        config: str,
        kept: int = 2,
        *,
        in_background: bool = True,
        team: Team | None = None,
        writes: Collection[str] | None = None,
        writes_rows: Collection[str] | None = None,
    ) -> None:
        self.directory, self.config, self.kept = directory, config, kept
        self.in_background, self.team = in_background, team or Team()
        self.writes, self.writes_rows = writes, writes_rows
        self.seconds_waited = 0.0
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._pending: _Pending | None = None
        self._passed_over: list[Path] = []

    def save(
        self,
        step: int,
        seconds: float,
        learners: Mapping[str, Learner],
        batches: MixedBatches,
    ) -> None:
        """Write the checkpoint after `step`; `seconds` is the time trained so far.

        What it holds is that of now, also where it is written later.

        Raises:
            InputError: This one, or in the background the one before, cannot be written.
        """
        began = time.monotonic()
        self._settle()
        of_batches = batches.state()
        parts: dict[str, Mapping[str, Tensor]] = {}
        if self.team.first:
            parts[_BATCHES] = of_batches.draws
        for name, rows in of_batches.rows.items():
            if self.writes_rows is None or name in self.writes_rows:
                parts[_rows_of(name)] = rows
        for name, learner in learners.items():
            if self.writes is None or name in self.writes:
                parts[_part(name, learner.shard)] = learner.state()
        state = {
            "format": _FORMAT,
            "step": step,
            "config": self.config,
            "seconds": seconds,
            "batches": of_batches.rest,
        }
        copied = {
            name: {key: _on_cpu(tensor, copy=self.in_background) for key, tensor in part.items()}
            for name, part in parts.items()
        }
        self._begin(step)
        aside = self._aside(step)
        self._pending = _Pending(step, state, self._writer.submit(_write, aside, copied))
        if not self.in_background:
            self._settle()
        self.seconds_waited += time.monotonic() - began

    @property
    def writing(self) -> bool:
        """Whether this process has yet to write its part of the one that was asked for."""
        return self._pending is not None and not self._pending.written.done()

    def put_in_place(self) -> None:
        """What all processes have written; without one to be put there it does nothing.

        Errors as in :meth:`save`.
        """
        self._settle()

    def close(self) -> None:
        """Wait until what is being written is there; errors as in :meth:`save`."""
        began = time.monotonic()
        self._settle()
        self.seconds_waited += time.monotonic() - began

    def leave(self) -> None:
        """The same where something went wrong, of which other processes may not know.

        They cannot be waited for then: what all of them were writing together is left unfinished.
        """
        try:
            if self.team.size == 1:
                self.close()
        finally:
            self._writer.shutdown()

    def restore(self, learners: Mapping[str, Learner], batches: MixedBatches) -> tuple[int, float]:
        """Load the newest valid checkpoint; returns its step and seconds, (0, 0.0) if none.

        Those of another config are removed: whoever calls this has decided to train anew.
        """
        if self.team.first:
            for half in self.directory.glob(".step-*.tmp"):
                shutil.rmtree(half)
            for directory in self._newest_first():
                state = _read_state(directory)
                if state is not None and state["config"] != self.config:
                    shutil.rmtree(directory)
        step = self.begun
        if not step:
            return 0, 0.0
        directory = self._final(step)
        state = _read_state(directory)
        assert state is not None  # which `begun` has read
        rows = {name: load_tensors(directory / _file(_rows_of(name))) for name in batches.held}
        draws = load_tensors(directory / _file(_BATCHES))
        batches.load_state(State(draws, rows, state["batches"]))
        for sae, learner in learners.items():
            learner.load_state(_of_latents(directory, state["sha256"], sae, learner.shard))
        return step, state["seconds"]

    @cached_property
    def begun(self) -> int:
        """The step of the newest valid checkpoint when this was first asked; 0 if there was none.

        Its files are read and compared with their checksums. Asked by all processes.
        """
        found = 0
        if self.team.first:
            for directory in self._newest_first():
                if (state := self._valid(directory)) is not None:
                    found = int(state["step"])
                    break
                self._passed_over.append(directory)
        return int(self.team.share(found))

    def _begin(self, step: int) -> None:
        """Make the folder that all processes write to."""
        if self.team.first:
            with writing(self._final(step)):
                self.directory.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(self._aside(step), ignore_errors=True)
                self._aside(step).mkdir()
        self.team.wait()

    def _settle(self) -> None:
        """Wait until all processes have written their parts, and put the whole in place."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        final, aside = self._final(pending.step), self._aside(pending.step)
        try:
            with writing(final):
                sums, error = pending.written.result(), None
        except InputError as raised:
            sums, error = {}, str(raised)
        found = self.team.gather([sums, error])
        failed = [message for _, message in found if message is not None]
        if self.team.first:
            if failed:
                shutil.rmtree(aside, ignore_errors=True)
            else:
                whole = {name: value for own, _ in found for name, value in own.items()}
                self._put_in_place(final, aside, {**pending.state, "sha256": whole})
        self.team.wait()
        if failed:
            raise InputError(failed[0])

    def _put_in_place(self, final: Path, aside: Path, state: Mapping[str, Any]) -> None:
        with writing(final):
            (aside / _STATE).write_text(json.dumps(state, indent=2))
            _flushed(aside / _STATE)
            flush(aside)
            shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
            aside.replace(final)
            flush(self.directory)
            for old in self._passed_over:  # which would count as the newest
                if old != final:
                    shutil.rmtree(old, ignore_errors=True)
            self._passed_over = []
            for old in self._newest_first()[self.kept :]:
                shutil.rmtree(old)

    def _final(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}"

    def _aside(self, step: int) -> Path:
        return self.directory / f".step-{step:06d}.tmp"

    def _valid(self, directory: Path) -> dict[str, Any] | None:
        """The state of a whole checkpoint of this config; what is damaged is named."""
        state = _read_state(directory)
        if state is None:
            log.warning("%s is damaged (%s) and passed over", directory, _STATE)
            return None
        if state["config"] != self.config:
            return None
        if state.get("format") != _FORMAT:
            log.warning("%s is of another version of groupsae and passed over", directory)
            return None
        for name, expected in state["sha256"].items():
            path = directory / Path(name).name
            if not path.is_file() or _sha256(path) != expected:
                log.warning("%s is damaged (%s) and passed over", directory, path.name)
                return None
        return state

    def _newest_first(self) -> list[Path]:
        found = {path: _NAME.fullmatch(path.name) for path in self.directory.glob("step-*")}
        steps = {path: int(match[1]) for path, match in found.items() if match}
        return sorted(steps, key=lambda path: steps[path], reverse=True)


class _Pending(NamedTuple):
    """A checkpoint that is being written, but for its `state.json`.

    Attributes:
        written: The checksums of this process's files.
    """

    step: int
    state: dict[str, Any]
    written: Future[dict[str, str]]


def _write(aside: Path, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """Write a file for each part; returns their checksums."""
    sums = {}
    for name, tensors in parts.items():
        path = aside / _file(name)
        save_tensors(tensors, path)
        sums[path.name] = _flushed(path)
    return sums


def _of_latents(directory: Path, files: Iterable[str], sae: str, shard: Shard) -> dict[str, Tensor]:
    """The state of a shard's latents of an SAE, from whatever shards it was written in."""
    wanted = shard.latents
    parts: dict[str, list[Tensor]] = {}
    for held, file in _shards(sae, files, shard.whole.d_sae):
        rows = slice(*(max(edge - held.start, 0) for edge in (wanted.start, wanted.stop)))
        if not held[rows]:
            continue
        with safe_open(directory / file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 -- it is no dict
                part = stored.get_slice(name)[rows] if _has_rows(name) else stored.get_tensor(name)
                parts.setdefault(name, []).append(part)
    return {n: torch.cat(found) if _has_rows(n) else found[0] for n, found in parts.items()}


def _has_rows(name: str) -> bool:
    """Whether a tensor of an SAE's state has a row for each latent, by its name."""
    words = name.split(".")
    return name == "silent_tokens" or (words[-1] != "step" and not OF_LATENTS.isdisjoint(words))


def _shards(sae: str, files: Iterable[str], d_sae: int) -> list[tuple[range, str]]:
    """The files of an SAE's state, and which latents each has, in their order."""
    stem = _file(sae).removesuffix(".safetensors")
    pattern = re.compile(re.escape(stem) + r"(?:\.latents-(\d+)-(\d+))?\.safetensors")
    parts = []
    for file in files:
        if match := pattern.fullmatch(file):
            start, stop = match.groups()
            latents = range(d_sae) if start is None else range(int(start), int(stop))
            parts.append((latents, file))
    return sorted(parts, key=lambda part: part[0].start)


def _part(sae: str, shard: Shard) -> str:
    """What a shard's part of a checkpoint is called; as the SAE, if it is the whole."""
    if shard.ranks is None:
        return sae
    return f"{sae}.latents-{shard.latents.start}-{shard.latents.stop}"


def _rows_of(name: str) -> str:
    """What the part of the buffer that a mixture has is called."""
    return f"{_BATCHES}.{name}"


def _file(name: str) -> str:
    """The file of a part of a checkpoint: `baseline.layers-03.safetensors`."""
    return f"{re.sub(r'[/]', '.', name)}.safetensors"


def _on_cpu(tensor: Tensor, *, copy: bool) -> Tensor:
    return tensor.detach().to("cpu", copy=copy).contiguous()


def _read_state(directory: Path) -> dict[str, Any] | None:
    """The JSON part of a checkpoint; None if it is damaged."""
    try:
        state: dict[str, Any] = json.loads((directory / _STATE).read_text())
        known = {"step", "seconds", "config", "batches", "sha256"} <= state.keys()
        return state if known and state["sha256"].keys() >= {_file(_BATCHES)} else None
    except (OSError, ValueError, AttributeError):
        return None


def _flushed(path: Path) -> str:
    """The checksum of a file that is on the disk for good.

    Raises:
        OSError: What the disk gives back is something else.
    """
    written = _sha256(path)
    flush(path)
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):  # so that it is read from the disk, not from memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if _sha256(path) != written:
        raise OSError(f"{path} reads differently from what was written; check the disk")
    return written


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
