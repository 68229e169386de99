"""The libraries themselves judge: what they read of our exports, and what we read of theirs.

Each runs in this interpreter's Python where it is installed, or in the one that an environment
variable names: GROUPSAE_SAELENS_PYTHON, GROUPSAE_SPARSIFY_PYTHON, GROUPSAE_DICTLEARN_PYTHON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from groupsae.interop import export_saes, load
from groupsae.sae import SAE
from tests.interop.cases import D_MODEL, LAYERS, METADATA, activations, trained
from tests.sae.kernels.cases import AFFINES, RULES

_HERE = Path(__file__).parent
_TOLERANCE = 1e-5  # relative, in float32


@dataclass(frozen=True)
class Library:
    module: str
    variable: str
    judge: str
    rules: tuple[str, ...]
    own: tuple[str, ...]


LIBRARIES = {
    "sae-lens": Library(
        "sae_lens",
        "GROUPSAE_SAELENS_PYTHON",
        "judge_sae_lens.py",
        tuple(RULES),
        ("standard", "topk", "jumprelu", "gated", "batchtopk", "no-input-bias", "rescaled", "old"),
    ),
    "sparsify": Library(
        "sparsify",
        "GROUPSAE_SPARSIFY_PYTHON",
        "judge_sparsify.py",
        ("topk",),
        ("layers.3", "layers.2"),
    ),
    "dictionary-learning": Library(
        "dictionary_learning",
        "GROUPSAE_DICTLEARN_PYTHON",
        "judge_dictionary_learning.py",
        tuple(RULES),
        (
            *("standard", "april", "topk", "batchtopk", "batchtopk-unset", "matryoshka"),
            *("jumprelu", "gated", "new"),
        ),
    ),
}
EXPORTS = [
    (name, rule, affine)
    for name, library in LIBRARIES.items()
    for rule in library.rules
    for affine in AFFINES
]
OWN = [(name, own) for name, library in LIBRARIES.items() for own in library.own]


@pytest.fixture(scope="session")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder that a library's judge has filled: all SAEs in one process, at the first call."""
    done: dict[str, Path] = {}

    def judge(format: str) -> Path:
        if format not in done:
            work = tmp_path_factory.mktemp(format)
            python = _python(LIBRARIES[format])
            _prepare(format, work)
            subprocess.run(
                [python, _HERE / LIBRARIES[format].judge, work],
                check=True,
                timeout=300,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            done[format] = work
        return done[format]

    return judge


@pytest.mark.parametrize(("format", "rule", "affine"), EXPORTS)
def test_a_library_reads_our_export_as_the_same_sae(
    format: str, rule: str, affine: str, judged: Callable[[str], Path]
) -> None:
    work, sae = judged(format), trained(rule, affine)
    for layer in LAYERS:
        name = f"{_slug(rule, affine)}-{layer}"
        theirs = load_file(work / "read" / f"{name}.safetensors")
        x = load_file(work / "x.safetensors")[name]
        latents = sae.encode(x, layer).dense(sae.config.d_sae) / sae.scale[sae.layers.index(layer)]
        if format == "dictionary-learning" and (rule, affine) == ("relu", "gain"):
            # its loader normalises the rows, which a gain has scaled
            gain = sae.gain_out[sae.layers.index(layer)]
            latents = latents * (sae.W_dec * gain).norm(dim=1)
        same(theirs["latents"], latents)
        close(theirs["x_hat"], sae(x, layer))


@pytest.mark.parametrize(("format", "rule", "affine"), EXPORTS)
def test_an_export_comes_back_as_the_same_sae(
    format: str, rule: str, affine: str, judged: Callable[[str], Path]
) -> None:
    work, sae = judged(format), trained(rule, affine)
    folders = json.loads((work / "exports.json").read_text())
    for layer in LAYERS:
        name = f"{_slug(rule, affine)}-{layer}"
        back = load(Path(folders[name]))
        theirs = load_file(work / "read" / f"{name}.safetensors")
        x = load_file(work / "x.safetensors")[name]
        assert back.layers == (layer,)
        assert back.config.architecture == sae.config.architecture
        agrees(back, x, theirs)


@pytest.mark.parametrize(("format", "own"), OWN)
def test_a_librarys_own_sae_gives_its_numbers_here(
    format: str, own: str, judged: Callable[[str], Path]
) -> None:
    work = judged(format)
    sae = load(work / "own" / own)
    theirs = load_file(work / "own" / f"{own}.safetensors")
    active = (theirs["latents"] > 0).any(dim=1).float().mean()
    assert active > 0.5, "an SAE without active latents judges nothing"
    agrees(sae, load_file(work / "x.safetensors")["own"], theirs)


def agrees(sae: SAE, x: Tensor, theirs: dict[str, Tensor]) -> None:
    (layer,) = sae.layers
    same(theirs["latents"], sae.encode(x, layer).dense(sae.config.d_sae))
    close(theirs["x_hat"], sae(x, layer))


def same(theirs: Tensor, ours: Tensor) -> None:
    """The same active latents, and the same values."""
    assert torch.equal(theirs > 0, ours > 0)
    close(theirs, ours)


def close(theirs: Tensor, ours: Tensor) -> None:
    """The same to the tolerance, by the largest value of the token, or of the mean token."""
    scale = ours.abs().amax(dim=1, keepdim=True)
    scale = torch.maximum(scale, scale.mean())
    assert ((theirs - ours).abs() <= _TOLERANCE * scale).all()


def _prepare(format: str, work: Path) -> None:
    """Export every case, and write the activations to judge it by."""
    generator = torch.Generator().manual_seed(5)
    inputs = {"own": torch.randn(96, D_MODEL, generator=generator) + 0.5}
    exports = {}
    for rule in LIBRARIES[format].rules:
        for affine in AFFINES:
            sae, case = trained(rule, affine), _slug(rule, affine)
            folders = export_saes(
                dict.fromkeys(LAYERS, sae), work / "exports" / case, format, METADATA
            )
            for layer, folder in folders.items():
                inputs[f"{case}-{layer}"] = activations(sae, layer)
                exports[f"{case}-{layer}"] = str(folder)
    save_file(inputs, work / "x.safetensors")
    (work / "exports.json").write_text(json.dumps(exports))


def _slug(rule: str, affine: str) -> str:
    return f"{rule}-{affine}".replace(" ", "-")


def _python(library: Library) -> str:
    if importlib.util.find_spec(library.module) is not None:
        return sys.executable
    python = os.environ.get(library.variable)
    if python is None:
        pytest.skip(
            f"{library.module} is not installed here, and {library.variable} names no Python "
            "that has it"
        )
    return python
