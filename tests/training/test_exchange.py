"""Mixed batches of several processes, as threads of this one that take turns, one at a time."""

from __future__ import annotations

import copy
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from queue import Empty, SimpleQueue

import pytest
import torch
from hypothesis import given as for_any
from hypothesis import settings
from hypothesis import strategies as st

from groupsae.host.tokens import EndOfText
from groupsae.training.batches import NormLimit, State
from groupsae.training.exchange import RowExchange, SharedContexts
from groupsae.training.team import Team
from tests.training.test_batches import (
    assert_same,
    flat,
    given,
    make_batches,
    make_sae,
    norms_and_limit,
    saved,
)

SAES = {"group": make_sae((0, 1, 2)), "one": make_sae((1,)), "two": make_sae((1, 2))}
SAMPLINGS = ["uniform", "balanced", "all"]


class Threads:
    """What `size` threads send one another. All but one stand still, at a message not yet there."""

    def __init__(self, size: int) -> None:
        self.turn = threading.Lock()
        self.mail: dict[tuple[int, int], SimpleQueue] = defaultdict(SimpleQueue)
        self.teams = [ThreadTeam(rank, size, self) for rank in range(size)]

    def run(self, job):
        """What `job` returns for each team."""

        def alone(team):
            with self.turn:
                try:
                    return job(team)
                except BaseException:
                    for other in range(team.size):
                        self.mail[team.rank, other].put(None)
                    raise

        with ThreadPoolExecutor(len(self.teams)) as threads:
            running = [threads.submit(alone, team) for team in self.teams]
        errors = [one.exception() for one in running if one.exception() is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, Gone)):
            raise error
        assert all(queue.empty() for queue in self.mail.values()), "sent, and never received"
        return [one.result() for one in running]

    def receive(self, kind: str, sender: int, receiver: int):
        queue = self.mail[sender, receiver]
        self.turn.release()
        try:
            given = queue.get(timeout=60)
        except Empty:
            raise Gone(f"{receiver} waits for {kind} of {sender}, which sends nothing") from None
        finally:
            self.turn.acquire()
        if given is None:
            raise Gone(f"{receiver} waits for {sender}, which has failed")
        assert given[0] == kind
        return given[1]


class Gone(Exception):
    """What was waited for does not come."""


class ThreadTeam(Team):
    """A team of threads."""

    def __init__(self, rank: int, size: int, threads: Threads) -> None:
        super().__init__(rank, size)
        self.threads = threads

    def share(self, value):
        return self._from_first("value", value)

    def share_tensor(self, tensor):
        tensor.copy_(self._from_first("tensor", tensor))

    def exchange(self, sending, receiving):
        for rank, tensor in sending:
            self.threads.mail[self.rank, rank].put(("rows", tensor.clone()))
        for rank, tensor in receiving:
            sent = self.threads.receive("rows", rank, self.rank)
            assert (sent.shape, sent.dtype) == (tensor.shape, tensor.dtype)
            tensor.copy_(sent)

    def _from_first(self, kind, value):
        if not self.first:
            return self.threads.receive(kind, 0, self.rank)
        for rank in range(1, self.size):
            self.threads.mail[0, rank].put((kind, copy.deepcopy(value)))
        return value


def shared(size, columns, make, *, state=None, number=None):
    """Batches of `size` processes put together, their end, and the state behind them.

    Args:
        columns: The SAEs are dealt over so many processes, and again over so many.
        make: Makes the batches of one process, from a stream and an exchange.
    """
    wanted = [list(SAES)[rank % columns :: columns] for rank in range(size)]

    def job(team):
        exchange = RowExchange(team, wanted)
        with SharedContexts(make.stream(), team, 2 * size) as stream:
            batches = make(stream=stream, exchange=exchange)
            if state is not None:
                batches.load_state(state)
            return given(batches, number), saved(batches)

    results = Threads(size).run(job)
    (_, end), first = results[0]
    for (rows, their_end), own in results:
        assert (len(rows), their_end) == (len(results[0][0][0]), end)
        for name, draw in first.draws.items():
            assert torch.equal(own.draws[name], draw)
        assert own.rest | {"stream": None} == first.rest | {"stream": None}
    steps = [merged(parts) for parts in zip(*(rows for (rows, _), _ in results), strict=True)]
    rows = merged([own.rows for _, own in results])
    assert rows.keys() == SAES.keys()
    return (steps, end), State(first.draws, rows, first.rest)


def merged(parts):
    """All that the processes have; what several have they have alike."""
    found = {}
    for part in parts:
        for name, own in part.items():
            same = found.setdefault(name, own)
            these, those = (
                list(one.values()) if isinstance(one, dict) else list(one) for one in (same, own)
            )
            assert all(map(torch.equal, these, those))
    return found


def assert_same_state(this, that):
    assert this.rest == that.rest
    assert flat(this).keys() == flat(that).keys()
    for name, tensor in flat(that).items():
        assert torch.equal(flat(this)[name], tensor), name


