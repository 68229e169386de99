"""How alike two dictionaries are: their latents' directions (MMCS), and where they fire."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from groupsae.errors import InputError
from groupsae.evaluation.concordance import (
    FiringSets,
    concordance,
    firing_sets,
    mean_concordance,
)
from groupsae.host.model import HostModel
from groupsae.host.tokens import TokenStream
from groupsae.progress import progress
from groupsae.sae import SAE

DEFINITIONS = {
    "chance": "MMCS of two dictionaries of random directions as large as a layer's baseline: what "
    "SAEs that have nothing in common have",
    "mmcs_group_to_layer": "mean over the latents of the group's SAE of the largest cosine of a "
    "latent's decoder row with a decoder row of the layer's baseline SAE (mean maximum cosine "
    "similarity). Latents that never fire are among them. A group of one layer whose SAE is its "
    "own baseline has 1",
    "mmcs_layer_to_group": "the same with the two exchanged: mean over the baseline's latents",
    "above_0.9_group_to_layer": "share of the group's latents whose largest cosine with one of the "
    "baseline's is above 0.9",
    "above_0.9_layer_to_group": "share of the baseline's latents whose largest cosine with one of "
    "the group's is above 0.9",
    "histogram": "numbers of latents by their largest cosine, in bins between the edges; what lies "
    "below 0 is counted in the first",
    "concordance": "mean over the baseline's latents a that fire at all of the largest Jaccard "
    "index |fires(a) and fires(b)| / |fires(a) or fires(b)| with a latent b of the other SAE, on "
    "the same tokens; null where none fires",
    "silent": "latents of the baseline that fire on none of the tokens; concordance leaves them "
    "out",
    "tokens": "tokens that concordance was measured on, without special ones where "
    "tokens.exclude_special holds",
    "excluded_special_tokens": "special tokens that were left out of them",
    "matrices": "for every number of groups, layers x layers. Row a, column b: the baseline SAE of "
    "layer a and the SAE of layer b's group. mmcs is that of mmcs_group_to_layer, the mean over "
    "the group SAE's latents; concordance is the mean over the baseline's, which fire on the "
    "residual streams of layer a, the other SAE's on those of layer b; null where it was not asked "
    "for",
    "yardstick": "the baseline of a layer and one of the same layer from another seed: what two "
    "trainings of the same dictionary give. mmcs, above_0.9 and histogram are over the baseline's "
    "latents, as concordance is",
}

HISTOGRAM_EDGES = tuple(i / 40 for i in range(41))
_ALIKE = 0.9


@torch.no_grad()
def evaluate_similarity(
    host: HostModel,
    stream: TokenStream,
    baselines: Mapping[int, SAE],
    groups: Mapping[int, Mapping[int, SAE]],
    yardstick: Mapping[int, SAE] | None,
    *,
    tokens: int,
    batch_contexts: int,
    special: Iterable[int] = (),
    matrix_groups: Sequence[int] = (),
) -> dict[str, Any]:
    """Compare every group's SAE with the baseline of every layer.

    A pair of SAEs that several entries need is compared once: let partitions that share a group
    share its SAE object. The layers' firings are in memory together
    (:func:`groupsae.evaluation.concordance.firing_sets`).

    Args:
        baselines: Layer -> its baseline SAE.
        groups: G -> layer -> the SAE of its group in the partition of G groups.
        yardstick: Layer -> a baseline SAE of another seed, for any of the layers; None: no
            yardstick.
        tokens: Tokens to measure concordance on; rounded up to whole contexts.
        batch_contexts: Contexts in one forward of the host.
        special: Token ids to leave out.
        matrix_groups: The G whose whole matrix of concordances is computed, not its diagonal alone.

    Returns:
        The content of `evaluation/similarity.json`: "definitions", "layers", "tokens",
        "excluded_special_tokens", "chance", "rows" (one per G and layer), "matrices" and
        "yardstick".

    Raises:
        InputError: If a layer has no baseline, partitions cover different layers, one of
            `matrix_groups` is not there, or every token is special.
        EndOfText: If the text is used up.
    """
    _check(baselines, groups, yardstick, matrix_groups)
    layers = sorted(baselines)
    own = {G: [_Pair(layer, groups[G][layer], layer) for layer in layers] for G in sorted(groups)}
    crossed = {G: [[_Pair(a, groups[G][b], b) for b in layers] for a in layers] for G in own}
    seeds = [_Pair(layer, sae, layer) for layer, sae in sorted((yardstick or {}).items())]

    firing = {*seeds, *chain(*own.values()), *chain(*(chain(*crossed[G]) for G in matrix_groups))}
    sets = firing_sets(
        host,
        stream,
        {part for pair in firing for part in pair.parts(baselines)},
        tokens=tokens,
        batch_contexts=batch_contexts,
        special=special,
    )
    agreement = _agreement(firing, baselines, sets)
    alike = _alike({*seeds, *chain(*chain(*crossed.values()))}, baselines)

    return {
        "definitions": DEFINITIONS,
        "layers": layers,
        "tokens": sets.tokens,
        "excluded_special_tokens": sets.excluded,
        "chance": chance(next(iter(baselines.values()))),
        "rows": [
            {
                "groups_total": G,
                "layer": pair.layer,
                "group": list(pair.sae.layers),
                **alike[pair].to_json(),
                **agreement[pair],
            }
            for G, pairs in own.items()
            for pair in pairs
        ],
        "matrices": {
            str(G): {
                "mmcs": [[alike[pair].group_to_layer.mean for pair in row] for row in rows],
                "concordance": [[agreement[pair]["concordance"] for pair in row] for row in rows]
                if G in matrix_groups
                else None,
            }
            for G, rows in crossed.items()
        },
        "yardstick": None
        if yardstick is None
        else [
            {
                "layer": pair.layer,
                **alike[pair].layer_to_group.to_json(),
                **agreement[pair],
            }
            for pair in seeds
        ],
    }


def best_matches(
    A: Float[Tensor, "a d_model"], B: Float[Tensor, "b d_model"], block: int = 4096
) -> tuple[Float[Tensor, " a"], Float[Tensor, " b"]]:
    """The largest cosine of each row of A with a row of B, and of each row of B with one of A.

    The mean of the first is MMCS(A, B) of Sharkey et al. 2022 ("Taking features out of
    superposition with sparse autoencoders"), of the second MMCS(B, A). Rows need not have unit
    norm; a row of zeros has a cosine of 0 with every row.

    Args:
        block: Rows of A and of B that are multiplied at a time: block^2 cosines and 2 block rows
            are in memory besides A and B.
    """
    dtype = torch.promote_types(A.dtype, torch.float32)
    best_a = torch.full((len(A),), -1.0, dtype=dtype, device=A.device)
    best_b = torch.full((len(B),), -1.0, dtype=dtype, device=A.device)
    for rows, best_of_rows in _in_blocks(A, best_a, block):
        directions = _unit(rows.to(dtype))
        for columns, best_of_columns in _in_blocks(B, best_b, block):
            cosines = directions @ _unit(columns.to(dtype)).T
            torch.maximum(best_of_rows, cosines.amax(1), out=best_of_rows)
            torch.maximum(best_of_columns, cosines.amax(0), out=best_of_columns)
    return best_a.clamp_(-1, 1), best_b.clamp_(-1, 1)


def decoder_rows(sae: SAE, layer: int) -> Float[Tensor, "d_sae d_model"]:
    """The latents' directions in the residual stream of `layer`, up to a positive factor.

    Raises:
        InputError: If `layer` is no member layer of the SAE.
    """
    if layer not in sae.layers:
        raise InputError(
            f"layer {layer} is no member of this SAE; its layers are "
            f"{', '.join(map(str, sae.layers))}"
        )
    rows = sae.W_dec.detach()
    if sae.config.learned_affine == "gain":
        rows = rows * sae.gain_out.detach()[sae.layers.index(layer)]
    return rows


@dataclass(frozen=True)
class _Pair:
    """The baseline of layer `row`, and an SAE at its member layer `layer`."""

    row: int
    sae: SAE
    layer: int

    def parts(self, baselines: Mapping[int, SAE]) -> tuple[tuple[SAE, int], tuple[SAE, int]]:
        """Both SAEs, each with its layer."""
        return (baselines[self.row], self.row), (self.sae, self.layer)

    def of_directions(self) -> _Pair:
        """The same for all member layers at which the SAE's decoder rows have one direction."""
        differ = self.sae.config.learned_affine == "gain"
        return self if differ else _Pair(self.row, self.sae, self.sae.layers[0])


def _agreement(
    pairs: Iterable[_Pair], baselines: Mapping[int, SAE], sets: FiringSets
) -> dict[_Pair, dict[str, Any]]:
    """Each pair's concordance and number of silent latents."""
    found, pairs = {}, set(pairs)
    with progress("concordance", len(pairs), "pairs") as bar:
        for pair in pairs:
            a, b = (sets.of[part] for part in pair.parts(baselines))
            mean, silent = mean_concordance(*concordance(a, b))
            found[pair] = {"concordance": mean, "silent": silent}
            bar.advance(1)
    return found


def _alike(pairs: Iterable[_Pair], baselines: Mapping[int, SAE]) -> dict[_Pair, _Matches]:
    """Each pair's largest cosines, computed once for all pairs of the same directions."""
    compared, pairs = {}, set(pairs)
    distinct = {pair.of_directions() for pair in pairs}
    with progress("mmcs", len(distinct), "pairs") as bar:
        for pair in distinct:
            baseline, other = (decoder_rows(*part) for part in pair.parts(baselines))
            compared[pair] = _Matches(*best_matches(other, baseline))
            bar.advance(1)
    return {pair: compared[pair.of_directions()] for pair in pairs}


def chance(sae: SAE) -> float:
    """The MMCS of two dictionaries of this size with random directions."""
    one, other = (
        torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    )
    return float(best_matches(one, other)[0].double().mean())


class _Largest:
    """The largest cosines of one dictionary's latents, summed up."""

    def __init__(self, cosines: Float[Tensor, " d_sae"]) -> None:
        cosines = cosines.double().cpu()
        edges = torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64)
        self.mean = float(cosines.mean())
        self.above = float((cosines > _ALIKE).double().mean())
        self.counts = torch.histogram(cosines.clamp(0, 1), edges).hist.long().tolist()

    def to_json(self) -> dict[str, Any]:
        return {
            "mmcs": self.mean,
            "above_0.9": self.above,
            "histogram": {"edges": list(HISTOGRAM_EDGES), "counts": self.counts},
        }


