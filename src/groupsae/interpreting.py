"""The stage `interpret`: whose latents are kept, what is said of them, and the pages about them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from groupsae import local
from groupsae.directory import read_json
from groupsae.errors import InputError
from groupsae.evaluation.subject import Subject
from groupsae.files import write_json, write_text
from groupsae.host.documents import BUNDLED
from groupsae.interpretation import depth, latent_cache, logit_attribution, matching
from groupsae.interpretation.annotation.scoring import score_files
from groupsae.interpretation.annotation.sheet import annotate, draw_sheet
from groupsae.interpretation.browser import About, write_browser, write_scores
from groupsae.interpretation.cache_pass import write_latent_cache
from groupsae.interpretation.card_making import choose_latents, make_cards, pairs
from groupsae.interpretation.cards import PairStratum, Shown
from groupsae.interpretation.explanation import explain
from groupsae.interpretation.ground_truth import ground_truth
from groupsae.interpretation.latent_cache import LatentCache
from groupsae.interpretation.token_text import known_ids, token_texts
from groupsae.interpretation.unembedding import Unembedding, unembedding_of
from groupsae.opened import OpenRun
from groupsae.sae import SAE, directory_name

log = logging.getLogger(__name__)

_SHEET_LATENTS = 96  # of each SAE and layer, as in the paper
_SAE_KEYS = ("partition", "groups_total", "layer")  # what tells which SAE a row is about


class Interpretation:
    """What a run's latents stand for: below `interpretation/`.

    Args:
        run: Whose SAEs are trained. Its host model and SAEs are loaded when they are needed.
    """

    def __init__(self, run: OpenRun) -> None:
        self.run = run
        self.folder = run.directory / "interpretation"
        self.config = run.config.interpretation

    def carry_out(self) -> dict[str, Any]:
        """Keep the latents of held-out text, and write what is found of them.

        Returns:
            The content of `depth.json`.
        """
        cache = self._cached()
        result = self._depth(cache)
        write_json(self.folder / "depth.json", result)
        self._ground_truth()
        self._browser(cache)
        return result

    def annotate(self, latents: int = _SHEET_LATENTS) -> Path:
        """Write a page on which people mark latents, and the key to it; returns the page."""
        return annotate(
            self.folder / "annotation",
            self.cache(),
            self.saes,
            self.shown,
            self._unembedding,
            self._texts,
            latents=latents,
            contexts=self.config.contexts,
            seed=self.config.seed,
            of=self.key,
            token_ids=self._known_ids,
        )

    def score_annotations(self, files: Sequence[Path]) -> dict[str, Any]:
        """The scores of what annotators have exported; the browser shows them."""
        result = score_files(self.folder / "annotation", files)
        self._show_scores()
        return result

    def explain(self) -> dict[str, Any]:
        """Have a language model explain latents, and score that; the browser shows both."""
        result = explain(
            self.folder / "explanation",
            self.cache(),
            self.shown,
            self._texts,
            self.run.config.explanation,
            of=self.key,
        )
        self._browser(self.cache())  # latents that had no card have one now
        return result

    def cache(self) -> LatentCache:
        """The latents that were kept."""
        return LatentCache(self.folder / "cache")

    @property
    def key(self) -> str:
        """Identifies what was interpreted, and how."""
        return self.run.stages.key("interpret")

    @cached_property
    def subjects(self) -> list[Subject]:
        """Whose latents are looked at: those of the chosen groups, and what is set beside them."""
        chosen, *others = self.run.subjects()
        kinds = {"none": (), "baseline": ("baseline",), "all": ("groups", "baseline")}
        return [chosen, *(s for s in others if s.partition in kinds[self.config.compare])]

    @cached_property
    def names(self) -> dict[SAE, str]:
        """The name of each SAE, that of its folder; one that two partitions share has one."""
        names: dict[SAE, str] = {}
        for subject in self.subjects:
            folder = "baseline/" if subject.partition == "baseline" else ""
            for sae in subject.saes.values():
                names.setdefault(sae, folder + directory_name(sae.layers))
        return names

    @cached_property
    def saes(self) -> dict[str, SAE]:
        """The SAEs by name."""
        return {name: sae for sae, name in self.names.items()}

    @cached_property
    def shown(self) -> list[Shown]:
        """The subjects, by the names of their SAEs."""
        return [
            Shown(
                subject.partition,
                subject.groups_total,
                {layer: self.names[sae] for layer, sae in subject.saes.items()},
            )
            for subject in self.subjects
        ]

    def _cached(self) -> LatentCache:
        """The latent cache: one that an interrupted stage of the same config wrote is kept."""
        run, path, noted = self.run, self.folder / "cache", self.folder / "cache-of.txt"
        if path.exists() and noted.exists() and noted.read_text(encoding="utf-8") == self.key:
            log.info("latent cache: already there")
            return LatentCache(path)
        noted.unlink(missing_ok=True)
        cache = write_latent_cache(
            path,
            run.host,
            run.corpus.held_out(),
            {(name, layer): sae for name, sae in self.saes.items() for layer in sae.layers},
            tokens=self.config.tokens,
            batch_contexts=run.config.evaluation.batch_contexts,
            special=run.special,
        )
        write_text(noted, self.key)
        return cache

    def _depth(self, cache: LatentCache) -> dict[str, Any]:
        profiles = {name: depth.depth_profile(cache, name) for name in cache.sae_names}
        return {
            "definitions": depth.DEFINITIONS,
            "saes": {
                name: [profile.summary(share) for share in (depth.SHARE, 0.5)]
                for name, profile in profiles.items()
            },
            "subjects": [
                {
                    "partition": shown.partition,
                    "groups_total": shown.groups_total,
                    "saes": {str(layer): name for layer, name in shown.saes.items()},
                }
                for shown in self.shown
            ],
            "profiles": {name: profile.heat_map() for name, profile in profiles.items()},
        }

    def _ground_truth(self) -> None:
        """Score latents against what is known of the words, where that is known."""
        run, path = self.run, self.folder / "ground_truth.json"
        path.unlink(missing_ok=True)  # of another config
        if run.config.tokens.source != BUNDLED:
            return
        result = ground_truth(
            run.host,
            run.corpus.held_out(),
            self.subjects,
            tokens=self.config.ground_truth_tokens,
            batch_contexts=run.config.evaluation.batch_contexts,
            special=run.special,
            seed=self.config.seed,
        )
        write_json(path, result)

    def _browser(self, cache: LatentCache) -> None:
        """Write the pages about the latents that have a card."""
        beside = self._pairs(cache)
        named: dict[str, set[int]] = {name: set() for name in cache.sae_names}
        for name, latent in self._named(cache, beside):
            named.setdefault(name, set()).add(latent)
        chosen = {
            name: choose_latents(
                cache,
                name,
                wanted=self.config.cards,
                first=sorted(named[name]),
                seed=self.config.seed,
            )
            for name in cache.sae_names
        }
        cards = make_cards(
            cache,
            self.saes,
            self.shown,
            chosen,
            self._unembedding,
            contexts=self.config.contexts,
            seed=self.config.seed,
            token_ids=self._known_ids,
        )
        manifest, run = cache.manifest, self.run
        about = About(
            of=self.key,
            host=local.shown(run.config.host.name),
            tokens=manifest.tokens,
            special=manifest.excluded_special_tokens,
            source=local.shown(run.config.tokens.source),
            shown=self.shown,
            sae_layers={name: self.saes[name].layers for name in cache.sae_names},
            definitions={
                **latent_cache.DEFINITIONS,
                **depth.DEFINITIONS,
                **matching.DEFINITIONS,
                "logits": logit_attribution.DEFINITION,
            },
            pairs=beside,
            report_href="../../report.html",
        )
        write_browser(self.folder / "browser", cards, about, self._texts)
        self._show_scores()

    def _pairs(self, cache: LatentCache) -> list[PairStratum]:
        chosen, *others = self.shown
        baseline = [other for other in others if other.partition == "baseline"]
        if not baseline:
            return []
        return pairs(cache, self.saes, chosen, baseline[0], seed=self.config.seed)

    def _named(
        self, cache: LatentCache, beside: Sequence[PairStratum]
    ) -> Iterator[tuple[str, int]]:
        """Latents that something else names, and that therefore have a card."""
        for stratum in beside:
            for pair in stratum.pairs:
                yield pair.sae, pair.latent
                yield pair.baseline, pair.baseline_latent
        for path in sorted((self.run.directory / "evaluation" / "circuits").glob("*.json")):
            for place in self._places(read_json(path, strongest=list)["strongest"]):
                yield place["sae"], place["latent"]
        for place in self._captured():
            yield place["sae"], place["latent"]
        sheet = draw_sheet(
            cache, self.shown, latents=_SHEET_LATENTS, seed=self.config.seed, of=self.key
        )
        for item in sheet.items:
            yield item.sae, item.latent
        for row in self._scored("explanation"):
            yield row["sae"], row["latent"]

    def _show_scores(self) -> None:
        """Let the browser show the scores that there are."""
        rows: list[Mapping[str, Any]] = []
        for row in self._scored("annotation"):
            rows.append({**_place(row), "human": row["score"], "notes": row["notes"]})
        for row in self._scored("explanation"):
            scores = {key: row[key] for key in ("explanation", "detection", "fuzzing")}
            rows.append(_place(row) | scores)
        captured = {}  # an SAE that two partitions share has its rows once
        for row in self._captured():
            known = {key: row[key] for key in ("attribute", "auroc")}
            captured[row["sae"], row["layer"], row["attribute"]] = _place(row) | known
        write_scores(self.folder / "browser", [*rows, *captured.values()])

    def _captured(self) -> list[dict[str, Any]]:
        """The best latent of each known attribute, by SAE and layer."""
        path = self.folder / "ground_truth.json"
        rows = read_json(path, rows=list)["rows"] if path.exists() else []
        return self._places(row for row in rows if row["source"] == "trained")

    def _places(self, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Rows about a partition's layers with the name of the "sae" there, where it is shown."""
        saes = {
            (own.partition, own.groups_total, layer): name
            for own in self.shown
            for layer, name in own.saes.items()
        }
        keyed = ((tuple(row[key] for key in _SAE_KEYS), row) for row in rows)
        return [{**row, "sae": saes[key]} for key, row in keyed if key in saes]

    def _scored(self, kind: str) -> list[dict[str, Any]]:
        """The latents of a `scores.json`, if it is of this interpretation."""
        path = self.folder / kind / "scores.json"
        if not path.exists():
            return []
        scores = read_json(path, of=str, latents=list)
        return list(scores["latents"]) if scores["of"] == self.key else []

    @cached_property
    def _texts(self) -> list[str]:
        """How each token id is shown."""
        return token_texts(self.run.host.tokenizer, self.run.host.vocab_size)

    @cached_property
    def _known_ids(self) -> torch.Tensor:
        return torch.tensor(known_ids(self.run.host.tokenizer, self.run.host.vocab_size))

    @cached_property
    def _unembedding(self) -> Unembedding | None:
        """None, and said, where the host model's is of a kind that is not known."""
        try:
            return unembedding_of(self.run.host)
        except InputError as error:
            log.warning("without logits: %s", error)
            return None


def _place(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("sae", "layer", "latent")}
