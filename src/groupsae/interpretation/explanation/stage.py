"""The stage behind `groupsae explain`: draw latents, have them explained, judge that, write scores.

Explanations are made from the strongest windows of one half of the text, and judged on the other
half by detection and fuzzing (Paulo et al. 2024, "Automatically interpreting millions of features
in large language models").
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar
from urllib.parse import urlsplit

from groupsae.config import ExplanationConfig
from groupsae.errors import InputError
from groupsae.files import write_json
from groupsae.interpretation.cards import Shown
from groupsae.interpretation.explanation.answers import Answers
from groupsae.interpretation.explanation.client import DEFINITIONS as OF_REQUESTS
from groupsae.interpretation.explanation.client import Client
from groupsae.interpretation.explanation.examples import DEFINITIONS as OF_EXAMPLES
from groupsae.interpretation.explanation.examples import (
    FEWEST,
    Example,
    Windows,
    draw_latents,
    examples_of,
)
from groupsae.interpretation.explanation.prompts import (
    Messages,
    detection_prompt,
    explanation_prompt,
    fuzzing_prompt,
    parse_explanation,
    parse_judgements,
)
from groupsae.interpretation.explanation.scores import DEFINITIONS as OF_SCORES
from groupsae.interpretation.explanation.scores import (
    Explained,
    balanced_accuracy,
    latent_rows,
    mean_rows,
)
from groupsae.interpretation.latent_cache import LatentCache
from groupsae.progress import progress

log = logging.getLogger(__name__)

ANSWERS_FILE = "answers.jsonl"
SCORES_FILE = "scores.json"
DEFINITIONS = {**OF_SCORES, **OF_EXAMPLES, **OF_REQUESTS}


def explain(
    folder: Path,
    cache: LatentCache,
    shown: Sequence[Shown],
    texts: Sequence[str],
    asked: ExplanationConfig,
    *,
    of: str,
) -> dict[str, Any]:
    """Have a language model explain latents of every SAE and layer, and score the explanations.

    An SAE that several partitions share is asked about once. Every answer is kept in
    `answers.jsonl` as it comes, and asked for only once: after an interruption, failures, or with
    a larger budget the same call goes on.

    Args:
        folder: Where `answers.jsonl` and `scores.json` are.
        texts: Of every token id.
        of: What the scores belong to: the key of the interpretation.

    Returns:
        The content of `scores.json`: "definitions", "of", "model", "endpoint", "complete" (whether
        every request was answered), "counts", "rows" (one per partition and layer, and one over
        its layers) and "latents".

    Raises:
        InputError: No endpoint, no model, an endpoint that does not answer; no latent that fires
            often enough; a budget that no request fits.
    """
    answers = Answers(folder / ANSWERS_FILE)
    client = Client(asked, answers)
    work = _Work(client, cache, Windows(cache), texts, asked)
    drawn = work.drawn(shown)
    explained = _run(work.all_explained(drawn))
    if client.exhausted:
        log.warning(
            "explanation.budget_tokens=%d is used up: %d of %d latents are explained and judged; "
            "give a larger one to go on",
            asked.budget_tokens,
            sum(own.complete for own in explained),
            len(drawn),
        )
    result = {
        "definitions": DEFINITIONS,
        "of": of,
        "model": asked.model,
        "endpoint": urlsplit(client.address).netloc,
        "complete": all(own.complete for own in explained),
        "counts": client.counts() | {"unparsed": sum(own.unparsed for own in explained)},
        "rows": mean_rows(shown, explained),
        "latents": latent_rows(explained),
    }
    write_json(folder / SCORES_FILE, result)
    return result


_Prompt: TypeAlias = Callable[[str, Sequence[Example], Sequence[str]], Messages]
T = TypeVar("T")


class _Place(NamedTuple):
    """One latent at one layer."""

    sae: str
    layer: int
    latent: int


class _Judged(NamedTuple):
    """What came of one request for judgements.

    Attributes:
        pairs: Truth and judgement of each example; none where the answer does not parse.
    """

    answered: bool
    pairs: list[tuple[bool, bool]]


@dataclass(frozen=True)
class _Work:
    """What the work on every latent needs."""

    client: Client
    cache: LatentCache
    windows: Windows
    texts: Sequence[str]
    asked: ExplanationConfig

    def drawn(self, shown: Sequence[Shown]) -> list[_Place]:
        """The latents to explain, in turn of all SAEs and layers: a budget ends all alike."""
        wanted = dict.fromkeys(place for one in shown for place in sorted(one.saes.items()))
        by_place = [
            [
                _Place(sae, layer, latent)
                for latent in draw_latents(
                    self.cache, self.windows, sae, layer, self.asked.latents, self.asked.seed
                )
            ]
            for layer, sae in wanted
        ]
        drawn = [place for turn in zip_longest(*by_place) for place in turn if place is not None]
        if not drawn:
            raise InputError(
                f"no latent is active in at least {FEWEST} windows of each half of the "
                f"{self.cache.manifest.tokens:,} tokens of the latent cache, and silent in as "
                "many; cache more tokens (interpretation.tokens)"
            )
        return drawn

    async def all_explained(self, places: Sequence[_Place]) -> list[Explained]:
        """Explain and judge one latent after the other.

        Once the budget is used up, those are whole whose answers are all there from before.
        """
        left, found = iter(places), list[Explained]()
        with progress("explanations", len(places), "latents") as bar:

            async def work() -> None:
                for place in left:
                    found.append(await self.explained(place))
                    bar.advance(1)

            async with self.client, asyncio.TaskGroup() as group:
                for _ in range(self.asked.concurrency):
                    group.create_task(work())
        return found

    async def explained(self, place: _Place) -> Explained:
        """Explain one latent and judge that."""
        asked = self.asked
        shown = examples_of(
            self.cache,
            self.windows,
            *place,
            contexts=asked.contexts,
            examples=asked.examples,
            seed=asked.seed,
        )
        answer = await self.client.ask(explanation_prompt(shown.explained, self.texts))
        explanation = None if answer is None else parse_explanation(answer)
        if explanation is None:
            answered = answer is not None
            return Explained(*place, None, None, None, unparsed=int(answered), complete=answered)
        async with asyncio.TaskGroup() as group:
            tasks = [
                [group.create_task(self._judged(prompt, explanation, some)) for some in parts]
                for prompt, parts in (
                    (detection_prompt, self._parts(shown.detection)),
                    (fuzzing_prompt, self._parts(shown.fuzzing)),
                )
            ]
        detection, fuzzing = ([task.result() for task in own] for own in tasks)
        return Explained(
            *place,
            explanation,
            _accuracy(detection),
            _accuracy(fuzzing),
            unparsed=sum(own.answered and not own.pairs for own in detection + fuzzing),
            complete=all(own.answered for own in detection + fuzzing),
        )

    async def _judged(
        self, prompt: _Prompt, explanation: str, examples: Sequence[Example]
    ) -> _Judged:
        answer = await self.client.ask(prompt(explanation, examples, self.texts))
        said = None if answer is None else parse_judgements(answer, len(examples))
        pairs = zip((example.truth for example in examples), said, strict=True) if said else ()
        return _Judged(answer is not None, list(pairs))

    def _parts(self, examples: Sequence[Example]) -> list[Sequence[Example]]:
        size = self.asked.examples_per_request
        return [examples[i : i + size] for i in range(0, len(examples), size)]


def _accuracy(judged: Sequence[_Judged]) -> float | None:
    """None where a request has no answer yet: what is judged so far may be one-sided."""
    if not all(own.answered for own in judged):
        return None
    return balanced_accuracy(pair for own in judged for pair in own.pairs)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, in a notebook too, where an event loop runs already.

    Of errors in several tasks at once, the first is raised.
    """
    try:
        if _in_event_loop():
            with ThreadPoolExecutor(1, "explanations") as thread:
                return thread.submit(asyncio.run, work).result()
        return asyncio.run(work)
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
