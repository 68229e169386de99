"""The tables, for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from rich.table import Table as RichTable

from benchmarks.contestants import CEILING
from benchmarks.costs import Line
from benchmarks.results import (
    Participant,
    Results,
    Setting,
    Spread,
    milliseconds,
    peak_gigabytes,
    sae_milliseconds,
)
from benchmarks.rounds import Result
from benchmarks.workload import SHAPES

_PARTS = ("host forward", "buffer", "text", "encode", "decode", "backward", "update", "SAE steps")
_NONE = "–"


@dataclass(frozen=True)
class Table:
    """Columns of text; the first is the rows' name."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        head = [f"## {self.title}", "", _line(self.columns)]
        rule = _line(["---", *("---:" for _ in self.columns[1:])])
        notes = [text for note in self.notes for text in ("", note)]
        return "\n".join([*head, rule, *map(_line, self.rows), *notes]) + "\n"

    def rich(self) -> RichTable:
        caption = "\n".join(self.notes)
        table = RichTable(title=self.title, caption=caption, caption_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table


def heading(results: Results) -> list[str]:
    """What was measured, where, and with which versions: one line each."""
    setting = results.setting
    shape = SHAPES[setting.shape]
    lines = [
        f"Shape {shape.name} (random weights), layers 0 to {max(shape.layers)}, d = "
        f"{shape.d_model}, d_sae = {shape.d_sae:,}, k = {setting.k}; contexts of "
        f"{setting.context_length} tokens, {setting.batch_tokens:,} tokens a step; a shuffle "
        f"buffer of {setting.buffer_batches} batches where the library has one; Adam, float32 SAEs",
        f"{setting.steps} steps after {setting.warm}, {setting.rounds} rounds in turns",
        _rule(setting),
        *(f"{key}: {value}" for key, value in setting.machine.items()),
    ]
    installed = (", ".join(map(" ".join, row.versions.items())) for row in setting.participants)
    lines += dict.fromkeys(installed)
    lines += [f"left out: {line}" for line in setting.left_out]
    lines += [f"failed: {label}: {error}" for label, error in results.failed.items()]
    return lines


def tables(results: Results) -> list[Table]:
    """Every table that there are results for."""
    made = [
        _steps(results),
        _parts(results),
        _speed_ratios(results),
        _memory_ratios(results),
        _accounting(results),
        *_groups(results),
        _dead(results),
        _ceiling(results),
    ]
    return [table for table in made if table.rows]


def _steps(results: Results) -> Table:
    setting = results.setting
    rows = []
    notes = [
        "ms per step, all SAEs: median of the rounds (least–most). Floor: the host's forward up to "
        "the last layer and one encoder product per SAE, at the fastest matrix product measured in "
        "the same round; of float32: all of it in float32; of own: the host in its own data type, "
        "the encoder's product in those of its back end. FVU: of the last step, mean "
        "over SAEs; after so few steps it is no comparison.",
    ]
    for row in results.participants:
        step = results.spread(row.label, milliseconds)
        if step is None:
            continue
        tokens = setting.batch_tokens / step.median * 1e3
        rows.append(
            (
                row.label + (" *" if results.is_noisy(row.label) else ""),
                row.host_dtype,
                row.back_end,
                str(row.saes),
                _spread(step, _decimals(step.median)),
                f"{tokens:,.0f}",
                f"{tokens * row.saes:,.0f}",
                _middle(results.spread(row.label, peak_gigabytes), ".2f"),
                _middle(results.spread(row.label, lambda result: result["fvu"]), ".3f"),
                _percent(results.ceiling_fraction(row, own_dtypes=False)),
                _percent(results.ceiling_fraction(row, own_dtypes=True)),
            )
        )
        forwards = results.spread(row.label, lambda result: result["forwards_per_step"])
        if forwards is not None and (forwards.least, forwards.most) != (1, 1):
            notes.append(
                f"{row.label}: {_spread(forwards, '.2f')} forwards of the host for each step, "
                "where 1 is the same work."
            )
        runs = max(result.get("runs", 1) for result in results.rounds(row.label).values())
        if runs > 1 and not row.dead:
            notes.append(
                f"{row.label}: has no shared forward. One layer was run; times are {runs} times "
                "its, memory is one run's."
            )
    if any(map(results.is_noisy, (row.label for row in results.participants))):
        notes.append(
            "Marked *: others used the machine during one of its rounds, in spite of repeats."
        )
    peak = "peak memory, GB" if setting.device == "cpu" else "peak GPU memory, GB"
    columns = (
        *("contestant", "host dtype", "back end", "SAEs", "ms per step", "tokens/s"),
        *("tokens × SAEs/s", peak, "FVU", "floor / step, float32", "floor / step, own dtypes"),
    )
    return Table("A training step", columns, rows, notes)


def _parts(results: Results) -> Table:
    """Where the time goes, medians over the rounds."""
    medians: dict[str, dict[str, float]] = {}
    for row in results.participants:
        parts: dict[str, list[float]] = {}
        for result in results.rounds(row.label).values():
            for name, value in result["parts_ms"].items():
                parts.setdefault(name, []).append(value * result.get("runs", 1))
        medians[row.label] = {name: median(values) for name, values in parts.items()}
    names = [part for part in (*_PARTS, "rest") if any(part in row for row in medians.values())]
    rows = [
        (label, *(_number(parts.get(name), _decimals(sum(parts.values()))) for name in names))
        for label, parts in medians.items()
        if parts
    ]
    note = (
        "A part's time is less that of the parts inside it. groupsae's host forward includes "
        "writing to the buffer; sae-lens's buffer includes reading tokens; dictionary-learning's "
        "host forward includes tokenising and its buffer's refill."
    )
    return Table("Parts of a step, ms", ("contestant", *names), rows, [note])


def _speed_ratios(results: Results) -> Table:
    title = "How many times as fast (row) as the column's: median of the rounds' ratios"
    return _ratios(
        results,
        title,
        lambda row, column: results.ratio(column, row, milliseconds),
        "Rows with a bfloat16 host are not like for like with float32 hosts.",
    )


def _memory_ratios(results: Results) -> Table:
    return _ratios(
        results,
        "Peak memory as a share of the column's",
        lambda row, column: results.ratio(row, column, peak_gigabytes),
        "Peak resident memory of the process, imports included; on a GPU, of its tensors.",
    )


def _ratios(
    results: Results, title: str, ratio: Callable[[str, str], Spread | None], note: str
) -> Table:
    """Ours as rows; as columns everyone that trains one SAE per layer."""
    alive = [row for row in results.participants if not row.dead]
    columns = [row.label for row in alive if row.saes == results.setting.layers]
    rows = [
        (row.label, *(_spread(ratio(row.label, column), ".2f") for column in columns))
        for row in alive
        if row.ours
    ]
    return Table(title, ("groupsae", *columns), rows if len(alive) > 1 else [], [note])


def _accounting(results: Results) -> Table:
    """What groupsae's memory is made of, and its peak over the rounds against that."""
    rows, columns = [], []
    for row in results.participants:
        measured = list(results.rounds(row.label).values())
        parts = measured[0].get("memory_bytes")
        peak = max((result["peak_bytes"] or 0 for result in measured), default=0)
        if not parts or not peak or row.dead:
            continue
        columns = list(parts)
        baseline = parts["process after imports"] or 0
        total = sum(size or 0 for size in parts.values())
        rows.append(
            (
                row.label,
                *(f"{(size or 0) / 1e6:,.0f}" for size in parts.values()),
                f"{total / 1e6:,.0f}",
                f"{peak / 1e6:,.0f}",
                f"{peak / total:.2f}",
                f"{(peak - baseline) / (total - baseline):.2f}",
            )
        )
    names = ("contestant", *columns, "sum", "peak", "peak / sum", "the same without imports")
    note = "The sum leaves out one SAE's gradients, the batch and the host's own activations."
    return Table("groupsae's memory, MB", names, rows, [note])


def _groups(results: Results) -> list[Table]:
    """Cost over the number of groups, for each variant that was run at several."""
    by_variant: dict[str, list[Participant]] = {}
    for row in results.participants:
        if row.ours and not row.dead:
            by_variant.setdefault(row.variant, []).append(row)
    return [
        _groups_of(results, variant, rows)
        for variant, rows in by_variant.items()
        if len({row.saes for row in rows}) > 1
    ]


def _groups_of(results: Results, variant: str, participants: list[Participant]) -> Table:
    cost = results.setting.cost
    steps = [results.spread(row.label, milliseconds) for row in participants]
    medians = [step.median for step in steps if step is not None]
    line = Line.through([row.saes for row in participants], medians)
    one = next((row.label for row in participants if row.saes == 1), None)
    rows = [
        (
            str(row.saes),
            _spread(step, ",.1f"),
            f"{line.at(row.saes):,.1f}",
            _spread(results.ratio(row.label, one, milliseconds), ".2f") if one else _NONE,
            f"{cost.sparse_ratio(row.saes):.2f}",
            f"{cost.dense_ratio(row.saes):.2f}",
        )
        for row, step in zip(participants, steps, strict=True)
    ]
    columns = (
        *("G", "ms per step", "A + T G", "C(G) / C(1), measured"),
        *("predicted, sparse step", "predicted, dense step (paper)"),
    )
    title = f"{variant}: cost over groups, A = {line.A:,.1f} ms, T = {line.T:,.1f} ms"
    note = (
        "Least squares on the medians. Predicted in operations: the host's forward plus G encoder "
        "products (sparse), or plus G times five products of that size (dense)."
    )
    return Table(title, columns, rows, [note])


def _dead(results: Results) -> Table:
    """What the auxiliary loss adds, against the same contestant without dead latents."""
    alive = {(row.variant, row.saes): row for row in results.participants if not row.dead}
    rows = []
    for row in results.participants:
        twin = alive.get((row.variant, row.saes))
        if not row.dead or twin is None:
            continue
        with_dead, without = results.rounds(row.label), results.rounds(twin.label)
        pairs = [
            (sae_milliseconds(with_dead[number]) / row.saes, sae_milliseconds(result) / row.saes)
            for number, result in without.items()
            if number in with_dead
        ]
        extra = Spread.of(more - less for more, less in pairs)
        share = Spread.of(more / less - 1 for more, less in pairs)
        rows.append((row.label, _spread(extra, ",.1f"), _percent(share)))
    columns = ("contestant", "extra ms per SAE", "of its cost without")
    note = (
        "An SAE's cost: the step over the SAEs; where parts are timed, without the host's forward "
        "and the buffer."
    )
    return Table("The auxiliary loss at work", columns, rows, [note])


def _ceiling(results: Results) -> Table:
    """The machine's matrix products."""
    names = list(
        dict.fromkeys(
            name for result in results.rounds(CEILING).values() for name in result["gflops"]
        )
    )
    rows = [
        (name, _spread(results.spread(CEILING, partial(_rate, name)), ",.0f")) for name in names
    ]
    note = "The faster of the encoder's shape (1,024 tokens) and a cube's, in the same rounds."
    return Table("The machine's matrix products", ("product", "GFLOP/s"), rows, [note])


def _rate(product: str, result: Result) -> float | None:
    rate: float | None = result["gflops"].get(product)
    return rate


def _rule(setting: Setting) -> str:
    if setting.busy_limit is None:
        return "This system does not tell what other processes use: no turn was discarded"
    return (
        f"Turns during which other processes used more than {setting.busy_limit:.0%} of a core "
        f"were repeated, up to {setting.repeats} times"
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _spread(spread: Spread | None, form: str) -> str:
    if spread is None:
        return _NONE
    return f"{spread.median:{form}} ({spread.least:{form}}–{spread.most:{form}})"


def _decimals(milliseconds: float) -> str:
    """How times of this size are written."""
    return ",.0f" if milliseconds >= 100 else ",.2f"


def _number(value: float | None, form: str) -> str:
    return _NONE if value is None else f"{value:{form}}"


def _middle(spread: Spread | None, form: str) -> str:
    return _number(None if spread is None else spread.median, form)


def _percent(spread: Spread | None) -> str:
    return _NONE if spread is None else f"{spread.median:.0%}"
