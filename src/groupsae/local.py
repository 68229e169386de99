"""Names of this machine's disk, which are to stay out of what others may read."""

from __future__ import annotations

import re
from pathlib import Path

_A_PATH = re.compile(r"(?:~|\.{0,2}[/\\]|[A-Za-z]:[/\\]|\\\\)\S.*")


def is_path(text: str) -> bool:
    """Whether a text reads like a path of some system, there or not."""
    return _A_PATH.fullmatch(text) is not None


def is_local(name: str) -> bool:
    """Whether a host model or a text of this name is read from this machine's disk."""
    return name != "bundled" and (is_path(name) or Path(name).expanduser().exists())


def last_name(path: str) -> str:
    """The last name in a path of any system."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def shown(name: str) -> str:
    """The name of a host model or a text: of a local one the last name, of others all of it."""
    return (last_name(name) or name) if is_local(name) else name
