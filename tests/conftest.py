"""What every test may ask for."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from groupsae import cli
from groupsae.host.model import HostModel
from groupsae.host.tokens import Corpus, open_corpus
from tests.host.tiny_models import tiny_model, tiny_tokenizer
from tests.webdriver import CHROMIUM, DRIVER, Browser, driver

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and text beside the checkout; skips where there is none."""
    if not (_SHARED / "models" / "stories3M").is_dir():
        pytest.skip("no folder ../shared with models/stories3M beside this checkout")
    return _SHARED


@pytest.fixture(scope="session")
def host() -> HostModel:
    """A random-weight GPT-NeoX of three layers, d_model 32, a vocabulary of 96 and no tokenizer."""
    return HostModel(tiny_model("gpt_neox"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """4,000 documents of 5 to 40 random token ids; 0 is special. Contexts of 16 tokens."""
    random = Random(0)
    path = tmp_path_factory.mktemp("corpus") / "ids.jsonl"
    documents = (
        [0, *(random.randrange(2, 96) for _ in range(random.randrange(4, 40)))] for _ in range(4000)
    )
    path.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in documents))
    return open_corpus(path, tokenizer=None, context_length=16, held_out=0.2)


@pytest.fixture(scope="session")
def tiny_host_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny GPT-NeoX with its tokenizer, as a local folder."""
    folder = tmp_path_factory.mktemp("tiny-host")
    tiny_model("gpt_neox").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,000 documents of words that the tiny tokenizer knows."""
    random = Random(0)
    path = tmp_path_factory.mktemp("text") / "words.jsonl"
    documents = (
        " ".join(f"w{random.randrange(2, 96)}" for _ in range(random.randrange(5, 40)))
        for _ in range(3000)
    )
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A tab of a headless Chromium; skips where there is none. Mark such tests `browser`."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium with chromedriver on this machine")
    with driver() as address:
        tab = Browser(address, tmp_path_factory.mktemp("profile"))
        yield tab
        tab.close()


@pytest.fixture
def tiny_config(tiny_host_folder: Path, tiny_text: Path) -> list[str]:
    """Overrides for a run on the tiny host that takes a second or two."""
    return [
        f"host.name={tiny_host_folder}",
        f"tokens.source={tiny_text}",
        "tokens.context_length=16",
        "tokens.held_out=0.2",
        "grouping.layers=all",
        "grouping.distance_tokens=2000",
        "grouping.groups=2",
        "sae.k=4",
        "sae.d_sae=48",
        "training.tokens=4096",
        "training.batch_tokens=256",
        "training.buffer_tokens=1024",
        "training.log_every=4",
        "evaluation.tokens=1000",
        "report.formats=[png]",
    ]


@pytest.fixture
def groupsae(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; returns exit code, standard output and error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["groupsae", *map(str, arguments)])
        monkeypatch.setattr(cli.out, "_width", 100)
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
