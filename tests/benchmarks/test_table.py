from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from benchmarks.results import Results
from benchmarks.table import Table, heading, tables
from tests.benchmarks.made_up import ceiling, participant, setting, turn

MEMORY = {
    "process after imports": 400_000_000,
    "host weights": 280_000_000,
    "SAE weights": 168_000_000,
    "Adam states": 336_000_000,
    "buffer": 42_000_000,
    "one chunk": 16_777_216,
}


@pytest.fixture
def results():
    rows = [
        participant("groupsae-torch, G=1", saes=1),
        participant("groupsae-torch, G=2", saes=2),
        participant("groupsae-torch, G=5", saes=5),
        participant("sparsify"),
        participant("dictionary-learning"),
        participant("sparsify, 10% dead", dead=0.1),
    ]
    turns = [ceiling(number, 450.0, 900.0) for number in (1, 2, 3)]
    for number, ms in ((1, 1000.0), (2, 1100.0), (3, 1200.0)):
        turns += [
            turn("groupsae-torch, G=1", number, ms - 600, memory_bytes=MEMORY),
            turn("groupsae-torch, G=2", number, ms - 450),
            turn("groupsae-torch, G=5", number, ms, noisy=number == 2),
            turn("sparsify", number, 3 * ms),
            turn("dictionary-learning", number, 2 * ms, runs=5),
            turn("sparsify, 10% dead", number, 3.3 * ms),
        ]
    return Results(setting(rows), turns)


def table_of(results, title) -> dict[str, dict[str, str]]:
    """A table's cells by row and column."""
    (table,) = [table for table in tables(results) if table.title.startswith(title)]
    return {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}


def test_the_step_shows_medians_with_their_spread(results):
    steps = table_of(results, "A training step")
    ours = steps["groupsae-torch, G=5 *"]  # disturbed in one round
    assert ours["ms per step"] == "1,100 (1,000–1,200)"
    assert ours["tokens/s"] == f"{4096 / 1.1:,.0f}"
    assert ours["tokens × SAEs/s"] == f"{5 * 4096 / 1.1:,.0f}"
    assert ours["peak memory, GB"] == "2.00"
    assert steps["dictionary-learning"]["ms per step"] == "11,000 (10,000–12,000)"


def test_what_is_special_about_a_row_is_said_below(results):
    (table,) = [table for table in tables(results) if table.title == "A training step"]
    notes = " ".join(table.notes)
    assert "dictionary-learning: has no shared forward. One layer was run; times are 5" in notes
    assert "Marked *: others used the machine" in notes
    assert "forwards of the host for each step" not in notes


def test_work_that_is_not_the_same_is_said_so():
    rows = [participant("sae-lens")]
    results = Results(setting(rows), [turn("sae-lens", 1, 1.0, forwards_per_step=1.5)])
    (table,) = [table for table in tables(results) if table.title == "A training step"]
    assert "sae-lens: 1.50 (1.50–1.50) forwards of the host for each step" in " ".join(table.notes)


def test_ratios_stand_in_the_row_of_ours(results):
    speeds = table_of(results, "How many times as fast")
    assert speeds["groupsae-torch, G=5"]["sparsify"] == "3.00 (3.00–3.00)"
    assert speeds["groupsae-torch, G=5"]["dictionary-learning"] == "10.00 (10.00–10.00)"
    assert speeds["groupsae-torch, G=1"]["groupsae-torch, G=5"] == "2.20 (2.00–2.50)"
    assert "groupsae-torch, G=2" not in speeds["groupsae-torch, G=5"]  # trains fewer SAEs


def test_parts_are_those_of_all_runs(results):
    parts = table_of(results, "Parts of a step")
    assert parts["sparsify"]["host forward"] == "990"
    assert parts["dictionary-learning"]["encode"] == "6,600"


def test_the_cost_over_groups_stands_beside_what_was_predicted(results):
    (table,) = [table for table in tables(results) if "cost over groups" in table.title]
    # Medians 500, 650 and 1,100 ms lie on a line.
    assert table.title == "groupsae-torch: cost over groups, A = 350.0 ms, T = 150.0 ms"
    assert [row[2] for row in table.rows] == ["500.0", "650.0", "1,100.0"]
    assert [row[3] for row in table.rows] == [
        *["1.00 (1.00–1.00)", "1.30 (1.25–1.38)", "2.20 (2.00–2.50)"]
    ]
    cost = results.setting.cost
    assert table.rows[2][4:] == (f"{cost.sparse_ratio(5):.2f}", f"{cost.dense_ratio(5):.2f}")


def test_the_auxiliary_loss_is_told_apart(results):
    dead = table_of(results, "The auxiliary loss")
    # 70% of the step is the SAEs': 0.7 * 330 ms over 5 SAEs.
    assert dead["sparsify, 10% dead"]["extra ms per SAE"] == "46.2 (42.0–50.4)"
    assert dead["sparsify, 10% dead"]["of its cost without"] == "10%"


def test_memory_is_accounted_for(results):
    memory = table_of(results, "groupsae's memory")["groupsae-torch, G=1"]
    assert (memory["host weights"], memory["sum"], memory["peak"]) == ("280", "1,243", "2,000")
    assert memory["peak / sum"] == f"{2000 / 1242.777:.2f}"
    assert memory["the same without imports"] == f"{1600 / 842.777:.2f}"


def test_the_machines_products_are_there(results):
    products = table_of(results, "The machine's")
    assert products["float32 oneDNN"]["GFLOP/s"] == "450 (450–450)"


def test_tables_without_rows_are_left_out():
    rows = [participant("sparsify")]
    titles = [t.title for t in tables(Results(setting(rows), [turn("sparsify", 1, 5.0)]))]
    assert titles == ["A training step", "Parts of a step, ms"]


def test_the_heading_names_what_was_left_out_and_where(results):
    lines = heading(Results(setting([participant("a")], left_out=["b: not installed"]), []))
    assert "left out: b: not installed" in lines
    assert "CPU: made up" in lines
    assert lines.count("torch 2.13.0") == 1


def test_markdown_is_a_table():
    table = Table("Title", ("name", "value"), [("a|b", "1")], ["A note."])
    assert table.markdown().splitlines() == [
        *["## Title", "", "| name | value |", "| --- | ---: |", "| a\\|b | 1 |", "", "A note."]
    ]


def test_a_terminal_shows_every_cell(results):
    console = Console(file=StringIO(), width=200)
    for table in tables(results):
        console.print(table.rich())
    text = console.file.getvalue()
    assert "3.00 (3.00–3.00)" in text
    assert "dictionary-learning" in text
