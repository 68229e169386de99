"""What one setting holds and sends, by sizes alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from groupsae.config import Config
from groupsae.grouping.cost import CostModel
from groupsae.planner.devices import Device
from groupsae.planner.host import PlannedHost
from groupsae.training.memory import MemoryAccount, most_saes
from groupsae.training.mesh import Mesh

_FLOAT32 = 4


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
        account: What it holds all the time: of its own SAEs the weights, the whole buffer and the
            whole batch, also where it shares them.
        average: The running mean of the weights, where it is asked for.
        activations: What a forward of the host model holds for a moment.
        exchange: Rows of one round, a forward of each device: of its own forward those of all
            SAEs, of every forward those of its own. Where SAEs are shared, also the gradients of
            one twice more, while they are summed.
        checkpoint: One checkpoint on the disk, of all devices together; each buffer is in it once.
        copy: Its part of a checkpoint, in the machine's memory until it is written.
        received: Rows that come to it from other devices, in a step.
        reduced: Gradients that it sends, in a step, to those that train the same SAEs.
        copy_on_device: Whether the copy takes its memory from the device's.
    """

    mesh: Mesh
    n_saes: int
    own_saes: int
    own_rows: int
    account: MemoryAccount
    average: int
    activations: int
    exchange: int
    checkpoint: int
    copy: int
    received: int
    reduced: int
    copy_on_device: bool

    @classmethod
    def of(cls, setting: Setting) -> Demand:
        """The demand of a setting. The part before :attr:`average` is training's own account."""
        config, host = setting.config, setting.host
        d_model, d_sae = host.d_model, config.sae.width(host.d_model)
        batch = config.training.batch_tokens
        saes, mixtures, rows = _trained(config, setting.G, len(setting.layers))
        by_token = config.sae.architecture == "topk"  # others look at the whole batch
        training = config.training
        mesh = Mesh.of(setting.devices, saes, training.data_ranks or (None if by_token else 1))
        own_saes = mesh.most_saes(saes)
        own_mixtures = min(own_saes, mixtures)  # SAEs of one mixture may be on several devices
        # Which SAE has how many layers is not known yet: one may have all the rows that are more.
        slots = [rows - mixtures + 1] + [1] * (own_mixtures - 1)
        account = MemoryAccount.of_widths(
            training,
            [d_sae] * own_saes,
            slots=slots,
            d_model=d_model,
            context_length=config.tokens.context_length,
            host=host.weights,
        )
        average = account.saes if training.weight_average is not None else 0
        checkpointed = account.checkpoint + average
        on_cpu = setting.device is not None and setting.device.is_cpu
        copies = training.checkpoint_in_background or not (on_cpu or setting.device is None)
        per_sae = (account.saes + account.moments + account.counters + average) // own_saes
        row = _FLOAT32 * d_model
        forward = setting.forward_tokens
        read = training.activation_cache is None  # else each device reads its own SAEs' rows
        elsewhere = (mesh.devices - 1) / mesh.devices if read else 0.0
        on_the_way = rows + sum(slots) * mesh.devices if read else 2 * sum(slots)
        summed = 2 * account.gradients if mesh.data > 1 else 0
        return cls(
            mesh=mesh,
            n_saes=saes,
            own_saes=own_saes,
            own_rows=sum(slots) + own_saes - own_mixtures,
            account=account,
            average=average,
            activations=host.activations(forward) if read else forward * row,
            exchange=on_the_way * forward * row + summed if mesh.devices > 1 else 0,
            checkpoint=per_sae * saes + account.buffer * rows // sum(slots),
            copy=checkpointed if copies else 0,
            received=round(sum(slots) * batch * row * elsewhere),
            reduced=round(own_saes * account.gradients * 2 * (mesh.data - 1) / mesh.data),
            copy_on_device=on_cpu,
        )

    @property
    def parts(self) -> dict[str, int]:
        """What the device holds at its peak, by name."""
        account = self.account
        return {
            "host\nweights": account.host,
            "SAE\nweights": account.saes + self.average,
            "Adam": account.moments,
            "gradients": account.gradients,
            "buffer": account.buffer,
            "batch": account.batch + account.chunk + account.counters,
            "forward": self.activations,
            "exchange": self.exchange,
        }

    @property
    def total(self) -> int:
        """Bytes of the fullest device at its peak, with a checkpoint's copy where it lies there."""
        return sum(self.parts.values()) + (self.copy if self.copy_on_device else 0)

    def fits(self, device: Device) -> bool:
        """Whether the device has room for it."""
        return self.total <= device.usable


def at_groups(setting: Setting, G: int) -> Setting:
    """The same with another number of groups."""
    return replace(setting, G=G)


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
