"""What a run works with: its config, host model, text, partitions and trained SAEs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from groupsae.config import Config, HostConfig
from groupsae.directory import RunDirectory, read_json
from groupsae.errors import InputError
from groupsae.planning import cost_model, covered_layers

if TYPE_CHECKING:
    import torch

    from groupsae.evaluation.subject import Subject
    from groupsae.grouping.cost import CostModel
    from groupsae.grouping.partition import Partition
    from groupsae.host.model import HostModel
    from groupsae.host.tokens import Corpus
    from groupsae.interop import Metadata
    from groupsae.sae import SAE
    from groupsae.sae.layer import LayerSAE
    from groupsae.training.team import Team


class OpenRun:
    """A run directory with all that its config names; arguments as of :class:`groupsae.Run`.

    Host model and text are opened when they are first needed.
    """

    def __init__(
        self,
        directory: Path | str,
        config: Config | None = None,
        *,
        redo: bool = False,
        host: HostModel | None = None,
        team: Team | None = None,
    ) -> None:
        self.directory = local_directory(directory)
        self._host, self._team = host, team
        others = team is not None and not team.first
        self.stages = RunDirectory(self.directory, config, redo=redo, read_only=others)
        self.config = self.stages.config

    def partitions(self) -> list[Partition]:
        """The partitions that SAEs are trained for: the chosen one, then `training.also_groups`.

        Raises:
            InputError: If there is none of a number of groups that is asked for.
        """
        from groupsae.grouping.table import PartitionTable

        table = read_json(self.stages.need("partition.json", "groups"))
        partitions = PartitionTable.from_json(table)
        asked = self.config.training.also_groups
        known = {G: row.partition for G, row in partitions.by_groups.items()}
        for G in () if asked == "all" else asked:
            if G not in known:
                raise InputError(
                    f"training.also_groups: there is no partition into {G} groups; known are "
                    f"{', '.join(map(str, sorted(known)))}"
                )
        others = sorted(set(known if asked == "all" else asked) - {partitions.chosen})
        return [known[G] for G in (partitions.chosen, *others)]

    def subjects(self) -> list[Subject]:
        """The trained SAEs by partition: the chosen one, the others, the baseline, all by layer."""
        from groupsae.evaluation.subject import Subject
        from groupsae.sae import directory_name

        saes = self.saes()
        found = []
        for partition in self.partitions():
            own = {group: saes[directory_name(group)] for group in partition.groups}
            by_layer = {layer: sae for group, sae in own.items() for layer in group}
            found.append(Subject("groups", by_layer))
        baseline = self._of_each_layer(saes, "baseline")
        return found + ([Subject("baseline", baseline)] if baseline else [])

    def saes(self) -> dict[str, SAE]:
        """All trained SAEs by name.

        `layers-03-06` for groups, `baseline/layers-03` for layers, `twin/layers-03` for those of
        another seed.
        """
        from groupsae.sae import SAE

        names = read_json(self.stages.need("training.json", "train"), saes=list[str])["saes"]
        root = self.directory / "saes"
        saes: dict[str, SAE] = {}
        for name in sorted(names, key=lambda name: name.startswith("baseline/")):
            group = name.removeprefix("baseline/")  # a group of one layer is its own baseline
            saes[name] = saes[group] if group in saes else SAE.load(root / name, self._device)
        return {name: saes[name] for name in names}

    def sae(self, layer: int) -> SAE:
        """The SAE of the group that `layer` belongs to."""
        from groupsae.sae import SAE, directory_name

        self.stages.need("training.json", "train")
        group = self._partition().group_of(layer)
        return SAE.load(self.directory / "saes" / directory_name(group), self._device)

    def layer_sae(self, layer: int) -> LayerSAE:
        """The SAE of the layer's group as that layer sees it: raw residual streams in and out."""
        return self.sae(layer).at(layer)

    @cached_property
    def host(self) -> HostModel:
        """The host model, loaded when first asked for."""
        asked = self.config.host
        host = self._host or load_host(asked)
        for key in ("n_layers", "d_model"):
            declared, actual = getattr(asked, key), getattr(host, key)
            if declared not in (None, actual):
                raise InputError(
                    f"host.{key}: {declared} is declared, but {asked.name} has {actual}"
                )
        self.stages.note_provenance(host_fingerprint=host.fingerprint())
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
            on_error=tokens.on_error,
            retries=tokens.retries,
            prepend_bos=tokens.prepend_bos,
            vocab_size=self.host.vocab_size,
            model_context_length=self.host.context_length,
        )

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers to cover."""
        return covered_layers(self.config, self.host.n_layers)

    def cost(self) -> CostModel:
        """The paper's FLOP cost model for this host and dictionary."""
        asked = self.config.host
        return cost_model(
            self.config, asked.n_layers or self.host.n_layers, asked.d_model or self.host.d_model
        )

    @property
    def special(self) -> frozenset[int]:
        """The token ids that are left out of everything: none where they are to count."""
        return self.host.special_token_ids if self.config.tokens.exclude_special else frozenset()

    @property
    def _device(self) -> torch.device:
        """Where SAEs go: known without the host model."""
        from groupsae.host.loading import resolve_device

        return resolve_device(self.config.host.device)

    def _partition(self) -> Partition:
        """The groups that were chosen."""
        return self.partitions()[0]

    def _of_each_layer(self, saes: Mapping[str, SAE], folder: str) -> dict[int, SAE]:
        """Those of one layer each that lie in a folder, by layer."""
        found = {sae.layers[0]: sae for name, sae in saes.items() if name.startswith(f"{folder}/")}
        return dict(sorted(found.items()))

    def _metadata(self) -> Metadata:
        """Where the SAEs come from, as other libraries are told."""
        from groupsae.grouping.table import PartitionTable
        from groupsae.host.tokens import joints_of
        from groupsae.interop import Metadata

        tokens = self.config.tokens
        table = PartitionTable.from_json(read_json(self.directory / "partition.json"))
        return Metadata(
            model_name=self.config.host.name,
            block_path=self.host.block_path,
            context_size=tokens.context_length,
            prepend_bos=joints_of(self.host.tokenizer, tokens.prepend_bos).bos is not None,
            dataset=tokens.source,
            exclude_special_tokens=tokens.exclude_special,
            amad=table.by_groups[table.chosen].amad,
        )


def local_directory(name: Path | str, into: Path | None = None) -> Path:
    """The folder of a run; `hub://USER/REPO[@REVISION]` is fetched first, to `into` if given."""
    if not str(name).startswith("hub:/"):  # a Path has lost a slash
        return Path(name)
    from groupsae.interop.hub import open_hub_run

    return open_hub_run(name, into=into)


def load_host(asked: HostConfig) -> HostModel:
    from groupsae.host.model import HostModel

    return HostModel.load(
        asked.name, revision=asked.revision, dtype=asked.dtype, device=asked.device
    )
