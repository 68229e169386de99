from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks.drivers import common
from benchmarks.drivers.common import Finished, Stopwatch, Task

TASK = Task(
    host="host",
    tokens="tokens",
    layers=(0, 1),
    groups=((0, 1),),
    context_length=16,
    batch_tokens=64,
    d_model=32,
    d_sae=512,
    k=4,
    steps=2,
    warm=1,
    buffer_batches=4,
    threads=1,
)


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only where it is said to."""
    fake = SimpleNamespace(now=0.0, perf_counter=lambda: fake.now)
    monkeypatch.setattr(common, "time", fake)
    return fake


def spend(clock, seconds):
    clock.now += seconds


def test_a_task_travels_as_json():
    assert Task.from_json(TASK.to_json()) == TASK
    assert (TASK.contexts, replace(TASK, dead=0.1).dead_latents) == (4, 51)


def test_parts_are_told_apart_and_only_timed_steps_count(clock):
    stopwatch = Stopwatch(TASK)
    encode = stopwatch.timed("encode", lambda seconds: spend(clock, seconds))

    def step(factor):
        with stopwatch.part("host forward"):
            spend(clock, 3 * factor)
            encode(2 * factor)
        spend(clock, 1 * factor)
        stopwatch.end_step()

    step(100)
    step(1)
    with pytest.raises(Finished):
        step(3)
    encode(1000)  # after the end
    result = stopwatch.result(fvu=0.5, runs=2)
    assert result["ms_per_step"] == pytest.approx(1e3 * (6 + 18) / 2)
    assert result["step_ms"] == pytest.approx([6e3, 18e3])
    assert result["parts_ms"] == pytest.approx({"host forward": 6e3, "encode": 4e3, "rest": 2e3})
    assert (result["forwards_per_step"], result["runs"], result["fvu"]) == (1.0, 2, 0.5)


def test_whole_periods_of_a_buffer_are_timed():
    assert Stopwatch(replace(TASK, steps=8), period=3).steps == 9
    assert Stopwatch(replace(TASK, steps=8), period=2).steps == 8


def test_making_items_counts_and_using_them_does_not(clock):
    stopwatch = Stopwatch(TASK)

    def items():
        for number in range(3):
            spend(clock, 2)
            yield number

    with pytest.raises(Finished):
        for _ in stopwatch.iterate("buffer", items()):
            spend(clock, 5)
            stopwatch.end_step()
    assert stopwatch.result(fvu=0.0)["parts_ms"] == pytest.approx({"buffer": 2e3, "rest": 5e3})


def test_a_method_is_timed_in_its_place(clock):
    class Trainer:
        def step(self, seconds):
            spend(clock, seconds)
            return "stepped"

    stopwatch = Stopwatch(replace(TASK, steps=1))
    stopwatch.time("SAE steps", Trainer, "step")
    stopwatch.end_step()
    assert Trainer().step(4) == "stepped"
    with pytest.raises(Finished):
        stopwatch.end_step()
    assert stopwatch.result(fvu=0.0)["parts_ms"]["SAE steps"] == pytest.approx(4e3)
    with pytest.raises(AttributeError, match="no_longer_there"):
        stopwatch.time("SAE steps", Trainer, "no_longer_there")


def test_other_threads_are_not_watched(clock):
    stopwatch = Stopwatch(replace(TASK, steps=1))
    stopwatch.end_step()
    other = threading.Thread(target=stopwatch.timed("encode", lambda: spend(clock, 4)))
    other.start()
    other.join()
    with pytest.raises(Finished):
        stopwatch.end_step()
    assert stopwatch.result(fvu=0.0)["parts_ms"] == {}


def test_a_loop_that_ends_early_gives_no_result():
    stopwatch = Stopwatch(TASK)
    stopwatch.end_step()
    with pytest.raises(RuntimeError, match="1 of 3 steps ended"):
        stopwatch.result(fvu=0.0)


def test_a_step_does_not_end_inside_a_part():
    stopwatch = Stopwatch(TASK)
    with stopwatch.part("encode"), pytest.raises(RuntimeError, match="inside a part"):
        stopwatch.end_step()


def test_memory_is_read_from_the_system():
    now, most = common.resident_bytes("cpu"), common.peak_bytes("cpu")
    if now is None:
        pytest.skip("no /proc/self/status here")
    assert 10_000_000 < now <= most
