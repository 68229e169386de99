from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from groupsae.errors import InputError
from groupsae.host.documents import Document, Position
from groupsae.host.tokens import (
    Corpus,
    EndOfText,
    Joints,
    TokenStream,
    open_corpus,
    pack,
    special_mask,
)


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        cache = tmp_path_factory.mktemp("cache")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        yield


def byte_tokenizer(
    bos: str | None = None, eos: str | None = "<eos>", adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """One token per byte: every text has its own ids, and they can be turned back."""
    special = [token for token in dict.fromkeys((bos, eos)) if token]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        assert bos
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)


PLAIN = byte_tokenizer()  # as Pythia's: no BOS before a text
WITH_BOS = byte_tokenizer("<bos>", adds_bos=True)  # as Llama's

STORIES = [f"Story {i}: " + "so it went on, " * (i % 7) + "and ended." for i in range(400)]


def write(path: Path, rows: list[Any], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    return path


class Listed:
    """Documents in a list, in another order each epoch."""

    def __init__(self, contents: list[Any]) -> None:
        self.contents = contents
        self.count = len(contents)

    def read(self, start: Position) -> Iterator[Document]:
        order = np.random.default_rng(start.epoch).permutation(len(self.contents))
        for i in range(start.document, len(order)):
            yield Document(Position(start.epoch, i), self.contents[order[i]])

    def identity(self) -> str:
        return repr(self.contents)


def corpus_of(contents: list[Any], **changed: Any) -> Corpus:
    """A corpus of these documents; the ids of plain numbers where no tokenizer is given."""
    fields = {
        "source": "a list",
        "split": "train",
        "documents": Listed(contents),
        "tokenizer": None,
        "joints": Joints(bos=None, eos=0),
        "context_length": 8,
        "held_out_share": 0.0,
        "seed": 0,
        "repeat": False,
        "vocab_size": None,
    }
    return Corpus(**(fields | changed))


def drain(stream: TokenStream) -> list[list[int]]:
    """All the contexts that are left."""
    try:
        stream.next_contexts(10**5)
    except EndOfText as end:
        return stream.next_contexts(end.contexts_left).tolist()
    raise AssertionError("the text has no end")


def one_token_at_a_time(corpus: Corpus) -> Iterator[list[int]]:
    """The contexts of documents of ids, without batches, blocks and reading ahead."""
    bos, eos = corpus.joints
    context: list[int] = []
    for epoch in count():
        for document in corpus.documents.read(Position(epoch, 0)):
            for token in [bos, *document.content, eos] if len(document.content) else []:
                if token is None:
                    continue
                if not context and bos is not None and token != bos:
                    context.append(bos)
                context.append(token)
                if len(context) == corpus.context_length:
                    yield context
                    context = []


def texts_in(contexts: list[list[int]], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The whole documents among these contexts, in order."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    documents: list[list[int]] = [[]]
    for i in (i for context in contexts for i in context):
        if i == eos:
            documents.append([])
        elif i != bos:
            documents[-1].append(i)
    return tokenizer.batch_decode(documents[:-1])


ids_documents = st.lists(
    st.lists(st.integers(2, 9), max_size=12).map(lambda ids: np.array(ids, np.int64)),
    min_size=8,
    max_size=40,
).filter(lambda documents: sum(map(len, documents)) >= 20)
any_joints = st.sampled_from([Joints(None, 0), Joints(1, 0), Joints(1, None), Joints(None, None)])


class TestPacking:
    @settings(deadline=None, max_examples=30)
    @given(
        documents=ids_documents,
        joints=any_joints,
        context_length=st.integers(2, 20),
        sizes=st.lists(st.integers(0, 5), min_size=1, max_size=10),
    )
    def test_contexts_are_the_joined_documents_cut(
        self, documents: list[np.ndarray], joints: Joints, context_length: int, sizes: list[int]
    ) -> None:
        corpus = corpus_of(documents, joints=joints, context_length=context_length, repeat=True)
        stream = corpus.train()
        got = [row for n in sizes for row in stream.next_contexts(n).tolist()]
        assert got == list(islice(one_token_at_a_time(corpus), len(got)))
        assert stream.tokens_seen == len(got) * context_length

    @settings(deadline=None)
    @given(
        tokens=st.lists(st.integers(0, 3), max_size=60),
        n=st.integers(0, 10),
        context_length=st.integers(2, 8),
        bos=st.sampled_from([None, 0]),
    )
    def test_pack_loses_nothing_and_fills_what_it_can(
        self, tokens: list[int], n: int, context_length: int, bos: int | None
    ) -> None:
        contexts, used = pack(np.array(tokens, np.int64), n, context_length, bos)
        text = [t for t in contexts.flatten().tolist() if t != bos]
        assert text == [t for t in tokens[:used] if t != bos]
        assert len(contexts) == n or len(tokens) - used < context_length
        if bos is not None:
            assert (contexts[:, 0] == bos).all()

    @pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS], ids=["plain", "with BOS"])
    def test_text_comes_back_whole(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        file = write(tmp_path / "a.jsonl", [*STORIES, "", "  \n", None])
        corpus = open_corpus(file, tokenizer=tokenizer, context_length=50, held_out=0)
        contexts = drain(corpus.train())
        texts = texts_in(contexts, tokenizer)
        assert texts != sorted(texts)
        assert Counter(texts) <= Counter(STORIES)
        assert len(texts) >= len(STORIES) - 1
        if tokenizer is WITH_BOS:
            assert {context[0] for context in contexts} == {tokenizer.bos_token_id}
        else:
            assert contexts[0][:5] == tokenizer("Story")["input_ids"]

    def test_contexts_are_int64_on_the_cpu(self) -> None:
        contexts = corpus_of([np.arange(1, 50)]).train().next_contexts(3)
        assert contexts.dtype == torch.int64
        assert contexts.shape == (3, 8)
        assert contexts.device.type == "cpu"

    def test_of_books_only_what_is_needed_is_read(self) -> None:
        given: list[Position] = []

        class Books(Listed):
            def read(self, start: Position) -> Iterator[Document]:
                for document in super().read(start):
                    given.append(document.position)
                    yield document

        books = Books([np.full(600_000, i) for i in range(1, 20)])
        corpus_of([], documents=books).train().next_contexts(1)
        assert len(given) == 2

    def test_longest_documents_span_contexts(self) -> None:
        corpus = corpus_of([np.arange(1, 1000)], joints=Joints(bos=1000, eos=None))
        contexts = np.array(drain(corpus.train()))
        assert (contexts[:, 0] == 1000).all()
        assert contexts[:, 1:].flatten().tolist() == list(range(1, 7 * len(contexts) + 1))


class TestJoints:
    @pytest.mark.parametrize(
        ("tokenizer", "prepend_bos", "joints"),
        [
            (PLAIN, None, Joints(None, 0)),
            (WITH_BOS, None, Joints(0, 1)),
            (WITH_BOS, False, Joints(None, 1)),
            (byte_tokenizer("<bos>"), None, Joints(None, 1)),
            (byte_tokenizer("<bos>"), True, Joints(0, 1)),
            (byte_tokenizer("<both>", "<both>"), None, Joints(None, 0)),
            (byte_tokenizer("<both>", "<both>", adds_bos=True), None, Joints(0, None)),
            (byte_tokenizer("<bos>", None), None, Joints(None, 0)),
            (byte_tokenizer("<bos>", None, adds_bos=True), None, Joints(0, None)),
            (byte_tokenizer(None, None), None, Joints(None, None)),
            (None, None, Joints(None, None)),
        ],
    )
    def test_bos_and_eos_are_put_where_the_tokenizer_has_them(
        self, tmp_path: Path, tokenizer: Any, prepend_bos: bool | None, joints: Joints
    ) -> None:
        file = write(tmp_path / "a.jsonl", ["a"])
        corpus = open_corpus(file, tokenizer=tokenizer, context_length=8, prepend_bos=prepend_bos)
        assert corpus.joints == joints
        assert (corpus.describe()["bos"], corpus.describe()["eos"]) == joints

    @pytest.mark.parametrize("tokenizer", [PLAIN, None])
    def test_bos_that_does_not_exist(self, tmp_path: Path, tokenizer: Any) -> None:
        file = write(tmp_path / "a.jsonl", ["a"])
        with pytest.raises(InputError, match=r"tokens\.prepend_bos=true"):
            open_corpus(file, tokenizer=tokenizer, context_length=8, prepend_bos=True)

    def test_ids_that_bring_their_joints_get_no_second_ones(self) -> None:
        bare = [np.array(ids) for ids in ([5, 6, 7], [8, 9], [5, 8])]
        joined = [np.array([1, *ids, 0]) for ids in bare]
        kwargs = {"joints": Joints(bos=1, eos=0), "context_length": 3, "repeat": True}
        expected = corpus_of(bare, **kwargs).train().next_contexts(5)
        assert corpus_of(joined, **kwargs).train().next_contexts(5).equal(expected)


class TestHeldOut:
    @pytest.fixture
    def corpus(self, tmp_path: Path) -> Corpus:
        file = write(tmp_path / "a.jsonl", STORIES + [f" {story}\n" for story in STORIES])
        return open_corpus(file, tokenizer=PLAIN, context_length=16, held_out=0.2)

    def test_each_document_and_its_copies_are_on_one_side(self, corpus: Corpus) -> None:
        train = {text.strip() for text in texts_in(drain(corpus.train()), PLAIN)}
        held_out = {text.strip() for text in texts_in(drain(corpus.held_out()), PLAIN)}
        assert not train & held_out
        assert train | held_out >= set(STORIES)
        assert 0.1 < len(held_out) / len(STORIES) < 0.3

    def test_training_never_sees_it_in_any_epoch(self, corpus: Corpus, tmp_path: Path) -> None:
        repeated = open_corpus(
            tmp_path / "a.jsonl",
            tokenizer=PLAIN,
            context_length=16,
            held_out=0.2,
            on_exhausted="repeat",
        )
        stream = repeated.train()
        seen: set[str] = set()
        while stream.epoch < 3:
            seen |= {text.strip() for text in texts_in(stream.next_contexts(500).tolist(), PLAIN)}
        assert not seen & {t.strip() for t in texts_in(drain(corpus.held_out()), PLAIN)}

    def test_it_depends_on_the_seed_and_on_nothing_else(self, tmp_path: Path) -> None:
        def held_out(stories: list[str], seed: int) -> set[str]:
            file = write(tmp_path / f"{len(stories)}.jsonl", stories)
            corpus = open_corpus(file, tokenizer=PLAIN, context_length=2, held_out=0.3, seed=seed)
            return set(texts_in(drain(corpus.held_out()), PLAIN))

        assert held_out(STORIES, 0) != held_out(STORIES, 1)
        few = held_out(STORIES[:100], 0)
        assert few <= held_out(STORIES, 0)
        assert len(few) > 10

    def test_ids_are_held_out_too(self) -> None:
        documents = [np.array([i, i + 1, i]) for i in range(1, 300)]
        corpus = corpus_of(documents * 2, held_out_share=0.3, context_length=4)
        train, held_out = drain(corpus.train()), drain(corpus.held_out())
        assert len(train) + len(held_out) == 2 * len(documents)
        assert not {tuple(c) for c in train} & {tuple(c) for c in held_out}

    def test_none_is_asked_for_though_none_is_kept(self) -> None:
        with pytest.raises(InputError, match=r"tokens\.held_out=0 .*0\.05"):
            corpus_of([np.arange(100)]).held_out()


class TestCursor:
    @settings(deadline=None, max_examples=30)
    @given(
        documents=ids_documents,
        joints=any_joints,
        context_length=st.integers(2, 20),
        held_out=st.sampled_from([0.0, 0.3]),
        cuts=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=6),
    )
    def test_resumed_again_and_again_the_contexts_are_the_same(
        self,
        documents: list[np.ndarray],
        joints: Joints,
        context_length: int,
        held_out: float,
        cuts: list[tuple[int, int]],
    ) -> None:
        """Each cut: contexts that are given before the save, and after it but lost."""
        kwargs: dict[str, Any] = {
            "joints": joints,
            "context_length": context_length,
            "held_out_share": held_out,
            "repeat": True,
        }
        try:
            whole = corpus_of(documents, **kwargs).train()
        except InputError:  # too little was left by the held-out part
            return
        expected = whole.next_contexts(sum(kept for kept, _ in cuts) + 3)
        stream = corpus_of(documents, **kwargs).train()
        got = []
        for kept, lost in cuts:
            got.append(stream.next_contexts(kept))
            state = json.dumps(stream.state_dict())
            stream.next_contexts(lost)
            stream = corpus_of(documents, **kwargs).train()
            stream.load_state_dict(json.loads(state))
            assert json.dumps(stream.state_dict()) == state
        got.append(stream.next_contexts(3))
        assert torch.cat(got).equal(expected)
        assert stream.tokens_seen == whole.tokens_seen
        assert stream.epoch == whole.epoch

    @pytest.fixture(params=["bundled", "txt", "jsonl", "parquet of ids", "saved", "stream"])
    def source(
        self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> str:
        source = tmp_path / "corpus"
        rows = [{"text": f"Story {i}" + "!" * (i % 11)} for i in range(1200)]
        if request.param == "bundled":
            return "bundled"
        if request.param == "txt":
            source = source.with_suffix(".txt")
            source.write_text("\n\n".join(row["text"] for row in rows))
        elif request.param == "jsonl":
            source = write(source.with_suffix(".jsonl"), [row["text"] for row in rows])
        elif request.param == "parquet of ids":
            source = source.with_suffix(".parquet")
            ids = PLAIN([row["text"] for row in rows])["input_ids"]
            datasets.Dataset.from_dict({"input_ids": ids}).to_parquet(str(source))
        elif request.param == "saved":
            datasets.Dataset.from_list(rows).save_to_disk(str(source))
        elif request.param == "stream":
            file, load = (
                write(tmp_path / "hub", [row["text"] for row in rows]),
                datasets.load_dataset,
            )
            monkeypatch.setattr(
                datasets,
                "load_dataset",
                lambda *_, **__: load(
                    "json", data_files=[str(file)], split="train", streaming=True
                ),
            )
            return "someone/stories"
        return str(source)

    @pytest.mark.parametrize("part", ["train", "held_out"])
    def test_every_source_can_be_resumed_anywhere(self, source: str, part: str) -> None:
        def fresh() -> TokenStream:
            corpus = open_corpus(
                source,
                tokenizer=WITH_BOS,
                context_length=31,
                held_out=0.3,
                seed=4,
                on_exhausted="repeat",
            )
            return getattr(corpus, part)()

        most = 50 if source == "bundled" else 500  # the generator is slow under type checks
        cuts = np.random.default_rng(0).integers(1, most, size=3).tolist()
        expected = fresh().next_contexts(sum(cuts) + 5)
        stream, got = fresh(), []
        for cut in cuts:
            got.append(stream.next_contexts(cut))
            state = json.loads(json.dumps(stream.state_dict()))
            stream = fresh()
            stream.load_state_dict(state)
        got.append(stream.next_contexts(5))
        assert torch.cat(got).equal(expected)

    def test_another_process_goes_on_alike(self, tmp_path: Path) -> None:
        file = write(tmp_path / "a.jsonl", [list(range(i)) for i in range(300)], column="tokens")
        stream = open_corpus(file, tokenizer=None, context_length=32).train()
        stream.next_contexts(100)
        state = json.dumps(stream.state_dict())
        program = (
            "import json, sys; from groupsae.host.tokens import open_corpus\n"
            "stream = open_corpus(sys.argv[1], tokenizer=None, context_length=32).train()\n"
            "stream.load_state_dict(json.loads(sys.argv[2]))\n"
            "print(stream.next_contexts(50).tolist())"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(file), state],
            check=True,
            capture_output=True,
            text=True,
        )
        assert json.loads(done.stdout) == stream.next_contexts(50).tolist()

    @pytest.mark.parametrize(
        ("changed", "named"),
        [
            ({"context_length": 9}, r"context_length \(there 8, here 9\)"),
            ({"seed": 5}, r"seed \(there 0, here 5\)"),
            ({"documents": Listed([np.arange(90)])}, "documents"),
            ({"joints": Joints(0, 1)}, "joints"),
            ({"tokenizer": PLAIN}, "tokenizer"),
            ({"held_out_share": 0.01}, "held_out"),
        ],
    )
    def test_of_another_corpus_is_refused(self, changed: dict[str, Any], named: str) -> None:
        documents = [np.full(20, i) for i in range(50)]
        state = corpus_of(documents).train().state_dict()
        stream = corpus_of(documents, **changed).train()
        with pytest.raises(InputError, match=named):
            stream.load_state_dict(state)

    def test_of_the_other_part_is_refused(self) -> None:
        corpus = corpus_of([np.full(20, i) for i in range(50)], held_out_share=0.5)
        with pytest.raises(InputError, match="part"):
            corpus.train().load_state_dict(corpus.held_out().state_dict())

    def test_reading_that_failed_can_be_tried_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        documents = [np.full(20, i) for i in range(600)]
        expected = corpus_of(documents).train().next_contexts(1500)
        stream = corpus_of(documents).train()
        got = [stream.next_contexts(700)]
        read = Listed.read

        def breaks_off(self: Listed, start: Position) -> Iterator[Document]:
            yield from islice(read(self, start), 50)
            raise InputError("connection reset")

        state = stream.state_dict()
        with monkeypatch.context() as offline:
            offline.setattr(Listed, "read", breaks_off)
            stream.load_state_dict(state)
            with pytest.raises(InputError, match="connection reset"):
                stream.next_contexts(800)
            with pytest.raises(InputError, match="connection reset"):
                stream.next_contexts(800)
            assert stream.state_dict() == state
        stream.load_state_dict(state)
        got.append(stream.next_contexts(800))
        assert torch.cat(got).equal(expected)

    def test_streams_of_one_corpus_are_independent(self) -> None:
        corpus = corpus_of([np.full(20, i) for i in range(50)])
        first, second = corpus.train(), corpus.train()
        first.next_contexts(10)
        assert second.next_contexts(10).equal(corpus.train().next_contexts(10))


