from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp
from sklearn.metrics import balanced_accuracy_score

from groupsae.config import ExplanationConfig
from groupsae.errors import InputError
from groupsae.interpretation.cards import Shown
from groupsae.interpretation.explanation import explain
from groupsae.interpretation.explanation.scores import Explained, balanced_accuracy, mean_rows
from groupsae.interpretation.latent_cache import LatentCache
from tests.interpretation.explanation.cases import (
    TEXTS,
    activations,
    made_cache,
    random_tokens,
)
from tests.interpretation.explanation.conftest import WORDS
from tests.interpretation.explanation.server import (
    Reply,
    Server,
    guesses,
    is_explanation,
    knows,
    serving,
    shown_texts,
)


def config(server: Server, **changes) -> ExplanationConfig:
    given = {"endpoint": server.url, "model": "small", "timeout": 5, "retries": 2, **changes}
    return ExplanationConfig(**given)


def scores(folder: Path, cache, shown, given: ExplanationConfig) -> dict:
    result = explain(folder, cache, shown, TEXTS, given, of="key")
    assert json.loads((folder / "scores.json").read_text()) == result
    return result


def test_a_model_that_knows_scores_near_one(tmp_path: Path, words_cache: LatentCache, shown):
    with serving(knows) as server:
        result = scores(tmp_path, words_cache, shown, config(server))
        host = server.url.removeprefix("http://").removesuffix("/v1")
    assert (result["of"], result["model"], result["endpoint"]) == ("key", "small", host)
    assert result["complete"]
    assert [(row["partition"], row["layer"], row["group"]) for row in result["rows"]] == [
        ("groups", 2, [2, 3]),
        ("groups", 3, [2, 3]),
        ("groups", None, None),
        ("baseline", 2, [2]),
        ("baseline", 3, [3]),
        ("baseline", None, None),
    ]
    for row in result["rows"]:
        assert row["latents"] == (len(WORDS) if row["layer"] is not None else 2 * len(WORDS))
        assert row["detection"] == row["detection_low"] == row["detection_high"] == 1
        assert row["fuzzing"] == 1
    assert len(result["latents"]) == 4 * len(WORDS)
    for row in result["latents"]:
        assert row["explanation"] == TEXTS[WORDS[row["latent"]]].strip()
        assert row["unparsed"] == 0
    # One explanation, 2 x 20 examples of each test in fives: for each latent, SAE and layer once.
    assert result["counts"]["requests"] == len(server.requests) == 16 * (1 + 8 + 8)
    assert (
        result["counts"]["prompt_tokens"] + result["counts"]["completion_tokens"] == server.tokens
    )


def test_a_model_that_guesses_scores_near_a_half(tmp_path: Path, words_cache: LatentCache, shown):
    with serving(guesses(seed=0)) as server:
        result = scores(tmp_path, words_cache, shown, config(server))
    for row in result["rows"]:
        if row["layer"] is None:  # 8 latents of 40 examples: a standard error of 0.028
            for name in ("detection", "fuzzing"):
                assert row[name] == pytest.approx(0.5, abs=0.11)
                assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]


def test_the_model_is_told_nothing_but_the_text(tmp_path: Path, words_cache: LatentCache, shown):
    """No name of an SAE, and nothing that tells which answer is right."""
    with serving(knows) as server:
        scores(tmp_path, words_cache, shown, config(server, concurrency=1))
    sent = json.dumps(server.requests)
    assert "layers-" not in sent
    assert "baseline" not in sent
    judged = [shown_texts(own) for own in server.requests if not is_explanation(own)]
    detection = [texts for texts in judged if not any("<<" in text for text in texts)]
    fuzzing = [texts for texts in judged if any("<<" in text for text in texts)]
    assert len(detection) == len(fuzzing) == 16 * 8
    assert all("<<" in text for texts in fuzzing for text in texts)
    explained = {
        text.replace("<<", "").replace(">>", "")
        for own in server.requests
        if is_explanation(own)
        for text in shown_texts(own)
    }
    assert not explained & {text for texts in detection for text in texts}


