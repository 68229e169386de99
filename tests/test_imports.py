"""SAEs that were trained elsewhere as a run of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from groupsae.config import Config
from groupsae.errors import InputError
from groupsae.run import Run
from groupsae.sae import SAE, SAEConfig


@pytest.fixture(scope="module")
def trained(tiny_host_folder, tiny_text, tmp_path_factory) -> Run:
    config = Config.load(
        None,
        [
            f"host.name={tiny_host_folder}",
            f"tokens.source={tiny_text}",
            "tokens.context_length=16",
            "tokens.held_out=0.2",
            "grouping.layers=all",
            "grouping.distance_tokens=1000",
            "grouping.partition=0-1,2",
            "sae.k=4",
            "sae.d_sae=48",
            "training.tokens=4096",
            "training.batch_tokens=256",
            "training.buffer_tokens=1024",
            "evaluation.tokens=1000",
            "report.formats=[png]",
        ],
    )
    run = Run(tmp_path_factory.mktemp("runs") / "trained", config)
    run.all()
    return run


@pytest.fixture(scope="module")
def text_and_host(trained) -> Config:
    """What an importing user sets: the host model, the text and sizes."""
    values = trained.config.model_dump(mode="json", exclude={"provenance"})
    wanted = ("host", "tokens", "evaluation", "report")
    own = {name: values[name] for name in wanted}
    return Config.parse(own | {"grouping": {"distance_tokens": 1000}})


@pytest.mark.parametrize("format", ["sae-lens", "sparsify", "dictionary-learning"])
def test_what_was_exported_is_evaluated_as_before(trained, text_and_host, tmp_path, format):
    trained.export(format, tmp_path / "exported")
    run = Run.of_imported(tmp_path / "run", [tmp_path / "exported"], text_and_host)
    assert list(run.groups().partition.groups) == [(0,), (1,), (2,)]
    rows = {row["layer"]: row for row in run.evaluate()}
    for row in trained.evaluate():
        if row["partition"] == "groups":
            for key in ("r2", "ce_loss_score", "l0", "kl", "cosine"):
                assert rows[row["layer"]][key] == pytest.approx(row[key], rel=1e-4, abs=1e-5)
    assert "SAEs were trained elsewhere" in json.dumps(
        json.loads((run.directory / "evaluation" / "reconstruction.json").read_text())
    )
    assert run.report().exists()


def test_groups_and_per_layer_saes_from_elsewhere_are_compared(trained, text_and_host, tmp_path):
    folders = [trained.directory / "saes" / "layers-00-01", trained.directory / "saes" / "baseline"]
    run = Run.of_imported(tmp_path / "run", folders, text_and_host)
    found = [(row["partition"], row["layer"]) for row in run.evaluate()]
    assert found == [
        (partition, layer) for partition in ("groups", "baseline") for layer in range(3)
    ]
    for layer in range(3):
        ours, theirs = run.sae(layer), trained.sae(layer)
        assert torch.equal(ours.W_dec, theirs.W_dec)


def test_an_imported_run_can_be_trained_further(trained, text_and_host, tmp_path):
    run = Run.of_imported(
        tmp_path / "run", [trained.directory / "saes" / "baseline"], text_and_host
    )
    values = trained.config.model_dump(mode="json", exclude={"provenance"})
    values["training"]["init_from"] = str(run.directory)
    values["grouping"] |= {"partition": "0,1,2"}
    further = Run(tmp_path / "further", Config.parse(values))
    further.distances()
    further.groups()
    assert set(further.train()) >= {"layers-00", "layers-01", "layers-02"}


def save(sae: SAE, folder: Path) -> Path:
    sae.save(folder)
    return folder


def of_layers(*layers: int, d_model: int = 32) -> SAE:
    return SAE(SAEConfig(d_model=d_model, d_sae=40, k=4, layers=layers))


def test_saes_of_another_width_are_refused_and_nothing_is_written(text_and_host, tmp_path):
    folder = save(of_layers(0, d_model=48), tmp_path / "sae")
    with pytest.raises(InputError, match=r"d_model = 48 .* has d_model = 32 and 3 layers"):
        Run.of_imported(tmp_path / "run", [folder], text_and_host)
    assert not (tmp_path / "run").exists()


def test_groups_that_overlap_are_refused(text_and_host, tmp_path):
    folders = [save(of_layers(0, 1), tmp_path / "a"), save(of_layers(1, 2), tmp_path / "b")]
    with pytest.raises(InputError, match="layers 1 are in several groups"):
        Run.of_imported(tmp_path / "run", folders, text_and_host)


def test_baselines_of_some_layers_alone_are_refused(text_and_host, tmp_path):
    folders = [save(of_layers(0, 1), tmp_path / "a"), save(of_layers(1), tmp_path / "b")]
    with pytest.raises(InputError, match="layers 0 have no SAE of their own"):
        Run.of_imported(tmp_path / "run", folders, text_and_host)


def test_a_second_import_into_the_same_run_is_refused(trained, text_and_host, tmp_path):
    folders = [trained.directory / "saes" / "baseline"]
    Run.of_imported(tmp_path / "run", folders, text_and_host)
    with pytest.raises(InputError, match="has SAEs already"):
        Run.of_imported(tmp_path / "run", folders, text_and_host)


def test_layers_that_the_run_does_not_cover_cannot_be_exported(trained, tmp_path):
    with pytest.raises(InputError, match=r"--layers: 5 are not covered .* its layers are 0, 1, 2"):
        trained.export("sae-lens", tmp_path / "out", [1, 5])
    assert not (tmp_path / "out").exists()
