"""`python -m benchmarks.peers_quality`: SAEs of several libraries on the same activations."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.contestants import Contestant, Entry, enter, read_pythons
from benchmarks.drivers.quality import Trial
from benchmarks.peers_results import OURS, Found, Quality, tables
from benchmarks.peers_rows import Rows, Source, prepare_rows
from benchmarks.rounds import DriverFailed, Result, launch
from groupsae.architectures import ARCHITECTURES, BY_COUNT
from groupsae.config import Config
from groupsae.errors import InputError
from groupsae.training.recipe import Recipe
from groupsae.training.session import sae_config

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant(OURS, "groupsae", "quality_groupsae", "float32", "auto"),
        Contestant("sparsify", "eai-sparsify", "quality_sparsify", "float32", "PyTorch"),
        Contestant("sae-lens", "sae-lens", "quality_saelens", "float32", "PyTorch"),
        Contestant(
            "dictionary-learning",
            "dictionary-learning",
            "quality_dictionary_learning",
            "float32",
            "PyTorch",
        ),
    )
}

WEIGHTS = {
    ("groupsae", "relu"): 0.05,
    ("groupsae", "gated"): 0.05,
    ("sae-lens", "jumprelu"): 0.003,
    ("sae-lens", "relu"): 0.05,
    ("sae-lens", "gated"): 0.05,
    ("dictionary-learning", "relu"): 0.05,
    ("dictionary-learning", "gated"): 0.05,
}
"""Where the search for a penalty's weight begins. Who is not here aims at an L0 by itself."""

_WORK = Path(tempfile.gettempdir()) / "groupsae-benchmark"
_L0_TOLERANCE = 0.05
_ATTEMPTS = 5
_EQUAL, _OWN = "equal", "own"


@app.command()
def peers_quality(
    model: Annotated[
        str, typer.Option(help="The host model: a folder, or a name on the hub.")
    ] = "bundled",
    text: Annotated[
        str, typer.Option(help="Text: a file, a folder, or a name on the hub.")
    ] = "bundled",
    layer: Annotated[int | None, typer.Option(help="By default the middle one.")] = None,
    tokens: Annotated[str, typer.Option(help="Trained on, as in 900k.")] = "900k",
    held_out: Annotated[str, typer.Option(help="Held-out tokens, as in 50k.")] = "50k",
    context: Annotated[int, typer.Option(help="Tokens of a context.")] = 256,
    batch: Annotated[int, typer.Option(help="Tokens of a step.")] = 2048,
    d_sae: Annotated[int | None, typer.Option(help="Latents; by default 8 d_model.")] = None,
    k: Annotated[int, typer.Option("--k", help="Active latents, or the L0 that is aimed at.")] = 32,
    rules: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(ARCHITECTURES),
    contestants: Annotated[
        str | None, typer.Option(help="Comma-separated; by default all that are installed.")
    ] = None,
    settings: Annotated[
        str,
        typer.Option(help="equal: groupsae's defaults for everyone; own: each library's own; both"),
    ] = _EQUAL,
    seeds: Annotated[int, typer.Option(help="SAEs of each kind.")] = 3,
    peer_seeds: Annotated[int | None, typer.Option(help="Of each peer's; as many as ours.")] = None,
    threads: Annotated[int, typer.Option(help="Of each training.")] = 1,
    python: Annotated[
        list[str] | None,
        typer.Option(help="LIBRARY=PATH of the interpreter that has it; repeatable."),
    ] = None,
    work: Annotated[Path, typer.Option(help="Folder of the activations; kept.")] = _WORK,
    out: Annotated[
        Path | None, typer.Option(help="Results; by default quality.json in --work.")
    ] = None,
    show: Annotated[
        list[Path] | None,
        typer.Option(help="Print the tables of this result, repeatable; train nothing."),
    ] = None,
) -> None:
    """Train SAEs with groupsae and the libraries beside it on the same rows in the same order."""
    if show:
        _print(_joined([Quality.read(file) for file in show]))
        return
    asked = [rule.strip() for rule in rules.split(",")]
    _check(asked, settings, seeds, k, batch)
    wanted = _count(tokens)
    if wanted < batch:
        raise InputError(f"--tokens {tokens}: less than one batch of --batch {batch}; give more")
    pythons = read_pythons(python or [], CONTESTANTS)
    chosen = _chosen(contestants)
    entered, left_out = enter(chosen, pythons, named=contestants is not None)
    for line in left_out:
        _say(f"left out: {line}")
    source = Source(model, text, layer, wanted, _count(held_out), context)
    given = prepare_rows(source, work)
    quality = Quality(_heading(source, given, batch, d_sae or 8 * given.d_model, k, entered))
    quality.heading += [f"left out: {line}" for line in left_out]
    path = out or work / "quality.json"
    kinds = [_EQUAL, _OWN] if settings == "both" else [settings]
    for rule in asked:
        trial = trial_of(rule, given, d_sae=d_sae or 8 * given.d_model, k=k, batch=batch)
        trial = replace(trial, threads=threads)
        for entry in entered:
            of = seeds if entry.contestant.ours else peer_seeds or seeds
            for kind in kinds:
                if not _has(entry.contestant, rule, kind):
                    continue
                for found in _seeds(entry, replace(trial, settings=kind), of):
                    quality.found.append(found)
                    quality.save(path)
                    _say(_summary(found))
    _print(quality)
    _say(f"written: {path}")


