"""The page in Chromium, driven over the W3C WebDriver protocol."""

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

from groupsae.report.artefacts import read_run
from groupsae.report.page import render
from tests.report.synthetic_run import write_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None, reason="no chromium with chromedriver on this machine"
    ),
]


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

    def open(self, page: Path) -> None:
        self._call("POST", f"{self._session}/url", {"url": page.resolve().as_uri()})

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


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with driver() as address:
        tab = Browser(address, tmp_path_factory.mktemp("profile"))
        yield tab
        tab.close()


def test_a_hostile_page_opens_from_a_file_without_a_console_message(
    browser: Browser, hostile_page: Path
) -> None:
    browser.open(hostile_page)
    assert browser.run("return document.documentElement.dataset.ready") == "true"
    assert browser.run("return document.title").endswith("– groupsae report")
    assert browser.console() == []


def test_every_figure_is_drawn(browser: Browser, hostile_page: Path) -> None:
    browser.open(hostile_page)
    widths = browser.run("return Array.from(document.images, image => image.naturalWidth)")
    assert len(widths) == 22
    assert min(widths) > 100


@pytest.mark.parametrize("width", [1240, 420])
def test_the_page_is_never_wider_than_the_window(
    browser: Browser, hostile_page: Path, width: int
) -> None:
    browser.open(hostile_page)
    browser.resize(width)
    assert browser.run(
        "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )


def test_a_click_sorts_the_table_and_another_turns_it_round(
    browser: Browser, tmp_path: Path
) -> None:
    directory = write_run(tmp_path, n_layers=5, chosen=2, steps=20)
    path = directory / "evaluation" / "reconstruction.json"
    content = json.loads(path.read_text())
    values = [0.3, -0.1, None, 0.2, 0.9]
    for row in content["rows"]:
        if row["partition"] == "groups":
            row["r2"] = values[row["layer"]]
    path.write_text(json.dumps(content))
    page = tmp_path / "report.html"
    page.write_text(render(read_run(directory), {}), encoding="utf-8")
    browser.open(page)

    def layers() -> list[str]:
        found: list[str] = browser.run(
            "return Array.from(document.querySelectorAll('#comparison tbody tr'),"
            " row => row.cells[0].textContent)"
        )
        return found

    r2 = "#comparison button[data-column='5']"
    assert layers() == ["0", "1", "2", "3", "4"]
    browser.click(r2)
    assert layers() == ["1", "3", "0", "4", "2"]  # the layer without a value comes last
    browser.click(r2)
    assert layers() == ["4", "0", "3", "1", "2"]
    order = 'return document.querySelector("' + r2 + "\").closest('th').ariaSort"
    assert browser.run(order) == "descending"
    browser.click("#comparison button[data-column='0']")
    assert layers() == ["0", "1", "2", "3", "4"]
    assert browser.console() == []


def test_every_sortable_table_sorts_by_every_column(browser: Browser, hostile_page: Path) -> None:
    """Each heading's number is that of its column: a click orders the column's values."""
    browser.open(hostile_page)
    unsorted = browser.run("""
        const wrong = [];
        for (const details of document.querySelectorAll("details")) details.open = true;
        for (const table of document.querySelectorAll("table.sortable")) {
          const heads = table.tHead.rows[table.tHead.rows.length - 1].cells;
          for (const button of table.querySelectorAll("th button")) {
            const column = Number(button.dataset.column);
            if (heads[column] !== button.closest("th")) wrong.push(button.textContent);
            button.click();
            const cells = Array.from(table.tBodies[0].rows, (row) => row.cells[column]);
            const given = cells.map((cell) => cell.dataset.value).filter((value) => value !== "");
            const values = given.map(Number);
            const down = button.closest("th").ariaSort === "descending";
            for (let i = 1; i < values.length; i++) {
              const step = values[i] - values[i - 1];
              const right = down ? step <= 0 : step >= 0;
              if (!right) wrong.push(button.textContent);
            }
          }
        }
        return wrong;
    """)
    assert unsorted == []
    assert browser.console() == []
