"""The page of a sheet in Chromium: latents are marked with keys alone."""

from __future__ import annotations

import json
import time
from random import Random

import pytest

from groupsae.interpretation.annotation.items import ShownItem
from groupsae.interpretation.annotation.page import page
from groupsae.interpretation.contexts import Context

pytestmark = pytest.mark.browser

HOSTILE = [
    "<script>document.title='owned'</script>",
    '"></script><img src=x onerror=alert(1)>',
    "</script><!--<script>",
    "\u202e\u2066rtl \u05d0\u05d1",
    "\x00\x1b[31m\n\t\u2028",
    "x" * 10_000,
    "{{ 7 * 7 }} &lt;b&gt;",
    "\ud800",
]
TEXTS = [*HOSTILE, *(f" word{i}" for i in range(40))]
RIGHT, ESCAPE = "\ue014", "\ue00c"


def made_items(n):
    random = Random(0)
    for i in range(n):
        contexts = []
        for place in range(3):
            ids = tuple(random.randrange(len(TEXTS)) for _ in range(12))
            if i == 0:
                ids = (*range(len(HOSTILE)), *ids[len(HOSTILE) :])
            strengths = tuple(0.0 if k % 3 else (3.0 - place) / (k + 1) for k in range(12))
            contexts.append(Context(0, 99, max(strengths), 0, ids, strengths))
        yield ShownItem(f"{i:012x}", tuple(contexts), tuple(range(10)), tuple(range(20, 30)))


@pytest.fixture
def sheet(browser, tmp_path, request):
    """A page of four items, opened; of a name of its own, so that no other's marks are kept."""
    path = tmp_path / "annotate.html"
    path.write_text(page(f"{request.node.name}", made_items(4), TEXTS), encoding="utf-8")
    browser.resize(1100)
    browser.open(path)
    assert browser.run("return document.documentElement.dataset.ready") == "true"
    yield path
    assert browser.console() == []


def text(browser, selector):
    return browser.run(f"return document.querySelector({selector!r}).textContent")


def exported(browser):
    return json.loads(browser.run("return JSON.stringify(exported())"))


def marks(browser):
    return {int(i, 16): entry["mark"] for i, entry in exported(browser)["marks"].items()}


def load_file(browser, content, name="theirs.json"):
    """Choose a file, as if its reader did."""
    browser.run(
        f"const files = new DataTransfer(); const input = document.getElementById('file');"
        f"files.items.add(new File([{json.dumps(content)}], {name!r}));"
        "input.files = files.files; input.dispatchEvent(new Event('change'));"
    )
    return waited_for(lambda: text(browser, "#message"), lambda message: name in message)


def waited_for(look, is_there):
    """What `look` finds once it is there: files and blobs are read in their own time."""
    for _ in range(200):
        if is_there(found := look()):
            return found
        time.sleep(0.02)
    pytest.fail(f"still {found!r}")


def test_latents_are_marked_by_keys_alone(browser, sheet):
    assert text(browser, "h2") == "Latent 1 of 4"
    assert browser.run("return document.getElementById('help').open")
    browser.press("1n")
    assert marks(browser) == {0: "interpretable", 1: "not"}
    assert text(browser, "h2") == "Latent 3 of 4"
    assert not browser.run("return document.getElementById('help').open")
    assert text(browser, "#counts") == "2 of 4 marked: 1 interpretable, 1 not, 0 unsure"
    browser.press(RIGHT + "3")
    assert marks(browser) == {0: "interpretable", 1: "not", 3: "unsure"}
    browser.press("g")
    assert text(browser, "h2") == "Latent 3 of 4"
    browser.press("yg")
    assert text(browser, "#message") == "All are marked: export them now"
    assert browser.run("return document.getElementById('progress').value") == 4
    browser.press("0")
    assert marks(browser) == {0: "interpretable", 1: "not", 2: "interpretable"}


def test_notes_are_written_without_marking(browser, sheet):
    browser.press("e")
    browser.press("2 nouns u" + ESCAPE + "u")
    assert exported(browser)["marks"] == {"000000000000": {"mark": "unsure", "note": "2 nouns u"}}
    assert browser.run("return document.getElementById('note').value") == ""
    browser.press("\ue012")
    assert browser.run("return document.getElementById('note').value") == "2 nouns u"
    assert text(browser, '[aria-pressed="true"]') == "Unsure 3"


def test_buttons_mark_and_take_a_mark_back(browser, sheet):
    browser.click('[data-mark="not"]')
    browser.click("#previous")
    assert marks(browser) == {0: "not"}
    browser.click('[data-mark="not"]')
    assert marks(browser) == {}


def reopen(browser, sheet, until):
    """Chromium takes a moment to tell the next page what the one before has stored."""
    for _ in range(20):
        browser.open(sheet)
        if until():
            return
        time.sleep(0.1)


