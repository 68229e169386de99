"""Settings of the paper by name: `preset: group-sae-v2`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# What is not listed is the default, which is the paper's where it is one of these: Adam's rates,
# the learning rate by the dictionary's size, AuxK's weight of 1/32.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # arXiv 2410.21508v1 (October 2024): JumpReLU. A weight ("lambda") of 1 is published, but not
    # of which form of the penalty. It is the usual weight of the squared relative distance from a
    # target L0, the form taken here; of the L0 itself it would leave no latent active. The target
    # is this library's default, not a published figure.
    "group-sae-v1": {
        "grouping": {"distance_tokens": 5_000_000, "center": False},
        "sae": {"architecture": "jumprelu", "target_l0": 32, "expansion": 8, "affine": "scale"},
        "training": {
            "tokens": 1_000_000_000,
            "batch_tokens": 4096,
            "learning_rate": 3e-5,
            "adam_betas": (0.0, 0.999),
            "sparsity_weight": 1.0,
            "warmup": 0.05,
            "decay": 0.2,
        },
    },
    # arXiv 2410.21508v2 (September 2025): TopK. A batch is what the published scripts' 8 processes
    # see together for Pythia 160M: 16 contexts each. Its encoder starts as torch.nn.Linear does,
    # whose rows have a norm of 1 / sqrt(3).
    "group-sae-v2": {
        "tokens": {"context_length": 1024},
        "grouping": {"distance_tokens": 10_000_000, "center": True, "threshold": 0.2},
        "sae": {
            "architecture": "topk",
            "k": 128,
            "expansion": 16,
            "affine": "scale",
            "encoder_norm": 0.577,
        },
        "training": {
            "tokens": 1_000_000_000,
            "batch_tokens": 131_072,
            "buffer_tokens": 262_144,
            "gradient_clip": 1.0,
            "dead_after_tokens": 10_000_000,
        },
        "evaluation": {"tokens": 1_000_000},
    },
}


def beneath(values: Any) -> Any:
    """The values of a config, with those of the preset that it names where it gives none.

    What is given wins, a null too. Anything that is not well-formed is left for validation.
    """
    name = values.get("preset") if isinstance(values, Mapping) else None
    if not isinstance(name, str) or name not in PRESETS:
        return values
    laid = dict(values)
    for section, preset in PRESETS[name].items():
        given = values.get(section, {})
        if isinstance(given, Mapping):
            laid[section] = {**preset, **given}
    return laid


def described(name: str) -> str:
    """A preset's keys and values in one line."""
    return ", ".join(
        f"{section}.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for section, keys in PRESETS[name].items()
        for key, value in keys.items()
    )
