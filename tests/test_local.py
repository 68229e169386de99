from __future__ import annotations

import pytest

from groupsae.local import is_local, last_name, shown


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("EleutherAI/pythia-160m", "EleutherAI/pythia-160m"),
        ("gpt2", "gpt2"),
        ("bundled", "bundled"),
        ("/home/ann/models/mine", "mine"),
        ("/home/ann/models/mine/", "mine"),
        ("~/mine", "mine"),
        ("./mine", "mine"),
        ("../mine", "mine"),
        (r"C:\Users\ann\mine", "mine"),
        (r"\\server\share\mine", "mine"),
    ],
)
def test_of_a_path_the_last_name_is_shown(name, expected):
    assert shown(name) == expected
    assert is_local(name) == (name != expected)


def test_a_folder_that_is_there_is_local(tmp_path, monkeypatch):
    (tmp_path / "ann" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_local("ann/mine")
    assert shown("ann/mine") == last_name("ann/mine") == "mine"
