from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupsae.interpretation.explanation.examples import Example
from groupsae.interpretation.explanation.prompts import (
    detection_prompt,
    explanation_prompt,
    fuzzing_prompt,
    marked_text,
    parse_explanation,
    parse_judgements,
)
from tests.interpretation.explanation.server import shown_texts


def example(*marked: int) -> Example:
    return Example(tuple(range(len(marked))), tuple(map(bool, marked)), truth=True)


@pytest.mark.parametrize(
    ("marked", "text"),
    [
        ((0, 0, 0, 0), " a b c d"),
        ((0, 1, 0, 1), " a<< b>> c<< d>>"),
        ((1, 1, 0, 0), "<< a b>> c d"),
        ((0, 1, 1, 1), " a<< b c d>>"),
    ],
)
def test_runs_of_marked_tokens_stand_in_marks(marked, text):
    assert marked_text(example(*marked), [" a", " b", " c", " d"]) == text


def test_bytes_of_one_character_are_written_as_it():
    texts = ["don", "<0xE2><0x80>", "<0x99>", "t", "<0x0A>"]
    assert marked_text(example(0, 0, 0, 0, 0), texts) == "don’t<0x0A>"
    assert marked_text(example(0, 0, 1, 0, 0), texts) == "don<0xE2><0x80><<<0x99>>>t<0x0A>"
    assert marked_text(example(0, 1, 1, 0, 0), texts) == "don<<’>>t<0x0A>"


@given(st.lists(st.text(max_size=20), min_size=1, max_size=8))
def test_every_text_stays_one_line_of_its_own(texts):
    """Whatever a text holds, it cannot pass for another text or for the end of the list."""
    examples = [Example((i,), (False,), truth=True) for i in range(len(texts))]
    for messages in (
        explanation_prompt(examples, texts),
        detection_prompt("said\n1. so", examples, texts),
        fuzzing_prompt("said", examples, texts),
    ):
        assert [message["role"] for message in messages] == ["system", "user"]
        assert shown_texts({"messages": messages}) == texts


JUDGEMENTS = {
    "[1, 0, 1]": [True, False, True],
    " \n[0,0,0]\n": [False, False, False],
    "```json\n[1, 1, 1]\n```": [True, True, True],
    "```\n[1, 1, 0]\n```\n": [True, True, False],
    "<think>[1, 1, 1]? no.\n</think>\n\n[0, 1, 0]": [False, True, False],
}
UNREADABLE = [
    "",
    "1, 0, 1",
    "[1, 0]",
    "[1, 0, 1, 1]",
    "[1, 0, 2]",
    "[1, 0, 1.0]",
    "[true, false, true]",
    '["1", "0", "1"]',
    "[1, 0, NaN]",
    "Sure! [1, 0, 1]",
    "[1, 0, 1] as asked",
    "```json\n[1, 0, 1]",
    "<think>[1, 0, 1]",
    "[1, 0, 1",
    '{"answers": [1, 0, 1]}',
    "[[1, 0, 1]]",
    "[" * 100_000,
    "null",
]


@pytest.mark.parametrize(("answer", "judged"), JUDGEMENTS.items())
def test_judgements_are_read(answer, judged):
    assert parse_judgements(answer, 3) == judged


@pytest.mark.parametrize("answer", UNREADABLE)
def test_nothing_is_guessed(answer):
    assert parse_judgements(answer, 3) is None
    assert parse_explanation(answer) is None


@given(st.lists(st.booleans(), min_size=1))
def test_every_list_of_judgements_is_read_as_it_is(judged):
    answer = json.dumps([int(own) for own in judged])
    assert parse_judgements(answer, len(judged)) == judged
    assert parse_judgements(answer, len(judged) + 1) is None


def test_explanations_are_read_on_one_line():
    assert parse_explanation('{"explanation": " names of\\n days "}') == "names of days"
    assert parse_explanation('```json\n{"explanation": "days"}\n```') == "days"
    for answer in ('{"explanation": " "}', '{"explanation": 3}', '"days"', "days", '{"said": ""}'):
        assert parse_explanation(answer) is None
