"""One HTML page that needs nothing beside itself, and the same figures as files."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from groupsae.errors import InputError
from groupsae.report.artefacts import Run, read_run
from groupsae.report.metrics import METRICS, MISSING, LayerComparison, compare, means, number
from groupsae.report.wording import (
    choice,
    chosen_groups,
    definition,
    duration,
    layer_range,
    si,
)

FORMATS = ("pdf", "png", "svg")
TABLE = ("ce_loss_score", "r2", "l2", "l0")

_TEMPLATES = Path(__file__).with_name("templates")
_SCREEN_PIXELS_PER_INCH = 125  # a little larger than in print: 7 point type is read easily


def write_report(run_directory: Path, *, formats: Sequence[str] = ("pdf", "png")) -> Path:
    """Write `report.html` and `figures/` from whatever artefacts a run directory holds.

    A section whose artefact is missing says which stage writes it. The page holds its figures and
    loads nothing, from the network or elsewhere.

    Parameters
    ----------
    run_directory
        As `groupsae run` makes it; its files are read as untrusted.
    formats
        File formats of the figures: of pdf, png and svg.

    Returns
    -------
    Path
        The page, `run_directory / "report.html"`.

    Raises
    ------
    InputError
        If the folder is no run directory, an artefact is broken, a format is unknown or the disk
        cannot be written.
    """
    from groupsae.report.illustrations import illustrations  # matplotlib is slow to import

    for wanted in formats:
        if wanted not in FORMATS:
            raise InputError(f"report.formats: {wanted!r} is unknown; choose of {', '.join(FORMATS)}")
    run = read_run(run_directory)
    page = run_directory / "report.html"
    try:
        figures = {
            illustration.name: _drawn(illustration, run_directory / "figures", formats)
            for illustration in illustrations(run)
        }
        aside = page.with_suffix(".html.partial")
        aside.write_text(render(run, figures), encoding="utf-8")
        aside.replace(page)
    except OSError as error:
        raise InputError(
            f"the report cannot be written to {run_directory}: {error}; make room or give the "
            "folder write permission"
        ) from error
    return page


def render(run: Run, figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The page's HTML; `figures` are by name, as :func:`_drawn` makes them."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    comparisons = _comparisons(run)
    return environment.get_template("report.html.j2").render(
        style=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        host=_host_name(run),
        provenance=_provenance(run),
        config_text=run.config_text,
        figures=figures,
        layers=layer_range(run.partition["layers"]) if run.partition else None,
        groups=_groups(run),
        choice=choice(run),
        summary=_summary(run, comparisons),
        tiles=_tiles(run, comparisons),
        table=_table(comparisons) if comparisons else None,
        full_table=_full_table(run, comparisons) if comparisons else None,
        equal=_equal(run),
        saes=_saes(run),
        cost=_cost(run),
        stages=_stages(run),
        excluded=_excluded(run),
    )


def _drawn(illustration: Any, folder: Path, formats: Sequence[str]) -> dict[str, Any]:
    """Draw one figure, write its files, and give what the page needs of it."""
    from groupsae.report.figures import save, svg

    figure = illustration.draw()
    folder.mkdir(exist_ok=True)
    for form in formats:
        save(figure, folder / f"{illustration.name}.{form}")
    return {
        "title": illustration.title,
        "alt": illustration.alt,
        "caption": illustration.caption,
        "definitions": illustration.definitions,
        "width": round(figure.get_figwidth() * _SCREEN_PIXELS_PER_INCH),
        "height": round(figure.get_figheight() * _SCREEN_PIXELS_PER_INCH),
        "data": base64.b64encode(svg(figure)).decode(),
        "files": [(form.upper(), f"figures/{illustration.name}.{form}") for form in formats],
    }
