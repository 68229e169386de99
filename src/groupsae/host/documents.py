"""Where text comes from: the documents of any source, in a shuffled order one can re-enter.

Files and folders are read by the `datasets` library and lie in its on-disk cache, so a corpus may
be larger than memory; hub data sets are streamed and never stored. A stream that breaks off is read
again; what cannot be read stops the run or is passed over, as `tokens.on_error` says.
"""

from __future__ import annotations

import copy
import errno
import glob
import hashlib
import logging
import mmap
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from groupsae.errors import InputError
from groupsae.host.faults import BrokenText, Fault, OnError, Retries, causes_of, reason_of

_log = logging.getLogger(__name__)

BUNDLED = "bundled"
"""The name of the source that needs neither a file nor a network: generated English."""

COLUMNS = ("text", "tokens", "input_ids")
"""Where documents are looked for when no column is named."""

END_OF_DOCUMENT = "<|endoftext|>"
"""What separates the documents of a .txt file that uses it."""

BUNDLED_SEED = 2_000_000  # away from the seeds of the bundled model's training script
_BLOCK = 1000  # documents read at a time; a stream is shuffled within such a block
_PIECE = 2_000  # characters after which a .txt file without markers is cut at the next blank line
_LONGEST_PIECE = 20_000  # ... and here it is cut at the next line end, blank or not

_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves in a folder
_BUILDERS = {
    ".txt": "txt",
    ".jsonl": "json",
    ".json": "json",
    ".jsonl.gz": "json",
    ".jsonl.zst": "json",
    ".parquet": "parquet",
}


class Position(NamedTuple):
    """A place in a source's order; JSON keeps it as a list."""

    epoch: int
    document: int
    """Its number in this epoch's order."""
    bookmark: dict[str, Any] | None = None
    """What a stream needs to find its place again without reading up to it."""


class Document(NamedTuple):
    """One document, as text or as token ids; None where the row holds nothing."""

    position: Position
    content: str | np.ndarray | None
    fault: Fault | None = None
    """What was passed over here, in place of a document."""


@runtime_checkable
class Documents(Protocol):
    """A corpus as documents."""

    count: int | None
    """How many there are; None where that is unknown or endless."""

    def read(self, start: Position) -> Iterator[Document]:
        """The documents of one epoch from `start` on: always the same ones for the same place."""
        ...

    def identity(self) -> str:
        """Differs between corpora that differ; does not depend on where a file lies."""
        ...


def open_documents(
    source: str | Path,
    *,
    split: str = "train",
    subset: str | None = None,
    column: str | None = None,
    revision: str | None = None,
    seed: int = 0,
    on_error: OnError = "stop",
    retries: Retries = Retries(),  # noqa: B008, it is frozen
) -> Documents:
    """Open `source`: "bundled", a file, a folder, or the name of a hub data set.

    - Files: .txt, .jsonl (.json, .jsonl.gz, .jsonl.zst), .parquet. The documents of a .txt file are
      what lies between `<|endoftext|>` markers; without any, neighbouring paragraphs (separated by
      blank lines) are joined into pieces of about 2,000 characters, and each piece is a document.
    - Folders: of such files, all of one type, with splits told by file and folder names as
      `datasets` does it (train.jsonl, validation/...; files without such a name are "train"), or
      as written by `save_to_disk`.
    - Hub data sets are streamed; `subset` is the configuration where there are several.

    `column` names the column of text or of lists of token ids; by default the one of `text`,
    `tokens`, `input_ids` that is there.

    A stream that breaks off is read again, `retries` times. Where that does not help, and where a
    row is neither text nor token ids, reading raises BrokenText or, with `on_error` "skip", passes
    over the row or the rest of the stream's file: a :class:`Document` with a `fault` tells of it.
    So it is with the files of a folder that cannot be read, and these are told of at its beginning.

    Raises InputError where there is nothing readable, or no such split or column.
    """
    if source == BUNDLED:
        return _Bundled(seed)
    path = Path(source).expanduser()
    if path.exists():
        with _explained(source):
            dataset, faults = _load(path, split, subset, on_error)
        column = _column(source, dataset.column_names, column)
        return _Indexed(dataset, column, source, seed, on_error, faults)
    if _is_path(source) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise InputError(
            f"tokens.source={str(source)!r}: no such file or folder (looked at {path.absolute()}). "
            f"Check the path, or use tokens.source={BUNDLED}."
        )
    return _Streamed(str(source), split, subset, column, revision, seed, on_error, retries)


