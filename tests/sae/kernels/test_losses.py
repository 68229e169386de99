"""The loss of each sparsity rule as its paper writes it, token by token, and autograd of that."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from groupsae.sae import SAE
from groupsae.sae.kernels import reference
from tests.sae.kernels.cases import AFFINES, RULES, random_batch, random_members, sae_with

AUXK, SPARSITY = 0.5, 0.3  # weights that no default has
TOKENS, D_MODEL, D_SAE, N_MEMBERS = 24, 12, 120, 3

COUNTED = [rule for rule, options in RULES.items() if "k" in options]


class Loss(NamedTuple):
    """As in StepResult."""

    loss: Tensor
    fvu: Tensor
    auxk: Tensor
    penalty: Tensor
    l0: Tensor
    cuts: Tensor | None


def written_out(sae: SAE, x: Tensor, members: Tensor, dead: Tensor | None) -> Loss:
    """The definition, one token after another, without the code under test."""
    config, tokens = sae.config, range(len(x))
    products = [product(sae, x[t], members[t]) for t in tokens]
    pre = [row + sae.b_enc for row in products]
    cuts = None
    if config.architecture == "topk":
        z = [keep(row, row >= row.sort(descending=True).values[config.k - 1]) for row in pre]
    elif config.architecture in ("batchtopk", "matryoshka"):
        own = members.tolist() if config.per_layer_threshold else [0] * len(x)
        of_layer = {}
        for layer in set(own):
            values = torch.cat([pre[t] for t in tokens if own[t] == layer]).relu()
            n = config.k * own.count(layer)
            of_layer[layer] = values.sort(descending=True).values[n - 1].detach()
        z = [keep(pre[t], pre[t] >= of_layer[own[t]]) for t in tokens]
        cuts = torch.stack(
            [of_layer[m if config.per_layer_threshold else 0] for m in range(N_MEMBERS)]
        )
    elif config.architecture == "jumprelu":
        z = [pre[t] * (pre[t] > threshold(sae, members[t])) for t in tokens]
    elif config.architecture == "relu":
        z = [torch.relu(row) for row in pre]
    else:
        magnitude = [torch.relu(sae.r_mag.exp() * row + sae.b_enc) for row in products]
        z = [magnitude[t] * (products[t] + sae.b_gate > 0) for t in tokens]

    mean = x.mean(0)
    variance = sum((row - mean).square().sum() for row in x)

    def fvu(latents: list[Tensor], W_dec: Tensor, b_dec: Tensor, gain_out: Tensor | None) -> Tensor:
        squares = x.new_zeros(())
        for t in tokens:
            output = W_dec.T @ latents[t] + b_dec
            if gain_out is not None:
                output = gain_out[members[t]] * output
            squares = squares + (x[t] - output).square().sum()
        return squares / variance

    gain = sae.gain_out if config.learned_affine == "gain" else None
    all_latents = fvu(z, sae.W_dec, sae.b_dec, gain)
    loss = all_latents
    if config.architecture == "matryoshka":
        parts = []
        for end in config.prefixes:
            first = torch.arange(D_SAE) < end
            parts.append(fvu([row * first for row in z], sae.W_dec, sae.b_dec, gain))
        loss = sum(parts) / len(parts)

    penalty = x.new_zeros(())
    if config.architecture == "relu":
        penalty = sum(row.abs().sum() for row in z) / len(x)
    elif config.architecture == "gated":
        gates = [torch.relu(row + sae.b_gate) for row in products]
        penalty = sum(row.sum() for row in gates) / len(x)
        frozen = [None if p is None else p.detach() for p in (sae.W_dec, sae.b_dec, gain)]
        loss = loss + fvu(gates, *frozen)
    elif config.architecture == "jumprelu":
        penalty = l0_penalty(sae, [int((row > 0).sum()) for row in z], members)

    auxk = x.new_zeros(())
    if dead is not None:
        which = dead.nonzero().squeeze(1)
        k_aux = D_MODEL // 2
        for t in tokens:
            candidates = which[pre[t][which].argsort(descending=True)[:k_aux]]
            a = pre[t][candidates].relu()
            output, clean = sae.W_dec[candidates].T @ a, sae.W_dec.T @ z[t] + sae.b_dec
            if gain is not None:
                output, clean = gain[members[t]] * output, gain[members[t]] * clean
            share = min(len(which) / k_aux, 1)
            auxk = auxk + share * ((x[t] - clean).detach() - output).square().sum() / variance
    l0 = torch.tensor(sum(int((row > 0).sum()) for row in z) / len(x), dtype=x.dtype)
    return Loss(loss + AUXK * auxk + SPARSITY * penalty, all_latents, auxk, penalty, l0, cuts)


def product(sae: SAE, row: Tensor, member: Tensor) -> Tensor:
    if sae.config.learned_affine == "gain":
        row = sae.gain_in[member] * row
    result = sae.W_enc @ (row - sae.b_dec)
    return result + sae.latent_bias[member] if sae.config.learned_affine == "bias" else result


def keep(pre: Tensor, which: Tensor) -> Tensor:
    return torch.where(which, pre.relu(), 0.0)


def threshold(sae: SAE, member: Tensor) -> Tensor:
    return sae.log_threshold[member if sae.config.per_layer_threshold else 0].exp()


def l0_penalty(sae: SAE, l0: list[int], members: Tensor) -> Tensor:
    """Of jumprelu, a constant: its gradient is a straight-through estimate."""
    target = sae.config.target_l0
    if target is None:
        return torch.tensor(sum(l0) / len(l0), dtype=torch.float64)
    if not sae.config.per_layer_threshold:
        return torch.tensor((sum(l0) / len(l0) / target - 1) ** 2, dtype=torch.float64)
    parts = []
    for layer in set(members.tolist()):
        own = [count for count, member in zip(l0, members, strict=True) if member == layer]
        parts.append((sum(own) / len(own) / target - 1) ** 2)
    return torch.tensor(sum(parts) / len(parts), dtype=torch.float64)


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("rule", RULES)
def test_loss_and_gradients_are_those_of_the_paper(rule, affine):
    sae = sae_with(rule, affine).double()
    x = random_batch(TOKENS, D_MODEL, dtype=torch.float64)
    members = random_members(TOKENS)
    dead = torch.arange(D_SAE) % 13 == 0 if rule in COUNTED else None
    asked = {"auxk_weight": AUXK, "sparsity_weight": SPARSITY}
    result = reference.step(sae, x, members=members, dead=dead, **asked)
    expected = written_out(sae, x, members, dead)
    assert 0 < expected.l0 < D_SAE
    for name, value in expected._asdict().items():
        if value is None:
            assert getattr(result, name) is None
        else:
            torch.testing.assert_close(getattr(result, name), value.detach(), msg=name)
    trained = {name: p for name, p in sae.named_parameters() if name != "log_threshold"}
    gradients = torch.autograd.grad(expected.loss, list(trained.values()))
    for name, gradient in zip(trained, gradients, strict=True):
        assert gradient.any(), name
        torch.testing.assert_close(result.gradients[name], gradient, msg=name)


def test_auxk_without_a_dead_latent_is_nothing_and_its_share_grows_with_their_number():
    sae = sae_with("batchtopk").double()
    x, members = random_batch(TOKENS, D_MODEL, dtype=torch.float64), random_members(TOKENS)
    for n_dead in (1, 3, 40):
        dead = torch.arange(D_SAE) < n_dead
        result = reference.step(sae, x, members=members, dead=dead, auxk_weight=AUXK)
        torch.testing.assert_close(result.auxk, written_out(sae, x, members, dead).auxk.detach())
    assert reference.step(sae, x, members=members, dead=torch.zeros(D_SAE).bool()).auxk == 0
