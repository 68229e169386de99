"""The layout that delphi reads; its own reader judges where GROUPSAE_DELPHI_PYTHON names a Python
that has it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from groupsae.errors import InputError
from groupsae.interop.delphi import write_delphi
from tests.interop.cases import METADATA

CONTEXTS, CONTEXT, D_SAE = 30, 16, 40
NAMES = {0: "layers-00-01", 1: "layers-00-01"}


class Firings:
    """A latent cache of made-up firings: a tenth of all, the first three latents silent."""

    def __init__(self):
        random = np.random.default_rng(0)
        self.tokens = random.integers(0, 96, (CONTEXTS, CONTEXT), np.int32)
        shape = (2, self.tokens.size, D_SAE)
        self.dense = (random.random(shape) * (random.random(shape) < 0.1)).astype("f4")
        self.dense[..., :3] = 0

    def d_sae(self, sae_name):
        return D_SAE

    def range(self, sae_name, layer, start, stop):
        columns = self.dense[layer].T[start:stop]
        latents, positions = columns.nonzero()
        return SimpleNamespace(
            offsets=np.concatenate([[0], (columns > 0).sum(1).cumsum()]),
            positions=positions.astype(np.int32),
            activations=columns[latents, positions],
        )


def test_the_layout(tmp_path):
    cache = Firings()
    folders = write_delphi(tmp_path, cache, NAMES, METADATA, splits=3)
    assert [folder.name for folder in folders.values()] == ["layers.0", "layers.1"]
    for layer, folder in folders.items():
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        assert files == ["0_12.safetensors", "13_25.safetensors", "26_39.safetensors"]
        dense = np.zeros((CONTEXTS, CONTEXT, D_SAE), np.float16)
        for file in files:
            found = load_file(folder / file)
            assert found["locations"].dtype == np.uint16
            assert found["activations"].dtype == np.float16
            assert found["tokens"].tolist() == cache.tokens.tolist()
            context, position, latent = found["locations"].astype(int).T
            dense[context, position, latent + int(file.split("_")[0])] = found["activations"]
        expected = cache.dense[layer].reshape(CONTEXTS, CONTEXT, D_SAE).astype(np.float16)
        assert np.array_equal(dense, expected)
        config = json.loads((folder / "config.json").read_text())
        assert config["model_name"] == METADATA.model_name
        assert (config["cache_ctx_len"], config["n_splits"]) == (CONTEXT, 3)


def test_types_grow_where_numbers_do(tmp_path):
    cache = Firings()
    cache.tokens = np.zeros((2**16 + 1, CONTEXT), np.int32)
    cache.range = lambda *_: SimpleNamespace(
        offsets=np.repeat([0, 2], [6, 35]),  # all of latent 5
        positions=np.array([7, 2**16 * CONTEXT + 15], np.int32),
        activations=np.array([1e-6, 1e6], np.float32),  # the first is silent, as delphi sees it
    )
    folder = write_delphi(tmp_path, cache, {0: "a"}, METADATA, splits=1)[0]
    found = load_file(folder / "0_39.safetensors")
    assert found["locations"].dtype == np.uint32
    assert found["locations"].tolist() == [[2**16, CONTEXT - 1, 5]]
    assert found["activations"].dtype == np.float32
    assert found["activations"].tolist() == [1e6]


def test_bad_input_writes_nothing(tmp_path):
    cache = Firings()
    with pytest.raises(InputError, match="no layer is named"):
        write_delphi(tmp_path, cache, {}, METADATA)
    for splits in (0, 41):
        with pytest.raises(InputError, match=f"splits={splits}: the 40 latents"):
            write_delphi(tmp_path, cache, NAMES, METADATA, splits=splits)
    assert not list(tmp_path.iterdir())
    (tmp_path / "layers.1").mkdir()
    with pytest.raises(InputError, match=r"layers\.1 holds something else"):
        write_delphi(tmp_path, cache, NAMES, METADATA)
    assert [path.name for path in tmp_path.iterdir()] == ["layers.1"]


def test_delphi_reads_the_same_latents(tmp_path):
    cache = Firings()
    write_delphi(tmp_path / "raw", cache, NAMES, METADATA, splits=5)
    judge = Path(__file__).parent / "judge_delphi.py"
    subprocess.run(
        [_python(), judge, tmp_path],
        check=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    read = load_torch(tmp_path / "read.safetensors")
    report = json.loads((tmp_path / "read.json").read_text())
    assert read["tokens"].tolist() == cache.tokens.tolist()
    for layer in NAMES:
        ours = torch.from_numpy(cache.dense[layer]).half().float()
        assert torch.equal(read[f"layers.{layer}"], ours)
        for latent in range(3, D_SAE):
            windows = ours[:, latent].reshape(-1, 8).amax(1)  # its examples: the strongest first
            examples = report["examples"][f"layers.{layer}_latent{latent}"]
            assert examples == sorted(windows[windows > 0].tolist(), reverse=True)
    assert report["chosen"] == sorted(f"layers.{at}_latent{i}" for at in NAMES for i in (3, 39))
    assert report["config"]["model_name"] == METADATA.model_name


def _python() -> str:
    if importlib.util.find_spec("delphi") is not None:
        return sys.executable
    python = os.environ.get("GROUPSAE_DELPHI_PYTHON")
    if python is None:
        pytest.skip(
            "delphi is not installed here, and GROUPSAE_DELPHI_PYTHON names no Python that has it"
        )
    return python
