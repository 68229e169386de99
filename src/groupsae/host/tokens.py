"""Text becomes contexts: documents are tokenised, joined and packed; the place can be saved."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from groupsae.errors import InputError
from groupsae.host.documents import Document, Documents, Position, content_bytes, open_documents
from groupsae.host.faults import BrokenText, Fault, Kind, OnError, Retries, reason_of

_log = logging.getLogger(__name__)

Part = Literal["train", "held_out"]


def open_corpus(
    source: str | Path,
    *,
    tokenizer: Tokenizer | None,
    context_length: int,
    split: str = "train",
    subset: str | None = None,
    column: str | None = None,
    revision: str | None = None,
    held_out: float = 0.05,
    seed: int = 0,
    on_exhausted: Literal["error", "repeat"] = "error",
    prepend_bos: bool | None = None,
    vocab_size: int | None = None,
    model_context_length: int | None = None,
    on_error: OnError = "stop",
    retries: int = 5,
) -> Corpus:
    """Open text or token ids as contexts of a fixed length.

    Args:
        source: "bundled", a file, a folder or the name of a hub data set; what is read of them,
            and how `split`, `subset`, `column` and `revision` choose among it, is told at
            :func:`groupsae.host.documents.open_documents`.
        tokenizer: the host model's. None is enough for documents of token ids, which are then
            joined as they are.
        context_length: tokens per context, BOS included.
        split: of the source, not to be confused with the held-out part.
        subset: of a hub data set (its configuration).
        column: of text or of token ids.
        revision: of a hub data set.
        held_out: share of the documents that `train()` never gives and `held_out()` gives alone.
            A hash of the document's content and `seed` decides, so copies stay on one side.
        seed: of the order of the documents, of the held-out part, and of the bundled text.
        on_exhausted: when the text is used up, raise EndOfText or begin again in a new order.
        prepend_bos: whether contexts and documents begin with BOS; by default if the tokenizer
            itself puts it before a text.
        vocab_size: token ids must be smaller (rows of the host model's embedding).
        model_context_length: the longest context of the host model; None for no limit.
        on_error: where a document, a file or the rest of a streamed file cannot be read, raise
            BrokenText, or pass over it and count it: see :attr:`TokenStream.skipped`.
        retries: how often a read of a stream that breaks off is tried again.

    Raises:
        InputError: nothing readable, no such split or column, no documents, a context that does
            not fit the model, a text without a tokenizer.
    """
    if context_length < 2:
        raise InputError(f"tokens.context_length={context_length}: a context has at least 2 tokens")
    if model_context_length is not None and context_length > model_context_length:
        raise InputError(
            f"tokens.context_length={context_length} is longer than the model's context of "
            f"{model_context_length} tokens. Set it to {model_context_length} or less."
        )
    if not 0 <= held_out < 1:
        raise InputError(
            f"tokens.held_out={held_out} is the share of documents kept from training: "
            "at least 0 and less than 1"
        )
    if seed < 0:
        raise InputError(f"tokens.seed={seed} is to be 0 or more")
    documents = open_documents(
        source,
        split=split,
        subset=subset,
        column=column,
        revision=revision,
        seed=seed,
        on_error=on_error,
        retries=Retries(retries),
    )
    return Corpus(
        source=str(source),
        split=split,
        documents=documents,
        tokenizer=tokenizer,
        joints=joints_of(tokenizer, prepend_bos),
        context_length=context_length,
        held_out_share=held_out,
        seed=seed,
        repeat=on_exhausted == "repeat",
        vocab_size=vocab_size,
        on_error=on_error,
    )


@dataclass(frozen=True)
class Corpus:
    """Documents, and how they become contexts; made by :func:`open_corpus`."""

    source: str
    split: str
    documents: Documents
    tokenizer: Tokenizer | None
    joints: Joints
    context_length: int
    held_out_share: float
    seed: int
    repeat: bool
    vocab_size: int | None
    on_error: OnError = "stop"
    _told: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def train(self) -> TokenStream:
        """A new stream of the documents that are not held out, from the beginning.

        Raises:
            InputError: they do not fill one context.
        """
        return self._stream("train")

    def held_out(self) -> TokenStream:
        """A new stream of the held-out documents, from the beginning.

        Raises:
            InputError: they do not fill one context.
        """
        if self.held_out_share == 0:
            raise InputError(
                "tokens.held_out=0 keeps no documents from training, and held-out tokens are asked "
                "for. Set it to 0.05, say."
            )
        return self._stream("held_out")

    def describe(self) -> dict[str, Any]:
        """What is read and how, for the record; fit for JSON."""
        return {
            "source": self.source,
            "split": self.split,
            "documents": self.documents.count,
            "context_length": self.context_length,
            "held_out": self.held_out_share,
            "seed": self.seed,
            "bos": self.joints.bos,
            "eos": self.joints.eos,
        }

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What its contexts depend on besides the place in it; fit for JSON."""
        return {
            "documents": self.documents.identity(),
            "held_out": self.held_out_share,
            "seed": self.seed,
            "context_length": self.context_length,
            "joints": list(self.joints),
            "tokenizer": _tokenizer_identity(self.tokenizer),
        }

    def tell(self, fault: Fault) -> None:
        """Log a fault that is passed over, the first of its kind."""
        if fault.kind not in self._told:
            self._told.add(fault.kind)
            _log.warning(
                "tokens.on_error=skip: passed over %s; more of this kind (%s) are only counted",
                *(fault.what, fault.kind),
            )

    def _stream(self, part: Part) -> TokenStream:
        _check_joints(self)
        stream = TokenStream(self, part)
        stream.require(self.context_length)
        return stream


class Joints(NamedTuple):
    """The ids around each document; None where nothing is put there."""

    bos: int | None
    """Begins every document and every context."""
    eos: int | None
    """Ends every document."""


class TokenStream:
    """Packed contexts of one part of a corpus, in a fixed shuffled order.

    Documents become `[BOS] ids [EOS]`, one after another, and that run of tokens is cut into
    contexts: without padding, and with nothing left out, since the next context (in the next epoch
    too) goes on where the last one ended. Every context begins with BOS where the model wants it:
    where the run has none at that place, one is put there.
    """

    def __init__(self, corpus: Corpus, part: Part) -> None:
        self.corpus = corpus
        self.part = part
        self.context_length = corpus.context_length
        self.tokens_seen = 0
        self._skipped: Counter[str] = Counter()
        self._identity = {**corpus.identity, "part": part}
        self._cursor = _Cursor(Position(epoch=0, document=0), offset=0)
        self._rewind()

    @property
    def epoch(self) -> int:
        """How many times the text had been used up when the last context was given."""
        return self._cursor.position.epoch

    @property
    def skipped(self) -> dict[str, int]:
        """What was passed over before the last context that was given, by kind of fault.

        "file" (of a folder) and "stream" (the rest of a streamed file) count files, "not_text",
        "tokenizer" and "vocabulary" documents; a kind that did not occur is left out.
        """
        return dict(self._skipped)

    def next_contexts(self, n: int) -> Int[Tensor, "n context"]:
        """The next `n` contexts of token ids, int64 on the CPU.

        Raises:
            EndOfText: fewer are left, and the corpus is not to be repeated. Nothing is consumed.
            BrokenText: a document is not readable, or a token id is not in the vocabulary, and such
                are not to be passed over. Nothing is consumed.
        """
        contexts, used = self._look_ahead(n, repeat=self.corpus.repeat)
        if len(contexts) < n:
            raise self._end_of_text(n, len(contexts))
        self._consume(used)
        self.tokens_seen += contexts.size
        return torch.from_numpy(contexts)

    def batches(
        self, tokens: int, batch_contexts: int, special: Iterable[int] = ()
    ) -> Iterator[tuple[Int[Tensor, "n context"], Bool[Tensor, "n context"]]]:
        """The next contexts in batches, each with the mask of the tokens that count.

        Args:
            tokens: How many in all; rounded up to whole contexts.
            batch_contexts: Contexts of a batch; the last one may have fewer.
            special: Token ids that do not count.

        Raises:
            EndOfText, InputError: as :meth:`next_contexts`, when a batch is asked for.
        """
        left, special = -(-tokens // self.context_length), tuple(special)
        while left:
            input_ids = self.next_contexts(min(batch_contexts, left))
            left -= len(input_ids)
            yield input_ids, ~special_mask(input_ids, special)

    def require(self, tokens: int) -> None:
        """Check, without consuming anything, that this epoch still holds so many tokens.

        Reads that far ahead: meant for one context or one batch.

        Raises:
            InputError: it does not, whether or not the corpus is to be repeated.
        """
        n = -(-tokens // self.context_length)
        contexts, _ = self._look_ahead(n, repeat=False)
        if len(contexts) < n:
            raise self._too_short(n, len(contexts))

    def state_dict(self) -> dict[str, Any]:
        """The cursor, fit for JSON: from it, any process gives the same next contexts."""
        return {
            "position": list(self._cursor.position),
            "offset": self._cursor.offset,
            "tokens_seen": self.tokens_seen,
            "skipped": self.skipped,
            "corpus": self._identity,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where `state_dict` was taken.

        Raises:
            InputError: it was taken from another corpus, or another way of reading it.
        """
        there = state["corpus"]
        differing = [
            f"{key} (there {there.get(key)!r}, here {self._identity[key]!r})"
            for key in self._differing(state)
        ]
        if differing:
            raise InputError(
                f"The saved place in tokens.source={self.corpus.source!r} belongs to another "
                f"corpus: {', '.join(differing)} differ. Go on with the corpus and the settings it "
                "was saved with, or start a new run."
            )
        self._cursor = _Cursor(Position(*state["position"]), int(state["offset"]))
        self.tokens_seen = int(state["tokens_seen"])
        self._skipped = Counter(state.get("skipped", {}))
        self._rewind()

    def is_of(self, state: Mapping[str, Any]) -> bool:
        """Whether `state_dict` was taken from this corpus, read in this way."""
        return not self._differing(state)

    def _differing(self, state: Mapping[str, Any]) -> list[str]:
        there = state["corpus"]
        return [key for key, value in self._identity.items() if there.get(key) != value]

    def _rewind(self) -> None:
        """Forget what was read ahead and read again from the cursor."""
        self._pending = np.zeros(0, np.int64)
        self._spans: deque[_Span] = deque()  # which document each pending token comes from
        self._reading = self.documents_from(self._cursor.position)
        self._reading_epoch = self._cursor.position.epoch
        self._skip = self._cursor.offset
        self._passed: list[Fault] = []  # since the last document that was read
        self._epoch_is_empty = self._skip == 0  # as far as it was read

    def _look_ahead(self, n: int, repeat: bool) -> tuple[np.ndarray, int]:
        """Up to `n` contexts from the pending tokens, after reading what they need, if it is there.

        Returns them and the number of tokens of the run that they use.
        """
        read = [self._pending]
        missing = n * self.context_length - len(self._pending)
        try:
            while missing > 0 and (tokens := self._read(repeat)) is not None:
                read.append(tokens)
                missing -= len(tokens)
        except BaseException:  # an interrupt, a lost connection: another try begins at the cursor
            self._rewind()
            raise
        self._pending = np.concatenate(read) if len(read) > 1 else self._pending
        return pack(self._pending, n, self.context_length, self.corpus.joints.bos)

    def _consume(self, used: int) -> None:
        self._pending = self._pending[used:]
        while used:
            span = self._spans.popleft()
            taken = min(used, span.stop - span.start)
            self._skipped.update(span.passed)
            self._cursor = _Cursor(span.position, span.start + taken)
            if self._cursor.offset < span.stop:
                self._spans.appendleft(span._replace(start=self._cursor.offset, passed=()))
            used -= taken

    def _read(self, repeat: bool) -> np.ndarray | None:
        """The tokens of the next few documents; None at the end of the text."""
        batch = _batch(self._reading)
        if not batch:
            if not repeat:
                return None
            self._next_epoch()
            return np.zeros(0, np.int64)
        found: list[np.ndarray] = []
        for document, ids in zip(batch, self._tokenise(batch), strict=True):
            if isinstance(ids, Fault):
                self.corpus.tell(ids)
                self._passed.append(ids)
                continue
            start, self._skip = self._skip, 0  # a restored cursor's document was used up to there
            passed = () if start else tuple(fault.kind for fault in self._passed)  # counted then
            self._spans.append(_Span(document.position, start, len(ids), passed))
            self._passed = []
            self._epoch_is_empty = False
            found.append(ids[start:])
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _next_epoch(self) -> None:
        if self._epoch_is_empty:
            raise self._too_short(1, 0)
        self._epoch_is_empty = True
        self._reading_epoch += 1
        if self._reading_epoch == 1:
            _log.warning(
                "The text of %s (%s) is used up: it is read again, each time in a new order.",
                self.corpus.source,
                _NAMES[self.part],
            )
        self._reading = self.documents_from(Position(self._reading_epoch, 0))

    def documents_from(self, start: Position) -> Iterator[Document]:
        """The documents of this part that hold anything, and what is passed over among them.

        Of that, it is not known in which part it belongs: both have it.
        """
        corpus = self.corpus
        for document in corpus.documents.read(start):
            content = content_bytes(document.content)
            if content:
                held_out = _is_held_out(content, corpus.seed, corpus.held_out_share)
                if held_out == (self.part == "held_out"):
                    yield document
            elif document.fault is not None:
                yield document

    def _tokenise(self, batch: list[Document]) -> list[np.ndarray | Fault]:
        """The ids of each document between its joints."""
        bos, eos = self.corpus.joints
        before = np.array([] if bos is None else [bos], np.int64)
        after = np.array([] if eos is None else [eos], np.int64)
        tokenised: list[np.ndarray | Fault] = []
        for document, ids in zip(batch, _token_ids(self.corpus, batch), strict=True):
            if isinstance(ids, np.ndarray):
                if not isinstance(document.content, str):  # ids may bring joints of their own
                    ids = ids[1:] if bos is not None and ids[0] == bos else ids
                    ids = ids[:-1] if eos is not None and ids.size and ids[-1] == eos else ids
                ids = _in_vocabulary(self.corpus, document, ids)
            if isinstance(ids, np.ndarray):
                ids = np.concatenate([before, ids, after])
            tokenised.append(ids)
        return tokenised

    def _end_of_text(self, asked: int, left: int) -> EndOfText:
        length = self.context_length
        held = self.tokens_seen // length + left
        wanted = self.tokens_seen // length + asked
        return EndOfText(
            f"The text of tokens.source={self.corpus.source!r} ({_NAMES[self.part]}) is used up: "
            f"it holds {held:,} contexts of {length} tokens ({held * length:,} tokens), and "
            f"{wanted:,} ({wanted * length:,} tokens) are asked for. Give more text, set "
            "tokens.on_exhausted=repeat to read it again in a new order, or ask for fewer tokens.",
            contexts_left=left,
        )

    def _too_short(self, needed: int, found: int) -> InputError:
        length, text = self.context_length, f"{_NAMES[self.part]} of {self.corpus.source!r}"
        holds = f"fills {found:,} contexts of {length} tokens" if len(self._pending) else "is empty"
        mends = "Give more text, shorten tokens.context_length or make the batch smaller"
        if self.corpus.held_out_share:
            verb = "raise" if self.part == "held_out" else "lower"
            mends += f", or {verb} tokens.held_out={self.corpus.held_out_share}"
        passed = self._skipped + Counter(fault.kind for fault in self._passed)
        passed += Counter(kind for span in self._spans for kind in span.passed)
        besides = "".join(f"; passed over: {n:,} ({kind})" for kind, n in passed.items())
        return InputError(
            f"tokens.source: the {text} {holds}, and {needed:,} contexts ({needed * length:,} "
            f"tokens) are needed at once{besides}. {mends}."
        )


class EndOfText(InputError):  # noqa: N818, the name is what happened
    """The corpus is used up; `contexts_left` are there still, for who is content with them."""

    def __init__(self, message: str, contexts_left: int) -> None:
        super().__init__(message)
        self.contexts_left = contexts_left


@runtime_checkable
class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    def get_vocab(self) -> dict[str, int]: ...

    def __call__(self, text: Any, **options: Any) -> Any: ...


def special_mask(
    input_ids: Int[Tensor, "batch context"], special_token_ids: Collection[int]
) -> Bool[Tensor, "batch context"]:
    """True where a token is special, so that training and metrics can leave it out."""
    special = torch.tensor(sorted(special_token_ids), dtype=torch.int64, device=input_ids.device)
    return torch.isin(input_ids, special)


def pack(
    tokens: np.ndarray, n: int, context_length: int, bos: int | None
) -> tuple[np.ndarray, int]:
    """Cut a run of tokens into contexts, each beginning with `bos` if that is given.

    Returns at most `n` contexts, (contexts, context_length), and how many tokens they use.
    """
    contexts = np.empty((n, context_length), np.int64)
    used = 0
    for filled, context in enumerate(contexts):
        room = context
        if bos is not None and not (used < len(tokens) and tokens[used] == bos):
            context[0], room = bos, context[1:]
        if len(tokens) - used < len(room):
            return contexts[:filled], used
        room[:] = tokens[used : used + len(room)]
        used += len(room)
    return contexts, used


_NAMES = {"train": "training part", "held_out": "held-out part"}
_DOCUMENTS_PER_BATCH = 64
_CHARACTERS_PER_BATCH = 1_000_000  # a batch also ends here, for corpora of books


class _Cursor(NamedTuple):
    """The document of the last token that was given, and how many of its tokens were."""

    position: Position
    offset: int


class _Span(NamedTuple):
    """Tokens start:stop of the document at `position`."""

    position: Position
    start: int
    stop: int
    passed: tuple[str, ...]
    """Kinds of the faults before that document, as long as its first token is among these."""


def _batch(documents: Iterator[Document]) -> list[Document]:
    batch: list[Document] = []
    size = 0
    for document in islice(documents, _DOCUMENTS_PER_BATCH):
        batch.append(document)
        size += len(document.content) if document.content is not None else 0
        if size >= _CHARACTERS_PER_BATCH:
            break
    return batch


def _is_held_out(content: bytes, seed: int, share: float) -> bool:
    digest = hashlib.blake2b(content, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _token_ids(corpus: Corpus, batch: list[Document]) -> list[np.ndarray | Fault]:
    """The ids of each document, without anything around them."""
    contents = [document.content for document in batch]
    texts = [content for content in contents if isinstance(content, str)]
    if texts and corpus.tokenizer is None:
        raise InputError(
            f"tokens.source={corpus.source!r} holds text, and the model has no tokenizer. Put "
            "the model's tokenizer beside its weights, or give a source of token ids."
        )
    of_texts: Iterator[list[int] | Fault]
    try:
        of_texts = iter(_ids_of_texts(corpus, texts))
    except Exception:  # whatever a tokenizer raises; which document is it?
        of_texts = (
            _ids_of_text(corpus, document)
            for document in batch
            if isinstance(document.content, str)
        )
    ids: list[np.ndarray | Fault] = []
    for document in batch:
        found = next(of_texts) if isinstance(document.content, str) else document.content
        fault = document.fault if found is None else found
        ids.append(fault if isinstance(fault, Fault) else np.array(found, np.int64))
    return ids


def _ids_of_texts(corpus: Corpus, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    assert corpus.tokenizer is not None
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return list(corpus.tokenizer(texts, **options)["input_ids"])


def _ids_of_text(corpus: Corpus, document: Document) -> list[int] | Fault:
    assert isinstance(document.content, str)
    try:
        (ids,) = _ids_of_texts(corpus, [document.content])
    except Exception as error:  # whatever a tokenizer raises
        text = repr(document.content[:60])
        wrong = f"holds a text on which the tokenizer fails, {text}: {reason_of(error)}"
        if corpus.on_error == "skip":
            return _fault("tokenizer", corpus, document, wrong)
        raise _broken(corpus, document, wrong, "Mend or drop that document") from error
    return ids


def _in_vocabulary(corpus: Corpus, document: Document, ids: np.ndarray) -> np.ndarray | Fault:
    """The ids, if they are."""
    smallest, largest = int(ids.min(initial=0)), int(ids.max(initial=0))
    limit = corpus.vocab_size
    if smallest >= 0 and (limit is None or largest < limit):
        return ids
    wrong = (
        f"gives the token id {smallest if smallest < 0 else largest}, and the model's vocabulary "
        f"is 0 to {'...' if limit is None else limit - 1}"
    )
    if corpus.on_error == "skip":
        return _fault("vocabulary", corpus, document, wrong)
    wrong += ". The text was tokenised for another model"
    raise _broken(corpus, document, wrong, "Use this model's own tokenizer, or a source of text")


def _fault(kind: Kind, corpus: Corpus, document: Document, wrong: str) -> Fault:
    return Fault(kind, f"{_place_of(document)} of {corpus.source!r}: it {wrong}")


def _broken(corpus: Corpus, document: Document, wrong: str, mend: str) -> BrokenText:
    return BrokenText(
        f"tokens.source={corpus.source!r} {wrong} ({_place_of(document)}). {mend}, or set "
        "tokens.on_error=skip to pass over such documents."
    )


def _place_of(document: Document) -> str:
    epoch, number, _ = document.position
    return f"document {number:,} (from 0) in the shuffled order of epoch {epoch}"


def _check_joints(corpus: Corpus) -> None:
    for joint in corpus.joints:
        if joint is not None and corpus.vocab_size is not None and joint >= corpus.vocab_size:
            raise InputError(
                f"tokens.source={corpus.source!r}: the tokenizer puts the token id {joint} between "
                f"documents, and the model's vocabulary is 0 to {corpus.vocab_size - 1}. It is for "
                "another model: use this model's own tokenizer."
            )


def joints_of(tokenizer: Tokenizer | None, prepend_bos: bool | None) -> Joints:
    """What stands between documents, and at the beginning of a context.

    Args:
        prepend_bos: By default if the tokenizer puts BOS before a text by itself.

    Raises:
        InputError: If BOS is asked for and not known.
    """
    if tokenizer is None:
        if prepend_bos:
            raise InputError("tokens.prepend_bos=true: without a tokenizer, BOS is not known")
        return Joints(None, None)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if prepend_bos is None:
        prepend_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    if prepend_bos:
        if bos is None:
            raise InputError(
                "tokens.prepend_bos=true: the model's tokenizer has no BOS token. Set it to false."
            )
        return Joints(bos, None if eos == bos else eos)  # one token is joint enough
    return Joints(None, bos if eos is None else eos)


def _tokenizer_identity(tokenizer: Tokenizer | None) -> str | None:
    if tokenizer is None:
        return None
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    return hashlib.blake2b(vocabulary, digest_size=8).hexdigest()
