from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from groupsae.errors import InputError
from groupsae.evaluation.attribution import Effects
from groupsae.evaluation.circuits import (
    DEFINITIONS,
    Curve,
    Ranking,
    accuracy,
    answer_margins,
    area,
    check_task,
    circuit_sizes,
    evaluate_circuits,
    mean_latents,
    random_ranking,
    reached,
    untrained,
)
from groupsae.evaluation.subject import Subject
from groupsae.evaluation.tasks import Pairs, Task
from groupsae.host.model import HostModel
from groupsae.sae import SAE, SAEConfig
from groupsae.sae.kernels import cpu
from tests.host.tiny_models import tiny_model
from tests.sae.kernels.cases import AFFINES, RULES

SPECIAL = 0
LAYERS = (1, 2, 3)


@pytest.fixture(scope="module")
def deep_host() -> HostModel:
    """Five blocks in float64: there are some below and above the spliced layers."""
    return HostModel(tiny_model("gpt_neox", n_layers=5).double())


def toy_pairs(examples: int, context: int, seed: int) -> Pairs:
    """Random tokens; every third example has special tokens at its first positions."""
    generator = torch.Generator().manual_seed(seed)
    clean, patch = torch.randint(2, 96, (2, examples, context), generator=generator)
    clean[::3, :2] = SPECIAL
    a_clean, a_patch = torch.randint(2, 96, (2, examples), generator=generator)
    return Pairs(clean, patch, a_clean, a_patch, ("toy",) * examples)


def toy_task(*sizes: tuple[int, int], seed: int = 0) -> Task:
    """`sizes`: numbers of examples and of tokens."""
    lengths = tuple(toy_pairs(*size, seed + i) for i, size in enumerate(sizes))
    return Task("toy", "made up", lengths, {})


MEANS_HALF, SCORES_HALF = toy_task((7, 6), (5, 4), seed=10), toy_task((6, 6), (4, 4), seed=20)


def toy_sae(rule: str = "topk", affine: str = "none", layers=LAYERS, d_sae=120, seed=0) -> SAE:
    """float64, with means, scales and thresholds of each layer; some latents active, most not."""
    options = dict(RULES[rule])
    if "prefixes" in options:
        options["prefixes"] = (5, 17, 90, d_sae)
    config = SAEConfig(d_model=32, d_sae=d_sae, layers=layers, learned_affine=affine, **options)
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(
        config,
        mean=0.1 * torch.randn(len(layers), 32, generator=generator),
        scale=torch.linspace(0.4, 0.6, len(layers)),
        generator=generator,
    )
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name != "W_dec":
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        if rule == "relu":
            sae.b_enc -= 0.5
        if "jumprelu" in rule:
            sae.log_threshold.sub_(2.0)
        if "threshold" in dict(sae.named_buffers()):
            sae.threshold.copy_(torch.linspace(0.4, 0.6, len(layers)))
    return sae.double()


def subject_of(*saes: SAE, partition: str = "groups") -> Subject:
    return Subject(partition, {layer: sae for sae in saes for layer in sae.layers})


def toy_ranking(subject: Subject, seed: int = 0) -> Ranking:
    generator = torch.Generator().manual_seed(seed)
    importance = {
        layer: torch.rand(sae.config.d_sae, generator=generator, dtype=torch.float64)
        for layer, sae in subject.saes.items()
    }
    return Ranking(subject, "attribution", "ranked", importance)


def evaluate(host, *rankings, means=MEANS_HALF, scores=SCORES_HALF, **changes) -> list[Curve]:
    options = {"points": 3, "special": (SPECIAL,)} | changes
    m_model = answer_margins(host, scores)
    return evaluate_circuits(host, means, scores, rankings, m_model, **options)


def decode(sae: SAE, z, layer: int):
    """x_hat of dense latents, as in the docstring of SAE."""
    member = sae.layers.index(layer)
    output = z @ sae.W_dec + sae.b_dec
    if sae.config.learned_affine == "gain":
        output = output * sae.gain_out[member]
    return output / sae.scale[member] + sae.mean[member]


def naive_means(host, sae, layer, ids):
    """Position by position, dense, over the examples that have text there."""
    x = host.residual_streams(ids, [layer])[layer]
    z = sae.encode(x, layer).dense(sae.config.d_sae)
    rows = []
    for position in range(ids.shape[1]):
        counted = z[ids[:, position] != SPECIAL, position]
        rows.append(counted.mean(0) if len(counted) else torch.zeros_like(z[0, 0]))
    return torch.stack(rows)


