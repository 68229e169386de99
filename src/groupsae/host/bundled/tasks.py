"""Prompts of the paper's three tasks, made of combinations that the bundled text never holds.

A prompt pair is `{x_clean, x_patch, a_clean, a_patch, case}`, as in the paper: the patch exchanges
the two names, puts the first year at the start of its century, or flips the subject's number; both
prompts have the same number of tokens and both answers are one token of the bundled tokenizer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from groupsae.errors import InputError
from groupsae.host.bundled import words

if TYPE_CHECKING:
    from torch import Tensor

Prompt = dict[str, str]


def prompts(task: str, n: int, seed: int = 0) -> list[Prompt]:
    """`n` prompt pairs of a task: "ioi", "greater_than" or "subject_verb".

    Raises `InputError` for another task's name.
    """
    if task not in _TASKS:
        raise InputError(f"task {task!r} is unknown; choose one of {', '.join(_TASKS)}")
    random = Random(f"{task}-{seed}")
    return [_TASKS[task](random) for _ in range(n)]


def accuracies(model: Any, tokenizer: Any, examples: Sequence[Prompt]) -> dict[str, float]:
    """How often a causal language model answers clean prompts rightly: per case, and under "all".

    An answer is right where the logit of `a_clean` exceeds that of `a_patch`; in Greater-Than,
    whose patch answer is always 01, where the likeliest of all tokens is a later year. As the last
    years of a century are nearly always right, two harder figures stand beside it:
    "later minus earlier" is the probability of the later years less that of the others, averaged;
    "next over same" is how often the year after the first has a higher logit than the first.
    `model` and `tokenizer` are Hugging Face's; no BOS is put before a prompt.
    """
    import torch

    years = torch.tensor(tokenizer.convert_tokens_to_ids([f"{year:02d}" for year in range(1, 100)]))
    by_length = defaultdict(list)
    for example in examples:
        by_length[len(tokenizer(example["x_clean"])["input_ids"])].append(example)
    right = defaultdict(list)
    for group in by_length.values():
        ids = torch.tensor(tokenizer([example["x_clean"] for example in group])["input_ids"])
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids.to(model.device)).logits[:, -1].float().cpu()
        for example, row in zip(group, logits, strict=True):
            clean, patch = (
                tokenizer(example[answer])["input_ids"][0] for answer in ("a_clean", "a_patch")
            )
            if example["a_clean"].isdigit():
                first_later = int(example["a_clean"])  # the clean answer is the first later year
                later = years[first_later - 1 :]
                mass = row.softmax(-1)
                gap = 2 * mass[later].sum() - mass[years].sum()
                right["later minus earlier"].append(float(gap))
                right["next over same"].append(float(row[clean] > row[years[first_later - 2]]))
                correct = bool(row.argmax() in later)
            else:
                correct = bool(row[clean] > row[patch])
            right["all"].append(float(correct))
            right[example["case"]].append(float(correct))
    return {case: sum(values) / len(values) for case, values in sorted(right.items())}


def _ioi(random: Random) -> Prompt:
    """Two held-out names; whoever does not give is given to. Both orders of the names."""
    while True:
        one, other = random.sample(words.NAMES, 2)
        if words.held_out_names(one, other):
            break
    opening = random.choice(("Then, ", "Later, ", "One day, ", "In the morning, ", "Soon, ", ""))
    frame, case = random.choice(
        (
            ("{a} and {b} {went} to the {place}. {s} {gave} a {gift} to", "two sentences"),
            ("{a} and {b} were at the {place}. {s} {gave} a {gift} to", "two sentences"),
            ("{a} met {b} at the {place}. {s} {gave} a {gift} to", "two sentences"),
            ("{a} and {b} {went} to the {place}, and {s} {gave} a {gift} to", "one sentence"),
        )
    )
    order = random.choice(("ABBA", "BABA"))
    rest = {
        "place": random.choice(words.PLACES),
        "gave": random.choice(words.GIVING),
        "went": random.choice(("went", "came")),
        "gift": random.choice([thing for thing in words.OBJECTS if thing[0] not in "aeiou"]),
    }

    def told(giver: str, recipient: str) -> str:
        a, b = (recipient, giver) if order == "ABBA" else (giver, recipient)
        return opening + frame.format(a=a, b=b, s=giver, **rest)

    return {
        "x_clean": told(one, other),
        "x_patch": told(other, one),
        "a_clean": " " + other,
        "a_patch": " " + one,
        "case": f"{order}, {case}",
    }


def _greater_than(random: Random) -> Prompt:
    """An event with a held-out first year; the patch starts in the year 01, as published.

    The clean answer is the first year that is late enough, the patch answer one that is not.
    """
    while True:
        event = random.choice(words.EVENTS)
        century, first = random.randrange(11, 20), random.randrange(2, 99)
        if words.held_out("period", event, 100 * century + first):
            break
    frame, case = random.choice(
        (
            ("The {event} lasted from the year {c}{y:02d} to the year {c}", "lasted"),
            ("The {event} went on from the year {c}{y:02d} to the year {c}", "went on"),
            ("The {event} began in the year {c}{y:02d} and ended in the year {c}", "ended"),
        )
    )
    return {
        "x_clean": frame.format(event=event, c=century, y=first),
        "x_patch": frame.format(event=event, c=century, y=1),
        "a_clean": f"{first + 1:02d}",
        "a_patch": "01",
        "case": case,
    }


def _subject_verb(random: Random) -> Prompt:
    """A noun with a held-out neighbour (adjective, attractor); the patch flips its number."""
    case = random.choice(tuple(_AGREEMENT))
    while True:
        living = "clause" in case or random.random() < 0.5
        kinds = words.PEOPLE + words.ANIMALS if living else words.OBJECTS + words.LANDMARKS
        noun = random.choice(kinds)
        quality = random.choice(words.QUALITIES)
        others = (
            words.LANDMARKS + words.PEOPLE if "phrase" in case else words.PEOPLE + words.ANIMALS
        )
        other = random.choice(others)
        beside = quality if case == "simple" else other
        if words.held_out("agreement", noun, beside):
            break
    verb = random.choice(tuple(words.VERBS))
    flipped = random.random() < 0.5
    other_plural = random.random() < 0.5
    if case == "within a relative clause":
        answers = (verb, words.VERBS[verb][0])
    else:
        forms = (("are", "is"), ("have", "has"), ("were", "was"), ("do", "does"))
        answers = random.choice(forms if living else forms[:3])  # things do nothing in the text

    def told(plural: bool) -> str:
        # Within the clause it is the clause's own subject that is flipped.
        inner = plural if case == "within a relative clause" else other_plural
        outer = other_plural if case == "within a relative clause" else plural
        return _AGREEMENT[case].format(
            noun=words.plural(noun) if outer else noun,
            other=words.plural(other) if inner else other,
            quality=quality,
            preposition=preposition,
            verb=verb if inner else words.VERBS[verb][0],
        )

    preposition = random.choice(words.PREPOSITIONS)
    clean = not flipped
    return {
        "x_clean": told(clean),
        "x_patch": told(not clean),
        "a_clean": " " + answers[not clean],
        "a_patch": " " + answers[clean],
        "case": case,
    }


_AGREEMENT = {
    "simple": "The {quality} {noun}",
    "across a prepositional phrase": "The {noun} {preposition} the {other}",
    "across a relative clause": "The {noun} that the {other} {verb}",
    "within a relative clause": "The {noun} that the {other}",
}
_TASKS: dict[str, Callable[[Random], Prompt]] = {
    "ioi": _ioi,
    "greater_than": _greater_than,
    "subject_verb": _subject_verb,
}
