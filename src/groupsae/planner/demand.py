"""What one setting holds and sends, by sizes alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from groupsae.architectures import BY_COUNT
from groupsae.config import Config
from groupsae.grouping.cost import CostModel
from groupsae.planner.devices import Device
from groupsae.planner.host import PlannedHost
from groupsae.training.memory import MemoryAccount, most_saes
from groupsae.training.mesh import Mesh

_FLOAT32 = 4
_GATHERED_BYTES = 64 * 2**20  # of candidates that a step holds at a time, as its kernel's
# What a step holds at its peak, as found: of a sparse one in [row, d_model], for one sum of decoder
# rows, or for each of several and beside them, and in [row, k]; of a dense one in [row, d_sae].
_SUM, _OF_SUMS, _BESIDE_SUMS = 6.5, 7, 3
_OF_ENTRIES, _OF_VARYING_ENTRIES = 12, 36  # as many for every token; and as the one with most needs
_DENSE = {"relu": 5, "gated": 10, "jumprelu": 10, "topk": 5, "batchtopk": 6.5, "matryoshka": 7.5}


@dataclass(frozen=True)
class Setting:
    """A config on so many devices.

    Attributes:
        layers: Those that groups cover.
        G: The number of groups.
        device: None where nothing is known of it.
    """

    config: Config
    host: PlannedHost
    layers: tuple[int, ...]
    G: int
    devices: int = 1
    device: Device | None = None

    @property
    def forward_tokens(self) -> int:
        """Tokens of one forward of the host model."""
        return self.config.training.host_batch_contexts * self.config.tokens.context_length

    @property
    def shard(self) -> int:
        """Latents of each of its SAEs that one device holds, at most."""
        return -(-self.config.sae.width(self.host.d_model) // self.config.training.latent_ranks)

    @property
    def active(self) -> float | None:
        """Active latents of a token; None where steps are dense and go through all of them."""
        sae = self.config.sae
        if self.config.training.kernel == "reference":
            return None
        return sae.k if sae.architecture in BY_COUNT else sae.target_l0

    @property
    def cost(self) -> CostModel:
        """FLOPs as they are done: a forward ends after the last layer that is read."""
        return CostModel(
            self.host.d_model,
            self.host.n_layers,
            self.config.tokens.context_length,
            self.config.sae.width(self.host.d_model),
            last_layer=max(self.layers),
            block_weights=self.host.block_weights,
        )


@dataclass(frozen=True)
class Demand:
    """What the fullest device holds, and what crosses to it; bytes.

    Attributes:
        mesh: The processes, one a device, that train together.
        n_saes: All that are trained, at most.
        own_saes: Of the fullest device.
        own_rows: Rows that these learn from together, for each token of its share of a batch.
        account: What it holds all the time: of its own SAEs the weights, or a shard of them, the
            whole buffer and the whole batch, also where it shares them.
        average: The running mean of the weights, where it is asked for.
        activations: What a forward of the host model holds for a moment.
        step: What a step of one SAE holds for a moment beside its gradients; AuxK's is left out.
        leaving: Of a round, a forward of each device, the rows of its own forward of all SAEs.
        arriving: Of the round the rows of its own SAEs of all forwards, until they are learnt from.
        summed: Of a step, where SAEs are shared, the gradients of one twice more; where their
            latents are divided, the candidates of all shards, of some tokens at a time.
        checkpoint: One checkpoint on the disk, of all devices together; each buffer is in it once.
        copy: Its part of a checkpoint, in the machine's memory until it is written.
        received: Rows that come to it from other devices, in a step.
        reduced: Gradients that it sends, in a step, to those that train the same SAEs.
        joined: Candidates and reconstructions that it sends, in a step, to those that hold the
            other latents of its SAEs.
        overlaps: Whether the next forward is under way while SAEs step.
        copy_on_device: Whether the copy takes its memory from the device's.
    """

    mesh: Mesh
    n_saes: int
    own_saes: int
    own_rows: int
    account: MemoryAccount
    average: int
    activations: int
    step: int
    leaving: int
    arriving: int
    summed: int
    checkpoint: int
    copy: int
    received: int
    reduced: int
    joined: int
    overlaps: bool
    copy_on_device: bool

    @classmethod
    def of(cls, setting: Setting) -> Demand:
        """The demand of a setting. The part before :attr:`average` is training's own account.

        Raises:
            InputError: The devices, or the SAEs, cannot be divided as it is asked.
        """
        config, host = setting.config, setting.host
        d_model, d_sae = host.d_model, config.sae.width(host.d_model)
        batch = config.training.batch_tokens
        saes, mixtures, rows = _trained(config, setting.G, len(setting.layers))
        training = config.training
        mesh = Mesh.for_training(setting.devices, saes, training, [config.sae.architecture])
        if mesh.latents > 1:
            from groupsae.training.shards import check_shards  # which needs torch

            check_shards(config.sae, training.kernel, d_model, mesh.latents)
        own_saes = mesh.most_saes(saes)
        own_mixtures = min(own_saes, mixtures)  # SAEs of one mixture may be on several devices
        # Which SAE has how many layers is not known yet: one may have all the rows that are more.
        slots = [rows - mixtures + 1] + [1] * (own_mixtures - 1)
        account_of = partial(
            MemoryAccount.of_widths,
            training,
            d_model=d_model,
            context_length=config.tokens.context_length,
            host=host.weights,
        )
        account = account_of([setting.shard] * own_saes, slots=slots)
        whole = account_of([d_sae], slots=[1])
        averaged = training.weight_average is not None
        average = account.saes if averaged else 0
        checkpointed = account.checkpoint + average
        on_cpu = setting.device is not None and setting.device.is_cpu
        copies = training.checkpoint_in_background or not (on_cpu or setting.device is None)
        per_sae = whole.saes * (2 if averaged else 1) + whole.moments + whole.counters
        own_rows = sum(slots) + own_saes - own_mixtures
        share = mesh.share(batch)
        row = _FLOAT32 * d_model
        forward = setting.forward_tokens
        read = training.activation_cache is None  # else each device reads its own SAEs' rows
        elsewhere = (mesh.devices - 1) / mesh.devices if read else 0.0
        several = mesh.devices > 1
        leaving, arriving = (rows, sum(slots) * mesh.devices) if read else (sum(slots), sum(slots))
        summed = 2 * account.gradients if mesh.data > 1 else 0
        if mesh.latents > 1:
            summed += min(share * slots[0] * mesh.latents * _candidates(config), _GATHERED_BYTES)
        return cls(
            mesh=mesh,
            n_saes=saes,
            own_saes=own_saes,
            own_rows=own_rows,
            account=account,
            average=average,
            activations=host.activations(forward) if read else forward * row,
            step=max(share * slots[0] * _step_row(setting), account.gradients),
            leaving=leaving * forward * row if several else 0,
            arriving=arriving * forward * row if several else 0,
            summed=summed,
            checkpoint=per_sae * saes + account.buffer * rows // sum(slots),
            copy=checkpointed if copies else 0,
            received=round(sum(slots) * batch * row * elsewhere),
            reduced=round(own_saes * account.gradients * 2 * (mesh.data - 1) / mesh.data),
            joined=round(own_rows * share * _joined(config, mesh.latents, row)),
            overlaps=not (several or on_cpu),
            copy_on_device=on_cpu,
        )

    @property
    def exchange(self) -> int:
        """What it holds of what it gives to others and is given."""
        return self.leaving + self.arriving + self.summed

    @property
    def parts(self) -> dict[str, int]:
        """What the device holds, by name; not all of it at the same time."""
        account = self.account
        return {
            "host\nweights": account.host,
            "SAE\nweights": account.saes + self.average,
            "Adam": account.moments,
            "gradients": account.gradients,
            "buffer": account.buffer,
            "batch": account.batch + account.chunk + account.counters,
            "forward": self.activations,
            "step": self.step,
            "exchange": self.exchange,
        }

    @property
    def total(self) -> int:
        """Bytes of the fullest device at its peak, with a checkpoint's copy where it lies there."""
        moment = max(self.activations + self.leaving, self.step, self.summed)
        if self.overlaps:
            moment = self.activations + self.step
        held = self.account.total + self.average + self.arriving
        return held + moment + (self.copy if self.copy_on_device else 0)

    @property
    def crossing(self) -> int:
        """All that crosses to it or from it in a step."""
        return self.received + self.reduced + self.joined

    def fits(self, device: Device) -> bool:
        """Whether the device has room for it."""
        return self.total <= device.usable


