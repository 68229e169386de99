"""Who takes part, by which driver, and in which environment."""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from groupsae.errors import InputError

CEILING = "ceiling"
"""Not a contestant: the machine's own matrix products, measured in every round."""


@dataclass(frozen=True)
class Contestant:
    """One library, set up in one way.

    Attributes:
        distribution: What is to be installed.
        driver: Module under `benchmarks.drivers`.
        host_dtype: Of the host model's forward. SAEs are float32 everywhere.
        back_end: What computes an SAE's step; for groupsae the name of its kernel.
        products: In which data types the encoder's product may be made; the fastest counts for
            the floor.
    """

    name: str
    distribution: str
    driver: str
    host_dtype: str
    back_end: str
    products: tuple[str, ...] = ("float32",)

    @property
    def ours(self) -> bool:
        return self.distribution == "groupsae"

    @property
    def library(self) -> str:
        """What its environment is named by on the command line."""
        return "groupsae" if self.ours else self.name


def known(device: str) -> dict[str, Contestant]:
    """All contestants for a device, by name. On a GPU every host is bfloat16."""
    if device == "cpu":
        screened = ("float32", "int8")  # the compiled step screens in 8 bits, rescores in float32
        ours = [
            Contestant("groupsae-torch", "groupsae", "groupsae_", "float32", "torch"),
            Contestant("groupsae-cpu", "groupsae", "groupsae_", "float32", "cpu", screened),
            Contestant("groupsae-cpu-bf16", "groupsae", "groupsae_", "bfloat16", "cpu", screened),
        ]
        dtype, autocast = "float32", ("float32",)
    else:
        dtype, autocast = "bfloat16", ("bfloat16",)  # which sparsify sets on GPUs
        ours = [
            Contestant("groupsae-torch", "groupsae", "groupsae_", dtype, "torch"),
            Contestant("groupsae-triton", "groupsae", "groupsae_", dtype, "triton"),
        ]
    peers = [
        Contestant("sparsify", "eai-sparsify", "sparsify_", dtype, "PyTorch", autocast),
        Contestant("sae-lens", "sae-lens", "saelens_", dtype, "PyTorch"),
        Contestant(
            "dictionary-learning", "dictionary-learning", "dictionary_learning_", dtype, "PyTorch"
        ),
    ]
    return {contestant.name: contestant for contestant in [*ours, *peers]}


@dataclass(frozen=True)
class Entry:
    """A contestant in this run.

    Attributes:
        python: The interpreter that runs its driver.
        versions: Of the packages there.
        groups: Number of groups G; None for one SAE per layer.
        dead: Share of latents that are made dead.
    """

    contestant: Contestant
    python: Path
    versions: Mapping[str, str]
    groups: int | None = None
    dead: float = 0.0

    @property
    def label(self) -> str:
        groups = "" if self.groups is None else f", G={self.groups}"
        dead = f", {self.dead:.0%} dead" if self.dead else ""
        return f"{self.contestant.name}{groups}{dead}"

    def with_groups(self, groups: int) -> Entry:
        """The same with so many groups."""
        return replace(self, groups=groups)

    def with_dead(self, share: float) -> Entry:
        """The same with a share of its latents dead."""
        return replace(self, dead=share)


def enter(
    contestants: Iterable[Contestant], pythons: Mapping[str, Path], *, named: bool
) -> tuple[list[Entry], list[str]]:
    """Find every contestant's environment.

    Args:
        pythons: Interpreters by library; by default the one that runs this.
        named: The user named them: one that is not installed is an error.

    Returns:
        The entries, and a line for each contestant that is left out.

    Raises:
        InputError: An interpreter does not run, or lacks what it was named for.
    """
    entries, left_out = [], []
    for contestant in contestants:
        library, distribution = contestant.library, contestant.distribution
        python = pythons.get(library, Path(sys.executable))
        versions = installed(python, [distribution, "torch", "transformers"])
        if distribution in versions:
            entries.append(Entry(contestant, python, versions))
            continue
        missing = f"{contestant.name}: {distribution} is not installed for {python}"
        if named or library in pythons:
            raise InputError(
                f"{missing}; install it there, or name another environment's interpreter with "
                f"--python {library}=PATH (see benchmarks/README.md)"
            )
        left_out.append(missing)
    return entries, left_out


def selected(names: str | None, among: Mapping[str, Contestant]) -> list[Contestant]:
    """The contestants of a comma-separated list; all if it is None.

    Raises:
        InputError: A name is not known.
    """
    if names is None:
        return list(among.values())
    chosen = [name.strip() for name in names.split(",")]
    _check_names("--contestants", chosen, among)
    return [among[name] for name in dict.fromkeys(chosen)]


def read_pythons(options: Sequence[str], among: Mapping[str, Contestant]) -> dict[str, Path]:
    """Interpreters by library, as given by `--python LIBRARY=PATH`.

    Raises:
        InputError: It is not of that form, there is no such library, or no such file.
    """
    libraries = {contestant.library: contestant for contestant in among.values()}
    pythons = {}
    for option in options:
        name, separator, path = option.partition("=")
        if not separator:
            raise InputError(
                f"--python {option}: write LIBRARY=PATH, as in sparsify=/venv/bin/python"
            )
        _check_names("--python", [name], libraries)
        pythons[name] = Path(path).expanduser().absolute()  # a venv's link must stay a link
        if not pythons[name].is_file():
            raise InputError(f"--python {option}: there is no such file")
    return pythons


def installed(python: Path, distributions: Sequence[str]) -> dict[str, str]:
    """Versions of those that are installed for an interpreter.

    Raises:
        InputError: It does not run.
    """
    code = (
        "import json, sys\n"
        "from importlib.metadata import PackageNotFoundError, version\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        found[name] = version(name)\n"
        "    except PackageNotFoundError:\n"
        "        continue\n"
        "print(json.dumps(found))\n"
    )
    try:
        answer = subprocess.run(
            [python, "-c", code, *distributions], capture_output=True, text=True, check=True
        )
        versions: dict[str, str] = json.loads(answer.stdout)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise InputError(f"{python} is no Python interpreter that runs: {error}") from error
    return versions


def _check_names(option: str, names: Iterable[str], among: Mapping[str, object]) -> None:
    for name in names:
        if name not in among:
            near = difflib.get_close_matches(name, among, n=1)
            meant = f"did you mean {near[0]}?" if near else f"known are {', '.join(among)}"
            raise InputError(f"{option} {name}: there is no such contestant; {meant}")
