from __future__ import annotations

import copy
from collections import Counter
from contextlib import contextmanager
from functools import cache, partial

import pytest
import torch
from hypothesis import given as for_any
from hypothesis import settings
from hypothesis import strategies as st

from groupsae.host.ahead import ContextsAhead
from groupsae.host.model import HostModel
from groupsae.host.tokens import EndOfText
from groupsae.sae import SAE, SAEConfig
from groupsae.training.batches import MixedBatch, MixedBatches, NormLimit
from groupsae.training.side_stream import SideStream
from tests.host.tiny_models import tiny_model


def make_sae(layers: tuple[int, ...], seed: int = 0) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    return SAE(
        SAEConfig(d_model=32, d_sae=64, k=4, layers=layers),
        mean=torch.randn(len(layers), 32, generator=generator),
        scale=torch.rand(len(layers), generator=generator) + 0.5,
        generator=generator,
    )


def make_batches(host, corpus, saes, **changes) -> MixedBatches:
    settings = {
        "total_tokens": 2048,
        "batch_tokens": 128,
        "buffer_tokens": 512,
        "contexts": 8,
        "special": (0,),
        "seed": 3,
    }
    stream = changes.pop("stream", None) or corpus.train()
    return MixedBatches(host, stream, saes, **(settings | changes))


def rows_of(x):
    return [tuple(row) for row in x.tolist()]


def normalised_rows(host, corpus, sae, layer, contexts=200):
    """Every non-special token's row as the SAE should see it, computed without the buffer."""
    ids = corpus.train().next_contexts(contexts)
    x = host.residual_streams(ids, [layer])[layer][ids != 0]
    member = sae.layers.index(layer)
    return (x - sae.mean[member]) * sae.scale[member]


@cache
def norms_and_limit(host, corpus, layers, contexts=200):
    """Every non-special token's norm by layer, and a limit that many of them exceed."""
    ids = corpus.train().next_contexts(contexts)
    streams = host.residual_streams(ids, list(layers))
    norms = {layer: x[ids != 0].norm(dim=-1) for layer, x in streams.items()}
    return norms, NormLimit(1.2, {layer: float(norm.mean()) for layer, norm in norms.items()})


def nearest(rows, table):
    """For each row its distance to the nearest row of the table, and which that is."""
    distances = torch.cdist(rows.double(), table.double())
    return distances.min(1)


