"""SAEs on a user's own model: latents recorded, reconstructions spliced in, streams steered."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from groupsae.errors import InputError
from groupsae.evaluation.subject import Subject
from groupsae.host.blocks import BlockOutput, PreTrainedModel, stream_of, with_stream
from groupsae.host.model import HostModel
from groupsae.host.tokens import special_mask
from groupsae.sae import SAE, Latents
from groupsae.sae.layer import LayerSAE

Stream: TypeAlias = Float[Tensor, "batch context d_model"]
Ids: TypeAlias = Int[Tensor, "batch context"]
Where: TypeAlias = Callable[[Ids], Bool[Tensor, "batch context"]]


@contextmanager
def attached(
    host: HostModel,
    saes: Mapping[int, SAE],
    model: PreTrainedModel | None = None,
    *,
    layers: Sequence[int] | None = None,
    special: Collection[int] = (),
    where: Where | None = None,
) -> Iterator[Attached]:
    """Attach SAEs to a model for as long as the context is open.

        with attached(run.host, saes, model, layers=[3, 4]) as sae:
            sae.clamp(3, latent=1024, value=8.0)
            model.generate(**inputs)

    What is asked of the yielded :class:`Attached` happens in every forward of the model, those of
    `generate` included: with its cache of keys and values, any batch and padding, any dtype.
    Nothing is recorded or changed before it is asked. When the context is left, by an exception
    too, the model is as before. Contexts nest: an inner one sees the streams that an outer one has
    changed. Gradients are recorded wherever the caller records them.

    Positions of special tokens, padding among them, are left alone: nothing is changed there, and
    no latent is active. (SAEs are not trained on them, and models lean on the first token's
    stream.) A forward that is given embeddings in place of token ids has no such positions.

    Args:
        host: The model that the SAEs were trained on.
        saes: The SAE of each layer.
        model: A model of transformers of the same kind, whatever its weights; by default the
            host's own.
        layers: Where to attach; by default all layers of `saes`.
        special: Token ids whose positions are left alone.
        where: Given a forward's token ids, which positions to treat, instead of all but the special
            ones. While `generate` decodes, a forward holds the newest token alone.

    Raises:
        InputError: The model is of another kind or size than the host, or there is no SAE for a
            layer.
    """
    model = host.model if model is None else model
    blocks = _blocks(host, model)
    chosen = list(saes) if layers is None else list(layers)
    for layer in chosen:
        if layer not in saes:
            raise InputError(
                f"layers: there is no SAE for layer {layer}; there are for "
                f"{', '.join(map(str, saes))}"
            )
    if where is None and special:
        where = _all_but(special)
    own = Attached({layer: saes[layer].at(layer) for layer in chosen}, where)
    handles = [model.base_model.register_forward_pre_hook(own._look_at_ids, with_kwargs=True)]
    try:
        for layer in chosen:
            handles.append(blocks[layer].register_forward_hook(own._hook(layer)))
        yield own
    finally:
        for handle in handles:
            handle.remove()


class Attached:
    """What the SAEs of some layers are to do in a model's forwards. Comes from :func:`attached`.

    Values of latents are in the latents' own unit, that of `encode` and of what is recorded, the
    same at every layer of a group. At each layer the order is: encode, record, set latents, splice.

    Attributes:
        latents: What was recorded of each layer: one entry per forward, each of
            `[batch, context, ...]`, before this layer's latents were set. With its cache,
            `generate` makes one entry for the prompt and one for every token after it.
    """

    def __init__(self, saes: Mapping[int, LayerSAE], where: Where | None) -> None:
        self._where = where
        self._mask: Tensor | None = None
        self._at = {layer: _Layer(sae) for layer, sae in saes.items()}
        self._copies: dict[tuple[SAE, torch.device], SAE] = {}
        self.latents: dict[int, list[Latents] | list[Tensor]] = {}

    @property
    def layers(self) -> tuple[int, ...]:
        """Where SAEs are attached."""
        return tuple(self._at)

    def record(self, layers: Sequence[int] | None = None, *, dense: bool = False) -> None:
        """Keep the latents of every forward from now on, in `latents`; earlier ones are dropped.

        Args:
            layers: By default all.
            dense: All d_sae latents as one tensor, instead of the active ones as `Latents`.
        """
        for layer in self.layers if layers is None else layers:
            self._of(layer).dense = dense
            self._of(layer).recorded = self.latents[layer] = []

    def splice(self, layers: Sequence[int] | None = None, *, keep_error: bool = False) -> None:
        """Replace residual streams by their reconstructions.

        Args:
            layers: By default all.
            keep_error: Add what the SAE leaves out, x - x_hat, as a constant: the stream's value is
                then x, and its gradient goes through the latents alone.
        """
        for layer in self.layers if layers is None else layers:
            self._of(layer).spliced = "with error" if keep_error else "alone"

    def add(self, layer: int, latent: int, value: float) -> None:
        """Raise a latent by `value`: add `value` times its direction to the stream.

        Its direction is the decoder's row in the layer's raw units; further calls add up. What the
        SAE leaves out of the stream stays in it, unless the layer is spliced.
        """
        keep, offset = self._edit(layer, latent, value)
        self._of(layer).set(latent, keep, offset + value)

    def clamp(self, layer: int, latent: int, value: float) -> None:
        """Set a latent to `value` at every position, whatever it was.

        The rest of the stream stays, what the SAE leaves out of it included, unless the layer is
        spliced.
        """
        self._edit(layer, latent, value)
        self._of(layer).set(latent, 0.0, value)

    def ablate(self, layer: int, latents: int | Sequence[int]) -> None:
        """Set latents to zero, as :meth:`clamp` does."""
        for latent in [latents] if isinstance(latents, int) else latents:
            self.clamp(layer, latent, 0.0)

    def reset(self) -> None:
        """Stop recording and changing anything, as when it was attached; drop what was recorded."""
        self._at = {layer: _Layer(at.sae) for layer, at in self._at.items()}
        self.latents = {}

    def _of(self, layer: int) -> _Layer:
        if layer not in self._at:
            raise InputError(
                f"layer {layer}: no SAE is attached there; they are at "
                f"{', '.join(map(str, self.layers))}"
            )
        return self._at[layer]

    def _edit(self, layer: int, latent: int, value: float) -> tuple[float, float]:
        """What is done to a latent so far; refuses one that is not there."""
        at = self._of(layer)
        d_sae = at.sae.sae.config.d_sae
        if not 0 <= latent < d_sae:
            raise InputError(
                f"latent {latent}: the SAE of layer {layer} has the latents 0 to {d_sae - 1}"
            )
        if not math.isfinite(value):
            raise InputError(f"latent {latent}: the value {value} must be a finite number")
        return at.edits.get(latent, (1.0, 0.0))

    def _look_at_ids(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Note which positions the coming forward is to treat."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._mask = None if self._where is None or ids is None else self._where(ids)

    def _hook(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...], Any], BlockOutput | None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: BlockOutput) -> BlockOutput:
            at, x = self._at[layer], stream_of(output)
            if not at.has_work:
                return None
            at.sae = self._on(at.sae, x.device)
            mask = self._mask
            if mask is not None:
                if mask.shape != x.shape[:-1]:
                    raise InputError(
                        f"where: it gave a mask of shape {list(mask.shape)} for token ids of shape "
                        f"{list(x.shape[:-1])}; give one of the same shape"
                    )
                mask = mask.to(x.device).unsqueeze(-1)
            with torch.autocast(x.device.type, enabled=False):
                changed = at.treat(x, mask)
            if changed is None:
                return None
            if mask is not None:
                changed = torch.where(mask, changed, x)
            return with_stream(output, changed)

        return hook

    def _on(self, sae: LayerSAE, device: torch.device) -> LayerSAE:
        """The SAE on the device of the streams; one copy where that is another than its own."""
        shared = sae.sae
        if shared.W_dec.device == device:
            return sae
        if (shared, device) not in self._copies:
            self._copies[shared, device] = deepcopy(shared).to(device)
        return self._copies[shared, device].at(sae.layer)


@dataclass
class _Layer:
    """What is to be done at one layer.

    Attributes:
        edits: By latent, (keep, offset): it becomes keep * latent + offset.
    """

    sae: LayerSAE
    recorded: list[Any] | None = None
    dense: bool = False
    spliced: str | None = None
    edits: dict[int, tuple[float, float]] = field(default_factory=dict)
    _tensors: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def has_work(self) -> bool:
        return self.recorded is not None or self.spliced is not None or bool(self.edits)

    def set(self, latent: int, keep: float, offset: float) -> None:
        self.edits[latent] = (keep, offset)
        self._tensors = None

    def treat(self, x: Stream, mask: Bool[Tensor, "batch context 1"] | None) -> Stream | None:
        """Record, and give the stream that takes the place of x, if any does."""
        latents = self._encoded(x, mask)
        if self.recorded is not None and latents is not None:
            d_sae = self.sae.sae.config.d_sae
            self.recorded.append(latents.dense(d_sae) if self.dense else latents)
        if self.spliced is None and not self.edits:
            return None
        stream = x.to(self.sae.sae.W_dec.dtype)
        if self.spliced is not None:
            assert latents is not None
            x_hat = self.sae.decode(latents)
            if self.spliced == "with error":  # x to the last bit, which x_hat + (x - x_hat) is not
                stream = stream.detach() + (x_hat - x_hat.detach())
            else:
                stream = x_hat
        if self.edits:
            stream = stream + self._change(latents)
        return stream.to(x.dtype)

    def _encoded(self, x: Stream, mask: Bool[Tensor, "batch context 1"] | None) -> Latents | None:
        """The latents of x, none active where it is left alone; None where they are not needed."""
        only_adds = all(keep == 1 for keep, _ in self.edits.values())
        if self.recorded is None and self.spliced is None and only_adds:
            return None
        latents = self.sae.encode(x)
        if mask is None:
            return latents
        return Latents(latents.values.masked_fill(~mask, 0), latents.indices)

    def _change(self, latents: Latents | None) -> Float[Tensor, "*batch_context d_model"]:
        """What setting the latents adds to the stream."""
        weight = self.sae.sae.W_dec
        if self._tensors is None or self._tensors[0].device != weight.device:
            keep, offset = zip(*self.edits.values(), strict=True)
            self._tensors = (
                torch.tensor(list(self.edits), device=weight.device),
                torch.tensor(keep, device=weight.device, dtype=weight.dtype),
                torch.tensor(offset, device=weight.device, dtype=weight.dtype),
            )
        edited, keeps, change = self._tensors
        if latents is not None:
            now = latents.dense(len(weight))[..., edited]
            change = now * (keeps - 1) + change
        return change @ self.sae.directions(edited)


def named(subjects: Sequence[Subject], partition: str) -> Subject:
    """The SAEs of a partition: "groups", the chosen one, "baseline", or "G=4" of several.

    Raises:
        InputError: If there is none of that name.
    """
    found = {subject.name: subject for subject in subjects}
    if partition == "groups":
        return next(subject for subject in subjects if subject.partition == "groups")
    if partition not in found:
        raise InputError(f"partition={partition!r}: there are SAEs of groups, {', '.join(found)}")
    return found[partition]


def _blocks(host: HostModel, model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a model that is built as the host is.

    Raises:
        InputError: If it is not.
    """
    of_host = host.model.config.get_text_config(decoder=True)
    wanted = (
        f"give a model as {host.name} is: {type(host.model).__name__} of {host.n_layers} blocks "
        f"and d_model = {host.d_model}"
    )
    if not isinstance(model, nn.Module) or not hasattr(model, "base_model"):
        raise InputError(f"model is a {type(model).__name__}, no model of transformers; {wanted}")
    if hasattr(model, "_orig_mod"):
        raise InputError(
            "model is compiled, and its compiled forward would run without the SAEs; attach to the "
            "model that was given to torch.compile"
        )
    try:
        blocks = model.get_submodule(host.block_path)
    except AttributeError:
        raise InputError(
            f"model is a {type(model).__name__}, which has no {host.block_path}; {wanted}"
        ) from None
    assert isinstance(blocks, nn.ModuleList)
    config: Any = model.config
    width = config.get_text_config(decoder=True).hidden_size
    if len(blocks) != host.n_layers or width != of_host.hidden_size:
        raise InputError(
            f"model is a {type(model).__name__} of {len(blocks)} blocks and d_model = {width}; "
            f"{wanted}"
        )
    return blocks


def _all_but(special: Collection[int]) -> Where:
    return lambda ids: ~special_mask(ids, special)
