"""The command line: one command per stage, each a thin call into :mod:`groupsae.run`."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from groupsae import __version__
from groupsae.config import Config, keys
from groupsae.directory import RunDirectory, stored_config
from groupsae.errors import InputError, Interrupted
from groupsae.opened import local_directory
from groupsae.planning import grouped
from groupsae.run import Run

if TYPE_CHECKING:
    from groupsae.grouping.matrix import Distances
    from groupsae.grouping.prediction import Prediction
    from groupsae.grouping.table import PartitionTable
    from groupsae.planner.plan import Plan
    from groupsae.training.team import Team

app = typer.Typer(
    help="Train one sparse autoencoder per group of similar layers of a language model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
out = Console()

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_LOSSES = ("predicted loss\nof EV", "predicted loss\nof CELS")

_KEYS = "[bold]Keys[/bold] (KEY=VALUE; every key has a default)\n\n" + "\n\n".join(
    f"[cyan]{path}[/cyan] ({kind}, default {default}): {meaning}".replace("[[", r"\[[")
    for path, kind, default, meaning in keys()
)

Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml|RUN] [KEY=VALUE]...",
        help="A config file, or the directory of a run that was begun; then keys to set.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Directory of the run; by default runs/<host>."),
]
Redo = Annotated[
    bool,
    typer.Option("--redo", help="Repeat stages that the directory holds of another config."),
]


Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="Start over: forget what was done, checkpoints too."),
]


@app.command("run", epilog=_KEYS)
def run_all(
    inputs: Inputs = None,
    out_directory: Out = None,
    redo: Redo = False,
    fresh: Fresh = False,
) -> None:
    """Do everything: measure, group, train, evaluate, report. Trains on what torchrun starts."""
    forget = "distances" if fresh else None
    with _together(inputs, out_directory, redo, forget) as (run, first):
        if first:
            run.check()
            run.distances()
            _show_groups(run.groups())
        run.train()
        if first:
            _show_evaluation(run.evaluate())
            out.print(f"Report: {run.report()}", soft_wrap=True, markup=False)


@app.command(epilog=_KEYS)
def distances(inputs: Inputs = None, out_directory: Out = None, redo: Redo = False) -> None:
    """Measure the distance between all pairs of layers: the mean angle, or grouping.similarity."""
    from groupsae.grouping.matrix import threshold_note

    run = _open(inputs, out_directory, redo)
    result = run.distances()
    table = Table(
        title=f"Distances between layers: {result.quantity}, {result.tokens:,} tokens",
        caption=threshold_note(result.similarity),
    )
    table.add_column("layer", justify="right")
    for layer in result.layers:
        table.add_column(str(layer), justify="right")
    for layer, row in zip(result.layers, result.matrix, strict=True):
        table.add_row(str(layer), *(f"{value:.3f}" for value in row))
    _print(table)


@app.command(epilog=_KEYS)
def groups(
    inputs: Inputs = None,
    out_directory: Out = None,
    redo: Redo = False,
    distances_file: Annotated[
        Path | None,
        typer.Option(
            "--distances",
            help="Group this matrix (.json, .npy or .csv; lower-triangular is fine) instead of a "
            "run's own; kept in a run directory where one is named. Needs no model.",
        ),
    ] = None,
) -> None:
    """Put contiguous similar layers into groups."""
    if distances_file is not None:
        config, directory = _config(inputs)
        _show_groups(_group_file(config, distances_file, out_directory or directory, redo))
    else:
        _show_groups(_open(inputs, out_directory, redo).groups())


@app.command(epilog=_KEYS)
def train(
    inputs: Inputs = None,
    out_directory: Out = None,
    redo: Redo = False,
    fresh: Fresh = False,
) -> None:
    """Train one SAE per group, and one per layer to compare with, from one shared forward."""
    with _together(inputs, out_directory, redo, "train" if fresh else None) as (run, first):
        run.train()
        if first:
            out.print(f"SAEs: {run.directory / 'saes'}", soft_wrap=True, markup=False)


@app.command(epilog=_KEYS)
def cache(
    inputs: Inputs = None,
    out_directory: Out = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="How many to hold; by default as many as training takes."),
    ] = None,
) -> None:
    """Write residual streams to training.activation_cache, for many runs over the same layers."""
    path = _open(inputs, out_directory, redo=False).cache(tokens)
    out.print(f"Activation cache: {path}", soft_wrap=True, markup=False)


@app.command(epilog=_KEYS)
def evaluate(inputs: Inputs = None, out_directory: Out = None, redo: Redo = False) -> None:
    """Judge every SAE at every layer on held-out text."""
    _show_evaluation(_open(inputs, out_directory, redo).evaluate())


@app.command(epilog=_KEYS)
def circuits(inputs: Inputs = None, out_directory: Out = None, redo: Redo = False) -> None:
    """Judge, task by task, how few latents carry what the model computes."""
    run = _open(inputs, out_directory, redo)
    for result in run.circuits():
        _show_circuits(result)
    out.print(
        f"Circuits: {run.directory / 'evaluation' / 'circuits'}", soft_wrap=True, markup=False
    )


@app.command(epilog=_KEYS)
def similarity(inputs: Inputs = None, out_directory: Out = None, redo: Redo = False) -> None:
    """Compare each group's SAE with its layers' own: decoder directions and firing."""
    run = _open(inputs, out_directory, redo)
    _show_similarity(run.similarity())


@app.command(epilog=_KEYS)
def interpret(
    inputs: Inputs = None,
    out_directory: Out = None,
    redo: Redo = False,
    delphi: Annotated[
        Path | None,
        typer.Option(help="Also write the kept latents here, in the layout that delphi reads."),
    ] = None,
) -> None:
    """Keep the latents of held-out text; say at which layers each group's latents live."""
    run = _open(inputs, out_directory, redo)
    _show_depth(run.interpret())
    browser = run.directory / "interpretation" / "browser" / "index.html"
    out.print(f"Latents: {browser}", soft_wrap=True, markup=False)
    if delphi is not None:
        run.export_to_delphi(delphi)
        out.print(f"For delphi: {delphi}", soft_wrap=True, markup=False)


