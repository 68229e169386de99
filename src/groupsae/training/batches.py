"""Mixed batches for every SAE at once, from one shared forward of the host model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from groupsae.config import LayerSampling
from groupsae.host.ahead import ContextsAhead
from groupsae.host.faults import BrokenText
from groupsae.host.model import HostModel
from groupsae.host.tokens import EndOfText, TokenStream, special_mask
from groupsae.training.activation_cache import CachedActivations
from groupsae.training.layer_sampling import deal, draw, first_of_each, turns
from groupsae.training.side_stream import SideStream


@dataclass
class Excluded:
    """Tokens that were read but not trained on."""

    special: int = 0
    long: int = 0
    kept: int = 0


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
class Mixture(Protocol):
    """What a mixed batch is drawn for: an SAE, or what several SAEs of one affine share."""

    @property
    def layers(self) -> Sequence[int]:
        """The member layers."""

    def normalize(self, x: Float[Tensor, "token d_model"], layer: int) -> Tensor:
        """Activations of a member layer as the SAE is given them."""


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
        overlap: By default on CUDA alone: elsewhere there is nothing to overlap, and the forward
            would hold its memory beside that of a batch.
    """

    def __init__(
        self,
        host: HostModel | CachedActivations,
        stream: TokenStream | ContextsAhead | CachedActivations,
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
    ) -> None:
        self.host, self.stream, self.mixtures = host, stream, dict(mixtures)
        self.total_tokens, self.batch_tokens = total_tokens, batch_tokens
        self.buffer_tokens, self.contexts = buffer_tokens, contexts
        self.special, self.norm_limit = tuple(special), norm_limit
        self.layer_sampling, self.layer_weights = layer_sampling, dict(layer_weights or {})
        self.overlap = host.device.type == "cuda" if overlap is None else overlap
        self.excluded = Excluded()
        self.filled = 0
        self.handed_out = 0
        self._slots: dict[str, slice] = {}  # where each name's rows lie
        slots = 0
        for name, mixture in self.mixtures.items():
            first, slots = slots, slots + (len(mixture.layers) if layer_sampling == "all" else 1)
            self._slots[name] = slice(first, slots)
        rows = buffer_tokens + contexts * stream.context_length
        self.buffer = torch.zeros(slots, rows, host.d_model, device=host.device)
        self.members = torch.zeros(slots, rows, dtype=torch.int16)  # of each row, on the CPU
        self.finite = torch.ones(host.n_layers, dtype=torch.bool, device=host.device)
        self._layer_draws = torch.Generator().manual_seed(2 * seed)
        self._row_draws = torch.Generator().manual_seed(2 * seed + 1)
        self._new: _NewRows | None = None
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

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that determines the batches to come: tensors, and a JSON-able rest."""
        self._count_new_rows()
        self._side.join()
        tensors = {
            **{f"buffer.{name}": self.buffer[s, : self.filled] for name, s in self._slots.items()},
            **{
                f"members.{name}": self.members[s, : self.filled] for name, s in self._slots.items()
            },
            "layer_draws": self._layer_draws.get_state(),
            "row_draws": self._row_draws.get_state(),
        }
        rest = {
            "stream": self.stream.state_dict(),
            "handed_out": self.handed_out,
            "excluded": vars(self.excluded).copy(),
        }
        return tensors, rest

    def load_state(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state` gave."""
        self._side.join()
        self._new = None
        for name, slots in self._slots.items():
            saved = tensors[f"buffer.{name}"]
            self._make_room(saved.shape[1])
            self.buffer[slots, : saved.shape[1]] = saved
            self.members[slots, : saved.shape[1]] = tensors[f"members.{name}"]
            self.filled = saved.shape[1]
        self._layer_draws.set_state(tensors["layer_draws"])
        self._row_draws.set_state(tensors["row_draws"])
        self.stream.load_state_dict(rest["stream"])
        self.handed_out = rest["handed_out"]
        self.excluded = Excluded(**rest["excluded"])

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
        wanted = self.total_tokens - self.handed_out - self.filled
        if self.filled >= self.buffer_tokens or wanted <= 0:
            wanted = self._short()
        return min(self.contexts, -(-wanted // self.stream.context_length))

    def _short(self) -> int:
        """Rows that the buffer lacks, of the right members, for the next batch.

        None but where a `norm_limit` has left too few of a member.
        """
        balanced = [name for name in self.mixtures if self._is_balanced(name)]
        if self.norm_limit is None or self.handed_out >= self.total_tokens:
            return 0
        lacks = (self._turns(name) - self._held(name) for name in balanced)
        return max((int(lack.clamp(min=0).sum()) for lack in lacks), default=0)

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
        input_ids = self.stream.next_contexts(contexts)
        kept = (~special_mask(input_ids, self.special)).flatten().nonzero().squeeze(1)
        too_long = torch.zeros(len(kept), dtype=torch.bool, device=self.host.device)
        layers = (layer for mixture in self.mixtures.values() for layer in mixture.layers)
        writers: dict[int, list[Callable[[Tensor], None]]] = {layer: [] for layer in layers}
        for name, mixture in self.mixtures.items():
            for slot, members in enumerate(self._sample(name, len(kept)), self._slots[name].start):
                self.members[slot, self.filled : self.filled + len(kept)] = members
                for member, layer in enumerate(mixture.layers):
                    tokens = (members == member).nonzero().squeeze(1)
                    if len(tokens):
                        write = partial(self._write, slot, mixture, layer, kept[tokens], tokens)
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
        self.host.visit(self._pinned(input_ids), visitors)
        self._new = _NewRows(input_ids.numel(), too_long)

    def _sample(self, name: str, tokens: int) -> Int[Tensor, "slot token"]:
        """The members that new tokens are seen at."""
        layers = self.mixtures[name].layers
        if self.layer_sampling == "all":
            return torch.arange(len(layers))[:, None].expand(-1, tokens)
        if len(layers) == 1:  # no draw: a baseline's tokens must not depend on the groups beside it
            return torch.zeros(1, tokens, dtype=torch.long)
        if self.layer_sampling == "balanced":
            members = deal(tokens, self._held(name), self.handed_out, self._layer_draws)
        else:
            weights = [self.layer_weights.get(layer, 1.0) for layer in layers]
            members = draw(tokens, weights, self._layer_draws)
        return members[None]

    def _is_balanced(self, name: str) -> bool:
        return self.layer_sampling == "balanced" and len(self.mixtures[name].layers) > 1

    def _balanced(self, name: str, order: Int[Tensor, " row"]) -> Int[Tensor, " taken"]:
        """The rows for a batch: as many of each member as there are turns of it."""
        members = self.members[self._slots[name].start, : self.filled]
        return first_of_each(order, members, self._turns(name))

    def _held(self, name: str) -> Int[Tensor, " member"]:
        """How many of its rows are of each member."""
        members = self.members[self._slots[name].start, : self.filled]
        return torch.bincount(members, minlength=len(self.mixtures[name].layers))

    def _turns(self, name: str) -> Int[Tensor, " member"]:
        """How many rows of each member the next batch takes."""
        size = min(self.batch_tokens, self.filled)
        return turns(self.handed_out, size, len(self.mixtures[name].layers))

    def _write(
        self, slot: int, mixture: Mixture, layer: int, positions: Tensor, rows: Tensor, x: Tensor
    ) -> None:
        """Copy the tokens that drew `layer` from a forward's x into the free end of the buffer."""
        chosen = x.index_select(0, self._moved(positions))
        rows = self._moved(rows + self.filled)
        self.buffer[slot].index_copy_(0, rows, mixture.normalize(chosen, layer))

    def _count_new_rows(self) -> None:
        """Add the rows of the last forward, but for those that are too long, to the filled ones."""
        if self._new is None:
            return
        written = added = len(self._new.too_long)
        if self.norm_limit is not None:
            with self._side.work():
                added = self._drop(self._new.too_long)
        self.filled += added
        self.excluded.special += self._new.tokens - written
        self.excluded.long += written - added
        self.excluded.kept += added
        self._new = None

    def _drop(self, too_long: Bool[Tensor, " token"]) -> int:
        """Close up the new rows over those that are too long; returns how many stay."""
        keep = (~too_long).nonzero().squeeze(1)
        end = self.filled + len(keep)
        self.buffer[:, self.filled : end] = self.buffer[:, self.filled + keep]
        self.members[:, self.filled : end] = self.members[:, self.filled + keep.cpu()]
        return len(keep)

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


@dataclass(frozen=True)
class _NewRows:
    """Rows of a forward behind the filled part of the buffer, not yet counted."""

    tokens: int  # of its contexts, special ones too
    too_long: Bool[Tensor, " row"]
