from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from groupsae.sae import topk


@given(
    arrays("float64", (5, 7), elements=st.floats(-10, 10, allow_subnormal=False)),
    st.integers(1, 7),
)
def test_topk_is_the_k_largest_of_the_positive_part(values, k):
    pre_activations = torch.from_numpy(values)
    z = topk(pre_activations, k).dense(7)
    expected = pre_activations.relu().sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(z.sort(dim=1, descending=True).values[:, :k], expected)
    assert torch.equal(z[z > 0], pre_activations[z > 0])
    assert ((z > 0).sum(1) <= k).all()


def test_latents_that_are_not_positive_do_not_count_as_active():
    latents = topk(torch.tensor([[3.0, -1.0, 2.0, -5.0]]), k=3)
    assert latents.l0().item() == 2
    assert torch.equal(latents.dense(4), torch.tensor([[3.0, 0.0, 2.0, 0.0]]))


def test_gradient_flows_into_the_chosen_values_only():
    pre_activations = torch.tensor([[3.0, 1.0, 2.0, -5.0]], requires_grad=True)
    topk(pre_activations, k=2).values.sum().backward()
    assert torch.equal(pre_activations.grad, torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
