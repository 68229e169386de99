"""Indirect effects: how much of a task's metric goes through each latent.

The SAE of every hooked layer l is spliced in with a pass-through: the stream stays x, written as
x_hat(f) + error with error = x - x_hat, and gradients flow through both terms. A latent's effect is
what the metric m changes by when that latent alone takes the value that it has in the patched
prompt (:data:`METHODS`):

- exact: m(x_clean | do(f = f_patch)) - m(x_clean), one forward per latent;
- attribution (attribution patching): (f_patch - f_clean) dm/df at the clean prompt;
- integrated_gradients: the same with the mean of dm/df on the way from clean to patch.

Group-SAE (arXiv 2410.21508 v2, section 4.2) after Marks et al. 2024 (arXiv 2403.19647). The error
term has an effect, too, by the same rule.

Why it is cheap. The spliced stream is x itself, so that dx_out/dx = I and dx_out/df is the
decoder's row: dm/df = W_dec (h_l * dm/dx^l) / s_l, with dm/dx^l the gradient in the *unspliced*
host (h_l: the learned output gain, where there is one). One backward of the host therefore serves
all layers and all subjects (the baseline and every G) at once. Only latents that are active in the
clean or in the patched prompt have f_patch != f_clean, so that the rest is sparse. And because the
decoder is affine, a path that interpolates the latents and the error of layer l interpolates the
stream: integrated gradients are those of the host above layer l, and are shared as well.

What holds. attribution: latents and error sum to dm/dx^l . (x_patch - x_clean).
integrated_gradients: they sum to m(patched stream at layer l) - m(clean), up to the discretisation
(completeness: Sundararajan et al. 2017, arXiv 1703.01365).

What it means. Exact effects, and attribution as their first order, are what one latent does alone
at the clean prompt. Integrated gradients share out what all latents of a layer do together, so that
they rank latents otherwise where these act on one another; where m is quadratic in the stream they
are the mean of the exact effects seen from the clean and from the patched prompt.

Beside the published code (its repository ghidav/group-sae, folder downstream): there the backward
of the pass-through gives the output's gradient to x and, by way of x_hat, through the encoder to x
once more, which counts the stream twice at every spliced layer; ours is the exact derivative of the
spliced identity. There the path has the 11 points 0, 0.1, ..., 1, divided by 10, and drops the
error; ours has the midpoints of 10 steps, whose weights sum to 1 and whose discretisation error
falls with the square of the steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Float64, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from groupsae.errors import InputError
from groupsae.evaluation.tasks import Pairs
from groupsae.files import replacing, save_tensors
from groupsae.host.model import HostModel
from groupsae.host.tokens import special_mask
from groupsae.progress import progress
from groupsae.sae import SAE, Latents
from groupsae.sae.kernels.inference import encode

METHODS = ("attribution", "integrated_gradients", "exact")

Metric: TypeAlias = Callable[
    [Float[Tensor, "example vocab"], Pairs],
    Float[Tensor, " example"],
]


def logit_difference(
    logits: Float[Tensor, "example vocab"], pairs: Pairs
) -> Float[Tensor, " example"]:
    """logit(a_patch) - logit(a_clean): the metric of effects."""
    answers = torch.stack([pairs.a_patch, pairs.a_clean], 1).to(logits.device)
    patch, clean = logits.gather(1, answers).unbind(1)
    return patch - clean


@dataclass(frozen=True)
class Effects:
    """The indirect effects of one subject's latents on one task.

    Attributes:
        method: One of :data:`METHODS`.
        examples: How many prompt pairs the means are over.
        latents: By layer: each latent's effect, signed, summed over positions, mean over examples.
        error: By layer: the same of the error term x - x_hat.
        by_position: By number of tokens and layer: the effects at each position, mean over the
            examples of that length. Only where it was asked for.
    """

    method: str
    examples: int
    latents: Mapping[int, Float64[Tensor, " d_sae"]]
    error: Mapping[int, float]
    by_position: Mapping[int, Mapping[int, Float64[Tensor, "context _"]]] | None = None

    def importance(self, layer: int) -> Float64[Tensor, " d_sae"]:
        """By how much latents of a layer matter: the absolute value of their effects."""
        return self.latents[layer].abs()

    def save(self, path: Path | str) -> None:
        """Write everything into one safetensors file.

        Raises:
            InputError: If it cannot be written.
        """
        tensors = {f"latents.{layer}": values for layer, values in self.latents.items()}
        for context, layers in (self.by_position or {}).items():
            tensors |= {f"positions.{context}.{layer}": v for layer, v in layers.items()}
        described = {
            "method": self.method,
            "examples": self.examples,
            "layers": list(self.latents),
            "error": list(self.error.values()),
            "lengths": None if self.by_position is None else list(self.by_position),
        }
        with replacing(Path(path)) as aside:
            save_tensors(tensors, aside, metadata={_METADATA: json.dumps(described)})

    @classmethod
    def load(cls, path: Path | str) -> Effects:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: If the file is missing, damaged or of another kind.
        """
        try:
            with safe_open(path, "pt") as file:
                stored = json.loads(file.metadata()[_METADATA])
                layers = stored["layers"]
                lengths = stored["lengths"]
                return cls(
                    method=stored["method"],
                    examples=stored["examples"],
                    latents={layer: file.get_tensor(f"latents.{layer}") for layer in layers},
                    error=dict(zip(layers, stored["error"], strict=True)),
                    by_position=None
                    if lengths is None
                    else {
                        context: {
                            layer: file.get_tensor(f"positions.{context}.{layer}")
                            for layer in layers
                        }
                        for context in lengths
                    },
                )
        except FileNotFoundError as error:
            raise InputError(f"{path}: there is no such file of effects") from error
        except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(
                f"{path} holds no readable effects: {error}; the file is damaged, or of another "
                "program: delete it and compute the effects again"
            ) from error


