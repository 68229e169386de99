"""Several processes of torchrun on this machine, over gloo."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from groupsae.config import Config
from groupsae.errors import InputError
from groupsae.run import Run
from groupsae.training.mesh import Mesh
from groupsae.training.session import mesh_of
from groupsae.training.team import Team

WORKER = Path(__file__).with_name("worker.py")
ROOT = WORKER.parents[2]


def torchrun(processes: int, *arguments: object, module: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--module"] if module else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def work(processes: int, tmp_path: Path, **job: object) -> tuple[int, str]:
    """Exit code and output of a job.

    PyTorch's gloo has been seen to abort a process that had finished, once in a hundred launches;
    a second launch then finds the work done.
    """
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    for _ in range(2):
        started = torchrun(processes, WORKER, path)
        output, _ = started.communicate(timeout=240)
        if "terminate called without an active exception" not in output:
            break
    return started.returncode, output


@pytest.fixture(scope="module")
def prepared(tiny_host_folder, tiny_text, tmp_path_factory) -> Path:
    """A run whose groups are known: two groups and three layers, five SAEs."""
    config = Config.parse(
        {
            "host": {"name": str(tiny_host_folder)},
            "tokens": {"source": str(tiny_text), "context_length": 16, "held_out": 0.2},
            "grouping": {"layers": "all", "distance_tokens": 2000, "partition": "0-1,2"},
            "sae": {"k": 4, "d_sae": 48},
            "training": {
                "tokens": 4096,
                "batch_tokens": 256,
                "buffer_tokens": 1024,
                "host_batch_contexts": 4,
                "log_every": 4,
                "checkpoint_every": 6,
            },
        }
    )
    run = Run(tmp_path_factory.mktemp("runs") / "prepared", config)
    run.distances()
    run.groups()
    return run.directory


def copy_of(prepared: Path, directory: Path, sae: dict | None = None, **training: object) -> Path:
    shutil.copytree(prepared, directory)
    values = Run(directory).config.model_dump(mode="json")
    values["training"] |= training
    values["sae"] |= sae or {}
    Run(directory, Config.parse(values))
    return directory


def trained_alone(prepared: Path, directory: Path, **settings: object) -> dict:
    """By one process of one thread: what compute kernels give may depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return weights(Run(copy_of(prepared, directory, **settings)).train())
    finally:
        torch.set_num_threads(threads)


def weights(saes) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, sae in saes.items()
        for key, tensor in sae.state_dict().items()
    }


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("processes", "only"), [(2, ["uniform", "limit"]), (3, None)])
def test_processes_that_share_the_saes_give_the_bits_of_one(prepared, tmp_path, processes, only):
    cache = str(tmp_path / "cache")
    Run(copy_of(prepared, tmp_path / "writer", activation_cache=cache)).cache()
    settings = {
        "uniform": {},
        "cached": {"activation_cache": cache},
        "all": {"layer_sampling": "all"},
        "balanced": {"layer_sampling": "balanced"},
        "limit": {"max_norm_multiple": 1.1},
        "both": {"layer_sampling": "balanced", "max_norm_multiple": 1.1},
        "twins": {"twins": True},  # SAEs that share batches, on different processes
        "few": {"baseline": False},  # two SAEs
    }
    settings = {name: settings[name] for name in only or settings}
    expected = {
        name: trained_alone(prepared, tmp_path / f"one-{name}", **own)
        for name, own in settings.items()
    }
    runs = [copy_of(prepared, tmp_path / name, **own) for name, own in settings.items()]
    code, output = work(
        processes, tmp_path, what="train", runs=[{"directory": str(d)} for d in runs]
    )
    assert code == 0, output
    for directory in runs:
        assert_equal(weights(Run(directory).train()), expected[directory.name])
        alone = tmp_path / f"one-{directory.name}"
        dropped = json.loads((alone / "training.json").read_text())["excluded_long_tokens"]
        assert (dropped > 0) == ("max_norm_multiple" in settings[directory.name])
        for file in ("training.json", "metrics.jsonl"):
            ours, theirs = (timeless(run / file) for run in (directory, alone))
            assert ours == theirs


def timeless(path: Path) -> list[str]:
    lines = (
        [json.loads(line) for line in path.read_text().splitlines()]
        if path.suffix == ".jsonl"
        else [json.loads(path.read_text())]
    )
    for line in lines:
        line.pop("seconds", None)
        line.pop("seconds_for_checkpoints", None)
    return sorted(json.dumps(line, sort_keys=True) for line in lines)


