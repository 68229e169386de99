"""Prompts of the paper's three tasks, made for whichever words a tokenizer has as one token.

IOI after Wang et al. 2022 (arXiv 2211.00593), Greater-Than after Hanna et al. 2023 (arXiv
2305.00586), subject-verb agreement after Finlayson et al. 2021 (arXiv 2106.06087) and Marks et al.
2024 (arXiv 2403.19647). The words and the sentences are our own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple, TypeAlias

from groupsae.errors import InputError

OneToken: TypeAlias = Callable[[str, Sequence[str]], list[bool]]
"""Which of the endings are one more token after a beginning."""


class Example(NamedTuple):
    """A prompt pair: two prompts that want different next words."""

    x_clean: str
    x_patch: str
    a_clean: str
    a_patch: str
    case: str


KINDS = {
    "subject_verb_simple": "simple",
    "subject_verb_across_phrase": "across a prepositional phrase",
    "subject_verb_across_clause": "across a relative clause",
    "subject_verb_within_clause": "within a relative clause",
}
"""The parts of the task subject_verb, and the case of their examples."""


def generate(task: str, one_token: OneToken, n: int, seed: int) -> list[Example]:
    """Up to `n` different examples of a built-in task, always the same for a seed.

    Every word that differs between examples is one token, but for the first of an IOI prompt.

    - ioi: two people do something, one of them gives; the answer is the other. The patch exchanges
      their roles, as in the published file.
    - greater_than: the clean answer is the first later year that is one token (in 97% of the
      published file, the next year); the patch begins in the year 01, and its answer is 01.
    - subject_verb and its four kinds: the patch flips the number of the subject. Within a relative
      clause that is the clause's own subject, and the answers are forms of its verb.

    Args:
        task: "ioi", "greater_than", "subject_verb" or one of `KINDS`.
        one_token: of the tokenizer.

    Raises:
        InputError: too few of the built-in words are one token.
    """
    draw = _TASKS[task](one_token)
    random = Random(f"{task}-{seed}")
    found: dict[Example, None] = {}
    for _ in range(_TRIES * n):
        if len(found) == n:
            break
        found[draw(random)] = None
    return list(found)


_TRIES = 20  # per example: a task with few combinations ends after so many
_Draw: TypeAlias = Callable[[Random], Example]


def _ioi(one_token: OneToken) -> _Draw:
    names = _words("ioi", "names", one_token, wanted=8)
    places = _words("ioi", "places", one_token, wanted=4)
    gifts = _words("ioi", "gifts", one_token, wanted=4)

    def draw(random: Random) -> Example:
        giver, recipient = random.sample(names, 2)
        order = random.choice(("ABBA", "BABA"))
        frame = random.choice(_GIVING)
        same = {
            "opening": random.choice(_OPENINGS),
            "place": random.choice(places),
            "gift": random.choice(gifts),
        }
        a, b = (recipient, giver) if order == "ABBA" else (giver, recipient)
        clean = frame.format(a=a, b=b, giver=giver, **same)
        patch = frame.format(a=b, b=a, giver=recipient, **same)
        return Example(clean, patch, f" {recipient}", f" {giver}", order)

    return draw


def _greater_than(one_token: OneToken) -> _Draw:
    events = _words("greater_than", "events", one_token, wanted=4)
    years = _years("greater_than", one_token, wanted=64)

    def draw(random: Random) -> Example:
        event, century = random.choice(events), random.choice(list(years))
        first = random.randrange(1, len(years[century]) - 1)
        year, later = years[century][first : first + 2]
        clean, patch = (
            f"The {event} lasted from the year {century}{start} to the year {century}"
            for start in (year, "01")
        )
        return Example(clean, patch, later, "01", f"years {century}00 to {century}99")

    return draw


def _subject_verb(*kinds: str) -> Callable[[OneToken], _Draw]:
    def of_tokenizer(one_token: OneToken) -> _Draw:
        task = kinds[0] if len(kinds) == 1 else "subject_verb"
        living = _pairs(task, "living nouns", one_token, wanted=8)
        things = _pairs(task, "nouns of things", one_token, wanted=8)
        verbs = _pairs(task, "verbs", one_token, wanted=3)
        answers = _pairs(task, "auxiliary verbs", one_token, wanted=1)
        qualities = _words(task, "adjectives", one_token, wanted=4)
        prepositions = _words(task, "prepositions", one_token, wanted=2)

        def draw(random: Random) -> Example:
            case = KINDS[random.choice(kinds)]
            within = case == "within a relative clause"
            noun, other = random.sample(living, 2)
            if case == "across a prepositional phrase":
                other = random.choice(things)
            verb = random.choice(verbs)
            same = {
                "quality": random.choice(qualities),
                "preposition": random.choice(prepositions),
            }
            number, bystander = random.random() < 0.5, random.random() < 0.5  # True: plural
            answer = verb if within else random.choice(answers)
            clean, patch = (
                _AGREEMENT[case].format(
                    noun=noun[outer], other=other[inner], verb=verb[inner], **same
                )
                for outer, inner in (
                    ((bystander, number), (bystander, not number))
                    if within
                    else ((number, bystander), (not number, bystander))
                )
            )
            return Example(clean, patch, f" {answer[number]}", f" {answer[not number]}", case)

        return draw

    return of_tokenizer


_TASKS: dict[str, Callable[[OneToken], _Draw]] = {
    "ioi": _ioi,
    "greater_than": _greater_than,
    "subject_verb": _subject_verb(*KINDS),
    **{kind: _subject_verb(kind) for kind in KINDS},
}


def _words(task: str, what: str, one_token: OneToken, wanted: int) -> list[str]:
    """The built-in words that are one token."""
    known = one_token("the", [f" {word}" for word in _WORDS[what]])
    kept = [word for word, is_known in zip(_WORDS[what], known, strict=True) if is_known]
    _require(task, what, len(kept), wanted, len(known))
    return kept


def _pairs(task: str, what: str, one_token: OneToken, wanted: int) -> list[tuple[str, str]]:
    """Singular and plural form of the built-in words of which both are one token."""
    pairs = _PAIRS[what]
    singular, plural = (
        one_token("the", [f" {pair[number]}" for pair in pairs]) for number in (False, True)
    )
    kept = [pair for pair, *known in zip(pairs, singular, plural, strict=True) if all(known)]
    _require(task, f"{what} with both forms", len(kept), wanted, len(pairs))
    return kept


def _years(task: str, one_token: OneToken, wanted: int) -> dict[str, list[str]]:
    """Per century the years, from 01 on, that are the century and one token more.

    The patch begins in the year 01: a century without it is of no use.
    """
    all_digits = [f"{year:02d}" for year in range(1, 100)]
    found = {}
    for century in map(str, _CENTURIES):
        known = one_token(f"from the year {century}", all_digits)
        years = [digits for digits, is_known in zip(all_digits, known, strict=True) if is_known]
        if years[:1] == ["01"] and len(years) > 2:
            found[century] = years
    n_years = sum(map(len, found.values()))
    what = "years (of each its last two digits)"
    _require(task, what, n_years, wanted, len(_CENTURIES) * len(all_digits))
    return found


def _require(task: str, what: str, found: int, wanted: int, known: int) -> None:
    if found < wanted:
        raise InputError(
            f"circuits.tasks: {task} needs at least {wanted} {what} that are one token for the "
            f"host model's tokenizer; of the {known} built-in ones {found or 'none'} "
            f"{'is' if found == 1 else 'are'}. Give examples of your own as {task}=FILE.jsonl, or "
            "leave the task out."
        )


_OPENINGS = ("Then", "Later", "Today", "Finally", "Soon", "Afterwards")
_GIVING = (
    "{opening}, {a} and {b} went to the {place}. {giver} gave a {gift} to",
    "{opening}, {a} and {b} were at the {place}. {giver} gave a {gift} to",
    "{opening}, {a} met {b} at the {place}. {giver} handed a {gift} to",
    "{opening}, {a} and {b} came to the {place}, and {giver} gave a {gift} to",
    "When {a} and {b} went to the {place}, {giver} gave a {gift} to",
    "After {a} and {b} had been at the {place}, {giver} brought a {gift} to",
)
_AGREEMENT = {
    "simple": "The {quality} {noun}",
    "across a prepositional phrase": "The {noun} {preposition} the {other}",
    "across a relative clause": "The {noun} that the {other} {verb}",
    "within a relative clause": "The {noun} that the {other}",
}
_CENTURIES = range(11, 21)

_NAMES = """
    Aaron Adam Alan Albert Alice Amanda Amber Amy Andrea Andrew Angela Anna Anne Anthony Arthur
    Barbara Ben Benjamin Billy Bob Bobby Brandon Brian Bruce Carl Carol Caroline Catherine Charles
    Charlie Charlotte Chris Christine Claire Clara Daisy Dan Daniel David Deborah Dennis Diana
    Donald Douglas Edward Elizabeth Ella Emily Emma Eric Ethan Eva Evan Frank Fred Gary George Grace
    Greg Hannah Harry Helen Henry Howard Jack Jacob Jake James Jane Janet Jason Jeff Jennifer Jenny
    Jeremy Jessica Jill Jim Jimmy Joe John Johnny Jonathan Joseph Josh Joshua Julia Julie Karen Kate
    Katie Keith Kelly Ken Kenneth Kevin Kyle Larry Laura Lee Leo Lily Linda Lisa Louis Lucas Lucy
    Luke Margaret Maria Marie Martin Mary Matthew Max Melissa Mia Michael Michelle Mike Molly Nancy
    Nathan Nicholas Nick Nicole Noah Nora Oliver Olivia Oscar Pamela Patrick Paul Peter Philip
    Rachel Ralph Raymond Rebecca Richard Robert Roger Ron Ronald Roy Ruth Ryan Sally Sam Samuel
    Sandra Sara Sarah Scott Simon Sophie Stephen Steve Steven Sue Susan Tim Thomas Timmy Timothy
    Todd Tom Tommy Tony Victor Victoria Walter William Zoe
