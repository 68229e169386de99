"""What is true of every word of the bundled English, as yes-or-no labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Bool

from groupsae.host.bundled.english import Document, Span, token_attributes

DEFINITIONS = {
    "noun": "a common noun",
    "singular noun": "a common noun in the singular",
    "plural noun": "a common noun in the plural",
    "person noun": "a common noun for a person",
    "animal": "a noun for an animal",
    "object": "a noun for a thing that is given, had or found",
    "landmark": "a noun for a thing that something is near, in or behind",
    "place": "a noun for a place that people go to",
    "event": "a noun for an event that lasts from one year to another",
    "name": "a person's name",
    "female name": "a woman's name",
    "male name": "a man's name",
    "country": "a country's name",
    "pronoun": "a pronoun",
    "female pronoun": "she or her",
    "male pronoun": "he, him or his",
    "verb": "a verb, auxiliaries left out",
    "past verb": "a verb in the past tense, auxiliaries left out",
    "auxiliary": "an auxiliary: is, has, did, ...",
    "singular verb": "a verb or auxiliary that agrees with a singular subject",
    "plural verb": "a verb or auxiliary that agrees with a plural subject",
    "adjective": "an adjective",
    "colour": "an adjective of colour",
    "determiner": "a determiner",
    "preposition": "a preposition",
    "conjunction": "a conjunction",
    "adverb": "an adverb",
    "number word": "two, three, ...",
    "century": "the first half of a year: 17 of 1732",
    "year of century": "the second half of a year: 32 of 1732",
    "first year": "either half of the year in which a period begins",
    "last year": "either half of the year in which a period ends",
    "punctuation": "a full stop or a comma",
    "full stop": "a full stop",
    "comma": "a comma",
    "giver": "the name of who gives",
    "recipient": "the name of who is given to",
    "gift": "the noun of what is given",
    "attractor": "the noun between a subject and its verb",
    "owned": "a noun for a thing whose owner was told",
    "sentence begin": "the first word of a sentence",
    "first sentence": "any word of a document's first sentence",
    "name again": "a person's name that the document has had before",
    "new name": "a person's name that the document has not had before",
    "noun again": "a common noun whose thing, place or event the document has named before",
    "relative clause": "from the pronoun that to the end of its clause",
    "after singular subject": "behind a singular common noun that is its sentence's last subject",
    "after plural subject": "behind a plural common noun that is its sentence's last subject",
    "after first year": "behind a period's first year, in the same sentence",
}
"""What each label says of a word; all are known from the generator or by an exact rule."""

LABELS = tuple(DEFINITIONS)

_RELATIVE_CLAUSE = 4  # words: "that the doctor follows", "that know the queens"


def token_labels(
    document: Document, offsets: Sequence[tuple[int, int]]
) -> Bool[np.ndarray, "token label"]:
    """Which of :data:`LABELS` are true of each token of a document.

    A token has the labels of the word it shares most characters with: all pieces of a word have the
    same ones, and a token that covers no word has none.

    Args:
        offsets: The tokenizer's (start, end) of each token in the text.
    """
    spans = tuple(
        Span(span.start, span.end, dict.fromkeys(labels, 1))
        for span, labels in zip(document.spans, word_labels(document), strict=True)
    )
    found = token_attributes(Document(document.text, spans), offsets)
    rows = [[label in labels for label in LABELS] for labels in found]
    return np.array(rows, dtype=bool).reshape(len(rows), len(LABELS))


def word_labels(document: Document) -> list[set[str]]:
    """The labels of each word and punctuation mark of a document, in the order of its spans."""
    words = [document.text[span.start : span.end] for span in document.spans]
    attributes = [span.attributes for span in document.spans]
    labels = [
        {label for label, holds in _OF_A_WORD.items() if holds(word, own)}
        for word, own in zip(words, attributes, strict=True)
    ]
    for rule in (_sentences, _mentions, _relative_clauses, _subjects, _first_years):
        for position, label in rule(words, attributes):
            labels[position].add(label)
    return labels


_Attributes = Mapping[str, str | int]
_Found = Iterator[tuple[int, str]]  # a word's position and its label


def _is(**wanted: str) -> Callable[[str, _Attributes], bool]:
    """Whether each attribute is one of those named, as in "VERB AUX"."""
    choices = {key: values.split() for key, values in wanted.items()}
    return lambda _, own: all(own.get(key) in values for key, values in choices.items())


def _has(key: str, **wanted: str) -> Callable[[str, _Attributes], bool]:
    fits = _is(**wanted)
    return lambda word, own: key in own and fits(word, own)


_OF_A_WORD: dict[str, Callable[[str, _Attributes], bool]] = {
    "noun": _is(pos="NOUN"),
    "singular noun": _is(pos="NOUN", number="singular"),
    "plural noun": _is(pos="NOUN", number="plural"),
    "person noun": _is(pos="NOUN", kind="person"),
    "animal": _is(pos="NOUN", kind="animal"),
    "object": _is(pos="NOUN", kind="object"),
    "landmark": _is(pos="NOUN", kind="landmark"),
    "place": _is(pos="NOUN", kind="place"),
    "event": _is(pos="NOUN", kind="event"),
    "name": _is(pos="PROPN", kind="person"),
    "female name": _is(pos="PROPN", gender="female"),
    "male name": _is(pos="PROPN", gender="male"),
    "country": _is(pos="PROPN", kind="country"),
    "pronoun": _is(pos="PRON"),
    "female pronoun": _is(pos="PRON", gender="female"),
    "male pronoun": _is(pos="PRON", gender="male"),
    "verb": _is(pos="VERB"),
    "past verb": _is(pos="VERB", tense="past"),
    "auxiliary": _is(pos="AUX"),
    "singular verb": _is(pos="VERB AUX", number="singular"),
    "plural verb": _is(pos="VERB AUX", number="plural"),
    "adjective": _is(pos="ADJ"),
    "colour": _has("colour", pos="ADJ"),
    "determiner": _is(pos="DET"),
    "preposition": _is(pos="ADP"),
    "conjunction": _is(pos="CCONJ SCONJ"),
    "adverb": _is(pos="ADV"),
    "number word": _has("count"),
    "century": _has("century"),
    "year of century": _has("year_of_century"),
    "first year": _has("year", role="start"),
    "last year": _has("year", role="end"),
    "punctuation": _is(pos="PUNCT"),
    "full stop": lambda word, _: word == ".",
    "comma": lambda word, _: word == ",",
    "giver": _is(pos="PROPN", role="giver"),
    "recipient": _is(pos="PROPN", role="recipient"),
    "gift": _is(pos="NOUN", role="gift"),
    "attractor": _is(pos="NOUN", role="attractor"),
    "owned": _has("owner", pos="NOUN"),
}


def _sentences(words: Sequence[str], attributes: Sequence[_Attributes]) -> _Found:
    ends = 0
    for position, word in enumerate(words):
        if position == 0 or words[position - 1] == ".":
            yield position, "sentence begin"
        if not ends:
            yield position, "first sentence"
        ends += word == "."


def _mentions(words: Sequence[str], attributes: Sequence[_Attributes]) -> _Found:
    seen: set[str | int] = set()
    for position, own in enumerate(attributes):
        if own["pos"] == "PROPN" and own.get("kind") == "person":
            yield position, "name again" if own["entity"] in seen else "new name"
            seen.add(own["entity"])
        elif own["pos"] == "NOUN" and "entity" in own:
            if own["entity"] in seen:
                yield position, "noun again"
            seen.add(own["entity"])


def _relative_clauses(words: Sequence[str], attributes: Sequence[_Attributes]) -> _Found:
    """Those behind a noun; "after that," is none."""
    for position in range(1, len(words)):
        opens = words[position] == "that" and attributes[position]["pos"] == "PRON"
        if opens and attributes[position - 1]["pos"] == "NOUN":
            for inside in range(position, position + _RELATIVE_CLAUSE):
                yield inside, "relative clause"


def _subjects(words: Sequence[str], attributes: Sequence[_Attributes]) -> _Found:
    number: str | int | None = None
    for position, (word, own) in enumerate(zip(words, attributes, strict=True)):
        if own.get("role") == "subject":
            number = own.get("number") if own["pos"] == "NOUN" else None
        elif number is not None:
            yield position, f"after {number} subject"
        if word == ".":
            number = None


def _first_years(words: Sequence[str], attributes: Sequence[_Attributes]) -> _Found:
    behind = False
    for position, (word, own) in enumerate(zip(words, attributes, strict=True)):
        is_first_year = own.get("role") == "start"
        if behind and not is_first_year:
            yield position, "after first year"
        behind = word != "." and (behind or is_first_year)