def all_naive_means(host, saes, means):
    return {
        pairs.clean.shape[1]: {
            layer: naive_means(host, sae, layer, pairs.clean) for layer, sae in saes.items()
        }
        for pairs in means.lengths
    }


def naive_margins(host, saes, alive, error_nodes, means=None, scores=SCORES_HALF):
    """m of each example with every block that is spliced replaced by one that splices, dense."""
    means = means or all_naive_means(host, saes, MEANS_HALF)

    class Exchanged(nn.Module):
        def __init__(self, layer, block, mean, kept):
            super().__init__()
            self.layer, self.block, self.mean, self.kept = layer, block, mean, kept

        def forward(self, *args, **kwargs):
            output = self.block(*args, **kwargs)
            x = output[0] if isinstance(output, tuple) else output
            sae = saes[self.layer]
            z = sae.encode(x, self.layer).dense(sae.config.d_sae)
            z_new = torch.where(alive[self.layer], z, self.mean)
            x_new = decode(sae, z_new, self.layer)
            if error_nodes:
                x_new = x_new + x - decode(sae, z, self.layer)
            x = torch.where(self.kept, x, x_new)
            return (x, *output[1:]) if isinstance(output, tuple) else x

    found = []
    for pairs in scores.lengths:
        mean = means[pairs.clean.shape[1]]
        blocks = {layer: host.blocks[layer] for layer in saes}
        kept = (pairs.clean == SPECIAL).unsqueeze(-1)
        for layer, block in blocks.items():
            host.blocks[layer] = Exchanged(layer, block, mean[layer], kept)
        try:
            with torch.no_grad():
                logits = host.model(pairs.clean).logits[:, -1]
        finally:
            for layer, block in blocks.items():
                host.blocks[layer] = block
        rows = torch.arange(len(pairs))
        found.append(logits[rows, pairs.a_clean] - logits[rows, pairs.a_patch])
    return torch.cat(found)


def chosen(importance, n: int, selection: str):
    """Whether each latent is among the most important: by sorting a list."""
    every = [
        (-float(value), index, layer)
        for layer, values in importance.items()
        for index, value in enumerate(values)
    ]
    if selection == "global":
        kept = sorted(every)[: n * len(importance)]
    else:
        kept = [e for layer in importance for e in sorted(e for e in every if e[2] == layer)[:n]]
    alive = {layer: torch.zeros(len(values)).bool() for layer, values in importance.items()}
    for _, index, layer in kept:
        alive[layer][index] = True
    return alive


def check_against_naive(host, ranking, curves, means=MEANS_HALF, scores=SCORES_HALF):
    saes = ranking.subject.saes
    means = all_naive_means(host, saes, means)

    def naive(alive, error_nodes) -> float:
        return naive_margins(host, saes, alive, error_nodes, means, scores).mean().item()

    nothing = {layer: torch.zeros(sae.config.d_sae).bool() for layer, sae in saes.items()}
    empty = {error_nodes: naive(nothing, error_nodes) for error_nodes in (False, True)}
    for curve in curves:
        bottom = empty[curve.error_nodes]
        assert curve.m_empty == pytest.approx(bottom, rel=1e-9)
        for n, m in zip(curve.n, curve.m_circuit, strict=True):
            alive = chosen(ranking.importance, n, curve.selection)
            if curve.score == "completeness":
                alive = {layer: ~mask for layer, mask in alive.items()}
            assert m == pytest.approx(naive(alive, curve.error_nodes), rel=1e-9)
        expected = [(m - bottom) / (curve.m_model - bottom) for m in curve.m_circuit]
        assert curve.value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("rule", RULES)
def test_a_circuit_is_the_naive_splice_of_every_layer(deep_host, rule, affine):
    sae, means, scores = toy_sae(rule, affine), toy_task((4, 5), seed=1), toy_task((4, 5))
    for layer, x in deep_host.residual_streams(scores.lengths[0].clean, LAYERS).items():
        assert 1 < sae.encode(x, layer).l0().mean() < 60
    ranking = toy_ranking(subject_of(sae))
    changes = {"means": means, "scores": scores, "points": 2, "selections": ["per_layer"]}
    curves = evaluate(deep_host, ranking, **changes)
    assert len(curves) == 4
    check_against_naive(deep_host, ranking, curves, means, scores)