class _Indexed:
    """Local rows, any of which can be read at once: each epoch is a permutation of all of them."""

    def __init__(
        self,
        dataset: Any,
        column: str,
        source: str | Path,
        seed: int,
        on_error: OnError,
        faults: list[Fault],
    ) -> None:
        self.count: int | None = len(dataset)
        self._rows = dataset.select_columns([column]).with_format(None)
        self._column, self._source, self._seed = column, source, seed
        self._on_error: OnError = on_error
        self._faults = faults
        if on_error == "stop" and not _surely_text_or_ids(self._rows.features[column]):
            for first in range(0, len(dataset), _BLOCK):  # now, rather than deep in a run
                self._read_rows(np.arange(first, min(first + _BLOCK, len(dataset))))

    def read(self, start: Position) -> Iterator[Document]:
        if start[:2] == (0, 0):
            yield from (Document(start, None, fault) for fault in self._faults)
        order = np.random.default_rng([self._seed, start.epoch]).permutation(len(self._rows))
        for first in range(start.document, len(order), _BLOCK):
            contents = self._read_rows(order[first : first + _BLOCK])
            for index, content in enumerate(contents, start=first):
                yield _document(Position(start.epoch, index), content)

    def identity(self) -> str:
        sample = np.unique(np.linspace(0, len(self._rows) - 1, 64).astype(int))
        contents = self._read_rows(sample) if len(self._rows) else []
        return f"{self._column} {len(self._rows)} {_digest(contents)}"

    def _read_rows(self, rows: np.ndarray) -> list[_Content]:
        with _explained(self._source):
            values = self._rows[rows.tolist()][self._column]
        return [
            _content(value, row, self._column, self._source, self._on_error)
            for row, value in zip(rows.tolist(), values, strict=True)
        ]


class _Streamed:
    """A hub data set, read in its own order and shuffled within blocks of 1,000 documents."""

    count: int | None = None

    def __init__(
        self,
        name: str,
        split: str,
        subset: str | None,
        column: str | None,
        revision: str | None,
        seed: int,
        on_error: OnError,
        retries: Retries,
    ) -> None:
        import datasets

        self._name, self._seed = name, seed
        self._on_error: OnError = on_error
        self._retries = retries
        self._identity = [name, subset, revision, split]
        with _explained(name), _quiet():
            self._stream = datasets.load_dataset(
                name, subset, split=split, revision=revision, streaming=True
            )
            columns = self._stream.column_names
            if columns is None:
                columns = list(self._first_row())
        self._column = _column(name, columns, column)

    def read(self, start: Position) -> Iterator[Document]:
        number, first = divmod(start.document, _BLOCK)
        reader = _Reader(
            self._stream, self._name, self._column, self._on_error, self._retries, start.bookmark
        )
        while (block := reader.block(number)).contents:
            bookmark = {
                "state": block.state,
                "digest": _digest(block.contents),
                "passed": [list(passed) for passed in reader.passed],
            }
            seeds = [self._seed, start.epoch, number]
            order = np.random.default_rng(seeds).permutation(len(block.contents))
            if first == 0:
                for fault in reader.faults(number):
                    yield Document(Position(start.epoch, number * _BLOCK, bookmark), None, fault)
            for index in range(first, len(block.contents)):
                position = Position(start.epoch, number * _BLOCK + index, bookmark)
                yield _document(position, block.contents[order[index]])
            number, first = number + 1, 0

    def identity(self) -> str:
        return " ".join(str(part) for part in [*self._identity, self._column])

    def _first_row(self) -> dict[str, Any]:
        failures = 0
        while True:
            try:
                return next(iter(_own(self._stream)), {})
            except Exception as error:
                failures += 1
                if not self._retries.wait(failures, self._name, error):
                    raise


class _Block(NamedTuple):
    """What a block of a stream holds, and the state of `datasets` before it."""

    contents: list[_Content]
    state: dict[str, Any] | None


class _Passed(NamedTuple):
    """A place where the stream broke off for good; saved, so that it is passed over again."""

    block: int
    row: int
    """How many rows of the block came before it."""
    state: dict[str, Any]
    """Where reading went on: at the next file."""
    reason: str


