"""The training step's loss and gradients, and the choice among ways to compute them."""

from groupsae.sae.kernels.reference import StepResult, step

__all__ = ["StepResult", "step"]
