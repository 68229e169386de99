"""From a partition to trained SAEs: everything that the training loop is given."""

from __future__ import annotations

import logging
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from groupsae.allocator import keep_freed_memory
from groupsae.config import Config, TrainingConfig
from groupsae.config import SAEConfig as AskedSAE
from groupsae.errors import InputError
from groupsae.grouping.distance import Moments
from groupsae.host.ahead import ContextsAhead
from groupsae.host.model import HostModel
from groupsae.host.tokens import TokenStream
from groupsae.sae import SAE, SAEConfig, directory_name
from groupsae.sae.kernels import Step
from groupsae.training.activation_cache import CachedActivations
from groupsae.training.batches import Affine, MixedBatches, NormLimit
from groupsae.training.checkpoint import Checkpoints
from groupsae.training.exchange import RowExchange, SharedContexts, SharedStep
from groupsae.training.learner import Learner
from groupsae.training.memory import MemoryAccount, host_bytes, size
from groupsae.training.mesh import Mesh
from groupsae.training.shards import Shard, ShardRanks, check_shards
from groupsae.training.start import Start, open_start, text_read
from groupsae.training.team import Team
from groupsae.training.trackers import open_tracker
from groupsae.training.trainer import Record, train

_log = logging.getLogger(__name__)

BASELINE, TWIN = "baseline", "twin"  # folders below `saes/`

# Keys of `training` in which SAEs of one forward may differ; `seed` as that of the weights.
OWN = (
    "learning_rate",
    "threshold_learning_rate",
    "warmup",
    "decay",
    "weight_average",
    "adam_betas",
    "adam_epsilon",
    "gradient_clip",
    "auxk_weight",
    "sparsity_weight",
    "sparsity_warmup",
    "dead_after_tokens",
    "seed",
)


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
    team: Team | None = None,
) -> dict[str, Any]:
    """Train one SAE per group and, if asked, one or two per layer, and save them.

    Writes `saes/`, `metrics.jsonl` and, while it trains, `checkpoints/` under `directory`, and
    continues from the newest checkpoint there. Whoever has noted the summary may clear them.

    Args:
        moments: Of every member layer; each SAE's scales and means are made from them.
        groups: Member layers of each group, of one partition or of several.
        key: Identifies what is trained; only checkpoints with the same key are continued.
        special: Token ids to leave out.
        cached: Read in place of `stream` and of the host model's forwards.
        team: The processes that train together; all call this with the same arguments.

    Returns:
        A summary for `training.json`: SAEs, steps, tokens, what was left out, what was read.
    """
    return train_entries(
        host,
        stream,
        moments,
        entries_of(groups, config) + twins_of(groups, config),
        config,
        directory=directory,
        key=key,
        special=special,
        cached=cached,
        team=team,
    )


@dataclass(frozen=True)
class Entry:
    """One SAE to train beside others.

    Attributes:
        name: The folder below `saes/` that it is saved in.
        layers: Its member layers.
        config: Its `sae`, and the keys `OWN` of its `training`, are its own.
    """

    name: str
    layers: tuple[int, ...]
    config: Config

    def trained_as(self) -> Hashable:
        """What its training depends on, besides what all entries share."""
        training = self.config.training
        return self.layers, self.config.sae, tuple(getattr(training, name) for name in OWN)


def entries_of(groups: Sequence[Sequence[int]], config: Config, below: str = "") -> list[Entry]:
    """One SAE per group and, if `training.baseline` asks, one per layer.

    Args:
        below: What their names begin with.
    """
    names = _names(groups, baseline=config.training.baseline)
    return [Entry(below + name, layers, config) for layers, own in names.items() for name in own]


def twins_of(groups: Sequence[Sequence[int]], config: Config) -> list[Entry]:
    """If `training.twins` asks, a second SAE per layer, whose weights start from the next seed."""
    if not config.training.twins:
        return []
    training = config.training.model_copy(update={"seed": config.training.seed + 1})
    own = config.model_copy(update={"training": training})
    layers = sorted({layer for group in groups for layer in group})
    return [Entry(f"{TWIN}/{directory_name([layer])}", (layer,), own) for layer in layers]