def test_a_step_by_shares_is_the_step_of_the_whole(tmp_path):
    code, output = work(3, tmp_path, what="share", found=str(tmp_path / "found"))
    assert code == 0, output
    for rank in range(3):
        for name, difference in json.loads((tmp_path / f"found.{rank}.json").read_text()).items():
            assert difference < 1e-12, name


def test_processes_that_share_batches_give_the_weights_of_one_to_rounding(prepared, tmp_path):
    few = {"tokens": 1280}  # five steps: later a latent may be chosen for another by a rounding
    expected = trained_alone(prepared, tmp_path / "one", **few)
    directory = copy_of(prepared, tmp_path / "shared", data_ranks=2, **few)
    code, output = work(2, tmp_path, what="train", runs=[{"directory": str(directory)}])
    assert code == 0, output
    for name, tensor in weights(Run(directory).train()).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


# So few active ones that some latents are silent in the first batch: the later ones have AuxK.
FEW = {"tokens": 1280, "dead_after_tokens": 200, "log_every": 2, "sae": {"k": 2}}


def test_shards_of_latents_stop_together_and_any_number_goes_on(prepared, tmp_path, capfd):
    few = FEW | {"sae": {"architecture": "batchtopk", **FEW["sae"]}}
    trained_alone(prepared, tmp_path / "one", **few)
    directory = copy_of(prepared, tmp_path / "shared", latent_ranks=3, **few)
    one = {"directory": str(directory), "signal_at": 3, "rank": 1}
    code, output = work(3, tmp_path, what="train", runs=[{**one, "signal": int(signal.SIGUSR1)}])
    assert code != 0
    assert "stopped by SIGUSR1 after step 4" in output
    written = {file.name for file in (directory / "checkpoints/step-000004").glob("layers-00-01.*")}
    shards = ("0-16", "16-32", "32-48")
    assert written == {f"layers-00-01.latents-{shard}.safetensors" for shard in shards}
    for others in (2, 1):
        resumed = copy_of(directory, tmp_path / f"resumed-{others}", latent_ranks=others)
        if others > 1:
            code, output = work(others, tmp_path, what="train", runs=[{"directory": str(resumed)}])
            assert code == 0, output
        else:
            Run(resumed).train()
            output = capfd.readouterr().err
        assert "train: 256 tokens in" in output  # the fifth step alone
        assert_close(resumed, tmp_path / "one")


def test_latents_and_batches_are_shared_together(prepared, tmp_path):
    trained_alone(prepared, tmp_path / "one", **FEW)
    assert any(line["auxk"] > 0 for line in metrics_of(tmp_path / "one"))
    shared = [
        copy_of(prepared, tmp_path / "latents", latent_ranks=4, **FEW),
        copy_of(prepared, tmp_path / "both", latent_ranks=2, data_ranks=2, **FEW),
        copy_of(prepared, tmp_path / "groups", latent_ranks=2, data_ranks=1, **FEW),
    ]
    runs = [{"directory": str(directory)} for directory in shared]
    code, output = work(4, tmp_path, what="train", runs=runs)
    assert code == 0, output
    for directory in shared:
        assert_close(directory, tmp_path / "one")


