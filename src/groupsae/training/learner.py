"""One SAE while it is trained: its optimiser, its dead latents, its metrics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from groupsae.config import TrainingConfig
from groupsae.sae import SAE
from groupsae.sae.kernels import StepResult, choose

_ADAM_STATE = ("exp_avg", "exp_avg_sq", "step")


class Learner:
    """Trains one SAE by the recipe of Group-SAE v2 (arXiv 2410.21508 v2, appendix).

    A step: loss and gradients; the gradient clipped to norm `gradient_clip`; its component along
    each decoder row removed; Adam; decoder rows brought back to unit norm. Nothing is read back
    from the device until :meth:`metrics` is called.
    """

    def __init__(self, sae: SAE, config: TrainingConfig) -> None:
        self.sae, self.config = sae, config
        self.learning_rate = config.rate(sae.config.d_sae)
        self._kernel = choose(config.kernel, sae.W_enc.device)
        self._parameters = dict(sae.named_parameters())
        self._adam = torch.optim.Adam(
            self._parameters.values(),
            lr=self.learning_rate,
            betas=config.adam_betas,
            eps=config.adam_epsilon,
            fused=True,
        )
        self.silent_tokens: Int[Tensor, " d_sae"] = torch.zeros(
            sae.config.d_sae, dtype=torch.long, device=sae.W_enc.device
        )
        self.tokens = 0
        self._sums: dict[str, Float[Tensor, ""]] = {}
        self._steps_summed = 0

    def step(self, x: Float[Tensor, "token d_model"]) -> StepResult:
        """Move the weights by one mixed batch of normalised activations."""
        can_be_dead = self.tokens >= self.config.dead_after_tokens and self.config.auxk_weight
        result = self._kernel.step(
            self.sae,
            x,
            dead=self._dead() if can_be_dead else None,
            auxk_weight=self.config.auxk_weight,
        )
        gradient_norm = self._kernel.update(
            self.sae, result.gradients, self._adam, gradient_clip=self.config.gradient_clip
        )
        self.tokens += len(x)
        self.silent_tokens += len(x)
        self.silent_tokens.masked_fill_(result.fired, 0)
        self._sum(result, gradient_norm)
        return result

    def metrics(self) -> dict[str, float]:
        """Means over the steps since the last call, and the share of dead latents now."""
        means = {name: float(total) / self._steps_summed for name, total in self._sums.items()}
        self._sums, self._steps_summed = {}, 0
        return {**means, "dead": float(self._dead().float().mean()), "lr": self.learning_rate}

    def state(self) -> dict[str, Tensor]:
        """Everything that determines the steps to come."""
        state = {f"weights.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for name, parameter in self._parameters.items():
            for key, tensor in self._adam.state[parameter].items():
                state[f"adam.{name}.{key}"] = tensor
        for name, total in self._sums.items():
            state[f"sums.{name}"] = total
        return {
            **state,
            "silent_tokens": self.silent_tokens,
            "steps_summed": torch.tensor(self._steps_summed),
            "tokens": torch.tensor(self.tokens),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`state` gave."""
        self.sae.load_state_dict({name: state[f"weights.{name}"] for name in self.sae.state_dict()})
        for name, parameter in self._parameters.items():
            self._adam.state[parameter] = {
                key: state[f"adam.{name}.{key}"].to(parameter.device).clone()
                for key in _ADAM_STATE
                if f"adam.{name}.{key}" in state
            }
        self.silent_tokens.copy_(state["silent_tokens"])
        self.tokens = int(state["tokens"])
        self._steps_summed = int(state["steps_summed"])
        self._sums = {
            key.removeprefix("sums."): total.to(self.silent_tokens.device)
            for key, total in state.items()
            if key.startswith("sums.")
        }

    def _dead(self) -> Bool[Tensor, " d_sae"]:
        return self.silent_tokens >= self.config.dead_after_tokens

    def _sum(self, result: StepResult, gradient_norm: Tensor) -> None:
        values = {
            "loss": result.loss,
            "fvu": result.fvu,
            "auxk": result.auxk,
            "l0": result.l0,
            "gradient_norm": gradient_norm,
        }
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps_summed += 1