def test_so_is_one_of_several_saes_from_the_first_block_to_the_last(deep_host):
    saes = [
        toy_sae("topk", layers=(0, 1)),
        toy_sae("batchtopk", layers=(2,)),
        toy_sae(layers=(3, 4)),
    ]
    ranking = toy_ranking(subject_of(*saes))
    curves = evaluate(deep_host, ranking, points=2)
    assert len(curves) == 8
    check_against_naive(deep_host, ranking, curves)


def test_m_of_the_untouched_model(deep_host):
    m = answer_margins(deep_host, SCORES_HALF, batch_tokens=13)
    expected = []
    for pairs in SCORES_HALF.lengths:
        for i in range(len(pairs)):
            logits = deep_host.model(pairs.clean[i : i + 1]).logits[0, -1]
            expected.append(float(logits[pairs.a_clean[i]] - logits[pairs.a_patch[i]]))
    assert m.tolist() == pytest.approx(expected, rel=1e-9)
    assert accuracy(m) == sum(value > 0 for value in expected) / len(expected)
    ranking = toy_ranking(subject_of(toy_sae()))
    curve, *_ = evaluate(deep_host, ranking, points=2, selections=["global"], error_nodes=[True])
    assert curve.m_model == pytest.approx(float(np.mean(expected)), rel=1e-9)


def test_mean_latents_are_means_over_the_examples_with_text_at_a_position(deep_host):
    sae = toy_sae("jumprelu")
    pairs = [*MEANS_HALF.lengths, replace_first(toy_pairs(3, 5, seed=1), SPECIAL)]
    means = mean_latents(deep_host, pairs, {1: sae, 3: sae}, batch_tokens=13, special=(SPECIAL,))
    assert list(means) == [6, 4, 5]
    for of_length in pairs:
        context = of_length.clean.shape[1]
        for layer, mean in means[context].items():
            expected = naive_means(deep_host, sae, layer, of_length.clean)
            torch.testing.assert_close(mean, expected)
    assert (means[5][1][0] == 0).all()  # no text there
    assert (means[5][1][4] > 0).any()


def replace_first(pairs: Pairs, token: int) -> Pairs:
    clean = pairs.clean.clone()
    clean[:, 0] = token
    return replace(pairs, clean=clean)


# d_sae = 12 and 9 points: n = 4, ..., 12; 5 and 2 points: n = 4, 5; the last is all latents.
def tiny_sae(rule="topk", affine="none", **changes):
    return toy_sae(rule, affine, **{"d_sae": 12, **changes})


@pytest.mark.parametrize(
    ("rule", "selection"),
    [("topk", "per_layer"), ("topk", "global"), ("jumprelu by layer", "global")],
)
def test_all_latents_and_the_error_nodes_are_the_model(deep_host, rule, selection):
    sae = tiny_sae(rule, "gain", d_sae=5)
    curves = evaluate(deep_host, toy_ranking(subject_of(sae)), points=2, selections=[selection])
    without, _, faithful, complete = curves
    assert (faithful.score, complete.score) == ("faithfulness", "completeness")
    assert faithful.error_nodes
    assert faithful.n == (4, 5)
    assert faithful.m_circuit[-1] == faithful.m_model
    assert faithful.value[-1] == 1
    assert faithful.m_circuit[0] != faithful.m_model
    # All but all latents: the empty circuit.
    assert complete.m_circuit[-1] == complete.m_empty
    assert complete.value[-1] == 0
    # Without error nodes it is the model with every layer reconstructed.
    margins = []
    for pairs in SCORES_HALF.lengths:
        text = (pairs.clean != SPECIAL).unsqueeze(-1)
        splices = {
            layer: lambda x, layer=layer, text=text: torch.where(text, sae(x, layer), x)
            for layer in LAYERS
        }
        with torch.no_grad(), deep_host.splice(splices):
            logits = deep_host.logits(pairs.clean)[:, -1]
        rows = torch.arange(len(pairs))
        margins.append(logits[rows, pairs.a_clean] - logits[rows, pairs.a_patch])
    assert not without.error_nodes
    assert without.m_circuit[-1] == pytest.approx(torch.cat(margins).mean().item(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "mixtral"])
