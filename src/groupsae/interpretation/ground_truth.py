"""Which known attributes of the text do latents capture? A score without people or another model.

Every word of the bundled English carries the truth about itself
(:mod:`groupsae.host.bundled.labels`). For each attribute the best latent of each SAE and layer is
found on one half of the text and judged on the other. SAEs of random weights are the floor, a
linear probe on the residual stream is the ceiling.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int
from scipy.sparse import csr_array
from torch import Tensor

from groupsae.errors import InputError
from groupsae.evaluation.circuits import untrained
from groupsae.evaluation.subject import Subject
from groupsae.host.bundled import english, labels
from groupsae.host.documents import BUNDLED, BUNDLED_SEED, Position
from groupsae.host.model import HostModel
from groupsae.host.tokens import TokenStream, special_mask
from groupsae.interpretation.detection import Activations, Detectors, best_detectors
from groupsae.progress import progress
from groupsae.sae import SAE
from groupsae.sae.kernels.inference import encode

CAPTURED = 0.9  # AUROC above which an attribute counts as captured

DEFINITIONS = {
    "attribute": "what is true of a token's word, or false, known from the generator of the text; "
    "in attributes: what it says, and of how many tokens of each half it is true",
    "source": "trained: latents of the partition's SAEs. untrained: latents of SAEs of the same "
    "shape, scale and mean with random weights, as sparse as the trained ones. probe: the residual "
    "stream's own best direction, by logistic regression, one per attribute",
    "latent": "the latent of the largest AUROC on the first half of the contexts; null for a probe",
    "auroc": "on the second half of the contexts: the probability that a token with the attribute "
    "has a larger activation of that latent than one without; equal ones count half. 0.5 is "
    "chance, 1 is perfect",
    "f1": "on the second half of the contexts: F1 of f1_latent being at least at threshold, which "
    "are those of the largest F1 on the first half",
    "threshold": "in the units of the normalised residual stream; a probability for a probe",
    "coverage": f"share of the attributes whose AUROC is above {CAPTURED}",
    "probe": "logistic regression on the residual stream, each dimension standardised: mean "
    "cross-entropy + |w|^2 / (2 tokens), fitted on the first half",
    "tokens": "tokens of both halves together that belong to a word; special ones never do",
}


@torch.no_grad()
def ground_truth(
    host: HostModel,
    stream: TokenStream,
    subjects: Sequence[Subject],
    *,
    tokens: int,
    batch_contexts: int = 32,
    special: Collection[int] = (),
    fewest: int = 20,
    controls: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Score every subject's latents against the known attributes of the text.

    The residual streams of all layers are in memory together. An SAE that several subjects share is
    judged once: let them share the object.

    Args:
        stream: Of the bundled English; held-out text, as a rule.
        tokens: Tokens to read; rounded up to whole contexts.
        batch_contexts: Contexts in one forward of the host.
        special: Token ids to leave out.
        fewest: Of how many tokens of each half an attribute must be true, and of how many false.
        controls: Whether untrained SAEs are scored too.
        seed: Of their weights.

    Returns:
        Fit for JSON: "definitions", "tokens", "attributes", "rows" (one per source, partition, G,
        layer and attribute), "coverage" (one per source, partition, G and layer, with the means of
        AUROC and F1) and "means" (of these over the layers).

    Raises:
        InputError: Text whose attributes are not known, no subject, no attribute that is frequent
            enough, residual streams that are not finite.
        EndOfText: If the text is used up.
    """
    layers = sorted({layer for subject in subjects for layer in subject.saes})
    _check(stream, layers, tokens)
    text = _read(stream, tokens, special)
    kept = _frequent(text, fewest)
    names = [labels.LABELS[i] for i in kept]
    truth = text.labels[:, kept]
    streams = _streams(host, text, layers, batch_contexts)

    judged = [("trained", subject) for subject in subjects]
    if controls:
        judged += [
            ("untrained", untrained(host, [text.contexts], subject, seed=seed, special=special))
            for subject in subjects
        ]
    rows: list[dict[str, Any]] = []
    known: dict[tuple[SAE, int], Detectors] = {}
    steps = len(layers) + sum(len(subject.saes) for _, subject in judged)
    with progress("ground truth", steps, "layers") as bar:
        for source, subject in judged:
            about = {
                "source": source,
                "partition": subject.partition,
                "groups_total": subject.groups_total,
            }
            for layer, sae in sorted(subject.saes.items()):
                if (sae, layer) not in known:
                    activations = _activations(sae, streams[layer], layer)
                    known[sae, layer] = best_detectors(truth, activations, text.first_half)
                rows += _rows({**about, "layer": layer}, names, known[sae, layer])
                bar.advance(1)
        for layer in layers:
            about = {"source": "probe", "partition": None, "groups_total": None, "layer": layer}
            found = _probe(streams[layer], truth, text.first_half)
            rows += _rows(about, names, found, of_latents=False)
            bar.advance(1)
    coverage = _coverage(rows, ("source", "partition", "groups_total", "layer"))
    return {
        "definitions": DEFINITIONS,
        "tokens": len(truth),
        "attributes": [
            {
                "attribute": name,
                "definition": labels.DEFINITIONS[name],
                "positives": [int(own[half].sum()) for half in (text.first_half, ~text.first_half)],
            }
            for name, own in zip(names, truth.T, strict=True)
        ],
        "rows": rows,
        "coverage": coverage,
        "means": _coverage(rows, ("source", "partition", "groups_total")),
    }


