"""The labels of the bundled English, by what can be seen in its text."""

from __future__ import annotations

import numpy as np
import pytest

from groupsae.host.bundled import Document, Span, documents, words
from groupsae.host.bundled.labels import DEFINITIONS, LABELS, token_labels, word_labels

MANY = list(documents(0, 400, seed=5))


def worded() -> list[tuple[str, set[str], list[str]]]:
    """Each word with its labels and the words before it in its sentence."""
    found = []
    for document in MANY:
        before: list[str] = []
        for span, labels in zip(document.spans, word_labels(document), strict=True):
            word = document.text[span.start : span.end]
            found.append((word, labels, before.copy()))
            before = [] if word == "." else [*before, word]
    return found


WORDED = worded()


def test_every_label_occurs_and_none_is_without_definition():
    assert set().union(*(labels for _, labels, _ in WORDED)) == set(LABELS) == set(DEFINITIONS)


@pytest.mark.parametrize(
    ("label", "holds"),
    [
        ("punctuation", lambda word: word in (".", ",")),
        ("full stop", lambda word: word == "."),
        ("comma", lambda word: word == ","),
        ("female name", lambda word: word in words.FEMALE),
        ("male name", lambda word: word in words.MALE),
        ("name", lambda word: word in words.NAMES),
        ("country", lambda word: word in words.COUNTRIES),
        ("colour", lambda word: word.lower() in words.COLOURS),
        ("number word", lambda word: word.lower() in words.COUNTS),
        ("female pronoun", lambda word: word.lower() in ("she", "her")),
        ("male pronoun", lambda word: word.lower() in ("he", "him", "his")),
    ],
)
def test_labels_that_the_word_alone_tells(label, holds):
    for word, labels, _ in WORDED:
        assert (label in labels) == holds(word), word


def test_labels_that_the_sentence_tells():
    for word, labels, before in WORDED:
        assert ("sentence begin" in labels) == (not before)
        assert (word.isdigit()) == bool(labels & {"century", "year of century"})
        if "after first year" in labels:
            assert any(earlier.isdigit() for earlier in before)
        if "relative clause" in labels:
            assert "that" in [word, *before[-3:]]
        if "plural noun" in labels:
            assert word.endswith(("s", "people"))


def test_a_sentence_with_a_relative_clause():
    found = next(
        (document, labels)
        for document in MANY
        for labels in [word_labels(document)]
        if "relative clause" in set().union(*labels)
    )
    text = [found[0].text[span.start : span.end] for span in found[0].spans]
    start = next(i for i, labels in enumerate(found[1]) if "relative clause" in labels)
    inside = ["relative clause" in labels for labels in found[1][start - 1 : start + 5]]
    assert inside == [False, True, True, True, True, False]
    assert "attractor" in set().union(*found[1][start : start + 4]), text


def mini(*parts: tuple[str, dict]) -> Document:
    spans, text = [], ""
    for word, attributes in parts:
        text += " " if text else ""
        spans.append(Span(len(text), len(text) + len(word), attributes))
        text += word
    return Document(text, tuple(spans))


PERSON = {"pos": "PROPN", "kind": "person", "role": "subject", "number": "singular"}
STOP = (".", {"pos": "PUNCT"})


def test_what_is_remembered_from_before():
    cup = {"pos": "NOUN", "entity": "cup", "number": "singular"}
    document = mini(
        ("Ann", {**PERSON, "entity": "Ann"}),
        ("cups", {**cup, "number": "plural", "role": "subject"}),
        ("fall", {"pos": "VERB", "number": "plural"}),
        STOP,
        ("Ann", {**PERSON, "entity": "Ann"}),
        ("Bob", {**PERSON, "entity": "Bob"}),
        ("cup", cup),
    )
    labels = word_labels(document)
    kinds = {"name again", "new name", "noun again", "after plural subject", "first sentence"}
    assert [own & kinds for own in labels] == [
        {"new name", "first sentence"},
        {"first sentence"},
        {"after plural subject", "first sentence"},
        {"after plural subject", "first sentence"},
        {"name again"},
        {"new name"},
        {"noun again"},
    ]


def test_every_piece_of_a_word_has_its_labels_and_a_space_has_none():
    document = mini(("Ann", {**PERSON, "entity": "Ann"}), STOP)
    found = token_labels(document, [(0, 1), (1, 3), (3, 4), (3, 5), (0, 0)])
    named = [{LABELS[i] for i in np.flatnonzero(row)} for row in found]
    assert "name" in named[0]
    assert named[0] == named[1]
    assert named[2] == named[4] == set()
    assert "full stop" in named[3]
    assert token_labels(document, []).shape == (0, len(LABELS))
