from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from groupsae import allocator

FAULTS = """
import resource, sys, torch
from groupsae.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
torch.ones(30_000_000).sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(8_000_000).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_that_was_freed_is_not_asked_of_the_system_again():
    faults = {
        how: int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True
            ).stdout
        )
        for how in ("kept", "given back")
    }
    assert faults["kept"] < 0.1 * faults["given back"]


def test_elsewhere_nothing_is_done(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not allocator.keep_freed_memory.__wrapped__()
