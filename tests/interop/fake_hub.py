"""A hub of one's own: as much of the HTTP API as huggingface_hub asks for, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_ThisIsTheSecretOfTheTest"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def sha(self) -> str:
        return f"{self.commits:040x}"


@dataclass
class FakeHub:
    """What it holds, and which requests came: method, path, Authorization header."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    refusal: int | None = None  # a status that answers every request, and says what it got


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        self.state.requests.append((self.command, path, authorization))
        if self.state.refusal is not None:
            self._send(self.state.refusal, {"error": f"refused: '{authorization}'"})
        elif path.startswith("/blobs/"):
            self.state.blobs[path.removeprefix("/blobs/")] = body
            self._send(200, {})
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body), authorization)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(\w+)(?:/(.+))?)?", path):
            self._model(found[1], found[2], found[3], body, authorization)
        elif found := re.fullmatch(r"/([^/]+/[^/]+?)\.git/info/lfs/objects/batch", path):
            blobs = f"{self.state.address}/blobs"
            objects = [
                {**each, "actions": {"upload": {"href": f"{blobs}/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._send(200, {"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/([^/]+/[^/]+?)/resolve/([^/]+)/(.+)", path):
            self._file(found[1], found[3], authorization)
        else:
            self._send(404, {"error": "no such address"})

    def _create(self, asked: dict, authorization: str | None) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if authorization != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid username or password."})
        elif name in self.state.repositories:
            self._send(409, {"error": "exists", "url": f"{self.state.address}/{name}"})
        else:
            private = asked.get("visibility") == "private" or asked.get("private", False)
            self.state.repositories[name] = Repository(private)
            self._send(200, {"url": f"{self.state.address}/{name}", "name": name})

    def _readable(self, name: str, authorization: str | None) -> Repository | None:
        """The repository; the hub says of one that is not seen the same as of one not there."""
        found = self.state.repositories.get(name)
        known = authorization == f"Bearer {TOKEN}"
        if found is not None and (known or not found.private):
            return found
        headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
        self._send(404 if known else 401, {"error": "Repository not found"}, headers)
        return None

    def _model(
        self, name: str, action: str | None, rest: str | None, body: bytes, token: str | None
    ) -> None:
        repository = self._readable(name, token)
        if repository is None:
            return
        if action in (None, "revision"):
            if rest not in (None, "main", repository.sha):
                headers = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no revision"}
                self._send(404, {"error": "no revision"}, headers)
                return
            siblings = [{"rfilename": file} for file in repository.files]
            about = {"id": name, "modelId": name, "private": repository.private}
            self._send(200, {**about, "sha": repository.sha, "siblings": siblings})
        elif action == "tree":
            self._send(
                200,
                [
                    {"type": "file", "path": path, "size": len(data), "oid": _oid(data)}
                    for path, data in repository.files.items()
                ],
            )
        elif action == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._send(200, {"files": files})
        elif action == "commit":
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    repository.files[value["path"]] = self.state.blobs[value["oid"]]
                if line["key"] == "deletedFile":
                    del repository.files[value["path"]]
            repository.commits += 1
            url = f"{self.state.address}/{name}/commit/{repository.sha}"
            self._send(200, {"commitUrl": url, "commitOid": repository.sha, "success": True})
        else:
            self._send(404, {"error": f"no such action {action}"})

    def _file(self, name: str, path: str, token: str | None) -> None:
        repository = self._readable(name, token)
        if repository is None:
            return
        data = repository.files[path]
        headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": repository.sha}
        self._send(200, data, headers)

    def _send(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(data: bytes) -> str:
    """As git names a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