def test_a_second_run_asks_nothing(tmp_path: Path, words_cache: LatentCache, shown):
    with serving(knows) as server:
        first = scores(tmp_path, words_cache, shown, config(server))
        asked = len(server.requests)
        again = scores(tmp_path, words_cache, shown, config(server))
        assert len(server.requests) == asked
        assert again["counts"] == {**first["counts"], "from_before": asked}
        assert (again["rows"], again["latents"]) == (first["rows"], first["latents"])
        more = scores(tmp_path, words_cache, shown, config(server, examples=10))
        # Other examples; the explanations are the same.
        assert more["counts"]["from_before"] == 16
        assert len(server.requests) == asked + 16 * (4 + 4)


def test_a_budget_stops_the_work_and_a_larger_one_continues(
    tmp_path: Path, words_cache: LatentCache, shown, caplog: pytest.LogCaptureFixture
):
    with serving(knows) as server:
        part = scores(tmp_path, words_cache, shown, config(server, budget_tokens=200_000))
        assert server.tokens <= 200_000
        assert not part["complete"]
        assert 0 < part["rows"][0]["latents"] < len(WORDS)
        asked = len(server.requests)
        assert part["counts"]["requests"] == asked
        whole_ones = sum(own["fuzzing"] is not None for own in part["latents"])
        said = f"budget_tokens=200000 is used up: {whole_ones} of 16 latents"
        assert said in caplog.text
        assert "give a larger one" in caplog.text
        # What is scored is whole, as in a run that is not stopped.
        whole = scores(tmp_path / "whole", words_cache, shown, config(server))
        assert all(own in whole["latents"] for own in part["latents"] if own["fuzzing"] is not None)
        before = len(server.requests)
        rest = scores(tmp_path, words_cache, shown, config(server))
        assert rest["complete"]
        assert (rest["rows"], rest["latents"]) == (whole["rows"], whole["latents"])
        assert len(server.requests) - before == rest["counts"]["requests"] - asked


def test_a_budget_that_is_used_up_loses_nothing_that_was_scored(
    tmp_path: Path, words_cache: LatentCache, shown
):
    """Also what stands behind the first latent that lacks an answer."""

    def refuses_the_first(request, before):
        if before == 0:
            return Reply(400, {"error": {"message": "filtered"}})
        return knows(request, before)

    with serving(refuses_the_first) as server:
        given = config(server, budget_tokens=200_000, concurrency=1)
        part = scores(tmp_path, words_cache, shown, given)
        asked = len(server.requests)
        again = scores(tmp_path, words_cache, shown, given)
        assert len(server.requests) == asked
    assert sum(own["fuzzing"] is not None for own in part["latents"]) > 2
    assert (again["rows"], again["latents"]) == (part["rows"], part["latents"])


def test_answers_that_do_not_parse_are_counted_and_left_out(
    tmp_path: Path, words_cache: LatentCache, shown
):
    nonsense = iter(range(10**6))

    def babbles(request, before):
        if not is_explanation(request) and next(nonsense) % 4 == 0:
            return "I think that the first two are right."
        return knows(request, before)

    with serving(babbles) as server:
        result = scores(tmp_path, words_cache, shown, config(server))
    assert result["complete"]
    assert result["counts"]["unparsed"] == 16 * 16 / 4
    assert sum(own["unparsed"] for own in result["latents"]) == 64
    assert all(row["detection"] == row["fuzzing"] == 1 for row in result["rows"])


def test_nonsense_alone_has_no_score(tmp_path: Path, words_cache: LatentCache, shown):
    with serving(lambda *_: "lorem ipsum") as server:
        result = scores(tmp_path, words_cache, shown, config(server))
    assert result["counts"]["unparsed"] == result["counts"]["requests"] == 16
    assert [row["latents"] for row in result["rows"]] == [0] * 6
    assert all(row["fuzzing"] is None and row["fuzzing_low"] is None for row in result["rows"])
    assert all(own["explanation"] is None and own["unparsed"] == 1 for own in result["latents"])


def test_a_failed_request_leaves_its_score_open(tmp_path: Path, words_cache: LatentCache, shown):
    def refuses_one(request, before):
        if before == 1:
            return Reply(400, {"error": {"message": "filtered"}})
        return knows(request, before)

    with serving(refuses_one) as server:
        given = config(server, concurrency=1)
        part = scores(tmp_path, words_cache, shown, given)
        assert (part["complete"], part["counts"]["failed"]) == (False, 1)
        assert sum(own["detection"] is None for own in part["latents"]) == 1
        assert sum(own["fuzzing"] is None for own in part["latents"]) == 0
        asked = len(server.requests)
        rest = scores(tmp_path, words_cache, shown, given)
        assert len(server.requests) == asked + 1
        assert (rest["complete"], rest["counts"]["failed"]) == (True, 0)


