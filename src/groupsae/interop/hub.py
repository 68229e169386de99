"""Runs on the Hugging Face hub: published with a model card, and read from there."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from groupsae.errors import InputError
from groupsae.interop.card import model_card
from groupsae.interop.publication import Content, publication

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

CARD = "README.md"

log = logging.getLogger(__name__)

_HUB = re.compile(r"hub:/{1,2}(?P<repository>[^@]+)(?:@(?P<revision>.+))?")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_READ = ("*.json", "*.safetensors", "*.yaml", "*.md")
_SAE_FILES = ("*.json", "*.safetensors", "*.pt")
_BESIDE = ("config.json", "scaling_factors.pt")
_HUB_FOLDER = re.compile(
    r"hub:/{1,2}(?P<repository>[^@/]+/[^@/]+)(?P<folder>/[^@]*)?(?:@(?P<revision>.+))?"
)
_NEEDED = ("config.yaml", "stages.json", "training.json")
_OWN_FOLDERS = ("saes/", "evaluation/", "figures/")
_ANYBODYS = {".gitattributes", CARD, "LICENSE", "LICENSE.md", "LICENSE.txt"}


def push(
    directory: Path,
    repository: str,
    *,
    private: bool = True,
    license: str | None = None,
    host_name: str | None = None,
) -> str:
    """Publish a trained run: its SAEs, config, findings and figures, and a model card.

    The repository is made where it is missing. One commit replaces an earlier publication. The
    token is that of `hf auth login` or `HF_TOKEN`: it goes to the hub alone.

    Args:
        repository: USER/REPO.
        private: Whether nobody else may see it. An existing repository that others can see is
            refused where this holds.
        license: The hub's identifier of a licence, for the model card.
        host_name: The host model's name on the hub, where the run has it from a local folder.

    Returns:
        The repository's address.

    Raises:
        InputError: There is nothing to publish, the name is none, the repository holds something
            else or is public, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import get_token

    _check_name(repository)
    published = publication(directory, host_name=host_name)
    card = model_card(published, repository, license=license)
    for key in published.local:
        mend = "; host_name (--host-name) names it for others" if key == "host.name" else ""
        log.warning("%s is a local path: of it the hub gets its last name at most%s", key, mend)
    if _asked(repository, get_token) is None:
        raise InputError(
            f"{repository} cannot be written without a token: log in with `hf auth login`, or set "
            "HF_TOKEN"
        )
    files = {**published.files, CARD: card.encode()}
    return _asked(repository, lambda: _commit(repository, files, private=private))


def download(repository: str, revision: str | None = None, *, into: Path | None = None) -> Path:
    """Fetch a published run: its JSON, YAML, Markdown and safetensors files, and no others.

    Without a network, what was fetched before is taken.

    Args:
        revision: Branch, tag or commit.
        into: The folder to write to; by default the hub's cache, which is not meant to be changed.

    Returns:
        The run directory.

    Raises:
        InputError: The repository is not there or not a run's, holds file names that lead out of
            its folder, or the hub refuses or cannot be reached.
    """
    return _fetch(repository, revision, _READ, _check_run, into=into)


def download_saes(name: str | Path) -> Path:
    """Fetch SAEs of any library: `hub://USER/REPO[/FOLDER][@REVISION]`, for `groupsae import`.

    JSON, safetensors and torch state dicts are fetched, and no others: what lies in the folder, and
    configurations and scales beside it.

    Returns:
        The folder.

    Raises:
        InputError: As :func:`download`; or there is no such folder.
    """
    match = _HUB_FOLDER.fullmatch(str(name))
    if match is None:
        raise InputError(f"{name} is nothing on the hub; write it as hub://USER/REPO/FOLDER")
    folder = (match["folder"] or "").strip("/")
    parents = [str(parent) for parent in PurePosixPath(folder).parents] if folder else []
    beside = [str(PurePosixPath(parent) / file) for parent in parents for file in _BESIDE]
    below = f"{folder}/" if folder else ""

    def check(repository: str, names: Sequence[str]) -> None:
        _check_names(repository, names)
        if not any(name.startswith(below) for name in names):
            raise InputError(f"{repository} has no folder {folder!r}; it holds {_listed(names)}")

    patterns = [*beside, *(below + pattern for pattern in _SAE_FILES)]
    return _fetch(match["repository"], match["revision"], patterns, check) / folder


def open_hub_run(
    name: str | Path, revision: str | None = None, *, into: Path | None = None
) -> Path:
    """The run directory of `hub://USER/REPO`, fetched where it is not in the cache.

    Args:
        name: As a path, too, which has lost a slash.
        revision: Branch, tag or commit; or in the name, after an @.
        into: A folder of one's own for it. Where this holds a run already, it stays as it is.

    Raises:
        InputError: As :func:`download`.
    """
    match = _HUB.fullmatch(str(name))
    if match is None:
        raise InputError(f"{name} is no run on the hub; write it as hub://USER/REPO")
    if into is not None and (into / "config.yaml").exists():
        return into
    return download(match["repository"], revision or match["revision"], into=into)


