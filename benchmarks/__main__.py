"""The benchmark's command line: `python -m benchmarks`, from the repository's root."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.contestants import CEILING, Entry, enter, known, read_pythons, selected
from benchmarks.costs import read_groups
from benchmarks.drivers.common import Task
from benchmarks.machine import Quiet, busy_seconds, description, usable_cores
from benchmarks.results import Participant, Results, Setting
from benchmarks.rounds import Result, Turn, launch, take_turns
from benchmarks.table import heading, tables
from benchmarks.workload import Shape, Workload, prepare, shape
from groupsae.errors import InputError
from groupsae.grouping.methods import even

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_WORK = Path(tempfile.gettempdir()) / "groupsae-benchmark"


@app.command()
def benchmark(
    shape_name: Annotated[
        str,
        typer.Option("--shape", help="Host model: pythia-70m, pythia-160m, or wide-4096 for GPUs."),
    ] = "pythia-70m",
    device: Annotated[str, typer.Option(help="cpu, or cuda with bfloat16 hosts.")] = "cpu",
    contestants: Annotated[
        str | None,
        typer.Option(help="Names, comma-separated; by default all that are installed."),
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(
            help="groupsae at these numbers of contiguous even groups, as in 1,2,3,all; alone, "
            "unless --contestants names others too.",
        ),
    ] = None,
    dead: Annotated[
        float, typer.Option(help="Also run everyone with this share of latents made dead.")
    ] = 0.0,
    rounds: Annotated[int, typer.Option(help="Turns of each contestant.")] = 3,
    steps: Annotated[
        int, typer.Option(help="Timed steps of a turn; rounded up to a whole buffer's period.")
    ] = 8,
    warm: Annotated[int, typer.Option(help="Steps before them.")] = 2,
    tokens: Annotated[int, typer.Option(help="Tokens of a step.")] = 4096,
    context: Annotated[int, typer.Option(help="Tokens of a context.")] = 256,
    k: Annotated[
        int | None,
        typer.Option("--k", help="Active latents; by default the shape's: 32, 128, 64."),
    ] = None,
    buffer: Annotated[int, typer.Option(help="Batches in the shuffle buffer.")] = 4,
    threads: Annotated[int | None, typer.Option(help="Threads; by default all cores.")] = None,
    python: Annotated[
        list[str] | None,
        typer.Option(help="LIBRARY=PATH of the interpreter that has it; repeatable."),
    ] = None,
    busy: Annotated[
        float, typer.Option(help="Cores that others may use during a turn that counts.")
    ] = 0.08,
    repeats: Annotated[int, typer.Option(help="Repeats of a disturbed turn, at most.")] = 3,
    patience: Annotated[
        float, typer.Option(help="Seconds to wait for a quiet machine before a turn, at most.")
    ] = 600.0,
    work: Annotated[Path, typer.Option(help="Folder of models and tokens; kept.")] = _WORK,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for benchmark.md and benchmark.jsonl; by default in --work."),
    ] = None,
    show: Annotated[
        Path | None, typer.Option(help="Print the tables of this benchmark.jsonl; run nothing.")
    ] = None,
) -> None:
    """Train groupsae and the libraries beside it on the same work, in turns."""
    if show is not None:
        _print(_read(show))
        return
    of = shape(shape_name)
    k = of.k if k is None else k
    threads = usable_cores() if threads is None else threads
    _at_least_one(
        **{"--rounds": rounds, "--steps": steps, "--warm": warm, "--threads": threads},
        **{"--tokens": tokens, "--context": context, "--k": k, "--buffer": buffer},
    )
    _check_work(of, tokens, context, k, dead)
    _check_machine(device, busy, repeats)
    everyone = known(device)
    chosen = selected(contestants, everyone)
    group_counts = None if groups is None else read_groups(groups, len(of.layers))
    if group_counts is not None and contestants is None:
        chosen = [contestant for contestant in chosen if contestant.ours]
    pythons = read_pythons(python or [], everyone)
    entered, left_out = enter(chosen, pythons, named=contestants is not None)
    entries = _expanded(entered, group_counts, dead)

    needed = (warm + steps + 3 * buffer + 4) * (tokens // context)
    workload = prepare(of, work, context_length=context, contexts=needed)
    quiet = Quiet(limit=busy, patience=patience)
    setting = Setting(
        shape=of.name,
        device=device,
        k=k,
        context_length=context,
        batch_tokens=tokens,
        buffer_batches=buffer,
        steps=steps,
        warm=warm,
        rounds=rounds,
        busy_limit=None if busy_seconds() is None else busy,
        repeats=repeats,
        machine=description(device, threads),
        participants=[Participant.of(entry, len(of.layers)) for entry in entries],
        left_out=left_out,
    )
    runs = [
        (label, _run(entry, setting, of, workload, threads))
        for label, entry in [(CEILING, None), *((entry.label, entry) for entry in entries)]
    ]
    folder = work / "results" if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    turns = []
    with (folder / "benchmark.jsonl").open("w", encoding="utf-8") as log:
        log.write(setting.to_json() + "\n")
        for turn in take_turns(runs, rounds=rounds, repeats=repeats, quiet=quiet, say=_say):
            log.write(turn.to_json() + "\n")
            log.flush()
            turns.append(turn)
            _say(_summary(turn))
    results = Results(setting, turns)
    _print(results)
    (folder / "benchmark.md").write_text(_markdown(results), encoding="utf-8")
    _say(f"written: {folder / 'benchmark.md'} and {folder / 'benchmark.jsonl'}")
    if results.failed:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; bad input is one message and exit code 2."""
    try:
        app(prog_name="python -m benchmarks")
    except InputError as error:
        _say(f"benchmarks: {error}")
        sys.exit(2)


