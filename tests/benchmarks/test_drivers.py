from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import benchmarks.drivers
from benchmarks.drivers import ceiling
from benchmarks.drivers.common import Task
from benchmarks.rounds import launch
from benchmarks.workload import SHAPES, prepare
from groupsae.sae import SAE, SAEConfig
from groupsae.sae.kernels import cpu, selection, triton
from groupsae.training import memory

DRIVERS = sorted(Path(benchmarks.drivers.__path__[0]).glob("[!_]*.py"))
TINY = SHAPES["tiny"]
ALLOWED = {"torch", "numpy", "datasets", "transformers", "benchmarks"}
LIBRARIES = {
    "common": set(),
    "ceiling": set(),
    "groupsae_": {"groupsae"},
    "sparsify_": {"sparsify"},
    "saelens_": {"sae_lens", "transformer_lens"},
    "dictionary_learning_": {"dictionary_learning", "nnsight"},
    "quality": set(),
    "quality_groupsae": {"groupsae"},
    "quality_sparsify": {"sparsify", "schedulefree"},
    "quality_saelens": {"sae_lens"},
    "quality_dictionary_learning": {"dictionary_learning"},
}


@pytest.mark.parametrize("path", DRIVERS, ids=lambda path: path.stem)
def test_a_driver_imports_no_more_than_its_own_library(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert all(m.startswith("benchmarks.drivers") for m in imported if m.startswith("benchmarks"))
    packages = {module.partition(".")[0] for module in imported} - sys.stdlib_module_names
    assert packages <= ALLOWED | LIBRARIES[path.stem]


def test_chunks_are_the_kernels():
    kernels = {"torch": selection, "cpu": cpu, "triton": triton}
    sizes = {name: kernel._CHUNK_BYTES for name, kernel in kernels.items()}
    assert memory._CHUNK_BYTES == sizes  # by which the driver accounts for one chunk


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A run of the groupsae driver in a process of its own: two SAEs, 10% of latents dead."""
    work = prepare(TINY, tmp_path_factory.mktemp("work"), context_length=16, contexts=64)
    return launch(Path(sys.executable), "groupsae_", task(work, groups=((0,), (1,)), dead=0.1))


def task(work, **changes) -> Task:
    values = {
        "host": str(work.host),
        "tokens": str(work.tokens),
        "layers": TINY.layers,
        "groups": (TINY.layers,),
        "context_length": 16,
        "batch_tokens": 64,
        "d_model": TINY.d_model,
        "d_sae": TINY.d_sae,
        "k": TINY.k,
        "steps": 4,
        "warm": 2,
        "buffer_batches": 3,
        "threads": 1,
        "kernel": "torch",
    }
    return Task(**(values | changes))


def test_groupsae_trains_on_every_token_once(result):
    assert result["steps"] == len(result["step_ms"]) == 4
    assert result["forwards_per_step"] == 1.0
    assert 0 < result["fvu"] < 1


def test_groupsaes_parts_make_up_the_step(result):
    parts = result["parts_ms"]
    assert {"host forward", "buffer", "SAE steps", "rest"} == parts.keys()
    assert sum(parts.values()) == pytest.approx(result["ms_per_step"])
    assert min(parts.values()) >= 0
    assert result["ms_per_step"] == pytest.approx(sum(result["step_ms"]) / 4)


def test_groupsaes_memory_is_what_its_objects_hold(result):
    memory = result["memory_bytes"]
    sae = SAE(SAEConfig(d_model=32, d_sae=512, k=4, layers=(0,)))
    weights = 2 * sum(p.nbytes for p in sae.parameters())  # two SAEs
    assert (memory["SAE weights"], memory["Adam states"]) == (weights, 2 * weights)
    assert memory["buffer"] == 2 * 3 * 64 * 32 * 4
    assert memory["one chunk"] == 64 * 512 * 4  # all tokens of this batch
    assert memory["host weights"] == pytest.approx(4 * (2 * 96 * 32 + 3 * 12 * 32**2), rel=0.05)
    if memory["process after imports"] is not None:
        assert memory["process after imports"] == result["baseline_bytes"] < result["peak_bytes"]


def test_the_ceiling_is_measured_for_every_data_type(tmp_path, monkeypatch):
    monkeypatch.setattr(ceiling, "_SECONDS", 0.0)
    monkeypatch.setattr(ceiling, "_CUBE", {"cpu": 64})
    work = prepare(TINY, tmp_path, context_length=16, contexts=1)
    rates = ceiling.drive(task(work))["gflops"]
    assert {name.split()[0] for name in rates} >= {"float32", "bfloat16"}
    assert all(rate > 0 for rate in rates.values())
