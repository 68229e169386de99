"""A server on this machine that speaks the chat completions protocol, as a test tells it to."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any

TEXT = re.compile(r"^\d+\. (\".*\")$", re.MULTILINE)
SAID = re.compile(r"^The latent is said to respond to: (\".*\")$", re.MULTILINE)


@dataclass
class Reply:
    """What is sent back; `seconds` later."""

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0


Behaviour = Callable[[Mapping[str, Any], int], "Reply | str"]


class Server:
    """Counts what it is asked.

    Attributes:
        behaviour: Of a request's JSON and how many came before: the answer's text, or a reply.
        usage: Whether answers say what they cost.
        requests, arrivals, keys: Of every request: its JSON, when it came, the key it brought.
        tokens: What all answers with a status of 200 cost, as usage says.
        most_at_a_time: Requests under way.
    """

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour, self.usage = behaviour, True
        self.requests: list[Mapping[str, Any]] = []
        self.arrivals: list[float] = []
        self.keys: list[str | None] = []
        self.tokens = self.most_at_a_time = self._under_way = 0
        self.lock = threading.Lock()
        self.url = ""

    def answer(self, request: Mapping[str, Any], key: str | None) -> Reply:
        with self.lock:
            before = len(self.requests)
            self.requests.append(request)
            self.arrivals.append(time.monotonic())
            self.keys.append(key)
            self._under_way += 1
            self.most_at_a_time = max(self.most_at_a_time, self._under_way)
        reply = self.behaviour(request, before)
        if isinstance(reply, str):
            reply = Reply(body=self._completion(request, reply))
        time.sleep(reply.seconds)
        with self.lock:
            self._under_way -= 1
        return reply

    def _completion(self, request: Mapping[str, Any], text: str) -> dict[str, Any]:
        # As many tokens as a tokenizer of single bytes and a long chat template would make.
        prompt = sum(len(message["content"].encode()) for message in request["messages"]) + 200
        written = min(len(text.encode()), request.get("max_tokens", 10**9))
        completion: dict[str, Any] = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": request["model"],
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": text},
                }
            ],
        }
        with self.lock:
            self.tokens += prompt + written
        if self.usage:
            completion["usage"] = {
                "prompt_tokens": prompt,
                "completion_tokens": written,
                "total_tokens": prompt + written,
            }
        return completion


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[Server]:
    """Run a server until the block ends."""
    server = Server(behaviour)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path != "/v1/chat/completions":
                reply = Reply(404, {"error": {"message": "no such path"}})
            else:
                reply = server.answer(json.loads(body), self.headers["Authorization"])
            raw = isinstance(reply.body, bytes)
            data = reply.body if raw else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None: ...

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *arguments: object) -> None:
            """A client that hung up is what some tests want."""

    http = Quiet(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def shown_texts(request: Mapping[str, Any]) -> list[str]:
    """The texts that a request shows."""
    return [json.loads(text) for text in TEXT.findall(request["messages"][1]["content"])]


def is_explanation(request: Mapping[str, Any]) -> bool:
    return SAID.search(request["messages"][1]["content"]) is None


def knows(request: Mapping[str, Any], before: int) -> str:
    """Explains by the word that is marked in most texts, and then judges by that word."""
    texts = shown_texts(request)
    if is_explanation(request):
        words = [word for text in texts for word in re.findall("<<(.*?)>>", text)]
        return json.dumps({"explanation": max(set(words), key=words.count).strip()})
    word = json.loads(SAID.search(request["messages"][1]["content"])[1])
    if any("<<" in text for text in texts):
        marked = [set(" ".join(re.findall("<<(.*?)>>", text)).split()) for text in texts]
        return json.dumps([int(words == {word}) for words in marked])
    return json.dumps([int(f" {word} " in f"{text} ") for text in texts])


def guesses(seed: int) -> Behaviour:
    """Explains something, and judges at random."""
    random = Random(seed)

    def answer(request: Mapping[str, Any], before: int) -> str:
        if is_explanation(request):
            return '{"explanation": "words"}'
        return json.dumps([random.randrange(2) for _ in shown_texts(request)])

    return answer


def by_turns(*replies: Reply | str, then: Behaviour = knows) -> Behaviour:
    """Some replies first, whatever is asked; then another behaviour."""

    def answer(request: Mapping[str, Any], before: int) -> Reply | str:
        return replies[before] if before < len(replies) else then(request, before)

    return answer
