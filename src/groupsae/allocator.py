"""How the C library's allocator treats the large tensors of a CPU step."""

from __future__ import annotations

import ctypes
import functools
import logging
import platform

_log = logging.getLogger(__name__)

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process keep memory that it frees, for what it allocates next.

    By default glibc gives large blocks back to the system, and every step of training gets its
    hundred megabytes anew, page by page, zeroed by the kernel on one core. The process's peak is
    what it was; only does its memory not shrink afterwards.

    Returns:
        Whether it is so now; False where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    kept = bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_M_MMAP_MAX, 0))
    _log.debug("glibc %s freed memory", "keeps" if kept else "does not keep")
    return kept
