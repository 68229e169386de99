"""One HTML page that needs nothing beside itself, and the same figures as files."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from groupsae.errors import InputError
from groupsae.report import contents
from groupsae.report.artefacts import Artefacts, read_run

FORMATS = ("pdf", "png", "svg")

_TEMPLATES = Path(__file__).with_name("templates")
THEME = _TEMPLATES / "theme.css"  # colours and type, of this page and of others
_SCREEN_PIXELS_PER_INCH = 126  # larger than in print, so that 7 point type reads easily


def write_report(run_directory: Path, *, formats: Sequence[str] = ("pdf", "png")) -> Path:
    """Write `report.html` and `figures/` from whatever artefacts a run directory holds.

    A section whose artefact is missing says which stage writes it. The page holds its figures and
    loads nothing, from the network or elsewhere.

    Args:
        run_directory: As `groupsae run` makes it. Its files are not trusted.
        formats: File formats of the figures: of pdf, png and svg.

    Returns:
        The page, `run_directory / "report.html"`.

    Raises:
        InputError: If the folder is no run directory, an artefact is broken, a format is unknown or
            the disk cannot be written.
    """
    for form in formats:
        if form not in FORMATS:
            raise InputError(f"report.formats: {form!r} is unknown; choose of {', '.join(FORMATS)}")
    run = read_run(run_directory)
    page = run_directory / "report.html"
    try:
        html = render(run, _draw(run, run_directory / "figures", formats))
        aside = page.with_suffix(".html.partial")
        aside.write_text(html, encoding="utf-8")
        aside.replace(page)
    except OSError as error:
        raise InputError(
            f"the report cannot be written to {run_directory}: {error}; make room there, or make "
            "the folder writable"
        ) from error
    return page


def render(run: Artefacts, figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The page's HTML, with `figures` by name as :func:`write_report` draws them.

    Everything but our own style and script is escaped. The page's content security policy allows
    that script alone, by its hash, and no request at all.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    return environment.get_template("report.html.j2").render(
        style="\n".join(
            path.read_text(encoding="utf-8") for path in (THEME, _TEMPLATES / "report.css")
        ),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        figures=figures,
        **contents.page_contents(run),
    )


def _draw(run: Artefacts, folder: Path, formats: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Draw the run's figures, write their files, and give what the page needs of each."""
    from groupsae.report.figures import encode  # matplotlib is slow to import
    from groupsae.report.illustrations import illustrations

    folder.mkdir(exist_ok=True)
    drawn = {}
    for number, illustration in enumerate(illustrations(run), start=1):
        figure = illustration.draw()
        files = {form: f"{illustration.name}.{form}" for form in formats}
        for form, name in files.items():
            (folder / name).write_bytes(encode(figure, form))
        drawn[illustration.name] = {
            "number": number,
            "title": illustration.title,
            "alt": illustration.alt,
            "caption": illustration.caption,
            "definitions": illustration.definitions,
            "width": round(figure.get_figwidth() * _SCREEN_PIXELS_PER_INCH),
            "height": round(figure.get_figheight() * _SCREEN_PIXELS_PER_INCH),
            "svg": base64.b64encode(encode(figure, "svg")).decode(),
            "files": [(form.upper(), f"{folder.name}/{name}") for form, name in files.items()],
        }
    return drawn
