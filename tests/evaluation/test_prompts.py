from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsae.errors import InputError
from groupsae.evaluation.prompts import KINDS, generate

TASKS = ("ioi", "greater_than", "subject_verb", *KINDS)
PLURALS = {"men", "women", "fishermen", "children"}  # and what ends in s, but
SINGULARS = {"princess"}
VOWELS = tuple("aeiou")

any_tokenizer = given(share=st.floats(0.8, 1), seed=st.integers(0, 1000))
few = settings(max_examples=15, deadline=None)


def knows(share: float, seed: int) -> Callable[[str, Sequence[str]], list[bool]]:
    """A tokenizer with one token for a random share of all words, for "are" and for the year 01."""

    def one_token(beginning: str, endings: Sequence[str]) -> list[bool]:
        return [
            ending in ("01", " is", " are") or Random(f"{seed}{beginning}{ending}").random() < share
            for ending in endings
        ]

    return one_token


def everything(beginning: str, endings: Sequence[str]) -> list[bool]:
    return [True] * len(endings)


def is_known(one_token, word: str) -> bool:
    return one_token("the", [f" {word}"]) == [True]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def exchanged(text: str, one: str, other: str) -> str:
    exchange = {one: other, other: one}
    return re.sub(r"\w+", lambda word: exchange.get(word[0], word[0]), text)


def is_plural(noun: str) -> bool:
    return noun in PLURALS or (noun.endswith("s") and noun not in SINGULARS)


@few
@any_tokenizer
def test_in_ioi_the_answer_is_whoever_does_not_give(share: float, seed: int) -> None:
    one_token = knows(share, seed)
    for example in generate("ioi", one_token, 30, seed):
        recipient, giver = example.a_clean.strip(), example.a_patch.strip()
        counts = Counter(words(example.x_clean))
        assert (counts[recipient], counts[giver]) == (1, 2)
        assert example.x_patch == exchanged(example.x_clean, recipient, giver)
        first = min((recipient, giver), key=words(example.x_clean).index)
        assert example.case == ("ABBA" if first == recipient else "BABA")
        assert example.x_clean.endswith(" to")
        assert is_known(one_token, recipient)
        assert is_known(one_token, giver)
        place = re.search(r"the (\w+)[,.]", example.x_clean)
        gift = re.search(r" a (\w+) to$", example.x_clean)
        assert place is not None
        assert gift is not None
        assert is_known(one_token, place[1])
        assert is_known(one_token, gift[1])
        assert not gift[1].startswith(VOWELS)


@few
@any_tokenizer
def test_in_greater_than_the_answer_is_the_first_later_year(share: float, seed: int) -> None:
    one_token = knows(share, seed)
    form = re.compile(r"The (\w+) lasted from the year (\d\d)(\d\d) to the year (\d\d)")
    for example in generate("greater_than", one_token, 30, seed):
        found = form.fullmatch(example.x_clean)
        assert found is not None
        event, century, year, same_century = found.groups()
        assert same_century == century
        assert is_known(one_token, event)
        assert example.x_patch == example.x_clean.replace(century + year, f"{century}01")
        assert example.a_patch == "01" < year < example.a_clean
        later = [f"{digits:02d}" for digits in range(int(year), int(example.a_clean) + 1)]
        known = one_token(f"from the year {century}", later)
        assert known == [True, *[False] * (len(later) - 2), True]


@few
@given(share=st.floats(0.8, 1), seed=st.integers(0, 1000), task=st.sampled_from(list(KINDS)))
def test_the_subject_alone_changes_its_number(share: float, seed: int, task: str) -> None:
    one_token = knows(share, seed)
    for example in generate(task, one_token, 30, seed):
        assert example.case == KINDS[task]
        clean, patch = words(example.x_clean), words(example.x_patch)
        (where,) = [i for i, pair in enumerate(zip(clean, patch, strict=True)) if len({*pair}) > 1]
        subject = {"simple": 2, "within a relative clause": 4}.get(example.case, 1)
        assert where == subject
        assert is_plural(clean[where]) != is_plural(patch[where])
        for noun, answer in ((clean[where], example.a_clean), (patch[where], example.a_patch)):
            assert is_plural(noun) != answer.endswith("s") or answer == " miss"
        if example.case == "across a relative clause":
            inner, verb = clean[4:6]
            assert is_plural(inner) != (verb.endswith("s") and verb != "miss")
        varied = [*clean[1:], *patch[1:], example.a_clean.strip(), example.a_patch.strip()]
        assert all(is_known(one_token, word) for word in varied if word not in ("that", "the"))


def test_subject_verb_mixes_its_four_kinds() -> None:
    cases = Counter(example.case for example in generate("subject_verb", everything, 400, 0))
    assert set(cases) == set(KINDS.values())
    assert min(cases.values()) > 60


@pytest.mark.parametrize("task", TASKS)
def test_examples_differ_and_depend_on_the_seed_alone(task: str) -> None:
    examples = generate(task, everything, 500, seed=3)
    assert len(set(examples)) == len(examples) == 500
    assert generate(task, everything, 100, seed=3) == examples[:100]
    assert generate(task, everything, 100, seed=4) != examples[:100]


def test_what_has_few_combinations_ends() -> None:
    def only(beginning: str, endings: Sequence[str]) -> list[bool]:
        return [i < 8 for i in range(len(endings))]

    examples = generate("subject_verb_within_clause", only, 2000, 0)
    # 8 by 7 nouns, the number of each, and the 8 verbs
    assert len(examples) == len(set(examples)) == 8 * 7 * 2 * 2 * 8


def test_there_are_words_to_choose_from() -> None:
    def variety(task: str, form: str) -> set[str]:
        found = (
            re.search(form, example.x_clean) for example in generate(task, everything, 1500, 0)
        )
        return {match[1] for match in found if match}

    assert len(variety("ioi", r"and (\w+)")) >= 60
    assert len(variety("greater_than", r"^The (\w+)")) >= 60
    assert len(variety("subject_verb_across_phrase", r"^The (\w+)")) >= 60
    assert len(variety("subject_verb_across_phrase", r"the (\w+)$")) >= 60


@pytest.mark.parametrize(
    ("task", "missing", "named"),
    [
        ("ioi", " Mary", "names"),
        ("ioi", " museum", "places"),
        ("ioi", " ring", "gifts"),
        ("greater_than", " war", "events"),
        ("greater_than", "50", "years"),
        ("subject_verb", " dog", "living nouns"),
        ("subject_verb_simple", " old", "adjectives"),
        ("subject_verb_across_phrase", " table", "nouns of things"),
        ("subject_verb_across_phrase", " near", "prepositions"),
        ("subject_verb_across_clause", " likes", "verbs"),
        ("subject_verb_across_clause", " are", "auxiliary verbs"),
    ],
)
def test_too_few_words_are_said_with_their_number(task: str, missing: str, named: str) -> None:
    kept = 0 if named == "auxiliary verbs" else 1

    def one_token(beginning: str, endings: Sequence[str]) -> list[bool]:
        return [missing not in endings or i < kept for i in range(len(endings))]

    with pytest.raises(InputError) as caught:
        generate(task, one_token, 100, 0)
    message = str(caught.value)
    assert re.search(rf"{task} needs at least \d+ {named} .*one token", message)
    assert re.search(r"of the \d+ built-in ones (1 is|none are)", message)
    assert f"{task}=FILE.jsonl" in message