class TestEndOfText:
    def test_it_is_said_and_nothing_is_consumed(self) -> None:
        stream = corpus_of([np.arange(1, 50)]).train()  # 49 + EOS = 6 contexts of 8, and 2 tokens
        stream.next_contexts(4)
        state = stream.state_dict()
        with pytest.raises(
            EndOfText,
            match=r"'a list' \(training part\) is used up: it holds 6 contexts of 8 tokens "
            r"\(48 tokens\), and 7 \(56 tokens\) are asked for.*tokens\.on_exhausted=repeat",
        ) as caught:
            stream.next_contexts(3)
        assert isinstance(caught.value, InputError)
        assert caught.value.contexts_left == 2
        assert stream.state_dict() == state
        assert stream.next_contexts(2).flatten().tolist() == list(range(33, 49))

    def test_repeated_in_a_new_order_and_said_once(self, caplog: pytest.LogCaptureFixture) -> None:
        documents = [np.full(7, i) for i in range(1, 41)]
        stream = corpus_of(documents, repeat=True).train()
        with caplog.at_level(logging.WARNING, logger="groupsae"):
            epochs = [stream.next_contexts(40).tolist() for _ in range(3)]
            assert stream.epoch == 2
            stream.next_contexts(400)
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
        assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
        assert [r.getMessage() for r in caplog.records] == [
            "The text of a list (training part) is used up: it is read again, each time in a new "
            "order."
        ]

    @pytest.mark.parametrize("repeat", [False, True])
    def test_too_little_for_what_is_needed_at_once(self, repeat: bool) -> None:
        corpus = corpus_of([np.arange(1, 50)], repeat=repeat)
        stream = corpus.train()
        stream.require(48)
        with pytest.raises(
            InputError, match=r"training part of 'a list' fills 6 contexts of 8.* 7 contexts \(56"
        ):
            stream.require(49)
        assert stream.next_contexts(6).equal(corpus.train().next_contexts(6))

    @pytest.mark.parametrize("repeat", [False, True])
    @pytest.mark.parametrize(
        ("documents", "said"),
        [([], "is empty"), (["", " \n"], "is empty"), ([np.arange(3)], "fills 0 contexts")],
    )
    def test_less_than_one_context(self, documents: list[Any], said: str, repeat: bool) -> None:
        with pytest.raises(InputError, match=rf"training part .*{said}.*Give more text"):
            corpus_of(documents, repeat=repeat).train()

    def test_held_out_part_too_small(self) -> None:
        corpus = corpus_of([np.arange(1, 500)], held_out_share=1e-9)
        with pytest.raises(InputError, match=r"held-out part .*raise tokens\.held_out=1e-09"):
            corpus.held_out()


