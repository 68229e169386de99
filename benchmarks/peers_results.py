"""What the quality benchmark found, and its tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean

from benchmarks.rounds import Result
from benchmarks.table import Table
from groupsae.errors import InputError

OURS = "groupsae"
_NONE = "–"


@dataclass(frozen=True)
class Found:
    """One SAE that was trained, or why it was not.

    Attributes:
        settings: "equal" or "own": see :class:`benchmarks.drivers.quality.Trial`.
        weight: Of the sparsity penalty; None: the default, or none is needed.
        result: What the driver printed; None if it failed.
    """

    library: str
    rule: str
    settings: str
    seed: int
    weight: float | None
    result: Result | None
    error: str = ""


@dataclass
class Quality:
    """Everything that one call found.

    Attributes:
        heading: What was equal, and with which versions: one line each.
    """

    heading: list[str]
    found: list[Found] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Quality:
        """What :meth:`save` wrote.

        Raises:
            InputError: The file cannot be read, or is another program's.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(values["heading"], [Found(**found) for found in values["found"]])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(
                f"--show {path}: cannot be read ({error}); give a file that this benchmark wrote"
            ) from error


@dataclass(frozen=True)
class Row:
    """All seeds of one library under the same rule and settings."""

    found: Sequence[Found]

    @property
    def library(self) -> str:
        return self.found[0].library

    @property
    def own(self) -> bool:
        return self.found[0].settings == "own"

    @property
    def label(self) -> str:
        return f"{self.library}, own defaults" if self.own else self.library

    def values(self, name: str, forward: str = "inference") -> list[float]:
        """One figure, of each seed that gave a result."""
        return [
            found.result[forward][name]
            for found in self.found
            if found.result and forward in found.result
        ]

    @property
    def compared(self) -> list[float]:
        """R^2 of each seed, at the same number of active latents wherever the rule allows it."""
        return self.values("r2", "batch") or self.values("r2")


def rows(found: Iterable[Found], rule: str) -> list[Row]:
    """The rows of a rule's table, ours first."""
    by_label: dict[tuple[str, str], list[Found]] = {}
    for one in found:
        if one.rule == rule:
            by_label.setdefault((one.library, one.settings), []).append(one)
    everyone = [Row(group) for group in by_label.values()]
    return sorted(everyone, key=lambda row: row.library != OURS)


def tables(quality: Quality) -> list[Table]:
    """A table for each rule, with its verdict."""
    return [
        Table(
            title=rule,
            columns=("SAE", "seeds", "R²", "L0", "dead", "R² by batch", "seconds"),
            rows=[_cells(row) for row in rows(quality.found, rule)],
            notes=[verdict(rows(quality.found, rule)), *_errors(quality.found, rule)],
        )
        for rule in dict.fromkeys(found.rule for found in quality.found)
    ]


def verdict(of: Sequence[Row]) -> str:
    """Ours beside the best peer at equal settings, and the spread of seeds: the wider range."""
    compared = [row for row in of if row.compared]
    ours = [row for row in compared if row.library == OURS]
    peers = [row for row in compared if row.library != OURS]
    equal = [row for row in peers if not row.own]
    if not ours or not equal:
        return "nothing to compare"
    own = [row for row in peers if row.own]
    best = [max(rows, key=lambda row: fmean(row.compared)) for rows in (equal, own) if rows]
    return "; ".join(_beside(ours[0], peer) for peer in best)


def _beside(ours: Row, peer: Row) -> str:
    difference = fmean(ours.compared) - fmean(peer.compared)
    line = f"groupsae less the best peer ({peer.label}): {difference:+.4f}"
    ranges = [max(r.compared) - min(r.compared) for r in (ours, peer) if len(r.compared) > 1]
    if not ranges:
        return f"{line}, one seed each"
    spread = max(ranges)
    word = "worse" if difference < -spread else "better" if difference > spread else "as good"
    return f"{line}, spread of seeds {spread:.4f}: {word}"


def _cells(row: Row) -> list[str]:
    results = [found.result for found in row.found if found.result]
    return [
        row.label,
        str(len(results)),
        _mean(row.values("r2"), 4, spread=True),
        _mean(row.values("l0"), 1),
        _mean([100 * share for share in row.values("dead")], 1, unit="%"),
        _mean(row.values("r2", "batch"), 4, spread=True),
        _mean([result["seconds"] for result in results], 0),
    ]


def _mean(values: Sequence[float], digits: int, unit: str = "", *, spread: bool = False) -> str:
    """The mean; with a spread, the largest distance from it, too."""
    if not values:
        return _NONE
    mean = fmean(values)
    far = max(abs(value - mean) for value in values)
    distance = f" ± {far:.{digits}f}" if spread and len(values) > 1 else ""
    return f"{mean:.{digits}f}{unit}{distance}"


def _errors(found: Iterable[Found], rule: str) -> list[str]:
    failed = (one for one in found if one.rule == rule and one.result is None)
    return [f"failed: {one.library}, seed {one.seed}: {one.error}" for one in failed]
