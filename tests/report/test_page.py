from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from groupsae.errors import InputError
from groupsae.report import write_report
from groupsae.report.artefacts import read_run
from groupsae.report.contents import host_name
from groupsae.report.illustrations import illustrations
from groupsae.report.metrics import METRICS
from groupsae.report.page import render
from tests.report.conftest import HOSTILE
from tests.report.synthetic_run import write_run

FIGURES = {
    "amad_and_cost",
    "dendrogram",
    "distance_heatmap",
    "latent_density",
    "per_layer",
    "training_curves",
}
FURTHER = {
    "by_number_of_groups",
    "mean_curves",
    "mean_other_curves",
    *(
        f"task_{task}_{what}"
        for task in ("ioi", "task_1")
        for what in ("curves", "circuit", "circuit_baseline", "other_curves")
    ),
    "similarity_per_layer",
    "similarity_maxima",
    "similarity_matrices",
    "similarity_mmcs_of_every_g",
    "similarity_concordance_of_every_g",
    "depth_heat_maps",
    "depth_heat_maps_of_1",
    "ground_truth_per_layer",
    "ground_truth_by_groups",
    "interpretability_scores",
}


class Page(HTMLParser):
    """Every element's attributes, all text, and the rows of each table."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str | None, list[list[str]]] = {}
        self.text = ""
        self._table: list[list[str]] | None = None
        self._in_cell = False
        self.feed(self.source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag == "table":
            self._table = self.tables.setdefault(dict(attributes).get("id"), [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th") and self._table:
            self._table[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell and self._table:
            self._table[-1][-1] += data.strip()

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(hostile_page: Path) -> Page:
    """The whole page, with figures."""
    return Page(hostile_page.read_text(encoding="utf-8"))


def words(directory: Path) -> Page:
    """The page of a run without its figures, which take long to draw."""
    return Page(render(read_run(directory), {}))


@pytest.fixture(scope="module")
def finished(finished_run: Path) -> Page:
    return words(finished_run)


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# The files.


def test_every_figure_is_written_in_every_format(hostile_page: Path) -> None:
    written = {path.name for path in (hostile_page.parent / "figures").iterdir()}
    names = FIGURES | FURTHER
    assert written == {f"{name}.{form}" for name in names for form in ("pdf", "png")}
    assert not list(hostile_page.parent.glob("*.partial"))


def test_svg_files_can_be_asked_for(tmp_path: Path) -> None:
    directory = write_run(tmp_path, n_layers=2, chosen=1, baseline=False, steps=20)
    for name in ("metrics.jsonl", "evaluation/reconstruction.json", "distances.json"):
        (directory / name).unlink()
    write_report(directory, formats=("svg",))
    assert [path.name for path in (directory / "figures").iterdir()] == ["amad_and_cost.svg"]


def test_an_unknown_format_is_refused_before_any_work(finished_run: Path) -> None:
    with pytest.raises(InputError, match=r"report\.formats: 'gif' is unknown; .*pdf, png, svg"):
        write_report(finished_run, formats=("gif",))
    assert not (finished_run / "report.html").exists()


def test_a_disk_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("host: {name: x}\n")
    (tmp_path / "figures").write_text("a file where the folder should be")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(tmp_path)


def test_importing_the_report_imports_no_matplotlib() -> None:
    code = "import sys, groupsae.report; print('matplotlib' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# Self-contained.


def test_the_page_loads_nothing(page: Page) -> None:
    assert "http://" not in page.source.replace("http-equiv", "")
    assert "https://" not in page.source
    assert not page.all("link")
    assert not page.all("iframe")
    assert all(image["src"].startswith("data:image/svg+xml;base64,") for image in page.all("img"))
    assert all("src" not in script for script in page.all("script"))
    assert "url(" not in page.source
    assert "@import" not in page.source


def test_the_security_policy_allows_our_script_alone(page: Page) -> None:
    policy = next(
        meta["content"]
        for meta in page.all("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    (script,) = re.findall(r"<script>(.*?)</script>", page.source, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy


def test_the_figures_are_drawings_without_scripts_or_links(page: Page) -> None:
    for image in page.all("img"):
        svg = base64.b64decode(image["src"].partition(",")[2]).decode()
        assert "<script" not in svg
        references = re.findall(r'(?:href|src)="([^"]*)"', svg)
        assert all(re.match(r"#|data:image/png", reference) for reference in references)


def test_the_page_is_small(page: Page) -> None:
    assert len(page.source) < 3_000_000


# Accessible.


def test_images_have_words_and_headings_descend_in_steps(page: Page) -> None:
    assert len(page.all("img")) == len(FIGURES | FURTHER)
    assert all(len(image["alt"]) > 30 for image in page.all("img"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert page.all("html")[0]["lang"] == "en"


def test_ids_are_unique_and_links_lead_somewhere(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    inner = [link["href"][1:] for link in page.all("a") if link["href"].startswith("#")]
    assert inner
    assert set(inner) <= set(ids)


# What it says.


def test_the_table_holds_every_layer_and_the_means(tmp_path: Path) -> None:
    directory = write_run(tmp_path, n_layers=3, chosen=2, steps=20)
    rows = json.loads((directory / "evaluation" / "reconstruction.json").read_text())["rows"]
    table = words(directory).tables["comparison"]
    r2 = {(row["partition"], row["layer"]): row["r2"] for row in rows}
    body, mean = table[2:-1], table[-1]
    assert [cells[0] for cells in body] == ["0", "1", "2"]
    for layer, cells in enumerate(body):
        ours, theirs = r2["groups", layer], r2["baseline", layer]
        difference = METRICS["r2"].format(ours - theirs, signed=True)
        assert cells[5:8] == [f"{ours:.4f}", f"{theirs:.4f}", difference]
    assert mean[0] == "Mean"
    assert mean[4] == f"{sum(r2['groups', layer] for layer in range(3)) / 3:.4f}"


def test_missing_values_show_as_dashes(tmp_path: Path) -> None:
    directory = write_run(tmp_path, n_layers=3, chosen=2, steps=20)
    path = directory / "evaluation" / "reconstruction.json"
    rows = json.loads(path.read_text())["rows"]
    rows[0] |= {"r2": None, "l2": math.nan, "ce_loss_score": math.inf}
    rewrite(path, rows=rows)
    page = words(directory)
    cells = page.tables["comparison"][2 + rows[0]["layer"]]
    assert cells[2] == cells[5] == cells[8] == "–"  # the group's
    assert cells[4] == cells[7] == cells[10] == "–"  # the differences
    assert cells[3] != "–"
    assert "nan" not in page.text.lower().replace("provenance", "")
    assert "Means over the" in page.text or "Means and differences" in page.text


def test_the_summary_quotes_the_artefacts(finished: Page, finished_run: Path) -> None:
    entry = json.loads((finished_run / "partition.json").read_text())["by_groups"]
    assert "Layers 0–10 of bundled were put into 6 groups" in finished.text
    assert f"; AMAD {entry['6']['amad']:.3f})" in finished.text
    assert "Each SAE was trained on 983,040 tokens." in finished.text
    saved = 1 - entry["6"]["flops_per_token"] / entry["11"]["flops_per_token"]
    assert f"predicts {saved:.0%} fewer FLOPs than one SAE per layer" in finished.text


def test_the_predicted_losses_are_said_to_be_predictions(
    finished: Page, finished_run: Path
) -> None:
    entry = json.loads((finished_run / "partition.json").read_text())["by_groups"]["6"]
    for metric, label in (
        ("ce_loss_score", "CE-loss score"),
        ("explained_variance", "Explained variance"),
    ):
        loss = entry[f"predicted_{metric}_loss"]
        words = finished.text.split(f"Predicted loss, {label}", 1)[1][:120]
        assert f"{loss['mean']:.4f}" in words
        assert f"{loss['low']:.4f} to {loss['high']:.4f}; predicted from other models" in words


def test_what_was_equal_and_what_was_excluded_is_said(finished: Page) -> None:
    assert "What was equal: training tokens per SAE (983,040), the same for all." in finished.text
    assert "Measured on 99,840 held-out tokens." in finished.text
    cells = [cells for table in finished.tables.values() for cells in table]
    assert ["distances", "special tokens", "160"] in cells
    assert ["train", "special tokens", "2,040"] in cells
    assert ["train", "long tokens", "0"] in cells


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("tokens: {exclude_special: true}", "Special tokens (BOS, EOS) are kept out"),
        ("tokens: {exclude_special: false}", "Special tokens are treated as any others."),
        ("training: {max_norm_multiple: 10}", "than 10 times the layer's mean norm are kept out"),
        ("training: {max_norm_multiple: null}", "No token is dropped for the length"),
    ],
)
def test_what_is_to_be_excluded_is_said(tmp_path: Path, settings: str, said: str) -> None:
    (tmp_path / "config.yaml").write_text(f"{settings}\n")
    assert said in words(tmp_path).text


def test_every_figure_has_a_definition(page: Page) -> None:
    for term in ("Angular distance", "Height of a join", "AMAD(G)", "FVU", "R²", "Latent density"):
        assert term in page.text
    assert "mean KL divergence from the clean" in page.text  # the evaluation's own words


def test_a_caption_escapes_what_it_quotes(tmp_path: Path) -> None:
    directory = write_run(tmp_path, n_layers=2, chosen=1, steps=20)
    rewrite(directory / "partition.json", method="<b>bold</b>")
    (illustration,) = (
        found for found in illustrations(read_run(directory)) if found.name == "amad_and_cost"
    )
    figure = {
        "number": 1,
        "title": "t",
        "alt": "a",
        "caption": illustration.caption,
        "definitions": (),
        "width": 1,
        "height": 1,
        "svg": "",
        "files": [],
    }
    page = Page(render(read_run(directory), {"amad_and_cost": figure}))
    assert "<b>bold</b>" in page.text
    assert not page.all("b")


def test_a_run_without_a_baseline_says_nothing_of_one(tmp_path: Path) -> None:
    directory = write_run(tmp_path, n_layers=3, chosen=2, steps=20, baseline=False)
    page = words(directory)
    assert "no baseline" in page.text
    assert "one SAE per layer reaches" not in page.text
    assert all(cells[3] == "–" for cells in page.tables["comparison"][2:])


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("EleutherAI/pythia-160m", "EleutherAI/pythia-160m"),
        ("/home/someone/models/mine", "mine"),
        ("../models/mine/", "mine"),
        ("~/mine", "mine"),
        ("/", "/"),
    ],
)
def test_of_a_local_path_the_last_part_names_the_model(
    tmp_path: Path, name: str, shown: str
) -> None:
    (tmp_path / "config.yaml").write_text(f"host: {{name: {name}}}\n")
    assert host_name(read_run(tmp_path)) == shown


def test_dead_latents_that_cannot_be_yet_are_explained(finished_run: Path) -> None:
    captions = {found.name: found for found in illustrations(read_run(finished_run))}
    definitions = dict(captions["training_curves"].definitions)
    assert "last 10,000,000 tokens" in definitions["Dead latents"]
    assert "none counts as dead yet" in definitions["Dead latents"]


def test_groups_that_were_given_are_said_to_be(tmp_path: Path) -> None:
    directory = write_run(tmp_path, n_layers=4, chosen=2, steps=20)
    path = directory / "partition.json"
    entry = {"groups": [[0, 1, 2], [3]], "amad": None, "flops_per_token": None}
    rewrite(path, method="explicit", threshold=None, by_groups={"2": entry})
    page = words(directory)
    assert "the groups were given" in page.text
    assert "Predicted saving" not in page.text
    assert all(found.name != "amad_and_cost" for found in illustrations(read_run(directory)))


@pytest.mark.parametrize(
    ("similarity", "threshold", "noted"),
    [("cka", 0.2, True), ("angular", 0.2, False), ("cka", None, False), ("<b>", 0.2, False)],
)
def test_a_threshold_on_other_distances_than_angles_is_noted(
    tmp_path: Path, similarity: str, threshold: float | None, noted: bool
) -> None:
    directory = write_run(tmp_path, n_layers=4, chosen=2, steps=20)
    rewrite(directory / "distances.json", similarity=similarity)
    rewrite(directory / "partition.json", threshold=threshold)
    assert ("on AMAD was chosen for angular distances" in words(directory).text) == noted


@pytest.mark.parametrize(
    ("similarity", "name", "defined"),
    [
        ("angular", "Angular distance", "arccos(cosine"),
        ("cka", "1 − linear CKA", "unbiased HSIC"),
        ("svcca", "1 − SVCCA", "mean canonical correlation"),
    ],
)
def test_the_distances_are_defined_as_what_they_are(
    tmp_path: Path, similarity: str, name: str, defined: str
) -> None:
    directory = write_run(tmp_path, n_layers=4, chosen=2, steps=20)
    rewrite(directory / "distances.json", similarity=similarity)
    heatmap, tree, *_ = illustrations(read_run(directory))
    assert heatmap.title == f"{name} between layers"
    ((term, definition),) = heatmap.definitions
    assert term == name
    assert defined in definition
    assert name.lower() in tree.definitions[0][1].lower()


def test_a_single_layer_can_be_reported(tmp_path: Path) -> None:
    directory = write_run(tmp_path, n_layers=1, chosen=1, steps=20)
    page = Page(write_report(directory, formats=()).read_text(encoding="utf-8"))
    assert "put into 1 group (" in page.text
    assert "Linkage of the layers" not in page.text
    assert len(page.all("img")) == len(FIGURES) - 1


@pytest.mark.parametrize(
    ("artefact", "command"),
    [
        ("distances.json", "groupsae distances"),
        ("partition.json", "groupsae groups"),
        ("metrics.jsonl", "groupsae train"),
        ("evaluation/reconstruction.json", "groupsae evaluate"),
        ("evaluation/circuits/ioi.json", "groupsae circuits RUN"),
        ("evaluation/similarity.json", "groupsae similarity RUN"),
        ("interpretation/depth.json", "groupsae interpret RUN"),
        ("interpretation/annotation/scores.json", "groupsae annotate RUN"),
        ("interpretation/explanation/scores.json", "groupsae explain RUN"),
    ],
)
def test_a_missing_artefact_leaves_a_hint(tmp_path: Path, artefact: str, command: str) -> None:
    directory = write_run(
        tmp_path,
        n_layers=3,
        chosen=2,
        steps=20,
        tasks=("ioi",),
        similarity=True,
        interpretation=True,
    )
    assert f"Not run yet: {command} " not in words(directory).text
    (directory / artefact).unlink()
    page = words(directory)
    assert f"Not run yet: {command} " in page.text


def test_a_run_that_has_only_begun_can_be_reported(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("host: {name: beginner}\n")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "No stage of this run has finished yet." in page.text
    assert page.text.count("Not run yet") == 8
    assert not page.all("img")


def test_figures_are_numbered_in_the_order_of_the_page(page: Page) -> None:
    numbers = [int(number) for number in re.findall(r"Figure (\d+)\. ", page.text)]
    assert numbers == list(range(1, len(FIGURES | FURTHER) + 1))


def test_of_several_partitions_the_chosen_one_stands_in_the_tables(tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain", n_layers=4, chosen=2, steps=20)
    several = write_run(tmp_path / "several", n_layers=4, chosen=2, steps=20, also_groups=(1, 3))
    assert words(several).tables["comparison"] == words(plain).tables["comparison"]
    names = {found.name for found in illustrations(read_run(several))}
    assert names - {found.name for found in illustrations(read_run(plain))} == {
        "by_number_of_groups"
    }


def test_twins_are_counted_apart(tmp_path: Path) -> None:
    directory = write_run(tmp_path, n_layers=3, chosen=2, steps=20)
    path = directory / "metrics.jsonl"
    twins = path.read_text().replace("baseline/", "twin/").splitlines()
    path.write_text(path.read_text() + "".join(f"{line}\n" for line in twins if "twin/" in line))
    assert "2 group and 3 baseline and 3 twin SAEs trained" in words(directory).text


# Nothing of a run is trusted.


def test_markup_in_names_and_values_is_escaped(page: Page) -> None:
    assert len(page.all("script")) == 1
    assert HOSTILE not in page.source
    assert page.text.count("document.title='pwned'") >= 3  # heading, summary and config, as text


def test_markup_anywhere_in_the_artefacts_is_escaped(tmp_path: Path) -> None:
    directory = write_run(tmp_path, n_layers=3, chosen=2, steps=20)
    attack = "<img src=x onerror=alert(1)>"
    rewrite(directory / "training.json", **{f"excluded_{attack}": 3})
    rewrite(directory / "stages.json", **{attack: {"seconds": 1.0}})
    rewrite(
        directory / "evaluation" / "reconstruction.json",
        equal=attack,
        definitions={"r2": attack},
    )
    cfg = next((directory / "saes").glob("*/cfg.json"))
    rewrite(cfg, architecture=attack, k=attack)
    config = directory / "config.yaml"
    config.write_text(config.read_text() + f"  '{attack}': '{attack}'\n")
    page = words(directory)
    assert page.text.count(attack) >= 8
    assert not page.all("img")