class TestRefusals:
    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"context_length": 1}, r"tokens\.context_length=1: .*at least 2"),
            ({"context_length": 513, "model_context_length": 512}, r"513 is longer .* 512"),
            ({"held_out": 1.0}, r"tokens\.held_out=1\.0"),
            ({"held_out": -0.1}, r"tokens\.held_out=-0\.1"),
            ({"seed": -1}, r"tokens\.seed=-1"),
        ],
    )
    def test_impossible_settings(self, changed: dict[str, Any], said: str) -> None:
        fine: dict[str, Any] = {"tokenizer": None, "context_length": 8}
        with pytest.raises(InputError, match=said):
            open_corpus("bundled", **(fine | changed))

    def test_text_without_a_tokenizer(self) -> None:
        with pytest.raises(InputError, match="'a list' holds text, and the model has no tokenizer"):
            corpus_of(["a story"]).train()

    @pytest.mark.parametrize("wrong", [-1, 50, 10**12])
    def test_ids_outside_the_vocabulary(self, wrong: int) -> None:
        documents = [np.arange(40), np.array([1, wrong, 2])]
        with pytest.raises(InputError, match=rf"token id {wrong}, .* 0 to 49"):
            corpus_of(documents, vocab_size=50).train()

    def test_tokenizer_of_another_vocabulary(self, tmp_path: Path) -> None:
        file = write(tmp_path / "a.jsonl", STORIES)
        corpus = open_corpus(file, tokenizer=PLAIN, context_length=8, vocab_size=60)
        with pytest.raises(InputError, match="for another model"):
            corpus.train()