@dataclass(frozen=True, eq=False)
class _Text:
    """Contexts, and the truth about those of their tokens that belong to words."""

    contexts: Int[Tensor, "contexts context"]
    counted: Bool[Tensor, "contexts context"]
    labels: Bool[np.ndarray, "token label"]

    @property
    def first_half(self) -> Bool[np.ndarray, " token"]:
        """Whether a token lies in the first half of the contexts."""
        context = self.counted.nonzero()[:, 0].numpy()
        return np.asarray(context < len(self.contexts) // 2)


def _read(stream: TokenStream, tokens: int, special: Collection[int]) -> _Text:
    """The next contexts. Joints and special tokens apart, they are the documents' tokens in order.

    The truth comes from the generator, which is asked for the same documents again.
    """
    start = stream.state_dict()
    contexts = stream.next_contexts(-(-tokens // stream.context_length))
    outside = {id_ for id_ in stream.corpus.joints if id_ is not None} | set(special)
    counted = ~special_mask(contexts, outside)
    expected = contexts[counted].numpy()
    documents = _labelled(stream, start)
    ids, truth = [np.zeros(0, np.int64)], [np.zeros((0, len(labels.LABELS)), bool)]
    while sum(map(len, ids)) < len(expected):
        own_ids, own_truth = next(documents)
        inside = ~np.isin(own_ids, sorted(outside))
        ids.append(own_ids[inside])
        truth.append(own_truth[inside])
    assert np.array_equal(np.concatenate(ids)[: len(expected)], expected)
    return _Text(contexts, counted, np.concatenate(truth)[: len(expected)])


def _labelled(
    stream: TokenStream, start: Mapping[str, Any]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids and labels of the stream's documents, from one of its states on."""
    corpus, tokenizer, skip = stream.corpus, stream.corpus.tokenizer, start["offset"]
    assert tokenizer is not None
    for found_document in stream.documents_from(Position(*start["position"])):
        number = found_document.position.document
        document = english.document(number, seed=BUNDLED_SEED + corpus.seed)
        found = tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True)
        truth = labels.token_labels(document, found["offset_mapping"])
        used = max(skip - (corpus.joints.bos is not None), 0)
        yield np.array(found["input_ids"], np.int64)[used:], truth[used:]
        skip = 0


def _streams(
    host: HostModel, text: _Text, layers: Sequence[int], batch_contexts: int
) -> dict[int, Float[Tensor, "token d_model"]]:
    rows: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    batches = zip(
        *(torch.split(own, batch_contexts) for own in (text.contexts, text.counted)), strict=True
    )
    for contexts, counted in batches:
        for layer, x in host.residual_streams(contexts, layers).items():
            rows[layer].append(x[counted.to(x.device)])
    streams = {layer: torch.cat(parts) for layer, parts in rows.items()}
    for layer, x in streams.items():
        if not bool(x.isfinite().all()):
            raise InputError(
                f"the residual streams of layer {layer} hold NaN or infinity, which nothing can be "
                "told from; try host.dtype=float32, and check the model's weights"
            )
    return streams


_CHUNK_NUMBERS = 2**26  # pre-activations, [token d_sae], computed at a time


def _activations(sae: SAE, x: Float[Tensor, "token d_model"], layer: int) -> Activations:
    values, latents, counts = [], [], [np.zeros(1, np.int64)]
    for part in torch.split(x, max(_CHUNK_NUMBERS // sae.config.d_sae, 1)):
        found = encode(sae, part, layer)
        active = found.values > 0
        values.append(found.values[active].double().cpu().numpy())
        latents.append(found.indices[active].cpu().numpy())
        counts.append(active.sum(-1).cpu().numpy())
    bounds = np.concatenate(counts).cumsum()
    return csr_array(
        (np.concatenate(values), np.concatenate(latents), bounds), shape=(len(x), sae.config.d_sae)
    )


def _probe(
    x: Float[Tensor, "token d_model"],
    truth: Bool[np.ndarray, "token attribute"],
    fitted_on: Bool[np.ndarray, " token"],
) -> Detectors:
    """Every attribute's probability by :func:`_logistic_regression`, judged as a latent is."""
    x = x.double().cpu()
    own = x[torch.from_numpy(fitted_on)]
    spread = own.std(0)
    x = (x - own.mean(0)) / torch.where(spread > 0, spread, 1.0)
    weights = _logistic_regression(x[torch.from_numpy(fitted_on)].numpy(), truth[fitted_on])
    probability = torch.sigmoid(F.pad(x, (0, 1), value=1.0) @ torch.from_numpy(weights)).numpy()
    found = [
        best_detectors(truth[:, [i]], csr_array(probability[:, [i]]), fitted_on)
        for i in range(truth.shape[1])
    ]
    return Detectors(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


@torch.enable_grad()
def _logistic_regression(
    x: Float64[np.ndarray, "token d_model"], truth: Bool[np.ndarray, "token attribute"]
) -> Float64[np.ndarray, "d_model+1 attribute"]:
    """Weights of every attribute, the bias last: the least of cross-entropy + |w|^2 / (2 tokens).

    That is scikit-learn's LogisticRegression with C = 1.
    """
    inputs = F.pad(torch.from_numpy(x), (0, 1), value=1.0)
    targets = torch.from_numpy(truth).double()
    weights = inputs.new_zeros(inputs.shape[1], targets.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=100, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        entropy = F.binary_cross_entropy_with_logits(inputs @ weights, targets, reduction="none")
        total = entropy.mean(0).sum() + weights[:-1].square().sum() / (2 * len(x))
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    found: np.ndarray = weights.detach().numpy()
    return found


def _rows(
    about: Mapping[str, Any], names: Sequence[str], found: Detectors, *, of_latents: bool = True
) -> list[dict[str, Any]]:
    return [
        {
            **about,
            "attribute": name,
            "auroc": float(auroc),
            "latent": int(latent) if of_latents else None,
            "f1": float(f1),
            "f1_latent": int(f1_latent) if of_latents else None,
            "threshold": float(threshold) if np.isfinite(threshold) else None,
        }
        for name, auroc, latent, f1, f1_latent, threshold in zip(names, *found, strict=True)
    ]


def _coverage(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Coverage and mean scores of the rows that agree in `keys`, in their order."""
    alike: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        alike.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        {
            **dict(zip(keys, about, strict=True)),
            "coverage": float(np.mean([row["auroc"] > CAPTURED for row in own])),
            "auroc": float(np.mean([row["auroc"] for row in own])),
            "f1": float(np.mean([row["f1"] for row in own])),
        }
        for about, own in alike.items()
    ]


def _frequent(text: _Text, fewest: int) -> list[int]:
    """The labels that are true of enough tokens, and false of enough, in both halves."""
    sides = [text.labels[half] for half in (text.first_half, ~text.first_half)]
    rarest = np.min([side.sum(0) for side in sides] + [(~side).sum(0) for side in sides], axis=0)
    kept = np.flatnonzero(rarest >= max(fewest, 1)).tolist()
    if not kept:
        raise InputError(
            f"tokens={len(text.labels)}: no attribute is true of {fewest} tokens in both halves of "
            "the text; ask for more tokens, or for fewer of each attribute"
        )
    return kept


def _check(stream: TokenStream, layers: Sequence[int], tokens: int) -> None:
    if stream.corpus.source != BUNDLED:
        raise InputError(
            f"tokens.source={stream.corpus.source!r}: the attributes of its words are not known; "
            f"only tokens.source={BUNDLED} can be scored against ground truth"
        )
    if not layers:
        raise InputError("there is no SAE whose latents could be scored; train the run first")
    if tokens < 1:
        raise InputError(f"tokens={tokens}: ground truth needs at least one token")
