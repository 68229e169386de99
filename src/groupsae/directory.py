"""The run directory: which stages are done, for which config, and where that came from."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from groupsae.config import Config
from groupsae.errors import InputError

log = logging.getLogger(__name__)

STAGES = ("distances", "groups", "train", "evaluate", "report")

# What each stage depends on, besides the stages before it: whole sections or single keys.
_DEPENDS = {
    "distances": (
        "host",
        "tokens",
        "grouping.layers",
        "grouping.distance_tokens",
        "grouping.center",
    ),
    "groups": ("grouping", "sae.expansion", "sae.d_sae"),
    "train": ("sae", "training"),
    "evaluate": ("evaluation",),
    "report": ("report",),
}
# Keys that change how a stage is carried out, but not what comes out.
_IRRELEVANT = (
    "host.device",
    "host.n_layers",
    "host.d_model",
    "tokens.on_exhausted",  # what was made before the text ran out stays as it is
    "training.log_every",
    "training.checkpoint_every",
    "training.checkpoints_kept",
    "training.tracker",
    "evaluation.batch_contexts",
)


class RunDirectory:
    """A directory that holds the stages of one config.

    Args:
        path: Made where it is missing.
        config: By default the directory's own, or the defaults in a new one.
        redo: Where the directory holds stages of another config: forget these and what follows.

    Raises:
        InputError: If the directory holds something else, or stages of another config and not
            `redo`.
    """

    def __init__(self, path: Path, config: Config | None = None, *, redo: bool = False) -> None:
        self.path = path
        stored = stored_config(path)
        self.config = config or stored or Config()
        if stored is not None:
            self._reconcile(stored, redo)
        self.note_provenance()

    @contextmanager
    def stage(self, stage: str, artefact: Path) -> Iterator[bool]:
        """Yield whether `stage` is still to do; note it as done if the block ends well."""
        if artefact.exists() and self.is_done(stage):
            log.info("%s: already done", stage)
            yield False
            return
        artefact.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        yield True
        later = STAGES[STAGES.index(stage) + 1 :]
        done = {name: entry for name, entry in self._done().items() if name not in later}
        done[stage] = {
            "key": _key(self.config, stage),
            "seconds": round(time.monotonic() - began, 1),
            "finished": _now(),
        }
        write_json(self.path / "stages.json", done)

    def is_done(self, stage: str) -> bool:
        """Whether `stage` has been carried out for this config."""
        return bool(self._done().get(stage, {}).get("key") == _key(self.config, stage))

    def need(self, name: str, stage: str) -> Path:
        """The path of an artefact that an earlier stage must have made."""
        path = self.path / name
        if not path.exists():
            raise InputError(
                f"{self.path} holds no {name} yet; run `groupsae {stage} {self.path}` first, or "
                f"`groupsae run {self.path}` for everything"
            )
        return path

    def note_provenance(self, **facts: str) -> None:
        """Write the resolved config, with what is known of where it came from.

        Raises:
            InputError: If a fact differs from what was noted before: the host model was exchanged.
        """
        stored = stored_config(self.path)
        known = (stored.provenance if stored else None) or {"created": _now(), **_versions()}
        for name, fact in facts.items():
            if known.setdefault(name, fact) != fact:
                raise InputError(
                    f"{self.config.host.name} is not the model that {self.path} was begun with "
                    f"(its {name} differs); choose another directory with --out"
                )
        resolved = self.config.model_copy(update={"provenance": known})
        _write_text(self.path / "config.yaml", resolved.dump())

    def _reconcile(self, stored: Config, redo: bool) -> None:
        """Refuse, or forget if `redo`, stages of another config."""
        done = self._done()
        begun = {*done, *(["train"] if (self.path / "checkpoints").exists() else [])}
        for stage in STAGES:
            if stage not in begun or _key(stored, stage) == _key(self.config, stage):
                continue
            if not redo:
                raise InputError(
                    f"{self.path} holds the stage '{stage}' of another config "
                    f"({'; '.join(_differences(stored, self.config))}); choose another directory "
                    "with --out, or add --redo to repeat it and what follows"
                )
            stale = STAGES[STAGES.index(stage) :]
            kept = {name: entry for name, entry in done.items() if name not in stale}
            write_json(self.path / "stages.json", kept)
            if "train" in stale:
                for name in ("checkpoints", "saes"):
                    shutil.rmtree(self.path / name, ignore_errors=True)
            return

    def _done(self) -> dict[str, Any]:
        path = self.path / "stages.json"
        return read_json(path) if path.exists() else {}


def stored_config(directory: Path) -> Config | None:
    """The config of a run directory; None where there is no run yet.

    Raises:
        InputError: If the path is a file, or a folder of something else.
    """
    path = directory / "config.yaml"
    if path.exists():
        return Config.load(path)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(
            f"{directory} is no run directory (it holds no config.yaml); choose another with --out"
        )
    return None


def read_json(path: Path) -> Any:
    """The content of an artefact."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); remove it to have it made again") from error


def write_json(path: Path, content: Any) -> None:
    """Write an artefact, whole or not at all."""
    _write_text(path, json.dumps(content, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Replace a file at once, so that a reader or a crash never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def _key(config: Config, stage: str) -> str:
    """Identifies what `stage` makes under `config`: the keys it and earlier stages depend on."""
    content = {
        path: value
        for earlier in STAGES[: STAGES.index(stage) + 1]
        for path, value in _flat(config).items()
        if any(path == on or path.startswith(on + ".") for on in _DEPENDS[earlier])
        and path not in _IRRELEVANT
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _flat(config: Config) -> dict[str, Any]:
    sections = config.model_dump(mode="json", exclude={"provenance"})
    return {
        f"{section}.{key}": value
        for section, keys in sections.items()
        for key, value in keys.items()
    }


def _differences(stored: Config, asked: Config) -> list[str]:
    before, now = _flat(stored), _flat(asked)
    return [
        f"{path} was {before[path]!r}, is now {now[path]!r}"
        for path in now
        if before[path] != now[path] and path not in _IRRELEVANT
    ]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    packages = ("groupsae", "torch", "transformers", "datasets", "numpy")
    return {name: metadata.version(name) for name in packages} | {
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