def test_so_they_are_in_other_models_and_in_16_bit(architecture, dtype):
    host = HostModel(tiny_model(architecture).to(dtype))
    ranking = toy_ranking(subject_of(tiny_sae(layers=(0, 1), d_sae=5).float()))
    options = {"means": toy_task((4, 5), seed=1), "scores": toy_task((4, 5)), "points": 2}
    curve, _ = evaluate(host, ranking, selections=["per_layer"], error_nodes=[True], **options)
    assert curve.n == (4, 5)
    assert curve.m_circuit[1] == curve.m_model
    assert curve.m_circuit[0] != curve.m_model


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 1000), selection=st.sampled_from(["per_layer", "global"]))
def test_completeness_is_the_faithfulness_of_the_other_latents(deep_host, seed, selection):
    ranking = toy_ranking(subject_of(tiny_sae()), seed)
    turned = replace(ranking, importance={at: -v for at, v in ranking.importance.items()})
    options = {"means": toy_task((4, 5), seed=1), "scores": toy_task((4, 5)), "points": 9}
    options |= {"selections": [selection], "error_nodes": [bool(seed % 2)]}
    _, curve, other, _ = evaluate(deep_host, ranking, turned, **options)
    assert (curve.score, other.score) == ("completeness", "faithfulness")
    complement = dict(zip(other.n, other.value, strict=True))
    for n, value in zip(curve.n[:5], curve.value, strict=False):
        assert value == pytest.approx(complement[12 - n], rel=1e-9, abs=1e-12)


@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=12, max_size=12), min_size=3, max_size=3),
)
def test_the_chosen_latents_are_the_most_important(deep_host, values):
    sae = tiny_sae("relu")
    importance = {
        layer: torch.tensor(v, dtype=torch.float64) for layer, v in zip(LAYERS, values, strict=True)
    }
    ranking = Ranking(subject_of(sae), "exact", "ranked", importance)
    scores = toy_task((2, 4), seed=3)
    for curve in evaluate(deep_host, ranking, scores=scores, points=2, error_nodes=[False]):
        if curve.score == "faithfulness":
            alive = chosen(importance, 4, curve.selection)
            naive = naive_margins(deep_host, ranking.subject.saes, alive, False, scores=scores)
            assert curve.m_circuit[0] == pytest.approx(naive.mean().item(), rel=1e-9)


def test_latents_of_equal_importance_prefer_no_layer(deep_host):
    subject = subject_of(toy_sae())
    equal = {layer: torch.ones(120, dtype=torch.float64) for layer in LAYERS}
    curves = evaluate(deep_host, Ranking(subject, "attribution", "ranked", equal))
    for by_layer, over_all in zip(curves[:4], curves[4:], strict=True):
        assert (by_layer.selection, over_all.selection) == ("per_layer", "global")
        assert by_layer.m_circuit == over_all.m_circuit


def test_layers_compete_in_a_global_selection(deep_host):
    """The layer that alone matters gets all: the others are at their means, as where they are 0."""
    subject = subject_of(toy_sae())
    uneven = toy_ranking(subject)
    uneven.importance[2].add_(1)
    curve, *_ = evaluate(deep_host, uneven, selections=["global"], error_nodes=[False])
    alive = {layer: torch.zeros(120).bool() for layer in LAYERS}
    alive[2][uneven.importance[2].argsort(descending=True)[: 3 * curve.n[1]]] = True
    naive = naive_margins(deep_host, subject.saes, alive, False)
    assert curve.m_circuit[1] == pytest.approx(naive.mean().item(), rel=1e-9)


@pytest.mark.parametrize("batch_tokens", [1, 13])
def test_the_size_of_a_forward_does_not_matter(deep_host, batch_tokens):
    ranking = toy_ranking(subject_of(toy_sae()))
    options = {"points": 2, "selections": ["global"], "error_nodes": [False]}
    small = evaluate(deep_host, ranking, batch_tokens=batch_tokens, **options)
    for curve, other in zip(small, evaluate(deep_host, ranking, **options), strict=True):
        assert curve.m_circuit == pytest.approx(other.m_circuit, rel=1e-9)
        assert curve.m_empty == pytest.approx(other.m_empty, rel=1e-9)