class _Known(NamedTuple):
    """A block that was read before, by which to find the way back."""

    number: int
    state: dict[str, Any] | None
    digest: str


class _Reader:
    """A streamed data set of one's own, so that readers keep their own places, read block by block.

    Args:
        bookmark: Of the first block that is asked for, where there is one.
    """

    def __init__(
        self,
        stream: Any,
        name: str,
        column: str,
        on_error: OnError,
        retries: Retries,
        bookmark: dict[str, Any] | None,
    ) -> None:
        self._stream, self._name, self._column = stream, name, column
        self._on_error: OnError = on_error
        self._retries = retries
        self._bookmark = bookmark
        self._known: _Known | None = None
        self._rows: Iterator[dict[str, Any]] | None = None  # None: the place is to be found
        self._place: dict[str, Any] | None = None  # what `datasets` calls the end of the last block
        self._state: dict[str, Any] | None = None  # ... and the beginning of this one
        self._filling = -1  # its number
        self.passed = [_Passed(*passed) for passed in (bookmark or {}).get("passed", ())]

    def block(self, number: int) -> _Block:
        """Block `number`, empty at the end; in one reader, blocks are asked for one after another.

        Raises:
            BrokenText: The stream breaks off, however often it is read again, and is not to be
                passed over; or a row is neither text nor token ids.
            InputError: The stream is not the one of the bookmark.
        """
        if self._bookmark is not None:
            self._known = _Known(number, self._bookmark["state"], self._bookmark["digest"])
            self._bookmark = None
        values: list[Any] = []
        failures = 0
        while True:
            try:
                self._read(number, values)
                break
            except InputError:
                raise
            except Exception as error:  # whatever a connection or a damaged file leads to
                self._rows = None
                failures += 1
                if not self._retries.wait(failures, self._name, error):
                    self._pass_over(number, len(values), error)
                    failures = 0
        contents = self._contents(values, number)
        self._known = _Known(number, self._state, _digest(contents))
        return _Block(contents, self._state)

    def faults(self, number: int) -> list[Fault]:
        """What was passed over in block `number`."""
        return [
            Fault(
                "stream",
                f"the rest of a file of {self._name!r}, from document "
                f"{passed.block * _BLOCK + passed.row:,} on: {passed.reason}",
            )
            for passed in self.passed
            if passed.block == number
        ]

    def _read(self, number: int, values: list[Any]) -> None:
        """Fill `values` with block `number`, which comes next or is to be found."""
        if self._rows is not None:
            self._fill(number, values)
            return
        known = self._known
        ways = [(0, None)] if known is None else [(known.number, known.state), (0, None)]
        for first, state in ways:
            self._go_to(state)
            for block in range(first, number + 1):
                self._fill(block, values)
                if known is not None and block == known.number:
                    digest = _digest(self._contents(values, block))
                    if digest != known.digest:
                        break
            else:
                return
            if first:
                # Releases of `datasets` have lost their place here (its issues 8145 and 8308).
                _log.warning("%s: the place is not found at once; reading up to it.", self._name)
        raise InputError(
            f"tokens.source={self._name!r} is not the data set that it was when the place in it "
            "was saved. Pin tokens.revision, or start a new run."
        )

    def _fill(self, number: int, values: list[Any]) -> None:
        """Read the next block, except what was passed over in it."""
        self._filling, self._state = number, self._place
        values.clear()
        for passed in self.passed:
            if passed.block == number:
                self._extend(values, passed.row)
                self._go_to(passed.state)
        self._extend(values, _BLOCK)
        self._place = copy.deepcopy(self._dataset.state_dict())

    def _extend(self, values: list[Any], length: int) -> None:
        assert self._rows is not None
        for row in islice(self._rows, length - len(values)):
            values.append(row[self._column])

    def _go_to(self, state: dict[str, Any] | None) -> None:
        self._dataset = _own(self._stream)
        if state is not None:
            self._dataset.load_state_dict(copy.deepcopy(state))
        self._rows, self._place = iter(self._dataset), state

    def _pass_over(self, number: int, row: int, error: Exception) -> None:
        """Note that the file is to be left in which block `number` broke off, or raise.

        Where not even the way back to the block can be read, it is not that file that is broken.
        """
        reached = self._filling == number
        skip = self._on_error == "skip" and reached
        if skip and (state := self._next_file()) is not None:
            self.passed.append(_Passed(number, row, state, reason_of(error)))
            return
        place = f"at document {number * _BLOCK + (row if reached else 0):,} (from 0)"
        mend = ""
        if skip:
            mend = "; its files are not told apart, so none can be passed over"
        elif self._on_error == "stop":
            mend = ", or set tokens.on_error=skip to pass over the rest of a file that is broken"
        raise BrokenText(
            f"tokens.source={self._name!r} broke off {place}: {reason_of(error)}. Further tries "
            f"did not help (tokens.retries={self._retries.count}). Check the network and run the "
            f"same command again{mend}."
        ) from error

    def _next_file(self) -> dict[str, Any] | None:
        """The state of `datasets` behind the file that it is in; None where it counts no files."""
        here = _file_counter(self._dataset.state_dict())
        state = _own(self._stream).state_dict()  # of the beginning
        there = _file_counter(state)
        if here is None or there is None:
            return None
        there["shard_idx"] = here["shard_idx"] + 1
        return dict(state)

    def _contents(self, values: list[Any], number: int) -> list[_Content]:
        return [
            _content(value, row, self._column, self._name, self._on_error)
            for row, value in enumerate(values, start=number * _BLOCK)
        ]


