"""Files and folders written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from groupsae.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; what lies there replaces `path` if the block ends.

    A reader, a crash, a power cut or a full disk never leaves half a file: if the block does not
    end well, what it wrote is removed, and `path` is as it was.

    Raises:
        InputError: On a full disk, without permission and the like.
    """
    aside = path.with_name(f".{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(aside)
        try:
            yield aside
            if aside.is_file():
                flush(aside)
            if path.is_dir():  # which, unlike a file, is not replaced unless it is empty
                _remove(path)
            aside.replace(path)
            flush(path.parent)
        except BaseException:
            _remove(aside)
            raise


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path`; errors as in :func:`replacing`."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Replace the content of `path` by what JSON holds; errors as in :func:`replacing`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def save_tensors(
    tensors: Mapping[str, Any], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors, or arrays of numpy, as safetensors, with the permissions of any new file.

    safetensors by itself lets nobody but the owner read what it writes.
    """
    import numpy as np

    if any(isinstance(tensor, np.ndarray) for tensor in tensors.values()):
        from safetensors.numpy import save_file
    else:
        from safetensors.torch import save_file
    path.touch()
    permissions = path.stat().st_mode
    save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    path.chmod(permissions)


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Any]:
    """The tensors in a safetensors file.

    Raises:
        OSError: What the system says: safetensors calls missing what it may not read, too.
        SafetensorError: It is damaged.
    """
    from safetensors.torch import load_file

    path.open("rb").close()
    tensors: dict[str, Any] = load_file(path, device=device)
    return tensors


def flush(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_text(path: Path, text: str) -> None:
    """Add to the end of `path`; errors as in :func:`replacing`."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system or safetensors says when `path` cannot be written into one message.

    Raises:
        InputError: Naming the path, the reason and the mend.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = str(error)
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        elif in_safetensors := re.search(r"\(os error (\d+)\)", reason):
            reason = os.strerror(int(in_safetensors[1]))
        raise InputError(
            f"{path} cannot be written: {reason}; mend that and give the same command again: what "
            "is finished is kept"
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
