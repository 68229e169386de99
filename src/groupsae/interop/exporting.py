"""From SAEs here to folders of other libraries, all of them or none."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from groupsae.errors import InputError
from groupsae.files import replacing
from groupsae.interop import dictionary_learning, sae_lens, sparsify
from groupsae.interop.importing import detect
from groupsae.interop.metadata import Metadata
from groupsae.sae import SAE

_WRITERS = {
    "sae-lens": sae_lens.write,
    "sparsify": sparsify.write,
    "dictionary-learning": dictionary_learning.write,
}
EXPORT_FORMATS = tuple(_WRITERS)


def export_saes(
    saes: Mapping[int, SAE], directory: Path, format: str, metadata: Metadata
) -> dict[int, Path]:
    """Write one SAE per layer in the format of another library, in raw activation units.

    Latents are the active ones of `sae.encode(x, layer)`, their values divided by the layer's
    scale. An earlier export of the same format is replaced.

    Args:
        saes: The SAE of each layer's group.
        directory: Where the layers' folders go, each named as the library's users expect it.
        format: One of `EXPORT_FORMATS`.

    Returns:
        Each layer's folder.

    Raises:
        InputError: If the format does not exist or cannot express an SAE, a weight is not finite,
            or something else lies in the way. Then nothing is written.
    """
    if format not in _WRITERS:
        raise InputError(f"--to {format}: known formats are {', '.join(_WRITERS)}")
    if not saes:
        raise InputError("--layers: no layer is named to export")
    folders = {layer: directory / _folder_name(format, layer, metadata) for layer in saes}
    for folder in folders.values():
        _refuse_overwriting(folder, format)
    with ExitStack() as unfinished:
        for layer, sae in saes.items():
            aside = unfinished.enter_context(replacing(folders[layer]))
            aside.mkdir()
            _WRITERS[format](aside, sae, layer, metadata)
    return folders


def _folder_name(format: str, layer: int, metadata: Metadata) -> str:
    if format == "sae-lens":
        return metadata.hook_name(layer)
    if format == "sparsify":
        return metadata.hookpoint(layer)
    return dictionary_learning.submodule_name(layer)


def _refuse_overwriting(folder: Path, format: str) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        found = detect(folder)
    except InputError:
        found = None
    if found != format:
        raise InputError(
            f"{folder} holds something else; remove it, or choose another directory with -o"
        )