@app.command(epilog=_KEYS)
def annotate(
    inputs: Inputs = None,
    latents: Annotated[
        int, typer.Option(min=1, help="Latents of each SAE and layer to mark.")
    ] = 96,
    score: Annotated[
        list[Path] | None,
        typer.Option(help="Score this export of the page; give it again for other annotators."),
    ] = None,
) -> None:
    """Write a page to mark latents on, blinded; with --score, what was marked there by layer."""
    run = _open(inputs, None, redo=False)
    if score:
        _show_annotations(run.score_annotations(score))
    else:
        out.print(f"To annotate: {run.annotate(latents)}", soft_wrap=True, markup=False)


@app.command(epilog=_KEYS)
def explain(inputs: Inputs = None) -> None:
    """Let a language model explain latents, and score it: explanation.endpoint, .model."""
    run = _open(inputs, None, redo=False)
    _show_explanations(run.explain())


@app.command(epilog=_KEYS)
def report(inputs: Inputs = None, out_directory: Out = None, redo: Redo = False) -> None:
    """Write report.html and the figures."""
    path = _open(inputs, out_directory, redo).report()
    out.print(f"Report: {path}", soft_wrap=True, markup=False)


@app.command(epilog=_KEYS)
def sweep(
    inputs: Inputs = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE,VALUE",
            help="Values of a key of sae, or of one of training that SAEs of one forward may differ"
            " in; give it again for another key: every combination is trained.",
        ),
    ] = None,
    out_directory: Out = None,
) -> None:
    """Train and judge SAEs of several settings side by side, from the same activations."""
    from groupsae.sweep import read_vary

    run = _open(inputs, out_directory, redo=False)
    results = run.sweep(read_vary(vary or ()))
    _show_sweep(results)
    folder = run.directory / "sweep" / results["name"]
    figures = run.directory / "figures" / f"sweep-{results['name']}"
    out.print(f"Sweep: {folder}; figure: {figures}.*", soft_wrap=True, markup=False)


