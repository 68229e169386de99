"""The vocabulary of the bundled English: which words there are, and what is true of each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from zlib import crc32

Attributes = Mapping[str, str | int]


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FEMALE = _split(
    "Mary Anna Emma Lucy Sara Kate Olivia Alice Ella Grace Julia Laura Nora Ruth Clara Helen Ivy "
    "Jane Rosa Zoe"
)
MALE = _split(
    "John James Ethan Kyle Tom Ben Sam David Paul Peter Mark Luke Jack Adam Henry Oscar Leo Max "
    "Douglas Simon"
)
NAMES = FEMALE + MALE

COLOURS = _split("red blue green yellow black white brown pink grey purple orange")

PLACES = _split(
    "park school market library garden museum station beach cafe farm theatre hospital bakery "
    "harbour castle church office shop zoo lake"
)
COUNTRIES = _split("France Spain Italy Poland Egypt India China Peru Greece Norway")

EVENTS = _split(
    "war siege drought reign voyage project strike famine trial peace crisis treaty revolt "
    "journey festival plague alliance conflict expedition rebellion campaign dynasty truce "
    "chaos exchange flood study search dispute winter"
)

PEOPLE = _split(
    "boy girl teacher doctor farmer sailor king queen artist baker painter driver pilot guard "
    "student friend singer lawyer father mother"
)
ANIMALS = _split("dog cat bird horse cow duck rabbit bear lion fox goat frog")
OBJECTS = _split(
    "key book ball flower jacket scarf cup hat ring lamp drum kite apple coin letter toy basket "
    "bottle picture ribbon"
)
LANDMARKS = _split(
    "cabinet table chair tree house door window wall bridge tower fence box road rock boat car"
)
_IRREGULAR_PLURALS = {"box": "boxes", "fox": "foxes", "scarf": "scarves"}

CONTAINERS = _split("cabinet house box boat car")  # places to put a thing in

KIND_OF_NOUN = {
    **dict.fromkeys(PEOPLE, "person"),
    **dict.fromkeys(ANIMALS, "animal"),
    **dict.fromkeys(OBJECTS, "object"),
    **dict.fromkeys(LANDMARKS, "landmark"),
    **dict.fromkeys(PLACES, "place"),
    **dict.fromkeys(EVENTS, "event"),
}

PREPOSITIONS = _split("near behind beside above below by")

# For living things only, then for anything.
MOODS = _split("happy sad tired hungry kind brave quiet angry clever busy")
QUALITIES = _split("old new big small clean strong pretty famous strange heavy")
ADJECTIVES = MOODS + QUALITIES

# base form: (third person singular, past)
VERBS = {
    "like": ("likes", "liked"),
    "know": ("knows", "knew"),
    "see": ("sees", "saw"),
    "help": ("helps", "helped"),
    "watch": ("watches", "watched"),
    "love": ("loves", "loved"),
    "miss": ("misses", "missed"),
    "follow": ("follows", "followed"),
    "visit": ("visits", "visited"),
    "fear": ("fears", "feared"),
    "hear": ("hears", "heard"),
    "remember": ("remembers", "remembered"),
}
GIVING = _split("gave handed passed showed offered brought threw sold lent sent")
COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7}


def plural(noun: str) -> str:
    """The plural form of a noun."""
    return _IRREGULAR_PLURALS.get(noun, noun + "s")


@cache
def held_out(*parts: str | int) -> bool:
    """Whether a combination is kept out of all text, so that prompts made of it were never seen.

    It is a pair of names, an event with its first year, or a subject with the word beside it; one
    in ten is.
    """
    return crc32("|".join(map(str, parts)).encode()) % 10 == 0


def held_out_names(one: str, other: str) -> bool:
    """:func:`held_out` for two names, in either order."""
    return held_out("names", *sorted((one, other)))


def _function_words() -> dict[str, Attributes]:
    """Words that templates spell out, with their part of speech (Universal Dependencies tags)."""
    by_part = {
        "DET": "the a an every all no",
        "PRON": "who nobody everyone everybody something",
        "ADP": "to from in on at of with for near behind beside above below by into under after "
        "before between about during until through",
        "CCONJ": "and but or",
        "SCONJ": "when while because that if although",
        "PART": "not",
        "ADV": "then later afterwards now still today yesterday often always never very too there "
        "home together again soon once away finally back here also first only so early late "
        "outside alone slowly quickly long",
        "ADJ": "sunny cold warm good best next same true important other rainy nice",
        "NOUN": "day morning evening afternoon night end name story lunch dinner noon rain year "
        "century",
        "AUX": "did could will would can must",
        "NUM": "one",
    }
    verbs_past = (
        "went walked came got met found looked took wanted asked said told smiled laughed thanked "
        "lasted began ended started went continued lived ruled waited decided played worked put "
        "kept lost needed left forgot ran returned saw had talked sat followed became opened "
        "closed happened stayed"
    )
    verbs_base = "give go stay play live wait rest sing work sleep eat run talk hide take walk be"
    words: dict[str, Attributes] = {
        word: {"pos": part} for part, group in by_part.items() for word in group.split()
    }
    words |= {word: {"pos": "VERB", "tense": "past"} for word in verbs_past.split()}
    words |= {word: {"pos": "VERB"} for word in verbs_base.split()}
    for number, forms in {
        "singular": "is has was does this",
        "plural": "are have were do these",
    }.items():
        for word in forms.split():
            tense = "past" if word in ("was", "were") else "present"
            words[word] = (
                {"pos": "DET", "number": number}
                if word in ("this", "these")
                else {"pos": "AUX", "number": number, "tense": tense}
            )
    words |= {
        word: {"pos": "PRON", "number": number}
        for word, number in {"it": "singular", "they": "plural", "them": "plural"}.items()
    }
    words |= {word: {"pos": "NOUN", "number": "plural"} for word in ("friends", "people", "years")}
    words |= {mark: {"pos": "PUNCT"} for mark in ".,"}
    words |= {word: {"pos": "ADJ"} for word in ADJECTIVES}
    words |= {word: {"pos": "VERB", "tense": "past"} for word in GIVING}
    words |= {past: {"pos": "VERB", "tense": "past", "lemma": v} for v, (_, past) in VERBS.items()}
    words |= {base: {"pos": "VERB", "number": "plural", "tense": "present"} for base in VERBS}
    return {word: MappingProxyType(dict(attributes)) for word, attributes in words.items()}


FUNCTION_WORDS = _function_words()
