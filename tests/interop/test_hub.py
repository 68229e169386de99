from __future__ import annotations

import json
import re
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import constants

from groupsae.cli import _open
from groupsae.config import Config
from groupsae.directory import RunDirectory
from groupsae.errors import InputError
from groupsae.interop import import_saes
from groupsae.interop.card import model_card
from groupsae.interop.hub import download, open_hub_run, push
from groupsae.interop.publication import publication
from groupsae.run import Run
from tests.interop.fake_hub import TOKEN, FakeHub, Repository, fake_hub

REPO = "ada/tiny-group-saes"


@pytest.fixture(scope="module")
def finished(tiny_host_folder, tiny_text, tmp_path_factory) -> Path:
    """A trained and evaluated run of a host and a text that lie on this disk."""
    config = Config.parse(
        {
            "host": {"name": str(tiny_host_folder)},
            "tokens": {"source": str(tiny_text), "context_length": 16, "held_out": 0.2},
            "grouping": {"layers": "all", "distance_tokens": 2000, "groups": 2},
            "sae": {"k": 4, "d_sae": 48},
            "training": {"tokens": 1024, "batch_tokens": 256, "buffer_tokens": 512},
            "evaluation": {"tokens": 500},
            "report": {"formats": ["png"]},
        }
    )
    run = Run(tmp_path_factory.mktemp("runs") / "finished", config)
    run.distances()
    run.groups()
    run.train()
    run.evaluate()
    (run.directory / "figures").mkdir()
    (run.directory / "figures" / "per_layer.png").write_bytes(b"\x89PNG")
    (run.directory / "report.html").write_text("a page")
    return run.directory


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[FakeHub]:
    """A hub of this test's own, with a token that it accepts."""
    with fake_hub() as found:
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.address + template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr("time.sleep", lambda _: None)  # between huggingface_hub's attempts
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def texts(files: dict[str, bytes]) -> dict[str, str]:
    return {
        name: data.decode()
        for name, data in files.items()
        if not name.endswith((".safetensors", ".png"))
    }


def test_a_run_goes_to_the_hub_and_comes_back(finished, hub, tmp_path):
    address = push(finished, REPO)
    assert address == f"{hub.address}/{REPO}"
    own = Run(finished)
    folder = open_hub_run(f"hub://{REPO}")
    assert folder.is_relative_to(tmp_path / "cache")
    fetched = Run(folder)
    x = torch.randn(20, 32)
    host = own.host
    fetched.__dict__["host"] = host  # as the tiny host has no name that the other machine knows
    for subject, again in zip(own.subjects(), fetched.subjects(), strict=True):
        assert subject.name == again.name
        for layer, sae in subject.saes.items():
            assert torch.equal(sae(x, layer), again.saes[layer](x, layer))
    assert fetched.evaluate() == own.evaluate()
    assert fetched.groups().partition == own.groups().partition


def test_what_is_published_and_what_is_not(finished, hub):
    push(finished, REPO)
    names = set(hub.repositories[REPO].files)
    saes = json.loads((finished / "training.json").read_text())["saes"]
    assert names == {
        "README.md",
        "config.yaml",
        "stages.json",
        "training.json",
        "partition.json",
        "distances.json",
        "evaluation/reconstruction.json",
        "figures/per_layer.png",
        *(f"saes/{name}/{file}" for name in saes for file in ("cfg.json", "sae.safetensors")),
    }