def test_every_row_is_one_token_at_one_member_layer_and_none_comes_twice(host, corpus):
    saes = {"group": make_sae((0, 1, 2))}
    batches = make_batches(host, corpus, saes)
    rows = torch.cat([batches.next()["group"].x for _ in range(2048 // 128)])
    tables = [normalised_rows(host, corpus, saes["group"], layer) for layer in (0, 1, 2)]
    distance, which = nearest(rows, torch.cat(tables))
    assert distance.max() < 1e-4
    token, times = (which % len(tables[0])).unique(return_counts=True)
    table = tables[0].double()
    alike = (torch.cdist(table[token], table) < 1e-4).sum(1)  # equal first tokens, say
    assert (times <= alike).all(), "a token was handed out twice"


def test_member_layers_are_drawn_per_token_and_uniformly(host, corpus):
    saes = {"group": make_sae((0, 1, 2))}
    batches = make_batches(host, corpus, saes)
    rows = torch.cat([batches.next()["group"].x for _ in range(2048 // 128)])
    tables = [normalised_rows(host, corpus, saes["group"], layer) for layer in (0, 1, 2)]
    layer = nearest(rows, torch.cat(tables)).indices // len(tables[0])
    counts = Counter(layer.tolist())
    for member in range(3):  # a binomial: 683 on average, a standard deviation of 21
        assert abs(counts[member] - 2048 / 3) < 5 * 21
    assert 1 < len(set(layer[:16].tolist())), "layers must mix within a batch"


def test_groups_and_baseline_see_the_same_tokens_in_the_same_places(host, corpus):
    saes = {"group": make_sae((0, 1)), "zero": make_sae((0,)), "one": make_sae((1,))}
    batches = make_batches(host, corpus, saes)
    tables = {
        name: [normalised_rows(host, corpus, sae, layer) for layer in sae.layers]
        for name, sae in saes.items()
    }
    for _ in range(4):
        batch = batches.next()
        tokens = {
            name: nearest(batch[name].x, torch.cat(tables[name])).indices % len(tables[name][0])
            for name in saes
        }
        assert torch.equal(tokens["group"], tokens["zero"])
        assert torch.equal(tokens["group"], tokens["one"])


def test_a_baseline_does_not_depend_on_the_groups_beside_it(host, corpus):
    alone = make_batches(host, corpus, {"one": make_sae((1,))})
    beside = make_batches(host, corpus, {"group": make_sae((0, 1, 2)), "one": make_sae((1,))})
    for _ in range(8):
        assert torch.equal(alone.next()["one"].x, beside.next()["one"].x)


def test_uniform_batches_are_those_of_the_documented_draws(host, corpus):
    """Recomputed row by row: a layer draw per SAE and forward, one draw of rows per batch."""
    saes = {"group": make_sae((0, 1, 2)), "one": make_sae((1,)), "two": make_sae((1, 2))}
    batches = make_batches(host, corpus, saes)
    stream, rows_of_sae = corpus.train(), {name: [] for name in saes}
    layer_draws, row_draws = (torch.Generator().manual_seed(2 * 3 + i) for i in (0, 1))
    for step in range(16):
        while len(rows_of_sae["one"]) < min(512, 2048 - 128 * step):
            missing = 2048 - 128 * step - len(rows_of_sae["one"])
            ids = stream.next_contexts(min(8, -(-missing // 16)))
            streams = host.residual_streams(ids, [0, 1, 2])
            for name, sae in saes.items():
                layers = [sae.layers[0]] * int((ids != 0).sum())
                if len(sae.layers) > 1:
                    draws = torch.randint(len(sae.layers), (len(layers),), generator=layer_draws)
                    layers = [sae.layers[member] for member in draws]
                kept = {layer: streams[layer][ids != 0] for layer in sae.layers}
                rows_of_sae[name] += [
                    (sae.normalize(kept[layer][token], layer), sae.layers.index(layer))
                    for token, layer in enumerate(layers)
                ]
        drawn = torch.randperm(len(rows_of_sae["one"]), generator=row_draws)[:128].tolist()
        batch = batches.next()
        for name, rows in rows_of_sae.items():
            assert torch.equal(batch[name].x, torch.stack([rows[row][0] for row in drawn]))
            assert batch[name].members.tolist() == [rows[row][1] for row in drawn]
            left = len(rows) - 128
            gaps = sorted(row for row in drawn if row < left)
            movers = [row for row in range(left, len(rows)) if row not in set(drawn)]
            for gap, mover in zip(gaps, movers, strict=True):
                rows[gap] = rows[mover]
            del rows[left:]


@contextmanager
def reading(host, special=(0,), limit=None):
    """Notes what the host is asked for: a function that gives the text before each trained token,
    which tells it from the others, and its residual stream at each layer.
    """
    visit, texts, streams, kept = host.visit, [], {}, []

    def noted(input_ids, visitors):
        ok = ~torch.isin(input_ids, torch.tensor(special)).flatten()

        def both(layer, x):
            streams.setdefault(layer, []).append(x.flatten(0, 1).clone())
            if limit is not None:
                ok.logical_and_(~limit.exceeded(streams[layer][-1], layer))
            visitors[layer](x)

        visit(input_ids, {layer: partial(both, layer) for layer in visitors})
        texts.extend(tuple(ids[: i + 1]) for ids in input_ids.tolist() for i in range(len(ids)))
        kept.append(ok)

    def result():
        chosen = torch.cat(kept)
        tokens = [text for text, ok in zip(texts, chosen.tolist(), strict=True) if ok]
        return tokens, {layer: torch.cat(x)[chosen] for layer, x in streams.items()}

    host.visit = noted
    try:
        yield result
    finally:
        del host.visit


def tokens_by_member(sae, batch, read):
    """Which token each row of a batch is, member by member: rows are found bit by bit."""
    texts, streams = read
    found = []
    for member, layer in enumerate(sae.layers):
        x = sae.normalize(streams[layer], layer)
        table = dict(zip(rows_of(x), texts, strict=True))
        found.append(Counter(table[row] for row in rows_of(batch.x[batch.members == member])))
    return found


GROUPS = st.sampled_from([((0, 1, 2), (1,)), ((0,), (1, 2)), ((0, 1), (0, 1, 2), (2,))])


@settings(deadline=None, max_examples=20)
@for_any(
    sampling=st.sampled_from(["uniform", "balanced", "all"]),
    groups=GROUPS,
    batch_tokens=st.integers(1, 60),
    more=st.sampled_from([0, 1, 150]),
    contexts=st.integers(2, 9),
    limited=st.booleans(),
    seed=st.integers(0, 99),
)
def test_each_token_is_used_once_at_a_layer_or_at_all(
    host, corpus, sampling, groups, batch_tokens, more, contexts, limited, seed
):
    saes = {str(layers): make_sae(layers) for layers in groups}
    limit = norms_and_limit(host, corpus, (0, 1, 2))[1] if limited else None
    batches = make_batches(
        host,
        corpus,
        saes,
        layer_sampling=sampling,
        total_tokens=7 * batch_tokens,
        batch_tokens=batch_tokens,
        buffer_tokens=batch_tokens + more,
        contexts=contexts,
        norm_limit=limit,
        seed=seed,
    )
    with reading(host, limit=limit) as result:
        handed_out = [batches.next() for _ in range(7)]
    read, state = result(), batches.state().rows
    assert batches.excluded.kept == len(read[0])
    for name, sae in saes.items():
        x, members = (state[name][part].flatten(0, 1) for part in ("buffer", "members"))
        parts = [batch[name] for batch in handed_out] + [MixedBatch(x, members.long())]
        *counts, rest = [
            torch.bincount(p.members, minlength=len(sae.layers)).tolist() for p in parts
        ]
        found = [tokens_by_member(sae, part, read) for part in parts]
        by_member = [sum(counters, Counter()) for counters in zip(*found, strict=True)]
        if sampling == "all":
            assert by_member == [Counter(read[0])] * len(sae.layers)
            for part, batch in zip(found, handed_out, strict=False):
                assert part == [part[0]] * len(sae.layers), "all rows of a token in one batch"
                assert len(batch[name].x) == batch_tokens * len(sae.layers)
        else:
            assert sum(by_member, Counter()) == Counter(read[0])
            assert [sum(count) for count in counts] == [batch_tokens] * 7
        if sampling == "balanced":
            if not limited:
                counts.append(rest)
            for start in range(len(counts)):
                for end in range(start + 1, len(counts) + 1):
                    total = torch.tensor(counts[start:end]).sum(0)
                    assert total.max() - total.min() <= 1


def test_balanced_batches_of_one_layer_and_their_text_are_those_of_uniform(host, corpus):
    saes = {"group": make_sae((0, 1, 2)), "one": make_sae((1,))}
    uniform, balanced = (
        make_batches(host, corpus, saes, layer_sampling=name) for name in ("uniform", "balanced")
    )
    for _ in range(16):
        one, other = uniform.next(), balanced.next()
        assert_same(([{"one": other["one"]}], ""), ([{"one": one["one"]}], ""))
        assert balanced.stream.state_dict() == uniform.stream.state_dict()


def test_a_small_buffer_that_a_norm_limit_unbalances_grows_and_stays_balanced(host, corpus):
    saes = {"group": make_sae((0, 1, 2))}
    limit = norms_and_limit(host, corpus, (0, 1, 2))[1]
    sizes = {"batch_tokens": 96, "buffer_tokens": 96, "contexts": 1, "total_tokens": 96 * 12}
    batches = make_batches(host, corpus, saes, norm_limit=limit, layer_sampling="balanced", **sizes)
    room = batches.buffer.shape[1]
    for step in range(12):
        assert torch.bincount(batches.next()["group"].members).tolist() == [32] * 3
        if step == 6:
            state = saved(batches)
    assert room < batches.buffer.shape[1] == batches.members.shape[1]
    again = make_batches(host, corpus, saes, norm_limit=limit, layer_sampling="balanced", **sizes)
    again.load_state(state)
    given(again)
    for name, tensor in flat(saved(batches)).items():
        assert torch.equal(flat(saved(again))[name], tensor), name


def test_layers_are_drawn_in_proportion_to_their_weights(host, corpus):
    saes = {"group": make_sae((0, 1, 2)), "two": make_sae((1, 2))}
    batches = make_batches(host, corpus, saes, layer_weights={0: 2.0, 2: 0.5})
    drawn = [batches.next() for _ in range(16)]
    for name, shares in {"group": (4 / 7, 2 / 7, 1 / 7), "two": (2 / 3, 1 / 3)}.items():
        found = torch.bincount(torch.cat([batch[name].members for batch in drawn]))
        for count, share in zip(found.tolist(), shares, strict=True):
            assert abs(count - 2048 * share) < 5 * (2048 * share * (1 - share)) ** 0.5


def test_a_batch_mixes_the_tokens_of_many_contexts(host, corpus):
    saes = {"one": make_sae((1,))}
    batches = make_batches(host, corpus, saes)
    table = normalised_rows(host, corpus, saes["one"], 1)
    last = torch.cat([batches.next()["one"].x for _ in range(8)])[-128:]
    context = nearest(last, table).indices // 16
    assert len(set(context.tolist())) > 30


def test_special_tokens_are_left_out_and_counted(host, corpus):
    batches = make_batches(host, corpus, {"one": make_sae((1,))})
    for _ in range(16):
        batches.next()
    stream = corpus.train()
    read = stream.next_contexts(batches.stream.tokens_seen // 16)
    assert batches.excluded.special == (read == 0).sum().item() > 0
    assert batches.excluded.kept == (read != 0).sum().item()


def test_no_more_text_is_read_than_the_tokens_take(host, corpus):
    batches = make_batches(host, corpus, {"one": make_sae((1,))})
    for _ in range(16):
        batches.next()
    assert batches.handed_out == 2048
    assert batches.excluded.kept < 2048 + 8 * 16


def test_long_tokens_are_left_out_of_every_sae_and_counted(host, corpus):
    saes = {"group": make_sae((0, 1)), "one": make_sae((1,))}
    norms, limit = norms_and_limit(host, corpus, (0, 1))
    batches = make_batches(host, corpus, saes, norm_limit=limit)
    rows = torch.cat([batches.next()["one"].x for _ in range(16)])
    read = batches.excluded.kept + batches.excluded.long
    too_long = torch.stack([norm > 1.2 * norm.mean() for norm in norms.values()]).any(0)[:read]
    assert batches.excluded.long == too_long.sum().item() > 0
    table = normalised_rows(host, corpus, saes["one"], 1)[:read][~too_long]
    assert nearest(rows, table).values.max() < 1e-4


def test_norms_beyond_float16_are_compared_as_they_are():
    x = torch.full((1, 1024), 4000.0, dtype=torch.float16)  # of norm 128,000
    assert not NormLimit(2.0, {0: 100_000.0}).exceeded(x, 0)
    assert NormLimit(1.2, {0: 100_000.0}).exceeded(x, 0)


@pytest.mark.parametrize("sampling", ["uniform", "balanced", "all"])
def test_state_continues_with_the_same_batches(host, corpus, sampling):
    saes = {"group": make_sae((0, 1, 2)), "one": make_sae((1,))}
    batches = make_batches(host, corpus, saes, layer_sampling=sampling)
    for _ in range(5):
        batches.next()
    state = saved(batches)
    expected = [batches.next() for _ in range(6)]

    continued = make_batches(host, corpus, saes, layer_sampling=sampling, seed=99)
    continued.load_state(state)
    for batch in expected:
        assert_same(([continued.next()], ""), ([batch], ""))


def test_running_out_of_text_is_said(host, corpus):
    batches = make_batches(host, corpus, {"one": make_sae((1,))}, total_tokens=10_000_000)
    with pytest.raises(EndOfText, match="tokens"):
        while True:
            batches.next()


def test_a_nan_in_the_activations_is_named_by_its_layer(host, corpus):
    batches = make_batches(host, corpus, {"group": make_sae((0, 1, 2))})
    batches.next()
    assert batches.not_finite() == []
    weight = host.blocks[1].mlp.dense_4h_to_h.bias
    before = weight.detach().clone()
    try:
        weight.data[3] = float("nan")
        for _ in range(8):
            batches.next()
    finally:
        weight.data.copy_(before)
    assert batches.not_finite() == [1, 2]


class LateStream:
    """A side stream whose work is done as late as it may be: nobody sees it before `join`."""

    def __init__(self):
        self.shared, self.late = [], []

    def share(self, *tensors):
        self.shared += tensors

    @contextmanager
    def work(self):
        self.join()
        before = [tensor.clone() for tensor in self.shared]
        yield
        self.late = [tensor.clone() for tensor in self.shared]
        for tensor, value in zip(self.shared, before, strict=True):
            tensor.copy_(value)

    def join(self):
        for tensor, value in zip(self.shared, self.late):  # noqa: B905, there may be none
            tensor.copy_(value)
        self.late = []


@pytest.fixture
def late_stream(monkeypatch):
    def side_stream(device, *, overlap):
        return LateStream() if overlap else SideStream(device, overlap=False)

    monkeypatch.setattr("groupsae.training.batches.SideStream", side_stream)


def copied(batch):
    return MixedBatch(batch.x.clone(), batch.members.clone())


def given(batches, number=None):
    """The next batches, and how the text is said to end if it does."""
    end, rows = "", []
    try:
        while len(rows) != number and batches.handed_out < batches.total_tokens:
            rows.append({name: copied(batch) for name, batch in batches.next().items()})
    except EndOfText as error:
        end = str(error)
    return rows, end


def assert_same(these, those):
    assert these[1] == those[1]
    for this, that in zip(these[0], those[0], strict=True):
        assert this.keys() == that.keys()
        for name in this:
            assert torch.equal(this[name].x, that[name].x)
            assert torch.equal(this[name].members, that[name].members)


def saved(batches):
    return copy.deepcopy(batches.state())


def flat(state):
    """All tensors of a state."""
    rows = {f"{name}.{key}": t for name, own in state.rows.items() for key, t in own.items()}
    return state.draws | rows


# A forward fills several batches; several forwards fill one; the buffer is but one batch.
SIZES = [
    {"contexts": 32},
    {"contexts": 5},
    {"contexts": 5, "buffer_tokens": 128},
]


@pytest.mark.usefixtures("late_stream")
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
class TestOverlap:
    @pytest.fixture
    def make(self, host, corpus, sizes, limited):
        saes = {"group": make_sae((0, 1, 2)), "one": make_sae((1,))}
        limit = norms_and_limit(host, corpus, (0, 1, 2))[1] if limited else None

        def make(**changes):
            settings = {"total_tokens": 1280, "norm_limit": limit, **sizes, **changes}
            return make_batches(host, corpus, saes, **settings)

        return make

    @pytest.mark.parametrize("sampling", ["uniform", "balanced", "all"])
    def test_it_changes_no_batch_and_reads_no_more(self, make, sampling):
        plain, overlapping = (make(overlap=o, layer_sampling=sampling) for o in (False, True))
        assert_same(given(overlapping), given(plain))
        assert overlapping.excluded == plain.excluded
        assert overlapping.stream.state_dict() == plain.stream.state_dict()
        assert bool(plain.excluded.long) == (plain.norm_limit is not None)

    def test_what_the_next_batch_needs_is_read_when_one_is_handed_out(self, make):
        plain, overlapping = make(overlap=False), make(overlap=True)
        plain.next()
        while plain.handed_out < plain.total_tokens:
            before = plain.stream.tokens_seen
            plain.next()
            overlapping.next()
            needed, read = plain.stream.tokens_seen, overlapping.stream.tokens_seen
            if plain.norm_limit is None:
                assert read == needed
            else:  # how many rows of a forward stay is not known yet
                assert before < read <= needed or before == read == needed
                assert read <= before + plain.contexts * 16

    @pytest.mark.parametrize("then", [False, True])
    def test_a_state_continues_with_the_same_batches(self, make, then):
        expected = given(make(overlap=False))
        batches = make(overlap=True)
        first, _ = given(batches, 5)
        state = saved(batches)
        assert_same((first + given(batches, 4)[0], ""), (expected[0][:9], ""))
        continued = make(overlap=then, seed=99)
        given(continued, 2)  # it may be under way already
        continued.load_state(state)
        assert_same((first + given(continued)[0], ""), expected)

    def test_text_that_ends_is_missed_by_the_batch_that_needs_it_alone(self, make):
        plain, overlapping = (make(overlap=o, total_tokens=10**7) for o in (False, True))
        for batches in (plain, overlapping):
            with pytest.raises(EndOfText) as end:
                batches.stream.next_contexts(10**5)
            batches.stream.next_contexts(end.value.contexts_left - 70)
        expected = given(plain)
        assert "is used up" in expected[1]
        assert len(expected[0]) > 1
        assert_same(given(overlapping), expected)
        assert saved(overlapping).rest == saved(plain).rest
        for name, tensor in flat(saved(overlapping)).items():
            assert torch.equal(tensor, flat(saved(plain))[name])
        with pytest.raises(EndOfText):
            overlapping.next()

    def test_a_nan_is_seen_when_it_is_read(self, make, host):
        batches = make(overlap=True)
        batches.next()
        assert batches.not_finite() == []
        bias = host.blocks[1].mlp.dense_4h_to_h.bias
        before, read = bias.detach().clone(), batches.stream.tokens_seen
        try:
            bias.data[3] = float("nan")
            while batches.stream.tokens_seen == read:
                batches.next()
        finally:
            bias.data.copy_(before)
        assert batches.not_finite()[0] == 1


def test_contexts_read_ahead_give_the_same_batches_and_states(host, corpus):
    saes = {"group": make_sae((0, 1, 2)), "one": make_sae((1,))}
    plain = make_batches(host, corpus, saes)
    with ContextsAhead(corpus.train()) as stream:
        ahead = make_batches(host, corpus, saes, stream=stream)
        for _ in range(2):
            assert_same(given(ahead, 5), given(plain, 5))
            state = saved(plain)
            assert saved(ahead).rest == state.rest
            ahead.load_state(state)


def test_on_the_cpu_nothing_is_read_before_it_is_needed(host, corpus):
    batches = make_batches(host, corpus, {"one": make_sae((1,))})
    batches.next()
    assert not batches.overlap
    assert batches.filled < batches.buffer_tokens + 8 * 16 - 128


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("sampling", ["uniform", "balanced", "all"])
def test_on_cuda_overlap_changes_no_batch(corpus, sizes, limited, sampling):
    host = HostModel(tiny_model("gpt_neox").cuda())
    saes = {"group": make_sae((0, 1, 2)).cuda(), "one": make_sae((1,)).cuda()}
    limit = norms_and_limit(host, corpus, (0, 1, 2))[1] if limited else None

    def run(overlap):
        batches = make_batches(
            host,
            corpus,
            saes,
            norm_limit=limit,
            layer_sampling=sampling,
            overlap=overlap,
            **sizes,
        )
        assert batches.overlap is overlap
        rows = []
        for step in range(16):
            rows += given(batches, 1)[0]
            torch.cuda._sleep(3_000_000)  # as SAEs that step: what does not wait reads too early
            scratch = torch.full((64, 1024, 32), float("nan"), device="cuda")  # freed memory's use
            if step == 7:
                state = saved(batches)
            del scratch
        assert batches.not_finite() == []
        batches.load_state(state)
        again = given(batches)[0]
        assert_same((again, ""), (rows[8:], ""))
        return rows, ""

    assert make_batches(host, corpus, saes).overlap
    assert_same(run(True), run(False))
