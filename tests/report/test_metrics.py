from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupsae.report.metrics import METRICS, MISSING, compare, evaluated_totals, means, number

NAN = math.nan


def row(partition: str, layer: int, r2: float | None, total: int = 2, **more: object) -> dict:
    return {"partition": partition, "layer": layer, "r2": r2, "groups_total": total, **more}


def test_rows_are_paired_by_layer_in_order() -> None:
    rows = [
        row("groups", 1, 0.8, group=[0, 1]),
        row("baseline", 0, 0.95),
        row("groups", 0, 0.9, group=[0, 1]),
        row("baseline", 1, 0.85),
    ]
    first, second = compare(rows)
    assert (first.layer, second.layer) == (0, 1)
    assert first.group == (0, 1)
    assert first.values("r2") == pytest.approx((0.9, 0.95, -0.05))


def test_of_several_partitions_the_chosen_one_is_taken() -> None:
    rows = [row("groups", 0, 0.9, total=1), row("groups", 0, 0.7, total=2)]
    assert compare(rows, chosen=1)[0].values("r2")[0] == 0.9
    assert compare(rows, chosen=2)[0].values("r2")[0] == 0.7


def test_partitions_are_never_mixed() -> None:
    rows = [
        row("groups", 0, 0.9, total=1),
        row("groups", 1, 0.8, total=1),
        row("groups", 0, 0.7, total=2),
        row("groups", 1, 0.6, total=2),
    ]
    for chosen in (None, 3):
        assert [c.values("r2")[0] for c in compare(rows, chosen)] == [0.9, 0.8]
    assert evaluated_totals([*rows, row("baseline", 0, 0.9, total=5)]) == [1, 2]


def test_means_are_over_the_layers_that_have_both() -> None:
    rows = [
        row("groups", 0, 0.9),
        row("baseline", 0, 1.0),
        row("groups", 1, 0.1),
        row("baseline", 1, None),
    ]
    assert means(compare(rows), "r2") == pytest.approx((0.9, 1.0, -0.1))


def test_without_a_baseline_the_groups_have_a_mean_alone() -> None:
    ours, theirs, difference = means(compare([row("groups", 0, 0.9), row("groups", 1, 0.7)]), "r2")
    assert ours == pytest.approx(0.8)
    assert math.isnan(theirs)
    assert math.isnan(difference)


def test_there_is_no_mean_of_nothing() -> None:
    assert all(map(math.isnan, means([], "r2")))


@pytest.mark.parametrize("value", [None, NAN, math.inf, -math.inf, "0.5", True, [1.0]])
def test_what_is_no_finite_number_is_missing(value: object) -> None:
    assert math.isnan(number(value))
    assert METRICS["r2"].format(number(value)) == MISSING


@pytest.mark.parametrize(
    ("key", "value", "signed", "text"),
    [
        ("r2", 0.98765, False, "0.9877"),
        ("r2", -0.00123, True, "−0.0012"),
        ("r2", 0.00123, True, "+0.0012"),
        ("r2", -0.00001, True, "0.0000"),
        ("dead", 0.0125, False, "1.25%"),
        ("dead", -0.0125, True, "−1.25%"),
        ("l2", 12345.6, False, "12,345.600"),
    ],
)
def test_format(key: str, value: float, signed: bool, text: str) -> None:
    assert METRICS[key].format(value, signed=signed) == text


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=1e6))
def test_a_formatted_number_reads_back_to_the_last_digit(value: float) -> None:
    text = METRICS["r2"].format(value, signed=True)
    assert float(text.replace("−", "-").replace(",", "")) == pytest.approx(value, abs=0.51e-4)
