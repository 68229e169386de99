from __future__ import annotations

import errno
import gzip
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsae.errors import InputError
from groupsae.host.documents import Documents, Position, _paragraphs, open_documents
from groupsae.host.faults import BrokenText, Retries


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


START = Position(epoch=0, document=0)


def _contents(documents: Documents, start: Position = START) -> list[Any]:
    return [
        content.tolist() if isinstance(content := document.content, np.ndarray) else content
        for document in documents.read(start)
    ]


STORIES = [f"Story {i} of Zoë." for i in range(2500)]  # more than two blocks


class TestEverySource:
    """One and the same text, wherever it lies."""

    @pytest.fixture(
        params=["jsonl", "json.gz", "parquet", "folder", "saved", "saved splits", "txt", "stream"]
    )
    def documents(
        self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Documents:
        rows = [{"text": story, "number": i} for i, story in enumerate(STORIES)]
        table = datasets.Dataset.from_list(rows)
        source: Any = tmp_path / "corpus"
        if request.param == "jsonl":
            source = _lines(tmp_path / "a.jsonl", rows)
        elif request.param == "json.gz":
            source = tmp_path / "a.jsonl.gz"
            plain = _lines(tmp_path / "plain", rows).read_bytes()
            source.write_bytes(gzip.compress(plain))
        elif request.param == "parquet":
            source = tmp_path / "a.parquet"
            table.to_parquet(str(source))
        elif request.param == "folder":
            _lines(source / "train-1.jsonl", rows[:1000])
            _lines(source / "train-2.jsonl", rows[1000:])
            _lines(source / "validation.jsonl", [{"text": "not this", "number": 1}])
            (source / "README.md").write_text("# A corpus")
        elif request.param == "saved":
            table.save_to_disk(str(source))
        elif request.param == "saved splits":
            datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(
                str(source)
            )
        elif request.param == "txt":
            source = tmp_path / "a.txt"
            source.write_text("\n<|endoftext|>\n".join(STORIES), encoding="utf-8")
        elif request.param == "stream":
            source = _on_the_hub(monkeypatch, "someone/stories", tmp_path, rows)
        return open_documents(source, seed=3)

    def test_all_documents_once_in_a_shuffled_order(self, documents: Documents) -> None:
        first, second = _contents(documents), _contents(documents, Position(1, 0))
        assert sorted(first) == sorted(second) == sorted(STORIES)
        assert first != STORIES
        assert first != second
        assert first == _contents(documents)

    def test_can_be_entered_anywhere(self, documents: Documents) -> None:
        whole = list(documents.read(Position(1, 0)))
        for index in (0, 1, 999, 1000, 1700, 2499):
            position = Position(*json.loads(json.dumps(whole[index].position)))
            again = list(islice(documents.read(position), 1200))
            assert [d.content for d in again] == [d.content for d in whole[index : index + 1200]]

    def test_can_be_entered_again_and_again(self, documents: Documents) -> None:
        whole = _contents(documents)
        position, read = Position(0, 0), []
        while read != whole:
            # the first is the last that was read already
            for document in islice(documents.read(position), 1 if read else 0, 700):
                read.append(document.content)
                position = Position(*json.loads(json.dumps(document.position)))
            assert read == whole[: len(read)]


def test_order_depends_on_the_seed(tmp_path: Path) -> None:
    file = _lines(tmp_path / "a.jsonl", [{"text": story} for story in STORIES[:50]])
    assert _contents(open_documents(file, seed=0)) != _contents(open_documents(file, seed=1))


def test_readers_of_a_stream_do_not_disturb_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": story} for story in STORIES]
    documents = open_documents(_on_the_hub(monkeypatch, "someone/stories", tmp_path, rows))
    expected = _contents(documents)
    one, other = documents.read(START), documents.read(START)
    got = [(next(one).content, next(other).content) for _ in STORIES]
    assert [a for a, _ in got] == [b for _, b in got] == expected


def test_stream_finds_its_place_though_datasets_should_lose_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = _on_the_hub(
        monkeypatch, "someone/stories", tmp_path, [{"text": story} for story in STORIES]
    )
    documents = open_documents(name)
    whole = list(documents.read(START))
    monkeypatch.setattr(datasets.IterableDataset, "load_state_dict", lambda *_: None)
    again = documents.read(whole[1500].position)
    assert [d.content for d in again] == [d.content for d in whole[1500:]]


def test_stream_that_has_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": story} for story in STORIES]
    name = _on_the_hub(monkeypatch, "someone/stories", tmp_path, rows)
    position = list(open_documents(name).read(START))[1500].position
    _on_the_hub(monkeypatch, name, tmp_path, rows[::-1])
    with pytest.raises(InputError, match=r"'someone/stories' is not the data set.*revision"):
        next(iter(open_documents(name).read(position)))


def test_stream_asks_the_hub_for_what_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}
    rows = [{"body": "a"}]
    name = _on_the_hub(monkeypatch, "someone/stories", tmp_path, rows, asked)
    documents = open_documents(
        name, split="validation", subset="short", revision="abc", column="body"
    )
    assert asked == {
        "path": name,
        "name": "short",
        "split": "validation",
        "revision": "abc",
        "streaming": True,
    }
    assert _contents(documents) == ["a"]
    assert documents.count is None


