from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from groupsae import cli
from groupsae.config import Config
from groupsae.errors import InputError
from groupsae.run import Run
from groupsae.sae import SAE
from groupsae.sweep import members_of, read_vary
from groupsae.training.batches import MixedBatches

VARY = {"sae.k": [4, 8], "training.learning_rate": ["1e-3", 1e-2]}
NAMES = [
    "k-4_learning_rate-0.001",
    "k-4_learning_rate-0.01",
    "k-8_learning_rate-0.001",
    "k-8_learning_rate-0.01",
]


@pytest.fixture(scope="session")
def swept(tiny_host_folder, tiny_text, tmp_path_factory):
    """A run with a finished sweep, its results, and the config of the run."""
    config = Config.load(None, overrides_for(tiny_host_folder, tiny_text))
    run = Run(tmp_path_factory.mktemp("swept") / "run", config)
    return run, run.sweep(VARY)


def overrides_for(host, text, *more):
    return [
        f"host.name={host}",
        f"tokens.source={text}",
        "tokens.context_length=16",
        "tokens.held_out=0.2",
        "grouping.layers=all",
        "grouping.distance_tokens=2000",
        "grouping.groups=2",
        "sae.d_sae=48",
        "training.tokens=1024",
        "training.batch_tokens=256",
        "training.buffer_tokens=1024",
        "training.kernel=torch",
        "evaluation.tokens=300",
        "report.formats=[png]",
        *more,
    ]


def weights(path):
    return load_file(path / "sae.safetensors")


def test_every_combination_is_trained_and_judged_at_every_layer(swept):
    run, results = swept
    assert list(dict.fromkeys(row["member"] for row in results["rows"])) == NAMES
    groups = run.groups().partition.groups
    for name in NAMES:
        own = [row for row in results["rows"] if row["member"] == name]
        assert {(row["partition"], row["layer"]) for row in own} == {
            (partition, layer) for partition in ("groups", "baseline") for layer in (0, 1, 2)
        }
        for row in own:
            k, rate = row["overrides"]["sae.k"], row["overrides"]["training.learning_rate"]
            assert name == f"k-{k}_learning_rate-{rate}"
            assert 0 < row["l0"] <= k
            assert row["groups_total"] == (len(groups) if row["partition"] == "groups" else 3)
            assert tuple(row["group"]) in (
                groups if row["partition"] == "groups" else [(0,), (1,), (2,)]
            )
    assert set(results["rows"][0]) - {"group"} <= set(results["definitions"]) | {
        "partition",
        "groups_total",
        "layer",
    }


def test_the_means_are_those_of_the_rows(swept):
    _, results = swept
    assert [(mean["member"], mean["partition"]) for mean in results["means"]] == [
        (name, partition) for name in NAMES for partition in ("groups", "baseline")
    ]
    for mean in results["means"]:
        rows = [
            row
            for row in results["rows"]
            if (row["member"], row["partition"]) == (mean["member"], mean["partition"])
        ]
        for key in ("r2", "ce_loss_score", "l2", "l0", "dead"):
            assert mean[key] == pytest.approx(sum(row[key] for row in rows) / 3)


def test_its_files_are_those_that_it_names(swept):
    run, results = swept
    folder = run.directory / "sweep" / results["name"]
    assert json.loads((folder / "results.json").read_text()) == results
    assert json.loads((folder / "members.json").read_text())[NAMES[1]] == {
        "sae.k": 4,
        "training.learning_rate": 0.01,
    }
    for member in NAMES:
        sae = SAE.load(folder / "saes" / member / "baseline" / "layers-02")
        assert sae.config.k == int(member[2])
    assert not (folder / "checkpoints").exists()
    figure = run.directory / "figures" / f"sweep-{results['name']}.png"
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_member_is_what_a_run_of_its_settings_makes(swept, tiny_host_folder, tiny_text, tmp_path):
    run, results = swept
    more = ("sae.k=8", "training.learning_rate=1e-2")
    alone = Run(
        tmp_path / "run", Config.load(None, overrides_for(tiny_host_folder, tiny_text, *more))
    )
    for stage in (alone.distances, alone.groups, alone.train, alone.evaluate):
        rows = stage()
    names = json.loads((alone.directory / "training.json").read_text())["saes"]
    assert len(names) == 5
    for name in names:
        one = weights(alone.directory / "saes" / name)
        other = weights(run.directory / "sweep" / results["name"] / "saes" / NAMES[3] / name)
        assert one.keys() == other.keys()
        assert all(one[key].equal(other[key]) for key in one), name
    swept_rows = [row for row in results["rows"] if row["member"] == NAMES[3]]
    assert [
        row | {"member": NAMES[3], "overrides": swept_rows[0]["overrides"]} for row in rows
    ] == (swept_rows)


