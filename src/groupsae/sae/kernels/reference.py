"""The training step's loss and gradients by dense autograd: slow, plain, and the truth.

Any faster kernel must give these gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from groupsae.sae.autoencoder import SAE
from groupsae.sae.sparsity import topk


@dataclass(frozen=True)
class StepResult:
    """What one step's forward and backward pass gave. All of it stays on the device.

    Attributes:
        gradients: By parameter name: W_enc, b_enc, W_dec, b_dec.
        fvu: Fraction of variance unexplained: the batch's sum of squared errors over its sum of
            squares about the batch mean.
        auxk: The auxiliary loss, before its weight; 0 where no latent is dead.
        loss: fvu + auxk_weight * auxk.
        l0: Mean number of active latents.
        fired: Which latents were active on at least one token.
    """

    gradients: dict[str, Tensor]
    loss: Float[Tensor, ""]
    fvu: Float[Tensor, ""]
    auxk: Float[Tensor, ""]
    l0: Float[Tensor, ""]
    fired: Bool[Tensor, " d_sae"]


def step(
    sae: SAE,
    x: Float[Tensor, "token d_model"],
    *,
    dead: Bool[Tensor, " d_sae"] | None = None,
    auxk_weight: float = 1 / 32,
) -> StepResult:
    """Loss and gradients of a TopK SAE on a mixed batch of normalised activations.

    The loss is that of Group-SAE (arXiv 2410.21508 v2), after Gao et al. 2024 (arXiv 2406.04093,
    appendix A.2): FVU + auxk_weight * AuxK. In AuxK the k_aux = d_model / 2 most active of the
    `dead` latents reconstruct the residual x - x_hat, which is held constant, without the decoder's
    bias; their squared error is divided by the batch's variance. Where fewer than k_aux latents
    are dead all of them are used and the loss shrinks in proportion, as in EleutherAI's sparsify,
    on which the published code is built.

    Args:
        dead: Latents that count as dead. None or none dead: no auxiliary loss.
        auxk_weight: Weight of AuxK; Gao et al. use 1/32.
    """
    parameters = dict(sae.named_parameters())
    with torch.enable_grad():
        pre_activations = F.linear(x - sae.b_dec, sae.W_enc, sae.b_enc)
        latents = topk(pre_activations, sae.config.k)
        z = latents.dense(sae.config.d_sae)
        residual = x - (z @ sae.W_dec + sae.b_dec)
        variance = (x - x.mean(0)).square().sum()
        fvu = residual.square().sum() / variance
        auxk = x.new_zeros(())
        if dead is not None and bool(dead.any()):
            auxk = _auxk(sae, pre_activations, residual.detach(), dead) / variance
        loss = fvu + auxk_weight * auxk
        gradients = torch.autograd.grad(loss, list(parameters.values()))
    return StepResult(
        gradients=dict(zip(parameters, gradients, strict=True)),
        loss=loss.detach(),
        fvu=fvu.detach(),
        auxk=auxk.detach(),
        l0=latents.l0().mean().detach(),
        fired=(z > 0).any(0),
    )


def _auxk(
    sae: SAE,
    pre_activations: Float[Tensor, "token d_sae"],
    residual: Float[Tensor, "token d_model"],
    dead: Bool[Tensor, " d_sae"],
) -> Float[Tensor, ""]:
    which = dead.nonzero().squeeze(1)
    wanted = max(sae.config.d_model // 2, 1)
    latents = topk(pre_activations[:, which], min(wanted, len(which)))
    reconstruction = latents.dense(len(which)) @ sae.W_dec[which]
    share = min(len(which) / wanted, 1.0)
    return share * (residual - reconstruction).square().sum()
