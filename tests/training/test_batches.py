from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import pytest
import torch

from groupsae.errors import InputError
from groupsae.host.ahead import ContextsAhead
from groupsae.host.model import HostModel
from groupsae.host.tokens import EndOfText
from groupsae.sae import SAE, SAEConfig
from groupsae.training.batches import MixedBatches, NormLimit
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
    rows = torch.cat([batches.next()["group"] for _ in range(2048 // 128)])
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
    rows = torch.cat([batches.next()["group"] for _ in range(2048 // 128)])
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
            name: nearest(batch[name], torch.cat(tables[name])).indices % len(tables[name][0])
            for name in saes
        }
        assert torch.equal(tokens["group"], tokens["zero"])
        assert torch.equal(tokens["group"], tokens["one"])


def test_a_baseline_does_not_depend_on_the_groups_beside_it(host, corpus):
    alone = make_batches(host, corpus, {"one": make_sae((1,))})
    beside = make_batches(host, corpus, {"group": make_sae((0, 1, 2)), "one": make_sae((1,))})
    for _ in range(8):
        assert torch.equal(alone.next()["one"], beside.next()["one"])


def test_a_batch_mixes_the_tokens_of_many_contexts(host, corpus):
    saes = {"one": make_sae((1,))}
    batches = make_batches(host, corpus, saes)
    table = normalised_rows(host, corpus, saes["one"], 1)
    last = torch.cat([batches.next()["one"] for _ in range(8)])[-128:]
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
    rows = torch.cat([batches.next()["one"] for _ in range(16)])
    read = batches.excluded.kept + batches.excluded.long
    too_long = torch.stack([norm > 1.2 * norm.mean() for norm in norms.values()]).any(0)[:read]
    assert batches.excluded.long == too_long.sum().item() > 0
    table = normalised_rows(host, corpus, saes["one"], 1)[:read][~too_long]
    assert nearest(rows, table).values.max() < 1e-4


def test_norms_beyond_float16_are_compared_as_they_are():
    x = torch.full((1, 1024), 4000.0, dtype=torch.float16)  # of norm 128,000
    assert not NormLimit(2.0, {0: 100_000.0}).exceeded(x, 0)
    assert NormLimit(1.2, {0: 100_000.0}).exceeded(x, 0)


def test_state_continues_with_the_same_batches(host, corpus):
    saes = {"group": make_sae((0, 1, 2)), "one": make_sae((1,))}
    batches = make_batches(host, corpus, saes)
    for _ in range(5):
        batches.next()
    tensors, rest = batches.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    expected = [batches.next() for _ in range(6)]

    continued = make_batches(host, corpus, saes, seed=99)
    continued.load_state(tensors, rest)
    for batch in expected:
        for name, x in continued.next().items():
            assert torch.equal(x, batch[name])


def test_running_out_of_text_is_said(host, corpus):
    batches = make_batches(host, corpus, {"one": make_sae((1,))}, total_tokens=10_000_000)
    with pytest.raises(EndOfText, match="tokens"):
        while True:
            batches.next()


def test_a_nan_in_the_activations_is_named_by_its_layer(host, corpus):
    batches = make_batches(host, corpus, {"group": make_sae((0, 1, 2))})
    batches.next()
    batches.check_finite()
    weight = host.blocks[1].mlp.dense_4h_to_h.bias
    before = weight.detach().clone()
    try:
        weight.data[3] = float("nan")
        for _ in range(8):
            batches.next()
    finally:
        weight.data.copy_(before)
    with pytest.raises(InputError, match=r"layer 1 .* NaN or infinite .*host\.dtype=float32"):
        batches.check_finite()


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


def given(batches, number=None):
    """The next batches, and how the text is said to end if it does."""
    end, rows = "", []
    try:
        while len(rows) != number and batches.handed_out < batches.total_tokens:
            rows.append({name: x.clone() for name, x in batches.next().items()})
    except EndOfText as error:
        end = str(error)
    return rows, end


def assert_same(these, those):
    assert these[1] == those[1]
    for this, that in zip(these[0], those[0], strict=True):
        assert this.keys() == that.keys()
        for name in this:
            assert torch.equal(this[name], that[name])


def saved(batches):
    tensors, rest = batches.state()
    return {name: tensor.clone() for name, tensor in tensors.items()}, rest


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

    def test_it_changes_no_batch_and_reads_no_more(self, make):
        plain, overlapping = make(overlap=False), make(overlap=True)
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
        continued.load_state(*state)
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
        (tensors, rest), (expected_tensors, expected_rest) = saved(overlapping), saved(plain)
        assert rest == expected_rest
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected_tensors[name])
        with pytest.raises(EndOfText):
            overlapping.next()

    def test_a_nan_is_seen_when_it_is_read(self, make, host):
        batches = make(overlap=True)
        batches.next()
        batches.check_finite()
        bias = host.blocks[1].mlp.dense_4h_to_h.bias
        before, read = bias.detach().clone(), batches.stream.tokens_seen
        try:
            bias.data[3] = float("nan")
            while batches.stream.tokens_seen == read:
                batches.next()
        finally:
            bias.data.copy_(before)
        with pytest.raises(InputError, match="layer 1 "):
            batches.check_finite()


def test_contexts_read_ahead_give_the_same_batches_and_states(host, corpus):
    saes = {"group": make_sae((0, 1, 2)), "one": make_sae((1,))}
    plain = make_batches(host, corpus, saes)
    with ContextsAhead(corpus.train()) as stream:
        ahead = make_batches(host, corpus, saes, stream=stream)
        for _ in range(2):
            assert_same(given(ahead, 5), given(plain, 5))
            state = saved(plain)
            assert saved(ahead)[1] == state[1]
            ahead.load_state(*state)


def test_on_the_cpu_nothing_is_read_before_it_is_needed(host, corpus):
    batches = make_batches(host, corpus, {"one": make_sae((1,))})
    batches.next()
    assert not batches.overlap
    assert batches.filled < batches.buffer_tokens + 8 * 16 - 128


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_on_cuda_overlap_changes_no_batch(corpus, sizes, limited):
    host = HostModel(tiny_model("gpt_neox").cuda())
    saes = {"group": make_sae((0, 1, 2)).cuda(), "one": make_sae((1,)).cuda()}
    limit = norms_and_limit(host, corpus, (0, 1, 2))[1] if limited else None

    def run(overlap):
        batches = make_batches(host, corpus, saes, norm_limit=limit, overlap=overlap, **sizes)
        assert batches.overlap is overlap
        rows = []
        for step in range(16):
            rows += given(batches, 1)[0]
            torch.cuda._sleep(3_000_000)  # as SAEs that step: what does not wait reads too early
            scratch = torch.full((64, 1024, 32), float("nan"), device="cuda")  # freed memory's use
            if step == 7:
                state = saved(batches)
            del scratch
        batches.check_finite()
        batches.load_state(*state)
        again = given(batches)[0]
        assert_same((again, ""), (rows[8:], ""))
        return rows, ""

    assert make_batches(host, corpus, saes).overlap
    assert_same(run(True), run(False))
