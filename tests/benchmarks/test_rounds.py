from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.drivers.common import Task
from benchmarks.rounds import DriverFailed, Turn, launch, take_turns
from tests.benchmarks.test_machine import FakeMachine


def turns_of(fake, runs, **settings):
    said = []
    given = {"rounds": 1, "repeats": 3, "quiet": fake.quiet(window=0.0), "say": said.append}
    return list(take_turns(runs, **(given | settings))), said


def run_of(fake, result, seconds=10.0):
    def run():
        fake.pass_time(seconds, own_cores=2.0)
        return {"ms_per_step": result}

    return run


class Machine(FakeMachine):
    """Waiting takes no time and finds it quiet; only work meets the others."""

    def sleep(self, seconds):
        self.now += 1.0


def test_contestants_take_turns():
    fake = Machine(others=[0.0])
    runs = [("a", run_of(fake, 1)), ("b", run_of(fake, 2)), ("c", run_of(fake, 3))]
    turns, _ = turns_of(fake, runs, rounds=2)
    assert [(turn.label, turn.round) for turn in turns] == [
        *[("a", 1), ("b", 1), ("c", 1)],
        *[("a", 2), ("b", 2), ("c", 2)],
    ]
    assert not any(turn.noisy for turn in turns)


def test_a_disturbed_turn_is_repeated():
    fake = Machine(others=[0.5, 0.3, 0.05])
    results = iter([10, 20, 30])
    turns, said = turns_of(fake, [("a", lambda: run_of(fake, next(results))())])
    assert [turn.result for turn in turns] == [{"ms_per_step": 30}]
    assert turns[0].other_cores == pytest.approx(0.05)
    assert said == [
        "round 1, a: others used 0.50 of a core; it is repeated",
        "round 1, a: others used 0.30 of a core; it is repeated",
    ]


def test_repeats_are_bounded_and_the_quietest_counts_as_noisy():
    fake = Machine(others=[0.5, 0.2, 0.4])
    results = iter([10, 20, 30])
    runs = [("a", lambda: run_of(fake, next(results))())]
    (turn,), said = turns_of(fake, runs, repeats=2)
    assert turn.noisy
    assert turn.result == {"ms_per_step": 20}
    assert said[-1] == "round 1, a: others used 0.40 of a core; it counts as noisy"


def test_who_fails_is_named_once_and_the_others_go_on():
    fake = Machine(others=[0.0])

    def fail():
        raise DriverFailed("exit code 1\nout of memory")

    turns, _ = turns_of(fake, [("a", fail), ("b", run_of(fake, 1))], rounds=2)
    assert [(turn.label, turn.round) for turn in turns] == [("a", 1), ("b", 1), ("b", 2)]
    assert turns[0].result is None
    assert turns[0].error.endswith("out of memory")


def test_a_turn_is_one_line_of_json():
    turn = Turn("a", 2, 0.5, True, {"ms_per_step": 1.5})
    values = json.loads(turn.to_json())
    assert values.pop("kind") == "turn"
    assert Turn(**values) == turn


def test_a_driver_that_fails_says_why():
    task = Task("host", "tokens", (0,), ((0,),), 16, 64, 32, 512, 4, 1, 1, 4, 1)
    with pytest.raises(DriverFailed, match=r"exit code 1\n(.|\n)*no_such_library"):
        launch(Path(sys.executable), "no_such_library", task)