def main() -> None:
    """Run the command line; bad input is one message and exit code 2."""
    try:
        app(prog_name="python -m benchmarks.peers_quality")
    except InputError as error:
        _say(f"benchmarks.peers_quality: {error}")
        sys.exit(2)


def trial_of(rule: str, rows: Rows, *, d_sae: int, k: int, batch: int) -> Trial:
    """What everyone trains under a rule: groupsae's defaults, as its `Recipe` settles them."""
    sizes = {"k": k} if rule in BY_COUNT else {"target_l0": k} if rule == "jumprelu" else {}
    training = {"tokens": rows.train_tokens, "batch_tokens": batch, "buffer_tokens": batch}
    config = Config.model_validate(
        {"sae": {"architecture": rule, "d_sae": d_sae, **sizes}, "training": training}
    )
    sae = sae_config(config, (0,), rows.d_model)
    recipe = Recipe.of(config.training, sae)
    return Trial(
        rule=rule,
        train=str(rows.train.absolute()),
        held_out=str(rows.held_out.absolute()),
        batch_tokens=batch,
        d_sae=d_sae,
        k=k,
        seed=0,
        learning_rate=recipe.learning_rate,
        warmup=recipe.warmup,
        decay=recipe.decay,
        sparsity_warmup=recipe.sparsity_warmup,
        auxk_weight=recipe.auxk_weight,
        dead_after_tokens=config.training.dead_after_tokens,
        adam_beta1=recipe.adam_betas[0],
        prefixes=sae.prefixes or (),
    )


def weight_for(
    target: float, start: float, l0_at: Callable[[float], float]
) -> tuple[float, list[tuple[float, float]]]:
    """The weight of a penalty at which the L0 is near a target: a secant on both logarithms.

    Args:
        l0_at: Trains an SAE with a weight and measures its L0.

    Returns:
        The weight that came nearest, and every (weight, L0) that was tried.
    """
    tried: list[tuple[float, float]] = []
    weight = start
    while True:
        tried.append((weight, max(l0_at(weight), 1e-2)))
        nearest = min(tried, key=lambda pair: abs(math.log(pair[1] / target)))
        near = abs(nearest[1] / target - 1) <= _L0_TOLERANCE
        if near or len(tried) == _ATTEMPTS:
            return nearest[0], tried
        slope = -1.0
        if len(tried) > 1:
            (w0, l0), (w1, l1) = sorted(tried, key=lambda p: abs(math.log(p[1] / target)))[:2]
            slope = min(max(math.log(l1 / l0) / math.log(w1 / w0), -4.0), -0.3)
        weight = nearest[0] * (target / nearest[1]) ** (1 / slope)


def _joined(read: Sequence[Quality]) -> Quality:
    """Several calls' results as one."""
    heading = dict.fromkeys(line for quality in read for line in quality.heading)
    return Quality(list(heading), [found for quality in read for found in quality.found])


