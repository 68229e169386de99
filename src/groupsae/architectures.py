"""The sparsity rules by name, and which options belong to which: no tensors, no torch."""

from __future__ import annotations

from groupsae.errors import InputError

BY_COUNT = ("topk", "batchtopk", "matryoshka")  # so many active latents; AuxK against dead ones
BY_BATCH = ("batchtopk", "matryoshka")  # so many on average over a batch
BY_PENALTY = ("jumprelu", "relu", "gated")  # as many as a penalty on them leaves
WITH_THRESHOLDS = (*BY_BATCH, "jumprelu")
ARCHITECTURES = (*BY_COUNT, *BY_PENALTY)

_BELONGS = {
    "sae.k": BY_COUNT,
    "sae.prefixes": ("matryoshka",),
    "sae.prefix_shares": ("matryoshka",),
    "sae.target_l0": ("jumprelu",),
    "sae.bandwidth": ("jumprelu",),
    "sae.initial_threshold": ("jumprelu",),
    "sae.per_layer_threshold": WITH_THRESHOLDS,
    "training.auxk_weight": BY_COUNT,
    "training.sparsity_weight": BY_PENALTY,
    "training.sparsity_warmup": BY_PENALTY,
    "training.threshold_learning_rate": ("jumprelu",),
}


def check_option(name: str, value: object, architecture: str) -> None:
    """Refuse an option that was given (is not None, False or 0) and belongs to other rules.

    Raises:
        InputError: Naming the option, its value and the rules that have it.
    """
    if value and architecture not in _BELONGS[name]:
        raise InputError(
            f"{name}: {value} does not go with sae.architecture={architecture}; leave it out: it "
            f"belongs to {', '.join(_BELONGS[name])}"
        )
