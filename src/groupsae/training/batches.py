"""Mixed batches for every SAE at once, from one shared forward of the host model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from groupsae.errors import InputError
from groupsae.host.ahead import ContextsAhead
from groupsae.host.model import HostModel
from groupsae.host.tokens import EndOfText, TokenStream, special_mask
from groupsae.sae import SAE
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

    With `overlap`, a batch is handed out with the forward for the next one under way, on a CUDA
    stream of its own, while the SAEs step on the current stream. The batches are the same.

    Args:
        saes: By name; every SAE takes part in every batch.
        total_tokens: Tokens to hand out in all. No more text is read than that takes.
        batch_tokens, buffer_tokens: Size of a batch, and of the buffer that it is drawn from.
        contexts: Contexts in one forward of the host model.
        special: Token ids to leave out.
        norm_limit: Leaves out tokens of extraordinary norm; None keeps them.
        seed: Of the layer draws and of the shuffling.
        overlap: By default on CUDA alone: elsewhere there is nothing to overlap, and the forward
            would hold its memory beside that of a batch.
    """

    def __init__(
        self,
        host: HostModel,
        stream: TokenStream | ContextsAhead,
        saes: Mapping[str, SAE],
        *,
        total_tokens: int,
        batch_tokens: int,
        buffer_tokens: int,
        contexts: int,
        special: Iterable[int] = (),
        norm_limit: NormLimit | None = None,
        seed: int = 0,
        overlap: bool | None = None,
    ) -> None:
        self.host, self.stream, self.saes = host, stream, dict(saes)
        self.total_tokens, self.batch_tokens = total_tokens, batch_tokens
        self.buffer_tokens, self.contexts = buffer_tokens, contexts
        self.special, self.norm_limit = tuple(special), norm_limit
        self.overlap = host.device.type == "cuda" if overlap is None else overlap
        self.excluded = Excluded()
        self.filled = 0
        self.handed_out = 0
        rows = buffer_tokens + contexts * stream.context_length
        self.buffer = torch.zeros(len(self.saes), rows, host.d_model, device=host.device)
        self.finite = torch.ones(host.n_layers, dtype=torch.bool, device=host.device)
        self._layer_draws = torch.Generator().manual_seed(2 * seed)
        self._row_draws = torch.Generator().manual_seed(2 * seed + 1)
        self._new: _NewRows | None = None
        self._side = SideStream(host.device, overlap=self.overlap)
        self._side.share(self.buffer, self.finite)

    def next(self) -> dict[str, Float[Tensor, "token d_model"]]:
        """The next mixed batch of normalised activations, by SAE.

        Raises:
            EndOfText: If the text is used up before `total_tokens` are handed out.
        """
        self._fill()
        self._side.join()
        drawn = torch.randperm(self.filled, generator=self._row_draws)[: self.batch_tokens]
        rows = self._moved(drawn)
        batch = {name: filled.index_select(0, rows) for name, filled in self._rows()}
        self._close_gaps(drawn)
        self.handed_out += len(drawn)
        if self.overlap:
            with suppress(EndOfText):  # raised again when a batch that needs the text is asked for
                self._fill(ahead=True)
        return batch

    def check_finite(self) -> None:
        """Raise if an activation since the start was NaN or infinite."""
        self._side.join()
        if not bool(self.finite.all()):
            layer = int(self.finite.logical_not().nonzero()[0])
            raise InputError(
                f"layer {layer} of {self.host.name} gave NaN or infinite activations; the last "
                "checkpoint is kept. Try host.dtype=float32, and check the model's weights"
            )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that determines the batches to come: tensors, and a JSON-able rest."""
        self._count_new_rows()
        self._side.join()
        tensors = {
            **{f"buffer.{name}": rows[: self.filled] for name, rows in self._rows()},
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
        for name, rows in self._rows():
            saved = tensors[f"buffer.{name}"]
            self.filled = len(saved)
            rows[: self.filled] = saved
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
            with self._side.work():
                self._read_contexts(contexts)
            if ahead and self.norm_limit is not None:
                break
            self._count_new_rows()

    def _wanted_contexts(self) -> int:
        """Contexts of the next forward; 0 if none is needed."""
        missing = self.total_tokens - self.handed_out - self.filled
        if self.filled >= self.buffer_tokens or missing <= 0:
            return 0
        return min(self.contexts, -(-missing // self.stream.context_length))

    def _read_contexts(self, contexts: int) -> None:
        """Run the host model on further contexts; their tokens go to the buffer's free end."""
        input_ids = self.stream.next_contexts(contexts)
        kept = (~special_mask(input_ids, self.special)).flatten().nonzero().squeeze(1)
        too_long = torch.zeros(len(kept), dtype=torch.bool, device=self.host.device)
        writers: dict[int, list[Callable[[Tensor], None]]] = {}
        for index, sae in enumerate(self.saes.values()):
            draw = self._draw_members(len(kept), len(sae.layers))
            for member, layer in enumerate(sae.layers):
                tokens = (draw == member).nonzero().squeeze(1)
                writer = partial(self._write, index, sae, layer, kept[tokens], tokens)
                writers.setdefault(layer, []).append(writer)
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

    def _draw_members(self, tokens: int, members: int) -> Int[Tensor, " token"]:
        if members == 1:  # no draw: a baseline's tokens must not depend on the groups beside it
            return torch.zeros(tokens, dtype=torch.long)
        return torch.randint(members, (tokens,), generator=self._layer_draws)

    def _write(
        self, index: int, sae: SAE, layer: int, positions: Tensor, rows: Tensor, x: Tensor
    ) -> None:
        """Copy the tokens that drew `layer` from a forward's x into the free end of the buffer."""
        chosen = x.index_select(0, self._moved(positions))
        rows = self._moved(rows + self.filled)
        self.buffer[index].index_copy_(0, rows, sae.normalize(chosen, layer))

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
        self.buffer[:, self.filled : self.filled + len(keep)] = self.buffer[:, self.filled + keep]
        return len(keep)

    def _close_gaps(self, taken: Int[Tensor, " token"]) -> None:
        """Move rows from the filled end into the places of those taken."""
        left = self.filled - len(taken)
        is_taken = torch.zeros(self.filled, dtype=torch.bool)
        is_taken[taken] = True
        gaps = is_taken[:left].nonzero().squeeze(1)
        movers = (~is_taken[left:]).nonzero().squeeze(1) + left
        gaps, movers = self._moved(gaps), self._moved(movers)
        for _, rows in self._rows():  # one by one: the temporary is one SAE's
            rows[gaps] = rows[movers]
        self.filled = left

    def _rows(self) -> Iterator[tuple[str, Float[Tensor, "row d_model"]]]:
        """Every SAE's part of the buffer."""
        return zip(self.saes, self.buffer, strict=True)

    def _moved(self, indices: Int[Tensor, " index"]) -> Int[Tensor, " index"]:
        """Indices from the CPU, where the buffer is."""
        return self._pinned(indices).to(self.buffer.device, non_blocking=True)

    def _pinned(self, indices: Int[Tensor, "*index"]) -> Int[Tensor, "*index"]:
        """In memory that a GPU copies from without waiting for the work before it."""
        return indices.pin_memory() if self.buffer.is_cuda else indices


@dataclass(frozen=True)
class _NewRows:
    """Rows of a forward behind the filled part of the buffer, not yet counted."""

    tokens: int  # of its contexts, special ones too
    too_long: Bool[Tensor, " row"]
