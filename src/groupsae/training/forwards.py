"""Which forwards of the host model come next: their text, and at which layers it is seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from groupsae.config import LayerSampling
from groupsae.host.ahead import ContextsAhead
from groupsae.host.faults import BrokenText
from groupsae.host.tokens import EndOfText, TokenStream, special_mask
from groupsae.training.activation_cache import CachedActivations
from groupsae.training.exchange import SharedContexts
from groupsae.training.layer_sampling import deal, draw, turns

Contexts = TokenStream | ContextsAhead | SharedContexts | CachedActivations


@dataclass
class Excluded:
    """Tokens that were read but not trained on."""

    special: int = 0
    long: int = 0
    kept: int = 0


class Place(NamedTuple):
    """Behind a forward: in the text, and in the draws of layers."""

    stream: dict[str, Any]
    layer_draws: Tensor


class Forward(NamedTuple):
    """One of the host model's forwards: its contexts and what becomes of their tokens.

    Attributes:
        kept: The tokens, of all of its contexts, that are no special ones.
        members: For each mixture, and each of its rows of a token, which member it is of.
        place: Behind it.
    """

    input_ids: Int[Tensor, "n context"]
    kept: Int[Tensor, " kept"]
    members: dict[str, Int[Tensor, "slot kept"]]
    place: Place


class Forwards:
    """The forwards that a training takes, one after another.

    The next ones follow from the text, the draws of layers, and the tokens kept of those before,
    of each member: the batches that are taken in between change nothing. So several can be told
    before the first is run. Only where tokens may be dropped, an unknown number of each forward,
    are some of them not sure yet.

    Args:
        stream: The text.
        layers: The member layers of each mixture.
        total_tokens: Tokens to keep in all.
        contexts: Contexts of a forward, but for the last ones.
        special: Token ids to leave out.
        drops: Whether tokens may be dropped when a forward was run.
        layer_sampling, layer_weights, seed: How members are drawn; see
            :class:`groupsae.training.batches.MixedBatches`.

    Attributes:
        excluded: What became of the tokens of all forwards that were counted.
        place: Behind the last of them.
        dealt: Of each mixture that is balanced, how many of their kept tokens are each member's.
    """

    def __init__(
        self,
        stream: Contexts,
        layers: Mapping[str, Sequence[int]],
        *,
        total_tokens: int,
        contexts: int,
        special: Iterable[int],
        drops: bool,
        layer_sampling: LayerSampling,
        layer_weights: Mapping[int, float],
        seed: int,
    ) -> None:
        self._stream, self._layers = stream, layers
        self._total_tokens, self._contexts = total_tokens, contexts
        self._special, self._drops = tuple(special), drops
        self._layer_sampling, self._layer_weights = layer_sampling, layer_weights
        self._layer_draws = torch.Generator().manual_seed(seed)
        self.excluded = Excluded()
        self.place = self._current_place()
        self.dealt: dict[str, Int[Tensor, " member"]] = {}
        if layer_sampling == "balanced":
            several = {name: len(own) for name, own in layers.items() if len(own) > 1}
            self.dealt = {name: torch.zeros(n, dtype=torch.long) for name, n in several.items()}

    def next(self, contexts: int, most: int = 1) -> list[Forward]:
        """The next one, of so many contexts, and those after it that are sure, up to `most`.

        Raises:
            EndOfText: If there are not so many contexts.
            BrokenText: If the text cannot be read on.
        """
        forwards: list[Forward] = []
        dealt = {name: counts.clone() for name, counts in self.dealt.items()}
        kept = self.excluded.kept
        while contexts and len(forwards) < most:
            try:
                forwards.append(self._read(contexts, dealt))
            except (EndOfText, BrokenText):
                if forwards:  # raised again where a batch needs the text
                    break
                raise
            kept += len(forwards[-1].kept)
            contexts = self._contexts_of(self._total_tokens - kept)
            # With tokens dropped it may turn out larger, and other members may be due.
            if self._drops and (contexts < self._contexts or self.dealt):
                break
        return forwards

    def count(self, forward: Forward, added: Int[Tensor, " added"]) -> None:
        """Note that a forward was run; `added` are those of its kept tokens that stay."""
        self.excluded.special += forward.input_ids.numel() - len(forward.kept)
        self.excluded.long += len(forward.kept) - len(added)
        self.excluded.kept += len(added)
        for name, counts in self.dealt.items():
            counts += torch.bincount(forward.members[name][0, added], minlength=len(counts))
        self.place = forward.place

    def to_total(self) -> int:
        """Contexts of the next forward on the way to the total; 0 if it is reached."""
        return self._contexts_of(self._total_tokens - self.excluded.kept)

    def to_turns(self, tokens: int) -> int:
        """Contexts of a forward for the turns that members lack of the first `tokens` tokens.

        Of tokens that are there it is 0, but where too many of a member were dropped.
        """
        lacks = (turns(0, tokens, len(counts)) - counts for counts in self.dealt.values())
        return self._contexts_of(max((int(lack.clamp(min=0).sum()) for lack in lacks), default=0))

    def load(self, place: Place, excluded: Excluded, dealt: Mapping[str, Sequence[int]]) -> None:
        """Go on from what the attributes were once."""
        self.excluded, self.place = excluded, place
        self.dealt = {name: torch.tensor(counts) for name, counts in dealt.items()}
        self._stream.load_state_dict(place.stream)
        self._layer_draws.set_state(place.layer_draws)

    def _contexts_of(self, tokens: int) -> int:
        return min(self._contexts, -(-max(tokens, 0) // self._stream.context_length))

    def _read(self, contexts: int, dealt: Mapping[str, Int[Tensor, " member"]]) -> Forward:
        """The next contexts, and at which layers each mixture sees their tokens."""
        input_ids = self._stream.next_contexts(contexts)
        kept = (~special_mask(input_ids, self._special)).flatten().nonzero().squeeze(1)
        members = {name: self._sample(name, len(kept), dealt) for name in self._layers}
        return Forward(input_ids, kept, members, self._current_place())

    def _sample(
        self, name: str, tokens: int, dealt: Mapping[str, Int[Tensor, " member"]]
    ) -> Int[Tensor, "slot token"]:
        """The members that new tokens are seen at; what is dealt is added to `dealt`."""
        layers = self._layers[name]
        if self._layer_sampling == "all":
            return torch.arange(len(layers))[:, None].expand(-1, tokens)
        if len(layers) == 1:  # no draw: a baseline's tokens must not depend on the groups beside it
            return torch.zeros(1, tokens, dtype=torch.long)
        if self._layer_sampling == "balanced":
            members = deal(tokens, dealt[name], self._layer_draws)
            dealt[name].add_(torch.bincount(members, minlength=len(layers)))
        else:
            weights = [self._layer_weights.get(layer, 1.0) for layer in layers]
            members = draw(tokens, weights, self._layer_draws)
        return members[None]

    def _current_place(self) -> Place:
        return Place(self._stream.state_dict(), self._layer_draws.get_state())
