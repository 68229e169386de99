"""How much of the host model survives when a layer is replaced by its reconstruction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from groupsae.errors import InputError
from groupsae.evaluation.subject import Subject
from groupsae.host.model import HostModel
from groupsae.host.tokens import TokenStream
from groupsae.progress import progress
from groupsae.sae import SAE, Latents
from groupsae.sae.kernels.inference import encode

DEFINITIONS = {
    "ce_loss_score": "(ce_zero - ce_spliced) / (ce_zero - ce_clean)",
    "ce_clean": "mean next-token cross-entropy of the untouched host model, nats",
    "ce_spliced": "the same with the layer's residual stream replaced by its reconstruction",
    "ce_zero": "the same with the layer's residual stream replaced by zeros",
    "kl": "mean KL divergence from the clean to the spliced next-token distribution, nats",
    "r2": "1 - sum ||x - x_hat||^2 / sum ||x - mean x||^2 over all tokens (1 - FVU)",
    "explained_variance": "mean over tokens of 1 - ||x - x_hat||^2 / ||x - mean x||^2, the mean x "
    "taken over each forward's tokens; as the published tables have it",
    "l2": "mean over tokens of ||x - x_hat||",
    "mse": "mean over tokens and dimensions of (x - x_hat)^2",
    "cosine": "mean over tokens of cos(x, x_hat)",
    "l0": "mean number of active latents per token",
    "dead": "share of latents that are active on none of this layer's tokens",
    "dead_in_group": "share of latents that are active at none of the group's layers",
    "latent_density": "histogram over latents of log10 of the share of tokens on which one is "
    "active; `silent` counts the latents that never are",
    "tokens": "positions that were replaced and counted. Special tokens are neither replaced nor "
    "counted where tokens.exclude_special holds",
    "predictions": "next-token predictions that cross-entropy and KL are averaged over: those made "
    "at counted positions, of which the last of a context makes none",
}

DENSITY_EDGES = tuple(-6 + 0.25 * i for i in range(25))


@torch.no_grad()
def evaluate_reconstruction(
    host: HostModel,
    stream: TokenStream,
    subjects: Sequence[Subject],
    *,
    tokens: int,
    batch_contexts: int,
    special: Iterable[int] = (),
) -> dict[str, Any]:
    """Splice every SAE in at every one of its member layers, one at a time.

    Cross-entropies as in Group-SAE (arXiv 2410.21508 v2, section 4.1). All subjects see the same
    tokens. One forward of the host gives a batch's residual streams; a splice goes on from there
    and computes only the blocks above it. An SAE that several subjects share is judged once.

    Args:
        tokens: Tokens to read; rounded up to whole contexts.
        batch_contexts: Contexts in one forward. Their residual streams at all member layers and
            twice their logits are in memory at a time.
        special: Token ids whose positions are neither replaced nor counted.

    Returns:
        The content of `evaluation/reconstruction.json`: "definitions", "tokens", "predictions",
        "excluded_special_tokens" and "rows", one row per subject and member layer, in the order of
        the subjects.

    Raises:
        InputError: If no prediction is made at a counted position.
        EndOfText: If the text is used up.
    """
    judged_at: dict[int, dict[SAE, None]] = {}
    for subject in subjects:
        for layer, sae in subject.saes.items():
            judged_at.setdefault(layer, {})[sae] = None
    layers = {layer: _Layer(judged_at[layer]) for layer in sorted(judged_at)}
    clean = _Mean()
    counted = excluded = 0

    with progress("evaluate", tokens) as bar:
        for input_ids, mask in stream.batches(tokens, batch_contexts, special):
            counted += int(mask.sum())
            excluded += int((~mask).sum())
            input_ids, mask = input_ids.to(host.device), mask.to(host.device)
            clean_logits, streams = _clean_forward(host, input_ids, list(layers))
            clean.add(_cross_entropy(clean_logits, input_ids, mask))
            for layer, judged in layers.items():
                x, replaced = streams.pop(layer), mask.unsqueeze(-1)
                logits = host.logits_from(layer, x.masked_fill(replaced, 0), input_ids)
                judged.zero.add(_cross_entropy(logits, input_ids, mask))
                for tally, x_hat in judged.reconstructions(layer, x[mask]):
                    logits = host.logits_from(layer, x.masked_scatter(replaced, x_hat), input_ids)
                    tally.cross_entropy.add(_cross_entropy(logits, input_ids, mask))
                    tally.kl.add(_kl(clean_logits, logits, mask))
            bar.advance(input_ids.numel())

    if clean.count == 0:
        raise InputError(
            f"tokens.context_length={stream.context_length}: of {counted + excluded:,} held-out "
            "tokens none but special ones has a next token to predict; make contexts longer"
        )
    if not math.isfinite(clean.value):
        raise InputError(
            f"{host.name} gives NaN or infinite cross-entropies on held-out text; try "
            "host.dtype=float32, and check the model's weights"
        )
    rows = [
        _row(subject, layer, layers, clean.value) for subject in subjects for layer in subject.saes
    ]
    return {
        "definitions": DEFINITIONS,
        "tokens": counted,
        "predictions": clean.count,
        "excluded_special_tokens": excluded,
        "rows": rows,
    }


def _row(
    subject: Subject, layer: int, layers: Mapping[int, _Layer], ce_clean: float
) -> dict[str, Any]:
    sae = subject.saes[layer]
    judged, tally = layers[layer], layers[layer].tallies[sae]
    of_group = [
        layers[member].tallies[sae] for member in subject.saes if subject.saes[member] is sae
    ]
    never_fired = torch.stack([tally.counts for tally in of_group]).sum(0) == 0
    ce = {"clean": ce_clean, "spliced": tally.cross_entropy.value, "zero": judged.zero.value}
    return {
        "partition": subject.partition,
        "groups_total": subject.groups_total,
        "group": list(sae.layers),
        "layer": layer,
        "ce_loss_score": (ce["zero"] - ce["spliced"]) / (ce["zero"] - ce["clean"]),
        **{f"ce_{name}": value for name, value in ce.items()},
        "kl": tally.kl.value,
        **tally.summary(judged.variance),
        "dead_in_group": float(never_fired.double().mean()),
    }


class _Mean:
    """A mean over tokens, in float64."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, values: Float[Tensor, " token"]) -> None:
        self.total += float(values.double().sum())
        self.count += values.numel()

    @property
    def value(self) -> float:
        return self.total / self.count


