"""A run that trains from an activation cache, by the API and by the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from groupsae import cli
from groupsae.config import Config
from groupsae.directory import RunDirectory
from groupsae.errors import InputError
from groupsae.host.model import HostModel
from groupsae.run import Run


def key(directory: Path, **training) -> str:
    return RunDirectory(directory, Config(training=training), redo=True).key("train")


@pytest.fixture
def groupsae(monkeypatch, capsys):
    """Run the command line in this process; returns exit code, standard output and error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["groupsae", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def weights(run: Run):
    files = sorted((run.directory / "saes").rglob("sae.safetensors"))
    return {file.parent.name: load_file(file) for file in files}


def test_training_from_the_cache_runs_no_forward_and_gives_what_streaming_gives(
    tiny_config, tmp_path, monkeypatch
):
    exact = ["training.cache_dtype=float32", "training.cache_shuffle=false"]
    cached = [*tiny_config, *exact, f"training.activation_cache={tmp_path / 'cache'}"]
    runs = {name: Run(tmp_path / name, Config.load(None, cached)) for name in ("first", "second")}
    streamed = Run(tmp_path / "streamed", Config.load(None, tiny_config))
    assert runs["first"].cache() == tmp_path / "cache"
    for run in (streamed, *runs.values()):
        run.distances()
        run.groups()
    streamed.train()
    monkeypatch.setattr(HostModel, "visit", None)
    expected = weights(streamed)
    for run in runs.values():  # one cache serves both
        run.train()
        for name, tensors in weights(run).items():
            for part, tensor in tensors.items():
                assert tensor.equal(expected[name][part]), (run.directory, name, part)


def test_what_does_not_fit_is_refused_before_any_work(tiny_config, tmp_path, groupsae):
    cache = f"training.activation_cache={tmp_path / 'cache'}"
    code, _, err = groupsae("run", *tiny_config, cache, "--out", tmp_path / "run")
    assert (code, "no activation cache; write it with `groupsae cache`" in err) == (2, True)
    assert not (tmp_path / "run" / "distances.json").exists()

    code, out, err = groupsae(
        "cache", *tiny_config, cache, "--tokens", 1000, "--out", tmp_path / "run"
    )
    assert (code, str(tmp_path / "cache") in out) == (0, True), err
    assert "are free" in err
    code, _, err = groupsae("run", tmp_path / "run")
    assert (code, "training takes 4,096; write more of it" in err) == (2, True)
    code, _, err = groupsae("cache", tmp_path / "run", "tokens.context_length=8")
    assert (code, "context_length (there 16, here 8)" in err) == (2, True)

    assert groupsae("cache", tmp_path / "run", "tokens.context_length=16")[0] == 0
    code, _, err = groupsae("run", tmp_path / "run")
    assert code == 0, err


def test_a_cache_needs_a_name(tiny_config, tmp_path):
    with pytest.raises(InputError, match=r"training\.activation_cache: no folder is named"):
        Run(tmp_path / "run", Config.load(None, tiny_config)).cache()


def test_where_a_cache_lies_does_not_change_what_is_trained_but_how_it_is_read_does(tmp_path):
    streamed = key(tmp_path, activation_cache=None)
    assert key(tmp_path, cache_dtype="float32", cache_shuffle=False) == streamed
    cached = key(tmp_path, activation_cache="here")
    assert key(tmp_path, activation_cache="there") == cached
    others = [{"cache_dtype": "bfloat16"}, {"cache_shuffle": False}]
    keys = {key(tmp_path, activation_cache="here", **other) for other in others}
    assert len({streamed, cached, *keys}) == 4


def test_a_run_that_was_begun_without_a_cache_names_it_when_it_is_refused(tiny_config, tmp_path):
    run = Run(tmp_path / "run", Config.load(None, tiny_config))
    run.distances()
    run.groups()
    run.train()
    config = Config.load(None, [*tiny_config, "training.activation_cache=here"])
    with pytest.raises(InputError, match="activation_cache was None, is now 'here'"):
        Run(tmp_path / "run", config)