@app.command(epilog=_KEYS)
def export(
    inputs: Inputs = None,
    to: Annotated[
        str, typer.Option(help="sae-lens, sparsify or dictionary-learning.", show_default=False)
    ] = "",
    layers: Annotated[
        str, typer.Option(help="As in 0,3,5-7; by default all that the run covers.")
    ] = "all",
    out_directory: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where the layers' folders go; by default RUN/export/TO."),
    ] = None,
) -> None:
    """Write each layer's SAE in the format of another library."""
    run = _open(inputs, None, redo=False)
    target = out_directory or run.directory / "export" / re.sub(r"[^\w-]", "", to)
    folders = run.export(to, target, [] if layers == "all" else _layers(layers))
    for layer, folder in folders.items():
        out.print(f"layer {layer}: {folder}", soft_wrap=True, markup=False)


@app.command("import", epilog=_KEYS)
def import_(
    folders: Annotated[
        list[str],
        typer.Argument(
            metavar="FOLDER... [KEY=VALUE]...",
            help="Folders of SAEs, or of many of them below; then keys to set, such as host.name.",
        ),
    ],
    out_directory: Annotated[
        Path, typer.Option("--out", "-o", help="Directory of the new run.", show_default=False)
    ],
    format: Annotated[
        str | None,
        typer.Option("--from", help="What the folders are; by default what each looks like."),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(help="Member layers of an SAE, as in 3-6; once for each, in their order."),
    ] = None,
) -> None:
    """Make a run of SAEs that were trained elsewhere, to evaluate, compare and report."""
    keys_to_set = [text for text in folders if "=" in text]
    run = Run.of_imported(
        out_directory,
        [Path(text) for text in folders if "=" not in text],
        Config.load(None, keys_to_set),
        format=format,
        layers=None if layers is None else [tuple(_layers(text)) for text in layers],
    )
    out.print(f"Run: {run.directory}", soft_wrap=True, markup=False)


