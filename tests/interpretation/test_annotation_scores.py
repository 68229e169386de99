from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

from groupsae.errors import InputError
from groupsae.interpretation.annotation.key import KEY_FILE, Key, KeyItem, Subject
from groupsae.interpretation.annotation.marks import MARKS, Annotation, Entry
from groupsae.interpretation.annotation.scoring import agreement, score, score_files

YES, NO, UNSURE = MARKS

# A group of layers 0 and 1, and a group of layer 2, which is its own baseline.
PLACES = [
    *[("layers-00-01", layer, latent) for layer in (0, 1) for latent in range(4)],
    *[(f"baseline/layers-0{layer}", layer, latent) for layer in (0, 1) for latent in range(4)],
    *[("layers-02", 2, latent) for latent in range(4)],
]
KEY = Key(
    of="run",
    sheet="sheet",
    seed=0,
    subjects=(
        Subject(
            partition="groups",
            groups_total=2,
            saes={0: "layers-00-01", 1: "layers-00-01", 2: "layers-02"},
        ),
        Subject(
            partition="baseline",
            groups_total=3,
            saes={0: "baseline/layers-00", 1: "baseline/layers-01", 2: "layers-02"},
        ),
    ),
    items={
        f"i{n}": KeyItem(sae=sae, layer=layer, latent=latent)
        for n, (sae, layer, latent) in enumerate(PLACES)
    },
)


def annotation(name, marks, notes=()):
    """`marks` of the items in order; None leaves one out."""
    entries = {f"i{n}": Entry(mark=mark) for n, mark in enumerate(marks) if mark}
    entries |= {
        item: Entry(mark=entries[item].mark if item in entries else None, note=note)
        for item, note in dict(notes).items()
    }
    return Annotation(format=1, sheet="sheet", annotator=name, marks=entries)


@pytest.fixture
def scored(tmp_path):
    """Scores of annotations, through their files."""
    (tmp_path / KEY_FILE).write_text(KEY.model_dump_json())

    def call(*annotations):
        files = [tmp_path / f"{n}.json" for n in range(len(annotations))]
        for file, each in zip(files, annotations, strict=True):
            file.write_text(each if isinstance(each, str) else each.model_dump_json())
        return score_files(tmp_path, files)

    return call


def rows_of(scores):
    return {(row["partition"], row["layer"]): row for row in scores["rows"]}


def test_one_annotators_score_is_the_share_of_interpretable_with_wilsons_interval(scored, tmp_path):
    marks = [YES, YES, NO, UNSURE] + [YES, None, None, NO] + [NO] * 8 + [YES] * 4
    scores = scored(annotation("Ada", marks, {"i0": " a verb "}))
    assert scores == json.loads((tmp_path / "scores.json").read_text())
    assert (scores["of"], scores["sheet"]) == ("run", "sheet")
    assert scores["annotators"] == [{"name": "Ada", "marked": 18}]
    assert scores["agreement"] == {"name": None, "value": None, "items": 0}
    rows = rows_of(scores)
    assert list(rows) == [(p, layer) for p in ("groups", "baseline") for layer in (0, 1, 2, None)]
    hits = {0: (2, 4), 1: (1, 2), 2: (4, 4), None: (7, 10)}
    for layer, (count, n) in hits.items():
        row = rows["groups", layer]
        assert (row["latents"], row["interpretable"]) == (n, count)
        assert row["score"] == pytest.approx(count / n)
        low, high = binomtest(count, n).proportion_ci(0.95, method="wilson")
        assert (row["low"], row["high"]) == pytest.approx((low, high))
    assert (rows["groups", 0]["not"], rows["groups", 0]["unsure"]) == (1, 1)
    assert (rows["groups", 0]["group"], rows["groups", 0]["sae"]) == ([0, 1], "layers-00-01")
    assert (rows["groups", None]["group"], rows["groups", None]["sae"]) == (None, None)
    assert rows["baseline", 2] == rows["groups", 2] | {"partition": "baseline", "groups_total": 3}
    assert (rows["baseline", 0]["score"], rows["baseline", 0]["low"]) == (0, pytest.approx(0))
    assert scores["latents"][8:11] == [
        {"sae": "layers-00-01", "layer": 0, "latent": 0, "score": 1, "notes": ["a verb"]},
        {"sae": "layers-00-01", "layer": 0, "latent": 1, "score": 1, "notes": []},
        {"sae": "layers-00-01", "layer": 0, "latent": 2, "score": 0, "notes": []},
    ]


def test_what_nobody_marked_has_no_score(scored):
    scores = scored(annotation("Ada", [YES], {"i5": "noted alone"}))
    row = rows_of(scores)["groups", 1]
    assert (row["latents"], row["score"], row["low"], row["high"]) == (0, None, None, None)
    assert scores["annotators"] == [{"name": "Ada", "marked": 1}]
    assert scores["latents"][1:] == [
        {"sae": "layers-00-01", "layer": 1, "latent": 1, "score": None, "notes": ["noted alone"]}
    ]


