"""Mixed batches for every SAE at once, from one shared forward of the host model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from groupsae.config import LayerSampling
from groupsae.host.faults import BrokenText
from groupsae.host.model import HostModel
from groupsae.host.tokens import EndOfText
from groupsae.training.activation_cache import CachedActivations
from groupsae.training.forwards import Contexts, Excluded, Forward, Forwards, Place
from groupsae.training.layer_sampling import first_of_each, turns
from groupsae.training.side_stream import SideStream


@dataclass(frozen=True)
class NormLimit:
    """Drop a token whose residual stream is longer than `multiple` mean norms at any layer."""

    multiple: float
    mean_norm: Mapping[int, float]

    def exceeded(self, x: Float[Tensor, "token d_model"], layer: int) -> Bool[Tensor, " token"]:
        """Which of these residual streams of `layer` are too long."""
        wide = torch.promote_types(x.dtype, torch.float32)  # float16 ends at 65,504
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=wide)
        return norm > self.multiple * self.mean_norm[layer]


@runtime_checkable
class Exchange(Protocol):
    """Brings the rows of forwards to the processes that learn from them.

    Attributes:
        rank, size: Of this process, and of all. The n-th of some forwards is the n-th process's.
        own: The mixtures whose batches are handed out here.
    """

    rank: int
    size: int
    own: Sequence[str]

    def rows(
        self,
        computed: Mapping[str, Tensor],
        received: Sequence[Mapping[str, Tensor]],
        too_long: Sequence[Bool[Tensor, " _"]],  # of each forward its own length
    ) -> None:
        """Send what this process has of its forward, fill what it lacks of the others.

        Called by all alike, whether or not there is a forward for each.

        Args:
            computed: The rows of its forward, of all mixtures; nothing where it has none.
            received: The rows of its own mixtures, of each forward.
            too_long: Which of the rows of each forward are not to be kept; this process's is known.
        """


@runtime_checkable
class Mixture(Protocol):
    """What a mixed batch is drawn for: an SAE, or what several SAEs of one affine share."""

    @property
    def layers(self) -> Sequence[int]:
        """The member layers."""

    def normalize(self, x: Float[Tensor, "token d_model"], layer: int) -> Tensor:
        """Activations of a member layer as the SAE is given them."""


@dataclass(frozen=True)
class Affine:
    """How an SAE is given the activations of its member layers: s_l (x - m_l)."""

    layers: Sequence[int]
    mean: Float[Tensor, "layer d_model"]
    scale: Float[Tensor, " layer"]

    def normalize(self, x: Float[Tensor, "token d_model"], layer: int) -> Tensor:
        """As :meth:`groupsae.sae.SAE.normalize`, in the dtype of the mean."""
        member = self.layers.index(layer)
        return (x.to(self.mean.dtype) - self.mean[member]) * self.scale[member]

    def to(self, device: torch.device) -> Affine:
        """The same on another device."""
        return Affine(self.layers, self.mean.to(device), self.scale.to(device))


class MixedBatch(NamedTuple):
    """Rows for one step of an SAE.

    Attributes:
        x: Normalised activations.
        members: For each row the position of its layer among the SAE's member layers.
    """

    x: Float[Tensor, "row d_model"]
    members: Int[Tensor, " row"]


class MixedBatches:
    """Hands out one mixed batch per SAE, all from the same tokens.

    For each token and each SAE one member layer is drawn, uniformly (Group-SAE, arXiv 2410.21508,
    section 3.3), and only that row is kept, normalised by the SAE's affine: the buffer holds
    d_model numbers per token and SAE whatever the size of the group. A batch takes random rows out
    of the buffer and the rows of new contexts take their places, so every token is used once and a
    batch mixes the tokens of many contexts. All SAEs share the draw of rows: the n-th row of the
    m-th batch is the same token for groups and baseline alike. Draws are made
    on the CPU, so that a GPU is never waited for (but for a `norm_limit`, which must know how many
    rows it leaves).

    With `layer_sampling` "balanced", every batch holds equally many rows of each member layer;
    where they cannot be divided, some have one more, in turn. The same text is read, every token is
    used once, and an SAE of one layer is given the same batches as with "uniform"; but each group
    takes its own rows out of the buffer, so that its m-th batch holds other tokens. With "all",
    every token is seen at every member layer: a batch of T tokens has T rows for each member layer,
    one layer after another, and the buffer holds as many.

    With `overlap`, a batch is handed out with the forward for the next one under way, on a CUDA
    stream of its own, while the SAEs step on the current stream. The batches are the same.

    Args:
        mixtures: An SAE, or what its batches are drawn by, by name; all take part in every batch.
        total_tokens: Tokens to hand out in all. No more text is read than that takes.
        batch_tokens, buffer_tokens: Size of a batch, and of the buffer that it is drawn from.
        contexts: Contexts in one forward of the host model.
        special: Token ids to leave out.
        norm_limit: Leaves out tokens of extraordinary norm; None keeps them. What it leaves of a
            forward need not be balanced: with "balanced", a buffer of hardly more than a batch then
            takes more text now and then, and grows where that finds no room.
        layer_sampling: Which member layers a token is seen at.
        layer_weights: By layer, 1 where left out: "uniform" draws in proportion to them.
        seed: Of the layer draws and of the shuffling.
        overlap: By default on CUDA alone, and for one process: elsewhere there is nothing to
            overlap, and the forward would hold its memory beside that of a batch.
        exchange: Between processes that run the forwards in turn: only the batches of this one's
            SAEs are handed out. They are those of one process, bit for bit. Where a forward
            depends on what a `norm_limit` drops of the one before, the first process runs it: the
            last ones, by their size, and with "balanced" all, by the members that are due.
    """

    def __init__(
        self,
        host: HostModel | CachedActivations,
        stream: Contexts,
        mixtures: Mapping[str, Mixture],
        *,
        total_tokens: int,
        batch_tokens: int,
        buffer_tokens: int,
        contexts: int,
        special: Iterable[int] = (),
        norm_limit: NormLimit | None = None,
        layer_sampling: LayerSampling = "uniform",
        layer_weights: Mapping[int, float] | None = None,
        seed: int = 0,
        overlap: bool | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        self.host, self.stream, self.mixtures = host, stream, dict(mixtures)
        self.total_tokens, self.batch_tokens = total_tokens, batch_tokens
        self.buffer_tokens, self.contexts = buffer_tokens, contexts
        self.norm_limit, self.layer_sampling = norm_limit, layer_sampling
        alone = host.device.type == "cuda" and exchange is None
        self.overlap = alone if overlap is None else overlap
        self.exchange = exchange
        self.filled = 0
        self.handed_out = 0
        self._slots: dict[str, slice] = {}  # where each name's rows lie
        slots = 0
        for name in self.mixtures if exchange is None else exchange.own:
            first, slots = slots, slots + self._rows_per_token(name)
            self._slots[name] = slice(first, slots)
        rows = buffer_tokens + contexts * stream.context_length
        self.buffer = torch.zeros(slots, rows, host.d_model, device=host.device)
        self.members = torch.zeros(slots, rows, dtype=torch.int16)  # of each row, on the CPU
        self.finite = torch.ones(host.n_layers, dtype=torch.bool, device=host.device)
        self._row_draws = torch.Generator().manual_seed(2 * seed + 1)
        self._forwards = Forwards(
            stream,
            {name: mixture.layers for name, mixture in self.mixtures.items()},
            total_tokens=total_tokens,
            contexts=contexts,
            special=special,
            drops=norm_limit is not None,
            layer_sampling=layer_sampling,
            layer_weights=layer_weights or {},
            seed=2 * seed,
        )
        self._new: _NewRows | None = None
        self._ahead: deque[_Received] = deque()
        self._side = SideStream(host.device, overlap=self.overlap)
        self._side.share(self.buffer, self.finite)

    def next(self) -> dict[str, MixedBatch]:
        """The next mixed batch of normalised activations, by name.

        Raises:
            EndOfText: If the text is used up before `total_tokens` are handed out.
            BrokenText: If it cannot be read on.
        """
        self._fill()
        self._side.join()
        order = torch.randperm(self.filled, generator=self._row_draws)
        size = min(self.batch_tokens, self.filled)
        shared = self._taking(order[:size])
        batch = {}
        for name, slots in self._slots.items():
            own = self._is_balanced(name)
            taking = self._taking(self._balanced(name, order)) if own else shared
            batch[name] = self._take(slots, *taking)
        self.filled -= size
        self.handed_out += size
        if self.overlap:
            with suppress(EndOfText, BrokenText):  # raised again where a batch needs the text
                self._fill(ahead=True)
        return batch

    def not_finite(self) -> list[int]:
        """The layers of which an activation since the start was NaN or infinite."""
        self._side.join()
        layers: list[int] = self.finite.logical_not().nonzero().flatten().tolist()
        return layers

    @property
    def excluded(self) -> Excluded:
        """What became of the tokens that were read."""
        return self._forwards.excluded

    @property
    def held(self) -> list[str]:
        """The mixtures whose batches are handed out here."""
        return list(self._slots)

    def state(self) -> State:
        """Everything that determines the batches to come."""
        self._count_new_rows()
        self._side.join()
        place = self._forwards.place
        return State(
            draws={"layer_draws": place.layer_draws, "row_draws": self._row_draws.get_state()},
            rows={
                name: {
                    "buffer": self.buffer[slots, : self.filled],
                    "members": self.members[slots, : self.filled],
                }
                for name, slots in self._slots.items()
            },
            rest={
                "stream": place.stream,
                "handed_out": self.handed_out,
                "filled": self.filled,
                "excluded": vars(self.excluded).copy(),
                "dealt": {name: dealt.tolist() for name, dealt in self._forwards.dealt.items()},
            },
        )

    def load_state(self, state: State) -> None:
        """Continue from what :meth:`state` gave, here or in processes that shared the work."""
        self._side.join()
        self._new = None
        self._ahead.clear()
        self.filled = state.rest["filled"]
        self._make_room(self.filled)
        for name, slots in self._slots.items():
            self.buffer[slots, : self.filled] = state.rows[name]["buffer"]
            self.members[slots, : self.filled] = state.rows[name]["members"]
        self._row_draws.set_state(state.draws["row_draws"])
        self.handed_out = state.rest["handed_out"]
        self._forwards.load(
            Place(state.rest["stream"], state.draws["layer_draws"]),
            Excluded(**state.rest["excluded"]),
            state.rest["dealt"],
        )

    def _fill(self, *, ahead: bool = False) -> None:
        """Read contexts until the buffer is full, or holds all the tokens that are still wanted.

        Ahead of time no forward is waited for: with a `norm_limit` there is one, since how many of
        its rows stay decides whether another is needed.
        """
        self._count_new_rows()
        while contexts := self._wanted_contexts():
            self._make_room(self.filled + contexts * self.stream.context_length)
            with self._side.work():
                self._read_contexts(contexts)
            if ahead and self.norm_limit is not None:
                break
            self._count_new_rows()

    def _wanted_contexts(self) -> int:
        """Contexts of the next forward; 0 if none is needed."""
        contexts = self._forwards.to_total() if self.filled < self.buffer_tokens else 0
        if contexts or self.handed_out >= self.total_tokens:
            return contexts
        return self._forwards.to_turns(self.handed_out + min(self.batch_tokens, self.filled))

    def _make_room(self, rows: int) -> None:
        """Let the buffer hold so many rows."""
        slots, room, d_model = self.buffer.shape
        if rows > room:
            self._side.join()
            more = self.buffer.new_zeros(slots, rows - room, d_model)
            self.buffer = torch.cat([self.buffer, more], 1)
            self.members = torch.cat([self.members, self.members.new_zeros(slots, rows - room)], 1)
            self._side.share(self.buffer)

    def _read_contexts(self, contexts: int) -> None:
        """Run the host model on further contexts; their tokens go to the buffer's free end."""
        if self.exchange is None:
            (forward,) = self._forwards.next(contexts)
            too_long = self._run(forward, self._free_end(forward))
        else:
            if not self._ahead:
                self._ahead.extend(self._exchanged(contexts, self.exchange))
            forward, rows, too_long = self._ahead.popleft()
            for name, target in self._free_end(forward).items():
                target.copy_(rows[name])
        for name, slots in self._slots.items():
            end = self.filled + len(forward.kept)
            self.members[slots, self.filled : end] = forward.members[name].to(torch.int16)
        self._new = _NewRows(forward, too_long)

    def _exchanged(self, contexts: int, exchange: Exchange) -> list[_Received]:
        """The next forwards, one of each process, with the rows of this one's SAEs."""
        forwards = self._forwards.next(contexts, exchange.size)
        too_long = [self._none_too_long(forward) for forward in forwards]
        computed: dict[str, Tensor] = {}
        if exchange.rank < len(forwards):
            own = forwards[exchange.rank]
            all_or_own = self.mixtures if exchange.size > 1 else self._slots
            computed = {name: self._empty(name, own) for name in all_or_own}
            too_long[exchange.rank] = self._run(own, computed)
        received = [{name: self._empty(name, each) for name in self._slots} for each in forwards]
        exchange.rows(computed, received, too_long)
        return list(map(_Received, forwards, received, too_long))

    def _free_end(self, forward: Forward) -> dict[str, Tensor]:
        """Where a forward's rows go in the buffer."""
        end = self.filled + len(forward.kept)
        return {name: self.buffer[slots, self.filled : end] for name, slots in self._slots.items()}

    def _empty(self, name: str, forward: Forward) -> Float[Tensor, "slot row d_model"]:
        shape = self._rows_per_token(name), len(forward.kept), self.host.d_model
        return torch.empty(shape, device=self.host.device)

    def _rows_per_token(self, name: str) -> int:
        return len(self.mixtures[name].layers) if self.layer_sampling == "all" else 1

    def _none_too_long(self, forward: Forward) -> Bool[Tensor, " row"]:
        return torch.zeros(len(forward.kept), dtype=torch.bool, device=self.host.device)

    def _run(self, forward: Forward, targets: Mapping[str, Tensor]) -> Bool[Tensor, " row"]:
        """Run the host model and write the rows of each target; returns which are too long."""
        kept, too_long = forward.kept, self._none_too_long(forward)
        layers = (layer for mixture in self.mixtures.values() for layer in mixture.layers)
        writers: dict[int, list[Callable[[Tensor], None]]] = {layer: [] for layer in layers}
        for name, target in targets.items():
            mixture = self.mixtures[name]
            for rows, members in zip(target, forward.members[name], strict=True):
                for member, layer in enumerate(mixture.layers):
                    tokens = (members == member).nonzero().squeeze(1)
                    if len(tokens):
                        write = partial(self._write, rows, mixture, layer, kept[tokens], tokens)
                        writers[layer].append(write)
        positions = self._moved(kept)

        def visit(layer: int, x: Tensor) -> None:
            x = x.flatten(0, 1)
            self.finite[layer] &= x.isfinite().all()
            if self.norm_limit is not None:
                too_long.logical_or_(self.norm_limit.exceeded(x[positions], layer))
            for write in writers[layer]:
                write(x)

        visitors = {layer: partial(visit, layer) for layer in writers}
        self.host.visit(self._pinned(forward.input_ids), visitors)
        return too_long

    def _is_balanced(self, name: str) -> bool:
        return self.layer_sampling == "balanced" and len(self.mixtures[name].layers) > 1

    def _balanced(self, name: str, order: Int[Tensor, " row"]) -> Int[Tensor, " taken"]:
        """The rows for a batch: as many of each member as there are turns of it."""
        members = self.members[self._slots[name].start, : self.filled]
        size = min(self.batch_tokens, self.filled)
        counts = turns(self.handed_out, size, len(self.mixtures[name].layers))
        return first_of_each(order, members, counts)

    def _write(
        self, rows: Tensor, mixture: Mixture, layer: int, positions: Tensor, at: Tensor, x: Tensor
    ) -> None:
        """Copy the tokens that drew `layer` from a forward's x to their places in `rows`."""
        chosen = x.index_select(0, self._moved(positions))
        rows.index_copy_(0, self._moved(at), mixture.normalize(chosen, layer))

    def _count_new_rows(self) -> None:
        """Add the rows of the last forward, but for those that are too long, to the filled ones."""
        if self._new is None:
            return
        forward, too_long = self._new
        added = torch.arange(len(forward.kept))
        if self.norm_limit is not None:
            with self._side.work():
                added = self._drop(too_long)
        self.filled += len(added)
        self._forwards.count(forward, added)
        self._new = None

    def _drop(self, too_long: Bool[Tensor, " row"]) -> Int[Tensor, " kept"]:
        """Close up the new rows over those that are too long; returns which stay."""
        keep = (~too_long).nonzero().squeeze(1)
        on_cpu = keep.cpu()
        end = self.filled + len(keep)
        self.buffer[:, self.filled : end] = self.buffer[:, self.filled + keep]
        self.members[:, self.filled : end] = self.members[:, self.filled + on_cpu]
        return on_cpu

    def _taking(self, taken: Int[Tensor, " taken"]) -> tuple[_Taking, _Taking]:
        """How these rows are taken: rows from the filled end move into their places.

        As indices on the CPU, and where the buffer is.
        """
        left = self.filled - len(taken)
        is_taken = torch.zeros(self.filled, dtype=torch.bool)
        is_taken[taken] = True
        gaps = is_taken[:left].nonzero().squeeze(1)
        movers = (~is_taken[left:]).nonzero().squeeze(1) + left
        taking = _Taking(taken, gaps, movers)
        return taking, _Taking(*map(self._moved, taking))

    def _take(self, slots: slice, taking: _Taking, on_device: _Taking) -> MixedBatch:
        """Take rows out of a name's slots."""
        members = self.members[slots, taking.taken].flatten()
        self.members[slots, taking.gaps] = self.members[slots, taking.movers]
        x = self.buffer[slots].index_select(1, on_device.taken).flatten(0, 1)
        for rows in self.buffer[slots]:  # one by one: the temporary is one slot's
            rows[on_device.gaps] = rows[on_device.movers]
        return MixedBatch(x, self._moved(members.long()))

    def _moved(self, indices: Int[Tensor, " index"]) -> Int[Tensor, " index"]:
        """Indices from the CPU, where the buffer is."""
        return self._pinned(indices).to(self.buffer.device, non_blocking=True)

    def _pinned(self, indices: Int[Tensor, "*index"]) -> Int[Tensor, "*index"]:
        """In memory that a GPU copies from without waiting for the work before it."""
        return indices.pin_memory() if self.buffer.is_cuda else indices


class _Taking(NamedTuple):
    """Rows to take, the gaps that they leave among the rest, and the rows that go there."""

    taken: Int[Tensor, " taken"]
    gaps: Int[Tensor, " gap"]
    movers: Int[Tensor, " gap"]


class State(NamedTuple):
    """What determines the batches to come.

    Attributes:
        draws: Of layers and rows.
        rows: Of each mixture that is held here, its part of the buffer.
        rest: Fit for JSON.
    """

    draws: dict[str, Tensor]
    rows: dict[str, dict[str, Tensor]]
    rest: dict[str, Any]


class _Received(NamedTuple):
    """A forward of any process with the rows of this one's mixtures, and which are too long."""

    forward: Forward
    rows: dict[str, Tensor]
    too_long: Bool[Tensor, " row"]


class _NewRows(NamedTuple):
    """Rows of a forward behind the filled part of the buffer, not yet counted."""

    forward: Forward
    too_long: Bool[Tensor, " row"]
