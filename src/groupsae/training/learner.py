"""One SAE while it is trained: its optimiser, its dead latents, its metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from groupsae.config import TrainingConfig
from groupsae.sae import SAE
from groupsae.sae.kernels import Step, StepResult, choose
from groupsae.sae.kernels.sharded import reconstruct
from groupsae.sae.kernels.update import normalize_decoder
from groupsae.training.recipe import Recipe
from groupsae.training.shards import Shard

_ADAM_STATE = ("exp_avg", "exp_avg_sq", "step")
_CUT_DECAY = 0.9  # of the running mean of the batches' cuts: one cut is of thousands of activations


class Learner:
    """Trains one SAE by the recipe of its architecture: see :class:`Recipe`.

    A step: loss and gradients; the gradient clipped to norm `gradient_clip`; its component along
    each decoder row removed; Adam; decoder rows brought back to unit norm. A batch whose gradient
    is not finite changes nothing and is counted. Nothing is read back from the device until
    :meth:`metrics` is called, but for the first batch.
    """

    def __init__(
        self,
        sae: SAE,
        config: TrainingConfig,
        *,
        fit_encoder: bool = False,
        fit_thresholds: bool = False,
        shared: Callable[[Step], Step] | None = None,
        shard: Shard | None = None,
    ) -> None:
        """Prepare to train `sae`.

        Args:
            fit_encoder, fit_thresholds: Begin by fitting them to the first batch: see
                :meth:`SAE.fit_encoder`, :meth:`SAE.fit_thresholds`.
            shared: Makes of the kernel's step one that several processes take together.
            shard: Which latents `sae` has, where it is a part of one that several processes hold.
        """
        self.sae, self.config = sae, config
        self.shard = shard or Shard(sae.config)
        self._fit_encoder, self._fit_thresholds = fit_encoder, fit_thresholds
        self.recipe = Recipe.of(config, self.shard.whole)
        self._kernel = choose(config.kernel, sae.W_enc.device, self.shard.ranks)
        self._step = self._kernel.step if shared is None else shared(self._kernel.step)
        self._parameters = dict(sae.named_parameters())
        recipe = self.recipe
        thresholds = [p for name, p in self._parameters.items() if name == "log_threshold"]
        others = [p for name, p in self._parameters.items() if name != "log_threshold"]
        groups: list[dict[str, Any]] = [{"params": others, "height": recipe.learning_rate}]
        if thresholds:
            own = {"height": recipe.threshold_learning_rate, "betas": recipe.threshold_betas}
            groups.append({"params": thresholds, **own})
        self._adam = torch.optim.Adam(
            groups,
            lr=recipe.learning_rate,
            betas=recipe.adam_betas,
            eps=recipe.adam_epsilon,
            fused=True,
        )
        device = sae.W_enc.device
        self.silent_tokens: Int[Tensor, " d_sae"] = torch.zeros(
            sae.config.d_sae, dtype=torch.long, device=device
        )
        self.tokens = self.steps = 0
        self._average = {}
        if config.weight_average is not None:
            self._average = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._cuts_seen: Int[Tensor, " member"] = torch.zeros(
            len(sae.layers), dtype=torch.long, device=device
        )
        self._dropped: Int[Tensor, ""] = torch.zeros((), dtype=torch.long, device=device)
        self._sums: dict[str, Float[Tensor, ""]] = {}
        self._steps_summed: Int[Tensor, ""] = torch.zeros_like(self._dropped)

    def step(
        self, x: Float[Tensor, "token d_model"], members: Int[Tensor, " token"] | None = None
    ) -> StepResult:
        """Move the weights by one mixed batch of normalised activations.

        Args:
            members: Each token's position among the SAE's member layers.
        """
        recipe = self.recipe
        if self.steps == 0:
            self._fit(x, members)
        self.steps += 1
        for group in self._adam.param_groups:
            group["lr"] = group["height"] * recipe.rate_factor(self.steps)
        can_be_dead = self.tokens >= self.config.dead_after_tokens and recipe.auxk_weight
        result = self._step(
            self.sae,
            x,
            members=members,
            dead=self._dead() if can_be_dead else None,
            auxk_weight=recipe.auxk_weight,
            sparsity_weight=recipe.sparsity_weight_at(self.steps),
        )
        gradient_norm = self._kernel.update(
            self.sae, result.gradients, self._adam, gradient_clip=recipe.gradient_clip
        )
        finite = gradient_norm.isfinite()  # else the weights have not moved
        self._dropped += ~finite
        if result.cuts is not None:
            self._move_threshold(torch.where(finite, result.cuts, torch.inf))
        self._move_average()
        tokens = len(x)
        if self.config.layer_sampling == "all":  # a row for each member layer
            tokens //= len(self.sae.layers)
        self.tokens += tokens
        self.silent_tokens += tokens * finite
        self.silent_tokens.masked_fill_(result.fired & finite, 0)
        self._sum(result, gradient_norm, finite)
        return result

    @property
    def n_dropped(self) -> int:
        """How many batches were not finite, and left out. Waits for the device."""
        return int(self._dropped)

    @torch.no_grad()
    def finish(self) -> None:
        """Put the averaged weights, where they are asked for, in the last ones' place."""
        if self.config.weight_average is not None:
            for name, average in self._average.items():
                self._parameters[name].copy_(average)
            normalize_decoder(self.sae)

    def metrics(self) -> dict[str, float]:
        """Means over the steps since the last call, what is dead now, and what was dropped so far.

        Dropped batches are in no mean; where all were, it is NaN.
        """
        steps = int(self._steps_summed) or math.nan
        means = {name: float(total) / steps for name, total in self._sums.items()}
        self._sums = {}
        self._steps_summed.zero_()
        rate = self._adam.param_groups[0]["lr"]
        dead = self._dead().sum()
        if self.shard.ranks is not None:
            dead = self.shard.ranks.sum(dead)
        share = int(dead) / self.shard.whole.d_sae
        return {**means, "dead": share, "lr": rate, "dropped": self.n_dropped}

    def state(self) -> dict[str, Tensor]:
        """Everything that determines the steps to come."""
        state = {f"weights.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for name, parameter in self._parameters.items():
            for key, tensor in self._adam.state[parameter].items():
                state[f"adam.{name}.{key}"] = tensor
        for name, average in self._average.items():
            state[f"average.{name}"] = average
        for name, total in self._sums.items():
            state[f"sums.{name}"] = total
        return {
            **state,
            "silent_tokens": self.silent_tokens,
            "cuts_seen": self._cuts_seen,
            "dropped": self._dropped,
            "steps_summed": self._steps_summed,
            "tokens": torch.tensor(self.tokens),
            "steps": torch.tensor(self.steps),
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
        for name, average in self._average.items():
            average.copy_(state[f"average.{name}"])
        self.silent_tokens.copy_(state["silent_tokens"])
        self._cuts_seen.copy_(state["cuts_seen"])
        self.tokens, self.steps = int(state["tokens"]), int(state["steps"])
        self._dropped.copy_(state["dropped"])
        self._steps_summed.copy_(state["steps_summed"])
        self._sums = {
            key.removeprefix("sums."): total.to(self.silent_tokens.device)
            for key, total in state.items()
            if key.startswith("sums.")
        }

    def _dead(self) -> Bool[Tensor, " d_sae"]:
        return self.silent_tokens >= self.config.dead_after_tokens

    @torch.no_grad()
    def _move_threshold(self, cuts: Float[Tensor, " member"]) -> None:
        """Bring the inference threshold towards a batch's cuts (Bussmann et al. 2024, section 3).

        A running mean that is a plain one at first: the cuts move quickly then.
        """
        seen = cuts.isfinite()
        self._cuts_seen += seen
        weight = (1 / self._cuts_seen.clamp_min(1)).clamp_min(1 - _CUT_DECAY)
        distance = torch.where(seen, cuts - self.sae.threshold, 0.0)
        self.sae.threshold += weight * distance

    @torch.no_grad()
    def _move_average(self) -> None:
        """A running mean that is a plain one at first, and so forgets the start."""
        decay = self.config.weight_average
        if decay is not None:
            for name, average in self._average.items():
                average.lerp_(self._parameters[name], max(1 - decay, 1 / self.steps))

    def _fit(
        self, x: Float[Tensor, "token d_model"], members: Int[Tensor, " token"] | None
    ) -> None:
        """Fit what is to be fitted to the finite rows of the first batch."""
        finite = x.isfinite().all(1)
        x, members = x[finite], None if members is None else members[finite]
        if self._fit_encoder and len(x):
            ranks = self.shard.ranks
            of_all = None if ranks is None else partial(reconstruct, self.sae, ranks)
            self.sae.fit_encoder(x, members, of_all)
        if self._fit_thresholds and len(x):
            self.sae.fit_thresholds(x, members)

    def _sum(
        self, result: StepResult, gradient_norm: Float[Tensor, ""], finite: Bool[Tensor, ""]
    ) -> None:
        values = {
            "loss": result.loss,
            "fvu": result.fvu,
            "auxk": result.auxk,
            "penalty": result.penalty,
            "l0": result.l0,
            "gradient_norm": gradient_norm,
        }
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + torch.where(finite, value, 0.0)
        self._steps_summed += finite
