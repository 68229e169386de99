from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import contestants
from benchmarks.contestants import enter, installed, known, read_pythons, selected
from groupsae.errors import InputError

CPU = known("cpu")
HERE = Path(sys.executable)


def test_every_contestant_has_a_driver():
    drivers = Path(contestants.__file__).parent / "drivers"
    for device in ("cpu", "cuda"):
        for contestant in known(device).values():
            assert (drivers / f"{contestant.driver}.py").is_file()


def test_ours_run_the_kernel_that_they_are_named_by():
    assert {c.back_end for c in CPU.values() if c.ours} == {"torch", "cpu"}
    assert known("cuda")["groupsae-triton"].back_end == "triton"
    assert {c.host_dtype for c in known("cuda").values()} == {"bfloat16"}


def test_names_are_looked_up():
    assert [c.name for c in selected("sparsify, groupsae-cpu,sparsify", CPU)] == [
        *["sparsify", "groupsae-cpu"]
    ]
    assert len(selected(None, CPU)) == 6
    with pytest.raises(InputError, match=r"--contestants saelens: .* did you mean sae-lens\?"):
        selected("saelens", CPU)


def test_interpreters_are_read_and_a_link_stays_one(tmp_path):
    link = tmp_path / "python"
    link.symlink_to(HERE)
    assert read_pythons([f"sparsify={link}"], CPU) == {"sparsify": link}
    assert read_pythons([f"groupsae={HERE}"], CPU) == {"groupsae": HERE}
    with pytest.raises(InputError, match=r"--python sparsify: write LIBRARY=PATH"):
        read_pythons(["sparsify"], CPU)
    with pytest.raises(InputError, match=r"--python sparsfy: .* did you mean sparsify\?"):
        read_pythons([f"sparsfy={HERE}"], CPU)
    with pytest.raises(InputError, match=r"--python sae-lens=/no/where: there is no such file"):
        read_pythons(["sae-lens=/no/where"], CPU)


def test_versions_are_those_of_the_interpreter():
    found = installed(HERE, ["pytest", "no-such-distribution"])
    assert found == {"pytest": pytest.__version__}
    with pytest.raises(InputError, match="is no Python interpreter that runs"):
        installed(Path("/bin/false"), ["torch"])


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(contestants, "installed", lambda python, names: {"groupsae": "1"})


def test_who_is_not_installed_is_left_out_by_name(nothing_installed):
    entries, left_out = enter([CPU["groupsae-torch"], CPU["sparsify"]], {}, named=False)
    assert [entry.label for entry in entries] == ["groupsae-torch"]
    assert left_out == [f"sparsify: eai-sparsify is not installed for {sys.executable}"]


def test_who_was_asked_for_and_is_not_installed_is_refused(nothing_installed):
    message = r"sparsify: eai-sparsify is not installed .* --python sparsify=PATH"
    with pytest.raises(InputError, match=message):
        enter([CPU["sparsify"]], {}, named=True)
    with pytest.raises(InputError, match=message):
        enter([CPU["sparsify"]], {"sparsify": HERE}, named=False)


def test_labels_tell_entries_apart(nothing_installed):
    ((entry,), _) = enter([CPU["groupsae-cpu"]], {}, named=True)
    assert entry.with_groups(2).with_dead(0.1).label == "groupsae-cpu, G=2, 10% dead"
