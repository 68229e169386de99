"""The stage `circuits`: which tasks are judged, where their results lie, what is done already."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from groupsae.directory import read_json
from groupsae.errors import InputError
from groupsae.evaluation.attribution import Effects
from groupsae.evaluation.downstream import judge_task, task_effects
from groupsae.evaluation.subject import Subject
from groupsae.evaluation.tasks import Task, check_name, open_task
from groupsae.files import write_json
from groupsae.opened import OpenRun

log = logging.getLogger(__name__)


class CircuitStage:
    """The tasks of one run.

    Results lie in `evaluation/circuits/<task>.json`, effects below `evaluation/circuits/effects/`;
    each is kept from the moment it is there, and computed once.

    Args:
        run: Whose config says what to judge. Its host model and SAEs are loaded when something is.
    """

    def __init__(self, run: OpenRun) -> None:
        self.run, self.config = run, run.config
        self.folder = run.directory / "evaluation" / "circuits"
        self._task = cache(self._open)

    @cached_property
    def subjects(self) -> Sequence[Subject]:
        """The partitions to judge, the chosen one first."""
        return self.run.subjects()

    def judge_all(self) -> None:
        """Judge every task of the config; a file that cannot be used is refused before any work.

        Raises:
            InputError: No task is left, or one that the user names cannot be used.
        """
        for name in self.config.circuits.tasks:
            check_name(name)
        tasks, unusable = [], []
        for name in sorted(self.config.circuits.tasks, key=lambda name: "=" not in name):
            try:
                self._task(name)
                tasks.append(name)
            except InputError as error:
                if "=" in name:
                    raise
                unusable.append(str(error))
        if not tasks:
            raise InputError(f"circuits.tasks: none can be asked here. {' '.join(unusable)}")
        for reason in unusable:
            log.warning("left out: %s", reason)
        for stale in {*self.folder.glob("*.json")} - {self._path(name) for name in tasks}:
            stale.unlink()
        for name in tasks:
            self.judge(name)

    def results(self) -> list[dict[str, Any]]:
        """What was found of each task of the config, but for those that were left out."""
        paths = map(self._path, self.config.circuits.tasks)
        return [read_json(path, task=str, curves=list) for path in paths if path.exists()]

    def judge(self, name: str) -> dict[str, Any]:
        """One task's result."""
        path, key = self._path(name), self._key(name)
        if path.exists():
            stored = read_json(path)
            if stored.get("key") == key:
                return stored
        asked = self.config.circuits
        result = judge_task(
            self.run.host,
            self._task(name),
            self.subjects,
            lambda method: self.effects(name, method),
            methods=asked.methods,
            steps=asked.steps,
            points=asked.points,
            controls=asked.controls,
            batch_tokens=asked.batch_tokens,
            seed=asked.seed,
            special=self.run.special,
        )
        if result["refused"] is not None:
            log.warning("no curve is drawn: %s", result["refused"])
        write_json(path, {"key": key, **result})
        return result

    def effects(self, name: str, method: str) -> dict[str, Effects]:
        """The effects of every subject's latents, by its name."""
        asked = self.config.circuits
        kept = self.folder / "effects" / self._key(name)[:8]
        title = name.partition("=")[0]
        paths = {s.name: kept / f"{title}-{method}-{s.name}.safetensors" for s in self.subjects}
        if all(path.exists() for path in paths.values()):
            return {own: Effects.load(path) for own, path in paths.items()}
        found = task_effects(
            self.run.host,
            self._task(name),
            self.subjects,
            method=method,
            steps=asked.steps,
            batch_tokens=asked.batch_tokens,
            special=self.run.special,
        )
        for own, effects in found.items():
            effects.save(paths[own])
        return found

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.partition('=')[0]}.json"

    def _open(self, name: str) -> Task:
        return open_task(
            name,
            self.run.host,
            examples=self.config.circuits.examples,
            seed=self.config.circuits.seed,
            prepend_bos=self.config.tokens.prepend_bos,
        )

    def _key(self, name: str) -> str:
        """Identifies a task's results: what they rest on, and the task's file."""
        circuits = self.config.circuits.model_copy(update={"tasks": (name,)})
        key = self.run.stages.key("circuits", self.config.model_copy(update={"circuits": circuits}))
        _, given, file = name.partition("=")
        if given and Path(file).is_file():
            key += hashlib.sha256(Path(file).read_bytes()).hexdigest()
        return hashlib.sha256(key.encode()).hexdigest()[:16]