class _Layer:
    """Everything that is counted at one layer, streamed in float64."""

    def __init__(self, saes: Iterable[SAE]) -> None:
        self.zero = _Mean()
        self.tallies = {sae: _Tally(sae) for sae in saes}
        self.tokens = 0
        self.squares = 0.0
        self.sum = torch.zeros((), dtype=torch.float64)

    def reconstructions(
        self, layer: int, x: Float[Tensor, "token d_model"]
    ) -> Iterator[tuple[_Tally, Float[Tensor, "token d_model"]]]:
        """Count the tokens x for every SAE; yields each one's tally and x_hat, in x's dtype."""
        exact = x.double()
        about_mean = (exact - exact.mean(0)).square().sum(1)
        self.tokens += len(x)
        self.squares += float(exact.square().sum())
        self.sum = self.sum + exact.sum(0)
        for sae, tally in self.tallies.items():
            latents = encode(sae, x, layer)
            x_hat = sae.decode(latents, layer)
            tally.add(exact, about_mean, x_hat.double(), latents)
            yield tally, x_hat.to(x.dtype)

    @property
    def variance(self) -> float:
        """Sum over tokens of ||x - mean x||^2."""
        return self.squares - float(self.sum.square().sum()) / self.tokens


class _Tally:
    """Everything that is counted about one SAE at one layer, streamed in float64."""

    def __init__(self, sae: SAE) -> None:
        self.cross_entropy, self.kl = _Mean(), _Mean()
        self.explained_variance, self.l2, self.cosine, self.l0 = (_Mean() for _ in range(4))
        self.d_model = sae.config.d_model
        self.error = 0.0
        self.counts = torch.zeros(sae.config.d_sae, dtype=torch.long, device=sae.W_enc.device)

    def add(
        self,
        x: Float[Tensor, "token d_model"],
        about_mean: Float[Tensor, " token"],
        x_hat: Float[Tensor, "token d_model"],
        latents: Latents,
    ) -> None:
        error = (x - x_hat).square().sum(1)
        self.error += float(error.sum())
        self.explained_variance.add(1 - error / about_mean)
        self.l2.add(error.sqrt())
        self.cosine.add(torch.cosine_similarity(x, x_hat, dim=1))
        self.l0.add(latents.l0())
        active = latents.indices[latents.values > 0]
        self.counts += torch.bincount(active, minlength=len(self.counts))

    def summary(self, variance: float) -> dict[str, Any]:
        tokens = self.l2.count
        density = self.counts.double() / tokens
        histogram, _ = torch.histogram(
            density[density > 0].log10().cpu(), torch.tensor(DENSITY_EDGES, dtype=torch.float64)
        )
        return {
            "r2": 1 - self.error / variance,
            "explained_variance": self.explained_variance.value,
            "l2": self.l2.value,
            "mse": self.error / tokens / self.d_model,
            "cosine": self.cosine.value,
            "l0": self.l0.value,
            "dead": float((self.counts == 0).double().mean()),
            "latent_density": {
                "edges": list(DENSITY_EDGES),
                "counts": histogram.long().tolist(),
                "silent": int((self.counts == 0).sum()),
            },
        }


def _clean_forward(
    host: HostModel, input_ids: Int[Tensor, "batch context"], layers: Sequence[int]
) -> tuple[Float[Tensor, "batch context vocab"], dict[int, Tensor]]:
    """The logits of the untouched host, and its residual streams after `layers`."""
    streams: dict[int, Tensor] = {}

    def keeping(layer: int) -> Callable[[Tensor], Tensor]:
        def keep(x: Float[Tensor, "batch context d_model"]) -> Tensor:
            streams[layer] = x.clone()  # a later block may change its input in place
            return x

        return keep

    with host.splice({layer: keeping(layer) for layer in layers}):
        return host.logits(input_ids), streams


def _cross_entropy(
    logits: Float[Tensor, "batch context vocab"],
    input_ids: Int[Tensor, "batch context"],
    mask: Bool[Tensor, "batch context"],
) -> Float[Tensor, " token"]:
    """Of the predictions made at the positions in `mask`, context by context."""
    counted = mask[:, :-1]
    return torch.cat(
        [
            torch.nn.functional.cross_entropy(
                logits[i, :-1][counted[i]].float(), input_ids[i, 1:][counted[i]], reduction="none"
            )
            for i in range(len(logits))
        ]
    )


def _kl(
    clean: Float[Tensor, "batch context vocab"],
    spliced: Float[Tensor, "batch context vocab"],
    mask: Bool[Tensor, "batch context"],
) -> Float[Tensor, " token"]:
    """KL(clean || spliced) of the predictions at the positions in `mask`, context by context."""
    divergences = []
    for i in range(len(clean)):
        p = clean[i, :-1][mask[i, :-1]].float().log_softmax(-1)
        q = spliced[i, :-1][mask[i, :-1]].float().log_softmax(-1)
        divergences.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(divergences)
