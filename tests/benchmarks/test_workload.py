from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from datasets import load_from_disk
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks import workload
from benchmarks.workload import SHAPES, prepare, shape, zipf_tokens
from groupsae.errors import InputError

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return prepare(TINY, tmp_path_factory.mktemp("work"), context_length=16, contexts=5000)


def test_the_host_has_the_shape(made):
    config = AutoConfig.from_pretrained(made.host)
    assert config.model_type == "gpt_neox"
    assert (config.num_hidden_layers, config.hidden_size) == (3, 32)
    assert config.intermediate_size == 4 * 32
    assert config.rope_parameters["partial_rotary_factor"] == 0.25  # Pythia's
    assert AutoModelForCausalLM.from_pretrained(made.host).dtype.itemsize == 4


def test_the_shapes_are_pythias():
    # Biderman et al. 2023 (arXiv 2304.01373), table 1: layers, model dimension, heads.
    sizes = {name: (of.n_layers, of.d_model, of.heads) for name, of in SHAPES.items()}
    assert sizes["pythia-70m"] == (6, 512, 8)
    assert sizes["pythia-160m"] == (12, 768, 12)
    assert SHAPES["pythia-160m"].layers == tuple(range(11))
    assert SHAPES["pythia-160m"].d_sae == 12_288
    assert SHAPES["wide-4096"].d_sae == 65_536


def test_text_is_read_back_as_the_ids_it_was_made_of(made):
    tokenizer = AutoTokenizer.from_pretrained(made.host)
    assert tokenizer("t5 t95 t1")["input_ids"] == [5, 95, 1]


def test_there_are_as_many_contexts_as_asked_for(made):
    ids = np.array(load_from_disk(str(made.tokens))["input_ids"])
    assert ids.shape[0] >= 5000
    assert ids.shape[1] == 16


def test_what_is_there_is_not_made_again(made):
    before = {path: path.stat().st_mtime_ns for path in made.host.parent.rglob("*")}
    assert prepare(TINY, made.host.parent, context_length=16, contexts=5000) == made
    assert {path: path.stat().st_mtime_ns for path in made.host.parent.rglob("*")} == before


def test_weights_are_saved_in_the_shapes_dtype(tmp_path):
    half = replace(TINY, name="half", dtype="bfloat16")
    made = prepare(half, tmp_path, context_length=16, contexts=1)
    assert AutoConfig.from_pretrained(made.host).dtype.itemsize == 2


def test_half_made_folders_do_not_stay(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(workload, "_save_tokens", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(TINY, tmp_path, context_length=16, contexts=1)
    assert [path.name for path in tmp_path.iterdir()] == ["host-tiny"]


def test_tokens_follow_zipfs_law():
    counts = np.bincount(zipf_tokens(2000, 500, 1000).ravel(), minlength=1000)
    assert counts[0] == 0  # the id that ends documents
    assert len(counts) == 1000
    harmonic = (1 / np.arange(1, 1000)).sum()
    assert counts[1:21] / counts.sum() == pytest.approx(1 / np.arange(1, 21) / harmonic, rel=0.05)


def test_a_context_that_the_model_cannot_read_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--context 65: tiny reads contexts of 2 to 64 tokens"):
        prepare(TINY, tmp_path, context_length=65, contexts=1)


def test_an_unknown_shape_is_refused_with_those_that_are_offered():
    with pytest.raises(InputError, match=r"--shape gpt2: .*pythia-70m, pythia-160m, wide-4096$"):
        shape("gpt2")
