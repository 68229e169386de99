from __future__ import annotations

import pytest

from benchmarks.results import Results, milliseconds, peak_gigabytes, sae_milliseconds
from benchmarks.rounds import Turn
from groupsae.errors import InputError
from tests.benchmarks.made_up import ceiling, participant, setting, turn


def results_of(*turns, **changes):
    labels = dict.fromkeys(turn.label for turn in turns if turn.label != "ceiling")
    return Results(setting([participant(label) for label in labels], **changes), turns)


def test_ratios_are_taken_within_a_round():
    results = results_of(
        *[turn("groupsae-torch", 1, 1000.0), turn("sparsify", 1, 3000.0)],
        *[turn("groupsae-torch", 2, 2000.0), turn("sparsify", 2, 5000.0)],
        *[turn("groupsae-torch", 3, 1000.0), turn("sparsify", 3, 2800.0)],
    )
    # Of the medians it would be 3.0.
    assert results.ratio("sparsify", "groupsae-torch", milliseconds) == (2.8, 2.5, 3.0)


def test_rounds_that_one_of_the_two_lacks_do_not_count():
    results = results_of(
        *[turn("groupsae-torch", 1, 1000.0), turn("sparsify", 1, 3000.0)],
        *[turn("groupsae-torch", 2, 10.0), turn("groupsae-torch", 3, 1000.0)],
        turn("sparsify", 3, 4000.0),
    )
    assert results.ratio("sparsify", "groupsae-torch", milliseconds) == (3.5, 3.0, 4.0)
    assert results.ratio("sparsify", "absent", milliseconds) is None


def test_a_library_without_a_shared_forward_takes_a_run_for_each_layer():
    results = results_of(
        turn("groupsae-torch", 1, 1000.0), turn("dictionary-learning", 1, 1800.0, runs=5)
    )
    assert results.ratio("dictionary-learning", "groupsae-torch", milliseconds) == (9.0, 9.0, 9.0)
    assert results.spread("dictionary-learning", sae_milliseconds) == pytest.approx([6300.0] * 3)


def test_an_saes_time_is_the_step_without_host_and_buffer():
    parts = {"host forward": 300.0, "buffer": 50.0, "SAE steps": 640.0, "rest": 10.0}
    (timed,) = results_of(turn("a", 1, 1000.0, parts_ms=parts)).rounds("a").values()
    assert sae_milliseconds(timed) == 650.0
    (whole,) = results_of(turn("a", 1, 1000.0, parts_ms={})).rounds("a").values()
    assert sae_milliseconds(whole) == 1000.0  # on a GPU parts are not timed


def test_the_fraction_of_the_ceiling_is_the_floor_over_the_step():
    row = participant("groupsae-cpu-bf16", host_dtype="bfloat16", saes=2)
    turns = [
        *[ceiling(1, float32=400.0, bfloat16=800.0), turn(row.label, 1, 500.0)],
        *[ceiling(2, float32=500.0, bfloat16=800.0), turn(row.label, 2, 500.0)],
    ]
    results = Results(setting([row]), turns)
    cost = results.setting.cost
    in_float32 = [1e3 * cost.flops(2) / rate / 500.0 for rate in (400e9, 500e9)]
    found = results.ceiling_fraction(row, own_dtypes=False)
    assert (found.least, found.most) == pytest.approx((min(in_float32), max(in_float32)))
    own = [1e3 * (cost.host / 800e9 + 2 * cost.encoder / r) / 500.0 for r in (400e9, 500e9)]
    found = results.ceiling_fraction(row, own_dtypes=True)
    assert (found.least, found.most) == pytest.approx((min(own), max(own)))


def test_without_a_ceiling_there_is_no_fraction():
    results = results_of(turn("sparsify", 1, 10.0))
    assert results.ceiling_fraction(results.participants[0], own_dtypes=True) is None


def test_unknown_memory_is_left_out():
    results = results_of(turn("a", 1, 1.0, peak_bytes=None), turn("a", 2, 1.0, peak_bytes=3e9))
    assert results.spread("a", peak_gigabytes) == (3.0, 3.0, 3.0)


def test_lines_are_read_back():
    rows = [participant("groupsae-torch"), participant("sparsify")]
    turns = [
        turn("groupsae-torch", 1, 1000.0, noisy=True),
        Turn("sparsify", 1, None, noisy=False, result=None, error="exit code 1"),
    ]
    lines = [setting(rows).to_json(), *(turn.to_json() for turn in turns)]
    results = Results.read(lines)
    assert results.setting == setting(rows)
    assert results.rounds("groupsae-torch") == {1: turns[0].result}
    assert results.is_noisy("groupsae-torch")
    assert results.failed == {"sparsify": "exit code 1"}
    assert [row.label for row in results.participants] == ["groupsae-torch"]


@pytest.mark.parametrize("line", ["{", "[]", '{"kind": "turn"}', '{"x": 1}'])
def test_other_files_are_refused(line):
    with pytest.raises(InputError, match=r"--show: this is no benchmark\.jsonl"):
        Results.read([line])


def test_turns_without_their_setting_are_refused():
    with pytest.raises(InputError, match="no line of kind 'setting'"):
        Results.read([turn("a", 1, 1.0).to_json()])