def effects(
    host: HostModel,
    pairs: Sequence[Pairs],
    subjects: Mapping[str, Mapping[int, SAE]],
    *,
    method: str,
    metric: Metric = logit_difference,
    steps: int = 10,
    batch_tokens: int = 4096,
    by_position: bool = False,
    special: Collection[int] = (),
) -> dict[str, Effects]:
    """The indirect effect of every latent of every subject, on the same prompt pairs.

    Subjects may share SAEs: one that several have at a layer is encoded and counted once.

    A position is spliced from the first token on in which the two prompts differ (before it their
    streams are equal: the host is causal), except where either prompt has a special token.

    Args:
        pairs: The examples, those of one length together.
        subjects: By name: layer -> the SAE spliced in there.
        method: One of :data:`METHODS`.
        metric: Of the logits at the last position, in float32 (float64 for a float64 host); one
            number per example, which depends on that example alone.
        steps: Points of integrated_gradients.
        batch_tokens: Tokens of one forward or backward of the host, and of one product of an
            encoder: it bounds the memory. One example is the least.
        by_position: Also keep the effects at each position.
        special: Token ids at which nothing is spliced in, as the SAEs were not trained on them.

    Returns:
        The effects by the subjects' names.

    Raises:
        InputError: An unknown method; no examples; an SAE that does not fit the host or its layer;
            a metric that is not one number per example or, but for "exact", has no gradient; a host
            that carries no gradients, or whose gradients are not finite.
    """
    _check(host, pairs, subjects, method, steps, batch_tokens)
    tallies: dict[int, dict[SAE, _Tally]] = {}
    for saes in subjects.values():
        for layer, sae in saes.items():
            tallies.setdefault(layer, {})[sae] = _Tally(sae, layer, by_position)
    layers = sorted(tallies)
    total = sum(len(part) for part in pairs)

    work = f"effects, {method}", total * len(layers), "layers of examples"
    with progress(*work) as bar, torch.no_grad():
        for batch in _batches(host, pairs, metric, special, batch_tokens):
            patch = host.residual_streams(batch.pairs.patch, layers)
            if method == "attribution":
                clean, gradients = batch.gradients_at_clean(layers)
            else:
                clean, gradients = host.residual_streams(batch.pairs.clean, layers), {}
            for layer in layers:
                x, x_patch = clean[layer], patch[layer]
                if method == "integrated_gradients":
                    gradients = {layer: batch.mean_gradient(layer, x, x_patch, steps)}
                for tally in tallies[layer].values():
                    if method == "exact":
                        tally.add_exact(batch, x, x_patch, batch_tokens)
                    else:
                        tally.add_linear(batch, x, x_patch, gradients[layer])
                bar.advance(len(batch.pairs))

    lengths: dict[int, int] = {}
    for part in pairs:
        if len(part):
            lengths[part.clean.shape[1]] = lengths.get(part.clean.shape[1], 0) + len(part)
    results = {}
    for name, saes in subjects.items():
        of = {layer: tallies[layer][saes[layer]] for layer in sorted(saes)}
        results[name] = Effects(
            method=method,
            examples=total,
            latents={layer: tally.latents() / total for layer, tally in of.items()},
            error={layer: float(tally.error) / total for layer, tally in of.items()},
            by_position={
                context: {layer: tally.sums[context].cpu() / n for layer, tally in of.items()}
                for context, n in sorted(lengths.items())
            }
            if by_position
            else None,
        )
    return results


