"""What 16 bit changes is told, once, and changes nothing itself."""

from __future__ import annotations

import logging
import statistics
import weakref
from pathlib import Path

import pytest
import torch

from groupsae.config import Config
from groupsae.directory import stored_config
from groupsae.errors import InputError
from groupsae.host import precision
from groupsae.host.model import HostModel
from groupsae.host.precision import Precision, beside_float32, compare
from groupsae.host.tokens import open_corpus
from groupsae.run import Run
from tests.host.tiny_models import random_ids, tiny_model


def with_special(ids: torch.Tensor) -> torch.Tensor:
    """The same ids with special ones (0 and 1) at every third place."""
    ids = ids.clone()
    ids[:, ::3] = torch.tensor([0, 1]).repeat(ids.shape[1])[: ids[:, ::3].shape[1]]
    return ids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["gpt_neox", "llama"])
def test_the_figure_is_that_of_transformers_own_hidden_states(
    architecture: str, dtype: torch.dtype
) -> None:
    ids = with_special(random_ids(3, 16))
    models = [tiny_model(architecture).to(dtype), tiny_model(architecture)]
    # The last of the hidden states is after the final norm; those before it are the streams.
    with torch.no_grad():
        low, exact = (model(ids, output_hidden_states=True).hidden_states for model in models)
    found = compare(*map(HostModel, models), ids, layers=[0, 1], special={0, 1})
    kept = (ids != 0) & (ids != 1)
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert found.tokens == int(kept.sum()) == 3 * 10
    assert list(found.differences) == [0, 1]
    for layer, ratio in found.differences.items():
        x, y = exact[layer + 1][kept].double(), low[layer + 1][kept].double()
        expected = ((y - x) ** 2).sum().sqrt() / (x**2).sum().sqrt()
        assert ratio == pytest.approx(float(expected), rel=1e-5)
        assert 1e-5 < ratio < 0.05


def test_special_tokens_do_not_count() -> None:
    ids = with_special(random_ids(3, 16))
    models = [HostModel(tiny_model("gpt_neox").bfloat16()), HostModel(tiny_model("gpt_neox"))]
    without, with_all = (compare(*models, ids, [0, 1, 2], special) for special in ({0, 1}, ()))
    assert with_all.tokens == 48
    for layer in range(3):
        assert without.differences[layer] != pytest.approx(with_all.differences[layer], rel=1e-3)


def test_a_model_is_no_different_from_itself() -> None:
    models = [HostModel(tiny_model("gpt_neox")) for _ in range(2)]
    assert compare(*models, random_ids(), [0, 1, 2]).differences == {0: 0, 1: 0, 2: 0}


def test_streams_beyond_float16_differ_infinitely() -> None:
    low, exact = HostModel(tiny_model("gpt_neox").half()), HostModel(tiny_model("gpt_neox"))
    for host in (low, exact):
        for part in (host.blocks[1].attention.dense, host.blocks[1].mlp.dense_4h_to_h):
            part.bias.fill_(6e4)  # which float16 can hold, but not their sum
    found = compare(low, exact, random_ids(), [0, 1, 2])
    assert found.differences[0] < 0.01
    assert found.differences[1] == found.differences[2] == float("inf")
    assert "to inf% (layer" in str(found)


@pytest.mark.parametrize(
    ("differences", "read"),
    [
        ({0: 0.00304, 3: 0.0061, 10: 0.0114}, "0.3% (layer 0) to 1.1% (layer 10), median 0.61%"),
        ({0: 0.5, 1: 1.204, 2: 0.1, 3: 3e-5}, "0.003% (layer 3) to 120% (layer 1), median 30%"),
        ({7: 0.0}, "0% (layer 7) to 0% (layer 7), median 0%"),
    ],
)
def test_one_line_says_it(differences: dict[int, float], read: str) -> None:
    assert str(Precision("bfloat16", differences, tokens=1512)) == (
        f"host in bfloat16: residual streams differ from float32's by {read}: relative norm over "
        "1,512 tokens"
    )


@pytest.fixture
def low() -> HostModel:
    return HostModel(tiny_model("gpt_neox").bfloat16(), name="low")


def test_the_second_model_is_gone_afterwards_and_nothing_is_drawn(low, corpus) -> None:
    loaded = []

    def load() -> HostModel:
        torch.rand(3)  # as loading may
        host = HostModel(tiny_model("gpt_neox"))
        loaded.append(weakref.ref(host.model))
        return host

    state = torch.get_rng_state()
    before = low.residual_streams(random_ids(), [0, 1, 2])
    found = beside_float32(low, load, corpus.train(), [0, 1, 2], special={0})
    assert loaded[0]() is None
    assert torch.equal(torch.get_rng_state(), state)
    after = low.residual_streams(random_ids(), [0, 1, 2])
    assert all(torch.equal(before[layer], after[layer]) for layer in before)
    ids = corpus.train().next_contexts(4)
    assert found == compare(low, HostModel(tiny_model("gpt_neox")), ids, [0, 1, 2], special={0})