def _fetch(
    repository: str,
    revision: str | None,
    patterns: Sequence[str],
    check: Callable[[str, Sequence[str]], None],
    *,
    into: Path | None = None,
) -> Path:
    """The repository's files of these patterns, from the cache where the hub cannot be reached."""
    from huggingface_hub import snapshot_download

    _check_name(repository)
    at = repository if revision is None else f"{repository}@{revision}"
    names: list[str] | None = None
    try:
        names = _asked(at, lambda: _api().list_repo_files(repository, revision=revision))
    except _UnreachableError:
        log.info("the hub cannot be reached; %s is looked for in its cache", at)
    if names is not None:
        check(at, names)

    def fetch() -> str:
        return snapshot_download(
            repository,
            revision=revision,
            local_dir=into,
            local_files_only=names is None,
            allow_patterns=list(patterns),
            library_name="groupsae",
            library_version=version("groupsae"),
        )

    folder = Path(_asked(at, fetch))
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    check(at, found)
    return folder


class _UnreachableError(InputError):
    """There is no answer from the hub."""


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(library_name="groupsae", library_version=version("groupsae"))


def _commit(repository: str, files: Mapping[str, Content], *, private: bool) -> str:
    """Put the files into the repository, made where it is missing; returns its address."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api = _api()
    address = str(api.create_repo(repository, private=private, exist_ok=True))
    if private and api.repo_info(repository).private is False:
        raise InputError(
            f"{repository} exists and is public; publish for everybody with private=False "
            "(--public), or choose another name"
        )
    there = set(api.list_repo_files(repository))
    if there - _ANYBODYS and "training.json" not in there:
        raise InputError(
            f"{repository} holds something else ({min(there - _ANYBODYS)}); choose another name"
        )
    stale = sorted(name for name in there - set(files) if name.startswith(_OWN_FOLDERS))
    api.create_commit(
        repository,
        [
            *(CommitOperationAdd(name, content) for name, content in files.items()),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message=f"A run of groupsae {version('groupsae')}",
    )
    return address


def _asked(repository: str, ask: Callable[[], T]) -> T:
    """What `ask` gives; what huggingface_hub raises in it becomes one message.

    It has no cause or context: a malformed header's message, for one, holds the token.

    Raises:
        InputError: Naming the repository, the reason and the mend; without any token.
    """
    try:
        return ask()
    except InputError:
        raise
    except Exception as error:  # whatever the library, and what it asks with, raise
        refusal = _refusal(repository, error)
    raise refusal


def _refusal(repository: str, error: Exception) -> InputError:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    status = getattr(getattr(error, "response", None), "status_code", None)
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return _UnreachableError(
            f"{repository} cannot be reached: HF_HUB_OFFLINE is set; unset it, or name a local run"
        )
    if isinstance(error, LocalEntryNotFoundError):
        return _UnreachableError(
            f"{repository} cannot be reached, and is not in the hub's cache; connect to the "
            "network, or name a local run"
        )
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"{repository} has no such revision; name a branch, a tag or a commit")
    if isinstance(error, GatedRepoError) or status == 403:
        return InputError(
            f"the hub refuses access to {repository}: the token may not do that; ask its owner, or "
            f"{log_in} with a token that may (to publish, one that may write)"
        )
    if status == 404:
        return InputError(
            f"there is no {repository} on the hub, or none that the token may see; check the name, "
            f"or {log_in}"
        )
    if status == 401:
        return InputError(
            f"the hub does not let {repository} be read or written: it is not there, or the token "
            f"is missing or not valid; check the name, or {log_in}"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return InputError(
            f"{repository} cannot be written to this disk: {error.strerror}: {error.filename}; "
            "mend that, or choose another folder"
        )
    reason = _without_tokens(f"{type(error).__name__}: {' '.join(str(error).split())}")
    if status is None and not isinstance(error, ValueError | TypeError | AttributeError):
        return _UnreachableError(
            f"{repository} cannot be reached ({reason[:300]}); check the network, and try again"
        )
    return InputError(f"the hub refuses {repository}: {reason[:600]}")


def _without_tokens(text: str) -> str:
    return re.sub(r"(?i)bearer\s+[^'\"]+|\bhf_[^\s'\"]+", "[token]", text)


def _check_name(repository: str) -> None:
    if not _REPOSITORY.fullmatch(repository):
        raise InputError(f"{repository!r} is no repository of the hub; write USER/REPO")


def _check_names(repository: str, names: Sequence[str]) -> None:
    """Refuse names that would be written outside the folder."""
    for name in names:
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
            raise InputError(
                f"{repository} holds a file name that leads out of its folder: {name!r}; it is not "
                "read"
            )


def _check_run(repository: str, names: Sequence[str]) -> None:
    """Refuse what is no run, too."""
    _check_names(repository, names)
    missing = [name for name in _NEEDED if name not in names]
    if missing:
        raise InputError(
            f"{repository} holds no run of groupsae: {', '.join(missing)} is missing; SAEs of "
            f"another library are read by `groupsae import hub://{repository}`"
        )


def _listed(names: Sequence[str]) -> str:
    folders = sorted({str(PurePosixPath(name).parent) for name in names})
    return ", ".join(folders[:10]) + (", ..." if len(folders) > 10 else "")
