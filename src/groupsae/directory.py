"""The run directory: which stages are done, for which config, and where that came from."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from groupsae.config import Config
from groupsae.errors import InputError
from groupsae.files import write_json, write_text

log = logging.getLogger(__name__)

# Each stage, and the one whose artefacts it works on.
_WORKS_ON = {
    "distances": None,
    "groups": "distances",
    "train": "groups",
    "evaluate": "train",
    "circuits": "train",
    "similarity": "train",
    "interpret": "train",
    "report": "evaluate",  # and shows what else there is
}
STAGES = tuple(_WORKS_ON)
_OF_RUN = ("distances", "groups", "train", "evaluate", "report")  # what `groupsae run` does

# What each stage depends on, besides the stages before it: whole sections or single keys.
_DEPENDS = {
    "distances": (
        "host",
        "tokens",
        "grouping.layers",
        "grouping.distance_tokens",
        "grouping.center",
        "grouping.similarity",
    ),
    "groups": ("grouping", "sae.expansion", "sae.d_sae"),
    "train": ("sae", "training"),
    "evaluate": ("evaluation",),
    "circuits": ("circuits",),
    "similarity": ("similarity",),
    "interpret": ("interpretation",),
    "report": ("report",),
}
# Keys that change how a stage is carried out, but not what comes out.
_IRRELEVANT = (
    "host.device",
    "host.n_layers",
    "host.d_model",
    "tokens.on_error",
    "tokens.on_exhausted",  # what was made before the text ran out stays as it is
    "tokens.retries",
    "training.log_every",
    "training.checkpoint_every",
    "training.checkpoints_kept",
    "training.checkpoint_in_background",
    "training.max_dropped_batches",
    "training.data_ranks",
    "training.latent_ranks",
    "training.tracker",
    "circuits.batch_tokens",
)
# Keys that change what comes out only where there is an activation cache.
_OF_A_CACHE = ("training.activation_cache", "training.cache_dtype", "training.cache_shuffle")


class RunDirectory:
    """A directory that holds the stages of one config.

    Args:
        path: Made where it is missing.
        config: By default the directory's own, or the defaults in a new one.
        redo: Where the directory holds stages of another config: take them as not done.
        read_only: Note no provenance: another process does.

    Raises:
        InputError: If the directory holds something else, or stages of another config and not
            `redo`.
    """

    def __init__(
        self,
        path: Path,
        config: Config | None = None,
        *,
        redo: bool = False,
        read_only: bool = False,
    ) -> None:
        self.path, self._read_only = path, read_only
        stored = stored_config(path)
        self.config = config or stored or Config()
        self._start = self._identify_start(stored)
        if stored is not None and not redo:
            self._refuse_other_config(stored)
        self.note_provenance()

    @contextmanager
    def stage(self, stage: str, artefact: Path) -> Iterator[bool]:
        """Yield whether `stage` is still to do; note it as done if the block ends well."""
        if artefact.exists() and self.is_done(stage):
            log.info("%s: already done", stage)
            yield False
            return
        found = self._done()
        stale = {name for name in STAGES if stage in _chain(name)} | {"report"}
        done = {name: entry for name, entry in found.items() if name not in stale}
        if done != found:  # this stage and what follows from it are about to change
            write_json(self.path / "stages.json", done)
        began = time.monotonic()
        yield True
        done[stage] = {
            "key": self.key(stage),
            "seconds": round(time.monotonic() - began, 1),
            "finished": _now(),
        }
        write_json(self.path / "stages.json", done)

    def is_done(self, stage: str) -> bool:
        """Whether `stage` has been carried out for this config."""
        return bool(self._done().get(stage, {}).get("key") == self.key(stage))

    def forget(self, stage: str | None) -> None:
        """Take a stage, and what builds on it, as not done, nor begun; None: nothing."""
        if stage is None:
            return
        done = {name: entry for name, entry in self._done().items() if stage not in _chain(name)}
        write_json(self.path / "stages.json", done)
        if stage in _chain("train"):
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    def key(self, stage: str, config: Config | None = None) -> str:
        """Identifies what `stage` makes: all keys that it and the stages before it depend on.

        Args:
            config: By default the directory's own.
        """
        content = {
            path: value
            for earlier in _chain(stage)
            for path, value in _relevant(config or self.config, self._start).items()
            if any(path == on or path.startswith(on + ".") for on in _DEPENDS[earlier])
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def need(self, name: str, stage: str) -> Path:
        """The path of an artefact that an earlier stage must have made for this config."""
        path = self.path / name
        if not (path.exists() and self.is_done(stage)):
            every = f", or `groupsae run {self.path}` for everything"
            raise InputError(
                f"{self.path} holds no {name} of this config; run `groupsae {stage} {self.path}` "
                f"first{every if stage in _OF_RUN else ''}"
            )
        return path

    def note_provenance(self, **facts: str) -> None:
        """Write the resolved config, with what is known of where it came from.

        Raises:
            InputError: If a fact differs from what was noted before: the host model was exchanged.
        """
        stored = stored_config(self.path)
        known = dict((stored and stored.provenance) or {"created": _now(), **_versions()})
        for name, fact in facts.items():
            if known.setdefault(name, fact) != fact:
                raise InputError(
                    f"{self.config.host.name} is not the model that {self.path} was begun with "
                    f"(its {name} was {known[name]}, is {fact}); choose another directory with "
                    "--out"
                )
        if self._start is None:
            known.pop("init_from", None)
        else:
            known["init_from"] = self._start
        resolved = self.config.model_copy(update={"provenance": known})
        if resolved != stored and not self._read_only:  # one that is finished may be unwritable
            write_text(self.path / "config.yaml", resolved.dump())

    def _refuse_other_config(self, stored: Config) -> None:
        """Refuse to go on where a stage was finished, or training begun, under another config."""
        begun = {stage: entry["key"] for stage, entry in self._done().items()}
        for path in (self.path / "checkpoints").glob("step-*/state.json"):
            with suppress(InputError):  # a damaged checkpoint is passed over when training goes on
                begun.setdefault("train", read_json(path, config=str)["config"])
        for stage in STAGES:
            if stage in begun and begun[stage] != self.key(stage):
                differences = "; ".join(self._differences(stored))
                raise InputError(
                    f"{self.path} holds the stage '{stage}' of another config "
                    f"({differences or 'or of another version of groupsae'}); choose another "
                    "directory with --out, or add --redo to repeat it and what follows"
                )

    def _differences(self, stored: Config) -> list[str]:
        before, now = _flat(stored), _flat(self.config)
        noted = (stored.provenance or {}).get("init_from")
        was, is_now = _relevant(stored, noted), _relevant(self.config, self._start)
        start = "training.init_from"
        anew = before[start] == now[start] and was.get(start) != is_now.get(start)
        return [
            f"{path} was {before[path]!r}, is now {now[path]!r}"
            for path in now
            if before[path] != now[path] and was.get(path) != is_now.get(path)
        ] + [f"the run {start}={now[start]} was trained anew or otherwise since"] * anew

    def _identify_start(self, stored: Config | None) -> str | None:
        """Identifies what `training.init_from` starts from, whatever has become of it since."""
        asked = self.config.training.init_from
        if asked is None:
            return None
        if Path(asked).resolve() == self.path.resolve():
            raise InputError(
                f"training.init_from={asked} is the run itself; choose another directory with --out"
            )
        noted = None
        if stored is not None and stored.training.init_from == asked:
            noted = (stored.provenance or {}).get("init_from")
        found = trained(Path(asked)) or noted
        if found is None:
            raise InputError(
                f"training.init_from={asked}: there is no finished training; name the directory of "
                "a run whose stage 'train' is done"
            )
        return found

    def _done(self) -> dict[str, Any]:
        return _stages(self.path)


def stored_config(directory: Path) -> Config | None:
    """The config of a run directory; None where there is no run yet.

    Raises:
        InputError: If the path is a file, or a folder of something else.
    """
    path = directory / "config.yaml"
    if path.exists():
        config = Config.load(path)
        if config.provenance is None:  # a file of the user's own, or an emptied one
            raise InputError(
                f"{directory} is no run directory: its config.yaml was not written by a run (it "
                "has no provenance); choose another with --out"
            )
        return config
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(
            f"{directory} is no run directory (it holds no config.yaml); choose another with --out"
        )
    return None


def trained(directory: Path) -> str | None:
    """Identifies the SAEs of a run wherever it lies; None where there is none, or not trained."""
    stage = _stages(directory).get("train")
    config = None if stage is None else stored_config(directory)
    if stage is None or config is None:
        return None
    of = [stage["key"], (config.provenance or {}).get("host_fingerprint")]
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]


def read_json(path: Path, **kinds: Any) -> dict[str, Any]:
    """The content of an artefact, an object.

    Args:
        kinds: Keys that it must have, and the type of each one's value.

    Raises:
        InputError: If it cannot be read or is not of that form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise _damaged(path, f"it holds a {type(content).__name__}, not an object")
    for key, kind in kinds.items():
        if key not in content:
            raise _damaged(path, f"it has no '{key}'")
        try:
            TypeAdapter(kind).validate_python(content[key], strict=True)
        except ValidationError as error:
            raise _damaged(path, f"'{key}': {error.errors()[0]['msg']}") from error
    return content