def test_bundled_english_is_endless_and_can_be_entered_anywhere() -> None:
    english = pytest.importorskip("groupsae.host.bundled.english")
    documents = open_documents("bundled", seed=5)
    read = list(islice(documents.read(Position(0, 997)), 6))
    seed = 2_000_005  # the bundled model was trained on seed 0
    assert [d.content for d in read] == [english.document(997 + i, seed).text for i in range(6)]
    assert documents.count is None
    assert documents.identity() != open_documents("bundled", seed=6).identity()


class TestColumns:
    @pytest.mark.parametrize("column", ["tokens", "input_ids"])
    def test_token_ids(self, tmp_path: Path, column: str) -> None:
        ids = [[1, 2, 3], [4], []]
        path = tmp_path / "ids.parquet"
        datasets.Dataset.from_dict({column: ids}).to_parquet(str(path))
        assert sorted(_contents(open_documents(path))) == sorted(ids)

    def test_named_column_is_read_though_others_are_there(self, tmp_path: Path) -> None:
        file = _lines(tmp_path / "a.jsonl", [{"text": "no", "tokens": [1], "story": "yes"}])
        assert _contents(open_documents(file, column="story")) == ["yes"]
        assert _contents(open_documents(file, column="tokens")) == [[1]]

    def test_text_and_ids_at_once_are_refused(self, tmp_path: Path) -> None:
        file = _lines(tmp_path / "a.jsonl", [{"text": "no", "input_ids": [1]}])
        with pytest.raises(InputError, match=r"text and input_ids.*tokens\.column"):
            open_documents(file)

    def test_without_a_text_column_the_columns_are_listed(self, tmp_path: Path) -> None:
        file = _lines(tmp_path / "a.jsonl", [{"story": "no", "title": "a"}])
        with pytest.raises(InputError, match=r"story, title.*tokens\.column"):
            open_documents(file)

    def test_missing_named_column(self, tmp_path: Path) -> None:
        file = _lines(tmp_path / "a.jsonl", [{"text": "no"}])
        with pytest.raises(InputError, match=r"tokens\.column='txt'.*it has text"):
            open_documents(file, column="txt")

    @pytest.mark.parametrize(
        ("bad", "shown"),
        [(7, r"7 \(int\)"), ({"a": 1}, "dict"), ([0.5], r"\[0.5\]"), ([[1]], "list")],
    )
    def test_a_row_that_is_neither_text_nor_ids_is_named_before_any_work(
        self, tmp_path: Path, bad: Any, shown: str
    ) -> None:
        file = _lines(tmp_path / "a.jsonl", [{"text": "fine"}, {"text": bad}, {"text": "fine"}])
        older = r"changed from string to \w+ in row 1"  # said by datasets < 5 itself
        with pytest.raises(InputError, match=rf"row 1 \(from 0\).*{shown}|{older}"):
            open_documents(file)

    def test_a_bad_row_of_a_stream_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stream = datasets.Dataset.from_list([{"text": 7}])
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream.to_iterable_dataset())
        with pytest.raises(InputError, match=r"row 0.*'someone/numbers'.*7 \(int\)"):
            _contents(open_documents("someone/numbers"))

    def test_rows_without_a_value_are_no_documents(self, tmp_path: Path) -> None:
        file = _lines(tmp_path / "a.jsonl", [{"text": "a"}, {"text": None}])
        assert sorted(_contents(open_documents(file)), key=str) == [None, "a"]


