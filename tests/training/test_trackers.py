from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest

from groupsae.config import Config
from groupsae.errors import InputError
from groupsae.training.trackers import open_tracker

RECORDS = [{"step": s, "tokens": 10 * s, "sae": "layers-00-01", "fvu": 1 / s} for s in (1, 2, 3)]


def test_records_are_json_lines(tmp_path):
    with open_tracker("none", tmp_path, 0, Config()) as log:
        for record in RECORDS:
            log(record)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == RECORDS


def test_lines_after_the_step_to_continue_from_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS) + '{"step": 1, "tok')
    with open_tracker("none", tmp_path, 2, Config()) as log:
        log({"step": 4})
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [1, 2, 4]


@pytest.mark.parametrize("line", [b"{oops\n", b"3\n", b"{}\n", b"\xff\n"])
def test_damaged_metrics_are_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(line)
    with (
        pytest.raises(InputError, match=r"metrics\.jsonl is damaged .* remove it"),
        open_tracker("none", tmp_path, 2, Config()),
    ):
        pass


def test_wandb_gets_every_value_by_sae(tmp_path, monkeypatch):
    sent, settings = [], {}

    class Session:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def log(self, values):
            sent.append(values)

    wandb = ModuleType("wandb")
    wandb.init = lambda **given: settings.update(given) or Session()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with open_tracker("wandb", tmp_path, 0, Config()) as log:
        log(RECORDS[1])
    assert sent == [{"layers-00-01/fvu": 0.5, "tokens": 20}]
    assert settings["config"]["sae"]["k"] == 32


def test_tensorboard_gets_every_value_by_sae(tmp_path, monkeypatch):
    sent = []

    class SummaryWriter:
        def __init__(self, directory):
            self.directory = directory

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def add_scalar(self, key, value, step):
            sent.append((key, value, step))

    tensorboard = ModuleType("torch.utils.tensorboard")
    tensorboard.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    with open_tracker("tensorboard", tmp_path, 0, Config()) as log:
        log(RECORDS[1])
    assert sent == [("layers-00-01/fvu", 0.5, 2)]


@pytest.mark.parametrize(
    ("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")]
)
def test_a_missing_tracker_is_named_with_its_extra(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    message = rf"training\.tracker: {name} is not installed; `pip install 'groupsae\[{name}\]'`"
    with pytest.raises(InputError, match=message), open_tracker(name, tmp_path, 0, Config()):
        pass