@pytest.mark.parametrize("affine", AFFINES)
def test_compiled_selection_changes_nothing(monkeypatch, affine):
    if not cpu.available():
        pytest.skip("no compiler for the CPU's kernels")
    host = HostModel(tiny_model("gpt_neox"))
    ranking = toy_ranking(subject_of(toy_sae("topk", affine, layers=(0, 1)).float()))
    calls = Counter()
    encode = cpu.encode
    monkeypatch.setattr(cpu, "encode", lambda *given: calls.update([0]) or encode(*given))
    compiled = evaluate(host, ranking, points=2)
    assert (calls[0] > 0) == (affine != "bias")
    monkeypatch.setattr(cpu, "fits", lambda sae: False)
    for curve, other in zip(compiled, evaluate(host, ranking, points=2), strict=True):
        assert curve.m_circuit == pytest.approx(other.m_circuit, rel=1e-3, abs=1e-4)


def test_rankings_do_not_touch_one_another(deep_host):
    group, shared = toy_sae(), toy_sae(layers=(1, 2), seed=1)
    both = subject_of(shared, toy_sae(layers=(3,), seed=2))
    first = toy_ranking(subject_of(group))
    second = toy_ranking(both)
    third = replace(toy_ranking(subject_of(group), seed=5), method="integrated_gradients")
    rankings, options = (first, second, third), {"points": 2, "selections": ["per_layer"]}
    together = evaluate(deep_host, *rankings, **options)
    alone = [curve for ranking in rankings for curve in evaluate(deep_host, ranking, **options)]
    assert together == alone
    assert [curve.groups_total for curve in together] == [1] * 4 + [2] * 4 + [1] * 4
    assert together[0].method == "attribution"
    assert together[8].method == "integrated_gradients"


def test_what_circuits_share_is_computed_once(deep_host, monkeypatch):
    """At the lowest layer one encoding for the means and one for all circuits of a batch."""
    encoded = Counter()
    encode = SAE.encode
    monkeypatch.setattr(
        SAE, "encode", lambda sae, x, at: encoded.update([at]) or encode(sae, x, at)
    )
    scores, means = toy_task((6, 6)), toy_task((6, 6), seed=5)
    m_model = answer_margins(deep_host, scores)
    sae = toy_sae()
    rankings = [toy_ranking(subject_of(sae), seed) for seed in (0, 1)]
    evaluate_circuits(deep_host, means, scores, rankings, m_model, points=2)
    circuits = 2 * 2 * 2 * 2 * 2 + 2  # rankings, selections, error nodes, scores, points; empty
    assert encoded == {1: 2, 2: circuits + 1, 3: circuits + 1}


def test_prompts_of_special_tokens_are_not_touched_and_that_is_said(deep_host):
    ranking = toy_ranking(subject_of(toy_sae()))
    curves = evaluate(deep_host, ranking, special=range(96), selections=["per_layer"])
    for curve in curves:
        assert set(curve.m_circuit) == {curve.m_model} == {curve.m_empty}
        assert curve.value == (None, None, None)
        assert curve.area is None
        assert curve.n_at_75 is None
        assert "differ by 0" in curve.flag
        json.dumps(curve.to_json(), allow_nan=False)


# A host whose blocks add nothing: what an embedding says reaches the logits unchanged. Tokens 2 to
# 9 have x[0] = LEVELS[token - 2] and agree in all else, with x[1] = 1; the answers are 90, whose
# logit reads x[0], and 91, whose logit reads x[1].
LEVELS = (0.0, 2.0, 1.0, 7.0, -5.0, 1.1, 1.2, 1.3)


@pytest.fixture(scope="module")
def known_host() -> HostModel:
    model = tiny_model("gpt_neox").double()
    with torch.no_grad():
        for block in model.gpt_neox.layers:
            for linear in (block.attention.dense, block.mlp.dense_4h_to_h):
                linear.weight.zero_()
                linear.bias.zero_()
        rest = torch.randn(30, generator=torch.Generator().manual_seed(0))
        model.gpt_neox.embed_in.weight[:, 1] = 1
        model.gpt_neox.embed_in.weight[:, 2:] = rest
        model.gpt_neox.embed_in.weight[2:10, 0] = torch.tensor(LEVELS).double()
        model.gpt_neox.final_layer_norm.weight.fill_(1)
        model.gpt_neox.final_layer_norm.bias.zero_()
        unembedding = model.get_output_embeddings().weight
        unembedding.zero_()
        unembedding[90, 0] = unembedding[91, 1] = 1
    return HostModel(model)