"""
_PLACES = """
    airport bank bakery beach cafe castle church cinema club college farm forest garden gym harbor
    hospital hotel house kitchen lake library mall market museum office park party pool pub
    restaurant river school shop stadium station store street studio temple theater theatre town
    university village zoo
"""
_GIFTS = """
    bag ball balloon banana basket basketball bell blanket bone book bottle bowl box bracelet cake
    camera candle candy card chair clock coat coin computer cookie cup dress drink drum flower fork
    gift glass hammer hat jacket kiss kite knife lamp letter map mirror necklace newspaper pen
    pencil phone photo pillow plant plate present ribbon ring rose scarf shirt snack spoon stick
    sweater ticket toy watch
"""
_EVENTS = """
    agreement alliance argument attack battle boom building campaign career change civilization
    collaboration colony competition conference conflict construction contest contract crisis
    debate deal decline depression development dispute drought dynasty education empire evolution
    exchange expansion expedition experiment fair famine feud fight festival flood friendship
    growth hearing hunt illness influence inquiry investigation investment journey kingdom
    marriage meeting migration mission monarchy movement negotiations occupation operation
    partnership peace plague plan practice process program progress project protest quest raid
    rebellion recession recovery reform regime reign relationship republic research resistance
    revolt revolution riot rule search season series service settlement siege strike struggle
    study style survey talks tour tournament trade tradition training treatment trend trial trip
    truce voyage war winter work
