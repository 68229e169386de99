"""What every test may ask for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and text beside the checkout; skips where there is none."""
    if not (_SHARED / "models" / "stories3M").is_dir():
        pytest.skip("no folder ../shared with models/stories3M beside this checkout")
    return _SHARED