def known_task(*levels: float, answer: str = "by level") -> Task:
    """One example per level at the last position. By level: 90 is right where it is over 1."""
    last = torch.tensor([LEVELS.index(level) + 2 for level in levels])
    clean = torch.randint(2, 10, (len(levels), 4), generator=torch.Generator().manual_seed(1))
    clean[:, -1] = last
    up = torch.tensor([level > 1 or answer == "90" for level in levels])
    right, wrong = torch.where(up, 90, 91), torch.where(up, 91, 90)
    pairs = Pairs(clean, clean, right, wrong, ("known",) * len(levels))
    return Task("known", "made up", (pairs,), {})


def known_ranking(place: int) -> Ranking:
    """Latents are x and -x; all layers rank latent 0, which alone carries the task, at `place`."""
    sae = SAE(SAEConfig(d_model=32, d_sae=64, k=32, layers=(0, 1, 2))).double()
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([torch.eye(32), -torch.eye(32)]))
        sae.W_dec.copy_(sae.W_enc)
    order = list(range(1, 64))
    order.insert(place, 0)
    importance = torch.zeros(64, dtype=torch.float64)
    importance[order] = torch.arange(64, 0, -1, dtype=torch.float64)
    subject = subject_of(sae)
    return Ranking(subject, "exact", "ranked", dict.fromkeys((0, 1, 2), importance))


@pytest.mark.parametrize(
    ("place", "selection"), [(0, "per_layer"), (9, "per_layer"), (9, "global"), (40, "global")]
)
def test_the_one_latent_that_carries_the_task_is_all_that_counts(known_host, place, selection):
    task = known_task(*[2.0, 0.0] * 8)
    options = {"means": task, "scores": task, "points": 16, "selections": [selection]}
    curves = evaluate(known_host, known_ranking(place), **options)
    assert len(curves) == 4
    for curve in curves:
        assert curve.n == tuple(range(4, 20))
        assert curve.m_empty == pytest.approx(0, abs=1e-12)
        assert curve.m_model > 0.5
        assert curve.flag is None
        inside = [float(n > place) for n in curve.n]
        if curve.score == "faithfulness":
            assert curve.value == pytest.approx(inside, abs=1e-9)
            expected = {0: 1, 9: (9 + 0.5) / 15, 40: 0}[place]
            assert curve.n_at_75 == pytest.approx({0: 4, 9: 9.75, 40: None}[place])
        else:
            assert curve.value == pytest.approx([1 - v for v in inside], abs=1e-9)
            expected = {0: 0, 9: (5 + 0.5) / 15, 40: 1}[place]
            assert curve.n_at_75 is None
        assert curve.area == pytest.approx(expected, abs=1e-9)


def test_a_tiny_denominator_is_flagged(known_host):
    task = known_task(*[2.0] * 16)  # the mean of what is always the same loses nothing
    curve, *_ = evaluate(known_host, known_ranking(0), means=task, scores=task)
    assert "less than a tenth of m(M)" in curve.flag
    assert f"m(M) = {curve.m_model:.3g}" in curve.flag


def test_a_denominator_within_its_noise_is_flagged(known_host):
    scores = known_task(*[7.0] * 40, *[-5.0] * 24, answer="90")
    curve, *_ = evaluate(known_host, known_ranking(0), means=known_task(1.0), scores=scores)
    difference = answer_margins(known_host, scores)  # m(empty) is 0 for all of them
    assert curve.m_empty == pytest.approx(0, abs=1e-12)
    error = difference.std().item() / 8
    assert error < difference.mean() < 2 * error
    assert f"within two standard errors ({error:.3g} each)" in curve.flag
    more = known_task(*[7.0] * 200, *[-5.0] * 120, answer="90")
    curve, *_ = evaluate(known_host, known_ranking(0), means=known_task(1.0), scores=more)
    assert curve.flag is None


def test_a_task_that_the_host_cannot_do_is_refused():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(100, generator=generator, dtype=torch.float64)
    assert check_task("toy", noise + 1) is None
    reason = check_task("toy", noise - noise.mean() + 0.1)
    assert "cannot do toy: on 100 examples m(M) = 0.100 with a standard error of 0.1" in reason
    assert "not above 0 by two standard errors" in reason
    assert "not above 0" in check_task("toy", noise - 1)
    # A few large margins make a mean, but not an answer: 49 of 100 are right.
    few = torch.full((100,), -0.01).double()
    few[:49] = 5.0
    assert "right answer in 49.0%; that is chance" in check_task("toy", few)
    assert "not above 0" in check_task("toy", torch.ones(1).double())


