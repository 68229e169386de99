"""Pages in Chromium, driven over the W3C WebDriver protocol."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


class Browser:
    """One tab of a headless Chromium."""

    def __init__(self, address: str, profile: Path) -> None:
        self._address = address
        arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--window-size=1240,1000",
            f"--user-data-dir={profile}",
        ]
        capabilities = {
            "browserName": "chrome",
            "goog:chromeOptions": {"binary": CHROMIUM, "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        started = self._call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._session = f"/session/{started['sessionId']}"

    def open(self, page: Path, fragment: str = "") -> None:
        self._call("POST", f"{self._session}/url", {"url": page.resolve().as_uri() + fragment})

    def resize(self, width: int) -> None:
        self._call("POST", f"{self._session}/window/rect", {"width": width, "height": 900})

    def run(self, script: str) -> Any:
        body = {"script": script, "args": []}
        return self._call("POST", f"{self._session}/execute/sync", body)

    def click(self, selector: str) -> None:
        body = {"using": "css selector", "value": selector}
        element = self._call("POST", f"{self._session}/element", body)
        (key,) = element.values()
        self._call("POST", f"{self._session}/element/{key}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Type into a field; `\\ue007` is Enter, as WebDriver has it."""
        body = {"using": "css selector", "value": selector}
        element = self._call("POST", f"{self._session}/element", body)
        (key,) = element.values()
        self._call("POST", f"{self._session}/element/{key}/value", {"text": text})

    def press(self, keys: str) -> None:
        """Press keys one after another, wherever the focus is."""
        presses = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        keyboard = {"type": "key", "id": "keyboard", "actions": presses}
        self._call("POST", f"{self._session}/actions", {"actions": [keyboard]})

    def console(self) -> list[str]:
        entries = self._call("POST", f"{self._session}/se/log", {"type": "browser"})
        return [f"{entry['level']}: {entry['message']}" for entry in entries]

    def close(self) -> None:
        self._call("DELETE", self._session)

    def _call(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._address + path, data=data, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as response:
            return json.load(response)["value"]


@contextmanager
def driver() -> Iterator[str]:
    """The address of a chromedriver that runs while the block does."""
    assert DRIVER is not None
    process = subprocess.Popen(
        [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                yield f"http://127.0.0.1:{found[1]}"
                break
        else:
            pytest.fail("chromedriver ended without naming a port")
    finally:
        process.terminate()
        process.wait(timeout=20)
        if process.stdout is not None:
            process.stdout.close()
