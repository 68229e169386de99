"""From a partition to trained SAEs: everything that the training loop is given."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from groupsae.config import Config
from groupsae.errors import InputError
from groupsae.grouping.distance import Moments
from groupsae.host.model import HostModel
from groupsae.host.tokens import TokenStream
from groupsae.sae import SAE, SAEConfig, directory_name
from groupsae.training.batches import MixedBatches, NormLimit
from groupsae.training.checkpoint import Checkpoints
from groupsae.training.learner import Learner
from groupsae.training.trackers import open_tracker
from groupsae.training.trainer import train


def train_saes(
    host: HostModel,
    stream: TokenStream,
    moments: Moments,
    groups: Sequence[Sequence[int]],
    config: Config,
    *,
    directory: Path,
    special: Iterable[int] = (),
) -> dict[str, Any]:
    """Train one SAE per group and, if asked, one per layer, and save them.

    Writes `saes/`, `metrics.jsonl` and, while it trains, `checkpoints/` under `directory`, and
    continues from the newest checkpoint there.

    Args:
        moments: Of every member layer; each SAE's scales and means are made from them.
        groups: Member layers of each group.
        special: Token ids to leave out.

    Returns:
        A summary for `training.json`: SAEs, steps, tokens and what was left out.
    """
    training = config.training
    saes = {
        name: new_sae(name, layers, moments, config).to(host.device)
        for name, layers in _members(groups, baseline=training.baseline)
    }
    batches = MixedBatches(
        host,
        stream,
        saes,
        total_tokens=training.steps * training.batch_tokens,
        batch_tokens=training.batch_tokens,
        buffer_tokens=training.buffer_tokens,
        contexts=training.host_batch_contexts,
        special=special,
        norm_limit=_norm_limit(config.tokens.max_norm_multiple, moments),
        seed=training.seed,
    )
    learners = {name: Learner(sae, training) for name, sae in saes.items()}
    checkpoints = Checkpoints(directory / "checkpoints", training.checkpoints_kept)
    with open_tracker(training.tracker, directory, checkpoints.step(), config) as log:
        train(learners, batches, training, checkpoints=checkpoints, log=log)
    for name, sae in saes.items():
        sae.save(directory / "saes" / name)
    checkpoints.clear()
    return {
        "saes": list(saes),
        "steps": training.steps,
        "tokens_per_sae": training.steps * training.batch_tokens,
        "tokens_kept": batches.excluded.kept,
        "excluded_special_tokens": batches.excluded.special,
        "excluded_long_tokens": batches.excluded.long,
    }


def new_sae(name: str, layers: Sequence[int], moments: Moments, config: Config) -> SAE:
    """An untrained SAE for these layers. Its weights depend on the seed and its name alone."""
    mean, scale = affine(moments, layers, config.sae.affine)
    d_model = moments.mean.shape[1]
    shape = SAEConfig(
        d_model=d_model,
        d_sae=config.sae.width(d_model),
        k=config.sae.k,
        layers=tuple(layers),
    )
    seed = zlib.crc32(f"{config.training.seed} {name}".encode())
    return SAE(shape, mean=mean, scale=scale, generator=torch.Generator().manual_seed(seed))


def affine(
    moments: Moments, layers: Sequence[int], kind: str
) -> tuple[Float[Tensor, "member d_model"], Float[Tensor, " member"]]:
    """Mean m_l and scale s_l of each member layer of an SAE.

    Args:
        kind: "scale": m_l = 0 and s_l = 1 / mean ||x|| (Group-SAE v2); "center": the layer's mean,
            and s_l = 1 / mean ||x - m_l||; "none": m_l = 0 and s_l = 1.
    """
    rows = [moments.layers.index(layer) for layer in layers]
    mean, mean_norm = moments.mean[rows], moments.mean_norm[rows]
    if kind == "center":
        if moments.mean_centered_norm is None:
            raise InputError("sae.affine: 'center' needs norms about the mean; measure them")
        return mean.float(), (1 / moments.mean_centered_norm[rows]).float()
    scale = 1 / mean_norm if kind == "scale" else torch.ones_like(mean_norm)
    return torch.zeros_like(mean).float(), scale.float()


def _members(
    groups: Sequence[Sequence[int]], *, baseline: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and member layers of every SAE to train."""
    for group in groups:
        yield directory_name(group), tuple(group)
    if baseline:
        for layer in sorted(layer for group in groups for layer in group):
            yield f"baseline/{directory_name([layer])}", (layer,)


def _norm_limit(multiple: float | None, moments: Moments) -> NormLimit | None:
    if multiple is None:
        return None
    norms: Mapping[int, float] = dict(zip(moments.layers, moments.mean_norm.tolist(), strict=True))
    return NormLimit(multiple, norms)
