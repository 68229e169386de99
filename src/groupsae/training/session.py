"""From a partition to trained SAEs: everything that the training loop is given."""

from __future__ import annotations

import logging
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from groupsae.allocator import keep_freed_memory
from groupsae.config import Config
from groupsae.errors import InputError
from groupsae.grouping.distance import Moments
from groupsae.host.ahead import ContextsAhead
from groupsae.host.model import HostModel
from groupsae.host.tokens import TokenStream
from groupsae.sae import SAE, SAEConfig, directory_name
from groupsae.training.activation_cache import CachedActivations
from groupsae.training.batches import MixedBatches, NormLimit
from groupsae.training.checkpoint import Checkpoints
from groupsae.training.learner import Learner
from groupsae.training.memory import MemoryAccount, host_bytes
from groupsae.training.trackers import open_tracker
from groupsae.training.trainer import Record, train

_log = logging.getLogger(__name__)


def train_saes(
    host: HostModel,
    stream: TokenStream,
    moments: Moments,
    groups: Sequence[Sequence[int]],
    config: Config,
    *,
    directory: Path,
    key: str,
    special: Iterable[int] = (),
    cached: CachedActivations | None = None,
) -> dict[str, Any]:
    """Train one SAE per group and, if asked, one per layer, and save them.

    Writes `saes/`, `metrics.jsonl` and, while it trains, `checkpoints/` under `directory`, and
    continues from the newest checkpoint there. Whoever has noted the summary may clear them.

    Args:
        moments: Of every member layer; each SAE's scales and means are made from them.
        groups: Member layers of each group.
        key: Identifies what is trained; only checkpoints with the same key are continued.
        special: Token ids to leave out.
        cached: Read in place of `stream` and of the host model's forwards.

    Returns:
        A summary for `training.json`: SAEs, steps, tokens and what was left out.
    """
    training = config.training
    names = _names(groups, baseline=training.baseline)
    memory = MemoryAccount.of(
        config,
        n_saes=len(names),
        d_model=host.d_model,
        context_length=stream.context_length,
        host=host_bytes(host),
        rows_per_token=sum(map(len, names)) if training.layer_sampling == "all" else None,
    )
    _log.info("memory: %s", memory)
    if host.device.type == "cpu":
        keep_freed_memory()
    saes = {
        own[0]: new_sae(layers, moments, config).to(host.device) for layers, own in names.items()
    }
    aliases = {own[0]: own for own in names.values()}
    contexts = cached or ContextsAhead(stream, ahead=2 * training.host_batch_contexts)
    batches = MixedBatches(
        cached or host,
        contexts,
        saes,
        total_tokens=training.steps * training.batch_tokens,
        batch_tokens=training.batch_tokens,
        buffer_tokens=training.buffer_tokens,
        contexts=training.host_batch_contexts,
        special=special,
        norm_limit=_norm_limit(training.max_norm_multiple, moments),
        layer_sampling=training.layer_sampling,
        layer_weights=training.weights_of(layer for group in groups for layer in group),
        seed=training.seed,
    )
    learners = {name: Learner(sae, training) for name, sae in saes.items()}
    checkpoints = Checkpoints(directory / "checkpoints", key, training.checkpoints_kept)
    with contexts, open_tracker(training.tracker, directory, checkpoints.step(), config) as log:

        def log_by_every_name(record: Record) -> None:
            for name in aliases[record["sae"]]:
                log(record | {"sae": name})

        train(learners, batches, training, checkpoints=checkpoints, log=log_by_every_name)
    for learner in learners.values():
        learner.finish()
    shutil.rmtree(directory / "saes", ignore_errors=True)  # of another partition, where one was
    for own, sae in saes.items():
        for name in aliases[own]:
            sae.save(directory / "saes" / name)
    return {
        "saes": [name for own in aliases.values() for name in own],
        "steps": training.steps,
        "tokens_per_sae": training.steps * training.batch_tokens,
        "tokens_kept": batches.excluded.kept,
        "excluded_special_tokens": batches.excluded.special,
        "excluded_long_tokens": batches.excluded.long,
    }


def new_sae(layers: Sequence[int], moments: Moments, config: Config) -> SAE:
    """An untrained SAE for these layers. Its weights depend on them and on the seed alone."""
    asked = config.sae
    mean, scale = affine(moments, layers, asked.affine)
    shape = sae_config(config, layers, moments.mean.shape[1])
    seed = zlib.crc32(f"{config.training.seed} {directory_name(layers)}".encode())
    return SAE(shape, mean=mean, scale=scale, generator=torch.Generator().manual_seed(seed))


def sae_config(config: Config, layers: Sequence[int], d_model: int) -> SAEConfig:
    """What `config.sae` means for these layers.

    Raises:
        InputError: If it cannot be had at this width.
    """
    asked, d_sae = config.sae, config.sae.width(d_model)
    prefixes = None
    if asked.prefix_shares is not None:
        prefixes = tuple(sorted({max(round(share * d_sae), 1) for share in asked.prefix_shares}))
    return SAEConfig(
        d_model=d_model,
        d_sae=d_sae,
        layers=tuple(layers),
        architecture=asked.architecture,
        k=asked.k,
        prefixes=prefixes,
        target_l0=asked.target_l0,
        bandwidth=asked.bandwidth,
        initial_threshold=asked.initial_threshold,
        per_layer_threshold=asked.per_layer_threshold,
        learned_affine=asked.affine if asked.affine in ("bias", "gain") else "none",
    )


def affine(
    moments: Moments, layers: Sequence[int], kind: str
) -> tuple[Float[Tensor, "member d_model"], Float[Tensor, " member"]]:
    """Mean m_l and scale s_l of each member layer of an SAE.

    Args:
        kind: "scale": m_l = 0 and s_l = 1 / mean ||x|| (Group-SAE v2); "center", and what is
            learned beside it ("bias", "gain"): the layer's mean, and s_l = 1 / mean ||x - m_l||;
            "none": m_l = 0 and s_l = 1.
    """
    rows = [moments.layers.index(layer) for layer in layers]
    mean, mean_norm = moments.mean[rows], moments.mean_norm[rows]
    if kind in ("center", "bias", "gain"):
        if moments.mean_centered_norm is None:
            raise InputError(f"sae.affine: {kind!r} needs norms about the mean; measure them")
        return mean.float(), (1 / moments.mean_centered_norm[rows]).float()
    scale = 1 / mean_norm if kind == "scale" else torch.ones_like(mean_norm)
    return torch.zeros_like(mean).float(), scale.float()


def _names(groups: Sequence[Sequence[int]], *, baseline: bool) -> dict[tuple[int, ...], list[str]]:
    """The names of every SAE to train, by its member layers.

    A group of one layer and that layer's baseline are the same SAE: it is trained once.
    """
    names: dict[tuple[int, ...], list[str]] = {}
    for group in groups:
        names[tuple(group)] = [directory_name(group)]
    if baseline:
        for layer in sorted(layer for group in groups for layer in group):
            names.setdefault((layer,), []).append(f"baseline/{directory_name([layer])}")
    return names


def _norm_limit(multiple: float | None, moments: Moments) -> NormLimit | None:
    if multiple is None:
        return None
    norms: Mapping[int, float] = dict(zip(moments.layers, moments.mean_norm.tolist(), strict=True))
    return NormLimit(multiple, norms)