class _Matches:
    """A group's SAE and a layer's baseline, both ways."""

    def __init__(
        self, group_to_layer: Float[Tensor, " group"], layer_to_group: Float[Tensor, " layer"]
    ) -> None:
        self.group_to_layer = _Largest(group_to_layer)
        self.layer_to_group = _Largest(layer_to_group)

    def to_json(self) -> dict[str, Any]:
        return {
            "mmcs_group_to_layer": self.group_to_layer.mean,
            "mmcs_layer_to_group": self.layer_to_group.mean,
            "above_0.9_group_to_layer": self.group_to_layer.above,
            "above_0.9_layer_to_group": self.layer_to_group.above,
            "histogram": {
                "edges": list(HISTOGRAM_EDGES),
                "group_to_layer": self.group_to_layer.counts,
                "layer_to_group": self.layer_to_group.counts,
            },
        }


def _check(
    baselines: Mapping[int, SAE],
    groups: Mapping[int, Mapping[int, SAE]],
    yardstick: Mapping[int, SAE] | None,
    matrix_groups: Sequence[int],
) -> None:
    covered = {layer for saes in groups.values() for layer in saes}
    missing = sorted((covered | {*(yardstick or {})}) - {*baselines})
    if missing or not baselines:
        of = f"layers {', '.join(map(str, missing))} have" if missing else "there is"
        raise InputError(
            f"training.baseline: {of} no baseline SAE to compare the groups' SAEs with; train the "
            "run with training.baseline=true"
        )
    for G, saes in groups.items():
        if {*saes} != {*baselines}:
            raise InputError(
                f"the partition of {G} groups covers layers {sorted(saes)}, the baselines cover "
                f"{sorted(baselines)}; compare partitions of the same layers"
            )
    unknown = sorted({*matrix_groups} - {*groups})
    if unknown:
        raise InputError(
            f"matrix_groups={unknown}: no such partition; there are G = "
            f"{', '.join(map(str, sorted(groups)))}"
        )


def _in_blocks(
    rows: Float[Tensor, "n d_model"], best: Float[Tensor, " n"], block: int
) -> Iterator[tuple[Float[Tensor, "m d_model"], Float[Tensor, " m"]]]:
    return zip(torch.split(rows, block), torch.split(best, block), strict=True)


def _unit(rows: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    """Each row over its norm; rows of zeros as they are."""
    largest = rows.abs().amax(1, keepdim=True)
    rows = rows / torch.where(largest > 0, largest, 1)  # squares of tiny numbers would vanish
    norm = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norm > 0, norm, 1)
