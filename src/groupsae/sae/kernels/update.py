"""How gradients move the weights, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from groupsae.sae.autoencoder import SAE


@torch.no_grad()
def update(
    sae: SAE,
    gradients: dict[str, Tensor],
    adam: torch.optim.Adam,
    *,
    gradient_clip: float,
    norm_of: Callable[[Mapping[str, Tensor]], Float[Tensor, ""]] | None = None,
) -> Float[Tensor, ""]:
    """Clip the gradients, remove what lies along decoder rows, step Adam, renormalise the rows.

    The order is that of the published code of Group-SAE. Thresholds are not clipped, nor counted in
    the norm: their straight-through estimates are of another size than gradients, and would hide
    them.

    Args:
        gradients: By parameter name.
        adam: The optimiser of this SAE's parameters.
        gradient_clip: Largest norm of all gradients together.
        norm_of: Gives this norm from the gradients by name, where there are more than these.

    Returns:
        The gradients' norm before it was clipped. If that is not finite, nothing was moved.
    """
    for name, parameter in sae.named_parameters():
        parameter.grad = gradients[name]
    clipped = {name: weight for name, weight in sae.named_parameters() if is_clipped(name)}
    own = {name: gradients[name] for name in clipped}
    norm = torch.nn.utils.get_total_norm(own.values()) if norm_of is None else norm_of(own)
    torch.nn.utils.clip_grads_with_norm_(clipped.values(), gradient_clip, norm)
    remove_parallel_component(sae)
    not_finite = norm.isfinite().logical_not()
    adam.found_inf = not_finite.float()  # type: ignore[attr-defined]  # a fused Adam stays then
    adam.step()
    adam.zero_grad(set_to_none=True)  # of many SAEs one steps at a time: no other's are kept
    normalize_decoder(sae, keep=not_finite)
    return norm


def is_clipped(name: str) -> bool:
    """Whether the gradient of the parameter of that name counts in the norm that is clipped."""
    return name != "log_threshold"


@torch.no_grad()
def remove_parallel_component(sae: SAE) -> None:
    """Remove from the decoder's gradient what would only change its rows' norms.

    Bricken et al. 2023, and Gao et al. 2024 (arXiv 2406.04093), appendix A.
    """
    if sae.W_dec.grad is not None:
        along = torch.linalg.vecdot(sae.W_dec.grad, sae.W_dec).unsqueeze(1)
        sae.W_dec.grad.addcmul_(sae.W_dec, along, value=-1)


@torch.no_grad()
def normalize_decoder(sae: SAE, *, keep: Bool[Tensor, ""] | None = None) -> None:
    """Bring every decoder row back to unit norm, unless `keep` holds, which stays on the device."""
    norms = torch.linalg.vector_norm(sae.W_dec, dim=1, keepdim=True)
    norms.clamp_min_(torch.finfo(norms.dtype).tiny)
    sae.W_dec.div_(norms if keep is None else norms.masked_fill_(keep, 1.0))
