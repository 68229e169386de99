from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsae.errors import InputError
from groupsae.host.ahead import ContextsAhead
from groupsae.host.tokens import Corpus, EndOfText, TokenStream
from tests.host.test_tokens import any_joints, corpus_of, ids_documents

_NAME = "groupsae-contexts-ahead"


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == _NAME]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not readers()


def wait_until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.001)


def numbers(contexts: int = 100) -> Corpus:
    """Contexts of 8 tokens and an end."""
    return corpus_of([np.arange(1, 8 * contexts)])


class Watched(TokenStream):
    """A stream that counts its contexts, and raises or waits before the n-th."""

    def __init__(self, corpus: Corpus) -> None:
        super().__init__(corpus, "train")
        self.read = 0
        self.before: dict[int, Callable[[], Any]] = {}

    def next_contexts(self, n: int) -> torch.Tensor:
        self.before.pop(self.read + 1, lambda: None)()
        contexts = super().next_contexts(n)
        self.read += n
        return contexts


def attempt(stream: TokenStream | ContextsAhead, n: int) -> Any:
    """What asking for `n` contexts gives: ids, or how the text is said to end."""
    try:
        return stream.next_contexts(n).tolist()
    except EndOfText as end:
        return str(end), end.contexts_left


operations = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 7)),
    st.tuples(st.just("save"), st.just(0)),
    st.tuples(st.just("restore"), st.integers(0, 5)),
    st.tuples(st.just("close"), st.just(0)),
)


@settings(deadline=None, max_examples=60)
@given(
    documents=ids_documents,
    joints=any_joints,
    context_length=st.integers(2, 20),
    repeat=st.booleans(),
    ahead=st.integers(1, 9),
    steps=st.lists(operations, max_size=20),
)
def test_whatever_is_done_it_gives_what_the_stream_gives(
    documents: list[np.ndarray],
    joints: Any,
    context_length: int,
    repeat: bool,
    ahead: int,
    steps: list[tuple[str, int]],
) -> None:
    corpus = corpus_of(documents, joints=joints, context_length=context_length, repeat=repeat)
    plain = TokenStream(corpus, "train")
    saved = [plain.state_dict()]
    with ContextsAhead(TokenStream(corpus, "train"), ahead) as tested:
        assert tested.context_length == context_length
        for step, number in steps:
            if step == "ask":
                assert attempt(tested, number) == attempt(plain, number)
            elif step == "save":
                saved.append(tested.state_dict())
            elif step == "restore":
                plain.load_state_dict(saved[number % len(saved)])
                tested.load_state_dict(saved[number % len(saved)])
            else:
                tested.close()
            assert tested.state_dict() == plain.state_dict()


def test_contexts_are_int64_on_the_cpu() -> None:
    with ContextsAhead(numbers().train()) as ahead:
        contexts = ahead.next_contexts(3)
    assert contexts.dtype == torch.int64
    assert contexts.shape == (3, 8)
    assert contexts.device.type == "cpu"


