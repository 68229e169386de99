"""Faults in the text: reads are tried again, and what stays broken stops the run or is left out."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsae.errors import InputError
from groupsae.host import faults
from groupsae.host.ahead import ContextsAhead
from groupsae.host.documents import Document, Documents, Position, open_documents
from groupsae.host.faults import BrokenText, Fault, Retries
from groupsae.host.tokens import Corpus, Joints, TokenStream, open_corpus
from groupsae.training.start import text_read
from tests.host.test_tokens import (
    PLAIN,
    STORIES,
    Listed,
    corpus_of,
    drain,
    one_token_at_a_time,
    texts_in,
)

START = Position(epoch=0, document=0)
NAME = "someone/stories"
FILES, PER_FILE = 4, 700  # 2,800 documents in three blocks, none of which begins with a file


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        cache = tmp_path_factory.mktemp("cache")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        yield


class Hub:
    """A streamed data set of some files; `failing` raises where it is to break off."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing: Callable[[int, int], None] = lambda file, row: None
        self.pauses: list[float] = []
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: self._stream())

    def open(self, retries: int = 5, **options: Any) -> Documents:
        return open_documents(NAME, retries=Retries(retries, self.pauses.append), **options)

    def breaks(self, at: dict[tuple[int, int], int]) -> None:
        """Fail at these rows of these files (row `PER_FILE` is the end), so many times each."""
        left = dict(at)

        def failing(file: int, row: int) -> None:
            if left.get((file, row), 0) > 0:
                left[file, row] -= 1
                raise ConnectionError(f"connection {file}-{row} lost")

        self.failing = failing

    def _stream(self) -> datasets.IterableDataset:
        def rows(files: list[int]) -> Iterator[dict[str, str]]:
            for file in files:
                for row in range(PER_FILE + 1):
                    self.failing(file, row)
                    if row < PER_FILE:
                        yield {"text": f"Document {row} of file {file}."}

        return datasets.IterableDataset.from_generator(
            rows,
            features=datasets.Features({"text": datasets.Value("string")}),
            gen_kwargs={"files": list(range(FILES))},
        )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(monkeypatch)


def contents(documents: Documents, start: Position = START) -> list[Any]:
    return [document.content for document in documents.read(start) if document.fault is None]


def faults_of(documents: Documents) -> list[Fault]:
    return [document.fault for document in documents.read(START) if document.fault is not None]


def through_json(position: Position) -> Position:
    return Position(*json.loads(json.dumps(position)))


