from __future__ import annotations

from collections import Counter

import pytest
import torch

from groupsae.errors import InputError
from groupsae.host.tokens import EndOfText
from groupsae.sae import SAE, SAEConfig
from groupsae.training.batches import MixedBatches, NormLimit


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
    return MixedBatches(host, corpus.train(), saes, **(settings | changes))


def rows_of(x):
    return [tuple(row) for row in x.tolist()]


def normalised_rows(host, corpus, sae, layer, contexts=200):
    """Every non-special token's row as the SAE should see it, computed without the buffer."""
    ids = corpus.train().next_contexts(contexts)
    x = host.residual_streams(ids, [layer])[layer][ids != 0]
    member = sae.layers.index(layer)
    return (x - sae.mean[member]) * sae.scale[member]


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
    ids = corpus.train().next_contexts(200)
    streams = host.residual_streams(ids, [0, 1])
    norms = {layer: x[ids != 0].norm(dim=-1) for layer, x in streams.items()}
    limit = NormLimit(1.2, {layer: float(norm.mean()) for layer, norm in norms.items()})
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