@pytest.mark.shared
@pytest.mark.parametrize(("score", "share"), [("faithfulness", 0.2), ("completeness", 0.05)])
def test_sizes_are_the_published_ones(shared, score, share):
    files = sorted((shared / "reference/group-sae/faithfulness").glob(f"*_{score}.csv"))
    assert len(files) == 33
    for file in files:
        with file.open() as rows:
            published = [float(row["N"]) for row in csv.DictReader(rows)]
        assert list(circuit_sizes(16 * 768, share=share)) == published


def test_sizes_of_small_saes_go_further_and_differ():
    assert circuit_sizes(64, share=0.05) == tuple(range(4, 20))
    assert circuit_sizes(12) == tuple(range(4, 13))
    assert circuit_sizes(2048, points=2) == (4, 409)
    with pytest.raises(InputError, match=r"2 points from 4 latents per layer .* with 4;"):
        circuit_sizes(4, points=2)
    with pytest.raises(InputError, match="a curve of 1 points"):
        circuit_sizes(2048, points=1)


@given(st.integers(20, 5000), st.integers(2, 16), st.floats(0.01, 1))
def test_sizes_rise_evenly_to_the_share(d_sae, points, share):
    sizes = circuit_sizes(d_sae, points=points, share=share)
    assert len(sizes) == points
    assert sizes[0] == 4
    steps = np.diff(sizes)
    assert steps.min() > 0
    assert steps.max() - steps.min() <= 1
    assert sizes[-1] <= max(share * d_sae, 4 + points - 1) + 1e-6


@pytest.mark.shared
def test_area_and_75_percent_of_the_published_curves(shared):
    files = sorted((shared / "reference/group-sae/faithfulness").glob("*_faithfulness.csv"))
    found = {}
    for file in files:
        with file.open() as rows:
            n, value = zip(
                *((float(r["N"]), float(r["score"])) for r in csv.DictReader(rows)), strict=True
            )
        assert area(n, value) == pytest.approx(np.trapezoid(value, n) / (n[-1] - n[0]))
        found[file.name.split("_attrib")[0]] = at = reached(n, value)
        fine = np.linspace(n[0], n[-1], 100_000)
        above = fine[np.interp(fine, n, value) >= 0.75]
        assert at == pytest.approx(above[0], abs=0.05)
    assert found["pythia-160m_greater_than_Baseline"] == pytest.approx(657.6, abs=0.1)


def test_a_level_that_is_reached_at_once_or_never():
    assert reached((4, 8), (0.8, 0.1)) == 4
    assert reached((4, 8, 12), (0.1, 0.7, 0.74)) is None
    assert reached((4, 8, 12), (0.5, 1.0, 0.2)) == 6


def test_random_latents_are_drawn_evenly(deep_host):
    ranking = toy_ranking(subject_of(toy_sae(d_sae=60)))
    drawn = [random_ranking(ranking, seed) for seed in range(400)]
    assert {r.latents for r in drawn} == {"random"}
    assert all(r.method == "attribution" and r.subject is ranking.subject for r in drawn)
    for layer in LAYERS:
        first = torch.cat([r.importance[layer].topk(15).indices for r in drawn])
        counts = torch.bincount(first, minlength=60)  # 100 each, standard deviation 8.7
        assert counts.min() > 60
        assert counts.max() < 140
    again = random_ranking(ranking, 3)
    assert all(torch.equal(again.importance[at], drawn[3].importance[at]) for at in LAYERS)
    assert not torch.equal(again.importance[1], again.importance[2])


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_untrained_saes_are_as_sparse_as_the_trained_and_reconstruct_what_they_can(
    deep_host, rule, affine
):
    sae = toy_sae(rule, affine)
    task = toy_task((25, 6), (20, 4))
    subject = untrained(deep_host, task.clean_prompts, subject_of(sae), seed=3, special=(SPECIAL,))
    twins = set(subject.saes.values())
    assert len(twins) == subject.groups_total == 1
    (twin,) = twins
    assert twin.config == sae.config
    assert twin.W_enc.dtype == torch.float64
    assert torch.equal(twin.mean, sae.mean)
    assert torch.equal(twin.scale, sae.scale)
    assert (twin.W_dec * sae.W_dec).sum(1).abs().mean() < 0.3
    torch.testing.assert_close(twin.W_dec.norm(dim=1), torch.ones(120).double())
    l0, l0_trained, dots, squares = [], [], 0.0, 0.0
    for pairs in task.lengths:
        for layer, x in deep_host.residual_streams(pairs.clean, LAYERS).items():
            x = x[pairs.clean != SPECIAL]
            l0.append(twin.encode(x, layer).l0())
            l0_trained.append(sae.encode(x, layer).l0())
            normalized, member = twin.normalize(x, layer), LAYERS.index(layer)
            latents = twin.encode_normalized(normalized, member)
            x_hat = twin.decode_normalized(latents, member)
            dots += float((normalized * x_hat).sum())
            squares += float(x_hat.square().sum())
    expected = torch.cat(l0_trained).mean().item()
    assert torch.cat(l0).mean().item() == pytest.approx(expected, abs=0.51)
    assert dots == pytest.approx(squares, rel=1e-3)  # no other size is better


