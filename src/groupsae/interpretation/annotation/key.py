"""`key.json`: which latent each item of a sheet is. Annotators do not look at it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from groupsae.errors import InputError
from groupsae.interpretation.cards import Shown

KEY_FILE = "key.json"

DEFINITIONS = {
    "of": "identifies the interpretation whose latents the items are",
    "sheet": "identifies the items; an annotation names the sheet that it is of",
    "items": "the latent, and the layer at which its contexts were shown, by the item's name on "
    "the page",
    "subjects": "whose SAEs were mixed: the SAE's name at each layer",
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KeyItem(_Part):
    """One latent at one layer."""

    sae: str
    layer: int
    latent: int


class Subject(_Part):
    """One partition's SAEs; see :class:`groupsae.interpretation.cards.Shown`."""

    partition: str
    groups_total: int
    saes: dict[int, str]


class Key(_Part):
    """The content of `key.json`; see :data:`DEFINITIONS`."""

    format: Literal[1] = 1
    definitions: dict[str, str] = DEFINITIONS
    of: str
    sheet: str
    seed: int
    subjects: tuple[Subject, ...]
    items: dict[str, KeyItem]

    @property
    def shown(self) -> list[Shown]:
        """Whose SAEs were mixed."""
        return [Shown(s.partition, s.groups_total, s.saes) for s in self.subjects]


def read_key(path: Path) -> Key:
    """Read a key.

    Raises:
        InputError: If there is none, or it is damaged.
    """
    try:
        return Key.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is missing, so that nobody knows which latents were judged; draw the sheet "
            "with `groupsae annotate` first: the same settings give the same sheet"
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"])) or "JSON"
        raise InputError(
            f"{path} is damaged ({at}: {first['msg']}); draw the sheet again: the same settings "
            "give the same sheet"
        ) from error