def _seeds(entry: Entry, trial: Trial, seeds: int) -> list[Found]:
    """One kind of SAE at every seed. The penalty's weight is sought at the first."""
    library = entry.contestant.name
    results: dict[tuple[int, float | None], Result] = {}

    def run(seed: int, weight: float | None) -> Result:
        if (seed, weight) not in results:
            one = replace(trial, seed=seed, weight=weight)
            results[seed, weight] = launch(entry.python, entry.contestant.driver, one)
        return results[seed, weight]

    def l0_at(weight: float) -> float:
        l0: float = run(0, weight)["inference"]["l0"]
        _say(f"{trial.rule}, {library}: weight {weight:.3g} gives an L0 of {l0:.1f}")
        return l0

    found: list[Found] = []
    weight = None
    for seed in range(seeds):
        try:
            start = WEIGHTS.get((library, trial.rule))
            if start is not None and weight is None:
                weight, _ = weight_for(trial.k, start, l0_at)
            result = run(seed, weight)
        except DriverFailed as error:
            failure = Found(library, trial.rule, trial.settings, seed, weight, None, str(error))
            return [*found, failure]
        found.append(Found(library, trial.rule, trial.settings, seed, weight, result))
    return found


def _has(contestant: Contestant, rule: str, settings: str) -> bool:
    """Whether there is such an SAE, and one that the equal settings do not give already."""
    same = contestant.ours or (contestant.name == "dictionary-learning" and rule in BY_COUNT)
    if settings == _OWN and same:
        return False
    return contestant.name != "sparsify" or rule == "topk"


def _chosen(names: str | None) -> list[Contestant]:
    if names is None:
        return list(CONTESTANTS.values())
    asked = [name.strip() for name in names.split(",")]
    for name in asked:
        if name not in CONTESTANTS:
            raise InputError(f"--contestants {name}: give some of {', '.join(CONTESTANTS)}")
    return [CONTESTANTS[name] for name in asked]


def _check(rules: Sequence[str], settings: str, seeds: int, k: int, batch: int) -> None:
    for rule in rules:
        if rule not in ARCHITECTURES:
            raise InputError(f"--rules {rule}: give some of {', '.join(ARCHITECTURES)}")
    if settings not in (_EQUAL, _OWN, "both"):
        raise InputError(f"--settings {settings}: give equal, own or both")
    numbers: Mapping[str, int] = {"--seeds": seeds, "--k": k, "--batch": batch}
    for option, value in numbers.items():
        if value < 1:
            raise InputError(f"{option} {value}: give at least 1")


def _count(text: str) -> int:
    """A number of tokens such as 900k."""
    unit = {"k": 10**3, "m": 10**6}.get(text[-1:].lower(), 1)
    try:
        count = round(float(text if unit == 1 else text[:-1]) * unit)
    except ValueError:
        count = 0
    if count < 1:
        raise InputError(f"--tokens {text}: give a number such as 900k or 1_000_000")
    return count


def _heading(
    source: Source, rows: Rows, batch: int, d_sae: int, k: int, entries: Sequence[Entry]
) -> list[str]:
    versions = (", ".join(map(" ".join, entry.versions.items())) for entry in entries)
    return [
        f"{Path(source.model).name}, layer {rows.layer}, text {Path(source.text).name}, contexts "
        f"of {source.context_length} tokens without special ones",
        f"{rows.train_tokens:,} rows of {rows.d_model} in batches of {batch:,} "
        f"({rows.train_tokens // batch} steps), {rows.held_out_tokens:,} held out; d_sae = "
        f"{d_sae:,}, k or L0 aimed at = {k}",
        *dict.fromkeys(versions),
    ]


def _summary(found: Found) -> str:
    name = f"{found.rule}, {found.library} ({found.settings}), seed {found.seed}"
    if found.result is None:
        return f"{name} failed: {found.error}"
    judged = found.result["inference"]
    return (
        f"{name}: R² {judged['r2']:.4f}, L0 {judged['l0']:.1f}, dead {judged['dead']:.1%}, "
        f"{found.result['seconds']:.0f} s"
    )


def _print(quality: Quality) -> None:
    console = Console()
    if not console.is_terminal:
        head = "\n".join(f"- {line}" for line in quality.heading)
        console.out("\n".join([head, "", *(t.markdown() for t in tables(quality))]))
        return
    for line in quality.heading:
        console.print(line, markup=False, highlight=False)
    for table in tables(quality):
        console.print(table.rich())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