def test_a_finished_sweep_is_not_repeated_and_another_lies_beside_it(swept, monkeypatch):
    run, results = swept
    again = Run(run.directory)

    def no_work(*_, **__):
        raise AssertionError("a finished sweep was repeated")

    with monkeypatch.context() as patched:
        patched.setattr("groupsae.host.model.HostModel.load", no_work)
        assert again.sweep(VARY) == results
    other = again.sweep({"sae.affine": ["scale", "gain"], "training.seed": [0, 1]})
    assert other["name"] != results["name"]
    assert len(other["means"]) == 8
    folders = {path.name for path in (run.directory / "sweep").iterdir()}
    assert folders == {results["name"], other["name"]}


def test_a_stopped_sweep_continues_to_the_same_figures(
    swept, tiny_host_folder, tiny_text, tmp_path, monkeypatch
):
    _, results = swept
    often = overrides_for(tiny_host_folder, tiny_text, "training.checkpoint_every=2")
    config = Config.load(None, often)
    give, asked = MixedBatches.next, []

    def stopping(self):
        asked.append(1)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return give(self)

    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(MixedBatches, "next", stopping)
        Run(tmp_path / "run", config).sweep(VARY)
    folder = tmp_path / "run" / "sweep" / results["name"]
    assert (folder / "checkpoints" / "step-000002").is_dir()
    assert not (folder / "results.json").exists()
    assert Run(tmp_path / "run").sweep(VARY) == results


def test_other_held_out_tokens_are_judged_anew_without_training(swept, tmp_path, monkeypatch):
    run, results = swept
    config = run.config.model_copy(
        update={"evaluation": run.config.evaluation.model_copy(update={"tokens": 100})}
    )
    monkeypatch.setattr("groupsae.training.session.train_entries", None)
    other = Run(run.directory, config).sweep(VARY)
    assert other["name"] == results["name"]
    assert other["tokens"] < results["tokens"]
    assert Run(run.directory, run.config).sweep(VARY) == results


def test_the_command_prints_one_row_for_each_member_and_partition(
    tiny_config, tmp_path, monkeypatch, capsys
):
    less = ["training.tokens=512", "evaluation.tokens=100", "training.kernel=torch"]
    vary = ["--vary", "sae.k=2,4", "--vary", "sae.affine=none,center"]
    arguments = ["groupsae", "sweep", *tiny_config, *less, *vary, "-o", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "group" in line or "layer" in line]
    rows = [line for line in lines if line.startswith("│")]
    assert len(rows) == 8
    assert {tuple(cell.strip() for cell in row.split("│")[1:4]) for row in rows} == {
        (k, affine, partition)
        for k in "24"
        for affine in ("none", "center")
        for partition in ("group", "layer")
    }
    (folder,) = (tmp_path / "run" / "sweep").iterdir()
    assert f"Sweep: {folder}" in out


def test_values_are_read_as_in_yaml_with_lists_in_brackets():
    texts = ["sae.k=16, 32", "training.adam_betas=[0.9,0.999],null", "sae.affine=none"]
    vary = read_vary(texts)
    assert vary["sae.k"] == [16, 32]
    assert vary["training.adam_betas"] == [[0.9, 0.999], None]
    members = members_of(Config(), vary)
    assert [member.name for member in members] == [
        "k-16_adam_betas-0.9-0.999_affine-none",
        "k-16_adam_betas-None_affine-none",
        "k-32_adam_betas-0.9-0.999_affine-none",
        "k-32_adam_betas-None_affine-none",
    ]
    assert members[0].config.training.adam_betas == (0.9, 0.999)
    assert members[3].config.sae.k == 32


def test_another_architecture_has_its_own_defaults():
    members = members_of(
        Config.parse({"sae": {"expansion": 8}}),
        {"sae.architecture": ["topk", "jumprelu", "matryoshka", "relu"]},
    )
    for member in members:
        asked = {"architecture": member.overrides["sae.architecture"], "expansion": 8}
        assert member.config == Config.parse({"sae": asked})
    with pytest.raises(InputError, match=r"sae\.k: 64 does not go with sae\.architecture=jump"):
        members_of(Config.parse({"sae": {"k": 64}}), {"sae.architecture": ["topk", "jumprelu"]})