def test_an_endpoint_in_trouble_is_asked_again(tmp_path: Path, words_cache: LatentCache, shown):
    def troubled(request, before):
        trouble = {3: Reply(500), 5: Reply(429, headers={"Retry-After": "0.05"}), 8: Reply(502)}
        return trouble.get(before) or knows(request, before)

    with serving(troubled) as server:
        result = scores(tmp_path, words_cache, shown, config(server))
    assert result["complete"]
    assert result["counts"]["retries"] == 3
    assert len(server.requests) == result["counts"]["requests"] + 3
    assert result["rows"][0]["detection"] == 1


def test_an_endpoint_that_goes_away_ends_the_work(tmp_path: Path, words_cache, shown):
    with serving(lambda *own: knows(*own) if own[1] < 30 else Reply(500)) as server:
        given = config(server, retries=1)
        with pytest.raises(InputError, match="requests in a row"):
            explain(tmp_path, words_cache, shown, TEXTS, given, of="key")
        asked = len(server.requests)
        assert asked < 100
        server.behaviour = knows
        result = explain(tmp_path, words_cache, shown, TEXTS, given, of="key")
        assert result["counts"]["from_before"] == 30
        assert len(server.requests) == asked + result["counts"]["requests"] - 30


def test_only_so_many_latents_are_explained(tmp_path: Path, words_cache: LatentCache, shown):
    with serving(knows) as server:
        result = scores(tmp_path, words_cache, shown, config(server, latents=3))
    assert [row["latents"] for row in result["rows"]] == [3, 3, 6, 3, 3, 6]


def test_a_group_of_one_layer_is_asked_about_once(tmp_path: Path, words_cache: LatentCache):
    both = [
        Shown("groups", 1, {2: "baseline/layers-02"}),
        Shown("baseline", 1, {2: "baseline/layers-02"}),
    ]
    with serving(knows) as server:
        result = scores(tmp_path, words_cache, both, config(server))
        assert len(server.requests) == len(WORDS) * 17
    assert [row["latents"] for row in result["rows"]] == [len(WORDS)] * 4


def test_it_works_where_an_event_loop_runs(tmp_path: Path, words_cache: LatentCache, shown):
    """As in a notebook."""

    async def cell() -> dict:
        return scores(tmp_path, words_cache, shown, config(server, latents=1))

    with serving(knows) as server:
        assert asyncio.run(cell())["complete"]


def test_latents_that_fire_too_rarely_are_said(tmp_path: Path):
    tokens = random_tokens(contexts=10)
    cache = made_cache(tmp_path / "cache", tokens, {("a", 0): activations(tokens, {0: 7})})
    given = ExplanationConfig(endpoint="http://127.0.0.1:1/v1", model="small")
    with pytest.raises(InputError, match=r"at least 10 windows.*640 tokens.*interpretation\.tok"):
        explain(tmp_path, cache, [Shown("groups", 1, {0: "a"})], TEXTS, given, of="key")


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_balanced_accuracy_is_sklearns(judged):
    truth, said = zip(*judged, strict=True)
    if len(set(truth)) == 2:
        assert balanced_accuracy(judged) == pytest.approx(balanced_accuracy_score(truth, said))
    else:
        assert balanced_accuracy(judged) is None


def test_intervals_are_those_of_student(tmp_path: Path):
    values = np.random.default_rng(0).uniform(0.4, 0.9, 17)
    explained = [
        Explained("a", 0, i, "words", float(own), None, unparsed=0, complete=True)
        for i, own in enumerate(values)
    ]
    row, _ = mean_rows([Shown("groups", 1, {0: "a"})], explained)
    interval = ttest_1samp(values, 0).confidence_interval(0.95)
    assert row["detection"] == pytest.approx(values.mean())
    assert (row["detection_low"], row["detection_high"]) == pytest.approx(tuple(interval))
    assert row["fuzzing"] is None
    row, _ = mean_rows([Shown("groups", 1, {0: "a"})], explained[:1])
    assert (row["detection"], row["detection_low"]) == (values[0], None)
