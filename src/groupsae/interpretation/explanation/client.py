"""Asking a model behind an OpenAI-compatible address: at a rate, repeated, within a budget."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import time
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, NonNegativeInt, ValidationError

from groupsae.config import ExplanationConfig
from groupsae.errors import InputError
from groupsae.interpretation.explanation.answers import Answer, Answers
from groupsae.interpretation.explanation.prompts import Messages

if TYPE_CHECKING:
    from openai import APIStatusError
    from openai.types.chat import ChatCompletion
    from tenacity import RetryCallState

TEMPLATE_TOKENS = 256  # more than a chat template adds to the messages
FAILURES_IN_A_ROW = 5  # requests; after so many nothing more is asked
SHORTEST_WAIT = 0.5  # seconds before the first repetition; doubled with each
LONGEST_WAIT = 60.0
LONGEST_RETRY_AFTER = 600.0  # an endpoint that wants more is given up


DEFINITIONS = {
    "requests": "different requests that were answered or failed, those of earlier runs included; "
    "from_before: of them, those that an earlier run had asked; retries: how often one of them was "
    "repeated; failed: those without an answer in the last run, which the next one asks again",
    "tokens": "all that was spent here, as the endpoint counts it; estimated_tokens where it does "
    "not say, and for requests that were cut off: bytes of the messages, and "
    f"{TEMPLATE_TOKENS} for the chat template, and bytes of the answer or explanation."
    "answer_tokens, which is never too few. An answer of an error code counts as free. A request "
    "is sent only if it cannot exceed explanation.budget_tokens",
}


class Client:
    """Asks, and counts.

    Use it as an async context manager, in one event loop.

    Attributes:
        used: The answers that :meth:`ask` returned, by key.
        failed: Keys of requests that got no answer.
        retries: Repetitions of requests of this client.
        exhausted: Whether a request did not fit the budget. Nothing was asked after it.

    Raises:
        InputError: Without endpoint, model or the packages of `groupsae[llm]`.
    """

    def __init__(self, asked: ExplanationConfig, answers: Answers) -> None:
        self.address = _checked(asked)
        try:
            import aiolimiter
            import openai
            import tenacity  # noqa: F401 - so that its absence is said here, not in mid-work
        except ImportError as error:
            raise InputError(
                f"groupsae explain needs the package {error.name}, which is not installed; "
                "pip install 'groupsae[llm]'"
            ) from error
        self._asked, self._answers = asked, answers
        self._key = os.environ.get(asked.api_key_variable) or "none"
        self._openai = openai.AsyncOpenAI(
            base_url=asked.endpoint, api_key=self._key, timeout=asked.timeout, max_retries=0
        )
        self._slots = asyncio.Semaphore(asked.concurrency)
        # One request each so many seconds: a minute's worth at once would be twice the rate.
        rate = asked.requests_per_minute
        self._rate = aiolimiter.AsyncLimiter(1, 60 / rate) if rate else None
        self._settled = asyncio.Condition()
        self._reserved = self._failures_in_a_row = 0
        self._end: InputError | None = None
        self._limit = "max_tokens"
        self._before = frozenset(answers.known)
        self.used: dict[str, Answer] = {}
        self.failed: set[str] = set()
        self.retries = 0
        self.exhausted = False

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._openai.close()

    async def ask(self, messages: Messages) -> str | None:
        """The model's answer to these messages: from before, or from the endpoint.

        Returns:
            None if the request failed, or did not fit the budget.

        Raises:
            InputError: The endpoint cannot be reached, refuses the key, or knows no such model;
                its first answer is no chat completion; too many requests failed in a row; the
                budget is too small for the first request.
        """
        key = self.key(messages)
        answer = self._answers.known.get(key)
        if answer is None:
            async with self._slots:
                answer = await self._requested(key, messages)
        if answer is None:
            return None
        self.used[key] = answer
        return answer.text

    def counts(self) -> dict[str, int]:
        """What was asked and what it cost, earlier runs included: see :data:`DEFINITIONS`."""
        before = self.used.keys() & self._before
        answers = self._answers
        return {
            "requests": len(self.used.keys() | self.failed),
            "from_before": len(before),
            "retries": self.retries + sum(self.used[key].retries for key in before),
            "failed": len(self.failed),
            "prompt_tokens": answers.prompt_tokens,
            "completion_tokens": answers.completion_tokens,
            "estimated_tokens": answers.estimated_tokens,
        }

    def key(self, messages: Messages) -> str:
        """What an answer is kept under: a hash of all that it depends on."""
        asked = self._asked
        whole = [asked.model, asked.temperature, asked.answer_tokens, messages]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()

    def most_tokens(self, messages: Messages) -> int:
        """No fewer than a request can cost: no tokenizer makes more tokens than there are bytes."""
        text = sum(len(message["content"].encode()) for message in messages)
        return text + TEMPLATE_TOKENS + self._asked.answer_tokens

    async def _requested(self, key: str, messages: Messages) -> Answer | None:
        """Ask, again after failures that may pass; see :meth:`ask`."""
        import openai
        from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt

        try:
            async for attempt in AsyncRetrying(
                stop=stop_after_attempt(self._asked.retries + 1),
                wait=_wait,
                retry=retry_if_exception(_may_pass),
                reraise=True,
            ):
                with attempt:
                    repetitions = attempt.retry_state.attempt_number - 1
                    if not await self._reserve(messages):
                        self.failed |= {key} if repetitions else set()
                        return None
                    self.retries += repetitions > 0
                    answer = await self._once(key, messages, repetitions)
        except (openai.APIError, TimeoutError, _NoCompletion) as error:
            self._fail(key, error)
            return None
        self._failures_in_a_row = 0
        return answer

    async def _once(self, key: str, messages: Messages, repetitions: int) -> Answer:
        """One request over the wire; what it cost is in the answers, whatever comes of it."""
        import openai

        most = self.most_tokens(messages)
        recorded: Answer | None = None
        try:
            if self._rate is not None:
                await self._rate.acquire()
            # From here on it may have been paid for, unless more is known.
            recorded = Answer(key=key, text=None, retries=repetitions, estimated_tokens=most)
            async with asyncio.timeout(self._asked.timeout):  # the client's own is for each read
                completion = await self._completion(messages)
            recorded = self._answer(key, messages, repetitions, completion)
            return recorded
        except openai.APIStatusError:
            recorded = None
            raise
        except openai.APIConnectionError as error:
            if type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout"):
                recorded = None
            raise
        except json.JSONDecodeError as error:
            raise _NoCompletion from error
        finally:
            if recorded is not None:
                self._answers.add(recorded)
            await self._release(most)

    async def _completion(self, messages: Messages) -> ChatCompletion:
        import openai

        create = self._openai.chat.completions.create
        options: dict[str, Any] = {
            "model": self._asked.model,
            "messages": messages,
            "temperature": self._asked.temperature,
            self._limit: self._asked.answer_tokens,
        }
        completion: ChatCompletion
        try:
            completion = await create(**options)
        except openai.BadRequestError as error:
            # Some hosted models know the limit by its newer name alone, others by its older one.
            if "max_tokens" not in options or "max_completion_tokens" not in str(error.message):
                raise
            self._limit = "max_completion_tokens"
            options[self._limit] = options.pop("max_tokens")
            completion = await create(**options)
        return completion

    def _answer(
        self, key: str, messages: Messages, repetitions: int, completion: ChatCompletion
    ) -> Answer:
        """The answer in a completion.

        Raises:
            _NoCompletion: It is something else; the client does not check it.
        """
        try:
            dump = completion.model_dump(warnings=False)
            text = _Completion.model_validate(dump).choices[0].message.content or ""
        except (AttributeError, IndexError, ValidationError) as error:
            raise _NoCompletion from error
        text = text.encode(errors="replace").decode()  # a lone surrogate fits no file
        answer = Answer(key=key, text=text, retries=repetitions)
        try:
            usage = _Usage.model_validate(dump.get("usage"))
        except ValidationError:
            written = min(len(text.encode()), self._asked.answer_tokens)
            estimate = self.most_tokens(messages) - self._asked.answer_tokens + written
            return answer.model_copy(update={"estimated_tokens": estimate})
        return answer.model_copy(update=usage.model_dump())

    async def _reserve(self, messages: Messages) -> bool:
        """Set aside what a request may cost at most; wait for others that may leave some over.

        Raises:
            InputError: The first request does not fit, or another one has ended all.
        """
        most, budget = self.most_tokens(messages), self._asked.budget_tokens
        async with self._settled:
            if self._end is not None:
                raise self._end
            while not self.exhausted and self._answers.tokens + self._reserved + most > budget:
                if self._reserved:
                    await self._settled.wait()
                elif not self._answers.tokens:
                    raise InputError(
                        f"explanation.budget_tokens={budget} is too small for one request, which "
                        f"may cost up to {most:,} tokens; raise it"
                    )
                else:
                    self.exhausted = True
                    self._settled.notify_all()
            if not self.exhausted:
                self._reserved += most
            return not self.exhausted

    async def _release(self, most: int) -> None:
        self._reserved -= most  # also where waiting for the lock is cancelled
        async with self._settled:
            self._settled.notify_all()

    def _fail(self, key: str, error: Exception) -> None:
        """Note that a request has failed for good.

        Raises:
            InputError: If others would fail as well.
        """
        self.failed.add(key)
        self._failures_in_a_row += 1
        reason = self._reason_to_end(error)
        if reason is not None:
            self._end = InputError(reason)
            raise self._end from error

    def _reason_to_end(self, error: Exception) -> str | None:
        status = getattr(error, "status_code", None)
        asked, said = self._asked, self._said(error)
        if status in (401, 403):
            return (
                f"{self.address} refuses the key in the environment variable "
                f"{asked.api_key_variable} (explanation.api_key_variable): {said}; set it to a "
                "valid one"
            )
        if status == 404:
            return (
                f"{self.address} has no model {asked.model!r} (explanation.model), or is not the "
                f"address of an OpenAI-compatible API (explanation.endpoint): {said}; mend the one "
                "that is wrong"
            )
        nothing_yet = self.used.keys() <= self._before
        if nothing_yet and status not in (400, 413, 422):  # which may be due to this one's text
            return (
                f"{self.address} (explanation.endpoint) gives no answer: {said}; {_mend(error)}, "
                "then give the same command again"
            )
        if self._failures_in_a_row >= FAILURES_IN_A_ROW:
            return (
                f"{self.address} (explanation.endpoint) gave no answer to {FAILURES_IN_A_ROW} "
                f"requests in a row: {said}; {_mend(error)}; the same command continues, what was "
                "answered is kept"
            )
        return None

    def _said(self, error: Exception) -> str:
        """What went wrong, fit for a terminal and without the key."""
        import openai

        if isinstance(error, TimeoutError | openai.APITimeoutError):
            return f"nothing came within explanation.timeout={self._asked.timeout:g} s"
        if isinstance(error, _NoCompletion):
            return "what it sends is no chat completion"
        cause = error.__cause__
        said = f"{error} ({cause})" if cause is not None and str(cause) else str(error)
        if self._key != "none":
            said = said.replace(self._key, "[key]")
        said = "".join(sign if sign.isprintable() else " " for sign in said)
        return said if len(said) <= 300 else said[:300] + "…"


class _NoCompletion(Exception):  # noqa: N818 - an answer, but not one that was asked for
    """HTTP went well, but what came is no chat completion."""


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message


class _Completion(BaseModel):
    choices: list[_Choice]


class _Usage(BaseModel):
    prompt_tokens: NonNegativeInt
    completion_tokens: NonNegativeInt


def _checked(asked: ExplanationConfig) -> str:
    """The endpoint's address, without anything secret that may stand in it."""
    if not asked.endpoint:
        raise InputError(
            "explanation.endpoint is not given; name the address of an OpenAI-compatible API, such "
            "as explanation.endpoint=http://localhost:8000/v1"
        )
    if not asked.model:
        raise InputError(
            "explanation.model is not given; name the model as the endpoint calls it, such as "
            "explanation.model=Qwen/Qwen2.5-7B-Instruct"
        )
    try:
        parts = urlsplit(asked.endpoint)
        host = f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https"):
        value = "with a name and password" if "@" in asked.endpoint else repr(asked.endpoint)
        raise InputError(
            f"explanation.endpoint {value} is no address; it begins with http:// or https:// "
            "and a host, such as http://localhost:8000/v1"
        )
    return f"{parts.scheme}://{host}{parts.path}"


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may go well a little later."""
    import openai

    if isinstance(error, openai.APIStatusError):
        wait = _retry_after(error)
        repeatable = error.status_code in (408, 409, 429) or error.status_code >= 500
        return repeatable and (wait is None or wait <= LONGEST_RETRY_AFTER)
    return isinstance(error, openai.APIConnectionError | TimeoutError)


def _wait(state: RetryCallState) -> float:
    """Seconds before a repetition: those that the endpoint asks for, else longer each time."""
    import openai
    from tenacity import wait_random_exponential

    error = state.outcome.exception() if state.outcome else None
    wait = _retry_after(error) if isinstance(error, openai.APIStatusError) else None
    if wait is None:
        # Half of it random, so that requests that failed together do not come back together.
        random = wait_random_exponential(multiplier=SHORTEST_WAIT, max=LONGEST_WAIT)
        steps = min(state.attempt_number - 1, 20)
        wait = (min(SHORTEST_WAIT * 2**steps, LONGEST_WAIT) + random(state)) / 2
    return wait


def _retry_after(error: APIStatusError) -> float | None:
    """The header's seconds, or the time until its date; None where it says neither."""
    header = error.response.headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", header):
        return float(header)
    try:
        return max(parsedate_to_datetime(header).timestamp() - time.time(), 0)
    except (ValueError, TypeError):
        return None


def _mend(error: Exception) -> str:
    status = getattr(error, "status_code", None)
    if status in (400, 413, 422):
        return (
            "if a request is too long for the model, lower explanation.contexts or "
            "explanation.examples_per_request"
        )
    if status == 402 or status == 429:
        return "wait, or lower explanation.requests_per_minute or explanation.concurrency"
    return "see that it is up and that the address is right"