def test_untrained_saes_are_shared_by_the_same_layers(deep_host):
    saes = toy_sae(layers=(1, 2)), toy_sae(layers=(3,))
    subject = untrained(deep_host, SCORES_HALF.clean_prompts, subject_of(*saes), seed=0)
    assert subject.saes[1] is subject.saes[2] is not subject.saes[3]
    assert (subject.partition, subject.groups_total) == ("groups", 2)
    assert not torch.equal(subject.saes[1].W_dec, subject.saes[3].W_dec)
    again = untrained(deep_host, SCORES_HALF.clean_prompts, subject_of(*saes), seed=0)
    torch.testing.assert_close(again.saes[1].state_dict(), subject.saes[1].state_dict())
    with pytest.raises(InputError, match="every token of the text is special"):
        untrained(
            deep_host, SCORES_HALF.clean_prompts, subject_of(*saes), seed=0, special=range(96)
        )


def test_a_ranking_by_effects_takes_their_size():
    subject = subject_of(toy_sae(layers=(1,)), partition="baseline")
    effect = torch.randn(120, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    effects = Effects("integrated_gradients", 8, {1: effect}, {1: 0.0}, None)
    ranking = Ranking.by_effects(subject, effects)
    assert torch.equal(ranking.importance[1], effect.abs())
    assert (ranking.method, ranking.latents) == ("integrated_gradients", "ranked")
    assert Ranking.by_effects(subject, effects, "untrained").latents == "untrained"


def test_effects_of_other_saes_are_refused():
    subject = subject_of(toy_sae(layers=(1, 2)))
    for importance in ({1: torch.ones(120)}, {1: torch.ones(120), 2: torch.ones(64)}):
        with pytest.raises(InputError, match=r"the SAEs of G=1 have \{1: 120, 2: 120\}"):
            Ranking(subject, "attribution", "ranked", importance)


def test_a_length_without_means_is_refused(deep_host):
    with pytest.raises(InputError, match=r"toy: 4 examples of 4 tokens .*lengths \[6\]"):
        evaluate(deep_host, toy_ranking(subject_of(toy_sae())), means=toy_task((7, 6)))


def test_nan_is_refused(deep_host):
    sae = toy_sae()
    with torch.no_grad():
        sae.b_dec.fill_(torch.nan)
    with pytest.raises(InputError, match="gives NaN or infinite logits"):
        evaluate(deep_host, toy_ranking(subject_of(sae)), points=2, error_nodes=[True])


def test_a_curve_is_written_with_every_name_defined(deep_host):
    ranking = toy_ranking(subject_of(toy_sae()))
    curve, *_ = evaluate(deep_host, ranking, selections=["global"], error_nodes=[True])
    written = json.loads(json.dumps(curve.to_json(), allow_nan=False))
    assert list(written) == [field.name for field in fields(Curve)]
    assert written["n"] == [4, 14, 24]
    assert all(isinstance(v, float) for v in written["value"])
    told_by_name = {"partition", "groups_total", "method", "latents", "selection", "score"}
    assert set(written) - told_by_name - {"value", "flag"} <= set(DEFINITIONS)
