"""From folders of other libraries to SAEs here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from groupsae.errors import InputError
from groupsae.interop import dictionary_learning, group_sae, sae_lens, sparsify
from groupsae.interop.reading import read_config
from groupsae.sae import SAE, directory_name

_READERS = {
    "sae-lens": sae_lens.read,
    "sparsify": sparsify.read,
    "dictionary-learning": dictionary_learning.read,
}
IMPORT_FORMATS = (*_READERS, "group-sae", "groupsae")

_FOREIGN = (  # what folders of other things hold, and what these are called
    ("stages.json", "a run directory of groupsae, which is used as it is"),
    ("model.safetensors", "a language model"),
    ("pytorch_model.bin", "a language model"),
    ("model.safetensors.index.json", "a language model"),
    ("adapter_model.safetensors", "an adapter of a language model"),
    ("params.npz", "Gemma Scope; save it with SAELens: SAE.from_pretrained(...).save_model(...)"),
    (sae_lens.WEIGHTS_FILE, f"SAELens without its {sae_lens.CONFIG_FILE}"),
    (sparsify.WEIGHTS_FILE, f"sparsify without its {sparsify.CONFIG_FILE}"),
    (sparsify.CONFIG_FILE, "an SAE without its weights"),
    (dictionary_learning.WEIGHTS_FILE, "dictionary_learning without its config.json"),
)


def import_saes(
    folders: Sequence[Path],
    *,
    format: str | None = None,
    layers: Sequence[tuple[int, ...]] | None = None,
) -> dict[str, SAE]:
    """Read the SAEs of other libraries, and of the published Group-SAE weights.

    Args:
        folders: Of one SAE each, or of many in folders below it; `hub://USER/REPO[/FOLDER]` is
            fetched.
        format: One of `IMPORT_FORMATS`; by default what each folder looks like.
        layers: The member layers of each SAE, in the order of the folders; by default as they say
            themselves.

    Returns:
        SAEs by name, from below: `layers-03-06` for one of several layers, `baseline/layers-03` for
        one of a single layer.

    Raises:
        InputError: If a folder holds no SAE that can be read, or two are of the same layers.
    """
    found = [sae for folder in folders for sae in _saes_in(_fetched(folder))]
    if layers is not None and len(layers) != len(found):
        raise InputError(
            f"--layers: {len(layers)} are given, but there are {len(found)} SAEs: "
            f"{', '.join(map(str, found))}"
        )
    sources: dict[str, Path] = {}
    saes: dict[str, SAE] = {}
    for number, folder in enumerate(found):
        sae = load(folder, format=format, layers=None if layers is None else layers[number])
        name = directory_name(sae.layers)
        name = name if len(sae.layers) > 1 else f"baseline/{name}"
        if name in saes:
            raise InputError(f"{sources[name]} and {folder} are both SAEs of {name}; name one")
        sources[name], saes[name] = folder, sae
    return dict(sorted(saes.items(), key=lambda item: (item[1].layers, item[0])))


def load(folder: Path, *, format: str | None = None, layers: tuple[int, ...] | None = None) -> SAE:
    """Read one SAE. It takes and gives raw activations; its latents are those of its library.

    Args:
        format: As in :func:`import_saes`.
        layers: Its member layers.

    Raises:
        InputError: Naming the folder, the reason and the mend.
    """
    if format is not None and format not in IMPORT_FORMATS:
        raise InputError(f"--from {format}: known formats are {', '.join(IMPORT_FORMATS)}")
    looks_like = detect(folder)
    if format not in (None, looks_like):
        raise InputError(f"{folder} looks like {looks_like}, not {format}; leave --from out")
    try:
        if looks_like == "groupsae":
            return SAE.load(folder)
        if looks_like == "group-sae":
            return group_sae.read(folder, layers)
        if layers is not None and len(layers) != 1:
            raise InputError(f"it is of one layer, not of {', '.join(map(str, layers))}")
        return _READERS[looks_like](folder, None if layers is None else layers[0])
    except InputError as error:
        if str(folder) in str(error):
            raise
        raise InputError(f"{folder} ({looks_like}): {error}") from error


def detect(folder: Path) -> str:
    """Which of `IMPORT_FORMATS` a folder is of.

    Raises:
        InputError: If it is of none of them, with what it looks like.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give one that holds an SAE")
    files = {path.name for path in folder.iterdir()}
    if {dictionary_learning.CONFIG_FILE, dictionary_learning.WEIGHTS_FILE} <= files:
        return "dictionary-learning"
    if {sae_lens.CONFIG_FILE, sae_lens.WEIGHTS_FILE} <= files:
        return "sae-lens"
    if {sparsify.CONFIG_FILE, sparsify.WEIGHTS_FILE} <= files:
        keys = read_config(folder / sparsify.CONFIG_FILE).keys()
        if {"d_model", "layers"} <= keys:
            return "groupsae"
        if "d_in" in keys:
            published = "jumprelu" in keys or group_sae.scales_file(folder) is not None
            return "group-sae" if published else "sparsify"
        raise InputError(
            f"{folder} holds no SAE of a known format: its {sparsify.CONFIG_FILE} has no d_in"
        )
    looks = next((f"it looks like {what}" for name, what in _FOREIGN if name in files), None)
    inside = ", ".join(sorted(files)[:6]) or "nothing"
    raise InputError(
        f"{folder} holds no SAE of a known format ({', '.join(IMPORT_FORMATS)}): "
        f"{looks or f'it holds {inside}'}"
    )


def _fetched(folder: Path) -> Path:
    if not str(folder).startswith("hub:/"):
        return folder
    from groupsae.interop.hub import download_saes

    return download_saes(folder)


def _saes_in(folder: Path) -> list[Path]:
    """The folder, or the folders of SAEs below it."""
    weights = (sae_lens.WEIGHTS_FILE, sparsify.WEIGHTS_FILE, dictionary_learning.WEIGHTS_FILE)
    if folder.is_dir() and not any((folder / name).is_file() for name in weights):
        below = {path.parent for name in weights for path in folder.rglob(name)}
        if below:
            return sorted(below)
    return [folder]