def distinct(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Entries that differ in nothing but their names together: they are trained once."""
    found: dict[Hashable, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.trained_as(), []).append(entry)
    return list(found.values())


def train_entries(
    host: HostModel,
    stream: TokenStream,
    moments: Moments,
    entries: Sequence[Entry],
    config: Config,
    *,
    directory: Path,
    key: str,
    special: Iterable[int] = (),
    cached: CachedActivations | None = None,
    team: Team | None = None,
) -> dict[str, Any]:
    """Train SAEs of several settings side by side from the same forwards, and save them.

    Those with the same member layers, means and scales see identical batches, which are held once;
    what else learns from them changes nothing in an SAE. Arguments, files and summary are those of
    :func:`train_saes`, but for:

    Args:
        entries: What to train.
        config: What they share: host, text, tokens and size of a batch, layer sampling and so on;
            its `training.seed` is that of the batches, an entry's that of its weights.

    Raises:
        InputError: If two entries have one name, or one differs in what all must share.
    """
    _check_entries(entries, config)
    training, team = config.training, team or Team()
    trained = {same[0].name: same for same in distinct(entries)}
    mesh = mesh_of(team, [same[0].config.sae for same in trained.values()], training, host.d_model)
    start = open_start(config, host)
    columns = mesh.deal(
        {name: same[0].config.sae.width(host.d_model) for name, same in trained.items()}
    )
    shared, ranks = _sharing(team, mesh)
    saes: dict[str, SAE] = {}  # that this process trains, of each the latents that it holds
    shards: dict[str, Shard] = {}
    mixtures: dict[str, Affine] = {}  # of all
    for name, same in trained.items():
        sae = new_sae(same[0].layers, moments, same[0].config, start)
        mixtures[name] = Affine(sae.layers, sae.mean, sae.scale).to(host.device)
        if columns[name] == mesh.column(team.rank):
            shards[name] = Shard(sae.config, ranks)
            saes[name] = shards[name].part_of(sae).to(host.device)
    if start is not None and (passed := start.go_on(cached or stream)):
        _log.info("the text of %s continues after %s tokens", start.path, f"{passed:,}")
    slots = _slots(mixtures)
    if saes:  # there may be more processes than SAEs
        memory = MemoryAccount.of_widths(
            training,
            [sae.config.d_sae for sae in saes.values()],
            slots=[
                len(mixtures[slot].layers) if training.layer_sampling == "all" else 1
                for slot, names in slots.items()
                if not saes.keys().isdisjoint(names)
            ],
            d_model=host.d_model,
            context_length=stream.context_length,
            host=host_bytes(host),
        )
        _log.info("memory: %s", memory)
        if training.checkpoint_in_background and training.steps > training.checkpoint_every:
            _log.info("memory: %s more while a checkpoint is written", size(memory.checkpoint))
    if host.device.type == "cpu":
        keep_freed_memory()
    ahead = 2 * team.size * training.host_batch_contexts
    contexts: ContextsAhead | SharedContexts | CachedActivations
    contexts = cached or ContextsAhead(stream, ahead)
    exchange = None
    if team.size > 1:
        wanted = [
            [slot for slot, names in slots.items() if any(columns[n] == column for n in names)]
            for column in map(mesh.column, range(team.size))
        ]
        if cached is None:
            contexts, exchange = SharedContexts(stream, team, ahead), RowExchange(team, wanted)
        else:  # which each process reads for itself
            exchange = RowExchange(Team(), [wanted[team.rank]])
    batches = MixedBatches(
        cached or host,
        contexts,
        {slot: mixtures[slot] for slot in slots},
        total_tokens=training.steps * training.batch_tokens,
        batch_tokens=training.batch_tokens,
        buffer_tokens=training.buffer_tokens,
        contexts=training.host_batch_contexts,
        special=special,
        norm_limit=_norm_limit(training.max_norm_multiple, moments),
        layer_sampling=training.layer_sampling,
        layer_weights=training.weights_of({layer for entry in entries for layer in entry.layers}),
        seed=training.seed,
        exchange=exchange,
    )
    learners = {
        name: new_learner(
            sae, trained[name][0].config, fresh=start is None, shared=shared, shard=shards[name]
        )
        for name, sae in saes.items()
    }
    first_row = mesh.row(team.rank) == 0
    checkpoints = Checkpoints(
        directory / "checkpoints",
        key,
        training.checkpoints_kept,
        in_background=training.checkpoint_in_background,
        team=team,
        writes=saes.keys() if first_row else (),
        writes_rows=saes.keys() if first_row and mesh.shard(team.rank) == 0 else (),
    )
    begun = checkpoints.begun
    tracker = open_tracker(training.tracker, directory, begun, config) if team.first else _untold()
    with contexts, tracker as log:

        def log_by_every_name(record: Record) -> None:
            for entry in trained[record["sae"]]:
                log(record | {"sae": entry.name})

        train(
            learners,
            batches,
            training,
            checkpoints=checkpoints,
            log=log_by_every_name,
            slots=slots,
            team=team,
        )
    for learner in learners.values():
        learner.finish()
    if team.first:
        shutil.rmtree(directory / "saes", ignore_errors=True)  # of another partition, where one was
    team.wait()
    if first_row:
        for name, sae in saes.items():
            if (whole := shards[name].joined(sae)) is not None:
                for entry in trained[name]:
                    whole.save(directory / "saes" / entry.name)
    team.wait()  # else training could count as done before the last SAE is there
    read = text_read(contexts) if team.first else {}
    return {
        "saes": [entry.name for same in trained.values() for entry in same],
        "steps": training.steps,
        "tokens_per_sae": training.steps * training.batch_tokens,
        "tokens_kept": batches.excluded.kept,
        "excluded_special_tokens": batches.excluded.special,
        "excluded_long_tokens": batches.excluded.long,
        "seconds_for_checkpoints": round(checkpoints.seconds_waited, 3),
        **read,
    }


def mesh_of(team: Team, saes: Sequence[AskedSAE], training: TrainingConfig, d_model: int) -> Mesh:
    """How SAEs are dealt over the processes.

    Args:
        saes: The config's `sae` of each.

    Raises:
        InputError: What is asked for cannot be shared.
    """
    mesh = Mesh.for_training(team.size, len(saes), training, {sae.architecture for sae in saes})
    if mesh.latents > 1:
        for sae in saes:
            check_shards(sae, training.kernel, d_model, mesh.latents)
    return mesh


def new_sae(
    layers: Sequence[int], moments: Moments, config: Config, start: Start | None = None
) -> SAE:
    """An untrained SAE for these layers. Its weights depend on them and on the seed alone.

    Args:
        start: A trained run, from which it is taken instead.
    """
    asked = config.sae
    shape = sae_config(config, layers, moments.mean.shape[1])
    if start is not None:
        return start.sae(shape, asked.affine)
    mean, scale = affine(moments, layers, asked.affine)
    seed = zlib.crc32(f"{config.training.seed} {directory_name(layers)}".encode())
    sae = SAE(shape, mean=mean, scale=scale, generator=torch.Generator().manual_seed(seed))
    if asked.encoder_norm is not None:
        with torch.no_grad():
            sae.W_enc.mul_(asked.encoder_norm)
    return sae


def new_learner(
    sae: SAE,
    config: Config,
    *,
    fresh: bool,
    shared: Callable[[Step], Step] | None = None,
    shard: Shard | None = None,
) -> Learner:
    """Fits what a fresh SAE was not told to start with."""
    asked = config.sae
    return Learner(
        sae,
        config.training,
        fit_encoder=fresh and asked.encoder_norm is None,
        fit_thresholds=fresh and asked.initial_threshold is None and asked.target_l0 is not None,
        shared=shared,
        shard=shard,
    )


def sae_config(config: Config, layers: Sequence[int], d_model: int) -> SAEConfig:
    """What `config.sae` means for these layers.

    Raises:
        InputError: If it cannot be had at this width.
    """
    asked, d_sae = config.sae, config.sae.width(d_model)
    prefixes = None
    if asked.prefix_shares is not None:
        prefixes = tuple(sorted({max(round(share * d_sae), 1) for share in asked.prefix_shares}))
    jumprelu = asked.architecture == "jumprelu"
    return SAEConfig(
        d_model=d_model,
        d_sae=d_sae,
        layers=tuple(layers),
        architecture=asked.architecture,
        k=asked.k,
        prefixes=prefixes,
        target_l0=asked.target_l0,
        bandwidth=asked.bandwidth,
        initial_threshold=(asked.initial_threshold or 0.001) if jumprelu else None,
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
        for layer in sorted({layer for group in groups for layer in group}):
            names.setdefault((layer,), []).append(f"{BASELINE}/{directory_name([layer])}")
    return names


def _check_entries(entries: Sequence[Entry], config: Config) -> None:
    twice = [name for name, n in Counter(entry.name for entry in entries).items() if n > 1]
    if twice:
        raise InputError(f"entries: {', '.join(twice)}: given twice; name each SAE differently")
    shared = config.training.model_dump(exclude=set(OWN))
    for entry in entries:
        for name, value in entry.config.training.model_dump(exclude=set(OWN)).items():
            if value != shared[name]:
                raise InputError(
                    f"training.{name}: {value!r} for {entry.name}, but all SAEs of one forward "
                    f"share {shared[name]!r}; train it by itself"
                )


def _sharing(team: Team, mesh: Mesh) -> tuple[Callable[[Step], Step] | None, ShardRanks | None]:
    """What makes a step one of all that share this process's batches, where any do.

    And those that hold the shards of its SAEs, where they are divided.
    """
    step = shards = None
    by_batch, by_latents = mesh.sharing_batches(), mesh.sharing_latents()
    for ranks, group in zip(by_batch, team.groups(by_batch), strict=True):
        if group is not None and team.rank in ranks:
            row = mesh.row(team.rank)
            step = partial(SharedStep, group=group, row=row, rows=mesh.data)
    for ranks, group in zip(by_latents, team.groups(by_latents), strict=True):
        if group is not None and team.rank in ranks:
            shards = ShardRanks(team, ranks, group)
    return step, shards


@contextmanager
def _untold() -> Iterator[Callable[[Record], None]]:
    """Metrics that the first process logs."""
    yield lambda values: None


def _slots(mixtures: Mapping[str, Affine]) -> dict[str, list[str]]:
    """The SAEs that see identical batches, by the first of them."""
    slots: dict[Hashable, list[str]] = {}
    for name, sae in mixtures.items():
        fixed = sae.mean.flatten().tolist(), sae.scale.tolist()
        slots.setdefault((tuple(sae.layers), *map(tuple, fixed)), []).append(name)
    return {names[0]: names for names in slots.values()}


def _norm_limit(multiple: float | None, moments: Moments) -> NormLimit | None:
    if multiple is None:
        return None
    norms: Mapping[int, float] = dict(zip(moments.layers, moments.mean_norm.tolist(), strict=True))
    return NormLimit(multiple, norms)
