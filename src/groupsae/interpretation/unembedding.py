"""How the host model reads its last residual stream: the final norm, then the unembedding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from groupsae.errors import InputError
from groupsae.host.blocks import stream_of
from groupsae.host.model import HostModel


@dataclass(frozen=True)
class Unembedding:
    """The linear part of the way from a residual stream to logits.

    Attributes:
        W_U: Rows of the unembedding, one per token id, in float32.
        gain: What the final norm multiplies each dimension with; ones where there is no norm.
        centred: Whether the final norm takes each stream's mean off first (LayerNorm).
    """

    W_U: Float[Tensor, "vocab d_model"]
    gain: Float[Tensor, " d_model"]
    centred: bool

    def directions(self, rows: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """What the unembedding sees of directions in the last residual stream.

        Up to the norm's division by the stream's size, which is one positive factor per token. The
        norm's bias is left out: it is the same whatever the stream.
        """
        rows = rows.float().to(self.gain.device)
        if self.centred:
            rows = rows - rows.mean(1, keepdim=True)
        return rows * self.gain


def unembedding_of(host: HostModel) -> Unembedding:
    """Find the host's final norm and its unembedding, whatever they are called.

    The norm is the module outside the blocks that takes the last block's output. Its gain is
    measured, so that it does not matter how the module stores it (Gemma's adds 1), and checked on
    another input to be that of a LayerNorm or an RMSNorm.

    Raises:
        InputError: If something else lies between the last block and the logits.
    """
    head = host.model.get_output_embeddings()
    if head is None:
        raise _refusal(host, "it has no unembedding")
    with _calls_after_blocks(host) as calls:
        host.logits(_probe(host))
    stream, into_head = calls.stream, calls.taken_by(head)
    if into_head is None or head.weight.shape[-1] != host.d_model:
        raise _refusal(host, "its unembedding does not take a stream of d_model dimensions")
    W_U = head.weight.detach().float()
    norm = calls.first_on(stream)
    if norm is None or norm is head:
        if not torch.equal(into_head, stream):
            raise _refusal(host, "what its unembedding takes comes from no module that is known")
        return Unembedding(W_U, W_U.new_ones(host.d_model), centred=False)
    if not torch.equal(into_head, calls.given_by(norm)):
        raise _refusal(host, f"something follows its final norm ({type(norm).__name__})")
    gain, centred = _measured(host, norm)
    return Unembedding(W_U, gain, centred)


class _Calls:
    """Which modules outside the blocks were called after the last block, and on what."""

    def __init__(self) -> None:
        self.stream: Any = None
        self._calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def add(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given = stream_of(output) if isinstance(output, Tensor | tuple) else None
        if self.stream is not None and args and isinstance(args[0], Tensor) and given is not None:
            self._calls.append((module, args[0], given))

    def first_on(self, stream: Tensor) -> nn.Module | None:
        """The first module that took the stream and changed it."""
        for module, taken, given in self._calls:
            if _same(taken, stream) and not _same(given, stream):
                return module
        return None

    def taken_by(self, module: nn.Module) -> Tensor | None:
        return next((taken for each, taken, _ in self._calls if each is module), None)

    def given_by(self, module: nn.Module) -> Tensor:
        return next(given for each, _, given in self._calls if each is module)


@contextmanager
def _calls_after_blocks(host: HostModel) -> Iterator[_Calls]:
    calls = _Calls()
    inside = set(host.blocks.modules())

    def at_last_block(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        calls.stream = stream_of(output).detach().clone()

    def outside(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.add(module, args, output)

    handles = [host.blocks[-1].register_forward_hook(at_last_block)]
    for module in host.model.modules():
        if module not in inside:
            handles.append(module.register_forward_hook(outside))
    try:
        with torch.no_grad():
            yield calls
    finally:
        for handle in handles:
            handle.remove()


def _probe(host: HostModel) -> Tensor:
    """A few tokens from the middle of the vocabulary: its ends hold special ones."""
    ids = torch.arange(4, device=host.device).unsqueeze(0) + host.vocab_size // 2
    return ids % host.vocab_size


@torch.no_grad()
def _measured(host: HostModel, norm: nn.Module) -> tuple[Float[Tensor, " d_model"], bool]:
    """The gain of a norm, and whether it takes the mean off.

    An input of mean 0 and mean square 1 is normalised to itself by LayerNorm and RMSNorm alike.
    Half the difference between what comes of it and of its negative is the gain times it: a bias
    falls out.
    """
    pattern = _balanced(host.d_model)

    def odd(x: Tensor) -> Tensor:
        # As large as the streams of real models, so that the norm's epsilon does not count.
        x = (_SIZE * x).to(host.device, host.dtype)
        difference: Tensor = norm(x) - norm(-x)
        return difference.float().cpu() / 2

    gain = odd(pattern) / pattern
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, host.d_model, generator=generator) + 1
    of_rms = x / x.square().mean(1, keepdim=True).sqrt()
    off = x - x.mean(1, keepdim=True)
    of_layer_norm = off / off.square().mean(1, keepdim=True).sqrt()
    tolerance = 20 * torch.finfo(host.dtype).eps
    for normalised, centred in ((of_rms, False), (of_layer_norm, True)):
        expected = gain * normalised
        if float((odd(x) - expected).norm()) <= tolerance * float(expected.norm()) + 1e-5:
            return gain.to(host.device), centred
    raise _refusal(host, f"its final norm ({type(norm).__name__}) is neither LayerNorm nor RMSNorm")


_SIZE = 100.0


def _balanced(d_model: int) -> Float[Tensor, " d_model"]:
    """Of mean 0 and mean square 1, with no zero."""
    signs = torch.tensor([1.0, -1.0]).repeat(d_model // 2 + 1)[:d_model]
    if d_model % 2:
        signs[-1] = -2.0  # the signs before it add up to 0: two more of 1 make it so again
        signs[-3:-1] = 1.0
    return signs / signs.square().mean().sqrt()


def _same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.equal(x, y)


def _refusal(host: HostModel, reason: str) -> InputError:
    return InputError(
        f"{host.name}: logit attributions are of no sense here: {reason}. They need a model whose "
        "last residual stream goes through one LayerNorm or RMSNorm, or none, and then the "
        "unembedding; leave them out for this one"
    )
