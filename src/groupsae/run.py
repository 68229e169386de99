"""A run: its directory, its stages, and what has been done."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groupsae.config import Config
from groupsae.errors import InputError

if TYPE_CHECKING:
    from groupsae.grouping.cost import CostModel
    from groupsae.grouping.distance import Moments
    from groupsae.grouping.matrix import Distances
    from groupsae.grouping.table import PartitionTable
    from groupsae.host.model import HostModel
    from groupsae.host.tokens import Corpus, TokenStream
    from groupsae.sae import SAE

log = logging.getLogger(__name__)

STAGES = ("distances", "groups", "train", "evaluate", "report")

# What each stage depends on, besides the stages before it: whole sections or single keys.
_DEPENDS = {
    "distances": (
        "host",
        "tokens",
        "grouping.layers",
        "grouping.distance_tokens",
        "grouping.center",
    ),
    "groups": ("grouping", "sae.expansion", "sae.d_sae"),
    "train": ("sae", "training"),
    "evaluate": ("evaluation",),
    "report": ("report",),
}
# Keys that change how a stage is carried out, but not what comes out.
_IRRELEVANT = (
    "host.device",
    "host.n_layers",
    "host.d_model",
    "tokens.on_exhausted",  # what was made before the text ran out stays as it is
    "training.log_every",
    "training.checkpoint_every",
    "training.checkpoints_kept",
    "training.tracker",
    "evaluation.batch_contexts",
)


class Run:
    """One host model, one partition, one set of SAEs, in one directory.

    Every method carries out one stage from the artefacts of the stages before it and returns what
    it made; a stage that is already done for the same config is not repeated.

    >>> run = Run("runs/first", Config.load())   # doctest: +SKIP
    >>> run.all()                                # doctest: +SKIP
    >>> run.sae(3).encode(x, layer=3)            # doctest: +SKIP

    Args:
        directory: Made where it is missing.
        config: By default the directory's own, or the defaults in a new one.
        redo: Where the directory holds stages of another config: repeat these, and those after
            them.

    Raises:
        InputError: If the directory holds something else, or stages of another config and not
            `redo`.
    """

    def __init__(
        self, directory: Path | str, config: Config | None = None, *, redo: bool = False
    ) -> None:
        self.directory = Path(directory)
        stored = stored_config(self.directory)
        self.config = config or stored or Config()
        if stored is not None:
            self._reconcile(stored, redo)
        self._note_provenance()

    # The stages, in order.

    def all(self) -> Path:
        """Carry out every stage that is not done yet; returns the report's path."""
        self.check()
        self.distances()
        self.groups()
        self.train()
        self.evaluate()
        return self.report()

    def distances(self) -> Distances:
        """Measure how similar the layers are."""
        from groupsae.grouping.matrix import Distances

        path = self.directory / "distances.json"
        with self._stage("distances", path) as todo:
            if todo:
                self._measure(write_distances=True)
        return Distances.from_json(_read_json(path))

    def groups(self) -> PartitionTable:
        """Put contiguous similar layers into groups."""
        from groupsae.grouping.matrix import load_distances
        from groupsae.grouping.table import PartitionTable

        path = self.directory / "partition.json"
        with self._stage("groups", path) as todo:
            if todo:
                distances = load_distances(self._need("distances.json", "distances"))
                _write_json(path, grouped(distances, self.config, self.cost()).to_json())
        return PartitionTable.from_json(_read_json(path))

    def train(self) -> dict[str, SAE]:
        """Train one SAE per group and, if asked, one per layer, from one shared forward."""
        path = self.directory / "training.json"
        with self._stage("train", path) as todo:
            if todo:
                self._train(path)
        return self.saes()

    def evaluate(self) -> list[dict[str, Any]]:
        """Judge every SAE at every layer on held-out text; returns the rows of the table."""
        path = self.directory / "evaluation" / "reconstruction.json"
        with self._stage("evaluate", path) as todo:
            if todo:
                from groupsae.evaluation.reconstruction import Subject, evaluate_reconstruction

                self._need("training.json", "train")
                result = evaluate_reconstruction(
                    self.host,
                    self.corpus.held_out(),
                    [Subject(_partition_of(name), sae) for name, sae in self.saes().items()],
                    tokens=self.config.evaluation.tokens,
                    batch_contexts=self.config.evaluation.batch_contexts,
                    special=self._special,
                )
                trained = self.config.training.steps * self.config.training.batch_tokens
                result["equal"] = f"training tokens per SAE ({trained:,}), the same for all"
                _write_json(path, result)
        rows: list[dict[str, Any]] = _read_json(path)["rows"]
        return rows

    def report(self) -> Path:
        """Write `report.html` and the figures; returns the page's path."""
        path = self.directory / "report.html"
        with self._stage("report", path) as todo:
            if todo:
                from groupsae.report import write_report

                write_report(self.directory, formats=self.config.report.formats)
        return path

    def check(self) -> None:
        """Refuse before any work what would fail late: text that will not do for every stage.

        Text that is streamed, and more than ten million tokens of it, is not counted beforehand.
        """
        if self.corpus.documents.count is None or self._is_done("evaluate"):
            return
        held_out, wanted = self.corpus.held_out(), self.config.evaluation.tokens
        _require(held_out, wanted, "evaluation.tokens")
        if not self.corpus.repeat:
            for key in ("grouping.distance_tokens", "training.tokens"):
                section, _, name = key.partition(".")
                _require(self.corpus.train(), getattr(getattr(self.config, section), name), key)

    # What a finished run offers.

    def saes(self) -> dict[str, SAE]:
        """All trained SAEs by name: `layers-03-06` for groups, `baseline/layers-03` for layers."""
        from groupsae.sae import SAE

        self._need("training.json", "train")
        root = self.directory / "saes"
        folders = sorted(root.glob("layers-*")) + sorted(root.glob("baseline/layers-*"))
        return {
            folder.relative_to(root).as_posix(): SAE.load(folder, self.host.device)
            for folder in folders
        }

    def sae(self, layer: int) -> SAE:
        """The SAE of the group that `layer` belongs to."""
        for name, sae in self.saes().items():
            if _partition_of(name) == "groups" and layer in sae.layers:
                return sae
        raise InputError(f"layer {layer} belongs to no group of {self.directory}")

    @cached_property
    def host(self) -> HostModel:
        """The host model, loaded when first asked for."""
        from groupsae.host.model import HostModel

        asked = self.config.host
        host = HostModel.load(
            asked.name, revision=asked.revision, dtype=asked.dtype, device=asked.device
        )
        for key in ("n_layers", "d_model"):
            declared, actual = getattr(asked, key), getattr(host, key)
            if declared not in (None, actual):
                raise InputError(
                    f"host.{key}: {declared} is declared, but {asked.name} has {actual}"
                )
        self._note_provenance(host_fingerprint=host.fingerprint())
        return host

    @cached_property
    def corpus(self) -> Corpus:
        """The text, tokenised for the host model."""
        from groupsae.host.tokens import open_corpus

        tokens = self.config.tokens
        return open_corpus(
            tokens.source,
            tokenizer=self.host.tokenizer,
            context_length=tokens.context_length,
            split=tokens.split,
            subset=tokens.subset,
            column=tokens.column,
            revision=tokens.revision,
            held_out=tokens.held_out,
            seed=tokens.seed,
            on_exhausted=tokens.on_exhausted,
            prepend_bos=tokens.prepend_bos,
            vocab_size=self.host.vocab_size,
            model_context_length=self.host.context_length,
        )

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers to cover."""
        asked, n_layers = self.config.grouping.layers, self.host.n_layers
        if asked == "all_but_last":
            return tuple(range(max(n_layers - 1, 1)))
        if asked == "all":
            return tuple(range(n_layers))
        wrong = [layer for layer in asked if not 0 <= layer < n_layers]
        if wrong or not asked:
            raise InputError(
                f"grouping.layers: {wrong or 'an empty list'} does not fit "
                f"{self.config.host.name}, whose layers are 0 to {n_layers - 1}"
            )
        return tuple(sorted(set(asked)))

    def cost(self) -> CostModel:
        """The FLOP cost model of the paper for this host and dictionary."""
        from groupsae.grouping.cost import CostModel

        d_model = self.config.host.d_model or self.host.d_model
        return CostModel(
            d_model=d_model,
            n_layers=self.config.host.n_layers or self.host.n_layers,
            context_length=self.config.tokens.context_length,
            d_sae=self.config.sae.width(d_model),
        )

    # How the stages are done.

    @property
    def _special(self) -> frozenset[int]:
        return self.host.special_token_ids if self.config.tokens.exclude_special else frozenset()

    def _measure(self, write_distances: bool) -> Moments:
        from groupsae.measurement import measure_layers, save_moments

        result = measure_layers(
            self.host,
            self.corpus.train(),
            self.layers,
            tokens=self.config.grouping.distance_tokens,
            batch_contexts=self.config.training.host_batch_contexts,
            center=self.config.grouping.center,
            special=self._special,
        )
        save_moments(result.moments, self.directory / "moments.safetensors")
        if write_distances:
            content = result.distances.to_json() | {"excluded_special_tokens": result.excluded}
            _write_json(self.directory / "distances.json", content)
        return result.moments

    def _moments(self) -> Moments:
        from groupsae.measurement import load_moments

        path = self.directory / "moments.safetensors"
        moments = load_moments(path) if path.exists() else None
        if moments is None or moments.layers != self.layers:
            return self._measure(write_distances=False)
        return moments

    def _train(self, summary: Path) -> None:
        import torch

        from groupsae.grouping.table import PartitionTable
        from groupsae.measurement import affine
        from groupsae.sae import SAE, directory_name
        from groupsae.sae import SAEConfig as SAEShape
        from groupsae.training.batches import MixedBatches, NormLimit
        from groupsae.training.checkpoint import Checkpoints
        from groupsae.training.learner import Learner
        from groupsae.training.trackers import open_tracker
        from groupsae.training.trainer import train

        config, host = self.config.training, self.host
        table = PartitionTable.from_json(_read_json(self._need("partition.json", "groups")))
        moments = self._moments()
        members = {directory_name(group): group for group in table.partition.groups}
        if config.baseline:
            members |= {f"baseline/{directory_name([layer])}": (layer,) for layer in self.layers}

        def new_sae(name: str, layers: Sequence[int]) -> SAE:
            mean, scale = affine(moments, layers, self.config.sae.affine)
            generator = torch.Generator().manual_seed(zlib.crc32(f"{config.seed} {name}".encode()))
            shape = SAEShape(
                d_model=host.d_model,
                d_sae=self.config.sae.width(host.d_model),
                k=self.config.sae.k,
                layers=tuple(layers),
            )
            return SAE(shape, mean=mean, scale=scale, generator=generator).to(host.device)

        saes = {name: new_sae(name, layers) for name, layers in members.items()}
        multiple = self.config.tokens.max_norm_multiple
        norms = dict(zip(moments.layers, moments.mean_norm.tolist(), strict=True))
        batches = MixedBatches(
            host,
            self.corpus.train(),
            saes,
            total_tokens=config.steps * config.batch_tokens,
            batch_tokens=config.batch_tokens,
            buffer_tokens=config.buffer_tokens,
            contexts=config.host_batch_contexts,
            special=self._special,
            norm_limit=NormLimit(multiple, norms) if multiple else None,
            seed=config.seed,
        )
        learners = {name: Learner(sae, config) for name, sae in saes.items()}
        checkpoints = Checkpoints(self.directory / "checkpoints", config.checkpoints_kept)
        metrics = self.directory / "metrics.jsonl"
        _keep_until(metrics, checkpoints.step())
        began = time.monotonic()
        with open_tracker(config.tracker, metrics, self.config) as record:
            train(learners, batches, config, checkpoints=checkpoints, log=record)
        for name, sae in saes.items():
            sae.save(self.directory / "saes" / name)
        checkpoints.clear()
        _write_json(
            summary,
            {
                "steps": config.steps,
                "tokens_per_sae": config.steps * config.batch_tokens,
                "saes": list(saes),
                "seconds": round(time.monotonic() - began, 1),
                "tokens_kept": batches.excluded.kept,
                "excluded_special_tokens": batches.excluded.special,
                "excluded_long_tokens": batches.excluded.long,
            },
        )

    def adopt(self, distances: Distances) -> PartitionTable:
        """Group by distances from elsewhere instead of measuring them here. Needs no host model.

        Costs are predicted where `host.n_layers` and `host.d_model` are declared.
        """
        from groupsae.grouping.table import PartitionTable

        with self._stage("distances", self.directory / "distances.json") as todo:
            if not todo:
                raise InputError(
                    f"{self.directory} has measured its own distances; choose another directory"
                )
            _write_json(self.directory / "distances.json", distances.to_json())
        path = self.directory / "partition.json"
        with self._stage("groups", path):
            declared = self.config.host.n_layers and self.config.host.d_model
            cost = self.cost() if declared else None
            _write_json(path, grouped(distances, self.config, cost).to_json())
        return PartitionTable.from_json(_read_json(path))

    # The directory.

    def _need(self, name: str, stage: str) -> Path:
        path = self.directory / name
        if not path.exists():
            raise InputError(
                f"{self.directory} holds no {name} yet; run `groupsae {stage} {self.directory}` "
                f"first, or `groupsae run {self.directory}` for everything"
            )
        return path

    @contextmanager
    def _stage(self, stage: str, artefact: Path) -> Iterator[bool]:
        """Yield whether `stage` is still to do; note it as done if the block ends well."""
        if artefact.exists() and self._is_done(stage):
            log.info("%s: already done", stage)
            yield False
            return
        artefact.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        yield True
        later = STAGES[STAGES.index(stage) + 1 :]
        done = {name: entry for name, entry in self._stages().items() if name not in later}
        done[stage] = {
            "key": _key(self.config, stage),
            "seconds": round(time.monotonic() - began, 1),
            "finished": _now(),
        }
        _write_json(self.directory / "stages.json", done)

    def _is_done(self, stage: str) -> bool:
        return bool(self._stages().get(stage, {}).get("key") == _key(self.config, stage))

    def _stages(self) -> dict[str, Any]:
        path = self.directory / "stages.json"
        return _read_json(path) if path.exists() else {}

    def _reconcile(self, stored: Config, redo: bool) -> None:
        """Refuse, or forget if `redo`, finished stages of another config."""
        done = self._stages()
        begun = {*done, *(["train"] if (self.directory / "checkpoints").exists() else [])}
        for stage in STAGES:
            if stage not in begun or _key(stored, stage) == _key(self.config, stage):
                continue
            if not redo:
                changes = _differences(stored, self.config)
                raise InputError(
                    f"{self.directory} holds the stage '{stage}' of another config "
                    f"({'; '.join(changes)}); choose another directory with --out, or add --redo "
                    "to repeat it and what follows"
                )
            stale = STAGES[STAGES.index(stage) :]
            kept = {name: entry for name, entry in done.items() if name not in stale}
            _write_json(self.directory / "stages.json", kept)
            if "train" in stale:
                self._forget_training()
            return

    def _forget_training(self) -> None:
        for name in ("checkpoints", "saes"):
            shutil.rmtree(self.directory / name, ignore_errors=True)
        (self.directory / "metrics.jsonl").unlink(missing_ok=True)

    def _note_provenance(self, **facts: str) -> None:
        """Write the resolved config, with what is known of where it came from."""
        stored = stored_config(self.directory)
        known = (stored.provenance if stored else None) or {"created": _now(), **_versions()}
        for name, fact in facts.items():
            if known.setdefault(name, fact) != fact:
                raise InputError(
                    f"{self.config.host.name} is not the model that {self.directory} was begun "
                    f"with (its {name} differs); choose another directory with --out"
                )
        resolved = self.config.model_copy(update={"provenance": known})
        _write_text(self.directory / "config.yaml", resolved.dump())


def grouped(distances: Distances, config: Config, cost: CostModel | None = None) -> PartitionTable:
    """The partitions of layers that `config.grouping` asks for."""
    from groupsae.grouping.table import group_layers

    asked = config.grouping
    return group_layers(
        distances,
        method="explicit" if asked.partition is not None else asked.method,
        threshold=asked.threshold,
        groups=asked.groups,
        partition=asked.partition,
        cost=cost,
    )


def stored_config(directory: Path) -> Config | None:
    """The config of a run directory; None where there is no run yet.

    Raises:
        InputError: If the path is a file, or a folder of something else.
    """
    path = directory / "config.yaml"
    if path.exists():
        return Config.load(path)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(
            f"{directory} is no run directory (it holds no config.yaml); choose another with --out"
        )
    return None


def _key(config: Config, stage: str) -> str:
    """Identifies what `stage` computes under `config`: the keys it and earlier stages depend on."""
    content = {
        path: value
        for earlier in STAGES[: STAGES.index(stage) + 1]
        for path, value in _flat(config).items()
        if any(path == on or path.startswith(on + ".") for on in _DEPENDS[earlier])
        and path not in _IRRELEVANT
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _flat(config: Config) -> dict[str, Any]:
    sections = config.model_dump(mode="json", exclude={"provenance"})
    return {
        f"{section}.{key}": value
        for section, keys in sections.items()
        for key, value in keys.items()
    }


def _differences(stored: Config, asked: Config) -> list[str]:
    before, now = _flat(stored), _flat(asked)
    return [
        f"{path} was {before[path]!r}, is now {now[path]!r}"
        for path in now
        if before[path] != now[path] and path not in _IRRELEVANT
    ]


def _require(stream: TokenStream, tokens: int, key: str) -> None:
    try:
        stream.require(min(tokens, 10_000_000))
    except InputError as error:
        raise InputError(f"{key}={tokens}: {error}") from error


def _partition_of(name: str) -> str:
    return "baseline" if name.startswith("baseline/") else "groups"


def _keep_until(metrics: Path, step: int) -> None:
    """Drop lines of `metrics` after `step`, from which training continues."""
    if metrics.exists():
        lines = metrics.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        _write_text(metrics, "".join(kept))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); remove it to have it made again") from error


def _write_json(path: Path, content: Any) -> None:
    _write_text(path, json.dumps(content, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Replace a file at once, so that a reader or a crash never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    packages = ("groupsae", "torch", "transformers", "datasets", "numpy")
    return {name: metadata.version(name) for name in packages} | {
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
