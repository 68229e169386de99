from __future__ import annotations

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from groupsae.config import Config
from groupsae.errors import InputError
from groupsae.training.layer_sampling import deal, draw, first_of_each, turns

MEMBERS = st.integers(1, 7)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(start=st.integers(0, 10**6), tokens=st.integers(0, 200), members=MEMBERS)
def test_turns_are_those_of_the_tokens_one_by_one(start, tokens, members):
    expected = [0] * members
    for token in range(start, start + tokens):
        expected[token % members] += 1
    assert turns(start, tokens, members).tolist() == expected


@given(dealt=st.lists(st.integers(0, 30), min_size=1, max_size=7), tokens=st.integers(0, 60))
def test_what_is_dealt_fills_the_earliest_turns(dealt, tokens):
    filled, expected, turn = list(dealt), [], 0
    while len(expected) < tokens:
        member = turn % len(dealt)
        if filled[member]:
            filled[member] -= 1
        else:
            expected.append(member)
        turn += 1
    found = deal(tokens, torch.tensor(dealt), generator())
    assert sorted(found.tolist()) == sorted(expected)


def test_what_is_dealt_does_not_follow_the_order_of_the_tokens():
    even, odd = deal(10_000, torch.tensor([0, 0]), generator()).reshape(-1, 2).unbind(1)
    assert abs(even.sum() - 2500) < 5 * 25  # hypergeometric: a standard deviation of 25
    assert even.sum() + odd.sum() == 5000


@given(counts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5))
def test_the_first_of_each_are_taken_in_order(counts):
    wanted = torch.tensor([min(pair) for pair in counts])
    members = torch.arange(len(counts)).repeat_interleave(torch.tensor([max(p) for p in counts]))
    order = torch.randperm(len(members), generator=generator())
    left, expected = wanted.tolist(), []
    for row in order.tolist():
        if left[members[row]]:
            left[members[row]] -= 1
            expected.append(row)
    assert first_of_each(order, members.short(), wanted).tolist() == expected


def test_equal_weights_draw_as_none():
    expected = torch.randint(3, (1000,), generator=generator(5))
    for weights in ([1.0] * 3, [0.25] * 3):
        assert torch.equal(draw(1000, weights, generator(5)), expected)


def test_members_come_in_proportion_to_their_weights():
    for weights in ([1.0, 2.0, 0.5], [3.0, 1.0], [1e-300, 1.0, 1e300]):
        members = draw(20_000, weights, generator(1))
        found = torch.bincount(members, minlength=len(weights)).double()
        expected = torch.tensor(weights, dtype=torch.float64) / max(weights)
        expected *= 20_000 / expected.sum()
        kept = expected > 1
        assert found[~kept].sum() == 0
        if kept.sum() > 1:
            assert chisquare(found[kept].numpy(), expected[kept].numpy()).pvalue > 1e-4


@pytest.mark.parametrize("weight", ["0", "-1", ".nan", ".inf"])
def test_weights_are_finite_and_above_zero(weight):
    with pytest.raises(InputError, match=r"training\.layer_weights = .*Input should be"):
        Config.load(None, [f"training.layer_weights.3={weight}"])


@pytest.mark.parametrize("sampling", ["balanced", "all"])
def test_weights_go_with_uniform_sampling_alone(sampling):
    values = {"layer_sampling": sampling, "layer_weights": {0: 2}}
    with pytest.raises(InputError, match=r"training\.layer_weights: \{0: 2\.0\} .* uniform"):
        Config.parse({"training": values})


def test_weights_of_layers_that_are_not_covered_are_refused():
    training = Config.load(None, ["training.layer_weights={3: 2, 1: 0.5}"]).training
    assert training.weights_of([3, 2, 1]) == {1: 0.5, 2: 1.0, 3: 2.0}
    with pytest.raises(InputError, match=r"training\.layer_weights: 0\.5 .* layer 1, .* 2, 3"):
        training.weights_of([2, 3])
    with pytest.raises(InputError, match=r"training\.layer_weights: 2\.0 .* layer 4, .* 2, 3"):
        Config.load(None, ["training.layer_weights.4=2", "grouping.layers=[2,3]"])


def test_weights_are_read_back_as_they_were():
    config = Config.load(None, ["training.layer_weights={3: 2, 1: 0.5}"])
    assert Config.parse(yaml.safe_load(config.dump())) == config