class TestSpecialMask:
    def test_marks_special_tokens_only(self) -> None:
        input_ids = torch.tensor([[1, 5, 2], [6, 1, 7]])
        expected = torch.tensor([[True, False, True], [False, True, False]])
        assert special_mask(input_ids, frozenset({1, 2})).equal(expected)
        assert not special_mask(input_ids, ()).any()

    def test_of_a_corpus_marks_the_joints(self, tmp_path: Path) -> None:
        file = write(tmp_path / "a.jsonl", STORIES)
        corpus = open_corpus(file, tokenizer=WITH_BOS, context_length=32)
        contexts = corpus.train().next_contexts(50)
        text = contexts[~special_mask(contexts, WITH_BOS.all_special_ids)]
        assert "<" not in WITH_BOS.decode(text)
        assert "Story" in WITH_BOS.decode(text)


def test_describes_what_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", STORIES)
    corpus = open_corpus(file, tokenizer=WITH_BOS, context_length=32, seed=2)
    assert json.loads(json.dumps(corpus.describe())) == {
        "source": str(file),
        "split": "train",
        "documents": 400,
        "context_length": 32,
        "held_out": 0.05,
        "seed": 2,
        "bos": 0,
        "eos": 1,
    }


@pytest.mark.shared
class TestRealText:
    def test_stories_with_bos(self, shared: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories3M")
        file = shared / "text" / "tinystories" / "train.jsonl"
        stories = [json.loads(line)["text"] for line in file.read_text().splitlines()]
        ids = tokenizer(stories, add_special_tokens=False)["input_ids"]
        assert sum(map(len, ids)) == 528_203  # the 528k of its README

        corpus = open_corpus(
            file,
            tokenizer=tokenizer,
            context_length=256,
            held_out=0,
            vocab_size=4096,
            model_context_length=512,
        )
        assert corpus.joints == Joints(bos=1, eos=2)
        contexts = drain(corpus.train())
        assert {context[0] for context in contexts} == {1}
        run = [i for context in contexts for i in context if i != 1]
        assert 0 <= 528_203 + len(stories) - len(run) < 256  # the tail that fills no context
        *documents, _ = " ".join(map(str, run)).split(" 2 ")
        assert Counter(documents) <= Counter(" ".join(map(str, story)) for story in ids)
        assert len(documents) > len(stories) - 3

    def test_prose_as_pythia_reads_it(self, shared: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "pythia-tokenizer")
        path = shared / "text" / "tinyshakespeare" / "input.txt"
        corpus = open_corpus(path, tokenizer=tokenizer, context_length=128, vocab_size=50_304)
        assert corpus.joints == Joints(bos=None, eos=0)
        train, held_out = drain(corpus.train()), drain(corpus.held_out())
        assert 0.02 < len(held_out) / (len(train) + len(held_out)) < 0.1
        pieces = texts_in(train, tokenizer) + texts_in(held_out, tokenizer)
        text = path.read_text()
        assert sum(piece in text for piece in pieces) == len(pieces) > 300
        assert sum(map(len, pieces)) > 0.99 * len(text) - 5_000


def test_batches_are_the_next_contexts_with_what_counts(corpus: Corpus) -> None:
    batches = list(corpus.train().batches(16 * 7 - 3, batch_contexts=3, special=(0,)))
    assert [len(input_ids) for input_ids, _ in batches] == [3, 3, 1]
    read = torch.cat([input_ids for input_ids, _ in batches])
    assert torch.equal(read, corpus.train().next_contexts(7))
    assert torch.equal(torch.cat([counted for _, counted in batches]), read != 0)
