"""The training step's loss and gradients by dense autograd: slow, plain, and the truth.

Any faster kernel must give these gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from groupsae.sae.autoencoder import SAE
from groupsae.sae.sparsity import Active, JumpReLU, batch_cut, l0_penalty, topk


@dataclass(frozen=True)
class StepResult:
    """What one step's forward and backward pass gave. All of it stays on the device.

    Attributes:
        gradients: By parameter name.
        fvu: Fraction of variance unexplained: the batch's sum of squared errors over its sum of
            squares about the batch mean.
        auxk: The auxiliary loss, before its weight; 0 where no latent is dead.
        penalty: What sparsity costs, before its weight: the mean L1 norm of the activations (relu)
            or of the open gates (gated), or :func:`groupsae.sae.sparsity.l0_penalty` (jumprelu);
            else 0.
        loss: What the gradients are of.
        l0: Mean number of active latents.
        fired: Which latents were active on at least one token.
        cuts: batchtopk and matryoshka: the activation from which on a latent was active, of each
            member layer; infinity for one without tokens.
    """

    gradients: dict[str, Tensor]
    loss: Float[Tensor, ""]
    fvu: Float[Tensor, ""]
    auxk: Float[Tensor, ""]
    penalty: Float[Tensor, ""]
    l0: Float[Tensor, ""]
    fired: Bool[Tensor, " d_sae"]
    cuts: Float[Tensor, " member"] | None = None


def step(
    sae: SAE,
    x: Float[Tensor, "token d_model"],
    *,
    members: Int[Tensor, " token"] | None = None,
    dead: Bool[Tensor, " d_sae"] | None = None,
    auxk_weight: float = 1 / 32,
    sparsity_weight: float = 0.0,
) -> StepResult:
    """Loss and gradients of an SAE on a mixed batch of normalised activations.

    The loss is FVU + auxk_weight * AuxK + sparsity_weight * penalty. FVU is the squared error in
    units of the batch's variance (Group-SAE, arXiv 2410.21508 v2), so that a weight means the same
    at any scale. Beyond that:

    - matryoshka: FVU is the mean over the prefixes, each reconstructing alone (Bussmann et al.
      2025); `fvu` of the result is that of all latents.
    - gated: the open gates' activations reconstruct, too, through the decoder held constant; their
      FVU is added (Rajamanoharan et al. 2024a, equation 8).

    In AuxK (Gao et al. 2024, arXiv 2406.04093, appendix A.2) the k_aux = d_model / 2 most active of
    the `dead` latents reconstruct the residual x - x_hat, which is held constant, without the
    decoder's bias; their squared error is divided by the batch's variance. Where fewer than k_aux
    latents are dead all of them are used and the loss shrinks in proportion, as in EleutherAI's
    sparsify, on which the published code is built.

    Args:
        members: Each token's position among the member layers. It may be left out where nothing
            depends on it.
        dead: Latents that count as dead. None or none dead: no auxiliary loss.
        auxk_weight: Weight of AuxK; Gao et al. use 1/32.
        sparsity_weight: Weight of the penalty.
    """
    parameters = dict(sae.named_parameters())
    with torch.enable_grad():
        variance = (x - x.mean(0)).square().sum()
        products = sae.products(x, members)
        pre_activations = products + sae.b_enc
        z, penalty, cuts = _activate(sae, products, pre_activations, members)

        residual = x - sae.outputs(z @ sae.W_dec, members)
        fvu = residual.square().sum() / variance
        loss = fvu
        if sae.config.prefixes is not None:
            parts = [
                (x - sae.outputs(z[:, :end] @ sae.W_dec[:end], members)).square().sum() / variance
                for end in sae.config.prefixes
            ]
            loss = torch.stack(parts).mean()
        if sae.config.architecture == "gated":
            gates = torch.relu(products + sae.b_gate)
            alone = gates @ sae.W_dec.detach() + sae.b_dec.detach()
            if sae.config.learned_affine == "gain":
                alone = alone * sae.of_member(sae.gain_out, members).detach()
            loss = loss + (x - alone).square().sum() / variance
        auxk = x.new_zeros(())
        if dead is not None and bool(dead.any()):
            which = dead.nonzero().squeeze(1)
            squares = auxk_loss(sae, pre_activations[:, which], which, residual.detach(), members)
            auxk = squares / variance
        loss = loss + auxk_weight * auxk + sparsity_weight * penalty
        gradients = torch.autograd.grad(
            loss, list(parameters.values()), allow_unused=True, materialize_grads=True
        )
    return StepResult(
        gradients=dict(zip(parameters, gradients, strict=True)),
        loss=loss.detach(),
        fvu=fvu.detach(),
        auxk=auxk.detach(),
        penalty=penalty.detach(),
        l0=(z > 0).sum(1).to(x.dtype).mean(),
        fired=(z > 0).any(0),
        cuts=cuts,
    )


def _activate(
    sae: SAE,
    products: Float[Tensor, "token d_sae"],
    pre_activations: Float[Tensor, "token d_sae"],
    members: Int[Tensor, " token"] | None,
) -> tuple[Float[Tensor, "token d_sae"], Float[Tensor, ""], Float[Tensor, " member"] | None]:
    """Activations in training, the penalty for them, and the batch's cuts where there are any."""
    config, n_members = sae.config, len(sae.layers)
    own = sae.sharing(members)
    nothing = products.new_zeros(())
    match config.architecture:
        case "topk":
            assert config.k is not None
            return topk(pre_activations, config.k).dense(config.d_sae), nothing, None
        case "batchtopk" | "matryoshka":
            assert config.k is not None
            z = torch.relu(pre_activations)
            cuts = batch_cut(z.detach(), config.k, own, n_members)
            kept = z >= (cuts if own is None else cuts[own].unsqueeze(1))
            return z * kept, nothing, cuts.expand(n_members)
        case "jumprelu":
            assert config.bandwidth is not None
            threshold = sae.thresholds(members).expand_as(pre_activations)
            z = JumpReLU.apply(pre_activations, threshold, config.bandwidth)  # type: ignore[no-untyped-call]
            active = Active.apply(pre_activations, threshold, config.bandwidth)  # type: ignore[no-untyped-call]
            return z, l0_penalty(active.sum(1), config.target_l0, own, n_members), None
        case "gated":
            z = torch.relu(sae.r_mag.exp() * products + sae.b_enc)
            gate = products + sae.b_gate
            return z * (gate > 0), torch.relu(gate).sum(1).mean(), None
        case _:
            z = torch.relu(pre_activations)
            return z, z.sum(1).mean(), None


def auxk_loss(
    sae: SAE,
    pre_activations: Float[Tensor, "token dead"],
    which: Int[Tensor, " dead"],
    residual: Float[Tensor, "token d_model"],
    members: Int[Tensor, " token"] | None,
) -> Float[Tensor, ""]:
    """AuxK before it is divided by the variance, from the pre-activations of dead latents."""
    k, share = auxk_size(sae.config.d_model, len(which))
    reconstruction = topk(pre_activations, k).dense(len(which)) @ sae.W_dec[which]
    if sae.config.learned_affine == "gain":
        reconstruction = reconstruction * sae.of_member(sae.gain_out, members)
    return share * (residual - reconstruction).square().sum()


def auxk_size(d_model: int, n_dead: int) -> tuple[int, float]:
    """How many dead latents AuxK takes on each token, and the share of its loss that counts."""
    wanted = max(d_model // 2, 1)
    return min(wanted, n_dead), min(n_dead / wanted, 1.0)