"""
_ADJECTIVES = """
    bad beautiful big brave bright busy famous friendly funny good great happy important kind
    little lovely new nice old poor pretty quiet sad small special strange strong tall tired young
"""
_PREPOSITIONS = "above behind below beside by near under with"

_LIVING = """
    actor artist athlete aunt author baker bear bird boy brother builder captain cat chef chief
    child coach cook cousin cow customer dancer daughter designer director doctor dog driver duck
    editor engineer expert farmer father fisherman fox friend frog gardener girl goat guard guest
    guide horse hunter judge kid king lady lawyer leader lion man manager master minister monkey
    mother neighbor nurse officer owner painter parent patient pilot pig player poet president
    prince princess prisoner professor queen rabbit rat runner sailor scientist secretary senator
    servant singer sister soldier son speaker student teacher tiger uncle visitor waiter wolf woman
    worker writer
"""
_THINGS = """
    apple bag ball bed bench bike boat book bottle box bridge building bus camera car chair clock
    computer cup curtain desk door fence flag flower garden gate hat hill house key lake lamp
    letter machine mirror mountain phone picture plane plant rock road room school shelf ship shop
    sign statue stone store table tent tower toy train tree truck tunnel umbrella wall wheel window
"""
_IRREGULAR_PLURALS = {
    "man": "men",
    "woman": "women",
    "fisherman": "fishermen",
    "child": "children",
    "wolf": "wolves",
    "shelf": "shelves",
    "lady": "ladies",
    "secretary": "secretaries",
    "princess": "princesses",
    "box": "boxes",
    "fox": "foxes",
    "bus": "buses",
    "bench": "benches",
    "coach": "coaches",
}
_VERBS = """
    admire avoid believe call fear find follow hate hear help ignore invite join know like love
    meet miss need protect remember see support teach trust visit want watch
"""
_THIRD_PERSON = {"miss": "misses", "teach": "teaches", "watch": "watches"}


def _nouns(words: str) -> list[tuple[str, str]]:
    return [(word, _IRREGULAR_PLURALS.get(word, f"{word}s")) for word in words.split()]


_WORDS = {
    "names": _NAMES.split(),
    "places": _PLACES.split(),
    "gifts": _GIFTS.split(),
    "events": _EVENTS.split(),
    "adjectives": _ADJECTIVES.split(),
    "prepositions": _PREPOSITIONS.split(),
}
_PAIRS = {
    "living nouns": _nouns(_LIVING),
    "nouns of things": _nouns(_THINGS),
    "verbs": [(_THIRD_PERSON.get(verb, f"{verb}s"), verb) for verb in _VERBS.split()],
    "auxiliary verbs": [("is", "are"), ("was", "were"), ("has", "have"), ("does", "do")],
}
