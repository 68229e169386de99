from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from groupsae.errors import InputError
from groupsae.host.model import HostModel
from groupsae.interpretation.logit_attribution import logit_attribution
from groupsae.interpretation.unembedding import Unembedding, _balanced, unembedding_of
from tests.host.tiny_models import ARCHITECTURES, D_MODEL, VOCAB_SIZE, random_model, tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_final_norm_and_the_unembedding_of_every_architecture(architecture):
    model = tiny_model(architecture)
    found = unembedding_of(HostModel(model))
    norm = model.get_submodule(ARCHITECTURES[architecture].final_norm)
    weight = norm.weight + 1 if architecture.startswith("gemma") else norm.weight
    torch.testing.assert_close(found.gain, weight.detach(), rtol=1e-4, atol=1e-5)
    assert found.centred == isinstance(norm, nn.LayerNorm)
    assert torch.equal(found.W_U, model.get_output_embeddings().weight)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_small_step_along_a_direction_moves_the_logits_as_attributed(architecture):
    """Differences of the model's own head in float64. Only the norm's division is held still: by
    directions that leave the size of the stream as it is.
    """
    model = tiny_model(architecture)
    found = unembedding_of(HostModel(model))
    norm = copy.deepcopy(model.get_submodule(ARCHITECTURES[architecture].final_norm)).double()
    head = copy.deepcopy(model.get_output_embeddings()).double()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, D_MODEL, generator=generator, dtype=torch.float64)
    x = 100 * torch.randn(D_MODEL, generator=generator, dtype=torch.float64)
    size = x - x.mean() if isinstance(norm, nn.LayerNorm) else x
    rows -= (rows @ size / (size @ size)).outer(size)
    with torch.no_grad():
        moved = torch.stack(
            [head(norm(x + 1e-3 * row)) - head(norm(x - 1e-3 * row)) for row in rows]
        )
    logits = found.directions(rows.float()) @ found.W_U.T
    assert (torch.cosine_similarity(moved, logits.double()) > 1 - 1e-5).all()


def dense(rows, gain, W_U, centred):
    """[latent, vocab] in float64."""
    rows, W_U = rows.double(), W_U.double()
    if centred:
        rows = rows - rows.mean(1, keepdim=True)
    logits = (rows * gain.double()) @ W_U.T
    return logits - logits.mean(1, keepdim=True)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("block", [1, 3, 100])
def test_the_ends_are_those_of_the_dense_product(centred, block):
    generator = torch.Generator().manual_seed(1)
    W_U, rows = torch.randn(50, 12, generator=generator), torch.randn(7, 12, generator=generator)
    gain = torch.rand(12, generator=generator)
    W_U += 3  # a mean that centring has to take off
    found = logit_attribution(rows, Unembedding(W_U, gain, centred), n=6, block=block)
    logits = dense(rows, gain, W_U, centred)
    for values, ids, largest in (
        (found.largest_values, found.largest, True),
        (found.smallest_values, found.smallest, False),
    ):
        expected = logits.topk(6, largest=largest)
        assert torch.equal(ids, expected.indices)
        torch.testing.assert_close(values.double(), expected.values, rtol=1e-4, atol=1e-4)


def test_ids_that_the_tokenizer_does_not_know_are_left_out():
    generator = torch.Generator().manual_seed(1)
    W_U, rows = torch.randn(50, 12, generator=generator), torch.randn(7, 12, generator=generator)
    unembedding = Unembedding(W_U, torch.ones(12), False)
    known = torch.tensor([40, 3, 7, 21, 33])
    found = logit_attribution(rows, unembedding, n=5, token_ids=known)
    alone = logit_attribution(rows, Unembedding(W_U[known], torch.ones(12), False), n=5)
    assert torch.equal(found.largest, known[alone.largest])
    assert torch.equal(found.largest_values, alone.largest_values)
    assert torch.equal(found.smallest, found.largest.flip(1))


@pytest.mark.parametrize("n", [0, 51])
def test_an_impossible_number_of_tokens_is_refused(n):
    unembedding = Unembedding(torch.ones(50, 4), torch.ones(4), False)
    with pytest.raises(InputError, match=f"n={n} tokens"):
        logit_attribution(torch.ones(2, 4), unembedding, n=n)


@pytest.mark.parametrize("d_model", [4, 5, 7, 32, 33])
def test_the_pattern_that_measures_a_gain(d_model):
    pattern = _balanced(d_model)
    assert pattern.mean() == pytest.approx(0, abs=1e-6)
    assert pattern.square().mean() == pytest.approx(1)
    assert pattern.abs().min() > 0


def test_a_model_without_a_final_norm():
    model = tiny_model("gpt2")
    model.transformer.ln_f = nn.Identity()
    found = unembedding_of(HostModel(model))
    assert torch.equal(found.gain, torch.ones(D_MODEL))
    assert not found.centred


def test_a_head_that_is_not_understood_is_refused():
    model = tiny_model("gpt2")
    model.transformer.ln_f = nn.Tanh()
    with pytest.raises(InputError, match=r"final norm \(Tanh\) is neither"):
        unembedding_of(HostModel(model))
    model.transformer.ln_f = nn.Sequential(nn.LayerNorm(D_MODEL), nn.Linear(D_MODEL, D_MODEL))
    with pytest.raises(InputError, match="leave them out for this one"):
        unembedding_of(HostModel(model))
    narrow = transformers.OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=D_MODEL,
        word_embed_proj_dim=16,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=48,
        do_layer_norm_before=False,
    )
    with pytest.raises(InputError, match="does not take a stream of d_model"):
        unembedding_of(HostModel(random_model(transformers.AutoModelForCausalLM, narrow)))


def test_weights_in_sixteen_bit():
    model = tiny_model("llama")
    expected = unembedding_of(HostModel(model)).gain
    found = unembedding_of(HostModel(model.to(torch.bfloat16)))
    torch.testing.assert_close(found.gain, expected, rtol=0.02, atol=0.01)
    assert found.W_U.dtype == torch.float32
