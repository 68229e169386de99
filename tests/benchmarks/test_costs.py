from __future__ import annotations

import numpy as np
import pytest

from benchmarks.costs import Line, StepCost, best_rate, read_groups
from benchmarks.workload import SHAPES
from groupsae.errors import InputError


def test_a_steps_least_operations():
    cost = StepCost.of(SHAPES["pythia-70m"], context_length=256, batch_tokens=4096)
    # Five blocks of 12 d^2 weights, two operations each, and attention over 256 tokens.
    assert cost.host == 4096 * 5 * (24 * 512**2 + 4 * 256 * 512)
    assert cost.encoder == 4096 * 2 * 512 * 8192
    assert cost.flops(5) == cost.host + 5 * cost.encoder


def test_the_floor_takes_each_part_at_its_own_rate():
    cost = StepCost.of(SHAPES["pythia-70m"], context_length=256, batch_tokens=4096)
    seconds = cost.host / 900e9 + 2 * cost.encoder / 400e9
    assert cost.floor_ms(2, host_gflops=900, encoder_gflops=400) == pytest.approx(1e3 * seconds)


def test_predicted_ratios_differ_by_what_a_dense_step_adds():
    cost = StepCost.of(SHAPES["pythia-70m"], context_length=256, batch_tokens=4096)
    A, T = cost.host, cost.encoder
    assert cost.sparse_ratio(5) == pytest.approx((A + 5 * T) / (A + T))
    assert cost.dense_ratio(5) == pytest.approx((A + 25 * T) / (A + 5 * T))
    assert cost.sparse_ratio(1) == cost.dense_ratio(1) == 1


def test_the_line_is_that_of_least_squares():
    line = Line.through([1, 2, 3], [300.0, 370.0, 430.0])
    T, A = np.polyfit([1, 2, 3], [300.0, 370.0, 430.0], 1)
    assert (line.A, line.T) == pytest.approx((A, T))
    exact = Line.through([1, 5], [272.0, 540.0])
    assert (exact.A, exact.T) == pytest.approx((205.0, 67.0))
    assert exact.at(2) == pytest.approx(339.0)


def test_one_number_of_groups_gives_no_line():
    with pytest.raises(InputError, match=r"--groups \[3\]: .* two different G"):
        Line.through([3, 3], [1.0, 2.0])


def test_the_fastest_product_of_a_dtype_counts():
    gflops = {"float32 F.linear": 206, "float32 oneDNN": 455, "bfloat16 F.linear": 900}
    assert best_rate(gflops, ["float32"]) == 455
    assert best_rate(gflops, ["float32", "bfloat16"]) == 900
    assert best_rate(gflops, ["int8"]) is None


def test_numbers_of_groups_are_read():
    assert read_groups("3,1, all,1", layers=5) == [1, 3, 5]
    for text, part in (("0", "0"), ("1,6", "6"), ("two", "two"), ("1,", "")):
        with pytest.raises(
            InputError, match=rf"{part!r} is no number of groups; .* 1 to 5, or all"
        ):
            read_groups(text, layers=5)
