"""Where metrics go: always to `metrics.jsonl`, and to an experiment tracker if asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from groupsae.config import Config
from groupsae.errors import InputError
from groupsae.files import append_text, write_text

Record = dict[str, Any]


@contextmanager
def open_tracker(
    name: str, directory: Path, step: int, config: Config
) -> Iterator[Callable[[Record], None]]:
    """Yield a function that takes one record of metrics.

    Args:
        name: "none", "wandb" or "tensorboard".
        directory: The run's; holds `metrics.jsonl`, to which each record is appended.
        step: Where training continues; lines of later steps are dropped first.
        config: Sent to the tracker as the run's settings.

    Raises:
        InputError: If the tracker's package is not installed.
    """
    path = directory / "metrics.jsonl"
    _keep_until(path, step)
    with _TRACKERS[name](directory, config) as send:

        def record(values: Record) -> None:
            append_text(path, json.dumps(values) + "\n")
            send(values)

        yield record


@contextmanager
def _none(directory: Path, config: Config) -> Iterator[Callable[[Record], None]]:
    yield lambda values: None


@contextmanager
def _wandb(directory: Path, config: Config) -> Iterator[Callable[[Record], None]]:
    try:
        import wandb
    except ImportError as error:
        raise _missing("wandb") from error
    with wandb.init(
        project="groupsae", dir=directory, config=config.model_dump(mode="json")
    ) as session:
        yield lambda values: session.log(_named(values) | {"tokens": values["tokens"]})


@contextmanager
def _tensorboard(directory: Path, config: Config) -> Iterator[Callable[[Record], None]]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing("tensorboard") from error
    with SummaryWriter(directory / "tensorboard") as writer:

        def send(values: Record) -> None:
            for key, value in _named(values).items():
                writer.add_scalar(key, value, values["step"])

        yield send


_TRACKERS = {"none": _none, "wandb": _wandb, "tensorboard": _tensorboard}


def _named(values: Record) -> dict[str, float]:
    """`layers-03-06/fvu` and so on."""
    skipped = ("step", "tokens", "sae")
    return {f"{values['sae']}/{key}": value for key, value in values.items() if key not in skipped}


def _missing(package: str) -> InputError:
    return InputError(
        f"training.tracker: {package} is not installed; `pip install 'groupsae[{package}]'`, "
        "or set training.tracker=none"
    )


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and a last line that was cut off."""
    if path.exists():
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["step"] <= step]
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}); remove it to go on without") from error
        write_text(path, "".join(kept))
