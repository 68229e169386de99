"""What the study trains: which groups, under which settings, from which seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from groupsae.config import Config
from groupsae.grouping.cost import CostModel
from groupsae.grouping.table import PartitionTable
from groupsae.training.session import Entry

Group = tuple[int, ...]

RULES: Mapping[str, Sequence[str]] = {
    "topk-16": ["sae.k=16"],
    "topk-32": ["sae.k=32"],
    "batchtopk-32": ["sae.architecture=batchtopk", "sae.k=32"],
    "jumprelu-32": ["sae.architecture=jumprelu", "sae.target_l0=32"],
}
MAIN = "topk-32"  # the setting under which all else is varied
AFFINES = ("none", "scale", "bias", "gain")  # beside "center", which all other settings have
SAMPLINGS = ("balanced", "all")  # beside "uniform"


@dataclass(frozen=True)
class Session:
    """SAEs that are trained side by side, from one forward."""

    name: str
    overrides: tuple[str, ...]
    entries: tuple[Entry, ...]


def sessions(
    base: Sequence[str],
    tables: Mapping[str, PartitionTable],
    cost: CostModel,
    *,
    seeds: Iterable[int],
    rules: Iterable[str],
) -> list[Session]:
    """All that is to be trained.

    Args:
        base: Overrides that all of it has.
        tables: Every G's partition, by method: "linkage", "optimal", "even".
        cost: Of a per-layer and of a group SAE, for what costs the same.
        seeds: Of the weights. All SAEs see the same tokens in the same order.
        rules: Which of RULES, besides MAIN, at every G of linkage.
    """
    seeds = tuple(seeds)
    linkage, chosen = tables["linkage"], tables["linkage"].partition
    wide = [group for group in chosen.groups if len(group) > 1]
    layers = [(layer,) for layer in linkage.layers]
    everywhere = _groups_of(linkage)
    others = [group for group in _groups_of(*tables.values()) if group not in everywhere]

    main: list[Entry] = []
    for rule in dict.fromkeys([MAIN, *rules]):
        main += _entries(base, rule, RULES[rule], everywhere, seeds)
    main += _entries(base, MAIN, RULES[MAIN], others, seeds)
    for affine in AFFINES:
        own = [*RULES[MAIN], f"sae.affine={affine}"]
        main += _entries(base, f"{MAIN}-{affine}", own, wide, seeds)
    narrow = [*RULES[MAIN], f"sae.d_sae={narrower(cost, chosen.G, len(layers))}"]
    main += _entries(base, f"{MAIN}-narrower", narrow, layers, seeds)

    found = [Session("main", tuple(base), tuple(main))]
    for sampling in SAMPLINGS:
        own_base = [*base, f"training.layer_sampling={sampling}"]
        entries = _entries(own_base, f"{MAIN}-{sampling}", RULES[MAIN], wide, seeds)
        found.append(Session(sampling, tuple(own_base), tuple(entries)))
    tokens = fewer_tokens(Config.load(None, base), cost, chosen.G, len(layers))
    own_base = [*base, f"training.tokens={tokens}"]
    entries = _entries(own_base, f"{MAIN}-fewer-tokens", RULES[MAIN], layers, seeds)
    return [*found, Session("fewer-tokens", tuple(own_base), tuple(entries))]


def narrower(cost: CostModel, G: int, n_layers: int) -> int:
    """d_sae of per-layer SAEs that cost as much to train as G groups on as many tokens."""
    return max(cost.d_sae * G // n_layers, 1)


def fewer_tokens(config: Config, cost: CostModel, G: int, n_layers: int) -> int:
    """Tokens on which per-layer SAEs cost as much to train as G groups, forward included."""
    share = cost.flops_per_token(G) / cost.flops_per_token(n_layers)
    steps = max(math.floor(share * config.training.steps), 1)
    return steps * config.training.batch_tokens


def _entries(
    base: Sequence[str],
    setting: str,
    overrides: Sequence[str],
    groups: Iterable[Group],
    seeds: Iterable[int],
) -> list[Entry]:
    found = []
    for seed in seeds:
        config = Config.load(None, [*base, *overrides, f"training.seed={seed}"])
        for group in groups:
            name = f"{setting}/seed-{seed}/{'-'.join(map(str, group))}"
            found.append(Entry(name, group, config))
    return found


def _groups_of(*tables: PartitionTable) -> list[Group]:
    """Every group of every partition, once."""
    found: dict[Group, None] = {}
    for table in tables:
        for row in table.by_groups.values():
            found.update(dict.fromkeys(row.partition.groups))
    return list(found)
