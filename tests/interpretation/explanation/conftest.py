from __future__ import annotations

import pytest

from groupsae.interpretation.cards import Shown
from groupsae.interpretation.explanation import client
from groupsae.interpretation.latent_cache import LatentCache
from tests.interpretation.explanation.cases import activations, made_cache, random_tokens

WORDS = {0: 7, 3: 20, 4: 31, 9: 45}  # latent -> the only token id on which it fires


@pytest.fixture(scope="session")
def words_cache(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    """A group of layers 2 and 3, and the baseline of both; some latents know one word each."""
    tokens = random_tokens(contexts=120)
    places = [("layers-02-03", 2), ("layers-02-03", 3), ("baseline/layers-02", 2)]
    places.append(("baseline/layers-03", 3))
    return made_cache(
        tmp_path_factory.mktemp("words") / "cache",
        tokens,
        {place: activations(tokens, WORDS, seed) for seed, place in enumerate(places)},
    )


@pytest.fixture(scope="session")
def shown() -> list[Shown]:
    return [
        Shown("groups", 1, {2: "layers-02-03", 3: "layers-02-03"}),
        Shown("baseline", 2, {2: "baseline/layers-02", 3: "baseline/layers-03"}),
    ]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SHORTEST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
