"""What is wrong with a text: faults that stop a run or are passed over, and tries to read on."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from groupsae.errors import InputError

_log = logging.getLogger(__name__)
_random = random.Random()  # of its own: seeded runs draw from the global one

OnError = Literal["stop", "skip"]
Kind = Literal["file", "stream", "not_text", "tokenizer", "vocabulary"]
"""A file of a folder that cannot be read; the rest of a streamed file that breaks off; one document
that is neither text nor ids, that the tokenizer fails on, or with ids outside of the vocabulary."""

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 60.0


class BrokenText(InputError):  # noqa: N818, the name is what happened
    """The text cannot be read on from here; nothing of what comes after has been handed out."""


class Fault(NamedTuple):
    """Something that is passed over where `tokens.on_error` is "skip"."""

    kind: Kind
    what: str
    """Which one, and what is wrong with it."""


@dataclass(frozen=True)
class Retries:
    """How often a read that breaks off is tried again, after pauses that double.

    Attributes:
        count: Further tries of one read.
        sleep: Waits for so many seconds.
    """

    count: int = 5
    sleep: Callable[[float], None] = time.sleep

    def wait(self, failures: int, source: str, error: Exception) -> bool:
        """Pause after the `failures`-th failure in a row; False if no try is left.

        The pause is drawn from the upper half of `0.5 * 2**(failures - 1)` seconds, at most 60, so
        that the processes of one run do not come back all at once.
        """
        if failures > self.count:
            return False
        seconds = min(FIRST_PAUSE * 2.0 ** min(failures - 1, 30), LONGEST_PAUSE)
        seconds *= _random.uniform(0.5, 1)
        _log.warning(
            "tokens.source=%r broke off (%s); trying again in %.1f s (%d of %d)",
            *(source, reason_of(error), seconds, failures, self.count),
        )
        self.sleep(seconds)
        return True


def reason_of(error: BaseException) -> str:
    """What the innermost cause says that says anything."""
    return next((text for cause in reversed(causes_of(error)) if (text := str(cause))), repr(error))


def causes_of(error: BaseException) -> list[BaseException]:
    """The error, what it was raised from, and so on."""
    causes = [error]
    while cause := causes[-1].__cause__:
        causes.append(cause)
    return causes
