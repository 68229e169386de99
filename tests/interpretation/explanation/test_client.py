from __future__ import annotations

import asyncio
import json
import socket
import time
from email.utils import formatdate
from pathlib import Path

import pytest

from groupsae.config import ExplanationConfig
from groupsae.errors import InputError
from groupsae.interpretation.explanation.answers import Answers
from groupsae.interpretation.explanation.client import FAILURES_IN_A_ROW, Client
from tests.interpretation.explanation.server import Reply, Server, by_turns, serving

KEY = "sk-very-secret-0123456789"


def config(server: Server, **changes) -> ExplanationConfig:
    given = {"endpoint": server.url, "model": "small", "timeout": 2, "retries": 3, **changes}
    return ExplanationConfig(**given)


def asked(asked: ExplanationConfig, folder: Path, prompts=("one",)) -> tuple[Client, list]:
    """Ask several things at once."""
    client = Client(asked, Answers(folder / "answers.jsonl"))

    async def all_of_them() -> list:
        async with client:
            return await asyncio.gather(*(client.ask(messages(own)) for own in prompts))

    return client, asyncio.run(all_of_them())


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Answer."}, {"role": "user", "content": text}]


def hello(request, before):
    return "hello"


def test_an_answer_is_kept_and_asked_for_once(tmp_path: Path):
    with serving(hello) as server:
        for _ in range(2):
            client, said = asked(config(server), tmp_path)
            assert said == ["hello"]
        (request,) = server.requests
    assert request["messages"] == messages("one")
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("small", 0, 500)
    assert client.counts() == {
        "requests": 1,
        "from_before": 1,
        "retries": 0,
        "failed": 0,
        "prompt_tokens": 210,
        "completion_tokens": 5,
        "estimated_tokens": 0,
    }


@pytest.mark.parametrize(
    "change", [{"model": "other"}, {"temperature": 0.5}, {"answer_tokens": 501}]
)
def test_other_settings_are_asked_anew(tmp_path: Path, change):
    with serving(hello) as server:
        asked(config(server), tmp_path)
        client, _ = asked(config(server, **change), tmp_path)
        assert len(server.requests) == 2
    assert client.counts()["from_before"] == 0


def test_passing_failures_are_repeated_and_counted(tmp_path: Path):
    failing = (Reply(500), Reply(429, headers={"Retry-After": "0.3"}), Reply(503))
    with serving(by_turns(*failing, then=hello)) as server:
        client, said = asked(config(server), tmp_path)
    assert said == ["hello"]
    assert client.counts()["retries"] == 3
    assert client.counts()["estimated_tokens"] == 0  # errors cost nothing
    assert server.arrivals[2] - server.arrivals[1] >= 0.3
    again, _ = asked(config(server), tmp_path)
    assert again.counts()["retries"] == 3  # the answer says how often it was asked for


def test_a_date_to_come_back_at_is_honoured(tmp_path: Path):
    later = formatdate(time.time() + 2, usegmt=True)  # whole seconds: one to two from now
    busy = Reply(429, headers={"Retry-After": later})
    with serving(by_turns(busy, then=hello)) as server:
        asked(config(server), tmp_path)
    assert server.arrivals[1] - server.arrivals[0] >= 0.9


def test_an_endpoint_that_wants_an_hour_is_given_up(tmp_path: Path):
    busy = Reply(429, {"error": {"message": "quota"}}, headers={"Retry-After": "3600"})
    with serving(lambda *_: busy) as server, pytest.raises(InputError, match=r"quota.*wait, or"):
        asked(config(server), tmp_path)
    assert len(server.requests) == 1


def test_a_stall_is_cut_off_repeated_and_paid_for(tmp_path: Path):
    stall = Reply(body={}, seconds=0.6)
    with serving(by_turns(stall, then=hello)) as server:
        client, said = asked(config(server, timeout=0.3), tmp_path)
    assert said == ["hello"]
    counts = client.counts()
    assert counts["retries"] == 1
    assert counts["estimated_tokens"] == client.most_tokens(messages("one"))


def test_an_answer_that_drips_in_is_cut_off_too(tmp_path: Path):
    """Each byte comes within the time of a read; the whole does not."""
    listening = socket.create_server(("127.0.0.1", 0))

    async def drip(reader, writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b" ")
            await asyncio.sleep(0.05)

    async def ask() -> None:
        async with await asyncio.start_server(drip, sock=listening):
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
            given = ExplanationConfig(endpoint=url, model="small", timeout=0.2, retries=0)
            async with Client(given, Answers(tmp_path / "answers.jsonl")) as client:
                await client.ask(messages("one"))

    with pytest.raises(InputError, match=r"explanation\.timeout=0\.2 s"):
        asyncio.run(asyncio.wait_for(ask(), 10))  # the whole would take 50