def _at_least_one(**options: int) -> None:
    for option, value in options.items():
        if value < 1:
            raise InputError(f"{option} {value}: give at least 1")


def _check_work(of: Shape, tokens: int, context: int, k: int, dead: float) -> None:
    if tokens % context:
        raise InputError(
            f"--tokens {tokens}: a step takes whole contexts; give a multiple of "
            f"--context {context}"
        )
    if k > of.d_sae:
        raise InputError(f"--k {k}: there are only {of.d_sae} latents; lower it")
    if not 0 <= dead < 1:
        raise InputError(f"--dead {dead}: a share of latents, at least 0 and less than 1")


def _check_machine(device: str, busy: float, repeats: int) -> None:
    if busy <= 0:
        raise InputError(f"--busy {busy}: a number of cores, more than 0")
    if repeats < 0:
        raise InputError(f"--repeats {repeats}: give 0 or more")
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: give cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no GPU here; give --device cpu")


def _expanded(entered: list[Entry], groups: list[int] | None, dead: float) -> list[Entry]:
    """groupsae once for each number of groups; everyone again with dead latents, if asked."""
    entries = []
    for entry in entered:
        if groups is None or not entry.contestant.ours:
            entries.append(entry)
        else:
            entries += [entry.with_groups(G) for G in groups]
    return entries + ([entry.with_dead(dead) for entry in entries] if dead else [])


def _run(
    entry: Entry | None, setting: Setting, of: Shape, workload: Workload, threads: int
) -> Callable[[], Result]:
    """What a turn runs; without an entry, the machine's matrix products."""
    per_layer = len(of.layers)
    partition = even(of.layers)[per_layer if entry is None else entry.groups or per_layer]
    task = Task(
        host=str(workload.host.absolute()),
        tokens=str(workload.tokens.absolute()),
        layers=of.layers,
        groups=partition.groups,
        context_length=setting.context_length,
        batch_tokens=setting.batch_tokens,
        d_model=of.d_model,
        d_sae=of.d_sae,
        k=setting.k,
        steps=setting.steps,
        warm=setting.warm,
        buffer_batches=setting.buffer_batches,
        threads=threads,
        device=setting.device,
        dead=0.0 if entry is None else entry.dead,
        host_dtype="float32" if entry is None else entry.contestant.host_dtype,
        kernel=entry.contestant.back_end if entry and entry.contestant.ours else "",
    )
    python = Path(sys.executable) if entry is None else entry.python
    driver = CEILING if entry is None else entry.contestant.driver
    return lambda: launch(python, driver, task)


def _summary(turn: Turn) -> str:
    """A line of progress."""
    if turn.result is None:
        return f"round {turn.round}, {turn.label} failed: {turn.error}"
    if "gflops" in turn.result:
        rates = turn.result["gflops"].items()
        found = ", ".join(f"{name} {rate:,.0f} GFLOP/s" for name, rate in rates)
    else:
        found = f"{turn.result['ms_per_step']:,.1f} ms per step"
    others = "" if turn.other_cores is None else f"; others used {turn.other_cores:.2f} of a core"
    return f"round {turn.round}, {turn.label}: {found}{others}"


def _read(path: Path) -> Results:
    try:
        return Results.read(path.read_text(encoding="utf-8").splitlines())
    except OSError as error:
        raise InputError(f"--show {path}: cannot be read: {error.strerror}") from error


def _print(results: Results) -> None:
    console = Console()
    if not console.is_terminal:
        console.out(_markdown(results), highlight=False)
        return
    for line in heading(results):
        console.print(line, markup=False, highlight=False)
    for table in tables(results):
        console.print()
        console.print(table.rich())


def _markdown(results: Results) -> str:
    head = "\n".join(f"- {line}" for line in heading(results))
    return "\n".join(["# Benchmark\n", head + "\n", *(t.markdown() for t in tables(results))])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
