"""The answers of a language model, kept as they come, so that none is asked for twice."""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from groupsae.errors import InputError
from groupsae.files import append_text

_log = logging.getLogger(__name__)


class Answer(BaseModel):
    """One line of `answers.jsonl`: what one request gave and cost.

    Attributes:
        key: Of model, messages and settings: see :meth:`Client.ask`.
        text: None if none came: the request was sent, and may have been paid for.
        retries: Times that it was repeated before.
        prompt_tokens, completion_tokens: As the endpoint counts them.
        estimated_tokens: Both together, where it does not say; never too few.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    key: str
    text: str | None
    retries: int = Field(0, ge=0)
    prompt_tokens: int = Field(0, ge=0)
    completion_tokens: int = Field(0, ge=0)
    estimated_tokens: int = Field(0, ge=0)

    @property
    def tokens(self) -> int:
        """All that it cost."""
        return self.prompt_tokens + self.completion_tokens + self.estimated_tokens


class Answers:
    """The file of answers: read once, then added to.

    Args:
        path: Made with the first answer. Lines that are no answers, such as a last one that was
            not written to its end, are passed over.

    Raises:
        InputError: If it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Answer] = {}
        self.prompt_tokens = self.completion_tokens = self.estimated_tokens = 0
        text = _text(path)
        passed_over = 0
        for line in text.removesuffix("\n").split("\n") if text else ():
            try:
                self._count(Answer.model_validate_json(line))
            except ValidationError:
                passed_over += 1
        if passed_over:
            _log.warning("%s: %d damaged lines are passed over", path, passed_over)
        if text and not text.endswith("\n"):
            append_text(path, "\n")

    @property
    def tokens(self) -> int:
        """What all lines together cost."""
        return self.prompt_tokens + self.completion_tokens + self.estimated_tokens

    def add(self, answer: Answer) -> None:
        """Keep an answer; it is in the file when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_text(self.path, answer.model_dump_json() + "\n")
        self._count(answer)

    def _count(self, answer: Answer) -> None:
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        self.estimated_tokens += answer.estimated_tokens
        if answer.text is not None:
            self.known[answer.key] = answer


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}; mend that, or move the file away: its "
            "answers are then asked for again"
        ) from error