def at_groups(setting: Setting, G: int) -> Setting:
    """The same with another number of groups."""
    return replace(setting, G=G)


def _step_row(setting: Setting) -> int:
    """Bytes that a step holds for a moment, for each row of its batch."""
    sae, d_model = setting.config.sae, setting.host.d_model
    if setting.active is None:
        return round(_FLOAT32 * _DENSE[sae.architecture] * sae.width(d_model))
    sums = _SUM
    if sae.prefix_shares is not None:
        sums = _OF_SUMS * len(sae.prefix_shares) + _BESIDE_SUMS
    entries = _OF_ENTRIES if sae.architecture == "topk" else _OF_VARYING_ENTRIES
    return round(_FLOAT32 * (sums * d_model + entries * setting.active))


def _candidates(config: Config) -> int:
    """Bytes of a token's candidates of one shard; of a batch's only counts are exchanged."""
    return _FLOAT32 * (config.sae.k or 0) if config.sae.architecture == "topk" else 0


def _joined(config: Config, latents: int, row: int) -> float:
    """Bytes that a shard sends for each row that its SAE learns from, by rings.

    The candidates are gathered; the reconstruction is summed, and so is that of dead latents.
    """
    sums = 1 if config.training.auxk_weight == 0 else 2
    return (latents - 1) * (_candidates(config) + sums * 2 * row / latents)


def _trained(config: Config, G: int, n_layers: int) -> tuple[int, int, int]:
    """SAEs that are trained, at most; mixtures of layers that they learn from; rows of a token."""
    training, grouping = config.training, config.grouping
    asked = range(1, n_layers + 1) if training.also_groups == "all" else training.also_groups
    others = {g for g in asked if g <= n_layers} - {G}
    saes = most_saes(G, n_layers, baseline=training.baseline) + sum(others)
    if others and grouping.method == "linkage" and grouping.partition is None:
        saes = min(saes, 2 * n_layers - 1)  # nested: all groups there are, single layers among them
    mixtures = saes
    if training.twins:
        saes += n_layers
        mixtures += 0 if training.baseline else n_layers  # a baseline's twin learns from its batch
    rows = mixtures
    if training.layer_sampling == "all":  # a row for each layer of each partition
        partitions = 1 + len(others)
        rows = max(n_layers * partitions + mixtures - G - sum(others), mixtures)
    return saes, mixtures, rows
