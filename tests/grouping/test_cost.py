from __future__ import annotations

import pytest

from groupsae.errors import InputError
from groupsae.grouping.cost import CostModel

# Group-SAE v2, arXiv 2410.21508: 1B tokens, d_sae = 16 d, contexts of 1,024 tokens.
# (blocks, d_model, A in PFLOP, T in PFLOP, G at theta = 0.2, layers, saving in %)
PUBLISHED = {
    "pythia-160m": (12, 768, 207.62, 94.37, 6, 11, 38),
    "pythia-410m": (24, 1024, 704.64, 167.77, 9, 23, 51),
    "pythia-1b": (16, 2048, 1744.83, 671.09, 6, 15, 51),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_figures(model: str) -> None:
    n_layers, d_model, forward, sae, G, baseline_groups, saving = PUBLISHED[model]
    cost = CostModel(d_model, n_layers, context_length=1024, d_sae=16 * d_model)
    petaflops = 1e9 / 1e15  # of 1B tokens
    assert round(cost.forward_flops * petaflops, 2) == forward
    assert round(cost.sae_flops * petaflops, 2) == sae
    assert cost.flops_per_token(G) * petaflops == pytest.approx(forward + G * sae, abs=0.05)
    assert round(100 * cost.savings(G, baseline_groups)) == saving


def test_the_paper_is_refined_by_what_is_known_of_the_model() -> None:
    paper = CostModel(64, 8, 128, 1024)
    assert CostModel(64, 8, 128, 1024, last_layer=7) == CostModel(
        64, 8, 128, 1024, last_layer=7, block_weights=None
    )
    assert CostModel(64, 8, 128, 1024, last_layer=7).forward_flops == paper.forward_flops
    assert CostModel(64, 8, 128, 1024, last_layer=3).forward_flops * 2 == paper.forward_flops
    same = CostModel(64, 8, 128, 1024, block_weights=12 * 64**2)
    assert same.forward_flops == paper.forward_flops
    gated = CostModel(64, 8, 128, 1024, block_weights=13 * 64**2)
    assert gated.forward_flops - paper.forward_flops == 8 * 2 * 64**2
    assert gated.sae_flops == paper.sae_flops


def test_savings_run_from_none_to_the_shared_forward() -> None:
    cost = CostModel(64, 8, 128, 1024)
    savings = [cost.savings(G, 7) for G in range(1, 8)]
    assert savings == sorted(savings, reverse=True)
    assert savings[-1] == 0


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({"d_model": 0}, "d_model is 0"),
        ({"n_layers": -1}, "n_layers is -1"),
        ({"d_sae": 0}, "d_sae is 0"),
        ({"context_length": 0}, "context_length is 0"),
        ({"block_weights": 0}, "block_weights is 0"),
        ({"last_layer": 8}, "last_layer is 8; .* 0 to 7"),
        ({"last_layer": -1}, "last_layer is -1"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        CostModel(**({"d_model": 64, "n_layers": 8, "context_length": 128, "d_sae": 1024} | sizes))


def test_no_groups_are_refused() -> None:
    with pytest.raises(InputError, match="number of groups is 0"):
        CostModel(64, 8, 128, 1024).flops_per_token(0)