def test_a_stage_that_is_not_published_is_not_said_to_be_done(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    stages = RunDirectory(run)
    path = run / "interpretation" / "depth.json"
    path.parent.mkdir()
    with stages.stage("interpret", path):
        path.write_text("{}")
    assert stages.is_done("interpret")
    published = publication(run)
    assert set(json.loads(published.files["stages.json"])) == {
        *("distances", "groups", "train", "evaluate")
    }
    assert not any(name.startswith("interpretation/") for name in published.files)


def test_no_path_of_this_machine_is_published(finished, hub, tmp_path, caplog):
    run = shutil.copytree(finished, tmp_path / "run")
    training = json.loads((run / "training.json").read_text())
    training["imported"] = ["/home/ada/thesis/saes", "C:\\Users\\ada\\saes", "~/saes"]
    (run / "training.json").write_text(json.dumps(training))
    push(run, REPO)
    published = texts(hub.repositories[REPO].files)
    for name, text in published.items():
        for path in (str(tmp_path), str(finished.parent), "/home/ada", "Users", "/tmp", "~/"):
            assert path not in text, name
    config = yaml.safe_load(published["config.yaml"])
    own = yaml.safe_load((run / "config.yaml").read_text())
    assert config["host"]["name"] == Path(own["host"]["name"]).name
    assert config["tokens"]["source"] == "words.jsonl"
    assert json.loads(published["training.json"])["imported"] == ["saes"] * 3
    assert "host.name is a local path" in caplog.text
    assert own == yaml.safe_load((finished / "config.yaml").read_text())


def test_the_hosts_name_on_the_hub_can_be_given(finished, hub):
    push(finished, REPO, host_name="EleutherAI/pythia-14m")
    published = texts(hub.repositories[REPO].files)
    assert yaml.safe_load(published["config.yaml"])["host"]["name"] == "EleutherAI/pythia-14m"
    front = yaml.safe_load(published["README.md"].split("---")[1])
    assert front["base_model"] == ["EleutherAI/pythia-14m"]
    assert "datasets" not in front
    Run(
        open_hub_run(Path(f"hub://{REPO}"))
    ).partitions()  # the stages are still those of its config


def test_a_repository_is_private_unless_asked_otherwise(finished, hub):
    push(finished, REPO)
    push(finished, "ada/open", private=False)
    assert hub.repositories[REPO].private
    assert not hub.repositories["ada/open"].private
    with pytest.raises(InputError, match="ada/open exists and is public; publish for everybody"):
        push(finished, "ada/open")
    assert hub.repositories["ada/open"].commits == 1


def test_a_later_publication_takes_the_place_of_an_earlier_one(finished, hub):
    push(finished, REPO)
    files = hub.repositories[REPO].files
    files |= {"saes/layers-09/sae.safetensors": b"old", "LICENSE": b"theirs", "notes.txt": b"own"}
    push(finished, REPO)
    assert "saes/layers-09/sae.safetensors" not in files
    assert files["LICENSE"] == b"theirs"
    assert files["notes.txt"] == b"own"
    assert hub.repositories[REPO].commits == 2


def test_a_repository_of_something_else_is_left_alone(finished, hub):
    push(finished, REPO)
    other = hub.repositories[REPO]
    other.files = {"README.md": b"a model", "model.safetensors": b"weights"}
    with pytest.raises(InputError, match=r"holds something else \(model.safetensors\); choose"):
        push(finished, REPO)
    assert other.files["README.md"] == b"a model"


@pytest.mark.parametrize("name", ["", "tiny", "ada/", "/tiny", "a/b/c", "../x/y", "ada/ti ny"])
def test_nothing_is_published_without_a_full_name(finished, hub, name):
    with pytest.raises(InputError, match="is no repository of the hub; write USER/REPO"):
        push(finished, name)
    assert hub.requests == []


def test_a_run_that_is_not_trained_is_not_published(hub, tmp_path):
    with pytest.raises(InputError, match="holds no trained run"):
        push(tmp_path, REPO)
    assert hub.requests == []


# The card


def test_the_card_has_the_evaluations_figures(finished, hub):
    push(finished, REPO, license="mit")
    card = hub.repositories[REPO].files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "mit"
    assert front["library_name"] == "groupsae"
    content = json.loads((finished / "evaluation" / "reconstruction.json").read_text())
    lost = card.partition("## What is lost")[2]
    for row in content["rows"]:
        (line,) = [line for line in lost.splitlines() if line.startswith(f"| {row['layer']} |")]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        at = 2 if row["partition"] == "groups" else 3
        for cell, measure in zip(cells[at::2], ("ce_loss_score", "r2", "l0"), strict=True):
            assert float(cell) == pytest.approx(row[measure], rel=1e-3, abs=1e-4)
    assert f'Run("hub://{REPO}")' in card
    for library in ("sae-lens", "sparsify", "dictionary-learning"):
        assert f"--to {library}" in card
    assert "![figures/per_layer.png](figures/per_layer.png)" in card
    assert "{{" not in card
    assert "None" not in card


def test_what_the_card_says_to_run_runs(finished, hub, groupsae, tmp_path, monkeypatch):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    push(finished, REPO, host_name=config["host"]["name"])  # as if it were a name on the hub
    blocks = re.findall(
        r"```(\w+)\n(.*?)```", hub.repositories[REPO].files["README.md"].decode(), re.DOTALL
    )
    names: dict[str, Any] = {}
    (python,) = [code for kind, code in blocks if kind == "python" and "groupsae" in code]
    exec(python, names)
    x = torch.randn(7, 32)
    torch.testing.assert_close(names["sae"](x), Run(finished).sae(0)(x, 0))
    monkeypatch.chdir(tmp_path)
    (commands,) = [code for kind, code in blocks if kind == "sh"]
    for command in commands.splitlines():
        code, out, err = groupsae(*command.split()[1:])
        assert code == 0, err
        folder = Path(re.search(r"layer 0: (\S+)", out)[1])
        (back,) = import_saes([folder]).values()
        torch.testing.assert_close(back(x, 0), names["sae"](x))


def test_a_card_names_no_licence_and_no_table_that_there_is_not(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "evaluation")
    card = model_card(publication(run), REPO)
    assert "license" not in card.split("---")[1]
    assert "Not measured yet." in card


def test_sparsify_is_not_offered_where_it_cannot_read(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    for path in run.glob("saes/*/cfg.json"):
        path.write_text(path.read_text().replace('"topk"', '"batchtopk"'))
    assert "sparsify" not in model_card(publication(run), REPO)


def test_text_of_a_run_is_shown_as_it_is(finished, tmp_path):
    published = publication(finished, host_name="<img src=x>|*a*\n# b/[c](javascript:d)")
    card = model_card(published, REPO)
    assert r"\<img src=x\>\|\*a\* \# b/\[c\](javascript:d)" in card
    assert "<img" not in card.replace(r"\<img", "")
    assert "\n# b" not in card
    assert "base_model" not in card


def test_a_licence_that_is_no_identifier_is_refused(finished, hub):
    with pytest.raises(InputError, match="is no identifier of the hub's"):
        push(finished, REPO, license="mit\nbase_model: x")
    assert hub.requests == []


# Reading


def test_only_what_is_safe_to_read_is_fetched(finished, hub):
    push(finished, REPO)
    hub.repositories[REPO].files |= {"saes/ae.pt": b"pickle", "run.py": b"code", "x.bin": b"pickle"}
    folder = download(REPO)
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors", ".yaml", ".md"}


@pytest.mark.parametrize(
    "name", ["../evil.json", "saes/../../evil.json", "/etc/evil.json", "a\\..\\b.json", "C:/b.json"]
)
def test_file_names_that_lead_out_of_the_folder_are_refused(finished, hub, name, tmp_path):
    push(finished, REPO)
    hub.repositories[REPO].files[name] = b"{}"
    with pytest.raises(InputError, match="leads out of its folder"):
        download(REPO)
    assert not (tmp_path / "cache").exists()


def test_a_repository_without_a_run_is_not_fetched(finished, hub):
    push(finished, REPO)
    hub.repositories[REPO].files = {"config.json": b"{}", "model.safetensors": b"huge"}
    with pytest.raises(InputError, match="holds no run of groupsae: config"):
        download(REPO)
    assert not any("/resolve/" in path for _, path, _ in hub.requests)


def test_a_copy_to_work_on_can_be_fetched(finished, hub, tmp_path):
    push(finished, REPO)
    folder = download(REPO, into=tmp_path / "mine")
    assert folder == tmp_path / "mine"
    assert (folder / "saes").is_dir()


def test_a_published_run_is_gone_on_with_in_a_folder_of_ones_own(finished, hub, tmp_path):
    push(finished, REPO)
    published, other = f"hub://{REPO}", "training.seed=5"
    with pytest.raises(InputError, match="choose another directory with --out"):
        _open([published, other], None, redo=False)
    mine = tmp_path / "mine"
    assert _open([published], mine, redo=False).directory == mine
    asked = len(hub.requests)
    (mine / "training.json").write_text("changed")
    assert _open([published, other], mine, redo=True).config.training.seed == 5
    assert (len(hub.requests), (mine / "training.json").read_text()) == (asked, "changed")


def test_a_commit_can_be_named_and_one_that_is_not_there_is_refused(finished, hub):
    push(finished, REPO)
    sha = hub.repositories[REPO].sha
    assert open_hub_run(f"hub://{REPO}@{sha}").name == sha
    with pytest.raises(InputError, match=rf"{REPO}@v2 has no such revision; name a branch, a tag"):
        download(REPO, "v2")


@pytest.mark.parametrize(
    "name", ["hub://", "runs/tiny", "hub://tiny", "hub://ada/tiny/x", "hub://ada/../tiny"]
)
def test_a_name_that_is_none_is_refused(hub, name):
    with pytest.raises(InputError, match="USER/REPO"):
        open_hub_run(name)
    assert hub.requests == []


# Refusals


def test_without_a_token_nothing_is_asked(finished, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="without a token: log in with `hf auth login`, or set HF"):
        push(finished, REPO)
    assert hub.requests == []


def test_a_private_run_is_not_read_without_a_token(finished, hub, monkeypatch):
    push(finished, REPO)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="not there, or the token is missing or not valid"):
        download(REPO)


def test_a_repository_that_is_not_there(hub):
    with pytest.raises(InputError, match=f"there is no {REPO} on the hub, or none that the token"):
        download(REPO)


@pytest.mark.parametrize(
    ("status", "match"), [(401, "token"), (403, "may not do that"), (404, "no")]
)
def test_each_refusal_is_one_message(finished, hub, status, match):
    hub.refusal = status
    for ask in (lambda: push(finished, REPO), lambda: download(REPO)):
        with pytest.raises(InputError, match=match) as caught:
            ask()
        assert REPO in str(caught.value)
        assert "\n" not in str(caught.value)


def test_without_a_network_what_was_fetched_is_taken(finished, hub, monkeypatch):
    push(finished, REPO)
    before = download(REPO)
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download(REPO) == before
    with pytest.raises(InputError, match="ada/other cannot be reached, and is not in the hub's ca"):
        download("ada/other")
    with pytest.raises(InputError, match="cannot be reached: HF_HUB_OFFLINE is set"):
        push(finished, REPO)
    assert len(hub.requests) == asked


def test_a_hub_that_does_not_answer(finished, hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for ask in (lambda: push(finished, REPO), lambda: download(REPO)):
        with pytest.raises(InputError, match=f"{REPO} cannot be reached"):
            ask()


def test_a_folder_that_cannot_be_written_is_named(finished, hub, tmp_path):
    push(finished, REPO)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=rf"{REPO} cannot be written to this disk: .*directory"):
        download(REPO, into=tmp_path / "file" / "run")


@pytest.mark.parametrize("token", [TOKEN, "hf_with\x7fcontrol", "hf_ünicode", "hf_in two words"])
def test_the_token_is_nowhere_but_in_the_requests(finished, hub, monkeypatch, caplog, token, capfd):
    """Not in what is published, raised, logged or printed, however it is refused."""
    monkeypatch.setenv("HF_TOKEN", token)
    refusals: list[InputError] = []
    for status in (None, 400, 401, 500):
        hub.refusal = status
        for ask in (lambda: push(finished, REPO), lambda: download(REPO)):
            try:
                ask()
            except InputError as error:
                refusals.append(error)
    assert all(error.__context__ is None for error in refusals)
    assert any("[token]" in str(error) for error in refusals) or not token.isascii()
    said = ["".join(traceback.format_exception(error)) for error in refusals]
    said += [caplog.text, *capfd.readouterr()]
    for repository in hub.repositories.values():
        said += texts(repository.files).values()
    secret = token.removeprefix("hf_")
    assert not any(secret in text or repr(secret)[1:-1] in text for text in said)
    if token == TOKEN:
        assert any(sent == f"Bearer {TOKEN}" for _, _, sent in hub.requests)
        assert REPO in hub.repositories
    assert huggingface_hub.get_token() == token


def test_a_run_is_pushed_and_opened_by_its_name(finished, hub, groupsae, tmp_path):
    code, out, err = groupsae("push", finished, REPO, "--license", "mit")
    assert code == 0, err
    assert REPO in out
    assert hub.repositories[REPO].private
    fetched, own = Run(f"hub://{REPO}"), Run(finished)
    for layer in range(3):  # without the host model, whose folder is of another machine
        view, sae, x = fetched.layer_sae(layer), own.sae(layer), torch.randn(7, 32)
        torch.testing.assert_close(view(x), sae(x, layer))
    code, out, err = groupsae("push", finished, "no-owner")
    assert code == 2
    assert "no-owner" in err
    assert TOKEN not in out + err


def test_a_run_is_attached_to_a_model(finished):
    run = Run(finished)
    ids = torch.randint(2, 96, (2, 6))
    with run.attached(layers=[1], partition="baseline") as saes:
        saes.record()
        run.host.model(input_ids=ids)
    (latents,) = saes.latents[1]
    x = run.host.residual_streams(ids, [1])[1]
    expected = run.saes()["baseline/layers-01"].encode(x, 1)
    torch.testing.assert_close(latents.dense(48), expected.dense(48))


def test_saes_of_other_libraries_are_read_from_the_hub(finished, hub, tmp_path):
    own = Run(finished)
    folders = own.export("sae-lens", tmp_path / "exported")
    files = {
        f"{prefix}/{folder.name}/{path.name}": path.read_bytes()
        for prefix in ("kept", "other")
        for folder in folders.values()
        for path in folder.iterdir()
    }
    hub.repositories[REPO] = Repository(
        private=True, files=files | {"kept/evil.py": b"1"}, commits=1
    )
    saes = import_saes([Path(f"hub://{REPO}/kept")])
    assert list(saes) == [f"baseline/layers-{layer:02d}" for layer in range(3)]
    x = torch.randn(9, 32)
    for layer, sae in own.subjects()[0].saes.items():
        torch.testing.assert_close(saes[f"baseline/layers-{layer:02d}"](x, layer), sae(x, layer))
    fetched = {path.name for path in (tmp_path / "cache").rglob("*")}
    assert "evil.py" not in fetched
    assert not list((tmp_path / "cache").rglob("other*"))
    with pytest.raises(InputError, match="has no folder 'nowhere'; it holds kept"):
        import_saes([Path(f"hub://{REPO}/nowhere")])
    hub.repositories[REPO].files["kept/../../evil.json"] = b"{}"
    with pytest.raises(InputError, match="leads out of its folder"):
        import_saes([Path(f"hub://{REPO}/kept")])