def test_without_usage_the_cost_is_estimated_from_above(tmp_path: Path):
    with serving(hello) as server:
        server.usage = False
        client, _ = asked(config(server), tmp_path)
        counts = client.counts()
        assert counts["prompt_tokens"] == counts["completion_tokens"] == 0
        assert server.tokens <= counts["estimated_tokens"] < server.tokens + 100


@pytest.mark.parametrize("concurrency", [1, 8])
def test_an_endpoint_that_is_down_is_one_message(tmp_path: Path, concurrency):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    given = ExplanationConfig(
        endpoint=f"http://me:{KEY}@127.0.0.1:{port}/v1",
        model="small",
        retries=2,
        concurrency=concurrency,
    )
    with pytest.raises(InputError) as failure:
        asked(given, tmp_path, [str(i) for i in range(30)])
    assert f"http://127.0.0.1:{port}/v1 (explanation.endpoint) gives no answer" in str(failure)
    assert KEY not in str(failure)
    if concurrency == 1:  # else others may be cut off while they connect, which costs an estimate
        assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(401, {"error": {"message": f"bad key {KEY}\x1b[2J"}}), r"refuses the key.*MY_KEY"),
        (Reply(403, {"error": {"message": "no"}}), r"refuses the key"),
        (Reply(404, {"error": {"message": "?"}}), r"has no model 'small' \(explanation\.model\)"),
        (Reply(200, b"<html>"), r"no chat completion"),
        (Reply(200, {"hello": 1}), r"no chat completion"),
        (Reply(200, {"choices": []}), r"no chat completion"),
        (Reply(200, ["hello"]), r"no chat completion"),
        (Reply(500), r"gives no answer"),
    ],
)
def test_what_others_would_meet_too_ends_the_work(tmp_path: Path, monkeypatch, reply, message):
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(lambda *_: reply) as server, pytest.raises(InputError, match=message) as failure:
        asked(config(server, retries=1, api_key_variable="MY_KEY"), tmp_path)
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert len(server.requests) == (2 if reply.status == 500 else 1)
    assert KEY not in str(failure)
    assert str(failure.value).isprintable()
    written = [path.read_text() for path in tmp_path.iterdir()]
    assert KEY not in "".join(written)


def test_many_failures_in_a_row_end_the_work(tmp_path: Path):
    with serving(by_turns("hello", then=lambda *_: Reply(500))) as server:
        given = config(server, retries=0, concurrency=1)
        with pytest.raises(InputError, match=f"no answer to {FAILURES_IN_A_ROW} requests in a row"):
            asked(given, tmp_path, [str(i) for i in range(30)])
        assert len(server.requests) == 1 + FAILURES_IN_A_ROW
        server.behaviour = hello
        _, said = asked(given, tmp_path, [str(i) for i in range(30)])
        assert len(server.requests) == 1 + FAILURES_IN_A_ROW + 29
    assert said == ["hello"] * 30


def test_a_request_that_is_refused_for_its_text_fails_alone(tmp_path: Path):
    def refuses(request, before):
        if "bad" in request["messages"][1]["content"]:
            return Reply(400, {"error": {"message": "filtered"}})
        return "hello"

    with serving(refuses) as server:
        client, said = asked(config(server, concurrency=1), tmp_path, ["bad", "good"])
    assert said == [None, "hello"]
    assert (client.counts()["failed"], client.counts()["retries"]) == (1, 0)


def test_models_that_know_another_name_of_the_limit(tmp_path: Path):
    def modern(request, before):
        if "max_tokens" in request:
            text = "Unsupported parameter: use 'max_completion_tokens' instead."
            return Reply(400, {"error": {"message": text, "param": "max_tokens"}})
        return str(request["max_completion_tokens"])

    with serving(modern) as server:
        _, said = asked(config(server, concurrency=1), tmp_path, ["one", "two"])
        assert len(server.requests) == 3
    assert said == ["500", "500"]


@pytest.mark.parametrize("usage", [True, False])
@pytest.mark.parametrize("budget", [800, 1500, 3000, 5000])
def test_the_budget_is_never_exceeded(tmp_path: Path, budget, usage):
    """A larger budget goes on from there, and is not exceeded either."""
    prompts = [f"prompt number {i} " * (i % 7 + 1) for i in range(40)]
    with serving(lambda request, before: "x" * (before * 97 % 500)) as server:
        server.usage = usage
        client, said = asked(config(server, budget_tokens=budget), tmp_path, prompts)
        assert client.exhausted
        assert 0 < server.tokens <= client._answers.tokens <= budget
        before = len(server.requests)
        assert sum(own is not None for own in said) == before
        client, said = asked(config(server, budget_tokens=10**6), tmp_path, prompts)
        assert not client.exhausted
        assert None not in said
        assert len(server.requests) == 40
        assert client.counts()["from_before"] == before