def assert_close(directory: Path, expected: Path) -> None:
    """Weights and metrics of a run; it is trained to its end where it is not."""
    found, wanted = (weights(Run(run).train()) for run in (directory, expected))
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(metrics_of(directory), metrics_of(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def metrics_of(directory: Path) -> list[dict]:
    """But for the time, in one order."""
    lines = map(json.loads, timeless(directory / "metrics.jsonl"))
    return [{k: v for k, v in line.items() if k != "sae"} for line in sorted(lines, key=str)]


def test_a_signal_to_one_stops_all_and_another_number_of_processes_goes_on(
    prepared, tmp_path, capfd
):
    expected = trained_alone(prepared, tmp_path / "one")
    directory = copy_of(prepared, tmp_path / "stopped")
    for processes, step, tokens in ((3, 4, "1,280"), (2, 8, "1,024")):  # 5 steps, and 4 more
        job = {
            "directory": str(directory),
            "signal_at": step,
            "rank": processes - 1,
            "signal": int(signal.SIGUSR1),
        }
        code, output = work(processes, tmp_path, what="train", runs=[job])
        assert code != 0
        assert f"stopped by SIGUSR1 after step {step + 1}" in output
        assert f"train: {tokens} tokens in" in output
        assert (directory / "checkpoints" / f"step-{step + 1:06d}").is_dir()
    assert_trains_to(expected, directory, "1,792", capfd)  # the last 7 of 16


def assert_trains_to(expected: dict, directory: Path, rest: str, capfd) -> None:
    """One process goes on from the newest checkpoint, and has so many tokens to learn from."""
    capfd.readouterr()
    found = weights(Run(directory).train())
    assert re.search(rf"train: ({rest}) tokens in", capfd.readouterr().err)
    assert_equal(found, expected)


@pytest.mark.parametrize(
    ("fault", "said", "rest"),
    [
        ({"signal_at": 8, "signal": int(signal.SIGKILL)}, "exitcode  : -9", "2,560|4,096"),
        # While a checkpoint may be being written, and when the SAEs are.
        ({"fail_at": 8}, "RuntimeError: it broke in step 9", "2,560|4,096"),
        ({"die_saving": True}, "exitcode  : -9", "1,024"),
    ],
)
def test_a_process_that_ends_ends_the_others_and_is_named(
    prepared, tmp_path, capfd, fault, said, rest
):
    directory = copy_of(prepared, tmp_path / "run", log_every=100)  # checkpoints after 6 and 12
    expected = trained_alone(prepared, tmp_path / "one")
    job = {"directory": str(directory), "rank": 1, **fault}
    began = time.monotonic()
    code, output = work(2, tmp_path, what="train", runs=[job])
    assert time.monotonic() - began < 60
    assert code != 0
    assert said in output
    assert re.search(r"rank\s*:? 1\b", output)  # as torchrun says it, or the other process
    assert_trains_to(expected, directory, rest, capfd)


def test_the_command_line_in_two_processes(prepared, tmp_path):
    directory = copy_of(prepared, tmp_path / "run")
    started = torchrun(2, "groupsae", "run", directory, "evaluation.tokens=1000", module=True)
    output, _ = started.communicate(timeout=240)
    assert started.returncode == 0, output
    assert output.count("Report: ") == 1
    assert (directory / "report.html").exists()
    refused = {
        ("evaluate",): "only `groupsae run` and `groupsae train` work in several processes",
        ("train", "--fresh", "training.data_ranks=3"): "data_ranks: 3 does not divide 2 devices",
    }
    for (command, *options), message in refused.items():
        started = torchrun(2, "groupsae", command, directory, *options, module=True)
        output, _ = started.communicate(timeout=240)
        assert started.returncode != 0
        assert message in output
    assert output.count(message) == 1  # which both meet, and one of them says


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"data_ranks": 2}, "sae": {"architecture": "batchtopk"}}, "batchtopk"),
        ({"training": {"data_ranks": 3}}, "data_ranks: 3 does not divide 2"),
        ({"training": {"data_ranks": 2, "batch_tokens": 1}}, "batch_tokens: 1 leaves some of 2"),
        ({"training": {"latent_ranks": 3}}, "latent_ranks: 3 does not divide 2"),
        ({"training": {"latent_ranks": 2}, "sae": {"architecture": "relu"}}, "not with relu"),
        ({"training": {"latent_ranks": 2}, "sae": {"affine": "gain"}}, "not with gain"),
        (
            {"training": {"latent_ranks": 2}, "sae": {"d_sae": 48, "k": 32}},
            r"leaves 24 of 48 latents to a process, .*latent_ranks=1 or less",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(sections, message):
    config = Config.parse(sections)
    with pytest.raises(InputError, match=message):
        mesh_of(Team(0, 2), [config.sae] * 3, config.training, d_model=16)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=20), st.integers(1, 8))
def test_saes_are_dealt_evenly(costs, groups):
    mesh = Mesh(1, groups)
    dealt = mesh.deal({f"sae-{i}": cost for i, cost in enumerate(costs)})
    loads = [
        sum(costs[i] for i in range(len(costs)) if dealt[f"sae-{i}"] == c) for c in range(groups)
    ]
    assert set(dealt.values()) <= set(range(groups))
    assert max(loads) - min(loads) <= max(costs)  # the least loaded is given the next


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_every_process_has_a_place_of_its_own(data, groups, latents):
    mesh = Mesh(data, groups, latents)
    ranks = range(data * groups * latents)
    assert mesh.devices == len(ranks)
    places = {(mesh.row(r), mesh.column(r), mesh.shard(r)) for r in ranks}
    assert places == set(itertools.product(range(data), range(groups), range(latents)))
    for sharing, same in (
        (mesh.sharing_batches(), lambda r: (mesh.column(r), mesh.shard(r))),
        (mesh.sharing_latents(), lambda r: (mesh.column(r), mesh.row(r))),
    ):
        assert sorted(r for together in sharing for r in together) == list(ranks)
        for together in sharing:
            assert len({same(r) for r in together}) == 1
    assert all(
        [mesh.row(r) for r in together] == list(range(data)) for together in mesh.sharing_batches()
    )
    assert all([mesh.shard(r) for r in t] == list(range(latents)) for t in mesh.sharing_latents())
