"""The training step's loss and gradients: `reference` is the truth, `sparse` is what is used."""

from groupsae.sae.kernels.reference import StepResult
from groupsae.sae.kernels.sparse import step

__all__ = ["StepResult", "step"]
