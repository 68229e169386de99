"""Do a few latents carry what the host model computes? Faithfulness and completeness of circuits.

All hooked layers are spliced at once. A latent of the circuit has the value that the current stream
gives it, at every position; every other latent has its mean over a task's other half, at the same
position of prompts of the same length. Source: Group-SAE (arXiv 2410.21508 v2, section 4.2), after
Marks et al. 2024 (arXiv 2403.19647).
"""

from __future__ import annotations

import math
from collections.abc import (
    Callable,
    Collection,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from groupsae.errors import InputError
from groupsae.evaluation.attribution import Effects
from groupsae.evaluation.subject import Subject
from groupsae.evaluation.tasks import Pairs, Task
from groupsae.host.model import HostModel
from groupsae.host.tokens import special_mask
from groupsae.progress import Progress, progress
from groupsae.sae import SAE, Latents
from groupsae.sae.kernels.inference import encode
from groupsae.sae.sparsity import batch_cut

DEFINITIONS = {
    "m": "logit(a_clean) - logit(a_patch) at the last position of x_clean, mean over the scoring "
    "half of a task's examples",
    "m_model": "m(M): m of the untouched host model",
    "m_circuit": "m(C): m with every hooked layer spliced at once. Latents of the circuit C have "
    "the value that the current stream gives them, at every position; the others have their mean "
    "over the clean prompts of the task's other half, at the same position of prompts of the same "
    "length, in the untouched model. Special tokens keep their streams",
    "m_empty": "m(empty): m with no latent in the circuit, all at their mean; with error nodes or "
    "without, as its curve",
    "faithfulness": "(m(C) - m(empty)) / (m(M) - m(empty)), C = the n most important latents of "
    "each layer: 1 where they suffice, 0 where they do no more than their means",
    "completeness": "the same ratio with C = all latents but the n most important: what is left "
    "without them. 0 where they are all that matters, 1 where they do not matter: lower is better",
    "importance": "absolute value of a latent's indirect effect, summed over positions, averaged "
    "over the examples of the other half",
    "n": "latents chosen per layer. per_layer: the n most important of every layer. global: the "
    "n * layers most important of all layers together, so that layers compete; n is the mean",
    "error_nodes": "false, as published: a spliced layer is the decoded latents alone. true: the "
    "current stream's x - decode(encode(x)) is added to it in every circuit, the empty one too, so "
    "that with all latents alive m(C) = m(M) exactly",
    "area": "area under the curve by the trapezoid rule, divided by the range of n: the mean score "
    "over the curve. 1 is perfect for faithfulness, 0 for completeness",
    "n_at_75": "faithfulness: the smallest n, between the points by linear interpolation, at which "
    "0.75 is reached; null where it never is, and for completeness",
    "accuracy": "share of the scoring half's examples with m > 0; 0.5 is chance",
    "random": "latents chosen at random, uniformly, in place of the most important",
    "untrained": "the most important latents of SAEs of the same shape, scale and mean with random "
    "weights, as sparse as the trained ones and of the size that reconstructs best",
}

SHARES = {"faithfulness": 0.2, "completeness": 0.05}  # of d_sae, at the end of a curve
SELECTIONS = ("per_layer", "global")

_SMALL = 0.1  # of m(M): what m(M) - m(empty) must be at least for a ratio to mean something
_ERRORS = 2  # standard errors that a difference must exceed to be one
_FITTING_TOKENS = 256


@dataclass(frozen=True)
class Ranking:
    """Which latents of a partition's SAEs matter most.

    Attributes:
        subject: The SAEs, all of them spliced in.
        method: What gave the importance, as in :class:`Effects`.
        latents: "ranked" by their effects; "random"; or those of "untrained" SAEs, ranked.
        importance: Layer to the importance of each latent of its SAE, on the CPU.
    """

    subject: Subject
    method: str
    latents: str
    importance: Mapping[int, Float[Tensor, " d_sae"]]

    def __post_init__(self) -> None:
        """Refuse importances of other SAEs."""
        expected = {layer: sae.config.d_sae for layer, sae in sorted(self.subject.saes.items())}
        found = {layer: len(self.importance[layer]) for layer in sorted(self.importance)}
        if not expected or found != expected:
            raise InputError(
                f"the effects are of layers and latents {found}, but the SAEs of "
                f"{self.subject.name} have {expected}; take effects computed with these SAEs"
            )

    @classmethod
    def by_effects(cls, subject: Subject, effects: Effects, latents: str = "ranked") -> Ranking:
        """By the absolute values of indirect effects."""
        importance = {layer: effects.importance(layer) for layer in effects.latents}
        return cls(subject, effects.method, latents, importance)


@dataclass(frozen=True)
class Curve:
    """One score against the size of the circuit; for the words see `DEFINITIONS`.

    Attributes:
        value: None where m(M) = m(empty), so that there is no ratio; nor an `area`.
        flag: Why the ratio means little, with the numbers; None where nothing is wrong.
    """

    partition: str
    groups_total: int
    method: str
    latents: str
    selection: str
    error_nodes: bool
    score: str
    n: tuple[int, ...]
    value: tuple[float | None, ...]
    m_circuit: tuple[float, ...]
    m_model: float
    m_empty: float
    area: float | None
    n_at_75: float | None
    flag: str | None

    def to_json(self) -> dict[str, Any]:
        """As it stands in `evaluation/circuits/<task>.json`."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


@torch.no_grad()
def evaluate_circuits(
    host: HostModel,
    means_half: Task,
    scores_half: Task,
    rankings: Sequence[Ranking],
    m_model: Float[Tensor, " example"],
    *,
    selections: Sequence[str] = SELECTIONS,
    error_nodes: Sequence[bool] = (False, True),
    points: int = 16,
    batch_tokens: int = 4096,
    special: Collection[int] = (),
) -> list[Curve]:
    """Faithfulness and completeness of every ranking against the size of the circuit.

    All are judged on the same examples. A point of a curve costs one forward over the scoring half,
    with the SAE of every layer, of the blocks above the lowest spliced layer: the streams up to
    there and that layer's latents are the same for all circuits of the same SAEs.

    Args:
        means_half: The examples that the mean latents are taken from.
        m_model: m of the untouched host model for every example of `scores_half`, as
            :func:`answer_margins` gives it.
        batch_tokens: Tokens of a forward. Their logits and their pre-activations of one layer are
            in memory at a time.
        special: Token ids whose positions are not replaced.

    Returns:
        The curves, in the order of rankings, selections, error nodes, and faithfulness before
        completeness.

    Raises:
        InputError: A length of prompts is in the scoring half alone; the SAEs have too few latents
            for a curve; a spliced model gives NaN or infinite logits.
    """
    _check_lengths(means_half, scores_half)
    plans = [
        plan for ranking in rankings for plan in _plans(ranking, selections, error_nodes, points)
    ]
    by_saes: dict[Hashable, list[_Plan]] = {}
    for plan in plans:
        by_saes.setdefault(frozenset(plan.saes.items()), []).append(plan)
    forwards = sum(len(plan.circuits) for plan in plans) + len(by_saes) * len(error_nodes)
    curves: dict[_Plan, Curve] = {}
    with progress("circuits", forwards * len(scores_half), "examples") as bar:
        for those in by_saes.values():
            saes = those[0].saes
            means = mean_latents(
                host, means_half.lengths, saes, batch_tokens=batch_tokens, special=special
            )
            empty = {with_errors: _empty(saes, with_errors) for with_errors in error_nodes}
            circuits = [*empty.values(), *(c for plan in those for c in plan.circuits)]
            parts = [
                _circuit_margins(host, batch, saes, means, circuits, special, bar)
                for pairs in scores_half.lengths
                for batch in _batches(pairs, batch_tokens)
            ]
            m = dict(zip(circuits, torch.cat(parts, dim=1), strict=True))
            _check_finite(host, m.values())
            for plan in those:
                m_circuit = torch.stack([m[circuit] for circuit in plan.circuits])
                curves[plan] = _curve(plan, m_circuit, m_model, m[empty[plan.error_nodes]])
    return [curves[plan] for plan in plans]


@torch.no_grad()
def answer_margins(
    host: HostModel, task: Task, *, batch_tokens: int = 4096
) -> Float[Tensor, " example"]:
    """m of each example, length by length: logit(a_clean) - logit(a_patch) after x_clean; float64.

    Raises:
        InputError: The host model gives NaN or infinite logits.
    """
    margins = torch.cat(
        [
            _margin(host.logits(batch.clean, last=True), batch)
            for pairs in task.lengths
            for batch in _batches(pairs, batch_tokens)
        ]
    )
    _check_finite(host, [margins])
    return margins


def accuracy(m: Float[Tensor, " example"]) -> float:
    """Share of examples with m > 0."""
    return float((m > 0).double().mean())


def check_task(name: str, m_model: Float[Tensor, " example"]) -> str | None:
    """Why no curve is to be drawn: the host model cannot do the task. None where it can.

    Args:
        m_model: As :func:`answer_margins` gives it.
    """
    mean, error, right = float(m_model.mean()), _standard_error(m_model), accuracy(m_model)
    if not mean > _ERRORS * error:
        why = "m(M) is not above 0 by two standard errors"
    elif not right > 0.5 + _ERRORS * 0.5 / math.sqrt(len(m_model)):
        why = "that is chance, within two standard errors"
    else:
        return None
    return (
        f"the host model cannot do {name}: on {len(m_model)} examples m(M) = {mean:.3f} with a "
        f"standard error of {error:.3f}, and it prefers the right answer in {right:.1%}; {why}"
    )


@torch.no_grad()
def mean_latents(
    host: HostModel,
    pairs: Sequence[Pairs],
    saes: Mapping[int, SAE],
    *,
    batch_tokens: int = 4096,
    special: Collection[int] = (),
) -> dict[int, dict[int, Float[Tensor, "context d_sae"]]]:
    """Mean latents of the clean prompts, at each position, in the untouched host model.

    Args:
        special: Token ids whose positions do not count; where there are no others the mean is 0.

    Returns:
        By length, then by layer; in the SAE's dtype, on its device.
    """
    means = {}
    for of_length in pairs:
        context = _length(of_length)
        sums = {
            layer: sae.W_enc.new_zeros(context, sae.config.d_sae, dtype=torch.float64)
            for layer, sae in saes.items()
        }
        counts = torch.zeros(context, dtype=torch.int64)
        for batch in _batches(of_length, batch_tokens):
            counted = ~special_mask(batch.clean, special)
            counts += counted.sum(0)
            host.visit(
                batch.clean,
                {layer: _adding(sums[layer], sae, layer, counted) for layer, sae in saes.items()},
            )
        means[context] = {
            layer: (total / counts.clamp_min(1).unsqueeze(1).to(total.device)).to(
                saes[layer].W_enc.dtype
            )
            for layer, total in sums.items()
        }
    return means


def circuit_sizes(
    d_sae: int, points: int = 16, first: int = 4, share: float = 0.2
) -> tuple[int, ...]:
    """How many latents of each layer to choose: evenly from `first` to `share` of d_sae.

    Rounded down, as in the published curves (20% for faithfulness, 5% for completeness). Of a small
    d_sae the curve goes further, so that its points differ, and has fewer at worst.

    Raises:
        InputError: There would be less than two points.
    """
    last = min(max(share * d_sae, first + points - 1), d_sae)
    steps = (first + i * (last - first) / max(points - 1, 1) for i in range(points))
    sizes = tuple(sorted({math.floor(size + 1e-9) for size in steps}))
    if points < 2 or d_sae <= first:
        raise InputError(
            f"a curve of {points} points from {first} latents per layer cannot be drawn for SAEs "
            f"with {d_sae}; take at least 2 points, and SAEs with more latents"
        )
    return sizes


def area(n: Sequence[float], value: Sequence[float]) -> float:
    """Under a curve, by the trapezoid rule, divided by the range of n."""
    pieces = zip(pairwise(n), pairwise(value), strict=True)
    return sum((b - a) * (u + v) / 2 for (a, b), (u, v) in pieces) / (n[-1] - n[0])


def reached(n: Sequence[float], value: Sequence[float], level: float = 0.75) -> float | None:
    """The smallest n at which a curve has reached `level`, by linear interpolation."""
    if not value or max(value) < level:
        return None
    at = next(i for i, v in enumerate(value) if v >= level)
    if at == 0:
        return float(n[0])
    share = (level - value[at - 1]) / (value[at] - value[at - 1])
    return n[at - 1] + share * (n[at] - n[at - 1])


def random_ranking(ranking: Ranking, seed: int) -> Ranking:
    """The same SAEs with importances drawn at random, uniformly over all latents."""
    generator = torch.Generator().manual_seed(seed)
    importance = {
        layer: torch.rand(sae.config.d_sae, generator=generator, dtype=torch.float64)
        for layer, sae in sorted(ranking.subject.saes.items())
    }
    return replace(ranking, latents="random", importance=importance)


@torch.no_grad()
def untrained(
    host: HostModel,
    texts: Iterable[Int[Tensor, "_ _"]],
    subject: Subject,
    *,
    seed: int,
    special: Collection[int] = (),
) -> Subject:
    """The partition with SAEs of random weights in place of the trained ones, as a control.

    Shape, sparsity rule, scale and mean are those of the trained SAEs. On a few hundred tokens each
    has the L0 of its trained twin (by thresholds; topk by k) and weights of the size that
    reconstructs best.

    Args:
        texts: Token ids to fit them to, `[text, context]` for each length; as many as needed.

    Raises:
        InputError: All tokens are special.
    """
    rows: dict[int, list[Tensor]] = {layer: [] for layer in subject.saes}
    tokens = 0
    for text in texts:
        some = text[: math.ceil((_FITTING_TOKENS - tokens) / text.shape[1])]
        counted = ~special_mask(some, special)
        tokens += int(counted.sum())
        for layer, x in host.residual_streams(some, list(rows)).items():
            rows[layer].append(x[counted.to(x.device)])
        if tokens >= _FITTING_TOKENS:
            break
    if not tokens:
        raise InputError("every token of the text is special; give other text to fit SAEs to")
    twins: dict[SAE, SAE] = {}
    for sae in subject.saes.values():
        if sae not in twins:
            own = {layer: torch.cat(rows[layer]) for layer in sae.layers if layer in rows}
            twins[sae] = _untrained(sae, own, seed + len(twins))
    return replace(subject, saes={layer: twins[sae] for layer, sae in subject.saes.items()})


@dataclass(frozen=True, eq=False)
class _Circuit:
    """The latents ranked before `limit`, or all others for a complement; error nodes or none."""

    ranks: Mapping[int, Int[Tensor, " d_sae"]]
    limit: int
    complement: bool
    error_nodes: bool

    def alive(self, layer: int) -> Bool[Tensor, " d_sae"]:
        return (self.ranks[layer] < self.limit) != self.complement


@dataclass(frozen=True, eq=False)
class _Plan:
    """A curve to draw, and its circuits, one for each of `sizes`."""

    ranking: Ranking
    selection: str
    error_nodes: bool
    score: str
    sizes: tuple[int, ...]
    circuits: tuple[_Circuit, ...]

    @property
    def saes(self) -> Mapping[int, SAE]:
        return self.ranking.subject.saes


def _plans(
    ranking: Ranking, selections: Sequence[str], error_nodes: Sequence[bool], points: int
) -> Iterator[_Plan]:
    saes = ranking.subject.saes
    smallest = min(sae.config.d_sae for sae in saes.values())
    for selection in selections:
        ranks = _ranks(ranking.importance, across_layers=selection == "global")
        ranks = {layer: rank.to(saes[layer].W_enc.device) for layer, rank in ranks.items()}
        of_size = len(saes) if selection == "global" else 1
        for with_errors in error_nodes:
            for score, share in SHARES.items():
                sizes = circuit_sizes(smallest, points, share=share)
                complement = score == "completeness"
                circuits = (_Circuit(ranks, n * of_size, complement, with_errors) for n in sizes)
                yield _Plan(ranking, selection, with_errors, score, sizes, tuple(circuits))


def _empty(saes: Mapping[int, SAE], with_errors: bool) -> _Circuit:
    ranks = {layer: torch.zeros_like(sae.b_enc, dtype=torch.int64) for layer, sae in saes.items()}
    return _Circuit(ranks, 0, False, with_errors)


def _ranks(
    importance: Mapping[int, Float[Tensor, " d_sae"]], *, across_layers: bool
) -> dict[int, Int[Tensor, " d_sae"]]:
    """How many latents come before each: of its layer, or of all.

    Equal importances: the lower index first, then the lower layer, so that no layer is preferred.
    """
    layers = sorted(importance)
    if not across_layers:
        return {layer: _places(importance[layer]) for layer in layers}
    sizes = [len(importance[layer]) for layer in layers]
    by_index = torch.cat([torch.arange(size) for size in sizes]).argsort(stable=True)
    places = torch.empty_like(by_index)
    places[by_index] = _places(torch.cat([importance[layer] for layer in layers])[by_index])
    return dict(zip(layers, torch.split(places, sizes), strict=True))


def _places(importance: Float[Tensor, " latent"]) -> Int[Tensor, " latent"]:
    order = importance.argsort(descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))


def _circuit_margins(
    host: HostModel,
    pairs: Pairs,
    saes: Mapping[int, SAE],
    means: Mapping[int, Mapping[int, Float[Tensor, "_ d_sae"]]],
    circuits: Sequence[_Circuit],
    special: Collection[int],
    bar: Progress,
) -> Float[Tensor, "circuit example"]:
    """m of one batch in each circuit; float64."""
    input_ids = pairs.clean.to(host.device)
    replaced = ~special_mask(input_ids, special).unsqueeze(-1)
    mean = means[_length(pairs)]
    splices = {layer: _Splice(sae, layer, mean[layer], replaced) for layer, sae in saes.items()}
    lowest = min(splices)
    below: list[tuple[Tensor, Latents]] = []

    def keep(x: Float[Tensor, "batch context d_model"]) -> None:
        below.append((x.clone(), encode(saes[lowest], x, lowest)))

    host.visit(input_ids, {lowest: keep})
    margins = []
    for circuit in circuits:
        replacements = {layer: splice.replacement(circuit) for layer, splice in splices.items()}
        first = replacements.pop(lowest)
        with host.splice(replacements):
            logits = host.logits_from(lowest, first(*below[0]), input_ids, last=True)
        margins.append(_margin(logits, pairs))
        bar.advance(len(pairs))
    return torch.stack(margins)


class _Splice:
    """An SAE in the place of one layer's stream, for one batch of prompts.

    Decoding is affine: the latents at their mean add the same to every example of a position, and
    need no sum of their own.
    """

    def __init__(
        self,
        sae: SAE,
        layer: int,
        mean: Float[Tensor, "context d_sae"],
        replaced: Bool[Tensor, "batch context 1"],
    ) -> None:
        self.sae, self.layer, self.mean = sae, layer, mean
        self.replaced = replaced
        self.of_none = self._affine(torch.zeros_like(sae.b_dec))

    def replacement(self, circuit: _Circuit) -> Callable[..., Tensor]:
        """A stream x to its replacement; the latents of x may be given beside it."""
        alive = circuit.alive(self.layer)
        constant = self._affine((self.mean * ~alive) @ self.sae.W_dec) - self.of_none
        return partial(self._replace, constant, alive, circuit.error_nodes)

    def _replace(
        self,
        constant: Float[Tensor, "context d_model"],
        alive: Bool[Tensor, " d_sae"],
        error_nodes: bool,
        x: Float[Tensor, "batch context d_model"],
        latents: Latents | None = None,
    ) -> Float[Tensor, "batch context d_model"]:
        z = encode(self.sae, x, self.layer) if latents is None else latents
        if error_nodes:  # decode(z~) + x - decode(z), in which what is alive cancels
            x_new = x - (self.sae.decode(_only(z, ~alive), self.layer) - self.of_none) + constant
        else:
            x_new = self.sae.decode(_only(z, alive), self.layer) + constant
        return torch.where(self.replaced, x_new.to(x.dtype), x)

    def _affine(self, rows: Float[Tensor, "*position d_model"]) -> Tensor:
        """What a sum of decoder rows reconstructs."""
        member = self.sae.layers.index(self.layer)
        return self.sae.denormalize(self.sae.outputs(rows, member), self.layer)


def _only(latents: Latents, kept: Bool[Tensor, " d_sae"]) -> Latents:
    """The others are zero."""
    return Latents(latents.values * kept[latents.indices], latents.indices)


def _curve(
    plan: _Plan,
    m_circuit: Float[Tensor, "point example"],
    m_model: Float[Tensor, " example"],
    m_empty: Float[Tensor, " example"],
) -> Curve:
    m_model = m_model.to(m_empty)
    points = m_circuit.mean(1).tolist()
    top, bottom = float(m_model.mean()), float(m_empty.mean())
    none = top == bottom
    values = [(point - bottom) / (top - bottom) for point in points] if not none else []
    subject = plan.ranking.subject
    return Curve(
        partition=subject.partition,
        groups_total=subject.groups_total,
        method=plan.ranking.method,
        latents=plan.ranking.latents,
        selection=plan.selection,
        error_nodes=plan.error_nodes,
        score=plan.score,
        n=plan.sizes,
        value=(None,) * len(points) if none else tuple(values),
        m_circuit=tuple(points),
        m_model=top,
        m_empty=bottom,
        area=None if none else area(plan.sizes, values),
        n_at_75=reached(plan.sizes, values) if plan.score == "faithfulness" else None,
        flag=_flag(m_model, m_empty),
    )


def _flag(m_model: Float[Tensor, " example"], m_empty: Float[Tensor, " example"]) -> str | None:
    top, bottom = float(m_model.mean()), float(m_empty.mean())
    error = _standard_error(m_model - m_empty)
    if abs(top - bottom) < _SMALL * abs(top):
        why = "less than a tenth of m(M)"
    elif not abs(top - bottom) > _ERRORS * error:
        why = f"within two standard errors ({error:.3g} each)"
    else:
        return None
    return f"m(M) = {top:.3g} and m(empty) = {bottom:.3g} differ by {top - bottom:.3g}: {why}"


def _untrained(sae: SAE, rows: Mapping[int, Float[Tensor, "token d_model"]], seed: int) -> SAE:
    """An SAE like this one, with random weights; fitted to residual streams of its layers."""
    fresh = SAE(
        sae.config,
        mean=sae.mean,
        scale=sae.scale,
        generator=torch.Generator().manual_seed(seed),
    ).to(sae.W_enc)
    x = torch.cat([fresh.normalize(streams, layer) for layer, streams in rows.items()])
    members = torch.cat(
        [torch.full((len(streams),), sae.layers.index(layer)) for layer, streams in rows.items()]
    ).to(x.device)
    l0 = max(round(float(sae.encode_normalized(x, members).l0().mean())), 1)
    pre_activations = torch.relu(fresh.products(x, members))
    cuts = batch_cut(pre_activations, l0, fresh.sharing(members), len(sae.layers))
    _set_thresholds(fresh, cuts)
    x_hat = fresh.decode_normalized(fresh.encode_normalized(x, members), members)
    squares = x_hat.square().sum()
    size = torch.where(squares > 0, (x * x_hat).sum() / squares, 1.0)
    fresh.W_enc.mul_(size)
    _set_thresholds(fresh, cuts * size)
    return fresh


def _set_thresholds(sae: SAE, cuts: Float[Tensor, " cut"]) -> None:
    """What a pre-activation of a new SAE must exceed: everywhere, or in each member layer."""
    match sae.config.architecture:
        case "batchtopk" | "matryoshka":
            sae.threshold.copy_(cuts.expand_as(sae.threshold))
        case "jumprelu":
            sae.log_threshold.copy_(cuts.log().unsqueeze(1).expand_as(sae.log_threshold))
        case "relu":
            sae.b_enc.copy_(-cuts.expand_as(sae.b_enc))
        case "gated":
            sae.b_gate.copy_(-cuts.expand_as(sae.b_gate))


def _adding(
    sums: Float[Tensor, "context d_sae"],
    sae: SAE,
    layer: int,
    counted: Bool[Tensor, "batch context"],
) -> Callable[[Tensor], None]:
    """A visitor that adds the latents of the counted positions to `sums`."""
    context, d_sae = sums.shape
    starts = torch.arange(context, device=sums.device).mul(d_sae).unsqueeze(1)

    def add(x: Float[Tensor, "batch context d_model"]) -> None:
        latents = encode(sae, x, layer)
        values = latents.values * counted.to(x.device).unsqueeze(-1)
        sums.view(-1).index_add_(0, (latents.indices + starts).flatten(), values.flatten().double())

    return add


def _check_lengths(means_half: Task, scores_half: Task) -> None:
    known = [_length(pairs) for pairs in means_half.lengths]
    for pairs in scores_half.lengths:
        if _length(pairs) not in known:
            raise InputError(
                f"{scores_half.name}: {len(pairs)} examples of {_length(pairs)} tokens are to be "
                f"scored, but there are none to take mean latents from (lengths {known}); give "
                "more of them, or leave them out"
            )


def _length(pairs: Pairs) -> int:
    return pairs.clean.shape[1]


def _batches(pairs: Pairs, batch_tokens: int) -> Iterator[Pairs]:
    size = max(batch_tokens // _length(pairs), 1)
    for start in range(0, len(pairs), size):
        yield pairs.part(start, min(start + size, len(pairs)))


def _margin(
    logits: Float[Tensor, "example context vocab"], pairs: Pairs
) -> Float[Tensor, " example"]:
    answers = torch.stack([pairs.a_clean, pairs.a_patch], dim=1).to(logits.device)
    clean, patch = logits[:, -1].gather(1, answers).double().unbind(1)
    return (clean - patch).cpu()


def _standard_error(values: Float[Tensor, " example"]) -> float:
    """Of the mean; infinite for a single value."""
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def _check_finite(host: HostModel, margins: Iterable[Tensor]) -> None:
    if not all(bool(m.isfinite().all()) for m in margins):
        raise InputError(
            f"{host.name} gives NaN or infinite logits on the task's prompts; try "
            "host.dtype=float32, and check the weights of the model and of the SAEs"
        )