def _own(stream: Any) -> Any:
    """A copy of a data set, which keeps a place of its own."""
    from huggingface_hub import HfFileSystem

    # `datasets` hangs this one of the whole process on every data set. It is not to be copied: it
    # grows on the way when that is done in another thread.
    shared = HfFileSystem._cache
    return copy.deepcopy(stream, {id(shared): shared})


def _file_counter(state: Any) -> dict[str, Any] | None:
    """The part of a state of `datasets` that counts files."""
    while isinstance(state, dict):
        if "shard_idx" in state:
            return state
        state = state.get("examples_iterable")
    return None


class _Bundled:
    """Generated English without end; its documents are independent, so any order is shuffled.

    It is not the text that the bundled model was trained on, nor what its loss was measured on.
    """

    count: int | None = None

    def __init__(self, seed: int) -> None:
        self._seed = BUNDLED_SEED + seed

    def read(self, start: Position) -> Iterator[Document]:
        from groupsae.host.bundled import english

        first = start.document
        while True:
            documents = english.documents(first, first + _BLOCK, seed=self._seed)
            for index, document in enumerate(documents, start=first):
                yield Document(Position(start.epoch, index), document.text)
            first += _BLOCK

    def identity(self) -> str:
        sample = (document.content for document in islice(self.read(Position(0, 0)), 8))
        return f"{BUNDLED} {_digest(sample)}"


def _load(path: Path, split: str, subset: str | None, on_error: OnError) -> tuple[Any, list[Fault]]:
    """The rows of a local file or folder, memory-mapped from the cache of `datasets`.

    With them, the files that were left out.
    """
    import datasets

    if path.is_dir() and any((path / name).exists() for name in _SAVED):
        saved = datasets.load_from_disk(str(path))
        if not isinstance(saved, datasets.DatasetDict):
            saved = {"train": saved}
        return _split(path, saved, split), []
    if path.is_dir():
        with _quiet():
            builder = datasets.load_dataset_builder(str(path), subset)
        files = _split(path, builder.config.data_files or {}, split)
    else:
        files = _split(path, {"train": [path]}, split)
    files = sorted(Path(file) for file in files)
    kinds = sorted({_file_type(file) for file in files})
    if len(kinds) > 1:
        raise InputError(
            f"tokens.source={str(path)!r} holds files of several types ({', '.join(kinds)}). "
            "Keep one type in the folder, or name one file."
        )
    files = [file for file in files if file.stat().st_size]
    if not files:
        raise InputError(f"tokens.source={str(path)!r} is empty. Give a source that holds text.")
    kind = _BUILDERS[kinds[0]]
    try:
        return _rows(kind, files), []
    except Exception as error:  # whatever the library raises on a file that it cannot read
        if len(files) == 1 or _complaint_of_the_cache(causes_of(error)):
            raise
        readable, faults = _readable(path, kind, files, on_error)
        if not faults:  # each by itself is readable
            raise
    if not readable:
        raise BrokenText(
            f"tokens.source={str(path)!r}: none of its files can be read; {faults[0].what}. "
            "Give a source that holds text."
        )
    return _rows(kind, readable), faults


