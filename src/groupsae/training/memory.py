"""What training holds in memory, by sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from groupsae.config import Config, TrainingConfig

if TYPE_CHECKING:
    from groupsae.host.model import HostModel

_FLOAT32 = 4
_COUNTER = 8  # int64
_MEMBER, _MEMBER_IN_BUFFER = 8, 2  # int64 in a batch, int16 in the buffer
_CHUNK_BYTES = {"torch": 16 * 2**20, "cpu": 16 * 2**20, "triton": 32 * 2**20}  # as the kernels'
_HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class MemoryAccount:
    """What training holds at the same time, in bytes. SAEs and buffer are float32.

    The rest of a process comes on top: its libraries, and what a forward or a step holds for a
    moment.

    Attributes:
        n_saes: How many SAEs are trained side by side.
        host: Weights of the host model.
        saes: Weights of all SAEs.
        moments: Adam's two, of all SAEs.
        gradients: Of one SAE: they step one after another.
        buffer: The shuffle buffer, with room for the rows of one forward.
        batch: One mixed batch for every SAE, or for those that share it, with the numbers of its
            rows' member layers.
        chunk: Pre-activations that a kernel holds at a time.
        counters: How long each latent has been silent.
    """

    n_saes: int
    host: int
    saes: int
    moments: int
    gradients: int
    buffer: int
    batch: int
    chunk: int
    counters: int

    @classmethod
    def of(
        cls,
        config: Config,
        *,
        n_saes: int,
        d_model: int,
        context_length: int,
        host: int,
        rows_per_token: int | None = None,
    ) -> MemoryAccount:
        """The account of what `config.sae` and `config.training` ask for.

        Args:
            context_length: Tokens per context.
            host: Bytes of the host model's weights: see :func:`host_bytes`, :func:`planned_host`.
            rows_per_token: Rows that all batches together have of a token: by default one for each
                SAE. With `layer_sampling` "all" it is one for each member layer of each SAE.
        """
        rows = n_saes if rows_per_token is None else rows_per_token
        most = max(rows - n_saes, 0) + 1  # of one SAE, where the others have one each
        return cls.of_widths(
            config.training,
            [config.sae.width(d_model)] * n_saes,
            slots=[most] + [1] * (n_saes - 1),
            d_model=d_model,
            context_length=context_length,
            host=host,
        )

    @classmethod
    def of_widths(
        cls,
        training: TrainingConfig,
        widths: Sequence[int],
        *,
        slots: Sequence[int],
        d_model: int,
        context_length: int,
        host: int,
    ) -> MemoryAccount:
        """The account of SAEs of several settings that are trained side by side.

        Args:
            widths: d_sae of each SAE, or how many of its latents are held where they are divided.
            slots: For each of the mixed batches, which SAEs may share, the rows that it has of a
                token.
            context_length, host: As in :meth:`of`.
        """
        weights = [_FLOAT32 * (2 * d_model * d_sae + d_sae + d_model) for d_sae in widths]
        row = _FLOAT32 * d_model
        forward = training.host_batch_contexts * context_length
        chunk = _FLOAT32 * max(slots) * training.batch_tokens * max(widths)
        if training.kernel != "reference":
            chunk = min(chunk, _CHUNK_BYTES.get(training.kernel, _CHUNK_BYTES["torch"]))
        return cls(
            n_saes=len(widths),
            host=host,
            saes=sum(weights),
            moments=2 * sum(weights),
            gradients=max(weights),
            buffer=sum(slots) * (row + _MEMBER_IN_BUFFER) * (training.buffer_tokens + forward),
            batch=sum(slots) * (row + _MEMBER) * training.batch_tokens,
            chunk=chunk,
            counters=_COUNTER * sum(widths),
        )

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, part.name) for part in fields(self) if part.name != "n_saes")

    @property
    def checkpoint(self) -> int:
        """What a checkpoint copies, and holds in the machine's memory until it is written."""
        return self.saes + self.moments + self.buffer + self.counters

    def __str__(self) -> str:
        """The account in one line, in decimal units."""
        saes = "one SAE" if self.n_saes == 1 else f"{self.n_saes} SAEs"
        return (
            f"host {size(self.host)}, {saes} with Adam {size(self.saes + self.moments)}, "
            f"gradients of one {size(self.gradients)}, buffer {size(self.buffer)}, "
            f"batch {size(self.batch)}, pre-activations {size(self.chunk)}, "
            f"counters {size(self.counters)}: {size(self.total)} in all"
        )


def host_bytes(host: HostModel) -> int:
    """Bytes of a host model's weights, as they are in memory."""
    return sum(weight.nbytes for weight in host.model.parameters())


def planned_host(dtype: str, n_layers: int, d_model: int) -> int:
    """Bytes of a host model that is not loaded: 12 d_model^2 weights a block, no embeddings.

    Args:
        dtype: As `host.dtype`; "auto" is taken as float32, which it is on the CPU.
    """
    weight = 2 if dtype in _HALF else 8 if dtype == "float64" else _FLOAT32
    return weight * n_layers * 12 * d_model**2


def most_saes(G: int, n_layers: int, *, baseline: bool) -> int:
    """The largest number of SAEs that G groups of n_layers layers can mean.

    With a baseline there is one more per layer, but for groups of one layer: such a group and that
    layer's baseline are the same SAE. At least 2 G - n_layers of the groups are of one layer.
    """
    return G + n_layers - max(2 * G - n_layers, 0) if baseline else G


def size(number: int) -> str:
    """Bytes in decimal units, as they are read: "4.1 GB", "692 MB"."""
    if number >= 10**9:
        return f"{number / 10**9:,.1f} GB"
    if number >= 10**6:
        return f"{number / 10**6:.0f} MB"
    return f"{number / 10**3:.0f} kB"
