"""Tasks: counterfactual prompt pairs, as token ids of one host model."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from groupsae.errors import InputError
from groupsae.evaluation.prompts import KINDS, Example, generate
from groupsae.host.bundled.tasks import prompts as bundled_prompts
from groupsae.host.loading import BUNDLED, PreTrainedTokenizer
from groupsae.host.model import HostModel
from groupsae.host.tokens import joints_of

BUILT_IN = ("ioi", "greater_than", "subject_verb", *KINDS)
"""The tasks that need no file."""

LEAST_EXAMPLES = 64
"""A task with fewer usable examples is refused."""

LEAST_OF_A_LENGTH = 16
"""A length with fewer examples is left out: its means would be noise."""


@dataclass(frozen=True)
class Pairs:
    """Prompt pairs of one length, as int64 token ids on the CPU."""

    clean: Int[Tensor, "example context"]
    """x_clean, with BOS where the task has it."""
    patch: Int[Tensor, "example context"]
    """x_patch, the same prompt with one fact changed."""
    a_clean: Int[Tensor, " example"]
    """The token that should follow x_clean."""
    a_patch: Int[Tensor, " example"]
    """The token that should follow x_patch."""
    cases: tuple[str, ...]
    """The kind of each example, to tell results apart."""

    def __len__(self) -> int:
        return len(self.cases)

    def part(self, start: int, stop: int) -> Pairs:
        """The examples start:stop."""
        return self.at(list(range(len(self)))[start:stop])

    def at(self, examples: list[int]) -> Pairs:
        """These examples, in this order."""
        return Pairs(
            clean=self.clean[examples],
            patch=self.patch[examples],
            a_clean=self.a_clean[examples],
            a_patch=self.a_patch[examples],
            cases=tuple(self.cases[i] for i in examples),
        )

    def _halves(self) -> tuple[Pairs, Pairs]:
        by_case = sorted(range(len(self)), key=self.cases.__getitem__)
        return self.at(sorted(by_case[::2])), self.at(sorted(by_case[1::2]))


@dataclass(frozen=True)
class Task:
    """Prompt pairs that a host model can be judged by.

    Attributes:
        name: as results call it; fit for a file name.
        source: where the examples are from: a file, "built in" or "bundled".
        lengths: the pairs of each length in tokens, shortest first.
        dropped: why examples were left out, and how many for each reason, most frequent first.
    """

    name: str
    source: str
    lengths: tuple[Pairs, ...]
    dropped: Mapping[str, int]

    def __len__(self) -> int:
        """How many examples are usable."""
        return sum(map(len, self.lengths))

    @property
    def clean_prompts(self) -> list[Int[Tensor, "_ _"]]:
        """The token ids of x_clean, `[example, context]` for each length."""
        return [pairs.clean for pairs in self.lengths]

    def halves(self) -> tuple[Task, Task]:
        """Two tasks without a common example: every length, and in it every case, is split in two.

        Means and effects come from the first, scores from the second.
        """
        first, second = zip(*(pairs._halves() for pairs in self.lengths), strict=True)
        return replace(self, lengths=first), replace(self, lengths=second)


def open_task(
    name: str, host: HostModel, *, examples: int, seed: int, prepend_bos: bool | None = None
) -> Task:
    """Read or make the examples of a task and keep those that the host model can be asked.

    Both prompts of an example must have equally many tokens and each answer must be one token: the
    one that the tokenizer puts after its prompt, or gives for the answer alone if that reads as the
    answer there. A file's examples are taken in an order that `seed` shuffles.

    Args:
        name: One of `BUILT_IN`, or "NAME=FILE" for a file of JSON lines with clean_prefix,
            patch_prefix, clean_answer, patch_answer (or x_clean, x_patch, a_clean, a_patch) and,
            if wanted, case. For the bundled host model the built-in tasks are its own.
        examples: How many usable examples to take; fewer where there are no more.
        prepend_bos: Whether a prompt begins with BOS; by default where the tokenizer does so by
            itself. EOS is never there.

    Raises:
        InputError: Another name; a file that cannot be read, or a line of it that lacks something;
            a host model without a tokenizer; fewer than 64 examples asked for or usable; too few
            words that are one token for a built-in task.
    """
    if examples < LEAST_EXAMPLES:
        raise InputError(
            f"circuits.examples={examples}: a task needs at least {LEAST_EXAMPLES} examples, or "
            "its means and scores are noise."
        )
    check_name(name)
    title, equals, file = name.partition("=")
    reader = _Reader(host, prepend_bos)
    source, candidates = "built in", []
    if equals:
        source, candidates = file, _read_file(file, case=title)
        Random(seed).shuffle(candidates)
    elif host.name == BUNDLED:
        source, candidates = "bundled", _of_bundled_english(title, _SPARE * examples, seed)
    else:
        candidates = generate(title, reader.one_token, _SPARE * examples, seed)

    usable, dropped = _usable(candidates, reader)
    taken, rare = _of_frequent_lengths(usable, examples)
    if rare:
        dropped[RARE] = rare
    if len(taken) < LEAST_EXAMPLES:
        raise _too_few(title, source, host.name, len(candidates), len(taken), dropped)
    return Task(title, source, _by_length(taken), dict(dropped.most_common()))


# Why an example is left out, and what to do where that is why a task has too few.
UNEQUAL = "prompts of unequal length"
LONG_ANSWER = "an answer of more than one token"
SAME_ANSWERS = "the answers are the same token"
SAME_PROMPTS = "the prompts are the same"
UNKNOWN = "an unknown token"
TOO_LONG = "prompts longer than the host model's context"
TWICE = "an example that is there twice"
RARE = "a length that few examples have"
_MENDS = {
    UNEQUAL: "Let both prompts of an example have the same number of tokens",
    LONG_ANSWER: "Choose answers that are one token for it, or another host model",
    SAME_ANSWERS: "Let the answers begin differently",
    SAME_PROMPTS: "Let the prompts of an example differ",
    UNKNOWN: "Use words that it knows",
    TOO_LONG: "Shorten the prompts",
    TWICE: "Give more examples that differ",
    RARE: f"Give at least {LEAST_OF_A_LENGTH} examples of a length",
}
_SPARE = 2  # generated examples for each that is wanted, as some may not be usable
_TRIES = 20  # bundled prompts drawn at most for each that is wanted


class _Tokens(NamedTuple):
    """An example as token ids."""

    clean: list[int]
    patch: list[int]
    a_clean: int
    a_patch: int
    case: str


class _Reader:
    """How a host model's tokenizer reads prompts and their answers."""

    def __init__(self, host: HostModel, prepend_bos: bool | None) -> None:
        if host.tokenizer is None:
            raise InputError(
                f"circuits.tasks: the host model {host.name} has no tokenizer, and tasks are text. "
                "Put the model's tokenizer beside its weights."
            )
        self.tokenizer: PreTrainedTokenizer = host.tokenizer
        self.unknown: int | None = host.tokenizer.unk_token_id
        bos = joints_of(host.tokenizer, prepend_bos).bos
        self.before = [] if bos is None else [bos]
        self.longest = math.inf if host.context_length is None else host.context_length

    def one_token(self, beginning: str, endings: Sequence[str]) -> list[bool]:
        """Which endings are one more token, and a known one, after a beginning."""
        before = self.ids([beginning])[0]
        after = self.ids([beginning + ending for ending in endings])
        return [ids[:-1] == before and ids[-1:] != [self.unknown] for ids in after]

    def read(self, examples: Sequence[Example]) -> list[_Tokens | str]:
        """Each example as tokens, or why it is not usable."""
        clean = self.ids([example.x_clean for example in examples])
        patch = self.ids([example.x_patch for example in examples])
        clean_answered = self.ids([example.x_clean + example.a_clean for example in examples])
        patch_answered = self.ids([example.x_patch + example.a_patch for example in examples])
        return [
            self._checked(
                x_clean,
                x_patch,
                self._answer(x_clean, with_clean, example.a_clean),
                self._answer(x_patch, with_patch, example.a_patch),
                example.case,
            )
            for example, x_clean, x_patch, with_clean, with_patch in zip(
                examples, clean, patch, clean_answered, patch_answered, strict=True
            )
        ]

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts, without BOS and EOS."""
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        ids: list[list[int]] = self.tokenizer(texts, **options)["input_ids"] if texts else []
        return ids

    def _checked(
        self,
        clean: list[int],
        patch: list[int],
        a_clean: int | None,
        a_patch: int | None,
        case: str,
    ) -> _Tokens | str:
        if self.unknown is not None and self.unknown in (*clean, *patch, a_clean, a_patch):
            return UNKNOWN
        if len(clean) != len(patch):
            return UNEQUAL
        if clean == patch:
            return SAME_PROMPTS
        if a_clean is None or a_patch is None:
            return LONG_ANSWER
        if a_clean == a_patch:
            return SAME_ANSWERS
        if len(self.before + clean) > self.longest:
            return TOO_LONG
        return _Tokens(self.before + clean, self.before + patch, a_clean, a_patch, case)

    def _answer(self, prompt: list[int], answered: list[int], answer: str) -> int | None:
        """The token of an answer after a prompt; None if it is not one token."""
        if answered and answered[:-1] == prompt:
            return answered[-1]
        # The tokenizer may join the answer to the prompt's last word. SentencePiece gives a space
        # of its own to a text that stands alone, so the answer is also tried without one.
        for text in (answer, answer.removeprefix(" ")):
            alone = self.ids([text])[0]
            if len(alone) == 1 and self._text(prompt + alone) == self._text(prompt) + answer:
                return alone[0]
        return None

    def _text(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text


def _usable(candidates: Sequence[Example], reader: _Reader) -> tuple[list[_Tokens], Counter[str]]:
    """The usable examples in their order, and how many others there are for each reason."""
    distinct: dict[tuple[str, ...], Example] = {}
    for example in candidates:
        distinct.setdefault(example[:4], example)
    usable, dropped = [], Counter[str]()
    if len(distinct) < len(candidates):
        dropped[TWICE] = len(candidates) - len(distinct)
    for read in reader.read(list(distinct.values())):
        if isinstance(read, str):
            dropped[read] += 1
        else:
            usable.append(read)
    return usable, dropped


def _of_frequent_lengths(usable: Sequence[_Tokens], wanted: int) -> tuple[list[_Tokens], int]:
    """The first `wanted` examples of lengths that have enough, and how many have another length.

    A length that has too few among them gets more, in place of the last of the commonest length;
    where there are too many lengths for that, the rarest are left out.
    """
    counts = Counter(len(example.clean) for example in usable)
    frequent = [length for length, count in counts.most_common() if count >= LEAST_OF_A_LENGTH]
    kept = frequent[: wanted // LEAST_OF_A_LENGTH]
    among = [example for example in usable if len(example.clean) in kept]

    first = Counter(len(example.clean) for example in among[:wanted])
    quota = {length: max(first[length], LEAST_OF_A_LENGTH) for length in kept}
    while sum(quota.values()) > wanted:
        quota[max(quota, key=quota.__getitem__)] -= 1
    taken = []
    for example in among:
        if quota[len(example.clean)]:
            quota[len(example.clean)] -= 1
            taken.append(example)
    return taken, len(usable) - len(among)


def _by_length(examples: Sequence[_Tokens]) -> tuple[Pairs, ...]:
    of_length: dict[int, list[_Tokens]] = {}
    for example in examples:
        of_length.setdefault(len(example.clean), []).append(example)
    lengths = []
    for _, alike in sorted(of_length.items()):
        *ids, cases = zip(*alike, strict=True)
        clean, patch, a_clean, a_patch = (torch.tensor(column) for column in ids)
        lengths.append(Pairs(clean, patch, a_clean, a_patch, cases))
    return tuple(lengths)


def _too_few(
    task: str, source: str, host: str, given: int, usable: int, dropped: Counter[str]
) -> InputError:
    reasons = ", ".join(f"{reason} ({count:,})" for reason, count in dropped.most_common())
    fixable = [reason for reason, _ in dropped.most_common() if reason != TWICE] or [*dropped]
    mend = _MENDS[fixable[0]] if fixable else f"Give at least {LEAST_EXAMPLES} examples"
    return InputError(
        f"circuits.tasks: of the {given:,} examples of {task} ({source}), "
        f"{usable or 'none'} {'is' if usable < 2 else 'are'} usable with the tokenizer of the host "
        f"model {host}, and at least {LEAST_EXAMPLES} are needed. "
        + (f"Left out: {reasons}. " if dropped else "")
        + f"{mend}, or leave the task out."
    )


def check_name(name: str) -> None:
    """Refuse what is neither a built-in task nor NAME=FILE with a name that a file can have.

    Raises:
        InputError: With the nearest name.
    """
    title, equals, _ = name.partition("=")
    if equals:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", title):
            raise InputError(
                f"circuits.tasks: {title!r} cannot name a task, as results are saved under that "
                "name: use letters, digits, - and _, as in my-task=FILE.jsonl."
            )
    elif name not in BUILT_IN:
        near = difflib.get_close_matches(name.lower(), BUILT_IN, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            f"circuits.tasks: {name!r} is unknown; {meant}Built in are {', '.join(BUILT_IN)}. "
            "Examples of your own are given as NAME=FILE.jsonl."
        )


def _of_bundled_english(task: str, n: int, seed: int) -> list[Example]:
    """Up to `n` different examples that the bundled model's text never holds."""
    case = KINDS.get(task)
    for tries in (1, 6, _TRIES):  # some are drawn twice, or are of another kind
        drawn = bundled_prompts("subject_verb" if case else task, tries * n, seed)
        examples = {
            Example._make(prompt[field] for field in Example._fields): None
            for prompt in drawn
            if case in (None, prompt["case"])
        }
        if len(examples) >= n:
            break
    return list(examples)[:n]


_KEYS = (
    ("clean_prefix", "x_clean"),
    ("patch_prefix", "x_patch"),
    ("clean_answer", "a_clean"),
    ("patch_answer", "a_patch"),
)


def _read_file(file: str, case: str) -> list[Example]:
    """The examples of a file of JSON lines; `case` is for those that name none."""
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(
            f"circuits.tasks: {file!r} cannot be read: {reason}. Give a file of JSON lines, as in "
            f"{case}=FILE.jsonl."
        ) from error
    return [
        _example(line, f"circuits.tasks: {file}, line {number}", case)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _example(line: str, where: str, case: str) -> Example:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: no JSON ({error}). Write one object in each line.") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: not a JSON object. Write one object in each line.")
    texts = []
    for names in _KEYS:
        found = [name for name in names if name in record]
        if len(found) != 1:
            raise InputError(
                f"{where} has {'both' if found else 'none'} of {' and '.join(names)}; give one of "
                "them."
            )
        texts.append(_text(record[found[0]], f"{where}: {found[0]}"))
    return Example._make([*texts, _text(record.get("case", case), f"{where}: case")])


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"{where} is {json.dumps(value)}; give text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character
        raise InputError(f"{where} is {json.dumps(value)}, which is no Unicode text.") from error
    return value