def _chain(stage: str) -> list[str]:
    """The stage, and those before it that it depends on."""
    earlier = _WORKS_ON[stage]
    return [*([] if earlier is None else _chain(earlier)), stage]


def _stages(directory: Path) -> dict[str, Any]:
    """The stages that are done."""
    path = directory / "stages.json"
    done = read_json(path) if path.exists() else {}
    if not all(isinstance(entry, dict) and "key" in entry for entry in done.values()):
        raise _damaged(path, "a stage has no key")
    return done


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path} is damaged ({why}); remove it to have it made again")


def _flat(config: Config) -> dict[str, Any]:
    sections = config.model_dump(mode="json", exclude={"preset", "provenance"})
    return {
        f"{section}.{key}": value
        for section, keys in sections.items()
        for key, value in keys.items()
    }


def _relevant(config: Config, start: str | None) -> dict[str, Any]:
    """The keys that decide what comes out.

    Where a cache lies does not; how it is read does. Nor where the run lies that SAEs start from;
    `start`, which identifies what that has trained, does.
    """
    values = {path: value for path, value in _flat(config).items() if path not in _IRRELEVANT}
    if values.pop("training.init_from") is not None:
        values["training.init_from"] = start
    if values["training.activation_cache"] is not None:
        return values | {"training.activation_cache": True}
    return {path: value for path, value in values.items() if path not in _OF_A_CACHE}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    packages = ("groupsae", "torch", "transformers", "datasets", "numpy")
    return {name: metadata.version(name) for name in packages} | {
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
