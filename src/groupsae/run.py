"""A run: from a host model to one SAE per group, stage by stage, in one directory."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict  # pydantic wants it below Python 3.12

from groupsae.config import Config
from groupsae.directory import read_json, stored_config
from groupsae.errors import InputError
from groupsae.files import write_json
from groupsae.opened import OpenRun, load_host
from groupsae.planning import chosen_beforehand, grouped

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from groupsae.attached import Attached, Where
    from groupsae.circuits import CircuitStage
    from groupsae.evaluation.attribution import Effects
    from groupsae.evaluation.circuits import Curve
    from groupsae.grouping.distance import Moments
    from groupsae.grouping.matrix import Distances
    from groupsae.grouping.table import PartitionTable
    from groupsae.host.blocks import PreTrainedModel
    from groupsae.host.tokens import TokenStream
    from groupsae.interpretation.latent_cache import LatentCache
    from groupsae.interpreting import Interpretation
    from groupsae.sae import SAE
    from groupsae.sweep import Member
    from groupsae.training.activation_cache import CachedActivations
    from groupsae.training.start import Start
    from groupsae.training.team import Team

log = logging.getLogger(__name__)

_COUNTED_BEFOREHAND = 10_000_000  # tokens


class _Row(TypedDict):
    """What every row of `evaluation/reconstruction.json` has, among other things."""

    partition: str
    layer: int
    ce_loss_score: float
    r2: float
    l2: float
    l0: float


class Run(OpenRun):
    """One host model, one partition, one set of SAEs, in one directory.

    Each of `distances`, `groups`, `train`, `evaluate` and `report` carries out one stage from the
    artefacts of the stages before it and returns what it made; a stage that is already done for the
    same config is not repeated. :meth:`all` does all of them.

        run = Run("runs/demo", Config.load())  # the defaults: the bundled model and text
        run.all()
        sae = run.sae(3)  # the SAE of layer 3's group

    Host model and text are opened when a stage first needs them.

    Args:
        directory: Made where it is missing. `hub://USER/REPO[@REVISION]` is fetched.
        config: By default the directory's own, or the defaults in a new one.
        redo: Where the directory holds stages of another config: repeat these, and what follows.
        host: The model that `config.host` names, where it is in memory already.
        team: The processes that train together: see :func:`groupsae.training.team.team`. All of
            them open the run and call :meth:`train`; the other stages are the first one's.

    Raises:
        InputError: If the directory holds something else, or stages of another config and not
            `redo`.
    """

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
        with self.stages.stage("distances", path) as todo:
            if todo:
                write_json(path, self._measure(self.layers))
        return Distances.from_json(read_json(path))

    def groups(self) -> PartitionTable:
        """Put contiguous similar layers into groups."""
        from groupsae.grouping.matrix import load_distances
        from groupsae.grouping.table import PartitionTable

        path = self.directory / "partition.json"
        with self.stages.stage("groups", path) as todo:
            if todo:
                distances = load_distances(self.stages.need("distances.json", "distances"))
                write_json(path, grouped(distances, self.config, self.cost()).to_json())
        return PartitionTable.from_json(read_json(path))

    def train(self) -> dict[str, SAE]:
        """Train one SAE per group and, if asked, one per layer, from one shared forward."""
        from groupsae.training.team import Team

        path, team = self.directory / "training.json", self._team or Team()
        if team.first:
            with self.stages.stage("train", path) as todo:
                if team.share(todo):
                    write_json(path, self._train(team))
        elif team.share(None):
            self._train(team)
        team.wait()
        saes = self.saes()
        if team.first:
            shutil.rmtree(self.directory / "checkpoints", ignore_errors=True)  # no more of use
        return saes

    def cache(self, tokens: int | None = None) -> Path:
        """Write the residual streams that training reads, or more of them, to a folder of its own.

        No stage: the folder, `training.activation_cache`, may serve many runs.

        Args:
            tokens: How many; by default as many as training takes, and what it passes over.

        Returns:
            The folder.
        """
        from groupsae.training.cache_writer import write_activation_cache

        training = self.config.training
        if training.activation_cache is None:
            raise InputError(
                "training.activation_cache: no folder is named to write the activations to; add "
                "training.activation_cache=PATH"
            )
        path = Path(training.activation_cache)
        write_activation_cache(
            path,
            self.host,
            self.corpus.train(),
            layers=self.layers,
            tokens=tokens or self._tokens_to_cache,
            dtype=training.cache_dtype,
            batch_contexts=training.host_batch_contexts,
            exclude_special=self.config.tokens.exclude_special,
        )
        return path

    def evaluate(self) -> list[dict[str, Any]]:
        """Judge every SAE at every layer on held-out text; returns the rows of the table."""
        path = self.directory / "evaluation" / "reconstruction.json"
        with self.stages.stage("evaluate", path) as todo:
            if todo:
                from groupsae.evaluation.reconstruction import evaluate_reconstruction

                result = evaluate_reconstruction(
                    self.host,
                    self.corpus.held_out(),
                    self.subjects(),
                    tokens=self.config.evaluation.tokens,
                    batch_contexts=self.config.evaluation.batch_contexts,
                    special=self.special,
                )
                write_json(path, result | {"equal": self._what_was_equal()})
        rows: list[dict[str, Any]] = read_json(path, rows=list[_Row])["rows"]
        return rows

    def circuits(self) -> list[dict[str, Any]]:
        """Judge, task by task, how few latents carry what the host model computes.

        The chosen partition, those of `training.also_groups` and the baseline are judged on the
        same examples. A built-in task that this host model cannot be asked is left out, and said.

        Returns:
            The content of each `evaluation/circuits/<task>.json`.
        """
        folder = self.directory / "evaluation" / "circuits"
        with self.stages.stage("circuits", folder) as todo:
            if todo:
                self._circuits.judge_all()
        return self._circuits.results()

    def faithfulness(self, task: str, **about: object) -> list[Curve]:
        """The curves of a task, which is judged first where that is not done.

            run.faithfulness("ioi", partition="groups", score="faithfulness", error_nodes=False)

        Args:
            task: A built-in task, or NAME=FILE.jsonl.
            about: What the curves are to be: any of the attributes of a `Curve`.

        Raises:
            InputError: There is no such attribute; as :meth:`circuits`.
        """
        from groupsae.evaluation.circuits import Curve
        from groupsae.evaluation.downstream import curves_of

        for name in about:
            if name not in Curve.__dataclass_fields__:
                raise InputError(
                    f"{name}={about[name]!r}: a curve has no such attribute; known are "
                    f"{', '.join(Curve.__dataclass_fields__)}"
                )
        curves = curves_of(self._circuits.judge(task))
        return [c for c in curves if all(getattr(c, name) == v for name, v in about.items())]

    def effects(self, task: str, method: str = "attribution") -> dict[str, Effects]:
        """The indirect effect of every latent on a task, by partition: `G=2`, ..., `baseline`.

        They are kept in `evaluation/circuits/effects/`.

        Args:
            task: A built-in task, or NAME=FILE.jsonl.
            method: "attribution", "integrated_gradients", or "exact": one forward per latent.
        """
        return self._circuits.effects(task, method)

    def similarity(self) -> dict[str, Any]:
        """Compare each group's SAE with its layers' own: directions (MMCS) and firing.

        Returns:
            The content of `evaluation/similarity.json`.
        """
        path = self.directory / "evaluation" / "similarity.json"
        with self.stages.stage("similarity", path) as todo:
            if todo:
                from groupsae.evaluation.similarity import evaluate_similarity

                saes = self.saes()
                subjects = [s for s in self.subjects() if s.partition == "groups"]
                result = evaluate_similarity(
                    self.host,
                    self.corpus.held_out(),
                    self._of_each_layer(saes, "baseline"),
                    {subject.groups_total: subject.saes for subject in subjects},
                    self._of_each_layer(saes, "twin") or None,
                    tokens=self.config.similarity.tokens,
                    batch_contexts=self.config.evaluation.batch_contexts,
                    special=self.special,
                    matrix_groups=[subjects[0].groups_total],
                )
                write_json(path, result)
        return read_json(path, rows=list)

    def interpret(self) -> dict[str, Any]:
        """Keep the latents of held-out text and say what they stand for.

        At which layers each group's latents live; which known attributes of the bundled text they
        capture; and a browser, `interpretation/browser/index.html`, of their contexts and logits.

        Returns:
            The content of `interpretation/depth.json`; the latents lie in `interpretation/cache`.
        """
        path = self.directory / "interpretation" / "depth.json"
        with self.stages.stage("interpret", path) as todo:
            if todo:
                self._interpretation.carry_out()
        return read_json(path, saes=dict)

    def latent_cache(self) -> LatentCache:
        """The latents that `interpret` kept: every firing on held-out text, by SAE and layer."""
        return self._interpreted.cache()

    def annotate(self, latents: int = 96) -> Path:
        """Write a page on which people mark latents that they can make sense of.

        Latents of groups and baseline are mixed, and nothing tells which is which.

        Args:
            latents: Of each SAE and layer (paper: 96).

        Returns:
            The page.
        """
        return self._interpreted.annotate(latents)

    def score_annotations(self, files: Sequence[Path]) -> dict[str, Any]:
        """The Human Interpretability Score by layer and partition.

        Args:
            files: What annotators have exported from the page.

        Returns:
            The content of `interpretation/annotation/scores.json`.
        """
        return self._interpreted.score_annotations(files)

    def explain(self) -> dict[str, Any]:
        """Have the language model of `config.explanation` explain latents, and score that.

        Every answer is kept: where the budget ends or the endpoint fails, the same call goes on.

        Returns:
            The content of `interpretation/explanation/scores.json`.
        """
        return self._interpreted.explain()

    def export_to_delphi(self, directory: Path) -> None:
        """Write the kept latents as delphi reads them, for its explainers and scorers."""
        from groupsae.interop.delphi import write_delphi

        chosen = self._interpreted.shown[0]
        write_delphi(directory, self.latent_cache(), dict(chosen.saes), self._metadata())

    def export(self, format: str, directory: Path, layers: Sequence[int] = ()) -> dict[int, Path]:
        """Write each layer's SAE, its group's, in the format of another library.

        Args:
            format: "sae-lens", "sparsify" or "dictionary-learning".
            directory: Where the layers' folders go.
            layers: By default all that the run covers.

        Returns:
            Each layer's folder.

        Raises:
            InputError: If the run has no such layer, or as :func:`groupsae.interop.export_saes`.
        """
        from groupsae.interop import export_saes

        saes = self.subjects()[0].saes
        unknown = sorted(set(layers) - set(saes))
        if unknown:
            raise InputError(
                f"--layers: {', '.join(map(str, unknown))} are not covered by {self.directory}; "
                f"its layers are {', '.join(map(str, saes))}"
            )
        wanted = {layer: saes[layer] for layer in layers or saes}
        return export_saes(wanted, directory, format, self._metadata())

    @classmethod
    def of_imported(
        cls,
        directory: Path | str,
        folders: Sequence[Path],
        config: Config | None = None,
        *,
        format: str | None = None,
        layers: Sequence[tuple[int, ...]] | None = None,
    ) -> Run:
        """A run of SAEs that were trained elsewhere, to evaluate, compare and report.

        Host model and text are the config's; the groups are the SAEs' own. Distances are measured.

        Args:
            directory: A new one.
            folders: Of SAEs that SAELens, sparsify, dictionary_learning or groupsae wrote, of the
                published Group-SAE weights, or of many of them below.
            format: What the folders are; by default what each looks like.
            layers: The member layers of each SAE; by default as they say themselves.

        Raises:
            InputError: A folder cannot be read, or the SAEs fit neither the host nor together.
        """
        from groupsae import imports
        from groupsae.interop import import_saes

        saes = import_saes(folders, format=format, layers=layers)
        config = imports.config_of(saes, config or Config())
        host = load_host(config.host)
        imports.check_host(saes, host)
        run = cls(directory, config, host=host)
        run.distances()
        run.groups()
        imports.place(saes, run.stages, folders)
        return run

    def sweep(self, vary: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Train and judge SAEs of several settings side by side, from the same activations.

        Every combination of the values is a member: an SAE per group and, if asked, one per layer,
        with these overrides of the run's config. Measures and groups first where that is not done.
        SAEs and `results.json` lie below `sweep/<name>/`, whose name stands for the combinations:
        those of other sweeps lie beside. A finished sweep is not repeated, a stopped one continues.

            run.sweep({"sae.k": [16, 32], "training.learning_rate": [1e-4, 3e-4]})

        Args:
            vary: Values by key, of those that may differ among SAEs of one forward.

        Returns:
            The content of `results.json`.
        """
        from groupsae.sweep import draw, judge, members_of

        members = members_of(self.config, vary)
        train_key, key = (self._key_of_sweep(stage, members) for stage in ("train", "evaluate"))
        folder = self.directory / "sweep" / train_key[:8]
        path = folder / "results.json"
        if not (path.exists() and read_json(path, key=str)["key"] == key):
            self._check_members(members)
            self.distances()
            self.groups()
            log.info("sweep: %d members, in %s", len(members), folder)
            self._train_members(members, folder, train_key)
            results = judge(
                members,
                self._partition().groups,
                folder / "saes",
                host=self.host,
                stream=self.corpus.held_out(),
                special=self.special,
            )
            write_json(path, {"name": folder.name, "key": key} | results)
        else:
            log.info("sweep %s: already done", folder.name)
        results = read_json(path, means=list[dict[str, Any]], rows=list[_Row])
        draw(results, self.directory / "figures", self.config.report.formats)
        return results

    def report(self) -> Path:
        """Write `report.html` and the figures; returns the page's path."""
        path = self.directory / "report.html"
        with self.stages.stage("report", path) as todo:
            if todo:
                from groupsae.report import write_report

                self.stages.need("distances.json", "distances")
                write_report(self.directory, formats=self.config.report.formats)
        return path

    def check(self) -> None:
        """Refuse before any work what would fail late: sizes that do not fit, a text too short.

        Text is counted up to ten million tokens, and not at all where it is streamed.
        """
        if self.stages.is_done("evaluate"):
            return
        self._check_sizes(self.config)
        if not self.stages.is_done("train"):
            self._check_processes(self.config)
            self._check_start(self.config)
            self._cached(self.layers)
        if self.corpus.documents.count is None:
            return
        config = self.config
        _require(self.corpus.held_out(), config.evaluation.tokens, "evaluation.tokens")
        if not self.corpus.repeat:
            tokens = config.grouping.distance_tokens
            _require(self.corpus.train(), tokens, "grouping.distance_tokens")
            stream, start = self.corpus.train(), self._start
            if start is not None and not self.stages.is_done("train"):
                start.go_on(stream)
            _require(stream, config.training.tokens, "training.tokens")

    def adopt(self, distances: Distances) -> PartitionTable:
        """Group by distances from elsewhere instead of measuring them here. Needs no host model.

        All their layers are grouped, or those that `grouping.layers` lists. Costs are predicted
        where `host.n_layers` and `host.d_model` are declared.

        Raises:
            InputError: If the directory holds other distances.
        """
        from groupsae.grouping.matrix import load_distances
        from groupsae.grouping.table import PartitionTable

        path = self.directory / "distances.json"
        with self.stages.stage("distances", path) as todo:
            if todo:
                (self.directory / "moments.safetensors").unlink(missing_ok=True)
                write_json(path, distances.to_json())
            elif load_distances(path).to_json() != distances.to_json():
                raise InputError(
                    f"{self.directory} holds other distances; choose another directory with --out"
                )
        path = self.directory / "partition.json"
        with self.stages.stage("groups", path) as todo:
            if todo:
                declared = self.config.host.n_layers and self.config.host.d_model
                cost = self.cost() if declared else None
                write_json(path, grouped(distances, self.config, cost).to_json())
        return PartitionTable.from_json(read_json(path))

    def attached(
        self,
        model: PreTrainedModel | None = None,
        *,
        layers: Sequence[int] | None = None,
        partition: str = "groups",
        where: Where | None = None,
    ) -> AbstractContextManager[Attached]:
        """Attach SAEs to a model of transformers, to record, splice and steer in its own forwards.

            with run.attached(model) as saes:
                saes.add(layer=4, latent=17, value=8.0)
                model.generate(**prompt)

        Args:
            model: By default the run's host model; else another of its kind.
            layers: By default all that the run covers.
            partition: "groups", "baseline", or "G=4" of several.
            where: As in :func:`groupsae.attached.attached`.
        """
        from groupsae.attached import attached, named

        saes = named(self.subjects(), partition).saes
        return attached(self.host, saes, model, layers=layers, special=self.special, where=where)

    def push(
        self,
        repository: str,
        *,
        private: bool = True,
        license: str | None = None,
        host_name: str | None = None,
    ) -> str:
        """Publish the run on the Hugging Face hub: see :func:`groupsae.interop.hub.push`."""
        from groupsae.interop.hub import push

        return push(
            self.directory, repository, private=private, license=license, host_name=host_name
        )

    def _train(self, team: Team) -> dict[str, Any]:
        """Train, and save the SAEs; returns the content of `training.json`."""
        from groupsae.training.session import train_saes

        partitions = self.partitions()
        layers = partitions[0].layers
        cached = self._cached(layers)
        if team.first:
            self._note_precision(layers)
        return train_saes(
            self.host,
            self.corpus.train(),
            self._moments(layers),
            list(dict.fromkeys(group for each in partitions for group in each.groups)),
            self.config,
            directory=self.directory,
            key=self.stages.key("train"),
            special=self.special,
            cached=cached,
            team=team,
        )

    @cached_property
    def _interpretation(self) -> Interpretation:
        from groupsae.interpreting import Interpretation

        return Interpretation(self)

    @property
    def _interpreted(self) -> Interpretation:
        """What the stage `interpret` has made."""
        self.stages.need("interpretation/depth.json", "interpret")
        return self._interpretation

    @property
    def _circuits(self) -> CircuitStage:
        from groupsae.circuits import CircuitStage

        return CircuitStage(self)

    def _what_was_equal(self) -> str:
        """What the SAEs that are compared had in common in training."""
        path = self.stages.need("training.json", "train")
        if "imported" in read_json(path):
            return "held-out tokens; the SAEs were trained elsewhere"
        tokens = read_json(path, tokens_per_sae=int)["tokens_per_sae"]
        after = self.config.training.init_from and ", after those of training.init_from"
        return f"training tokens per SAE ({tokens:,}{after or ''})"

    def _cached(self, layers: Sequence[int]) -> CachedActivations | None:
        """The activation cache that the config names, if it can be trained from."""
        from groupsae.training.activation_cache import open_activation_cache

        training = self.config.training
        if training.activation_cache is None:
            return None
        return open_activation_cache(
            Path(training.activation_cache),
            self.host,
            self.corpus.train(),
            layers=layers,
            tokens=self._tokens_to_cache,
            dtype=training.cache_dtype,
            exclude_special=self.config.tokens.exclude_special,
            shuffle=training.cache_shuffle,
            seed=training.seed,
        )

    @cached_property
    def _start(self) -> Start | None:
        """The run that training starts from, if it is one of this host model."""
        from groupsae.training.start import open_start

        return open_start(self.config, self.host)

    @property
    def _tokens_to_cache(self) -> int:
        """Tokens that an activation cache must hold: training's, and those that it passes over."""
        training, start = self.config.training, self._start
        before = 0 if start is None else start.tokens_read(self.corpus.train())
        return before + training.steps * training.batch_tokens

    def _check_start(self, config: Config) -> None:
        """Refuse a start from a run that has no SAE for a layer, or for a group that is known."""
        from groupsae.training.session import sae_config

        start, sae = self._start, config.sae
        if start is None:
            return
        groups: list[tuple[int, ...]] = [(layer,) for layer in self.layers]
        if self.stages.is_done("groups"):
            groups += [group for each in self.partitions() for group in each.groups]
        elif self.config.grouping.partition is not None:
            known = chosen_beforehand(self.config, self.layers)
            groups += [] if known is None else known.partition.groups
        for group in groups:
            start.source_of(sae_config(config, group, self.host.d_model), sae.affine)

    def _note_precision(self, layers: Sequence[int]) -> None:
        """Measure, once, what an explicit 16-bit `host.dtype` changes in the residual streams."""
        from groupsae.host.precision import beside_float32

        asked, stored = self.config.host, stored_config(self.directory)
        noted = stored is not None and "host_precision" in (stored.provenance or {})
        if asked.dtype not in ("bfloat16", "float16") or noted:
            return
        found = beside_float32(
            self.host,
            lambda: load_host(asked.model_copy(update={"dtype": "float32"})),
            self.corpus.train(),
            layers,
            self.special,
        )
        if found is not None:
            log.info("%s", found)
            self.stages.note_provenance(host_precision=str(found))

    def _check_sizes(self, config: Config) -> None:
        from groupsae.sae.kernels import choose
        from groupsae.training.session import sae_config

        sae_config(config, self.layers, self.host.d_model)
        choose(config.training.kernel, self.host.device)
        config.training.weights_of(self.layers)
        if not self.stages.is_done("groups"):
            chosen_beforehand(self.config, self.layers)

    def _check_processes(self, config: Config) -> None:
        from groupsae.training.session import mesh_of
        from groupsae.training.team import Team

        mesh_of(self._team or Team(), [config.sae], config.training, self.host.d_model)

    def _measure(self, layers: Sequence[int]) -> dict[str, Any]:
        """Measure the layers: keeps their moments, returns the content of `distances.json`."""
        from groupsae.grouping.matrix import threshold_note
        from groupsae.measurement import measure_layers, save_moments

        asked = self.config.grouping
        result = measure_layers(
            self.host,
            self.corpus.train(),
            layers,
            tokens=asked.distance_tokens,
            batch_contexts=self.config.training.host_batch_contexts,
            center=asked.center,
            similarity=asked.similarity,
            special=self.special,
        )
        save_moments(result.moments, self.directory / "moments.safetensors")
        note = threshold_note(asked.similarity)
        if note is not None and asked.groups is None and asked.partition is None:
            log.warning("%s", note)
        notes = {} if note is None else {"threshold_note": note}
        return result.distances.to_json() | {"excluded_special_tokens": result.excluded} | notes

    def _key_of_sweep(self, stage: str, members: Iterable[Member]) -> str:
        """Identifies what the members and the run's own seed, that of the batches, make."""
        keys = [(member.name, self.stages.key(stage, member.config)) for member in members]
        content = json.dumps([self.config.training.seed, keys])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def _check_members(self, members: Iterable[Member]) -> None:
        """Refuse before any work what would fail late, as :meth:`check` does."""
        self.check()
        for member in members:
            try:
                self._check_sizes(member.config)
                self._check_start(member.config)
            except InputError as error:
                raise InputError(f"sweep member {member.name}: {error}") from error

    def _train_members(self, members: Sequence[Member], folder: Path, key: str) -> None:
        from groupsae.sweep import entries
        from groupsae.training.session import train_entries

        path = folder / "training.json"
        if not path.exists():
            partition = self._partition()
            cached = self._cached(partition.layers)
            self._note_precision(partition.layers)
            vary = {member.name: member.overrides for member in members}
            write_json(folder / "members.json", vary)
            summary = train_entries(
                self.host,
                self.corpus.train(),
                self._moments(partition.layers),
                entries(members, partition.groups),
                self.config,
                directory=folder,
                key=key,
                special=self.special,
                cached=cached,
            )
            write_json(path, summary)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # no more of use

    def _moments(self, layers: Sequence[int]) -> Moments:
        """The layers' moments, measured now if the distances came from elsewhere."""
        from groupsae.measurement import load_moments

        path = self.directory / "moments.safetensors"
        if not (path.exists() and set(layers) <= set(load_moments(path).layers)):
            self._measure(layers)
        return load_moments(path)


def _require(stream: TokenStream, tokens: int, key: str) -> None:
    try:
        stream.require(min(tokens, _COUNTED_BEFOREHAND))
    except InputError as error:
        raise InputError(f"{key}={tokens}: {error}") from error