class _Batch:
    """Prompt pairs of one length that go through the host together."""

    def __init__(
        self, host: HostModel, pairs: Pairs, metric: Metric, special: Collection[int]
    ) -> None:
        self.host, self.pairs, self.metric = host, pairs, metric
        differ = (pairs.clean != pairs.patch).cumsum(1) > 0
        left_out = special_mask(pairs.clean, special) | special_mask(pairs.patch, special)
        self.spliced: Bool[Tensor, "example context"] = (differ & ~left_out).to(host.device)

    @torch.enable_grad()
    def gradients_at_clean(self, layers: Sequence[int]) -> tuple[dict[int, Tensor], ...]:
        """x^l and dm/dx^l at the clean prompts: one forward and one backward for all layers."""
        streams: dict[int, Tensor] = {}

        def keeping(layer: int) -> Callable[[Tensor], Tensor]:
            def keep(x: Float[Tensor, "example context d_model"]) -> Tensor:
                streams[layer] = x if x.requires_grad else x.detach().requires_grad_()
                return streams[layer].clone()  # a later block may change its input in place

            return keep

        with self.host.splice({layer: keeping(layer) for layer in layers}):
            logits = self.host.logits(self.pairs.clean, last=True)
        gradients = self._gradients(logits, streams)
        return {layer: x.detach() for layer, x in streams.items()}, gradients

    @torch.enable_grad()
    def mean_gradient(
        self,
        layer: int,
        clean: Float[Tensor, "example context d_model"],
        patch: Float[Tensor, "example context d_model"],
        steps: int,
    ) -> Float[Tensor, "example context d_model"]:
        """dm/dx^l averaged over the way from clean to patch, where it is spliced in."""
        change = (patch - clean) * self.spliced.unsqueeze(-1)
        total = torch.zeros_like(clean, dtype=torch.promote_types(clean.dtype, torch.float32))
        for step in range(steps):
            x = (clean + (step + 0.5) / steps * change).requires_grad_()
            logits = self.host.logits_from(layer, x.clone(), self.pairs.clean, last=True)
            total += self._gradients(logits, {layer: x})[layer]
        return total / steps

    def metric_from(
        self,
        layer: int,
        x: Float[Tensor, "row context d_model"],
        rows: Int[Tensor, " row"],
    ) -> Float64[Tensor, " row"]:
        """m with x as the stream after `layer`; row i goes on from example rows[i]."""
        pairs = self.pairs.at(rows.tolist())
        m = self._metric_of(self.host.logits_from(layer, x, pairs.clean, last=True), pairs).double()
        if not bool(m.isfinite().all()):
            raise InputError(
                f"{self.host.name}: the metric is NaN or infinite after a change at layer {layer}; "
                "try host.dtype=float32, and check the model's weights and the metric"
            )
        return m

    def _metric_of(
        self, logits: Float[Tensor, "row context vocab"], pairs: Pairs
    ) -> Float[Tensor, " row"]:
        last = logits[:, -1]
        m = self.metric(last.to(torch.promote_types(last.dtype, torch.float32)), pairs)
        if m.shape != (len(pairs),) or not m.is_floating_point():
            raise InputError(
                f"metric: it gave {m.dtype} of shape {list(m.shape)} for {len(pairs)} examples; it "
                "must give one floating-point number per example"
            )
        return m

    def _gradients(
        self, logits: Float[Tensor, "example context vocab"], streams: dict[int, Tensor]
    ) -> dict[int, Tensor]:
        """dm/dx of the streams that the logits come from."""
        m = self._metric_of(logits, self.pairs)
        if logits.requires_grad and not m.requires_grad:
            raise InputError(
                "metric: it has no gradient by the logits; give one that can be differentiated, or "
                "take the exact effects (method='exact')"
            )
        found: Sequence[Tensor | None] = [None] * len(streams)
        reason = "no gradient reaches the residual streams"
        if m.requires_grad:
            try:
                found = torch.autograd.grad(m.sum(), list(streams.values()), allow_unused=True)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError) or "memory" in str(error):
                    raise
                reason = str(error)
        gradients = {}
        for (layer, x), gradient in zip(streams.items(), found, strict=True):
            if gradient is None:
                raise InputError(
                    f"{self.host.name} in {x.dtype} carries no gradient to layer {layer}: "
                    f"{reason}. Load it unquantised, with host.dtype=float32, or take the exact "
                    "effects (method='exact')"
                )
            if not bool(gradient.isfinite().all()):
                raise InputError(
                    f"{self.host.name} in {x.dtype}: the metric's gradient at layer {layer} holds "
                    "NaN or infinity; try host.dtype=float32, and check the model's weights and "
                    "the metric"
                )
            gradients[layer] = gradient
        return gradients


