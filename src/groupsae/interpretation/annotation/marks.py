"""What annotators export from a sheet's page, read and checked. Untrusted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from groupsae.errors import InputError
from groupsae.interpretation.annotation.key import Key

MARKS = ("interpretable", "not", "unsure")
_EXPORT = "export it again from the sheet's annotate.html"


class Entry(BaseModel):
    """What an annotator says of one item; a note may stand without a mark."""

    model_config = ConfigDict(frozen=True, strict=True)

    mark: Literal["interpretable", "not", "unsure"] | None = None
    note: str = ""


class Annotation(BaseModel):
    """One annotator's file."""

    model_config = ConfigDict(frozen=True, strict=True)

    format: Literal[1]
    sheet: str
    annotator: str
    marks: dict[str, Entry]

    @property
    def marked(self) -> dict[str, str]:
        """The mark of each item that has one."""
        return {i: entry.mark for i, entry in self.marks.items() if entry.mark is not None}

    @property
    def notes(self) -> dict[str, str]:
        """The note of each item that has one."""
        return {i: note for i, entry in self.marks.items() if (note := entry.note.strip())}


def read_annotations(files: Sequence[Path], key: Key) -> list[Annotation]:
    """Read annotations of one sheet, each of another annotator.

    Raises:
        InputError: If there is no file, or one is none of these; see
            :func:`groupsae.interpretation.annotation.scoring.score`.
    """
    if not files:
        raise InputError("no annotation file is given; name those exported from annotate.html")
    by_name: dict[str, Path] = {}
    annotations = []
    for path in files:
        annotation = _read(path)
        _check(path, annotation, key)
        name = annotation.annotator.strip().casefold()
        if name in by_name:
            raise InputError(
                f"{path} is of the annotator {annotation.annotator!r}, as {by_name[name]} is; give "
                "the newer of the two alone, or export each with the name of who marked it"
            )
        by_name[name] = path
        annotations.append(annotation)
    return annotations


def _read(path: Path) -> Annotation:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"the annotation {path} cannot be read: {error.strerror}") from error
    if not content.strip():
        raise InputError(f"the annotation {path} is empty; {_EXPORT}")
    try:
        return Annotation.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        wrong = first["msg"]
        if at and first["type"] != "missing":
            wrong = f"{at} is {str(first['input'])[:80]!r}: {wrong}"
        elif at:
            wrong = f"{at} is missing"
        raise InputError(f"{path} is no annotation of latents: {wrong}; {_EXPORT}") from error


def _check(path: Path, annotation: Annotation, key: Key) -> None:
    """That the file is of this sheet, of somebody, and marks something."""
    if annotation.sheet != key.sheet:
        raise InputError(
            f"{path} is of the sheet {annotation.sheet[:80]!r}, but the key here is of "
            f"{key.sheet!r}: latents of another run, or drawn with other settings; score it where "
            "its sheet was drawn, or draw that sheet again"
        )
    unknown = next((item for item in annotation.marks if item not in key.items), None)
    if unknown is not None:
        raise InputError(
            f"{path} marks the item {unknown[:80]!r}, which the sheet does not have; {_EXPORT}"
        )
    if not annotation.annotator.strip():
        raise InputError(
            f"{path} has no annotator's name (it is {annotation.annotator!r}); write yours on the "
            "page and export the file again"
        )
    if not annotation.marked:
        raise InputError(
            f"{path} marks none of the {len(key.items):,} items; mark some on the page and export "
            "the file again"
        )
