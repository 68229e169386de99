from __future__ import annotations

import os
import resource
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from groupsae.errors import InputError
from groupsae.files import append_text, load_tensors, replacing, save_tensors, write_text
from groupsae.sae import SAE, SAEConfig


@pytest.fixture
def small_disk():
    """No file may grow beyond 20,000 bytes: the system and safetensors fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_is_replaced_and_its_folder_made(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "old")
    write_text(path, "new ü")
    assert path.read_text(encoding="utf-8") == "new ü"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for names in (["a", "b"], ["c"]):
        with replacing(tmp_path / "folder") as aside:
            aside.mkdir()
            for name in names:
                (aside / name).write_text(name)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "c"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_is_broken_off_leaves_the_old_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as aside:
        aside.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_leftover_of_a_killed_process_is_no_obstacle(tmp_path):
    (tmp_path / ".a.txt.tmp").mkdir()
    write_text(tmp_path / "a.txt", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def write_tensors(path):
    with replacing(path) as aside:
        save_file({"x": torch.zeros(10_000)}, aside)


@pytest.mark.parametrize(
    "write", [write_tensors, lambda path: write_text(path, "x" * 30_000)], ids=["tensors", "text"]
)
def test_a_full_disk_is_one_message_and_leaves_the_old(tmp_path, small_disk, write):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(InputError, match=r"/a cannot be written: File too large; mend that"):
        write(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_while_a_line_is_added(tmp_path, small_disk):
    append_text(tmp_path / "log", "a\n")
    with pytest.raises(InputError, match="log cannot be written: File too large"):
        append_text(tmp_path / "log", "x" * 30_000)


def test_a_file_where_a_folder_is_wanted(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match=r"file/a cannot be written: (Not a directory|File exists)"
    ):
        write_text(tmp_path / "file" / "a", "")


@pytest.mark.parametrize("tensor", [torch.arange(3.0), np.arange(3.0, dtype=np.float32)])
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_tensors_may_be_read_by_whom_other_files_may(tmp_path, tensor, umask):
    before = os.umask(umask)
    try:
        save_tensors({"a": tensor}, tmp_path / "a.safetensors")
        (tmp_path / "text").write_text("")
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode for name in ("a.safetensors", "text")]
    assert modes[0] == modes[1]
    assert load_tensors(tmp_path / "a.safetensors")["a"].tolist() == [0, 1, 2]


@pytest.fixture
def nobody():
    """Permissions hold: root is another user meanwhile."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield
    if root:
        os.seteuid(0)


def test_tensors_that_may_not_be_read_are_not_called_missing(request):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        Path(folder).chmod(0o755)
        SAE(SAEConfig(d_model=4, d_sae=8, k=2, layers=(0,))).save(Path(folder))
        weights = Path(folder) / "sae.safetensors"
        weights.chmod(0)
        request.getfixturevalue("nobody")
        with pytest.raises(PermissionError):
            load_tensors(weights)
        with pytest.raises(InputError, match=r"sae\.safetensors cannot be read: Permission denied"):
            SAE.load(folder)
        if os.getuid() == 0:
            os.seteuid(0)  # to remove it