def _rows(kind: str, files: list[Path]) -> Any:
    import datasets

    with _quiet():
        if kind == "txt":
            return datasets.Dataset.from_generator(
                _text_documents,
                features=datasets.Features({"text": datasets.Value("string")}),
                gen_kwargs={
                    "files": [_Stamped.of(file) for file in files],
                    "piece": _PIECE,
                    "longest_piece": _LONGEST_PIECE,
                },
            )
        return datasets.load_dataset(
            kind, data_files=[glob.escape(str(file)) for file in files], split="train"
        )


def _readable(
    path: Path, kind: str, files: list[Path], on_error: OnError
) -> tuple[list[Path], list[Fault]]:
    """The files that can be read each by itself, and what is wrong with the others."""
    readable, faults = [], []
    for file in files:
        try:
            _rows(kind, [file])
        except Exception as error:  # as above
            reason = reason_of(error)
            if _complaint_of_the_cache(causes_of(error)):
                raise
            if _holds_nothing(reason):
                continue
            if on_error == "stop":
                raise BrokenText(
                    f"tokens.source={str(path)!r}: {file.name} cannot be read: {reason}. Mend or "
                    "remove that file, or set tokens.on_error=skip to leave out what is broken."
                ) from error
            faults.append(Fault("file", f"{file}: {reason}"))
        else:
            readable.append(file)
    return readable, faults


def _split(path: Path, splits: Any, split: str) -> Any:
    named = {str(name): value for name, value in splits.items()}
    if split not in named:
        raise InputError(
            f"tokens.split={split!r}: {str(path)!r} has no such split; "
            f"it has {', '.join(named) or 'none'}."
        )
    return named[split]


def _file_type(file: Path) -> str:
    for suffix in _BUILDERS:
        if file.name.lower().endswith(suffix):
            return suffix
    raise InputError(
        f"tokens.source: cannot read {str(file)!r}; the types known are {', '.join(_BUILDERS)}, "
        "and folders written by `save_to_disk`."
    )


def _is_path(source: str | Path) -> bool:
    return (
        isinstance(source, Path)
        or source.startswith((".", "/", "~"))
        or "\\" in source
        or any(source.lower().endswith(suffix) for suffix in _BUILDERS)
    )


class _Stamped(NamedTuple):
    """A file with what changes when it does: the cache of `datasets` is keyed by these."""

    path: str
    size: int
    changed: int

    @classmethod
    def of(cls, file: Path) -> _Stamped:
        status = file.stat()
        return cls(str(file.absolute()), status.st_size, status.st_mtime_ns)


def _text_documents(
    files: list[_Stamped], piece: int, longest_piece: int
) -> Iterator[dict[str, str]]:
    for path, _, _ in files:
        file = Path(path)
        for text in (
            _between_markers(file)
            if _has_markers(file)
            else _paragraphs(file, piece, longest_piece)
        ):
            if text.strip():
                yield {"text": text.strip()}


def _has_markers(file: Path) -> bool:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return view.find(END_OF_DOCUMENT.encode()) >= 0


def _between_markers(file: Path) -> Iterator[str]:
    lines: list[str] = []
    with file.open(encoding="utf-8-sig") as opened:
        for line in opened:
            *ended, rest = line.split(END_OF_DOCUMENT)
            for end in ended:
                yield "".join([*lines, end])
                lines = []
            lines.append(rest)
    yield "".join(lines)


def _paragraphs(file: Path, piece: int, longest_piece: int) -> Iterator[str]:
    lines: list[str] = []
    length = 0
    with file.open(encoding="utf-8-sig") as opened:
        while line := opened.readline(longest_piece):
            lines.append(line)
            length += len(line)
            if length >= (longest_piece if line.strip() else piece):
                yield "".join(lines)
                lines, length = [], 0
    yield "".join(lines)