class TestRetries:
    places = st.dictionaries(
        st.tuples(st.integers(0, FILES - 1), st.integers(0, PER_FILE)),
        st.integers(1, 2),
        max_size=4,
    )

    @settings(deadline=None, max_examples=15)
    @given(at=places)
    def test_a_stream_that_breaks_off_now_and_then_gives_what_it_gives_undisturbed(
        self, at: dict[tuple[int, int], int]
    ) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            hub = Hub(monkeypatch)
            expected = list(hub.open().read(START))
            hub.breaks(at)
            assert list(hub.open(retries=8).read(START)) == expected
            assert len(hub.pauses) == sum(at.values())

    def test_also_where_datasets_loses_its_place(
        self, hub: Hub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = contents(hub.open())
        hub.breaks({(2, 600): 2, (3, 500): 1})
        monkeypatch.setattr(datasets.IterableDataset, "load_state_dict", lambda *_: None)
        assert contents(hub.open()) == expected

    def test_each_is_logged_with_the_source_and_the_error(
        self, hub: Hub, caplog: pytest.LogCaptureFixture
    ) -> None:
        hub.breaks({(1, 3): 3})
        contents(hub.open())
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 3
        assert all(f"'{NAME}' broke off (connection 1-3 lost)" in line for line in said)
        assert [line[-8:] for line in said] == ["(1 of 5)", "(2 of 5)", "(3 of 5)"]

    def test_pauses_double_up_to_a_minute_and_are_partly_random(self) -> None:
        pauses: list[float] = []
        retries = Retries(12, pauses.append)
        for _ in range(20):
            assert all(retries.wait(i, NAME, OSError("x")) for i in range(1, 13))
        assert not retries.wait(13, NAME, OSError("x"))
        by_failure = np.array(pauses).reshape(20, 12)
        longest = np.minimum(0.5 * 2.0 ** np.arange(12), 60)
        assert (by_failure <= longest).all()
        assert (by_failure >= longest / 2).all()
        assert (by_failure.std(axis=0) > 0.03 * longest).all()
        assert longest[-1] == faults.LONGEST_PAUSE

    @pytest.mark.parametrize("retries", [0, 2])
    def test_what_does_not_help_in_the_end_is_one_message(self, hub: Hub, retries: int) -> None:
        hub.breaks({(1, 400): 10**9})
        read = hub.open(retries).read(START)
        assert len(list(islice(read, 1000))) == 1000, "the block before is whole"
        with pytest.raises(BrokenText) as raised:
            next(read)
        assert len(hub.pauses) == retries
        for part in (NAME, "document 1,100", "connection 1-400 lost", f"tokens.retries={retries}"):
            assert part in str(raised.value)
        assert "tokens.on_error=skip" in str(raised.value)

    def test_a_row_that_is_read_to_learn_the_columns_is_read_again(
        self, hub: Hub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = contents(hub.open())
        monkeypatch.setattr(datasets.IterableDataset, "column_names", None)
        hub.breaks({(0, 0): 3})
        assert contents(hub.open(retries=3)) == expected
        hub.breaks({(0, 0): 4})
        with pytest.raises(InputError, match="connection 0-0 lost"):
            hub.open(retries=3)

    def test_a_bad_row_is_no_reason_for_another_try(
        self, hub: Hub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stream = datasets.Dataset.from_list([{"text": 7}]).to_iterable_dataset()
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
        with pytest.raises(BrokenText, match=r"row 0.*7 \(int\).*tokens\.on_error=skip"):
            contents(hub.open())
        assert hub.pauses == []


BROKEN = {(1, 333): 10**9, (2, 0): 10**9}  # one in its middle, the next cannot be opened


class TestStreamsWithBrokenFiles:
    def test_the_rest_of_the_file_is_passed_over_and_told_of(self, hub: Hub) -> None:
        whole = contents(hub.open())
        hub.breaks(BROKEN)
        left = [f"Document {row} of file 1." for row in range(333, PER_FILE)]
        left += [f"Document {row} of file 2." for row in range(PER_FILE)]
        documents = hub.open(retries=1, on_error="skip")
        assert sorted(contents(documents)) == sorted(set(whole) - set(left))
        hub.pauses.clear()
        first, second = faults_of(documents)
        assert hub.pauses != []
        assert first.kind == second.kind == "stream"
        assert "from document 1,033 on: connection 1-333 lost" in first.what
        assert "from document 1,033 on: connection 2-0 lost" in second.what

    @pytest.mark.parametrize("broken", range(FILES))
    def test_any_file_may_be_broken(self, hub: Hub, broken: int) -> None:
        hub.breaks({(broken, 1): 10**9})
        found = contents(hub.open(retries=0, on_error="skip"))
        assert len(found) == (FILES - 1) * PER_FILE + 1
        assert {text for text in found if f"file {broken}" in text} == {
            f"Document 0 of file {broken}."
        }

    @pytest.mark.parametrize("mended", [False, True], ids=["broken", "mended"])
    def test_a_saved_place_gives_the_same_documents_though_the_files_be_mended(
        self, hub: Hub, mended: bool
    ) -> None:
        hub.breaks(BROKEN)
        whole = list(hub.open(retries=0, on_error="skip").read(START))
        whole = [document for document in whole if document.fault is None]
        assert len(whole) == 2 * PER_FILE + 333
        if mended:
            hub.breaks({})
        for index in (1000, 1032, 1500, len(whole) - 1):  # in the block of the broken places
            position = through_json(whole[index].position)
            again = list(hub.open(retries=0, on_error="skip").read(position))
            told = [document for document in again if document.fault is not None]
            assert len(told) == (2 if index == 1000 else 0), "before the block's first document"
            assert [d.content for d in again if d.fault is None] == [
                document.content for document in whole[index:]
            ]

    def test_a_connection_that_is_gone_is_no_broken_file(self, hub: Hub) -> None:
        read = hub.open(retries=2, on_error="skip").read(START)
        assert len(list(islice(read, 1000))) == 1000

        def gone(file: int, row: int) -> None:
            raise ConnectionError("network unreachable")

        hub.failing = gone
        with pytest.raises(BrokenText, match=r"network unreachable.*Check the network"):
            next(read)

    def test_files_that_are_not_told_apart_cannot_be_passed_over(
        self, hub: Hub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("groupsae.host.documents._file_counter", lambda state: None)
        hub.breaks({(1, 1): 10**9})
        with pytest.raises(BrokenText, match="not told apart"):
            contents(hub.open(retries=1, on_error="skip"))

    @pytest.mark.parametrize("kind", ["json", "json.gz", "parquet"])
    def test_real_files_that_are_truncated(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        files = [_file(tmp_path, kind, i) for i in range(3)]
        _truncate(files[1])
        load = datasets.load_dataset
        builder = kind.split(".")[0]
        monkeypatch.setattr(
            datasets,
            "load_dataset",
            lambda *_, **__: load(
                builder, data_files=[str(file) for file in files], split="train", streaming=True
            ),
        )
        pauses: list[float] = []
        documents = open_documents(NAME, on_error="skip", retries=Retries(2, pauses.append))
        found, (fault,) = contents(documents), faults_of(documents)
        assert {f"Text {i} of {file}" for i in range(40) for file in (0, 2)} <= set(found)
        assert len(found) < 120
        assert fault.kind == "stream"
        with pytest.raises(BrokenText, match="broke off"):
            contents(open_documents(NAME, retries=Retries(0)))


class TestFolders:
    @pytest.fixture(params=["json", "json.gz", "parquet", "txt"])
    def files(self, request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
        (tmp_path / "folder").mkdir()
        return [_file(tmp_path / "folder", request.param, i) for i in range(3)]

    def test_stop_names_the_file(self, files: list[Path]) -> None:
        _truncate(files[1])
        with pytest.raises(BrokenText) as raised:
            open_documents(files[1].parent)
        assert f"{files[1].name} cannot be read: " in str(raised.value)
        assert "tokens.on_error=skip" in str(raised.value)

    def test_skip_leaves_it_out_and_tells_of_it_once(self, files: list[Path]) -> None:
        _truncate(files[1])
        documents = open_documents(files[1].parent, on_error="skip")
        expected = [f"Text {i} of {file}" for i in range(40) for file in (0, 2)]
        assert sorted(contents(documents)) == sorted(expected)
        (fault,) = faults_of(documents)
        assert fault.kind == "file"
        assert str(files[1]) in fault.what
        again = [d.fault for d in documents.read(Position(1, 0)) if d.fault is not None]
        assert again == []

    def test_the_same_documents_where_nothing_is_broken(self, files: list[Path]) -> None:
        folder = files[0].parent
        stopping, skipping = open_documents(folder), open_documents(folder, on_error="skip")
        assert list(skipping.read(START)) == list(stopping.read(START))
        assert skipping.identity() == stopping.identity()

    def test_nothing_but_broken_files_is_refused(self, files: list[Path]) -> None:
        for file in files:
            _truncate(file)
        with pytest.raises(BrokenText, match="none of its files can be read"):
            open_documents(files[0].parent, on_error="skip")
        with pytest.raises(InputError, match="cannot be read"):
            open_documents(files[0], on_error="skip")

    def test_a_full_disk_is_no_broken_file(
        self, files: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> Any:
            raise OSError("Not enough disk space.")

        monkeypatch.setattr("groupsae.host.documents._rows", full)
        with pytest.raises(InputError, match="no free disk"):
            open_documents(files[0].parent, on_error="skip")

    def test_files_that_do_not_fit_together_are_refused_all_the_same(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "a", "n": {"x": 1}}\n')
        (tmp_path / "b.jsonl").write_text('{"text": "b", "n": "one"}\n')
        with pytest.raises(InputError, match="cannot be read"):
            open_documents(tmp_path, on_error="skip")


class Faulty(Listed):
    """Documents in a list, of which some are faults."""

    def read(self, start: Position) -> Iterator[Document]:
        for document in super().read(start):
            if isinstance(document.content, Fault):
                yield Document(document.position, None, document.content)
            else:
                yield document


class Choking:
    """A tokenizer that fails on texts with a bell in them, alone and among others."""

    bos_token_id = PLAIN.bos_token_id
    eos_token_id = PLAIN.eos_token_id
    get_vocab = staticmethod(PLAIN.get_vocab)

    def __call__(self, text: Any, **options: Any) -> Any:
        if any("\a" in one for one in ([text] if isinstance(text, str) else text)):
            raise RuntimeError("the bell rings")
        return PLAIN(text, **options)


class TestDocuments:
    def test_the_tokenizer_fails(self, caplog: pytest.LogCaptureFixture) -> None:
        bells = [f"{story} \a" for story in STORIES[:9]]
        corpus = corpus_of([*STORIES, *bells], tokenizer=Choking(), on_error="skip")
        stream = corpus.train()
        found = texts_in(drain(stream), PLAIN)
        assert set(STORIES) >= set(found)
        assert len(found) >= len(STORIES) - 1
        assert stream.skipped == {"tokenizer": 9}
        (said,) = [record.getMessage() for record in caplog.records]
        assert "passed over document" in said
        assert "the bell rings" in said

    def test_the_tokenizer_fails_and_it_stops(self) -> None:
        corpus = corpus_of([*STORIES, "a bell \a"], tokenizer=Choking())
        with pytest.raises(BrokenText) as raised:
            drain(TokenStream(corpus, "train"))
        for part in ("'a list'", "'a bell \\x07'", "the bell rings", "tokens.on_error=skip"):
            assert part in str(raised.value)

    def test_half_a_surrogate_pair(self) -> None:
        corpus = corpus_of([*STORIES, "half \ud800 a pair"], tokenizer=PLAIN)
        with pytest.raises(BrokenText, match="the tokenizer fails"):
            drain(TokenStream(corpus, "train"))
        stream = corpus_of(corpus.documents.contents, tokenizer=PLAIN, on_error="skip").train()
        drain(stream)
        assert stream.skipped == {"tokenizer": 1}

    @pytest.mark.parametrize("wrong", [-1, 50, 10**12])
    def test_ids_outside_of_the_vocabulary(self, wrong: int) -> None:
        fine = [np.arange(1, 40), np.arange(5, 12)]
        ids = [fine[0], np.array([1, wrong, 2]), fine[1]]
        stream = corpus_of(ids, vocab_size=50, on_error="skip").train()
        found = drain(stream)
        plain = Listed(ids)
        left = [d.content for d in plain.read(START) if wrong not in d.content]
        run = [i for part in left for i in [*part.tolist(), 0]]
        assert [i for context in found for i in context] == run[: 8 * len(found)]
        assert stream.skipped in ({"vocabulary": 1}, {})
        with pytest.raises(BrokenText, match=rf"token id {wrong}, .* 0 to 49.*on_error=skip"):
            corpus_of(ids, vocab_size=50).train()

    def test_nothing_but_wrong_ids_is_said_with_their_number(self) -> None:
        corpus = corpus_of([np.array([60 + i]) for i in range(100)], vocab_size=50, on_error="skip")
        with pytest.raises(InputError, match=r"is empty.*passed over: 100 \(vocabulary\)"):
            corpus.train()

    def test_a_joint_outside_of_the_vocabulary_is_no_fault_of_documents(self) -> None:
        corpus = corpus_of([np.arange(9)], vocab_size=50, joints=Joints(None, 50), on_error="skip")
        with pytest.raises(InputError, match="token id 50 between documents"):
            corpus.train()

    def test_rows_that_are_neither_text_nor_ids(self, tmp_path: Path) -> None:
        path = tmp_path / "numbers.parquet"
        rows = [[1.5]] * 3 + [None] * 400
        datasets.Dataset.from_dict({"text": rows}).to_parquet(str(path))
        with pytest.raises(BrokenText, match=r"row 0.*neither text.*on_error=skip"):
            open_documents(path)
        documents = open_documents(path, on_error="skip")
        assert [fault.kind for fault in faults_of(documents)] == ["not_text"] * 3

    def test_such_rows_of_a_stream(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        def rows() -> Iterator[dict[str, Any]]:
            for i in range(1500):
                yield {"text": i if i % 100 == 0 else f"Document {i}"}

        stream = datasets.IterableDataset.from_generator(rows)
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
        documents = hub.open(on_error="skip")
        assert len(contents(documents)) == 1485
        assert [fault.kind for fault in faults_of(documents)] == ["not_text"] * 15
        position = list(documents.read(START))[1200].position
        expected = contents(documents)[-len(contents(documents, through_json(position))) :]
        assert contents(documents, through_json(position)) == expected

    def test_a_text_that_turns_into_nothing_but_faults_is_not_read_for_ever(self) -> None:
        class Once(Listed):
            def read(self, start: Position) -> Iterator[Document]:
                if start.epoch == 0:
                    yield from super().read(start)
                else:
                    yield Document(start, None, Fault("stream", "all of it"))

        corpus = corpus_of([], documents=Once([np.arange(1, 30)]), repeat=True, on_error="skip")
        stream = corpus.train()
        stream.next_contexts(3)
        with pytest.raises(InputError, match="are needed at once"):
            stream.next_contexts(3)


items = st.lists(
    st.one_of(
        st.lists(st.integers(1, 9), min_size=1, max_size=30).map(np.array),
        st.sampled_from([Fault("not_text", "a row"), Fault("tokenizer", "a text")]),
    ),
    min_size=1,
    max_size=60,
)


def faulty_corpus(contents: list[Any], repeat: bool) -> Corpus:
    return corpus_of(contents, documents=Faulty(contents), repeat=repeat, on_error="skip")


@settings(deadline=None, max_examples=80)
@given(contents=items, repeat=st.booleans(), asked=st.lists(st.integers(1, 9), max_size=12))
def test_a_run_that_is_killed_anywhere_goes_on_with_the_same_contexts_and_counts(
    contents: list[Any], repeat: bool, asked: list[int]
) -> None:
    if sum(len(content) + 1 for content in contents if not isinstance(content, Fault)) < 8:
        return
    corpus = faulty_corpus(contents, repeat)
    without = Faulty(contents)
    whole, killed = TokenStream(corpus, "train"), TokenStream(corpus, "train")
    given = 0
    with ContextsAhead(TokenStream(corpus, "train"), ahead=3) as ahead:
        for n in asked:
            try:
                expected = whole.next_contexts(n)
            except InputError:
                break
            given += n
            state = json.loads(json.dumps(killed.state_dict()))
            killed = TokenStream(corpus, "train")
            killed.load_state_dict(state)
            assert killed.next_contexts(n).equal(expected)
            assert ahead.next_contexts(n).equal(expected)
            assert killed.skipped == whole.skipped == ahead.skipped
            assert killed.state_dict() == whole.state_dict() == ahead.state_dict()
    # Counted one by one: all faults before the document of the last token.
    position = whole._cursor.position
    passed: dict[str, int] = {}
    for epoch in range(position.epoch + 1 if given else 0):
        for document in without.read(Position(epoch, 0)):
            if document.position[:2] < position[:2] and document.fault is not None:
                passed[document.fault.kind] = passed.get(document.fault.kind, 0) + 1
    assert whole.skipped == passed
    healthy = corpus_of([], documents=_Without(contents), repeat=repeat)
    contexts = list(islice(one_token_at_a_time(healthy), given))
    again = TokenStream(corpus, "train")
    assert (again.next_contexts(given).tolist() if given else []) == contexts


class _Without(Faulty):
    """The same documents in the same order, without the faults."""

    def read(self, start: Position) -> Iterator[Document]:
        return (document for document in super().read(start) if document.fault is None)


def test_a_stream_with_a_broken_file_goes_on_after_a_kill(hub: Hub) -> None:
    hub.breaks(BROKEN)
    corpus = open_corpus_of_hub(hub)
    whole = corpus.train()
    expected = drain(whole)
    for n in (1, 250, 450, len(expected) - 1):
        begun = open_corpus_of_hub(hub).train()
        begun.next_contexts(n)
        state = json.loads(json.dumps(begun.state_dict()))
        resumed = open_corpus_of_hub(hub).train()
        resumed.load_state_dict(state)
        assert drain(resumed) == expected[n:]
        assert resumed.skipped == whole.skipped == {"stream": 2}


def test_faults_are_counted_once_however_often_the_document_after_them_is_entered(
    hub: Hub,
) -> None:
    hub.breaks({(0, 5): 10**9})
    options: dict[str, Any] = {"tokenizer": PLAIN, "context_length": 4, "held_out": 0}
    stream = open_corpus(NAME, **options, on_error="skip", retries=0).train()
    for _ in range(4):  # some 20 tokens of the very first document
        stream.next_contexts(1)
        assert stream.epoch == stream.state_dict()["position"][1] == 0
        assert stream.skipped == {"stream": 1}
        stream.load_state_dict(json.loads(json.dumps(stream.state_dict())))


def test_stopping_consumes_nothing_and_the_next_try_goes_on(hub: Hub) -> None:
    expected = open_corpus_of_hub(hub, "stop").train().next_contexts(900)
    hub.breaks({(1, 400): 10**9})
    stream = open_corpus_of_hub(hub, "stop").train()
    with ContextsAhead(stream) as ahead:
        first = ahead.next_contexts(100)
        state = ahead.state_dict()
        with pytest.raises(BrokenText, match="broke off"):
            ahead.next_contexts(800)
        assert ahead.state_dict() == state
        hub.breaks({})
        assert ahead.next_contexts(800).equal(expected[100:])
    assert first.equal(expected[:100])


def test_what_was_passed_over_is_told_with_the_text_that_was_read() -> None:
    contents = [np.arange(1, 9)] * 20 + [Fault("not_text", "a row")] * 5
    with ContextsAhead(faulty_corpus(contents, repeat=True).train()) as ahead:
        ahead.next_contexts(60)
        assert text_read(ahead)["skipped_documents"] == ahead.skipped
        assert ahead.skipped["not_text"] >= 10


def test_a_place_saved_before_faults_were_counted_has_none() -> None:
    stream = corpus_of([np.arange(1, 90)]).train()
    stream.next_contexts(2)
    state = {key: value for key, value in stream.state_dict().items() if key != "skipped"}
    stream.load_state_dict(state)
    assert stream.skipped == {}


def test_each_kind_is_logged_once_with_its_first_example(
    caplog: pytest.LogCaptureFixture,
) -> None:
    contents = [np.arange(1, 9)] * 20 + [Fault("not_text", "row 7")] * 5
    contents += [Fault("file", "a.parquet")] * 3
    corpus = faulty_corpus(contents, repeat=False)
    with caplog.at_level(logging.WARNING):
        drain(corpus.train())
        drain(corpus.train())
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert any("passed over row 7" in line for line in said)
    assert any("passed over a.parquet" in line for line in said)


def open_corpus_of_hub(hub: Hub, on_error: Any = "skip") -> Corpus:
    return open_corpus(
        NAME, tokenizer=PLAIN, context_length=64, held_out=0.1, on_error=on_error, retries=0
    )


def _file(folder: Path, kind: str, number: int) -> Path:
    """A file of 40 documents."""
    texts = [f"Text {i} of {number}" for i in range(40)]
    if kind == "parquet":
        path = folder / f"{number}.parquet"
        datasets.Dataset.from_dict({"text": texts}).to_parquet(str(path))
    elif kind == "txt":
        path = folder / f"{number}.txt"
        path.write_text("<|endoftext|>".join(texts))
    else:
        path = folder / f"{number}.{kind.replace('json', 'jsonl')}"
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    return path


def _truncate(file: Path) -> None:
    """As a download that ended in the middle; a text in the middle of a character."""
    whole = file.read_bytes()
    cut = whole[: len(whole) * 2 // 3]
    file.write_bytes(cut + "ë".encode()[:1] if file.suffix == ".txt" else cut)
