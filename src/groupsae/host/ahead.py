"""Contexts read ahead: text is tokenised in a thread while the caller computes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from groupsae.host.tokens import EndOfText, TokenStream


class ContextsAhead:
    """Gives what a token stream gives, from contexts that a thread has read in advance.

    Contexts, saved places and errors are those of the stream itself, and each comes at the same
    place: a place tells what was handed out, never what was merely read. Tokenizers of Hugging Face
    release the interpreter while they work, so the thread costs the caller next to nothing.

    From the first `next_contexts` the stream belongs to the thread, until `close` ends it and puts
    the stream where the caller stands. The thread also ends when this object is forgotten.

    Args:
        stream: What is read.
        ahead: Contexts that are read in advance at most.
    """

    def __init__(self, stream: TokenStream, ahead: int = 64) -> None:
        self.context_length = stream.context_length
        self._stream, self._ahead = stream, ahead
        self._reader: _Reader | None = None
        self._place: dict[str, Any] = {}  # after the last context handed out, while it is read on

    def next_contexts(self, n: int) -> Int[Tensor, "n context"]:
        """The next `n` contexts of token ids, int64 on the CPU.

        Raises:
            EndOfText: fewer are left, and the corpus is not to be repeated. Nothing is consumed.
            BrokenText: as the stream's own. Nothing is consumed.
        """
        contexts = torch.empty(n, self.context_length, dtype=torch.int64)
        reader = self._reader or self._start()
        place = self._place
        try:
            for context in contexts:
                read = reader.next()
                context.copy_(read.context)
                place = read.place
        except EndOfText:
            self.close()
            return self._stream.next_contexts(n)  # says how many there are of `n`
        except BaseException:  # an interrupt, a lost connection: another try begins at the place
            self.close()
            raise
        self._place = place
        return contexts

    @property
    def skipped(self) -> dict[str, int]:
        """The stream's own before the last context that was handed out."""
        return dict(self.state_dict()["skipped"])

    def state_dict(self) -> dict[str, Any]:
        """The stream's own after the last context that was handed out, fit for JSON."""
        return self._stream.state_dict() if self._reader is None else dict(self._place)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where `state_dict` was taken, here or of the stream itself.

        Raises:
            InputError: it was taken from another corpus, or another way of reading it.
        """
        self.close()
        self._stream.load_state_dict(state)

    def close(self) -> None:
        """End the thread. A later `next_contexts` begins another."""
        if self._reader is not None:
            self._reader.end()
            self._finalizer.detach()
            self._reader = None
            self._stream.load_state_dict(self._place)

    def __enter__(self) -> ContextsAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> _Reader:
        self._place = self._stream.state_dict()
        self._reader = _Reader(self._stream, self._ahead)
        # It also runs before the interpreter ends, which may crash on a thread inside a tokenizer.
        self._finalizer = weakref.finalize(self, self._reader.end)
        self._reader.start()
        return self._reader


class _Read(NamedTuple):
    """A context, and the stream's place after it."""

    context: Int[Tensor, " context"]
    place: dict[str, Any]


class _Reader(threading.Thread):
    """Reads single contexts of a stream until it is ended or the stream raises."""

    def __init__(self, stream: TokenStream, ahead: int) -> None:
        super().__init__(name="groupsae-contexts-ahead", daemon=True)
        self._stream = stream
        self._room = threading.Semaphore(ahead)
        self._read: SimpleQueue[_Read | BaseException] = SimpleQueue()
        self._ended = False

    def run(self) -> None:
        """What the thread does."""
        try:
            while True:
                self._room.acquire()
                if self._ended:
                    return
                (context,) = self._stream.next_contexts(1)
                self._read.put(_Read(context, self._stream.state_dict()))
        except BaseException as error:  # raised again by `next`
            self._read.put(error)

    def next(self) -> _Read:
        """The next context. What the stream raised comes after the contexts before it."""
        read = self._read.get()
        if isinstance(read, BaseException):
            raise read
        self._room.release()
        return read

    def end(self) -> None:
        """Return when the thread has ended; what it has read is lost."""
        self._ended = True
        self._room.release()
        if threading.current_thread() is not self:  # it may be the one that forgets its owner
            self.join()
