from __future__ import annotations

import subprocess
import sys

import groupsae


def test_public_names_are_there():
    for name in groupsae.__all__:
        assert getattr(groupsae, name) is not None


def test_importing_loads_nothing_heavy():
    code = (
        "import sys, groupsae, groupsae.cli\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'scipy', 'sklearn', 'wandb'}\n"
        "print(*(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""


def test_no_pickle_is_ever_read():
    """torch.load and pickle stay out of the package."""
    from pathlib import Path

    for path in Path(groupsae.__file__).parent.rglob("*.py"):
        source = path.read_text()
        assert "import pickle" not in source, path
        assert "torch.load(" not in source, path
        assert "allow_pickle=True" not in source, path
