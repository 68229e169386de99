"""What was measured: the setting and the turns, as written to `benchmark.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

from benchmarks.contestants import CEILING, Entry
from benchmarks.costs import StepCost, best_rate
from benchmarks.rounds import Result, Turn
from benchmarks.workload import SHAPES
from groupsae.errors import InputError


@dataclass(frozen=True)
class Participant:
    """A row of the table: an entry, without what is this machine's.

    Attributes:
        variant: The contestant's name, without G and dead latents.
        saes: SAEs that are trained.
        products: Data types that the encoder's product may be made in.
    """

    label: str
    variant: str
    ours: bool
    host_dtype: str
    back_end: str
    saes: int
    dead: float
    products: Sequence[str]
    versions: Mapping[str, str]

    @classmethod
    def of(cls, entry: Entry, layers: int) -> Participant:
        contestant = entry.contestant
        return cls(
            label=entry.label,
            variant=contestant.name,
            ours=contestant.ours,
            host_dtype=contestant.host_dtype,
            back_end=contestant.back_end,
            saes=entry.groups or layers,
            dead=entry.dead,
            products=contestant.products,
            versions=entry.versions,
        )


@dataclass(frozen=True)
class Setting:
    """What was measured, and where.

    Attributes:
        busy_limit: Cores that others might use during a turn; None where that is not known.
        left_out: A line for each contestant that is not installed.
    """

    shape: str
    device: str
    k: int
    context_length: int
    batch_tokens: int
    buffer_batches: int
    steps: int
    warm: int
    rounds: int
    busy_limit: float | None
    repeats: int
    machine: Mapping[str, str]
    participants: Sequence[Participant]
    left_out: Sequence[str]

    @property
    def cost(self) -> StepCost:
        return StepCost.of(
            SHAPES[self.shape], context_length=self.context_length, batch_tokens=self.batch_tokens
        )

    @property
    def layers(self) -> int:
        """Layers that are trained on: the SAEs of a contestant that does not group."""
        return len(SHAPES[self.shape].layers)

    def to_json(self) -> str:
        return json.dumps({"kind": "setting", **asdict(self)})


class Spread(NamedTuple):
    """Of one value per round."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None where there is no value."""
        found = list(values)
        return cls(median(found), min(found), max(found)) if found else None


class Results:
    """A setting and its turns, and what follows from them round by round."""

    def __init__(self, setting: Setting, turns: Iterable[Turn]) -> None:
        self.setting = setting
        self.failed: dict[str, str] = {}
        self._turns: dict[str, dict[int, Turn]] = {}
        for turn in turns:
            if turn.result is None:
                self.failed[turn.label] = turn.error
            else:
                self._turns.setdefault(turn.label, {})[turn.round] = turn

    @classmethod
    def read(cls, lines: Iterable[str]) -> Results:
        """From the lines of `benchmark.jsonl`.

        Raises:
            InputError: They are not such lines.
        """
        setting, turns = None, []
        try:
            for line in lines:
                values = json.loads(line)
                if values.pop("kind") == "turn":
                    turns.append(Turn(**values))
                else:
                    rows = [Participant(**row) for row in values.pop("participants")]
                    setting = Setting(**values, participants=rows)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"--show: this is no benchmark.jsonl: {error!r}") from error
        if setting is None:
            raise InputError("--show: this benchmark.jsonl has no line of kind 'setting'")
        return cls(setting, turns)

    @property
    def participants(self) -> list[Participant]:
        """Those that have at least one result."""
        return [row for row in self.setting.participants if row.label in self._turns]

    def rounds(self, label: str) -> dict[int, Result]:
        """Results by round; none of a contestant that failed or did not take part."""
        return {number: turn.result or {} for number, turn in self._turns.get(label, {}).items()}

    def is_noisy(self, label: str) -> bool:
        """Whether others used the machine during one of its turns, in spite of repeats."""
        return any(turn.noisy for turn in self._turns.get(label, {}).values())

    def spread(self, label: str, value: Callable[[Result], float | None]) -> Spread | None:
        """Of a value over the rounds in which it is there."""
        values = map(value, self.rounds(label).values())
        return Spread.of(found for found in values if found is not None)

    def ratio(self, label: str, to: str, value: Callable[[Result], float | None]) -> Spread | None:
        """Of value(label) / value(to), each pair taken from the same round."""
        above, below = self.rounds(label), self.rounds(to)
        pairs = [
            (value(above[number]), value(below[number])) for number in above if number in below
        ]
        return Spread.of(a / b for a, b in pairs if a is not None and b)

    def ceiling_fraction(self, row: Participant, *, own_dtypes: bool) -> Spread | None:
        """Of the time that a step's least operations take at the machine's rate, over the step's.

        Args:
            own_dtypes: Take the rates of the data types that the contestant multiplies in, not
                float32's.
        """
        host = [row.host_dtype] if own_dtypes else ["float32"]
        encoder = row.products if own_dtypes else ["float32"]
        ceilings, fractions = self.rounds(CEILING), []
        for number, result in self.rounds(row.label).items():
            gflops: dict[str, Any] = ceilings.get(number, {}).get("gflops", {})
            host_rate, encoder_rate = best_rate(gflops, host), best_rate(gflops, encoder)
            if host_rate and encoder_rate:
                floor = self.setting.cost.floor_ms(
                    row.saes, host_gflops=host_rate, encoder_gflops=encoder_rate
                )
                fractions.append(floor / milliseconds(result))
        return Spread.of(fractions)


def milliseconds(result: Result) -> float:
    """Of one step of all SAEs; a library without a shared forward takes a run for each."""
    return float(result["ms_per_step"]) * int(result.get("runs", 1))


def sae_milliseconds(result: Result) -> float:
    """Of one step, without the host's forward and the buffer where parts are timed."""
    parts, runs = result["parts_ms"], int(result.get("runs", 1))
    host = float(parts.get("host forward", 0.0)) + float(parts.get("buffer", 0.0))
    return milliseconds(result) - runs * host


def peak_gigabytes(result: Result) -> float | None:
    """The most memory in use at once, in 10^9 bytes."""
    peak = result["peak_bytes"]
    return None if peak is None else peak / 1e9