def test_a_text_of_fewer_contexts_is_enough(low, tmp_path: Path) -> None:
    path = tmp_path / "ids.jsonl"
    path.write_text('{"input_ids": [' + ", ".join(["5"] * 20) + "]}\n")
    stream = open_corpus(path, tokenizer=None, context_length=16, held_out=0).train()
    found = beside_float32(low, lambda: HostModel(tiny_model("gpt_neox")), stream, [0])
    assert found.tokens == 16


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError("no more"),
        InputError("host.name 'low': its weights cannot be loaded: gone"),
    ],
)
def test_what_cannot_be_loaded_is_logged_and_ends_nothing(low, corpus, caplog, error) -> None:
    def load() -> HostModel:
        raise error

    with caplog.at_level(logging.INFO, "groupsae"):
        assert beside_float32(low, load, corpus.train(), [0]) is None
    assert caplog.messages == [f"what host.dtype changes is not measured: {error}"]


def test_other_errors_are_not_hidden(low, corpus) -> None:
    def load() -> HostModel:
        raise RuntimeError("a fault of the program")

    with pytest.raises(RuntimeError, match="a fault"):
        beside_float32(low, load, corpus.train(), [0])


def test_without_room_nothing_is_loaded(low, corpus, caplog, monkeypatch) -> None:
    def load() -> HostModel:
        raise AssertionError("it was loaded")

    monkeypatch.setattr(precision, "_free_memory", lambda: 1000)
    with caplog.at_level(logging.INFO, "groupsae"):
        assert beside_float32(low, load, corpus.train(), [0]) is None
    assert "a second copy of low in float32 wants 0.0 GB, and 0.0 GB are free" in caplog.text


def test_free_memory_is_the_least_of_what_the_kernel_says(tmp_path: Path, monkeypatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal:  9000 kB\nActive(anon): 1 kB\nMemAvailable:  500 kB\n",
        "/sys/fs/cgroup/memory.stat": "anon 2048\nfile 999\ninactive_anon 5\n",
        "/sys/fs/cgroup/memory.max": "102400\n",
    }

    def read(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    assert precision._free_memory() == 102_400 - 2048
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert precision._free_memory() == 500 * 1024
    files.clear()
    assert precision._free_memory() is None


# In a run


@pytest.fixture
def config(tiny_config: list[str]) -> Config:
    return Config.load(None, [*tiny_config, "host.dtype=bfloat16"])


def begin(directory: Path, config: Config) -> Run:
    run = Run(directory, config)
    run.distances()
    run.groups()
    return run


def test_a_run_in_16_bit_says_it_once_and_keeps_it(
    config: Config, tmp_path: Path, caplog, monkeypatch
) -> None:
    with caplog.at_level(logging.INFO, "groupsae"):
        first = begin(tmp_path / "run", config)
        with monkeypatch.context() as interrupted:

            def interrupt(*_args: object, **_settings: object) -> None:
                raise KeyboardInterrupt

            interrupted.setattr("groupsae.training.session.train", interrupt)
            with pytest.raises(KeyboardInterrupt):
                first.train()
        (line,) = (line for line in caplog.messages if line.startswith("host in"))
        monkeypatch.setattr(precision, "compare", None)
        for _ in range(2):  # resumed, then finished
            trained = Run(tmp_path / "run").train()
    assert len([line for line in caplog.messages if line.startswith("host in")]) == 1
    assert line.startswith("host in bfloat16: residual streams differ from float32's by 0.")
    assert stored_config(tmp_path / "run").provenance["host_precision"] == line

    monkeypatch.setattr(Run, "_note_precision", lambda *_: None)
    without = begin(tmp_path / "without", config).train()
    for name, sae in trained.items():
        for key, tensor in sae.state_dict().items():
            assert torch.equal(tensor, without[name].state_dict()[key]), (name, key)


def test_a_run_without_room_for_the_second_model_trains(
    config: Config, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(precision, "_free_memory", lambda: 1000)
    assert begin(tmp_path / "run", config).train()
    assert "host_precision" not in stored_config(tmp_path / "run").provenance


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_run_in_float32_measures_nothing(
    tiny_config: list[str], tmp_path: Path, monkeypatch, dtype: str
) -> None:
    monkeypatch.setattr(precision, "beside_float32", None)
    config = Config.load(None, [*tiny_config, f"host.dtype={dtype}"])
    assert begin(tmp_path / "run", config).train()


def test_the_line_is_that_of_the_run_s_own_layers_and_tokens(
    config: Config, tmp_path: Path, tiny_host_folder: Path
) -> None:
    run = begin(tmp_path / "run", config)
    run.train()
    low, exact = (
        HostModel.load(tiny_host_folder, dtype=dtype) for dtype in ("bfloat16", "float32")
    )
    ids = run.corpus.train().next_contexts(4)
    kept = (ids != 0) & (ids != 1)
    ratios = []
    for layer in range(3):
        x, y = (host.residual_streams(ids, [layer])[layer][kept].double() for host in (exact, low))
        ratios.append(float((y - x).norm() / x.norm()))
    line = stored_config(tmp_path / "run").provenance["host_precision"]
    for ratio in (min(ratios), statistics.median(ratios), max(ratios)):
        assert f" {100 * ratio:.2g}%" in line
    assert f"over {int(kept.sum())} tokens" in line
