from __future__ import annotations

import threading

import pytest
import torch

from groupsae.config import Config
from groupsae.grouping.distance import Moments
from groupsae.host.tokens import EndOfText
from groupsae.training.session import train_saes


def train(host, corpus, directory, **training):
    settings = {"batch_tokens": 128, "buffer_tokens": 256, "tokens": 512, "host_batch_contexts": 4}
    config = Config(sae={"k": 4, "d_sae": 48}, training=settings | training)
    layers = (0, 1, 2)
    ones = torch.ones(3, dtype=torch.float64)
    moments = Moments(layers, torch.zeros(3, 32, dtype=torch.float64), ones, ones, 1000)
    directory.mkdir()
    return train_saes(
        host, corpus.train(), moments, [[0, 1], [2]], config, directory=directory, key="key"
    )


def readers():
    return [thread for thread in threading.enumerate() if "contexts-ahead" in thread.name]


def test_its_reader_is_ended_when_it_is_done_and_when_it_fails(host, corpus, tmp_path):
    assert train(host, corpus, tmp_path / "done")["steps"] == 4
    assert not readers()
    with pytest.raises(EndOfText):
        more = {"tokens": 10**7, "buffer_tokens": 10**5, "host_batch_contexts": 512}
        train(host, corpus, tmp_path / "fails", **more)
    assert not readers()
