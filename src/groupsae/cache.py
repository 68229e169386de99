"""The user's cache folder: what groupsae has found out about this machine, or built for it."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path


class CacheError(Exception):
    """There is no folder that only this user can write to; the message says why."""


def cache_folder() -> Path:
    """`groupsae` in XDG_CACHE_HOME or ~/.cache, made where it is missing.

    Nobody but this user can write to it: what lies in it is trusted, and some of it run.

    Raises:
        CacheError: It cannot be made, or others can write to it.
    """
    if os.name != "posix":
        raise CacheError(f"there is a cache on Linux and macOS only, not on {os.name}")
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(root).expanduser() / "groupsae"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError) as error:
        raise CacheError(f"no cache folder: {error}") from error
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise CacheError(f"others than you can write to {folder}; chmod 700 it")
    return folder


@functools.cache
def cpu_flags() -> str:
    """The CPU's instruction sets, where the system names them."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line for line in lines if line.startswith(("flags", "Features")))
    return next(named, platform.processor()).partition(":")[2]