def test_stalls_are_within_the_budget(tmp_path: Path):
    """What was cut off may have been paid for."""
    most = 7 + 3 + 256 + 100
    with serving(lambda *_: Reply(body={}, seconds=0.4)) as server:
        given = config(
            server, timeout=0.1, retries=10, budget_tokens=3 * most + 10, answer_tokens=100
        )
        client, said = asked(given, tmp_path)
        assert (said, client.exhausted) == ([None], True)
        assert len(server.requests) == 3
        client, _ = asked(given, tmp_path)  # another run does not forget them
        assert client.exhausted
        assert len(server.requests) == 3


def test_a_budget_for_nothing_is_said(tmp_path: Path):
    with serving(hello) as server, pytest.raises(InputError, match=r"budget_tokens=700.*766.*rai"):
        asked(config(server, budget_tokens=700), tmp_path)
    assert not server.requests


def test_requests_are_concurrent_as_far_as_is_allowed(tmp_path: Path):
    with serving(lambda *_: Reply(200, {"choices": [{"message": {}}]}, seconds=0.1)) as server:
        asked(config(server, concurrency=4), tmp_path, [str(i) for i in range(12)])
    assert server.most_at_a_time == 4


def test_requests_keep_to_the_rate(tmp_path: Path):
    """Repetitions too: no two come closer together than the rate says."""
    with serving(by_turns(Reply(500), Reply(500), then=hello)) as server:
        given = config(server, requests_per_minute=600)
        asked(given, tmp_path, ["1", "2", "3", "4"])
    assert len(server.arrivals) == 6
    gaps = [
        later - sooner for sooner, later in zip(server.arrivals, server.arrivals[1:], strict=False)
    ]
    assert min(gaps) > 0.05  # 0.1 s when they are sent; the network is not so exact
    assert server.arrivals[-1] - server.arrivals[0] > 0.45


def test_a_torn_last_line_is_passed_over(tmp_path: Path):
    path = tmp_path / "answers.jsonl"
    with serving(hello) as server:
        given = config(server, concurrency=1)
        asked(given, tmp_path, ["1", "2", "3"])
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        client, said = asked(given, tmp_path, ["1", "2", "3", "4"])
        assert client.counts()["from_before"] == 2
        assert len(server.requests) == 3 + 2
        client, said = asked(given, tmp_path, ["1", "2", "3", "4"])
        assert client.counts()["from_before"] == 4
    assert said == ["hello"] * 4


def test_any_text_survives_the_file(tmp_path: Path):
    text = "a\u2028b\x85c\n\x00\ud800 \U0001f600"
    with serving(lambda *_: text) as server:
        server._completion = lambda request, text: {"choices": [{"message": {"content": text}}]}
        _, first = asked(config(server), tmp_path)
        _, again = asked(config(server), tmp_path)
        assert len(server.requests) == 1
    assert first == again == [text.replace("\ud800", "?")]


def test_an_interruption_keeps_what_was_answered_and_counts_what_was_asked(tmp_path: Path):
    def slow_from_the_third(request, before):
        return "hello" if before < 2 else Reply(body={}, seconds=0.5)

    with serving(slow_from_the_third) as server:
        client = Client(config(server, concurrency=1), Answers(tmp_path / "answers.jsonl"))

        async def interrupted() -> None:
            async with client:
                await asyncio.gather(*(client.ask(messages(own)) for own in "1234"))

        async def stop() -> None:
            await asyncio.wait_for(interrupted(), 0.4)

        with pytest.raises(TimeoutError):
            asyncio.run(stop())
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["hello", "hello", None]
    assert lines[-1]["estimated_tokens"] == client.most_tokens(messages("3"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"endpoint": None}, r"explanation\.endpoint is not given"),
        ({"model": None}, r"explanation\.model is not given"),
        ({"endpoint": "localhost:8000/v1"}, r"'localhost:8000/v1' is no address"),
        ({"endpoint": "ftp://localhost/v1"}, r"is no address"),
        ({"endpoint": "http://"}, r"is no address"),
        ({"endpoint": "http://host:port/v1"}, r"is no address"),
    ],
)
def test_what_cannot_be_asked_is_said_beforehand(tmp_path: Path, changes, message):
    given = {"endpoint": "http://127.0.0.1:1/v1", "model": "small", **changes}
    with pytest.raises(InputError, match=message):
        Client(ExplanationConfig(**given), Answers(tmp_path / "answers.jsonl"))


@pytest.mark.parametrize("package", ["openai", "aiolimiter", "tenacity"])
def test_without_the_packages_it_says_what_to_install(tmp_path: Path, monkeypatch, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    given = ExplanationConfig(endpoint="http://127.0.0.1:1/v1", model="small")
    with pytest.raises(InputError, match=rf"{package}.*pip install 'groupsae\[llm\]'"):
        Client(given, Answers(tmp_path / "answers.jsonl"))
