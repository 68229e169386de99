"""Which modules of a language model are its transformer blocks: found by running it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from groupsae.errors import InputError

# Classes of transformers, which takes seconds to import and is imported only to load a model.
PreTrainedModel: TypeAlias = Any
BlockOutput: TypeAlias = Any  # the residual stream, or a tuple that starts with it


@dataclass(frozen=True)
class Blocks:
    """The transformer blocks of a model, in order, and where they lie in it."""

    path: str
    modules: nn.ModuleList
    d_model: int


@torch.no_grad()
def find_blocks(model: PreTrainedModel) -> Blocks:
    """Find a causal language model's blocks by what they do, whatever they are called.

    Of all `nn.ModuleList`s as long as the model is deep, the blocks are the one whose modules, in a
    forward over two sequences of four tokens, each run once and in order, each return a residual
    stream `[batch, context, d_model]`, and each take what the one before returned. The model is
    causal if the first token's stream is the same whatever tokens follow it.

    Raises:
        InputError: an encoder, an encoder-decoder, or a model built in another way.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise _refusal(name, "is an encoder-decoder")
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    traces = [
        _Trace(path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not traces:
        raise _refusal(name, f"has no list of {depth} blocks")

    _run(model, traces)
    faults = {trace.path: trace.fault() for trace in traces}
    found = [trace for trace in traces if faults[trace.path] is None]
    if not found:
        reasons = "; ".join(f"{path} {fault}" for path, fault in faults.items())
        raise _refusal(
            name, f"has no list of {depth} blocks that pass on a residual stream: {reasons}"
        )
    if len(found) > 1:
        paths = ", ".join(trace.path for trace in found)
        raise _refusal(name, f"has several lists that could be its blocks: {paths}")
    broken = found[0].first_not_finite()
    if broken is not None:
        raise InputError(
            f"The residual stream of {name} after layer {broken} holds NaN or infinity, in "
            f"{found[0].outputs[broken].dtype}: its weights are damaged, or host.dtype is too "
            "narrow (float16 overflows in models trained in bfloat16)."
        )
    if not found[0].is_causal():
        raise _refusal(name, "is an encoder: a token's residual stream depends on later tokens")
    return Blocks(found[0].path, found[0].modules, found[0].outputs[-1].shape[-1])


def stream_of(output: BlockOutput) -> Float[Tensor, "*shape"]:
    """The residual stream in what a block returned: the output itself, or a tuple's first item."""
    stream: Tensor = output[0] if isinstance(output, tuple | list) else output
    return stream


def with_stream(output: BlockOutput, stream: Float[Tensor, "*shape"]) -> BlockOutput:
    """What a block returned, with its residual stream replaced."""
    return (stream, *output[1:]) if isinstance(output, tuple | list) else stream


_BATCH, _CONTEXT = 2, 4  # unequal, so that no model with another order of axes passes


@dataclass
class _Trace:
    """What the modules of one list took and returned during one forward."""

    path: str
    modules: nn.ModuleList
    order: list[int] = field(default_factory=list)
    inputs: list[Tensor | None] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)

    def hook(self) -> Iterable[torch.utils.hooks.RemovableHandle]:
        for index, module in enumerate(self.modules):

            def record(
                _: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                output: Any,
                i: int = index,
            ) -> None:
                taken = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
                self.order.append(i)
                self.inputs.append(next(taken, None))
                self.outputs.append(stream_of(output))

            yield module.register_forward_hook(record, with_kwargs=True)

    def fault(self) -> str | None:
        """Why these modules are not the blocks; None if they are."""
        if self.order != list(range(len(self.modules))):
            return "does not run once each and in order"
        first = self.outputs[0]
        for output in self.outputs:
            if (
                not isinstance(output, Tensor)
                or not output.is_floating_point()
                or output.shape[:-1] != (_BATCH, _CONTEXT)
                or output.shape != first.shape
            ):
                return "does not return [batch, context, d_model]"
        for taken, given in zip(self.inputs[1:], self.outputs, strict=False):
            if taken is None or not torch.allclose(
                taken.to(given.device), given, rtol=0, atol=0, equal_nan=True
            ):
                return "does not take what the one before returned"
        return None

    def first_not_finite(self) -> int | None:
        """The first layer whose stream is not all finite."""
        finite = [bool(output.isfinite().all()) for output in self.outputs]
        return finite.index(False) if False in finite else None

    def is_causal(self) -> bool:
        """Whether the first token's stream is equal in both sequences, up to rounding."""
        one, other = self.outputs[-1][:, 0].double()
        tolerance = torch.finfo(self.outputs[-1].dtype).eps ** 0.5
        return bool((one - other).norm() <= tolerance * one.norm())


def _run(model: PreTrainedModel, traces: list[_Trace]) -> None:
    handles = [handle for trace in traces for handle in trace.hook()]
    try:
        # Without the head, whose weights need not be read from the disk for this.
        model.base_model(input_ids=_probe(model.get_input_embeddings().weight), use_cache=False)
    except Exception as error:
        raise _refusal(type(model).__name__, f"cannot run on token ids alone ({error})") from error
    finally:
        for handle in handles:
            handle.remove()


def _probe(embedding: Float[Tensor, "vocab d_embedding"]) -> Int[Tensor, "batch context"]:
    """Two sequences that share only their first token, of ids from the middle of the vocabulary.

    (Its ends hold special tokens and padding.)
    """
    vocab_size = embedding.shape[0]
    ids = torch.tensor([[0, 1, 2, 3], [0, 4, 5, 6]], device=embedding.device)
    return (ids + vocab_size // 2) % vocab_size


def _refusal(name: str, reason: str) -> InputError:
    return InputError(
        f"{name} {reason}. groupsae reads decoder-only causal language models whose blocks pass on "
        "one residual stream (GPT, Llama, Pythia, Qwen, Gemma and their like): give such a model."
    )
