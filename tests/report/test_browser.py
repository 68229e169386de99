"""The report in Chromium."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from groupsae.report.artefacts import read_run
from groupsae.report.page import render
from tests.report.synthetic_run import write_run
from tests.webdriver import Browser

pytestmark = pytest.mark.browser


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
    assert len(widths) == 27
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


def test_the_latents_pages_and_cards_are_one_click_away(
    browser: Browser, hostile_page: Path
) -> None:
    browser.open(hostile_page)
    browser.click("a.button")
    assert browser.run("return location.href").endswith("/interpretation/browser/index.html")
    browser.open(hostile_page)
    browser.run("for (const details of document.querySelectorAll('details')) details.open = true")
    latent = browser.run("return document.querySelector('#circuit-latents td a').textContent")
    browser.click("#circuit-latents td a")
    assert browser.run("return location.hash").endswith(f"/{latent}")
    assert browser.console() == []