def _column(source: str | Path, columns: list[str], named: str | None) -> str:
    listed = ", ".join(columns) or "none"
    if named is not None:
        if named not in columns:
            raise InputError(
                f"tokens.column={named!r}: {str(source)!r} has no such column; it has {listed}."
            )
        return named
    found = [column for column in COLUMNS if column in columns]
    if not found:
        raise InputError(
            f"tokens.source={str(source)!r} has none of the columns {', '.join(COLUMNS)}; it has "
            f"{listed}. Name the one that holds text or token ids with tokens.column."
        )
    if len(found) > 1:
        raise InputError(
            f"tokens.source={str(source)!r} has the columns {' and '.join(found)}. "
            "Name the one to read with tokens.column."
        )
    return found[0]


def _surely_text_or_ids(feature: Any) -> bool:
    dtype = str(getattr(feature, "dtype", None))
    inner = str(getattr(getattr(feature, "feature", None), "dtype", None))
    return dtype in {"string", "large_string"} or inner.startswith(("int", "uint"))


_Content = str | np.ndarray | Fault | None


def _content(value: Any, row: int, column: str, source: str | Path, on_error: OnError) -> _Content:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        ids = np.asarray(value) if value else np.zeros(0, np.int64)
        if ids.ndim == 1 and ids.dtype.kind in "iu":
            return ids.astype(np.int64)
    wrong = (
        f"row {row} (from 0) of {str(source)!r}: column {column!r} holds {repr(value)[:60]} "
        f"({type(value).__name__}), which is neither text nor a list of token ids"
    )
    if on_error == "skip":
        return Fault("not_text", wrong)
    raise BrokenText(
        f"{wrong}. Mend or drop that row, set tokens.on_error=skip to pass over such rows, or name "
        "another column with tokens.column."
    )


def _document(position: Position, content: _Content) -> Document:
    if isinstance(content, Fault):
        return Document(position, None, content)
    return Document(position, content)


def content_bytes(content: str | np.ndarray | None) -> bytes:
    """What makes two documents the same: their text but for outer white space, or their ids."""
    if content is None:
        return b""
    if isinstance(content, str):  # with halves of surrogate pairs, if it has such
        return content.strip().encode(errors="surrogatepass")
    return content.tobytes()


def _digest(contents: Iterable[_Content]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for content in contents:
        digest.update(b"\0" + content_bytes(None if isinstance(content, Fault) else content))
    return digest.hexdigest()


@contextmanager
def _explained(source: str | Path) -> Iterator[None]:
    """Turn what `datasets` raises into one message about `source`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever the library raises on a file that it cannot read
        raise InputError(_explanation(str(source), error)) from error


def _explanation(source: str, error: BaseException) -> str:
    causes, reason = causes_of(error), reason_of(error)
    if complaint := _complaint_of_the_cache(causes):
        return (
            f"tokens.source={source!r}: {complaint} ({reason}). Mend that, or set "
            "HF_DATASETS_CACHE to another folder."
        )
    if _holds_nothing(reason):
        return f"tokens.source={source!r} is empty. Give a source that holds text."
    if Path(source).expanduser().exists():
        mend = ". Save the text as UTF-8." if isinstance(causes[-1], UnicodeDecodeError) else ""
        return f"tokens.source={source!r} cannot be read: {reason}{mend}"
    return (
        f"tokens.source={source!r} is no local file or folder, and the Hugging Face hub did not "
        f"give a data set of that name: {reason}. Check the name, tokens.split, tokens.subset, "
        f"the network and HF_HUB_OFFLINE; or use a local file, or tokens.source={BUNDLED}."
    )


def _holds_nothing(reason: str) -> bool:
    return "corresponds to no data" in reason


def _complaint_of_the_cache(causes: list[BaseException]) -> str | None:
    from datasets import config

    cache = Path(config.HF_DATASETS_CACHE)
    for cause in causes:
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "Not enough disk space" in str(cause) or "No space left" in str(cause):
            return f"no free disk for the cache of data sets, {cache}"
        if isinstance(cause, OSError) and isinstance(cause.filename, str):
            where = Path(cause.filename)
            if where.is_relative_to(cache) or cache.is_relative_to(where):
                return f"the cache of data sets, {cache}, cannot be written"
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of `datasets`, and what it logs besides what it raises."""
    import datasets

    # The second remarks on a folder's README.
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub.repocard")]
    levels = [logger.level for logger in loggers]
    bars = not datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
