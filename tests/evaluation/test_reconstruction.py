from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from groupsae.errors import InputError
from groupsae.evaluation.reconstruction import DEFINITIONS, evaluate_reconstruction
from groupsae.evaluation.subject import Subject
from groupsae.sae import SAE, SAEConfig
from groupsae.sae.kernels.inference import encode

TOKENS = 48 * 16


def make_sae(layers, d_sae=64, k=4, seed=0) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(SAEConfig(d_model=32, d_sae=d_sae, k=k, layers=layers), generator=generator)
    with torch.no_grad():
        sae.b_dec.normal_(generator=generator)
        sae.b_enc[: d_sae // 8] = -1e6  # these never fire
    return sae


def perfect_sae(layers) -> SAE:
    """x and -x as latents: every residual stream is reconstructed exactly."""
    sae = SAE(SAEConfig(d_model=32, d_sae=64, k=32, layers=layers))
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([torch.eye(32), -torch.eye(32)]))
        sae.W_dec.copy_(sae.W_enc)
    return sae


def subject(partition, *saes):
    return Subject(partition, {layer: sae for sae in saes for layer in sae.layers})


def evaluate(host, corpus, *subjects, **changes):
    settings = {"tokens": TOKENS, "batch_contexts": 10, "special": (0,)} | changes
    return evaluate_reconstruction(host, corpus.held_out(), list(subjects), **settings)


def reference(host, sae, layer, ids, mask):
    """Every metric of one SAE at one layer, in one piece and in float64."""

    def logits_with(change):
        block = host.blocks[layer]

        class Exchanged(nn.Module):
            def forward(self, *args, **kwargs):
                output = block(*args, **kwargs)
                x = output[0] if isinstance(output, tuple) else output
                x = torch.where(mask.unsqueeze(-1), change(x), x)
                return (x, *output[1:]) if isinstance(output, tuple) else x

        host.blocks[layer] = Exchanged()
        try:
            return host.model(ids).logits
        finally:
            host.blocks[layer] = block

    def ce(logits):
        losses = F.cross_entropy(
            logits[:, :-1].reshape(-1, 96).double(), ids[:, 1:].reshape(-1), reduction="none"
        )
        return losses[mask[:, :-1].reshape(-1)].mean().item()

    with torch.no_grad():
        clean = host.model(ids).logits
        spliced = logits_with(lambda x: sae(x, layer))
        zero = logits_with(torch.zeros_like)
        x = host.residual_streams(ids, [layer])[layer][mask].double()
        z = sae.double().encode(x, layer).dense(sae.config.d_sae)
        x_hat = sae(x, layer)
        sae.float()
    error = (x - x_hat).square().sum(1)
    p, q = (y[:, :-1][mask[:, :-1]].double().log_softmax(-1) for y in (clean, spliced))
    return {
        "ce_clean": ce(clean),
        "ce_spliced": ce(spliced),
        "ce_zero": ce(zero),
        "ce_loss_score": (ce(zero) - ce(spliced)) / (ce(zero) - ce(clean)),
        "kl": F.kl_div(q, p, log_target=True, reduction="batchmean").item(),
        "r2": (1 - error.sum() / (x - x.mean(0)).square().sum()).item(),
        "l2": error.sqrt().mean().item(),
        "mse": (error.sum() / x.numel()).item(),
        "cosine": F.cosine_similarity(x, x_hat).mean().item(),
        "l0": (z > 0).sum(1).double().mean().item(),
        "dead": (z == 0).all(0).double().mean().item(),
    }


