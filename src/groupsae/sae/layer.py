"""An SAE as one of its member layers sees it."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from groupsae.sae.autoencoder import SAE
from groupsae.sae.sparsity import Latents


class LayerSAE(nn.Module):
    """One member layer's view of a group's SAE: residual streams in, residual streams out.

    Nothing is copied: `sae` is the group's SAE itself, and its parameters are this module's. A
    latent has the same index and the same unit at every member layer; what one unit of it adds to
    the residual stream differs by the layer's scale: see :meth:`directions`.

    Attributes:
        sae: The group's SAE.
        layer: Whose residual streams this takes and gives, in the host model's own units.
    """

    def __init__(self, sae: SAE, layer: int) -> None:
        """Take an SAE at one of its layers.

        Raises:
            InputError: The layer is no member of it.
        """
        super().__init__()
        sae.member(layer)
        self.sae, self.layer = sae, layer

    def encode(self, x: Float[Tensor, "*token d_model"]) -> Latents:
        """The active latents of residual streams."""
        return self.sae.encode(x, self.layer)

    def decode(self, latents: Latents) -> Float[Tensor, "*token d_model"]:
        """Reconstruct residual streams from latents, in the weights' dtype."""
        return self.sae.decode(latents, self.layer)

    def forward(self, x: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token d_model"]:
        """Reconstruct x, in its dtype."""
        return self.sae(x, self.layer)  # type: ignore[no-any-return]

    def directions(self, latents: Int[Tensor, " latent"]) -> Float[Tensor, "latent d_model"]:
        """What one unit of each of these latents adds to the residual stream.

        The decoder's row over the layer's scale, times the layer's learned gain where there is one.
        """
        rows, member = self.sae.W_dec[latents], self.sae.member(self.layer)
        if self.sae.config.learned_affine == "gain":
            rows = rows * self.sae.gain_out[member]
        return rows / self.sae.scale[member]

    def extra_repr(self) -> str:
        """Which layer, in the module's printed form."""
        return f"layer={self.layer}"
