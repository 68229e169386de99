from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

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
    """Other libraries' files are loaded as weights alone, everything else never by pickle."""
    for path in Path(groupsae.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {"pickle", "dill", "joblib"}, path
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                assert [alias.name for alias in node.names] == ["UnpicklingError"], path
            if isinstance(node, ast.Call):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if ast.unparse(node.func) == "torch.load":
                    assert given.get("weights_only") == "True", path
                assert given.get("allow_pickle", "False") == "False", path
