"""`python -m benchmarks.quality`: the study, its tables and its figures."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.quality.plan import RULES
from benchmarks.quality.study import Asked, study
from benchmarks.quality.summary import write_summary

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    override: Annotated[
        list[str] | None,
        typer.Argument(
            help="host, text and sizes, as for groupsae: host.name=... tokens.source=..."
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="of the model, in tables")] = "bundled",
    out: Annotated[
        Path, typer.Option(help="folder of results; an interrupted study goes on")
    ] = Path("runs/quality"),
    seeds: Annotated[int, typer.Option(help="how many seeds", min=1)] = 3,
    rules: Annotated[str, typer.Option(help="sparsity rules and sizes, of the list in plan.py")] = (
        ",".join(RULES)
    ),
    distance_tokens: Annotated[
        str, typer.Option(help="ever more tokens to measure distances on")
    ] = "5000,20000,100000",
    held_out_tokens: Annotated[int, typer.Option(help="to judge on", min=1)] = 20_000,
    figures: Annotated[Path | None, typer.Option(help="folder for the figures; by default OUT")] = (
        None
    ),
) -> None:
    """Train every G's groups and the per-layer SAEs under several rules, and say what is lost."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    unknown = [rule for rule in rules.split(",") if rule not in RULES]
    if unknown:
        raise typer.BadParameter(
            f"{', '.join(unknown)}: choose of {', '.join(RULES)}", param_hint="--rules"
        )
    asked = Asked(
        name=name,
        base=tuple(override or ()),
        seeds=tuple(range(seeds)),
        rules=tuple(rules.split(",")),
        distance_tokens=tuple(sorted(int(tokens) for tokens in distance_tokens.split(","))),
        held_out_tokens=held_out_tokens,
    )
    path = study(asked, out)
    print(write_summary(path, figures or out))


if __name__ == "__main__":
    app()