class TestTextFiles:
    def test_markers_separate_documents_and_blank_lines_do_not(self, tmp_path: Path) -> None:
        file = tmp_path / "a.txt"
        file.write_text("One.\n\nStill one.<|endoftext|>\nTwo.\n<|endoftext|><|endoftext|>Three.\n")
        assert sorted(_contents(open_documents(file))) == ["One.\n\nStill one.", "Three.", "Two."]

    def test_paragraphs_are_joined_into_pieces(self, tmp_path: Path) -> None:
        paragraphs = [f"Paragraph {i}: " + "word " * 50 + "end." for i in range(100)]
        file = tmp_path / "a.txt"
        file.write_text("\n \n".join(paragraphs))
        pieces = _contents(open_documents(file))
        assert 5 < len(pieces) < 50
        assert sorted(p for piece in pieces for p in piece.split("\n \n")) == sorted(paragraphs)

    @settings(deadline=None)
    @given(
        text=st.text(st.sampled_from("ab \n"), max_size=300),
        piece=st.integers(1, 20),
        longer=st.integers(0, 20),
    )
    def test_no_text_is_lost(
        self, tmp_path_factory: pytest.TempPathFactory, text: str, piece: int, longer: int
    ) -> None:
        file = tmp_path_factory.getbasetemp() / "any.txt"
        file.write_text(text)
        pieces = list(_paragraphs(file, piece, piece + longer))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 2 * (piece + longer)

    def test_changed_file_is_read_anew(self, tmp_path: Path) -> None:
        file = tmp_path / "a.txt"
        file.write_text("Before.")
        before = open_documents(file)
        file.write_text("After it.")
        assert _contents(open_documents(file)) == ["After it."]
        assert before.identity() != open_documents(file).identity()

    def test_same_text_elsewhere_is_the_same_corpus(self, tmp_path: Path) -> None:
        identities = set()
        for name in ("a.txt", "b.txt"):
            (tmp_path / name).write_text("Here it is.")
            identities.add(open_documents(tmp_path / name).identity())
        assert len(identities) == 1

    def test_folder_of_text_files(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / "texts").mkdir(exist_ok=True)
            (tmp_path / "texts" / f"{name}.txt").write_text(f"Text {name}.")
        assert sorted(_contents(open_documents(tmp_path / "texts"))) == ["Text a.", "Text b."]


