"""One look at all layers together: the distances between them, their means and their norms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor

from groupsae.errors import InputError
from groupsae.files import load_tensors, replacing, save_tensors
from groupsae.grouping.distance import LayerMoments, Moments
from groupsae.grouping.matrix import Distances
from groupsae.grouping.similarity import DISTANCES
from groupsae.host.model import HostModel
from groupsae.host.tokens import TokenStream
from groupsae.progress import progress


class Measurement(NamedTuple):
    """Distances between layers, the layers' moments, and how many special tokens were left out."""

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
    similarity: str = "angular",
    special: Iterable[int] = (),
) -> Measurement:
    """Distances between all pairs of layers, and each layer's mean and mean norms.

    Two passes over the same tokens: the means first, then distances and norms about them, so that
    centred distances use the exact mean (Group-SAE, arXiv 2410.21508 v2, section 3).

    Args:
        tokens: How many to read, rounded up to whole contexts.
        batch_contexts: Contexts in one forward.
        center: Subtract each layer's mean before the angles. CKA and SVCCA always do.
        similarity: What the distances are: a key of `grouping.similarity.DISTANCES`.
        special: Token ids to leave out.

    Raises:
        InputError: The activations hold a NaN or an infinity, or every token is special.
        EndOfText: The text is used up.
    """
    layers = tuple(layers)

    def streams_of_all(
        description: str,
    ) -> Iterator[tuple[Float[Tensor, "layer token d_model"], Int[Tensor, " token"]]]:
        """The counted tokens' residual streams, and the context that each token is from."""
        with progress(description, tokens) as bar:
            for input_ids, mask in stream.batches(tokens, batch_contexts, special):
                streams = host.residual_streams(input_ids, layers)
                counted = mask.to(host.device)
                yield (
                    torch.stack([streams[layer][counted] for layer in layers]),
                    mask.nonzero()[:, 0].to(host.device),
                )
                bar.advance(input_ids.numel())

    beginning = stream.state_dict()
    first = LayerMoments(layers)
    for streams, _ in streams_of_all("layer means"):
        first.update(streams)
    mean = first.result().mean

    stream.load_state_dict(beginning)
    second = LayerMoments(layers, center=mean)
    about_mean = center or similarity != "angular"
    distances = DISTANCES[similarity](layers, center=mean if about_mean else None)
    for streams, context in streams_of_all("distances"):
        second.update(streams)
        distances.update(streams, context)
    moments = second.result()
    read = -(-tokens // stream.context_length) * stream.context_length
    return Measurement(distances.result(), moments, excluded=read - moments.tokens)


def save_moments(moments: Moments, path: Path) -> None:
    """Write moments as safetensors, whole or not at all."""
    tensors = {
        name: tensor.contiguous().cpu()
        for name, tensor in vars(moments).items()
        if isinstance(tensor, Tensor)
    }
    tensors["layers"] = torch.tensor(moments.layers)
    tensors["tokens"] = torch.tensor(moments.tokens)
    with replacing(path) as aside:
        save_tensors(tensors, aside)


def load_moments(path: Path) -> Moments:
    """Read what :func:`save_moments` wrote.

    Raises:
        InputError: The file is damaged.
    """
    try:
        tensors = load_tensors(path)
        return Moments(
            layers=tuple(tensors["layers"].tolist()),
            mean=tensors["mean"],
            mean_norm=tensors["mean_norm"],
            mean_centered_norm=tensors.get("mean_centered_norm"),
            tokens=int(tensors["tokens"]),
        )
    except (SafetensorError, KeyError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it to have it made again") from error