def plainly_spliced(host, corpus, sae, layer, batch_contexts=10):
    """Cross-entropies and KL of one SAE at one layer, every forward from the first block on."""
    stream, contexts = corpus.held_out(), TOKENS // 16
    sums, predictions = dict.fromkeys(("ce_clean", "ce_spliced", "ce_zero", "kl"), 0.0), 0
    while contexts:
        ids = stream.next_contexts(min(batch_contexts, contexts))
        contexts -= len(ids)
        counted = (ids != 0).unsqueeze(-1)
        changes = {
            "ce_clean": lambda x: x,
            "ce_spliced": lambda x, at=counted: torch.where(at, sae(x, layer), x),
            "ce_zero": lambda x, at=counted: x * ~at,
        }
        log_p = {}
        for name, change in changes.items():
            with torch.no_grad(), host.splice({layer: change}):
                log_p[name] = host.logits(ids)[:, :-1][ids[:, :-1] != 0].log_softmax(-1)
            of_targets = log_p[name].gather(1, ids[:, 1:][ids[:, :-1] != 0].unsqueeze(-1))
            sums[name] -= of_targets.double().sum().item()
        clean, spliced = log_p["ce_clean"], log_p["ce_spliced"]
        sums["kl"] += (clean.exp() * (clean - spliced)).sum(-1).double().sum().item()
        predictions += len(clean)
    return {name: value / predictions for name, value in sums.items()}


def test_going_on_from_a_layer_is_splicing_there(host, corpus):
    saes = [make_sae((0, 1), seed=1), make_sae((2,), seed=2), make_sae((1,), seed=3)]
    rows = evaluate(host, corpus, *(subject("groups", sae) for sae in saes))["rows"]
    expected = [plainly_spliced(host, corpus, sae, layer) for sae in saes for layer in sae.layers]
    assert len(rows) == len(expected) == 4
    for row, plain in zip(rows, expected, strict=True):
        # The SAE's product over all positions may round otherwise than over the counted ones.
        assert {name: row[name] for name in plain} == pytest.approx(plain, rel=1e-7)


