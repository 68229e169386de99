"""The numbers that a step is made with: rates and weights, every default settled."""

from __future__ import annotations

from dataclasses import dataclass

from groupsae.architectures import BY_COUNT, BY_PENALTY
from groupsae.config import TrainingConfig
from groupsae.sae import SAEConfig

_AUXK_WEIGHT = 1 / 32  # Gao et al. 2024, and the paper
_SPARSITY_WEIGHT = {"jumprelu": 1.0, "relu": 0.05, "gated": 0.05}
_BETAS = {"jumprelu": (0.0, 0.999)}  # Rajamanoharan et al. 2024b
# The L0 penalty's gradient shrinks a thousandfold while L0 falls from half of the latents to its
# target; with a memory of a thousand steps Adam would measure each step by the first ones.
_THRESHOLD_BETAS = (0.0, 0.95)
_TRAVEL = 4.0  # what the logarithm of a threshold can move by in a run: a factor of 50


@dataclass(frozen=True)
class Recipe:
    """How one SAE is trained, with every default settled.

    Attributes:
        steps: Of the whole run.
        warmup, decay, sparsity_warmup: In steps.
    """

    steps: int
    learning_rate: float
    threshold_learning_rate: float
    adam_betas: tuple[float, float]
    threshold_betas: tuple[float, float]
    adam_epsilon: float
    gradient_clip: float
    auxk_weight: float
    sparsity_weight: float
    warmup: int
    decay: int
    sparsity_warmup: int

    @classmethod
    def of(cls, training: TrainingConfig, sae: SAEConfig) -> Recipe:
        """The published recipe of the SAE's architecture, but for what the config says."""
        architecture, steps = sae.architecture, training.steps
        penalised = architecture in BY_PENALTY

        def settled(given: float | None, default: float) -> float:
            return default if given is None else given

        rate = training.rate(sae.d_sae)
        auxk = _AUXK_WEIGHT if architecture in BY_COUNT else 0.0
        warmup = settled(training.warmup, 0.05 if penalised else 0.0)
        decay = settled(training.decay, 0.2 if penalised else 0.0)
        return cls(
            steps=steps,
            learning_rate=rate,
            threshold_learning_rate=settled(
                training.threshold_learning_rate, max(_TRAVEL / steps, rate)
            ),
            adam_betas=training.adam_betas or _BETAS.get(architecture, (0.9, 0.999)),
            threshold_betas=training.adam_betas or _THRESHOLD_BETAS,
            adam_epsilon=training.adam_epsilon,
            gradient_clip=training.gradient_clip,
            auxk_weight=settled(training.auxk_weight, auxk),
            sparsity_weight=settled(
                training.sparsity_weight, _SPARSITY_WEIGHT.get(architecture, 0.0)
            ),
            warmup=round(warmup * steps),
            decay=round(decay * steps),
            sparsity_warmup=round(settled(training.sparsity_warmup, 0.05) * steps),
        )

    def rate_factor(self, step: int) -> float:
        """By how much the learning rates are less than at their height.

        Args:
            step: Counted from 1.
        """
        rising = step / self.warmup if self.warmup else 1.0
        falling = (self.steps + 1 - step) / self.decay if self.decay else 1.0
        return max(min(rising, falling, 1.0), 0.0)

    def sparsity_weight_at(self, step: int) -> float:
        """The penalty's weight.

        Args:
            step: Counted from 1.
        """
        if not self.sparsity_warmup:
            return self.sparsity_weight
        return self.sparsity_weight * min(step / self.sparsity_warmup, 1.0)
