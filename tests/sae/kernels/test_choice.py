from __future__ import annotations

import pytest
import torch

from groupsae.errors import InputError
from groupsae.sae.kernels import choose, cpu, reference, sparse
from groupsae.sae.kernels.update import update

CPU = torch.device("cpu")


def test_kernels_are_found_by_name():
    assert choose("reference", CPU) == (reference.step, update)
    assert choose("torch", CPU) == (sparse.step, update)


def test_auto_is_compiled_where_that_can_be(monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: True)
    assert choose("auto", CPU) == (cpu.step, cpu.update)
    assert choose("auto", torch.device("cuda")) == (sparse.step, update)
    monkeypatch.setattr(cpu, "available", lambda: False)
    assert choose("auto", CPU) == (sparse.step, update)


def test_what_was_asked_for_by_name_and_cannot_run_is_refused(monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: False)
    with pytest.raises(InputError, match=r"training\.kernel=cpu needs a C\+\+ compiler"):
        choose("cpu", CPU)
    with pytest.raises(InputError, match=r"training\.kernel=triton needs an NVIDIA GPU"):
        choose("triton", CPU)