@app.command()
def push(
    directory: Annotated[Path, typer.Argument(metavar="RUN", show_default=False)],
    repository: Annotated[str, typer.Argument(metavar="USER/REPO", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it.")] = False,
    license: Annotated[str | None, typer.Option(help="For the model card: mit, ...")] = None,
    host_name: Annotated[
        str | None, typer.Option(help="The host's name on the hub, where the run has a local one.")
    ] = None,
) -> None:
    """Publish a run with a model card on the Hugging Face hub; private unless --public."""
    address = Run(directory).push(
        repository, private=not public, license=license, host_name=host_name
    )
    out.print(f"Published: {address}", soft_wrap=True, markup=False)


@app.command(epilog=_KEYS)
def plan(
    inputs: Inputs = None,
    devices: Annotated[
        int, typer.Option(min=1, help="How many share the work, one process each.")
    ] = 1,
    device: Annotated[
        str | None,
        typer.Option(
            help="h100, a100, h200, b200, l40s, rtx4090 or cpu: what does not fit is refused."
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Predict times from a short measurement on this machine."),
    ] = False,
) -> None:
    """Check a config and print what it would cost for every G: FLOPs, memory, time."""
    from groupsae.planner.plan import Plan

    config, directory = _config(inputs)
    distances = None if directory is None else _measured(directory, config)
    known = None if distances is None else grouped(distances, config)
    planned = Plan.of(
        config,
        chosen=None if known is None else known.chosen,
        devices=devices,
        device=device,
        measure=measure,
    )
    _show_plan(planned, known)
    planned.check()


def main() -> None:
    """Run the command line; errors are one message and an exit code."""
    _log_to_stderr()
    _print_what_the_encoding_lacks_as_question_marks()
    try:
        code = app(standalone_mode=False)
        if code == _INTERRUPTED:  # what typer makes of an interrupt; older versions raise Abort
            raise KeyboardInterrupt
    except (InputError, Interrupted) as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; what is finished is kept, the same command continues", _INTERRUPTED)
    except OSError as error:
        _fail(
            f"{error.filename or 'a file'} cannot be read or written: {error.strerror or error}; "
            "mend that and give the same command again: what is finished is kept",
            2,
        )
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("click", "typer"):
            raise
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)
    sys.exit(code or 0)


def _log_to_stderr() -> None:
    log = logging.getLogger("groupsae")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers = [logging.StreamHandler(sys.stderr)]


def _print_what_the_encoding_lacks_as_question_marks() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"groupsae: {message}\n")
    sys.exit(code)


def _config(inputs: list[str] | None, into: Path | None = None) -> tuple[Config, Path | None]:
    """The config that the arguments mean, and the run directory if they name one.

    Args:
        into: Where a run on the hub is fetched to; by default its cache.
    """
    inputs = list(inputs or [])
    target = local_directory(inputs.pop(0), into) if inputs and "=" not in inputs[0] else None
    extra = [text for text in inputs if "=" not in text]
    if extra:
        raise InputError(f"{extra[0]!r} is no KEY=VALUE; only the first argument may be a file")
    if target is None or target.is_file() or target.suffix in (".yaml", ".yml"):
        return Config.load(target, inputs), None
    if stored_config(target) is None:
        raise InputError(
            f"{target} is neither a config file nor the directory of a run; to begin a run there, "
            f"give --out {target}"
        )
    return Config.load(target / "config.yaml", inputs), target


def _layers(text: str) -> list[int]:
    """0,3,5-7 as a list."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise InputError(f"--layers {text}: {part!r} is no layer; write them as in 0,3,5-7")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


@contextmanager
def _together(
    inputs: list[str] | None, out_directory: Path | None, redo: bool, forget: str | None
) -> Iterator[tuple[Run, bool]]:
    """The run, opened by all processes that torchrun started; and whether this is the first.

    Args:
        forget: The stage from which on everything is to be done again.
    """
    redo = redo or forget is not None
    if os.environ.get("WORLD_SIZE", "1") == "1":
        run = _open(inputs, out_directory, redo)
        run.stages.forget(forget)
        yield run, True
        return
    from groupsae.training.team import team

    with team() as processes:
        logging.getLogger("groupsae").setLevel(
            logging.INFO if processes.first else logging.ERROR  # the first one speaks for all
        )
        if processes.first:
            run = _open(inputs, out_directory, redo, processes)
            run.stages.forget(forget)
        processes.wait()
        if not processes.first:
            run = _open(inputs, out_directory, redo, processes)
        yield run, processes.first


def _open(
    inputs: list[str] | None, out_directory: Path | None, redo: bool, team: Team | None = None
) -> Run:
    if team is None and os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: only `groupsae run` and `groupsae train` work "
            "in several processes; start this one without torchrun"
        )
    config, directory = _config(inputs, out_directory)
    if directory is not None and out_directory not in (None, directory):
        raise InputError(f"give either the run directory {directory} or --out, not both")
    host = re.sub(r"[^\w.-]+", "-", Path(config.host.name).name).strip("-.") or "host"
    return Run(directory or out_directory or Path("runs") / host, config, redo=redo, team=team)


def _group_file(config: Config, path: Path, directory: Path | None, redo: bool) -> PartitionTable:
    from groupsae.grouping.matrix import load_distances

    distances = load_distances(path)
    return (
        Run(directory, config, redo=redo).adopt(distances)
        if directory
        else grouped(distances, config)
    )


def _show_groups(result: PartitionTable) -> None:
    table = Table(
        title=f"Groups by {result.method}, chosen: G = {result.chosen}",
        caption=_prediction_note(result),
    )
    losses = _LOSSES if any(row.prediction for row in result.by_groups.values()) else ()
    for column in ("G", "groups", "AMAD", *losses, "largest diameter", "FLOPs/token"):
        table.add_column(column, justify="left" if column == "groups" else "right")
    for G, entry in sorted(result.by_groups.items()):
        table.add_row(
            str(G),
            "  ".join(_span(group) for group in entry.partition.groups),
            _number(entry.amad),
            *(_predicted_losses(entry.prediction) if losses else ()),
            _number(entry.largest_diameter),
            "–" if entry.flops_per_token is None else f"{entry.flops_per_token:.3g}",
            style="bold green" if result.chosen == G else "",
        )
    _print(table)


def _prediction_note(result: PartitionTable) -> Text | None:
    """Under a table of groups: what predicted losses are and rest on, or why there are none."""
    if result.prediction is None:
        return None
    if all(row.prediction is None for row in result.by_groups.values()):
        return Text(result.prediction)
    return Text(
        "Predicted loss of explained variance (EV) and CE-loss score (CELS): mean over layers, "
        f"against one SAE per layer; {result.prediction}. In brackets the range of 90% of the "
        "errors on a model that the fit left out."
    )


def _predicted_losses(prediction: Prediction | None) -> list[str]:
    """Cells for the columns `_LOSSES`."""
    if prediction is None:
        return ["–"] * len(_LOSSES)
    return [f"{loss.mean:.4f} ({loss.low:.4f}–{loss.high:.4f})" for loss in prediction]


def _show_evaluation(rows: list[dict[str, Any]]) -> None:
    """Groups and baseline side by side, layer by layer, with their means.

    Of several partitions into groups the first is shown, the chosen one, and the others' means.
    """
    columns = {"CELS": "ce_loss_score", "R²": "r2", "L2": "l2", "L0": "l0"}
    labels = {"groups": "group", "baseline": "layer"}  # one SAE per ...
    partitions = [name for name in labels if name in {row["partition"] for row in rows}]
    title = "Held-out text: one SAE per " + " and per ".join(labels[name] for name in partitions)
    table = Table(title=title)
    table.add_column("layer", justify="right")
    for column in columns:
        for partition in partitions:
            table.add_column(f"{column}\n{labels[partition]}", justify="right")
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for row in rows:
        found.setdefault((row["layer"], row["partition"]), row)
    layers = sorted({row["layer"] for row in rows})
    wanted = [(key, partition) for key in columns.values() for partition in partitions]
    for layer in layers:
        cells = (_number(found[layer, partition][key]) for key, partition in wanted)
        table.add_row(str(layer), *cells, end_section=layer == layers[-1])
    means = (
        _number(sum(found[layer, partition][key] for layer in layers) / len(layers))
        for key, partition in wanted
    )
    table.add_row("mean", *means, style="bold")
    _print(table)
    if len({row["groups_total"] for row in rows if row["partition"] == "groups"}) > 1:
        _show_means_by_groups(rows, columns)


def _show_means_by_groups(rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    table = Table(title="Means over layers, by number of SAEs")
    for title in ("partition", *columns):
        table.add_column(title, justify="left" if title == "partition" else "right")
    for partition, G in sorted({(row["partition"], row["groups_total"]) for row in rows})[::-1]:
        own = [row for row in rows if (row["partition"], row["groups_total"]) == (partition, G)]
        means = (sum(row[key] for row in own) / len(own) for key in columns.values())
        label = "one per layer" if partition == "baseline" else f"G = {G}"
        table.add_row(label, *map(_number, means))
    _print(table)


def _show_circuits(result: dict[str, Any]) -> None:
    """Areas under a task's curves, or why there are none."""
    model = result["model"]
    out.print(
        f"{result['task']}: {result['examples']['effects']} examples for effects, "
        f"{result['examples']['scores']} for scores; the model's m(M) is {model['m']:.3f}, and it "
        f"prefers the right answer in {model['accuracy']:.1%}",
        soft_wrap=True,
        markup=False,
    )
    if result["refused"] is not None:
        out.print(f"No curve: {result['refused']}", soft_wrap=True, markup=False)
        return
    scores, nodes = ("faithfulness", "completeness"), (False, True)
    table = Table(title=f"{result['task']}: area under the curve, latents per layer")
    for column in ("SAEs", "latents", "effects"):
        table.add_column(column)
    for score in scores:
        for with_errors in nodes:
            table.add_column(f"{score}\n{'with' if with_errors else 'no'} errors", justify="right")
    table.add_column("latents for 75%\nwith errors", justify="right")
    rows: dict[tuple[str, str, str], dict[tuple[str, bool], dict[str, Any]]] = {}
    for curve in result["curves"]:
        if curve["selection"] == "per_layer":
            per_layer = curve["partition"] == "baseline"
            label = "one per layer" if per_layer else f"G = {curve['groups_total']}"
            row = rows.setdefault((label, curve["latents"], curve["method"]), {})
            row[curve["score"], curve["error_nodes"]] = curve
    for (label, latents, method), row in rows.items():
        at_75 = row["faithfulness", True]["n_at_75"]
        table.add_row(
            label,
            latents,
            method.replace("_", " "),
            *(_area(row[score, with_errors]) for score in scores for with_errors in nodes),
            "never" if at_75 is None else f"{at_75:.0f}",
        )
    if any(curve["flag"] for row in rows.values() for curve in row.values()):
        table.caption = "* m(M) and m(empty) are so near that the ratio means little"
    _print(table)


def _area(curve: dict[str, Any]) -> str:
    return _number(curve["area"]) + "*" * (curve["flag"] is not None)


def _show_similarity(result: dict[str, Any]) -> None:
    """MMCS and concordance of every layer, with those of two SAEs of the layer beside them."""
    twins = {row["layer"]: row for row in result["yardstick"] or ()}
    table = Table(
        title=f"A layer's own SAE and its group's; firing on {result['tokens']:,} held-out tokens",
        caption=f"Dictionaries of random directions have an MMCS of {result['chance']:.3f}."
        + ("" if twins else " training.twins=true adds what two SAEs of one layer have."),
    )
    for column in ("G", "layer", "MMCS\nto layer", "MMCS\nto group", "concordance"):
        table.add_column(column, justify="right")
    for column in ("MMCS\ntwins", "concordance\ntwins") if twins else ():
        table.add_column(column, justify="right")
    for row in result["rows"]:
        twin = twins.get(row["layer"], {})
        table.add_row(
            str(row["groups_total"]),
            str(row["layer"]),
            _number(row["mmcs_group_to_layer"]),
            _number(row["mmcs_layer_to_group"]),
            _number(row["concordance"]),
            *(_number(twin[key]) for key in ("mmcs", "concordance") if twins),
        )
    _print(table)


def _show_depth(result: dict[str, Any]) -> None:
    """At how many of its layers a group's latents live."""
    table = Table(
        title="At how many of its layers a latent lives: where its firing rate is at least this "
        "share of its largest"
    )
    for column in ("SAE", "share", "one", "some", "all", "silent", "layers per\nfiring token"):
        table.add_column(column, justify="left" if column == "SAE" else "right")
    for name, summaries in result["saes"].items():
        for row in summaries:
            shares = (f"{row[key]:.1%}" for key in ("one", "some", "all", "silent"))
            persistence = f"{row['mean_persistence']:.2f} of {len(row['layers'])}"
            table.add_row(name, f"{row['share']:.0%}", *shares, persistence)
    _print(table)


def _show_annotations(result: dict[str, Any]) -> None:
    """Human scores: one row per partition and layer."""
    said = ", ".join(f"{own['name']} ({own['marked']:,})" for own in result["annotators"])
    agreement = result["agreement"]
    if agreement["name"] is not None:
        said += (
            f"; {agreement['name']} {_number(agreement['value'])} on {agreement['items']:,} latents"
        )
    table = Table(title="Latents that people can make sense of", caption=f"Marked by {said}")
    columns = ("SAEs", "layer", "latents", "interpretable", "not", "unsure", "score", "95%")
    for column in columns:
        table.add_column(column, justify="left" if column == "SAEs" else "right")
    for row in result["rows"]:
        counts = (f"{row[key]:,}" for key in ("latents", "interpretable", "not", "unsure"))
        table.add_row(*_of_row(row), *counts, *_with_interval(row, "score", "low", "high"))
    _print(table)


def _show_explanations(result: dict[str, Any]) -> None:
    """Scores of a language model's explanations: one row per partition and layer."""
    counts = result["counts"]
    kinds = ("requests", "from_before", "retries", "failed", "unparsed")
    said = ", ".join(f"{kind.replace('_', ' ')} {counts[kind]:,}" for kind in kinds)
    used = counts["prompt_tokens"] + counts["completion_tokens"]
    table = Table(
        title=f"Explanations by {result['model']}"
        + ("" if result["complete"] else ", not complete"),
        caption=f"{said}; tokens {used:,}, and an estimated {counts['estimated_tokens']:,}",
    )
    for column in ("SAEs", "layer", "latents", "detection", "95%", "fuzzing", "95%"):
        table.add_column(column, justify="left" if column == "SAEs" else "right")
    for row in result["rows"]:
        table.add_row(
            *_of_row(row),
            f"{row['latents']:,}",
            *(
                cell
                for key in ("detection", "fuzzing")
                for cell in _with_interval(row, key, f"{key}_low", f"{key}_high")
            ),
        )
    _print(table)


def _of_row(row: dict[str, Any]) -> tuple[str, str]:
    """The subject, and the layer, of a row of scores."""
    of = "baseline" if row["partition"] == "baseline" else f"G={row['groups_total']}"
    return of, "all" if row["layer"] is None else str(row["layer"])


def _with_interval(row: dict[str, Any], key: str, low: str, high: str) -> tuple[str, str]:
    between = "–" if row[low] is None else f"{row[low]:.2f} to {row[high]:.2f}"
    return _number(row[key]), between


def _show_sweep(results: dict[str, Any]) -> None:
    """One row for each member and partition."""
    columns = {"CELS": "ce_loss_score", "R²": "r2", "L2": "l2", "L0": "l0", "dead": "dead"}
    means = results["means"]
    table = Table(title="Sweep: means over layers, held-out text")
    for path in means[0]["overrides"]:
        table.add_column(path.rpartition(".")[2], justify="right")
    table.add_column("one SAE per")
    for column in columns:
        table.add_column(column, justify="right")
    for row, after in zip(means, [*means[1:], None], strict=True):
        table.add_row(
            *map(str, row["overrides"].values()),
            {"groups": "group", "baseline": "layer"}[row["partition"]],
            *(_number(row[key]) for key in columns.values()),
            end_section=after is None or after["member"] != row["member"],
        )
    _print(table)


def _measured(directory: Path, config: Config) -> Distances | None:
    """The distances of a run, where they are those that the config asks for."""
    from groupsae.grouping.matrix import load_distances

    run = RunDirectory(directory)  # with its own config: writes nothing
    run.config = config
    path = directory / "distances.json"
    return load_distances(path) if path.exists() and run.is_done("distances") else None


def _show_plan(plan: Plan, known: PartitionTable | None) -> None:
    from groupsae.planner.table import cost_table, lines, memory_table

    for line in lines(plan):
        out.print(line, soft_wrap=True, markup=False)
    rows = {} if known is None else known.by_groups
    losses: dict[str, dict[int, str]] = {}
    if any(row.prediction for row in rows.values()):
        cells = {G: _predicted_losses(row.prediction) for G, row in rows.items()}
        losses = {
            title: {G: both[place] for G, both in cells.items()}
            for place, title in enumerate(_LOSSES)
        }
    _print(cost_table(plan, losses, None if known is None else _prediction_note(known)))
    _print(memory_table(plan))


def _print(table: Table) -> None:
    """All of a table, however narrow the terminal or a pipe: rich would leave out digits."""
    unlimited = out.options.update(width=10_000)
    table.width = Measurement.get(out, unlimited, table).maximum
    out.print(table, crop=False)


def _span(group: tuple[int, ...]) -> str:
    return str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.4g}"


def _version(asked: bool | None) -> None:
    if asked:
        out.print(f"groupsae {__version__}", markup=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = None,
) -> None:
    """Measure, group, train, prove."""