class _Tally:
    """Sums over examples of the effects of one SAE's latents at one layer, in float64.

    `sums` is by number of tokens, with one row per position or, without `by_position`, one in all.
    """

    def __init__(self, sae: SAE, layer: int, by_position: bool) -> None:
        self.sae, self.layer, self.by_position = sae, layer, by_position
        self.d_sae = sae.config.d_sae
        self.sums: dict[int, Float64[Tensor, "row d_sae"]] = {}
        self.error = torch.zeros((), dtype=torch.float64, device=sae.W_enc.device)

    def latents(self) -> Float64[Tensor, " d_sae"]:
        return torch.stack([sums.sum(0) for sums in self.sums.values()]).sum(0).cpu()

    def add_linear(
        self,
        batch: _Batch,
        clean: Float[Tensor, "example context d_model"],
        patch: Float[Tensor, "example context d_model"],
        gradient: Float[Tensor, "example context d_model"],
    ) -> None:
        """Add gradient times difference. The decoder's own backward gives the gradient by latents,
        at the active ones only.
        """
        sums = self._sums_of(batch)
        _, position = batch.spliced.nonzero(as_tuple=True)
        if not len(position):
            return
        gradient = gradient[batch.spliced]
        error = torch.zeros_like(gradient, dtype=torch.float64)
        for sign, stream in ((-1, clean), (1, patch)):
            x = stream[batch.spliced]
            latents = encode(self.sae, x, self.layer)
            with torch.enable_grad():
                values = latents.values.requires_grad_()
                x_hat = self.sae.decode(Latents(values, latents.indices), self.layer)
                (slopes,) = torch.autograd.grad(x_hat, values, gradient.to(x_hat.dtype))
            effect = sign * values.detach().double() * slopes.double()
            self._add(sums, effect, latents.indices, position.unsqueeze(1).expand_as(effect))
            error += sign * (x.double() - x_hat.detach().double())
        self.error += (error * gradient.double()).sum()

    def add_exact(
        self,
        batch: _Batch,
        clean: Float[Tensor, "example context d_model"],
        patch: Float[Tensor, "example context d_model"],
        batch_tokens: int,
    ) -> None:
        """Add the metric's change by each intervention: a latent of an example takes its patched
        values, at all positions or (by_position) at one.
        """
        sums = self._sums_of(batch)
        example, position = batch.spliced.nonzero(as_tuple=True)
        if not len(position):
            return
        everyone = torch.arange(len(clean), device=clean.device)
        m_clean = batch.metric_from(self.layer, clean, everyone)
        before, after = (encode(self.sae, x[batch.spliced], self.layer) for x in (clean, patch))

        x_hat, x_hat_patch = (self.sae.decode(z, self.layer) for z in (before, after))
        error = patch[batch.spliced] - clean[batch.spliced] - (x_hat_patch - x_hat)
        x = clean.clone()
        x[batch.spliced] = (x[batch.spliced] + error).to(x.dtype)
        self.error += (batch.metric_from(self.layer, x, everyone) - m_clean).sum()

        token, latent, change = _changed(before, after, self.d_sae)
        example, position = example[token], position[token]
        row = position if self.by_position else torch.zeros_like(position)
        keys = (example * len(sums) + row) * self.d_sae + latent
        interventions, owner = torch.unique(keys, return_inverse=True)
        owner, order = owner.sort()
        size = max(1, batch_tokens // clean.shape[1])
        for start in range(0, len(interventions), size):
            own = interventions[start : start + size]
            rows = own // self.d_sae // len(sums)
            bounds = torch.tensor([start, start + size], device=owner.device)
            chunk = slice(*torch.searchsorted(owner, bounds).tolist())
            part = order[chunk]
            at = owner[chunk] - start, position[part]
            x = clean[rows]
            x[at] = (x[at] + self._decoded(change[part], latent[part])).to(x.dtype)
            effect = batch.metric_from(self.layer, x, rows) - m_clean[rows]
            self._add(sums, effect, own % self.d_sae, own // self.d_sae % len(sums))

    def _decoded(
        self, change: Float[Tensor, " change"], latent: Int[Tensor, " change"]
    ) -> Float[Tensor, "change d_model"]:
        """What x_hat changes by where one latent does: the decoder without its constants."""
        latents = Latents(change.unsqueeze(1), latent.unsqueeze(1))
        none = Latents(change.new_zeros(1, 1), latent.new_zeros(1, 1))
        return self.sae.decode(latents, self.layer) - self.sae.decode(none, self.layer)

    def _sums_of(self, batch: _Batch) -> Float64[Tensor, "row d_sae"]:
        context = batch.pairs.clean.shape[1]
        if context not in self.sums:
            rows = context if self.by_position else 1
            self.sums[context] = self.error.new_zeros(rows, self.d_sae)
        return self.sums[context]

    def _add(
        self,
        sums: Float64[Tensor, "row d_sae"],
        effect: Float64[Tensor, "*effect"],
        latent: Int[Tensor, "*effect"],
        position: Int[Tensor, "*effect"],
    ) -> None:
        cell = latent + position * self.d_sae if self.by_position else latent
        sums.view(-1).index_add_(0, cell.flatten(), effect.flatten())


def _changed(
    before: Latents, after: Latents, d_sae: int
) -> tuple[Int[Tensor, " change"], Int[Tensor, " change"], Float[Tensor, " change"]]:
    """Where latents differ: token, latent and f_patch - f_clean."""
    token = torch.arange(len(before.values), device=before.indices.device).unsqueeze(1)
    keys = torch.cat([(token * d_sae + z.indices).flatten() for z in (before, after)])
    cells, which = torch.unique(keys, return_inverse=True)
    values = torch.cat([-before.values.flatten(), after.values.flatten()])
    change = values.new_zeros(len(cells)).index_add_(0, which, values)
    cells, change = cells[change != 0], change[change != 0]
    return cells // d_sae, cells % d_sae, change


def _batches(
    host: HostModel,
    pairs: Sequence[Pairs],
    metric: Metric,
    special: Collection[int],
    batch_tokens: int,
) -> Iterator[_Batch]:
    for part in pairs:
        size = max(1, batch_tokens // max(part.clean.shape[1], 1))
        for start in range(0, len(part), size):
            yield _Batch(host, part.part(start, min(start + size, len(part))), metric, special)


def _check(
    host: HostModel,
    pairs: Sequence[Pairs],
    subjects: Mapping[str, Mapping[int, SAE]],
    method: str,
    steps: int,
    batch_tokens: int,
) -> None:
    if method not in METHODS:
        raise InputError(f"method: {method!r} is unknown; choose one of {', '.join(METHODS)}")
    for name, value in (("steps", steps), ("batch_tokens", batch_tokens)):
        if value < 1:
            raise InputError(f"{name}: {value} must be at least 1")
    if not any(len(part) for part in pairs):
        raise InputError("pairs: there is no example; effects are a mean over at least one")
    for name, saes in subjects.items():
        for layer, sae in saes.items():
            if not 0 <= layer < host.n_layers or layer not in sae.layers:
                raise InputError(
                    f"subjects: {name!r} has an SAE of layers {', '.join(map(str, sae.layers))} at "
                    f"layer {layer} of {host.name}, which has layers 0 to {host.n_layers - 1}; "
                    "give each layer an SAE of which it is a member"
                )
            if sae.config.d_model != host.d_model:
                raise InputError(
                    f"subjects: {name!r} has an SAE of d_model = {sae.config.d_model} at layer "
                    f"{layer}, and {host.name} has d_model = {host.d_model}; give SAEs of this host"
                )


_METADATA = "groupsae.effects"