def test_progress_is_kept_when_the_page_is_opened_again(browser, sheet):
    browser.type("#annotator", "Ada")
    browser.press(ESCAPE + "1e")
    browser.press("why")
    before = exported(browser)
    assert before["marks"].keys() == {"000000000000", "000000000001"}
    reopen(browser, sheet, lambda: exported(browser) == before)
    assert exported(browser) == before
    assert text(browser, "h2") == "Latent 2 of 4"
    assert browser.run("return document.getElementById('annotator').value") == "Ada"
    assert browser.run("return document.getElementById('note').value") == "why"


def test_another_sheet_begins_anew(browser, sheet, tmp_path):
    browser.press("1")
    other = tmp_path / "other.html"
    other.write_text(page("other sheet", made_items(4), TEXTS), encoding="utf-8")
    browser.open(other)
    assert exported(browser)["marks"] == {}


def test_the_exported_file_is_what_scores_read(browser, sheet):
    browser.run(
        "window.saved = []; HTMLAnchorElement.prototype.click = function () {"
        " window.saved.push(this.download); };"
        "const make = URL.createObjectURL;"
        "URL.createObjectURL = (blob) => { blob.text().then((t) => window.saved.push(t));"
        " return make(blob); };"
    )
    browser.press("1")
    browser.click("#export")
    assert browser.run("return window.saved") == []
    assert text(browser, "#message").startswith("Write your name first")
    browser.press("Ada/../<L>")
    browser.click("#export")
    name, content = waited_for(lambda: browser.run("return window.saved"), lambda s: len(s) == 2)
    assert name.endswith("-Ada-L-.json")
    assert "/" not in name
    assert json.loads(content) == exported(browser)
    assert set(json.loads(content)) == {"format", "sheet", "annotator", "marks"}
    assert json.loads(content)["annotator"] == "Ada/../<L>"
    assert text(browser, "#message").startswith("Exported 1 mark as")


def test_an_export_is_imported_again_and_other_marks_stay(browser, sheet):
    browser.type("#annotator", "Ada")
    browser.press(ESCAPE + "11")
    file = exported(browser)
    browser.run("window.confirm = () => true")
    browser.click("#clear")
    assert exported(browser)["marks"] == {}
    browser.press(RIGHT + "2n")
    assert marks(browser) == {1: "not", 2: "not"}
    assert load_file(browser, json.dumps(file)) == "Imported 2 marks from theirs.json"
    assert marks(browser) == {0: "interpretable", 1: "interpretable", 2: "not"}
    assert exported(browser)["annotator"] == "Ada"
    kept = {0: "interpretable", 1: "interpretable", 2: "not"}
    reopen(browser, sheet, lambda: marks(browser) == kept)
    assert marks(browser) == kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, "it is not JSON"),
        ({"format": 2}, "it was not exported from such a page"),
        ({"sheet": "x"}, "it is of the sheet x; this page is"),
        ({"annotator": "Bob"}, "it has marks of Bob, this page those of Ada"),
        ({"marks": {"__proto__": {"mark": "not"}}}, "it marks __proto__, which is not on this"),
        ({"marks": {"000000000000": {"mark": "yes"}}}, "000000000000 is marked yes"),
    ],
)
def test_a_bad_file_changes_nothing(browser, sheet, changes, message):
    browser.type("#annotator", "Ada")
    browser.press(ESCAPE + "1")
    before = exported(browser)
    content = "{" if changes is None else json.dumps(before | changes)
    said = load_file(browser, content)
    assert said.startswith(f"theirs.json was not imported: {message}")
    assert exported(browser) == before


def test_hostile_tokens_are_text(browser, sheet):
    assert browser.run("return document.title") == "Annotation – groupsae"
    assert browser.run("return document.scripts.length") == 2
    assert browser.run("return document.images.length") == 0
    for token in HOSTILE[:3]:
        assert token in text(browser, "#contexts li")
        assert token in text(browser, "#largest")
    assert "⟨U+202E⟩" in text(browser, "#contexts li")
    assert "↵" in text(browser, "#contexts li")
    assert len(text(browser, "#contexts li")) < 1000


def test_tokens_are_as_dark_as_they_are_active(browser, sheet):
    strengths = browser.run(
        "return Array.from(document.querySelectorAll('#contexts li:first-child .token'),"
        " (token) => token.style.getPropertyValue('--strength') + ' ' + token.dataset.value)"
    )
    assert strengths[0] == "1.000 100%"
    assert strengths[3] == "0.250 25%"
    assert strengths[1] == " undefined"


@pytest.mark.parametrize("width", [1100, 420])
def test_the_page_is_never_wider_than_the_window(browser, sheet, width):
    browser.resize(width)
    assert browser.run(
        "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
