"""A configuration and weights in files, as SAELens and sparsify have them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from groupsae.files import save_tensors, write_json


def write_config_and_weights(
    config_path: Path, config: Mapping[str, Any], weights_path: Path, weights: Mapping[str, Tensor]
) -> None:
    """Write the weights, in float32, then the configuration."""
    save_tensors({name: one.float().contiguous() for name, one in weights.items()}, weights_path)
    write_json(config_path, config)
