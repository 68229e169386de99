"""One look at all layers together: their means and norms, and the distances between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from groupsae.grouping.distance import AngularDistances, Distances, LayerMoments
from groupsae.host.model import HostModel
from groupsae.host.tokens import TokenStream, special_mask
from groupsae.progress import progress


@dataclass(frozen=True)
class Moments:
    """First moments of each layer's residual stream, from which an SAE's affine is made.

    Attributes
    ----------
    mean
        m_l, the mean residual stream.
    mean_norm
        Mean over tokens of ||x||.
    centered_norm
        Mean over tokens of ||x - m_l||.
    """

    layers: tuple[int, ...]
    mean: Float[Tensor, "layer d_model"]
    mean_norm: Float[Tensor, "layer"]
    centered_norm: Float[Tensor, "layer"]

    def affine(
        self, layers: Sequence[int], kind: str
    ) -> tuple[Float[Tensor, "member d_model"], Float[Tensor, "member"]]:
        """Means and scales (m_l, s_l) for the member layers of an SAE.

        kind "scale": m = 0 and s_l = 1 / mean ||x|| (Group-SAE); "center": the layer's mean and
        s_l = 1 / mean ||x - m_l||; "none": m = 0, s = 1.
        """
        rows = [self.layers.index(layer) for layer in layers]
        zeros, ones = torch.zeros_like(self.mean[rows]), torch.ones_like(self.mean_norm[rows])
        if kind == "scale":
            return zeros, 1 / self.mean_norm[rows]
        if kind == "center":
            return self.mean[rows], 1 / self.centered_norm[rows]
        return zeros, ones

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        tensors = {
            "layers": torch.tensor(self.layers),
            "mean": self.mean,
            "mean_norm": self.mean_norm,
            "centered_norm": self.centered_norm,
        }
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)

    @classmethod
    def load(cls, path: Path) -> Moments:
        """Read what :meth:`save` wrote."""
        tensors = load_file(path)
        return cls(
            tuple(tensors["layers"].tolist()),
            tensors["mean"],
            tensors["mean_norm"],
            tensors["centered_norm"],
        )


@dataclass(frozen=True)
class Measurement:
    """What one measurement of all layers gave."""

    distances: Distances
    moments: Moments
    excluded: int


def measure_layers(
    host: HostModel,
    stream: TokenStream,
    layers: Sequence[int],
    *,
    tokens: int,
    batch_contexts: int,
    center: bool = True,
    special: Iterable[int] = (),
) -> Measurement:
    """Mean angular distances between all pairs of layers, and the layers' moments.

    Two passes over the same tokens: the means first, then distances and norms about them, so that
    centred distances use the exact mean. Definitions: Group-SAE (arXiv 2410.21508 v2, section 3.1).

    Parameters
    ----------
    tokens
        Tokens to read; rounded up to whole contexts.
    center
        Subtract each layer's mean before the angles.
    special
        Token ids to leave out; `excluded` in the result counts them.
    """
    layers, special = tuple(layers), tuple(special)
    cursor = stream.state_dict()
    first = LayerMoments(len(layers), host.d_model, device=host.device)
    for streams, _ in _passes(
        "layer means", host, stream, layers, tokens, batch_contexts, special
    ):
        first.update(streams)
    mean = first.mean()

    stream.load_state_dict(cursor)
    second = LayerMoments(len(layers), host.d_model, center=mean, device=host.device)
    distances = AngularDistances(layers, center=mean if center else None)
    read = kept = 0
    for streams, context in _passes(
        "distances", host, stream, layers, tokens, batch_contexts, special
    ):
        second.update(streams)
        distances.update(streams, context)
        kept += len(context)
    read = -(-tokens // stream.context_length) * stream.context_length
    moments = Moments(
        layers, mean.float().cpu(), first.mean_norm().float().cpu(), second.mean_norm().float().cpu()
    )
    return Measurement(distances.result(), moments, read - kept)


def _passes(
    description: str,
    host: HostModel,
    stream: TokenStream,
    layers: tuple[int, ...],
    tokens: int,
    batch_contexts: int,
    special: tuple[int, ...],
) -> Iterator[tuple[Float[Tensor, "layer token d_model"], Int[Tensor, "token"]]]:
    """Residual streams of all layers at the counted tokens, and which context each is from."""
    contexts = -(-tokens // stream.context_length)
    with progress(description, contexts * stream.context_length) as bar:
        while contexts:
            input_ids = stream.next_contexts(min(batch_contexts, contexts))
            contexts -= len(input_ids)
            mask = ~special_mask(input_ids, special)
            which = mask.nonzero()[:, 0].to(host.device)
            mask = mask.to(host.device)
            streams = host.residual_streams(input_ids.to(host.device), layers)
            yield torch.stack([streams[layer][mask].float() for layer in layers]), which
            bar.advance(input_ids.numel())
