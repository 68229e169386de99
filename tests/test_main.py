from __future__ import annotations

import builtins
import sys

import pytest

from groupsae.__main__ import main


def test_an_interrupt_during_the_imports_is_exit_code_130(monkeypatch, capsys):
    import_module = builtins.__import__

    def interrupted(name, *arguments):
        if name == "groupsae.cli":
            raise KeyboardInterrupt
        return import_module(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    assert capsys.readouterr().err == "groupsae: interrupted\n"


def test_it_is_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["groupsae", "--version"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("groupsae ")