def test_no_block_below_the_layer_is_computed_for_a_splice(host, corpus, monkeypatch):
    subjects = [subject("groups", make_sae((layer,), seed=layer)) for layer in (1, 1, 2)]
    evaluate(host, corpus, *subjects)  # the first splices try whether blocks can be skipped
    calls = [0] * 3
    for layer, block in enumerate(host.blocks):
        mlp = block.mlp.forward

        def counting(x, layer=layer, mlp=mlp):
            calls[layer] += 1
            return mlp(x)

        monkeypatch.setattr(block.mlp, "forward", counting)
    evaluate(host, corpus, *subjects, batch_contexts=TOKENS // 16)
    # The clean forward; at layer 1, zeros and two SAEs go on to the last block.
    assert calls == [1, 1, 1 + 3]


@pytest.mark.parametrize("special", [(0,), ()])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_metrics_are_those_of_their_definitions(host, corpus, layer, special):
    sae = make_sae((layer,))
    row = evaluate(host, corpus, subject("groups", sae), special=special)["rows"][0]
    ids = corpus.held_out().next_contexts(TOKENS // 16)
    mask = ids != 0 if special else torch.ones_like(ids, dtype=torch.bool)
    for name, value in reference(host, sae, layer, ids, mask).items():
        assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_explained_variance_is_the_mean_of_the_ratio_per_token(host, corpus):
    sae = make_sae((1,))
    row = evaluate(host, corpus, subject("groups", sae), batch_contexts=48)["rows"][0]
    ids = corpus.held_out().next_contexts(TOKENS // 16)
    x = host.residual_streams(ids, [1])[1][ids != 0].double()
    with torch.no_grad():
        error = (x - sae(x.float(), 1).double()).square().sum(1)
    ratio = error / (x - x.mean(0)).square().sum(1)
    assert row["explained_variance"] == pytest.approx(1 - ratio.mean().item(), rel=1e-4)


def test_a_perfect_sae_loses_nothing(host, corpus):
    rows = evaluate(host, corpus, subject("groups", perfect_sae((0, 1, 2))))["rows"]
    assert [row["layer"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["ce_loss_score"] == pytest.approx(1, abs=1e-4)
        assert row["r2"] == pytest.approx(1, abs=1e-5)
        assert row["kl"] == pytest.approx(0, abs=1e-5)


def test_a_group_is_judged_at_every_member_and_baselines_beside_it(host, corpus):
    group, zero, one = make_sae((0, 1)), make_sae((0,)), make_sae((1,))
    subjects = (subject("groups", group), subject("baseline", zero, one))
    rows = evaluate(host, corpus, *subjects)["rows"]
    assert [(row["partition"], row["layer"], row["group"]) for row in rows] == [
        ("groups", 0, [0, 1]),
        ("groups", 1, [0, 1]),
        ("baseline", 0, [0]),
        ("baseline", 1, [1]),
    ]
    assert [row["groups_total"] for row in rows] == [1, 1, 2, 2]
    assert {row["ce_clean"] for row in rows} == {rows[0]["ce_clean"]}
    assert rows[0]["ce_zero"] == rows[2]["ce_zero"]


def test_the_same_sae_as_group_or_baseline_gets_the_same_row(host, corpus):
    rows = evaluate(
        host, corpus, subject("groups", make_sae((1,))), subject("baseline", make_sae((1,)))
    )["rows"]
    assert {**rows[0], "partition": ""} == {**rows[1], "partition": ""}


def test_an_sae_under_two_partitions_is_computed_once(host, corpus, monkeypatch):
    shared, other = make_sae((1,)), make_sae((0, 1), seed=1)
    subjects = [subject("groups", shared), subject("groups", other), subject("baseline", shared)]
    encoded = []
    monkeypatch.setattr(
        "groupsae.evaluation.reconstruction.encode",
        lambda sae, x, layer: encoded.append((sae, layer)) or encode(sae, x, layer),
    )
    rows = evaluate(host, corpus, *subjects, batch_contexts=TOKENS // 16)["rows"]
    assert sorted(layer for _, layer in encoded) == [0, 1, 1]
    assert [(row["partition"], row["layer"]) for row in rows] == [
        ("groups", 1),
        ("groups", 0),
        ("groups", 1),
        ("baseline", 1),
    ]
    assert {**rows[0], "partition": "", "groups_total": 0} == {
        **rows[3],
        "partition": "",
        "groups_total": 0,
    }
    alone = evaluate(host, corpus, subject("groups", other))["rows"]
    for row, by_itself in zip(rows[1:3], alone, strict=True):
        assert row["kl"] == pytest.approx(by_itself["kl"], rel=1e-5)
        assert row["dead_in_group"] == by_itself["dead_in_group"]


def test_the_size_of_a_forward_does_not_matter(host, corpus):
    rows = [
        evaluate(host, corpus, subject("groups", make_sae((1,))), batch_contexts=n)["rows"][0]
        for n in (7, 48)
    ]
    for name in ("ce_loss_score", "kl", "r2", "l2", "cosine", "l0", "dead"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-5), name


def test_silent_latents_and_density(host, corpus):
    row = evaluate(host, corpus, subject("groups", make_sae((0, 1))))["rows"][0]
    density = row["latent_density"]
    assert density["silent"] == round(row["dead"] * 64) >= 8
    assert sum(density["counts"]) == 64 - density["silent"]
    assert len(density["edges"]) == len(density["counts"]) + 1
    assert row["dead_in_group"] <= row["dead"]


def test_what_is_reported_is_defined(host, corpus):
    result = evaluate(host, corpus, subject("groups", make_sae((1,))))
    described = set(result["definitions"]) | {"partition", "groups_total", "group", "layer"}
    assert set(result["rows"][0]) <= described
    assert result["definitions"] == DEFINITIONS
    ids = corpus.held_out().next_contexts(TOKENS // 16)
    assert result["tokens"] == (ids != 0).sum()
    assert result["predictions"] == (ids[:, :-1] != 0).sum()
    assert result["excluded_special_tokens"] == (ids == 0).sum()


def test_contexts_without_a_prediction_to_judge_are_refused(host, corpus):
    everything = range(96)
    with pytest.raises(InputError, match=r"tokens\.context_length=16"):
        evaluate(host, corpus, subject("groups", make_sae((1,))), special=everything)


def test_a_nan_that_only_held_out_text_brings_out_is_refused(host, corpus, monkeypatch):
    logits = type(host).logits

    def spoiled(self, input_ids, **which):
        return logits(self, input_ids, **which).masked_fill(
            (input_ids == 50).unsqueeze(-1), torch.nan
        )

    monkeypatch.setattr(type(host), "logits", spoiled)
    with pytest.raises(InputError, match="NaN or infinite cross-entropies on held-out text"):
        evaluate(host, corpus, subject("groups", make_sae((0,))))
