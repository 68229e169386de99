from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from benchmarks import machine
from benchmarks.machine import Quiet


@dataclass
class FakeMachine:
    """A clock, and CPU time that this process's children and others use."""

    others: list[float]  # cores, in one work or wait after another; the last goes on
    now: float = 0.0
    busy: float = 1000.0
    children: float = 5.0
    waits: list[float] = field(default_factory=list)

    def pass_time(self, seconds: float, own_cores: float = 0.0) -> None:
        others = self.others.pop(0) if len(self.others) > 1 else self.others[0]
        self.now += seconds
        self.children += own_cores * seconds
        self.busy += (own_cores + others) * seconds

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.pass_time(seconds)

    def quiet(self, **settings: float) -> Quiet:
        return Quiet(
            **settings,
            busy=lambda: self.busy,
            children=lambda: self.children,
            clock=lambda: self.now,
            sleep=self.sleep,
        )


def test_others_are_whoever_is_busy_but_our_children():
    fake = FakeMachine(others=[0.25])
    result, cores = fake.quiet().watch(lambda: fake.pass_time(40, own_cores=1.9) or "done")
    assert result == "done"
    assert cores == pytest.approx(0.25)


def test_children_that_seem_busier_than_the_machine_leave_nothing_to_others():
    fake = FakeMachine(others=[-0.02])  # the two clocks tick differently
    _, cores = fake.quiet().watch(lambda: fake.pass_time(10, own_cores=2))
    assert cores == 0


def test_waiting_ends_with_the_first_quiet_window():
    fake = FakeMachine(others=[1.0, 0.5, 0.09, 0.07, 1.0])
    assert fake.quiet(limit=0.08, window=3).wait()
    assert fake.waits == [3, 3, 3, 3]


def test_waiting_is_bounded():
    fake = FakeMachine(others=[1.0])
    assert not fake.quiet(limit=0.08, window=3, patience=10).wait()
    assert sum(fake.waits) == 12


def test_where_the_system_does_not_tell_nothing_is_waited_for_or_discarded():
    quiet = Quiet(busy=lambda: None, children=lambda: 0.0, clock=lambda: 0.0, sleep=lambda _: None)
    assert quiet.wait()
    assert quiet.watch(lambda: 1) == (1, None)


def test_busy_time_is_all_but_idle_and_waiting(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 300 99999 88888 4 5 6 0 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    monkeypatch.setattr(machine, "_STAT", stat)
    monkeypatch.setattr(machine.os, "sysconf", {"SC_CLK_TCK": 100}.__getitem__)
    assert machine.busy_seconds() == pytest.approx((100 + 20 + 300 + 4 + 5 + 6) / 100)
    monkeypatch.setattr(machine, "_STAT", tmp_path / "absent")
    assert machine.busy_seconds() is None


def test_the_description_names_the_processor_and_the_date():
    found = machine.description("cpu", threads=2)
    assert found["CPU"].endswith("2 threads used")
    assert len(found["date"]) == len("2026-11-20")
    assert "GPU" not in found
