from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the campaign forks its processes")
def test_a_short_campaign_of_kills_ends_with_the_same_bits() -> None:
    command = [sys.executable, "-m", "benchmarks.faults", "--kills", "3", "--longest", "3"]
    keys = ["training.tokens=30k", "grouping.distance_tokens=5000"]
    found = subprocess.run(
        [*command, *keys],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    counts = re.match(r"3 kills, \d+ of them .*; \d+ processes resumed; (\d+) runs", found.stdout)
    assert counts is not None, found.stdout
    assert int(counts[1]) >= 1