def test_marks_of_several_annotators_count_as_one_trial_a_latent(scored):
    marks = ([YES, YES, NO, NO], [YES, NO, NO, UNSURE], [YES, YES, YES, None])
    row = rows_of(scored(*(annotation(f"A{n}", each) for n, each in enumerate(marks))))["groups", 0]
    share = (1 + 2 / 3 + 1 / 3 + 0) / 4
    assert row["score"] == pytest.approx(share)
    assert (row["latents"], row["interpretable"], row["not"], row["unsure"]) == (4, 6, 4, 1)
    z = 1.959963984540054
    middle = (share + z**2 / 8) / (1 + z**2 / 4)
    half = z * math.sqrt(share * (1 - share) / 4 + z**2 / 64) / (1 + z**2 / 4)
    assert (row["low"], row["high"]) == pytest.approx((middle - half, middle + half))


three = st.sampled_from(MARKS)


@given(st.lists(st.tuples(three, three), min_size=1, max_size=20))
def test_the_agreement_of_two_is_cohens_kappa(pairs):
    columns = zip(*pairs, strict=True)
    found = agreement([annotation(n, marks) for n, marks in zip("AB", columns, strict=True)])
    assert (found["name"], found["items"]) == ("Cohen's kappa", len(pairs))
    if len({mark for pair in pairs for mark in pair}) == 1:
        assert found["value"] is None
    else:
        assert found["value"] == pytest.approx(cohen_kappa_score(*zip(*pairs, strict=True)))


@given(st.lists(st.tuples(three, three, three), min_size=1, max_size=20))
def test_the_agreement_of_more_is_fleiss_kappa(triples):
    columns = zip(*triples, strict=True)
    found = agreement([annotation(n, marks) for n, marks in zip("ABC", columns, strict=True)])
    assert (found["name"], found["items"]) == ("Fleiss' kappa", len(triples))
    # Fleiss 1971, equations 3 to 7.
    shares = [sum(t.count(m) for t in triples) / (3 * len(triples)) for m in MARKS]
    chance = sum(share**2 for share in shares)
    same = sum(sum(t.count(m) ** 2 for m in MARKS) - 3 for t in triples) / (6 * len(triples))
    expected = None if 1 in shares else pytest.approx((same - chance) / (1 - chance))
    assert found["value"] == expected


def test_items_that_one_left_out_do_not_count_for_agreement():
    first = annotation("A", [YES, NO, None, YES])
    second = annotation("B", [YES, NO, NO, None])
    assert agreement([first, second]) == {"name": "Cohen's kappa", "value": 1.0, "items": 2}
    assert agreement([first, annotation("B", [None, None, NO])])["value"] is None


def content(**changes):
    """A file as the page writes it, changed."""
    return json.dumps(json.loads(annotation("Ada", [YES]).model_dump_json()) | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"0\.json is empty; export it again"),
        (" \n", r"0\.json is empty"),
        ("so", r"0\.json is no annotation of latents: Invalid JSON.*; export it again"),
        ("[]", r"0\.json is no annotation of latents: "),
        ("[" * 100_000, r"0\.json is no annotation of latents: "),
        ('{"format": 1}', r"sheet is missing; export"),
        (content(format=2), r"format is '2': Input should be 1"),
        (
            content(sheet="other"),
            r"0\.json is of the sheet 'other', but the key here is of 'sheet'",
        ),
        (content(annotator=" "), r"0\.json has no annotator's name \(it is ' '\); write yours"),
        (content(marks={"i99": {"mark": NO}}), r"marks the item 'i99', which the sheet does not"),
        (content(marks={"i0": {"mark": "yes"}}), r"marks\.i0\.mark is 'yes': Input should be 'int"),
        (content(marks={"i0": {"mark": None}}), r"marks none of the 20 items; mark some"),
        (content(marks={}), r"marks none of the 20 items"),
    ],
)
def test_bad_files_are_named_with_what_is_wrong_and_the_mend(scored, text, message):
    with pytest.raises(InputError, match=message):
        scored(text)


def test_no_file_a_missing_one_and_two_of_the_same_annotator_are_refused(scored, tmp_path):
    with pytest.raises(InputError, match="no annotation file is given; name those"):
        scored()
    with pytest.raises(InputError, match=r"gone\.json cannot be read: No such file"):
        score(tmp_path / KEY_FILE, [tmp_path / "gone.json"])
    with pytest.raises(InputError, match=r"1\.json is of the annotator 'ada ', as .*0\.json is"):
        scored(annotation("Ada", [YES]), annotation("ada ", [NO]))
    assert not (tmp_path / "scores.json").exists()