class TestRefusals:
    @pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/no/such/folder", "~/no.txt"])
    def test_missing_file(self, name: str) -> None:
        with pytest.raises(InputError, match=r"no such file or folder.*tokens\.source=bundled"):
            open_documents(name)

    def test_unknown_file_type(self, tmp_path: Path) -> None:
        (tmp_path / "a.docx").write_text("text")
        with pytest.raises(InputError, match=r"a\.docx.*\.txt, \.jsonl"):
            open_documents(tmp_path / "a.docx")

    def test_folder_of_several_types(self, tmp_path: Path) -> None:
        _lines(tmp_path / "both" / "a.jsonl", [{"text": "a"}])
        _lines(tmp_path / "both" / "b.json", [{"text": "b"}])
        with pytest.raises(InputError, match=r"several types \(\.json, \.jsonl\)"):
            open_documents(tmp_path / "both")

    def test_folder_without_data(self, tmp_path: Path) -> None:
        (tmp_path / "none").mkdir()
        with pytest.raises(InputError, match=r"none' cannot be read"):
            open_documents(tmp_path / "none")

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    def test_empty_file(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).touch()
        with pytest.raises(InputError, match="is empty"):
            open_documents(tmp_path / name)

    @pytest.mark.parametrize("name", ["blank.txt", "blank.jsonl"])
    def test_file_of_blank_lines(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("\n \n\n" if name.endswith("txt") else "\n\n")
        with pytest.raises(InputError, match=rf"{name}' is empty"):
            open_documents(tmp_path / name)

    def test_file_name_that_reads_as_a_pattern(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "wrong"}\n')
        documents = open_documents(_lines(tmp_path / "[ab] *.jsonl", [{"text": "right"}]))
        assert _contents(documents) == ["right"]

    def test_missing_split(self, tmp_path: Path) -> None:
        file = _lines(tmp_path / "parts" / "test.jsonl", [{"text": "a"}])
        with pytest.raises(InputError, match=r"tokens\.split='train'.*it has test"):
            open_documents(tmp_path / "parts")
        with pytest.raises(InputError, match=r"tokens\.split='test'.*it has train"):
            open_documents(file, split="test")

    def test_broken_json(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
        with pytest.raises(InputError, match=r"a\.jsonl' cannot be read: "):
            open_documents(tmp_path / "a.jsonl")
        assert capfd.readouterr() == ("", "")

    def test_text_that_is_not_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes("Zoë".encode("latin-1"))
        with pytest.raises(InputError, match=r"a\.txt' cannot be read: .*utf-8"):
            open_documents(tmp_path / "a.txt")

    def test_hub_that_cannot_be_reached(self) -> None:
        with pytest.raises(InputError, match=r"no local file or folder.*HF_HUB_OFFLINE"):
            open_documents("nobody/nothing")

    def test_hub_that_breaks_off(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def rows() -> Iterator[dict[str, str]]:
            yield {"text": "a"}
            raise ConnectionError("connection reset")

        stream = datasets.IterableDataset.from_generator(rows)
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
        retries = Retries(2, sleep=lambda _: None)
        with pytest.raises(BrokenText, match="connection reset"):
            _contents(open_documents("someone/stories", retries=retries))

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            OSError("Not enough disk space. Needed: 9 GiB (download: 0, generated: 9 GiB)"),
        ],
    )
    def test_full_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise datasets.exceptions.DatasetGenerationError("failed") from error

        monkeypatch.setattr(datasets, "load_dataset", fail)
        file = _lines(tmp_path / "a.jsonl", [{"text": "a"}])
        with pytest.raises(InputError, match=r"no free disk.*cache.*HF_DATASETS_CACHE"):
            open_documents(file)

    def test_cache_that_cannot_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "no folder").touch()
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "no folder" / "cache")
        file = _lines(tmp_path / "a.jsonl", [{"text": "a"}])
        with pytest.raises(InputError, match=r"no folder/cache, cannot be written.*HF_DATASETS"):
            open_documents(file)


def test_nothing_is_shown_while_reading(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _lines(tmp_path / "folder" / "a.jsonl", [{"text": "a"}])
    (tmp_path / "folder" / "README.md").write_text("# No metadata here")
    open_documents(tmp_path / "folder")
    (tmp_path / "a.txt").write_text("a")
    open_documents(tmp_path / "a.txt")
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.shared
def test_real_folders_have_the_splits_of_their_names(shared: Path) -> None:
    stories = shared / "text" / "tinystories"
    assert open_documents(stories).count == 2316 + 2397
    assert open_documents(stories, split="validation").count == 900
    with pytest.raises(InputError, match="it has validation, test"):
        open_documents(shared / "text" / "wikitext-2")


def _on_the_hub(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    folder: Path,
    rows: list[Any],
    asked: dict[str, Any] | None = None,
) -> str:
    """Have `datasets` stream these rows, in two files, as it would those of the hub's `name`."""
    half = len(rows) // 2 + 1
    files = [
        str(_lines(folder / "hub" / f"{i}.jsonl", part))
        for i, part in enumerate([rows[:half], rows[half:]])
        if part
    ]
    load = datasets.load_dataset

    def load_dataset(path: str, subset: str | None = None, **options: Any) -> Any:
        if asked is not None:
            asked.update(path=path, name=subset, **options)
        assert options["streaming"]
        return load("json", data_files=files, split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return name
