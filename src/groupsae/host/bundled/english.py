"""The bundled English: short documents whose every word carries the truth about itself.

Document `index` of a `seed` is the same on every machine and needs none of those before it.
Stories keep their characters, and what they own, from sentence to sentence; chronicles tell years;
descriptions tell what singular and plural things are and do. The paper's three tasks (indirect
object, later year, agreement of subject and verb) are part of this text; combinations that
:func:`groupsae.host.bundled.words.held_out` keeps for :mod:`groupsae.host.bundled.tasks` never
occur in it.
"""

# ruff: noqa: E501 (a template is one line)

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import combinations
from random import Random
from types import MappingProxyType
from typing import TypeVar

from groupsae.host.bundled import words
from groupsae.host.bundled.words import Attributes


@dataclass(frozen=True, slots=True)
class Span:
    """The characters start:end of a text, and what is true of them."""

    start: int
    end: int
    attributes: Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the spans of its words and punctuation marks, in order, without overlap."""

    text: str
    spans: tuple[Span, ...]


def document(index: int, seed: int = 0) -> Document:
    """Document `index` of `seed`, with the truth about every word.

    Every word is one span, a year two ("17" and "32"). Attributes, where they apply:

    - `pos`: part of speech (Universal Dependencies tag); always there
    - `number` (singular, plural), `tense` (present, past), `gender`, `lemma`
    - `entity`: whom or what the word names, pronouns and adjectives included; `kind` of it (person,
      animal, object, landmark, place, event, country)
    - `role` in its sentence: giver, recipient, gift, subject, attractor, place, ...
    - `where`: the place at which a story's character is; `owner`: who has a thing; `colour`
    - `count` of a number word; `year`, and its part: `century` (17) or `year_of_century` (32)
    """
    pieces = _pieces(index, seed)
    spans = []
    end = -1  # the first piece's leading space is dropped
    for text, attributes in pieces:
        start = end + (text[0] == " ")
        end += len(text)
        spans.append(Span(start, end, attributes))
    return Document(_join(pieces), tuple(spans))


def documents(start: int, stop: int, seed: int = 0) -> Iterator[Document]:
    """Documents start:stop of `seed`."""
    for index in range(start, stop):
        yield document(index, seed)


def texts(start: int, stop: int, seed: int = 0) -> Iterator[str]:
    """The texts of documents start:stop of `seed`, for whoever needs no spans."""
    for index in range(start, stop):
        yield _join(_pieces(index, seed))


def token_attributes(
    document: Document, offsets: Sequence[tuple[int, int]]
) -> list[dict[str, str | int]]:
    """The attributes of each token of a document: those of the span it shares most characters with.

    `offsets` are the tokenizer's (start, end) of each token in the text, a leading space in or out.
    A token that covers no word (a special token, a space) has none.
    """
    starts = [span.start for span in document.spans]
    found: list[dict[str, str | int]] = []
    for start, end in offsets:
        first = max(bisect_right(starts, start) - 1, 0)
        best, shared = {}, 0
        for span in document.spans[first:]:
            if span.start >= end:
                break
            overlap = min(end, span.end) - max(start, span.start)
            if overlap > shared:
                best, shared = dict(span.attributes), overlap
        found.append(best)
    return found


# A piece is a word with its leading space, or a punctuation mark or second half of a year without.
Piece = tuple[str, Attributes]
Pieces = tuple[Piece, ...]
_T = TypeVar("_T")


def _join(pieces: Sequence[Piece]) -> str:
    return "".join([text for text, _ in pieces])[1:]


def _pieces(index: int, seed: int) -> list[Piece]:
    writer = _Writer(Random(f"{seed}-{index}"))
    kind = writer.random()
    if kind < 0.5:
        _story(writer)
    elif kind < 0.72:
        _chronicle(writer)
    else:
        _description(writer)
    return writer.pieces


# --- stories -----------------------------------------------------------------------------------

_OPENINGS = "[then ,|later ,|one day ,|in the [morning|evening|afternoon] ,|afterwards ,|after that/PRON ,|once ,|soon ,|yesterday ,|on a [sunny|rainy|cold|warm] day ,||]"

_TOGETHER = (
    _OPENINGS + " {A:subject} and {B:subject} [went|walked|came|returned] to {P.the:place} .",
    _OPENINGS + " {A:subject} and {B:subject} met at {P.the:place} .",
    _OPENINGS + " {A:subject} and {B:subject} were at {P.the:place} .",
    _OPENINGS + " {A:subject} and {B:subject} had [lunch|dinner] at {P.the:place} .",
    _OPENINGS + " {A:subject} met {B:object} at {P.the:place} .",
    _OPENINGS + " {A:subject} [went|walked] to {P.the:place} with {B:object} .",
    "the friends {A:subject} and {B:subject} [played|worked|talked] at {P.the:place} .",
)
_BETWEEN = (
    "it was a [sunny|rainy|cold|warm|good] day .",
    "{P.the:subject} was [quiet|old|small|clean|pretty] .",
    "they were very [happy|tired|hungry|busy] .",
    "they [talked|played|laughed] for a long time/NOUN .",
)
_GIFTS = (
    "{S:giver} {gave} {X.a:gift} to {R:recipient} .",
    "{S:giver} {gave} {X.a:gift} to {R:recipient} .",
    "[then|soon|afterwards|later] {S:giver} {gave} {X.a:gift} to {R:recipient} .",
    "{S:giver} decided to/PART give {X.a:gift} to {R:recipient} .",
    "{S:giver} wanted to/PART give {X.a:gift} to {R:recipient} .",
    "{S:giver} had {X.a:gift} for {R:recipient} .",
    "{S:giver} asked {R:recipient} about {X.a:gift} .",
)
_TOGETHER_AND_GIFT = (
    "[[when|after/SCONJ] {A:subject} and {B:subject} [went|came|got] to|[when|while] {A:subject} and {B:subject} were at] {P.the:place} , {S:giver} {gave} {X.a:gift} to {R:recipient} .",
    "{A:subject} and {B:subject} [went to|came to|were at] {P.the:place} , and {S:giver} {gave} {X.a:gift} to {R:recipient} .",
)
_THANKS = (
    "{R:subject} thanked {S:object} .",
    "{R:subject} thanked {S:object} for {X.the:gift} .",
    "{R:subject} [liked|loved] {X.the:object} .",
    "{R:subject} [put|kept] {X.the:object} in {L.a:place} .",
    "{R:subject} smiled at {S:object} .",
    "now {R:subject} had {X.full:object} .",
)
_BEATS = (
    "{A:subject} was [very|still|] {mood} [because {B:subject} was {mood2}|] .",
    "{A:subject} was {mood} , but {B:subject} was {mood2} .",
    "{A:subject} [told {B:object} a story|sat beside {B:object}|waited for {B:object}|looked at {B:object}] .",
    "{A:subject} [liked|helped|followed|remembered|missed|visited] {B:object} .",
    "{A:subject} said that {A.he:subject} was {mood} .",
    "{A:subject} told {B:object} that {A.he:subject} [wanted|needed|lost] {Y.a:object} .",
    "{A:subject} [found|saw|wanted] {Y.a:object} [near|behind|beside] {L.the:place} , and {B:subject} [laughed|smiled|saw {Y.it:object} too] .",
    "there were {N.counted:subject} [near|behind|beside] {L.the:place} . {N.the:subject} were all {colour} .",
    "{A:subject} and {B:subject} saw {N.counted:object} . {A:subject} liked {N.the:object} , but {B:subject} did not .",
)
_MORE_BEATS = (
    "{A:subject} had {N.counted:object} , and {B:subject} had {K.counted:object} .",
    "{A:subject} was {K.count} years old , and {B:subject} was {N.count} .",
    "{A:subject} lost {A.his:owner} {Y.noun:object} , but {B:subject} found {Y.it:object} .",
    "{A:subject} was {mood} . {A.he:subject} wanted {Y.a:object} .",
    "{A:subject} saw {Y.a:object} in {M.a:place} . {A.he:subject} [took {Y.it:object} home|left {Y.it:object} there] .",
    "the {Y.noun:subject} was [in|near|behind] {L.the:place} , but {A:subject} could not see it .",
    "{A:subject} [asked {A.his:owner} [father/NOUN|mother/NOUN|teacher/NOUN] for {Y.a:object}|told {A.his:owner} [father/NOUN|mother/NOUN] about {B:object}] .",
    "{A:subject} and {A.his:owner} {D.noun:object} [played|ran|walked] [outside|together|home] .",
    "when {B:subject} looked for {A:object} , {A.he:subject} was [behind|beside] {L.the:place} .",
)
_OWNED = (
    "{X.the:subject} was {X.colour} .",
    "{O:owner} still had {X.full:object} .",
    "{O:owner} looked at {X.full:object} again .",
    "{O:owner} [liked|loved] {X.full:object} .",
)
_MOVES = (
    "[then|soon|later] {A:subject} [went|walked|ran] to {P.the:place} .",
    "{A:subject} left and [went|walked] to {P.the:place} .",
)
_STAYS = (
    "{A:subject} was still at {A.where:place} .",
    "{A:subject} [stayed|waited|played|worked] at {A.where:place} .",
)
_ENDS = (
    "in the end , {A:subject} and {B:subject} went home [together|] .",
    "{A:subject} and {B:subject} were [good|best] friends .",
    "[finally ,|] {A:subject} went home , and {B:subject} went home too .",
)


def _story(writer: _Writer) -> None:
    """Two or three people, where they are, and the things that pass between them."""
    cast = _cast(writer, 3 if writer.chance(0.25) else 2)
    owned: list[_Thing] = []
    _meet_and_give(writer, cast, owned)
    for _ in range(1 + int(writer.random() * 4)):
        kind = writer.random()
        one, other = _two(writer, cast)
        if kind < 0.3:
            _meet_and_give(writer, cast, owned)
        elif kind < 0.45 and owned:
            thing = writer.pick(owned)
            writer.say(writer.pick(_OWNED), X=thing, O=thing.owner or one)
        elif kind < 0.6:
            if writer.chance(0.5) or not one.where:
                one.where = writer.pick(words.PLACES)
                writer.say(writer.pick(_MOVES), A=one, P=_Thing(one.where))
            else:
                writer.say(writer.pick(_STAYS), A=one)
        else:
            writer.say(
                writer.pick(_BEATS if writer.chance(0.6) else _MORE_BEATS),
                A=one,
                B=other,
                mood=_plain(writer.pick(words.MOODS)),
                mood2=_plain(writer.pick(words.MOODS)),
                Y=_Thing(writer.pick(words.OBJECTS), colour=writer.pick(words.COLOURS)),
                L=_Thing(writer.pick(words.LANDMARKS)),
                M=_Thing(writer.pick(words.CONTAINERS)),
                D=_Thing(writer.pick(words.ANIMALS)),
                K=_Thing(writer.pick(words.OBJECTS), count=writer.pick(_COUNT_WORDS)),
                N=_Thing(
                    writer.pick(words.ANIMALS if writer.chance(0.5) else words.OBJECTS),
                    count=writer.pick(_COUNT_WORDS),
                ),
                colour=_plain_adjective(writer.pick(words.COLOURS)),
            )
    if writer.chance(0.5):
        one, other = _two(writer, cast)
        writer.say(writer.pick(_ENDS), A=one, B=other)
    elif writer.chance(0.3):
        _describe(writer)


def _meet_and_give(writer: _Writer, cast: Sequence[_Person], owned: list[_Thing]) -> None:
    """Two people meet, one gives the other something: indirect object identification."""
    one, other = _two(writer, cast)
    giver, recipient = (one, other) if writer.chance(0.5) else (other, one)
    place = writer.pick(words.PLACES)
    one.where = other.where = place
    gift = _Thing(
        writer.pick(words.OBJECTS),
        colour=writer.pick(words.COLOURS) if writer.chance(0.5) else "",
    )
    slots: dict[str, _Filler] = {
        "A": one,
        "B": other,
        "S": giver,
        "R": recipient,
        "P": _Thing(place),
        "X": gift,
        "L": _Thing(writer.pick(words.CONTAINERS)),
        "gave": _plain(writer.pick(words.GIVING)),
    }
    if writer.chance(0.3):
        writer.say(writer.pick(_TOGETHER_AND_GIFT), **slots)
    else:
        writer.say(writer.pick(_TOGETHER), **slots)
        if writer.chance(0.2):
            writer.say(writer.pick(_BETWEEN), **slots)
        writer.say(writer.pick(_GIFTS), **slots)
    if writer.chance(0.5):
        gift.owner = recipient
        gift.colour = gift.colour or writer.pick(words.COLOURS)
        owned.append(gift)
        writer.say(writer.pick(_THANKS), **slots)


def _cast(writer: _Writer, size: int) -> list[_Person]:
    """People of different names, no two of which are held out as a pair."""
    while True:
        names = [writer.pick(words.NAMES) for _ in range(size)]
        if all(a != b and not words.held_out_names(a, b) for a, b in combinations(names, 2)):
            return [_Person(name) for name in names]


def _two(writer: _Writer, cast: Sequence[_Person]) -> tuple[_Person, _Person]:
    one = int(writer.random() * len(cast))
    other = (one + 1 + int(writer.random() * (len(cast) - 1))) % len(cast)
    return cast[one], cast[other]


# --- chronicles --------------------------------------------------------------------------------

_PERIODS = (
    "{E.the:subject} [of {C:place}|] lasted from the year {first:start} to the year {last:end} .",
    "{E.the:subject} [of {C:place}|] lasted from the year {first:start} to the year {last:end} .",
    "{E.the:subject} [of {C:place}|] went on/ADP from the year {first:start} to the year {last:end} .",
    "{E.the:subject} [of {C:place}|] began in the year {first:start} and ended in the year {last:end} .",
    "{E.the:subject} [of {C:place}|] started in {first:start} and lasted until {last:end} .",
    "from the year {first:start} to the year {last:end} there was {E.a:subject} in {C:place} .",
    "{N:subject} [lived|worked|ruled] in {C:place} from the year {first:start} to the year {last:end} .",
)
_AFTER_PERIODS = (
    "it was a [long|strange|famous] {E.noun:subject} .",
    "{E.the:subject} began in the year {first:start} .",
    "the people of {C:place} remembered {E.the:object} for many/ADJ years .",
    "{E.the:subject} ended in the year {last:end} .",
    "{N:subject} was a [teacher/NOUN|doctor/NOUN|singer/NOUN] in {C:place} in the year {first:start} .",
    "in {last:end} {N:subject} [came|went|returned] to {C:place} .",
    "in the year {first:start} {N:subject} was {count} years old .",
    "{N:subject} [was in {C:place} then|saw {E.the:object}|told everyone about {E.the:object}] .",
)


def _chronicle(writer: _Writer) -> None:
    """Events with their first and last year, the last later in the same century: Greater-Than."""
    country = writer.pick(words.COUNTRIES)
    for _ in range(2 + int(writer.random() * 3)):
        event = writer.pick(words.EVENTS)
        first, last = _period(writer, event)
        slots: dict[str, _Filler] = {
            "E": _Thing(event),
            "C": _country(country),
            "first": _Year(first),
            "last": _Year(last),
            "N": _Person(writer.pick(words.NAMES)),
            "count": _plain_number(writer.pick(_COUNT_WORDS)),
        }
        writer.say(writer.pick(_PERIODS), **slots)
        if writer.chance(0.3):
            writer.say(writer.pick(_AFTER_PERIODS), **slots)


def _period(writer: _Writer, event: str) -> tuple[int, int]:
    """A first year that is not held out with the event, and a later one of its century.

    Any later year may be the last, but those within twenty years more often.
    """
    while True:
        century = 100 * (11 + int(writer.random() * 9))
        first = 1 + int(writer.random() * 98)
        if not words.held_out("period", event, century + first):
            longest = 99 - first
            if writer.chance(0.5):
                longest = min(longest, 20)
            return century + first, century + first + 1 + int(writer.random() * longest)


# --- descriptions ------------------------------------------------------------------------------

_STATES = (
    "{is} [very|not|still|] {quality} .",
    "{is} [near|behind|beside] {L.the:place} .",
    "{has} {Y.a:object} .",
    "{was} [very|not|] {quality} [yesterday|] .",
    "{was} [near|behind|beside] {L.the:place} .",
)
_COLOURED = "[{is}|{was}] {colour} ."
_DEEDS = (  # only the living like and know; things merely are and have
    "{does} not {verb} {M.the:object} .",
    "{verbs} {M.the:object} .",
)
_SUBJECTS = (  # what stands between the subject's noun and its verb
    "",
    "{prep} {Q.the:attractor}",
    "that/PRON {Q.the:attractor} {Q.verbs}",
    "that/PRON {verbs} {Q.the:attractor}",
)


def _description(writer: _Writer) -> None:
    """What things are and do, their verb near or far from them: subject-verb agreement."""
    for _ in range(3 + int(writer.random() * 3)):
        _describe(writer)


def _describe(writer: _Writer) -> None:
    """One thing, perhaps with another beside it, and what it is, has or does."""
    form = int(writer.random() * 4)
    living = writer.chance(0.6) or form >= 2
    kinds = words.PEOPLE + words.ANIMALS if living else words.OBJECTS + words.LANDMARKS
    noun, plural = writer.pick(kinds), writer.chance(0.5)
    quality, attractor = _beside(writer, noun, form)
    subject = _Thing(noun, plural=plural, adjective=quality)
    other = _Thing(attractor, plural=writer.chance(0.5))
    verb = writer.pick(_VERB_BASES)
    slots = {
        **_AGREEING[plural],
        "X": subject,
        "Q": other,
        "M": _Thing(writer.pick(words.PEOPLE), plural=writer.chance(0.5)),
        "L": _Thing(writer.pick(words.LANDMARKS), plural=writer.chance(0.3)),
        "Y": _Thing(writer.pick(words.OBJECTS), colour=writer.pick(words.COLOURS)),
        "P": _Thing(writer.pick(words.PLACES)),
        "C": _country(writer.pick(words.COUNTRIES)),
        "prep": _plain(writer.pick(words.PREPOSITIONS)),
        "quality": _plain(writer.pick(words.ADJECTIVES if living else words.QUALITIES)),
        "colour": _plain_adjective(writer.pick(words.COLOURS)),
        "verb": _verb(verb, True),
        "verbs": _verb(verb, plural),
    }
    other.verb = writer.pick(_VERB_BASES)
    predicate = writer.pick(_DEEDS if living and writer.chance(0.3) else _STATES)
    if noun not in words.PEOPLE and writer.chance(0.15):
        predicate = _COLOURED
    place = "[at {P.the:place} ,|in {C:place}|||||||||]"
    writer.say(f"{place} {{X.full:subject}} {_SUBJECTS[form]} {predicate}", **slots)


def _beside(writer: _Writer, noun: str, form: int) -> tuple[str, str]:
    """An adjective of the subject and the noun beside it, neither held out with the subject."""
    candidates = words.LANDMARKS + words.PEOPLE if form == 1 else words.PEOPLE + words.ANIMALS
    while True:
        quality = writer.pick(words.QUALITIES) if writer.chance(0.4) else ""
        attractor = writer.pick(candidates)
        if not words.held_out("agreement", noun, quality) and not words.held_out(
            "agreement", noun, attractor
        ):
            return quality, attractor


# --- what fills a template's slots ---------------------------------------------------------------


@dataclass(slots=True)
class _Person:
    name: str
    where: str = ""

    def pieces(self, form: str, role: str) -> Pieces:
        if form == "where":
            return _noun_phrase(self.where, role, determiner="the")
        return _person(self.name, form, role, self.where)


@dataclass(slots=True)
class _Thing:
    noun: str
    plural: bool = False
    adjective: str = ""
    colour: str = ""
    count: str = ""
    owner: _Person | None = None
    verb: str = ""

    def pieces(self, form: str, role: str) -> Pieces:
        if form == "colour":
            return _adjective(self.colour, self.noun)
        if form == "verbs":
            return _verb(self.verb, self.plural).pieces("", "")
        if form == "it":
            return _it(self.noun, role)
        owner = self.owner.name if self.owner else ""
        plural = self.plural or bool(self.count)
        if form == "noun":
            return _noun_phrase(self.noun, role, plural=plural, owner=owner)
        if form == "count":
            return _plain_number(self.count).fixed
        if form == "counted":
            return _noun_phrase(self.noun, role, determiner=self.count, plural=True)
        if form == "the":
            return _noun_phrase(self.noun, role, "the", plural, "", self.colour, owner)
        determiner = "a" if form == "a" else "the"
        adjective = self.colour or self.adjective
        return _noun_phrase(self.noun, role, determiner, plural, adjective, self.colour, owner)


@dataclass(slots=True)
class _Year:
    year: int

    def pieces(self, form: str, role: str) -> Pieces:
        return _year(self.year, role)


@dataclass(slots=True)
class _Fixed:
    fixed: Pieces

    def pieces(self, form: str, role: str) -> Pieces:
        return self.fixed


_Filler = _Person | _Thing | _Year | _Fixed


def _frozen(**attributes: str | int) -> Attributes:
    return MappingProxyType({key: value for key, value in attributes.items() if value != ""})


_PRONOUNS = {"he": ("he", "she"), "him": ("him", "her"), "his": ("his", "her")}


@lru_cache(maxsize=1 << 16)
def _person(name: str, form: str, role: str, where: str) -> Pieces:
    """A name, or the pronoun that stands for it."""
    female = name in words.FEMALE
    attributes = _frozen(
        pos="PRON" if form else "PROPN",
        entity=name,
        kind="person",
        number="singular",
        gender="female" if female else "male",
        role=role,
        where=where,
    )
    return ((" " + (_PRONOUNS[form][female] if form else name), attributes),)


@lru_cache(maxsize=1 << 16)
def _noun_phrase(
    noun: str,
    role: str,
    determiner: str = "",
    plural: bool = False,
    adjective: str = "",
    colour: str = "",
    owner: str = "",
) -> Pieces:
    """A determiner or number word, an adjective or colour, and a noun."""
    number = "plural" if plural else "singular"
    pieces: Pieces = (
        (
            " " + (words.plural(noun) if plural else noun),
            _frozen(
                pos="NOUN",
                entity=noun,
                kind=words.KIND_OF_NOUN[noun],
                lemma=noun,
                number=number,
                role=role,
                colour=colour,
                owner=owner,
            ),
        ),
    )
    if adjective:
        pieces = _adjective(adjective, noun) + pieces
    if determiner in words.COUNTS:
        attributes = _frozen(pos="NUM", count=words.COUNTS[determiner], entity=noun, number=number)
        pieces = ((" " + determiner, attributes), *pieces)
    elif determiner:
        if determiner == "a" and pieces[0][0][1] in "aeiou":
            determiner = "an"
        pieces = ((" " + determiner, _frozen(pos="DET", entity=noun, number=number)), *pieces)
    return pieces


@cache
def _adjective(adjective: str, noun: str = "") -> Pieces:
    colour = adjective if adjective in words.COLOURS else ""
    return ((" " + adjective, _frozen(pos="ADJ", entity=noun, colour=colour)),)


@cache
def _it(noun: str, role: str) -> Pieces:
    kind = words.KIND_OF_NOUN[noun]
    return ((" it", _frozen(pos="PRON", entity=noun, kind=kind, number="singular", role=role)),)


@cache
def _year(year: int, role: str) -> Pieces:
    century, rest = divmod(year, 100)
    return (
        (f" {century}", _frozen(pos="NUM", year=year, century=century, role=role)),
        (f"{rest:02d}", _frozen(pos="NUM", year=year, year_of_century=rest, role=role)),
    )


@cache
def _country(name: str) -> _Fixed:
    attributes = _frozen(pos="PROPN", entity=name, kind="country", number="singular", role="place")
    return _Fixed(((" " + name, attributes),))


@cache
def _plain(word: str) -> _Fixed:
    return _Fixed(((" " + word, words.FUNCTION_WORDS[word]),))


@cache
def _plain_adjective(word: str) -> _Fixed:
    return _Fixed(_adjective(word))


@cache
def _plain_number(word: str) -> _Fixed:
    return _Fixed(((" " + word, _frozen(pos="NUM", count=words.COUNTS[word])),))


@cache
def _verb(base: str, plural: bool) -> _Fixed:
    number = "plural" if plural else "singular"
    attributes = _frozen(pos="VERB", number=number, tense="present", lemma=base)
    return _Fixed(((" " + (base if plural else words.VERBS[base][0]), attributes),))


_AGREEING: dict[bool, dict[str, _Filler]] = {
    False: {form: _plain(form) for form in ("is", "has", "was", "does")},
    True: {
        form: _plain(other)
        for form, other in {"is": "are", "has": "have", "was": "were", "does": "do"}.items()
    },
}
_VERB_BASES = tuple(words.VERBS)
_COUNT_WORDS = tuple(words.COUNTS)


# --- templates -----------------------------------------------------------------------------------
#
# "word" stands for itself, "word/POS" with that part of speech, "[a b|c|]" for one of the
# alternatives (they nest), "{X.form:role}" for what the slot X holds.


@dataclass(frozen=True, slots=True)
class _Slot:
    name: str
    form: str
    role: str


@dataclass(frozen=True, slots=True)
class _Choice:
    alternatives: tuple[tuple[Piece | _Slot | _Choice, ...], ...]


_Template = tuple[Piece | _Slot | _Choice, ...]
_SYMBOL = re.compile(r"\{(?P<slot>[^}]*)\}|(?P<mark>[\[\]|])|(?P<word>[^\s\[\]|{}]+)")


@cache
def _parse(template: str) -> _Template:
    """Reads a template into pieces, slots and choices."""
    levels: list[list[list[Piece | _Slot | _Choice]]] = [[[]]]
    for symbol in _SYMBOL.finditer(template):
        if symbol["mark"] == "[":
            levels.append([[]])
        elif symbol["mark"] == "|":
            levels[-1].append([])
        elif symbol["mark"] == "]":
            alternatives = levels.pop()
            levels[-1][-1].append(_Choice(tuple(map(tuple, alternatives))))
        elif symbol["slot"]:
            name, _, role = symbol["slot"].partition(":")
            name, _, form = name.partition(".")
            levels[-1][-1].append(_Slot(name, form, role))
        else:
            word, _, part = symbol["word"].partition("/")
            attributes = _frozen(pos=part) if part else words.FUNCTION_WORDS[word]
            space = "" if attributes["pos"] == "PUNCT" else " "
            levels[-1][-1].append((space + word, attributes))
    return tuple(levels[0][0])


class _Writer:
    """A document in the making, and the one source of chance for it."""

    def __init__(self, random: Random) -> None:
        # Only random() itself is promised to stay the same across Python versions.
        self.random = random.random
        self.pieces: list[Piece] = []

    def pick(self, options: Sequence[_T]) -> _T:
        return options[int(self.random() * len(options))]

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def say(self, template: str, **slots: _Filler) -> None:
        """Write the sentences of a template, each with its first letter large."""
        start = len(self.pieces)
        self._fill(_parse(template), slots)
        begins = True
        for position in range(start, len(self.pieces)):
            text, attributes = self.pieces[position]
            if begins:
                self.pieces[position] = (text[:2].upper() + text[2:], attributes)
            begins = text == "."

    def _fill(self, template: _Template, slots: Mapping[str, _Filler]) -> None:
        for item in template:
            if isinstance(item, tuple):
                self.pieces.append(item)
            elif isinstance(item, _Slot):
                self.pieces += slots[item.name].pieces(item.form, item.role)
            else:
                self._fill(self.pick(item.alternatives), slots)
