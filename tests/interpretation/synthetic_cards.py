"""Cards without a model behind them: of any number, with any text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from groupsae.interpretation.browser import About
from groupsae.interpretation.cards import Card, Neighbour, Pair, PairStratum, Shown
from groupsae.interpretation.contexts import Context

CONTEXT_LENGTH = 64
SAES = {"layers-00-02": (0, 1, 2), **{f"baseline/layers-0{i}": (i,) for i in range(3)}}


def about(**changed: object) -> About:
    fields: dict[str, object] = {
        "of": "key",
        "host": "tiny/host",
        "tokens": 100_000,
        "special": 12,
        "source": "bundled English",
        "shown": [
            Shown("groups", 1, dict.fromkeys((0, 1, 2), "layers-00-02")),
            Shown("baseline", 3, {i: f"baseline/layers-0{i}" for i in range(3)}),
        ],
        "sae_layers": SAES,
        "definitions": {"density": "share of the tokens on which a latent fires"},
        "pairs": pair_strata(),
        "report_href": "../../report.html",
    }
    return About(**(fields | changed))  # type: ignore[arg-type]


def cards(
    each: int, tokens: Sequence[int], *, vocabulary: int, contexts: int = 10
) -> Iterator[Card]:
    """`each` latents of every SAE, whose numbers are three apart; `tokens` is the text."""
    for sae, layers in SAES.items():
        for i in range(each):
            yield card(sae, 3 * i, layers, tokens, vocabulary, contexts, Random(f"{sae} {i}"))


def card(
    sae: str,
    latent: int,
    layers: tuple[int, ...],
    tokens: Sequence[int],
    vocabulary: int,
    wanted: int,
    random: Random,
) -> Card:
    rates = [random.random() ** 3 / 20 for _ in layers]
    maximum = tuple(random.uniform(1, 9) for _ in layers)

    def contexts(layer: int, count: int, share: float) -> tuple[Context, ...]:
        peaks = [random.randrange(len(tokens)) for _ in range(count)]
        largest = maximum[layers.index(layer)] * share
        return tuple(
            context(tokens, position, layer, largest * (1 - 0.03 * place), random)
            for place, position in enumerate(peaks)
        )

    several = len(layers) > 1
    return Card(
        sae=sae,
        latent=latent,
        layers=layers,
        density=tuple(rates),
        mean=tuple(most / 3 for most in maximum),
        maximum=maximum,
        persistence=tuple(random.randrange(1, 900) for _ in layers),
        centre=sum(r * layer for r, layer in zip(rates, layers, strict=True)) / sum(rates),
        span=_span(rates, layers),
        histogram_edges=tuple(max(maximum) * i / 20 for i in range(21)),
        histogram=tuple(
            tuple(random.randrange(1 + 500 // (i + 1)) for i in range(20)) for _ in layers
        ),
        top=contexts(layers[0], wanted, 1),
        top_by_layer={layer: contexts(layer, wanted, 1) for layer in layers} if several else {},
        deciles=tuple(contexts(layers[0], wanted // 5, (i + 1) / 10) for i in range(10)),
        logits_layer=layers[0],
        largest=tuple((random.randrange(vocabulary), 3 - 0.2 * i) for i in range(10)),
        smallest=tuple((random.randrange(vocabulary), -2 + 0.1 * i) for i in range(10)),
        neighbours=[Neighbour(sae, 3 * i, "cosine", 0.9 - i / 10) for i in range(1, 6)],
        neighbours_by_layer={
            layer: [
                Neighbour(f"baseline/layers-0{layer}", 3 * i + (i == 2), by, 0.8 - i / 10)
                for by in ("cosine", "jaccard")
                for i in range(3)
            ]
            for layer in (layers if several else ())
        },
    )


def context(
    tokens: Sequence[int], position: int, layer: int, activation: float, random: Random
) -> Context:
    begin = position - position % CONTEXT_LENGTH
    start = max(begin, position - 24)
    ids = tuple(tokens[start : min(position + 9, begin + CONTEXT_LENGTH, len(tokens))])
    strengths = [
        activation * random.random() if random.random() < 0.1 else 0.0 for _ in range(len(ids))
    ]
    strengths[position - start] = activation
    return Context(layer, position, activation, position - start, ids, tuple(strengths))


def pair_strata() -> tuple[PairStratum, ...]:
    """At each layer ten parts of three pairs; of some there is no card."""
    return tuple(
        PairStratum(
            layer,
            part / 10,
            (part + 1) / 10,
            7 * part + 3,
            tuple(
                Pair(
                    layer,
                    "layers-00-02",
                    3 * (3 * part + i),
                    f"baseline/layers-0{layer}",
                    3 * (3 * part + i) + (part == 4),
                    (part + 0.5) / 10,
                    part / 20,
                )
                for i in range(3)
            ),
        )
        for layer in range(3)
        for part in range(10)
    )


def _span(rates: Sequence[float], layers: Sequence[int]) -> tuple[int, int]:
    living = [x for x, rate in zip(layers, rates, strict=True) if rate >= 0.1 * max(rates)]
    return living[0], living[-1]
