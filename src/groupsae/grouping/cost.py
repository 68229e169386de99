"""What training costs in floating-point operations, and what grouping saves."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields

from groupsae.errors import InputError


@dataclass(frozen=True)
class CostModel:
    """Training cost per token: C(G) = A + T * G (Group-SAE v2, arXiv 2410.21508, section 5).

    A is the host model's forward pass, shared by all SAEs: two operations per block weight, 12 d^2
    weights a block, and 4 c d per block for attention over c tokens, so 24 d^2 L + 4 L c d. T is
    one SAE's dense training step: five products of 2 d d_sae operations.

    Attributes:
        d_model: Width d of the residual stream.
        n_layers: Blocks L of the host model.
        context_length: Tokens c per context.
        d_sae: Latents per SAE.
        last_layer: Refines A: the highest layer that is read. Where given, the forward pass ends
            with that block; the paper counts all blocks.
        block_weights: Refines A: the weights that one block applies to a token. The paper
            takes 12 d^2.

    Raises:
        InputError: A size is not a positive integer, or there is no block `last_layer`.
    """

    d_model: int
    n_layers: int
    context_length: int
    d_sae: int
    _: KW_ONLY
    last_layer: int | None = None
    block_weights: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "last_layer" and value is not None and value < 1:
                raise InputError(f"{field.name} is {value}; the cost model needs at least 1")
        if self.last_layer is not None and not 0 <= self.last_layer < self.n_layers:
            raise InputError(
                f"last_layer is {self.last_layer}; the host model's layers are 0 to "
                f"{self.n_layers - 1}"
            )

    @property
    def forward_flops(self) -> int:
        """A: operations per token of the host model's forward pass."""
        blocks = self.n_layers if self.last_layer is None else self.last_layer + 1
        weights = 12 * self.d_model**2 if self.block_weights is None else self.block_weights
        return blocks * (2 * weights + 4 * self.context_length * self.d_model)

    @property
    def sae_flops(self) -> int:
        """T: operations per token of one SAE's training step."""
        return 10 * self.d_model * self.d_sae

    def flops_per_token(self, G: int) -> int:
        """C(G): operations per token of training G SAEs from one forward pass."""
        if G < 1:
            raise InputError(f"the number of groups is {G}; it is at least 1")
        return self.forward_flops + self.sae_flops * G

    def savings(self, G: int, baseline_groups: int) -> float:
        """The share of the baseline's cost that G groups save: 1 - C(G) / C(baseline_groups)."""
        return 1 - self.flops_per_token(G) / self.flops_per_token(baseline_groups)
