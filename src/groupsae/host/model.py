"""The host model: the language model whose residual streams are studied."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from groupsae.errors import InputError
from groupsae.host.blocks import BlockOutput, PreTrainedModel, find_blocks, stream_of, with_stream
from groupsae.host.loading import PreTrainedTokenizer, load_pretrained
from groupsae.products import fast_linears

Stream: TypeAlias = Float[Tensor, "batch context d_model"]
Visitor: TypeAlias = Callable[[Stream], object]
Replacement: TypeAlias = Callable[[Stream], Stream]
Hook: TypeAlias = Callable[[nn.Module, tuple[Any, ...], BlockOutput], BlockOutput | None]

_log = logging.getLogger(__name__)


class HostModel:
    """A decoder-only causal language model of Hugging Face, frozen, with its residual streams open.

    Layer l is the model's l-th transformer block, counted from 0; its residual stream is what the
    block returns (resid_post), before any final norm.

    Attributes:
        model: the `PreTrainedModel`, in evaluation mode and without gradients for its weights.
        tokenizer: its tokenizer; None for a model that is only fed token ids.
        name: what it is called in messages and artefacts.
        blocks, block_path: the list of its transformer blocks and where it lies in `model`.
        d_model: width of a residual stream.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizer | None = None,
        name: str | None = None,
    ) -> None:
        """Take a model that is already in memory. It is frozen in place.

        Raises:
            InputError: not a decoder-only causal model, or a tokenizer of another model.
        """
        # A compiled model would keep running without the hooks that are set on it later.
        uncompiled: PreTrainedModel = getattr(model, "_orig_mod", model)
        self.model = uncompiled.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name or model.config._name_or_path or type(self.model).__name__
        found = find_blocks(self.model)
        self.blocks, self.block_path, self.d_model = found.modules, found.path, found.d_model
        self._skippable: dict[int, list[BlockOutput] | None] = {}
        forward = inspect.signature(type(self.model).forward)
        self._keeps_logits = "logits_to_keep" in forward.parameters
        _check_tokenizer(self)

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
    ) -> HostModel:
        """Load a model and its tokenizer.

        Weights are read from safetensors only, and no code that comes with a model is run.

        Args:
            name: "bundled" (the package's own model), a local folder (the network is never
                touched), or a name on the Hugging Face hub.
            revision: branch, tag or commit on the hub.
            dtype: "float32", "bfloat16", "float16", "float64", or "auto": the checkpoint's own on
                an accelerator, float32 on the CPU, where 16 bit is slower than 32.
            device: "cpu", "cuda", "cuda:0", "mps", or "auto": cuda where there is one, else cpu.

        Raises:
            InputError: the model is not there, cannot be read or is no decoder-only causal language
                model; its tokenizer is another model's; the dtype or the device does not exist.
        """
        loaded = load_pretrained(name, revision=revision, dtype=dtype, device=device)
        return cls(loaded.model, loaded.tokenizer, name=str(name))

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding: every token id is smaller. May exceed the tokenizer's."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def context_length(self) -> int | None:
        """The longest context in tokens; None if the model has no limit."""
        config = self.model.config.get_text_config(decoder=True)
        for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
            if (limit := getattr(config, key, None)) is not None:
                return int(limit)
        return None

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights and of the residual streams."""
        return self.model.dtype  # type: ignore[no-any-return]

    @property
    def block_parameters(self) -> int:
        """Mean number of weights of a block; in a mixture of experts, of all its experts."""
        return round(sum(p.numel() for p in self.blocks.parameters()) / self.n_layers)

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids of tokens that are no text: begin and end of a document, padding, reserved ones."""
        config = self.model.config.get_text_config(decoder=True)
        ids: list[int | None] = []
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, key, None)
            ids += value if isinstance(value, list | tuple) else [value]
        if self.tokenizer is not None:
            ids += self.tokenizer.all_special_ids
            ids += _special_added_ids(self.tokenizer)
        return frozenset(i for i in ids if i is not None and 0 <= i < self.vocab_size)

    def residual_streams(
        self, input_ids: Int[Tensor, "batch context"], layers: Sequence[int]
    ) -> dict[int, Stream]:
        """The residual streams after the given layers, without gradient.

        They come from one forward that stops after the last asked layer: no later block, no final
        norm and no unembedding is computed.

        Raises:
            InputError: a layer, a token id or a context that the model does not have.
        """
        streams: dict[int, Tensor] = {}

        def keep(layer: int) -> Visitor:
            def visitor(x: Stream) -> None:
                streams[layer] = x.clone()

            return visitor

        self.visit(input_ids, {layer: keep(layer) for layer in layers})
        return streams

    @torch.no_grad()
    def visit(
        self, input_ids: Int[Tensor, "batch context"], visitors: Mapping[int, Visitor]
    ) -> None:
        """Call `visitors[l](x)` with the residual stream x after each asked layer l.

        The calls come in the order of layers, during one forward that stops after the last of them.
        No layers, no forward.

        x belongs to the forward: copy what is to be kept, change nothing. Inside `splice`, x is the
        replaced stream. No gradient is recorded. What a visitor raises reaches the caller as it is.

        Raises:
            InputError: a layer, a token id or a context that the model does not have.
        """
        self._check_layers(visitors)
        input_ids = self._checked(input_ids)
        if not visitors:
            return
        last = max(visitors)
        stop = _StopForward()

        def hook_of(layer: int, visitor: Visitor) -> Hook:
            def hook(_module: nn.Module, _args: tuple[Any, ...], output: BlockOutput) -> None:
                try:
                    visitor(stream_of(output))
                except BaseException as error:
                    stop.cause = error
                    raise stop from None
                if layer == last:
                    raise stop

            return hook

        with self._hooked({layer: hook_of(layer, fn) for layer, fn in visitors.items()}):
            try:
                self._forward(input_ids)
            except _StopForward as caught:
                if caught is not stop:
                    raise
            else:
                raise RuntimeError(f"{self.name} ran its forward without passing layer {last}.")
        if stop.cause is not None:
            raise stop.cause

    @contextmanager
    def splice(self, replacements: Mapping[int, Replacement]) -> Iterator[None]:
        """While the context is open, the residual stream after layer l is `replacements[l](x)`.

        It holds for every forward of the model: `logits`, `cross_entropy`, `visit` and `model`
        itself (whose own `hidden_states` may still be those before the replacement). Gradients flow
        through a replacement wherever the caller records them. Splices nest: the inner one's
        replacement takes what the outer one's gave. The model is as before when the context is
        left, by an exception too.

        Raises:
            InputError: a layer that the model does not have; in the forward, a replacement whose
                shape, dtype or device is not that of the stream.
        """
        self._check_layers(replacements)

        def hook_of(layer: int, replacement: Replacement) -> Hook:
            def hook(
                _module: nn.Module, _args: tuple[Any, ...], output: BlockOutput
            ) -> BlockOutput:
                x = stream_of(output)
                replaced = replacement(x)
                if _kind(replaced) != _kind(x):
                    raise InputError(
                        f"The replacement spliced in after layer {layer} is {_kind(replaced)}; "
                        f"the residual stream is {_kind(x)}, and so must its replacement be."
                    )
                return with_stream(output, replaced)

            return hook

        with self._hooked({layer: hook_of(layer, fn) for layer, fn in replacements.items()}):
            yield

    def logits(
        self, input_ids: Int[Tensor, "batch context"], *, last: bool = False
    ) -> Float[Tensor, "batch predictions vocab"]:
        """Next-token logits, in the model's dtype.

        Args:
            last: only those after the whole context: [batch, 1, vocab]. Most models then spare the
                unembedding of all other positions.

        Raises:
            InputError: a token id or a context that the model does not have.
        """
        kept = {"logits_to_keep": 1} if last and self._keeps_logits else {}
        logits: Tensor = self._forward(self._checked(input_ids), **kept).logits
        return logits[:, -1:] if last else logits

    def logits_from(
        self, layer: int, x: Stream, input_ids: Int[Tensor, "batch context"], *, last: bool = False
    ) -> Float[Tensor, "batch predictions vocab"]:
        """Next-token logits with x as the residual stream after `layer`, in the model's dtype.

        Bit for bit those of `logits` inside `splice({layer: lambda _: x})`, but the blocks up to
        `layer` are not computed. Where a later block takes more from them than the residual stream
        (keys and values that layers share, say) they are computed after all: the first call at a
        layer finds that out, on a few tokens.

        Splices around the call hold; a replacement at `layer` or below is called and has no effect.

        Args:
            last: as in :meth:`logits`.

        Raises:
            InputError: a layer, a token id or a context that the model does not have; an x whose
                shape, dtype or device is not that of the stream.
        """
        with self.splice({layer: lambda _: x}):
            outputs = self._skippable_outputs(layer)
            if outputs is None:
                return self.logits(input_ids, last=last)
            with _skipped(self.blocks, outputs):
                return self.logits(input_ids, last=last)

    def cross_entropy(
        self, input_ids: Int[Tensor, "batch context"]
    ) -> Float[Tensor, "batch context-1"]:
        """Cross-entropy of every token but the first given those before it, in nats, in float32 (or
        float64 for a float64 model).

        Raises:
            InputError: a token id or a context that the model does not have.
        """
        logits = self.logits(input_ids)[:, :-1].flatten(0, 1)
        targets = input_ids[:, 1:].flatten().to(logits.device, torch.int64)
        wide = torch.promote_types(logits.dtype, torch.float32)
        # In chunks, so that no second copy of [batch, context, vocab] is made for the wide softmax.
        losses = [
            F.cross_entropy(chunk.to(wide), target, reduction="none")
            for chunk, target in zip(
                torch.split(logits, _CHUNK), torch.split(targets, _CHUNK), strict=True
            )
        ]
        return torch.cat(losses).view(input_ids.shape[0], -1)

    def fingerprint(self) -> str:
        """A sha256, in hexadecimal, of the config and every weight's name, dtype, shape and bytes.

        Two models with the same fingerprint compute the same. The config enters as the installed
        version of transformers writes it down, so compare within one version.
        """
        digest = hashlib.sha256()
        config = _essential(self.model.config.to_diff_dict())
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        for key, weight in sorted(self.model.state_dict().items()):
            digest.update(f"{key} {weight.dtype} {tuple(weight.shape)}".encode())
            data = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(memoryview(data.numpy()))
        return digest.hexdigest()

    def _forward(self, input_ids: Int[Tensor, "batch context"], **options: Any) -> Any:
        with fast_linears(self.device):
            return self.model(input_ids=input_ids, use_cache=False, return_dict=True, **options)

    def _check_layers(self, layers: Iterable[int]) -> None:
        for layer in layers:
            if not 0 <= layer < self.n_layers:
                raise InputError(
                    f"Layer {layer} is out of range: {self.name} has {self.n_layers} layers, "
                    f"0 to {self.n_layers - 1}."
                )

    def _checked(self, input_ids: Int[Tensor, "batch context"]) -> Int[Tensor, "batch context"]:
        """The ids on the model's device, if it can read them.

        They are looked at where they come from: ids that lie on the CPU cost no wait for a GPU.
        """
        if input_ids.numel() == 0:
            raise InputError(f"There are no tokens in a batch of shape {list(input_ids.shape)}.")
        limit = self.context_length
        if limit is not None and input_ids.shape[1] > limit:
            raise InputError(
                f"A context of {input_ids.shape[1]} tokens is longer than {self.name} can read: "
                f"set tokens.context_length to {limit} or less."
            )
        smallest, largest = (int(i) for i in input_ids.aminmax())
        if smallest < 0 or largest >= self.vocab_size:
            raise InputError(
                f"Token id {smallest if smallest < 0 else largest} is not in the vocabulary of "
                f"{self.name} (0 to {self.vocab_size - 1}): were the tokens made by another "
                "model's tokenizer?"
            )
        return input_ids.to(self.device, non_blocking=True)

    def _skippable_outputs(self, layer: int) -> list[BlockOutput] | None:
        """What the blocks 0 to `layer` return, without tensors; None if they cannot be skipped."""
        if layer not in self._skippable:
            with _unhooked(self.blocks):
                outputs, fault = self._try_skipping(layer)
            if fault is not None:
                _log.info("%s runs whole for a splice after layer %d: %s", self.name, layer, fault)
            self._skippable[layer] = outputs if fault is None else None
        return self._skippable[layer]

    @torch.no_grad()
    def _try_skipping(self, layer: int) -> tuple[list[BlockOutput], str | None]:
        """What the blocks 0 to `layer` return, and why they cannot be skipped, if they cannot.

        The stream to go on from is another text's: neither what a block left behind nor what only
        the skipped blocks know can pass for what they would have computed.
        """
        one = torch.arange(8).view(2, 4) + self.vocab_size // 2  # special tokens lie at the ends
        other = self._checked((one + 8) % self.vocab_size)
        one = self._checked(one % self.vocab_size)
        outputs: list[BlockOutput] = []
        streams: list[Tensor] = []

        def record(_module: nn.Module, _args: tuple[Any, ...], output: BlockOutput) -> None:
            several = isinstance(output, tuple | list)
            outputs.append((None,) * len(output) if several else None)
            streams.append(stream_of(output).clone())

        with self._hooked(dict.fromkeys(range(layer + 1), record)):
            self._forward(other)
        with self.splice({layer: lambda _: streams[layer].clone()}):
            try:
                with _skipped(self.blocks, outputs):
                    resumed = self.logits(one)
            except Exception as error:  # any that a model raises where it misses something
                return outputs, f"{type(error).__name__}: {error}"
            exact = torch.equal(resumed, self.logits(one))
        return outputs, None if exact else "later blocks take more than the residual stream"

    @contextmanager
    def _hooked(self, hooks: Mapping[int, Hook]) -> Iterator[None]:
        handles = [self.blocks[layer].register_forward_hook(hook) for layer, hook in hooks.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


_CHUNK = 1024  # tokens whose cross-entropies are computed together

# What a config says of its file, and not of the model.
_INCIDENTAL = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


class _StopForward(BaseException):
    """Leaves a forward from inside a block's hook: nothing after that block is computed.

    An exception needs no knowledge of the model's own loop over its blocks, its norm and its head,
    and all that a forward sets up is taken down by its `finally` clauses. It carries a visitor's
    exception out, and is no `Exception`, so that no handler inside a model can mistake either for
    its own.
    """

    cause: BaseException | None = None


@contextmanager
def _skipped(blocks: Iterable[nn.Module], outputs: Sequence[BlockOutput]) -> Iterator[None]:
    """While the context is open, the first blocks only pass on the residual stream that they take,
    in the form of their `outputs`. Their hooks run.
    """
    skipped = list(zip(blocks, outputs, strict=False))
    own = [vars(block).get("forward") for block, _ in skipped]
    try:
        for block, output in skipped:
            block.forward = _passing_on(output)
        yield
    finally:
        for (block, _), forward in zip(skipped, own, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:
                block.forward = forward


def _passing_on(output: BlockOutput) -> Callable[..., BlockOutput]:
    def forward(*args: Any, **kwargs: Any) -> BlockOutput:
        taken = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        return with_stream(output, taken)

    return forward


@contextmanager
def _unhooked(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """While the context is open, the hooks that are on the blocks now do not run."""
    hooks = [(block, block._forward_hooks) for block in blocks]
    try:
        for block, _ in hooks:
            block._forward_hooks = OrderedDict()
        yield
    finally:
        for block, own in hooks:
            block._forward_hooks = own


def _kind(x: object) -> str:
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}"
    return f"{x.dtype} {list(x.shape)} on {x.device}"


def _essential(config: Any) -> Any:
    """A config without its incidental keys, at every depth."""
    if isinstance(config, Mapping):
        return {str(k): _essential(v) for k, v in config.items() if k not in _INCIDENTAL}
    return config


def _check_tokenizer(host: HostModel) -> None:
    """Refuse a tokenizer whose text tokens the model cannot embed.

    It may know fewer tokens than the model (embeddings are padded), and special tokens beyond them,
    as the text-only Gemma 3's tokenizer knows one for images.
    """
    if host.tokenizer is None:
        return
    text_ids = set(host.tokenizer.get_vocab().values()) - set(_special_added_ids(host.tokenizer))
    if text_ids and max(text_ids) >= host.vocab_size:
        raise InputError(
            f"The tokenizer of {host.name} is another model's: it gives token ids up to "
            f"{max(text_ids)}, and the model embeds {host.vocab_size} tokens. Put the model's own "
            "tokenizer beside its weights."
        )


def _special_added_ids(tokenizer: PreTrainedTokenizer) -> list[int]:
    return [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