@cache
def place_before_the_end(corpus, contexts):
    stream = corpus.train()
    with pytest.raises(EndOfText) as end:
        stream.next_contexts(10**5)
    stream.next_contexts(end.value.contexts_left - contexts)
    return stream.state_dict()


class Maker:
    """Makes batches of one setting, from the same place in the text on."""

    def __init__(self, host, corpus, *, multiple=None, contexts_left=None, **changes):
        limit = norms_and_limit(host, corpus, (0, 1, 2))[1]
        self.host, self.corpus, self.contexts_left = host, corpus, contexts_left
        self.changes = {"total_tokens": 640, "batch_tokens": 64, "buffer_tokens": 200} | changes
        if multiple is not None:
            self.changes["norm_limit"] = NormLimit(multiple, limit.mean_norm)

    def stream(self):
        stream = self.corpus.train()
        if self.contexts_left is not None:
            stream.load_state_dict(place_before_the_end(self.corpus, self.contexts_left))
        return stream

    def __call__(self, **changes):
        saes = dict(SAES)
        stream = changes.pop("stream", None) or self.stream()
        return make_batches(self.host, self.corpus, saes, stream=stream, **self.changes, **changes)


TEAMS = [(1, 1), (2, 1), (2, 2), (3, 3), (3, 1), (4, 2), (5, 5)]  # processes, and columns of them
SIZES = {
    "contexts": st.integers(1, 8),
    "batch_tokens": st.integers(10, 100),
    "buffer_tokens": st.integers(0, 200),  # beyond a batch
    "total_tokens": st.integers(1, 400),
}


@settings(max_examples=25, deadline=None)
@for_any(
    teams=st.lists(st.sampled_from(TEAMS), min_size=1, max_size=3),
    stops=st.lists(st.integers(0, 5), min_size=2, max_size=2),
    sampling=st.sampled_from(SAMPLINGS),
    multiple=st.none() | st.floats(0.95, 1.3),
    sizes=st.fixed_dictionaries(SIZES),
    contexts_left=st.none() | st.sampled_from([0, 3, 10, 25]),
    special=st.sampled_from([(), (0,), tuple(range(60))]),
)
def test_several_processes_give_the_batches_and_states_of_one(
    host, corpus, teams, stops, sampling, multiple, sizes, contexts_left, special
):
    sizes = sizes | {"buffer_tokens": sizes["batch_tokens"] + sizes["buffer_tokens"]}
    options = {"layer_sampling": sampling, "multiple": multiple, "special": special, **sizes}
    make = Maker(host, corpus, contexts_left=contexts_left, **options)
    alone, state = make(), None
    for (size, columns), number in zip(teams, [*stops[: len(teams) - 1], None], strict=True):
        expected = given(alone, number)
        found, state = shared(size, columns, make, state=state, number=number)
        assert_same(found, expected)
        assert_same_state(state, saved(alone))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("multiple", [None, 1.15])
def test_a_state_of_one_goes_on_in_several_and_theirs_in_one(host, corpus, sampling, multiple):
    make = Maker(host, corpus, layer_sampling=sampling, multiple=multiple, contexts=3)
    expected = given(make())[0]
    alone, again = make(), make()
    found = given(alone, 5)[0]
    (more, _), state = shared(3, 3, make, state=saved(alone), number=3)
    again.load_state(state)
    assert_same((found + more + given(again)[0], ""), (expected, ""))
    assert bool(again.excluded.long) == (multiple is not None)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("multiple", [None, 1.15])
def test_processes_that_read_for_themselves_need_no_other(host, corpus, sampling, multiple):
    make = Maker(host, corpus, layer_sampling=sampling, multiple=multiple)
    alone = make()
    expected = given(alone)
    for name in SAES:
        batches = make(exchange=RowExchange(Team(), [[name]]))
        rows, end = given(batches)
        assert_same((rows, end), ([{name: batch[name]} for batch in expected[0]], ""))
        assert saved(batches).rest == saved(alone).rest
    nothing = make(exchange=RowExchange(Team(), [[]]))
    assert given(nothing)[0] == [{}] * len(expected[0])
    assert saved(nothing).rest == saved(alone).rest


@pytest.mark.parametrize(
    ("sampling", "multiple", "in_turn"),
    [
        ("uniform", None, True),
        ("balanced", None, True),
        ("uniform", 1.15, True),
        ("all", 1.15, True),
        ("balanced", 1.15, False),  # who is next depends on what was dropped
    ],
)
def test_forwards_are_run_in_turn(host, corpus, monkeypatch, sampling, multiple, in_turn):
    make = Maker(host, corpus, layer_sampling=sampling, multiple=multiple, contexts=1)
    runs = Counter()
    visit = host.visit

    def counted(*arguments):
        runs[threading.get_ident()] += 1
        visit(*arguments)

    monkeypatch.setattr(host, "visit", counted)
    shared(3, 3, make)
    forwards = sum(runs.values())
    assert forwards > 40
    assert len(runs) == (3 if in_turn else 1)
    if in_turn and multiple is None:
        assert max(runs.values()) - min(runs.values()) <= 1
    elif in_turn:  # but for the last ones, whose size is not known before
        assert max(runs.values()) - min(runs.values()) <= 5