def test_it_reads_ahead_up_to_the_bound_and_does_not_tell() -> None:
    stream, plain = Watched(numbers()), numbers().train()
    with ContextsAhead(stream, ahead=5) as ahead:
        assert stream.read == 0, "nothing is read before it is asked for"
        for asked in (1, 2, 11):
            assert ahead.next_contexts(asked).equal(plain.next_contexts(asked))
            wait_until(lambda: stream.read == plain.tokens_seen // 8 + 5)
            assert ahead.state_dict() == plain.state_dict()
        time.sleep(0.02)
        assert stream.read == 14 + 5
        assert len(readers()) == 1


def test_a_closed_one_leaves_the_stream_where_the_caller_stands() -> None:
    stream, plain = Watched(numbers()), numbers().train()
    expected = plain.next_contexts(12)
    with ContextsAhead(stream, ahead=5) as ahead:
        ahead.next_contexts(4)
        wait_until(lambda: stream.read == 9)
    assert not readers()
    assert stream.next_contexts(2).equal(expected[4:6])
    assert ahead.next_contexts(6).equal(expected[6:]), "it begins again"
    ahead.close()
    ahead.close()


@pytest.mark.parametrize("error", [InputError("unreadable"), ConnectionError("lost"), SystemExit()])
def test_an_error_comes_after_the_contexts_before_it_and_consumes_nothing(
    error: BaseException,
) -> None:
    def fail() -> None:
        raise error

    stream, plain = Watched(numbers()), numbers().train()
    stream.before[6] = fail
    with ContextsAhead(stream) as ahead:
        assert ahead.next_contexts(3).equal(plain.next_contexts(3))
        assert ahead.next_contexts(2).equal(plain.next_contexts(2))
        wait_until(lambda: not readers())
        with pytest.raises(type(error)) as raised:
            ahead.next_contexts(1)
        assert raised.value is error
        assert ahead.state_dict() == plain.state_dict()
        assert ahead.next_contexts(9).equal(plain.next_contexts(9)), "another try"


def test_a_wrong_token_id_is_said_each_time_it_is_reached() -> None:
    corpus = corpus_of([np.arange(1, 90)], vocab_size=50)
    with ContextsAhead(TokenStream(corpus, "train")) as ahead:
        for _ in range(2):
            with pytest.raises(InputError, match="token id 89"):
                ahead.next_contexts(1)


def test_a_place_in_another_corpus_is_refused_and_nothing_moves() -> None:
    there = numbers(50).train().state_dict()
    plain = numbers().train()
    with ContextsAhead(numbers().train()) as ahead:
        assert ahead.next_contexts(3).equal(plain.next_contexts(3))
        with pytest.raises(InputError, match="another corpus"):
            ahead.load_state_dict(there)
        assert ahead.state_dict() == plain.state_dict()
        assert ahead.next_contexts(3).equal(plain.next_contexts(3))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, in a shell's background job too, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_waiting_loses_nothing() -> None:
    stream, plain = Watched(numbers()), numbers().train()
    reached, gate = threading.Event(), threading.Event()

    def wait() -> None:
        reached.set()
        gate.wait(20)

    def main_waits() -> bool:
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        return frame.f_code.co_name == "next"

    def interrupt() -> None:
        wait_until(lambda: reached.is_set() and main_waits())
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: not main_waits())  # however busy the machine is
        gate.set()

    stream.before[6] = wait
    with ContextsAhead(stream) as ahead:
        assert ahead.next_contexts(3).equal(plain.next_contexts(3))
        other = threading.Thread(target=interrupt)
        other.start()
        with pytest.raises(KeyboardInterrupt):
            ahead.next_contexts(4)
        other.join()
        assert not readers()
        assert ahead.state_dict() == plain.state_dict()
        assert ahead.next_contexts(7).equal(plain.next_contexts(7))


def test_the_thread_of_a_forgotten_one_ends() -> None:
    ahead = ContextsAhead(numbers().train(), ahead=2)
    ahead.next_contexts(1)
    assert len(readers()) == 1
    del ahead
    gc.collect()
    assert not readers()


@pytest.mark.parametrize("end", ["pass", "raise KeyboardInterrupt"])
def test_one_left_open_makes_no_noise_when_the_interpreter_ends(end: str) -> None:
    script = f"""
from tests.host.test_tokens import PLAIN, STORIES, corpus_of
from groupsae.host.ahead import ContextsAhead
corpus = corpus_of(STORIES, tokenizer=PLAIN, repeat=True)
ahead = ContextsAhead(corpus.train(), ahead=10**6)  # it is in the tokenizer most of the time
ahead.next_contexts(1000)
{end}
"""
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
    )
    lines = [line for line in ended.stderr.splitlines() if "is used up" not in line]
    if end == "pass":
        assert (ended.returncode, lines) == (0, [])
    else:
        assert lines[0].startswith("Traceback")
        assert lines[-1] == "KeyboardInterrupt"
        assert ended.stderr.count("Traceback") == 1
