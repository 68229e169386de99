from __future__ import annotations

import pytest

from groupsae.host.model import HostModel
from groupsae.host.tokens import Corpus
from groupsae.interpretation.cache_pass import write_latent_cache
from groupsae.interpretation.latent_cache import LatentCache
from groupsae.sae import SAE
from tests.interpretation.cases import CONTEXT, CONTEXTS, made_sae


@pytest.fixture(scope="session")
def saes() -> dict[str, SAE]:
    """A group of layers 0 and 1, and the baselines of both."""
    return {
        "layers-00-01": made_sae((0, 1)),
        "baseline/layers-00": made_sae((0,), seed=1),
        "baseline/layers-01": made_sae((1,), d_sae=24, seed=2, architecture="relu", k=None),
    }


@pytest.fixture(scope="session")
def cache(
    host: HostModel,
    corpus: Corpus,
    saes: dict[str, SAE],
    tmp_path_factory: pytest.TempPathFactory,
) -> LatentCache:
    """The latents of `saes` on the first held-out tokens, in several shards and files."""
    return write_latent_cache(
        tmp_path_factory.mktemp("latents") / "cache",
        host,
        corpus.held_out(),
        {(name, layer): sae for name, sae in saes.items() for layer in sae.layers},
        tokens=CONTEXTS * CONTEXT - 3,
        batch_contexts=5,
        special=(0,),
        buffer_firings=3000,
    )
