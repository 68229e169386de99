"""The bundled English says the truth about itself, and the bundled model knows it."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsae.errors import InputError
from groupsae.host import bundled
from groupsae.host.bundled import words
from groupsae.host.bundled.tasks import accuracies

TASKS = ("ioi", "greater_than", "subject_verb")
PARTS_OF_SPEECH = (
    *("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "NOUN"),
    *("NUM", "PART", "PRON", "PROPN", "PUNCT", "SCONJ", "VERB"),
)
HELD_OUT_SEED = 1_000_000
_PERIOD = r"[Tt]he (\w+)(?: of \w+)? (?:lasted from|went on from|began in) the year (\d+)"

any_document = given(index=st.integers(0, 100_000), seed=st.integers(0, 1000))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(bundled.MODEL)


@pytest.fixture(scope="module")
def model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(bundled.MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def log() -> dict[str, Any]:
    return json.loads((bundled.MODEL / "training_log.json").read_text())


# --- the English ---------------------------------------------------------------------------------


def test_a_document_depends_on_its_index_and_seed_alone() -> None:
    forwards = list(bundled.documents(0, 50, seed=3))
    assert [bundled.document(index, seed=3) for index in reversed(range(50))] == forwards[::-1]
    assert list(bundled.documents(20, 50, seed=3)) == forwards[20:]
    assert len({document.text for document in bundled.documents(0, 200, seed=3)}) > 195
    assert not {d.text for d in forwards} & {d.text for d in bundled.documents(0, 50, seed=4)}


def test_texts_are_the_texts_of_documents() -> None:
    assert list(bundled.texts(5, 40, seed=1)) == [d.text for d in bundled.documents(5, 40, seed=1)]


def test_the_text_is_still_the_one_that_the_model_was_trained_on(log: dict[str, Any]) -> None:
    text = "\n".join(bundled.texts(0, 1000, seed=0))
    assert hashlib.sha256(text.encode()).hexdigest() == log["text_sha256"]


@any_document
def test_spans_cover_every_word_once_and_in_order(index: int, seed: int) -> None:
    document = bundled.document(index, seed)
    covered = 0
    for span in document.spans:
        assert covered <= span.start < span.end
        assert document.text[covered : span.start] in ("", " ")
        covered = span.end
    assert covered == len(document.text)


@any_document
def test_attributes_agree_with_the_text(index: int, seed: int) -> None:
    document = bundled.document(index, seed)
    for span in document.spans:
        text, has = document.text[span.start : span.end], span.attributes
        word = text.lower()
        assert has["pos"] in PARTS_OF_SPEECH
        assert (has["pos"] == "PUNCT") == (not text.isalnum())
        assert has.get("number") in (None, "singular", "plural")
        if has["pos"] == "PROPN":
            assert has["entity"] == text
            assert text in (words.NAMES if has["kind"] == "person" else words.COUNTRIES)
        if has["pos"] == "NOUN" and "lemma" in has:
            plural = has["number"] == "plural"
            assert word == (words.plural(str(has["lemma"])) if plural else has["lemma"])
        if has["pos"] == "VERB" and has.get("tense") == "present" and "lemma" in has:
            base = str(has["lemma"])
            assert word == (base if has["number"] == "plural" else words.VERBS[base][0])
        if has["pos"] == "ADJ" and "colour" in has:
            assert has["colour"] == word
        if "count" in has:
            assert words.COUNTS[word] == has["count"]
        if "century" in has:
            assert (int(text), int(text)) == (has["century"], int(has["year"]) // 100)
        if "year_of_century" in has:
            assert text == f"{has['year_of_century']:02d}" == str(has["year"])[2:]
        if word in ("he", "him", "his"):
            assert has["gender"] == "male"
        if word in ("she", "her"):
            assert has["gender"] == "female"
        assert (word in ("he", "him", "his", "she", "her", "it")) <= (
            "entity" in has or word == "it"
        )


@any_document
def test_sentences_begin_large_and_end_with_a_full_stop(index: int, seed: int) -> None:
    document = bundled.document(index, seed)
    assert document.text.endswith(".")
    for sentence in document.text.split(". "):
        assert sentence[0].isupper()
    assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", document.text)


def test_verbs_agree_with_the_nearest_true_subject() -> None:
    """A plural auxiliary never follows "The <singular noun>" directly, nor the other way."""
    for document in bundled.documents(0, 500, seed=9):
        for first, second in zip(document.spans, document.spans[1:], strict=False):
            here, there = first.attributes, second.attributes
            begins = document.text[: first.start].rsplit(". ", 1)[-1] in ("The ", "")
            if here["pos"] == "NOUN" and there["pos"] == "AUX" and begins and "number" in there:
                assert here["number"] == there["number"], document.text


def test_the_three_tasks_occur_and_are_answered_rightly() -> None:
    text = list(bundled.texts(0, 1500, seed=5))
    name = r"([A-Z]\w+)"
    gave = "(?:" + "|".join(words.GIVING) + ")"
    gift = re.compile(
        rf"{name} and {name} \w+ (?:to|at) the \w+(?:\.|, and) "
        rf"{name} {gave} an? [\w ]+ to {name}\."
    )
    gifts = [match.groups() for document in text for match in gift.finditer(document)]
    assert len(gifts) > 50
    assert all({giver, recipient} == {a, b} for a, b, giver, recipient in gifts)
    shares = [giver == a for a, _, giver, _ in gifts]
    assert 0.3 < sum(shares) / len(shares) < 0.7  # both orders of the names

    periods = [
        match.groups()
        for document in text
        for match in re.finditer(r"from the year (\d\d)(\d\d) to the year (\d\d)(\d\d)", document)
    ]
    assert len(periods) > 250
    assert all(c == d and first < last for c, first, d, last in periods)
    assert len({century for century, *_ in periods}) == 9

    far = [d for d in text if re.search(r"The (\w+ )?\w+ that the \w+ \w+ (is|are|has|have) ", d)]
    assert len(far) > 50


def test_held_out_combinations_never_occur() -> None:
    for document in bundled.documents(0, 1000, seed=6):
        people = {
            str(span.attributes["entity"])
            for span in document.spans
            if span.attributes["pos"] == "PROPN" and span.attributes["kind"] == "person"
        }
        if "year" not in document.text:  # chronicles name people one by one
            assert not any(words.held_out_names(a, b) for a, b in combinations(people, 2))
        for event, first in re.findall(_PERIOD, document.text):
            assert not words.held_out("period", event, int(first))


def test_tokens_take_the_attributes_of_the_word_they_cover(tokenizer: Any) -> None:
    document = next(d for d in bundled.documents(0, 100) if "from the year" in d.text)
    encoded = tokenizer(document.text, return_offsets_mapping=True)
    found = bundled.token_attributes(document, encoded["offset_mapping"])
    assert len(found) == len(encoded["input_ids"]) == len(document.spans)  # a word is a token
    assert found == [dict(span.attributes) for span in document.spans]
    with_spaces = [
        (start - document.text[:start].endswith(" "), end)
        for start, end in encoded["offset_mapping"]
    ]
    assert bundled.token_attributes(document, with_spaces) == found
    assert bundled.token_attributes(document, [(0, 0)]) == [{}]


# --- the prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_pairs_of_equal_length_with_answers_of_one_token(
    task: str, tokenizer: Any
) -> None:
    examples = bundled.prompts(task, 200, seed=2)
    assert examples == bundled.prompts(task, 200, seed=2)
    assert examples != bundled.prompts(task, 200, seed=3)
    for example in examples:
        clean, patch = (tokenizer(example[x])["input_ids"] for x in ("x_clean", "x_patch"))
        assert len(clean) == len(patch)
        assert clean != patch
        for answer in ("a_clean", "a_patch"):
            (token,) = tokenizer(example[answer])["input_ids"]
            joined = tokenizer(example["x_clean"] + example[answer])["input_ids"]
            assert joined == [*clean, token]
        assert example["a_clean"] != example["a_patch"]


def test_prompts_never_occur_in_the_text() -> None:
    text = "\n".join(bundled.texts(0, 1500))
    for task in TASKS:
        for example in bundled.prompts(task, 100):
            assert example["x_clean"] + example["a_clean"] not in text


def test_an_unknown_task_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"'ioo' is unknown.*ioi"):
        bundled.prompts("ioo", 1)


# --- the model -----------------------------------------------------------------------------------


def test_the_model_is_small() -> None:
    size = sum(path.stat().st_size for path in bundled.MODEL.rglob("*") if path.is_file())
    assert size <= 12 * 2**20
    assert not [path for path in bundled.MODEL.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    if "<|endoftext|>" not in text:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_knows_every_word_and_splits_years(tokenizer: Any) -> None:
    assert len(tokenizer) <= 4096
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == tokenizer.eos_token_id == 0
    ids = tokenizer("The war lasted from the year 1732 to the year 1745.")["input_ids"]
    assert [tokenizer.decode([i]) for i in ids][6:8] == [" 17", "32"]


@pytest.mark.parametrize(
    ("task", "least"), [("ioi", 0.95), ("subject_verb", 0.95), ("greater_than", 0.90)]
)
def test_the_model_solves_the_tasks_on_held_out_prompts(
    task: str, least: float, model: Any, tokenizer: Any, log: dict[str, Any]
) -> None:
    found = accuracies(model, tokenizer, bundled.prompts(task, 400, seed=11))
    assert found["all"] > least
    assert found["all"] == pytest.approx(log["after_rounding"][task]["all"], abs=0.03)


def test_the_model_compares_years_and_does_not_only_know_which_are_common(
    model: Any, tokenizer: Any, log: dict[str, Any]
) -> None:
    found = accuracies(model, tokenizer, bundled.prompts("greater_than", 400, seed=11))
    blind = log["after_rounding"]["blind_to_the_first_year"]["later minus earlier"]
    assert found["later minus earlier"] > 0.8 > 2 * blind
    assert found["next over same"] > 0.7


def test_the_loss_on_held_out_text_is_the_model_cards(
    model: Any, tokenizer: Any, log: dict[str, Any]
) -> None:
    import torch

    stream: list[int] = []
    for text in bundled.texts(10_000, 10_250, seed=HELD_OUT_SEED):
        stream += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor(stream[: 40 * 256]).view(40, 256)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    expected = log["after_rounding"]["held_out_loss"]
    assert loss == pytest.approx(expected, abs=0.03)
    assert f"{expected:.4f}" in (bundled.MODEL / "README.md").read_text()


def test_the_loss_had_flattened(log: dict[str, Any]) -> None:
    curve = log["curve"]
    late = curve[int(0.9 * len(curve)) :]
    assert max(p["held_out_loss"] for p in late) - late[-1]["held_out_loss"] < 0.01
    assert curve[-1]["held_out_loss"] == pytest.approx(curve[-1]["train_loss"], abs=0.03)


def test_the_import_is_light() -> None:
    code = "import sys, groupsae.host.bundled; print(*{'torch', 'transformers'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == []
