"""Train one sparse autoencoder per group of similar layers of a language model.

The public names are loaded when they are first used: importing the package loads neither torch nor
transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from groupsae.config import Config as Config
    from groupsae.errors import InputError as InputError
    from groupsae.grouping.matrix import Distances as Distances
    from groupsae.grouping.partition import Partition as Partition
    from groupsae.host.model import HostModel as HostModel
    from groupsae.run import Run as Run
    from groupsae.sae import SAE as SAE

_HOMES = {
    "Config": "groupsae.config",
    "Distances": "groupsae.grouping.matrix",
    "HostModel": "groupsae.host.model",
    "InputError": "groupsae.errors",
    "Partition": "groupsae.grouping.partition",
    "Run": "groupsae.run",
    "SAE": "groupsae.sae",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
