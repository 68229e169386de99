from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from groupsae.errors import InputError
from groupsae.interpretation.annotation.items import shown_items
from groupsae.interpretation.annotation.key import KEY_FILE, read_key
from groupsae.interpretation.annotation.sheet import annotate, draw_sheet
from groupsae.interpretation.cards import Shown
from groupsae.interpretation.contexts import latent_contexts
from groupsae.interpretation.unembedding import unembedding_of
from tests.interpretation.cases import SILENT

SHOWN = (
    Shown("groups", 1, {0: "layers-00-01", 1: "layers-00-01"}),
    Shown("baseline", 2, {0: "baseline/layers-00", 1: "baseline/layers-01"}),
)
ENTRIES = {(name, layer) for shown in SHOWN for layer, name in shown.saes.items()}
TEXTS = [f" w{i}" for i in range(96)]


def drawn(sheet, name, layer):
    return [item.latent for item in sheet.items if (item.sae, item.layer) == (name, layer)]


def test_as_many_latents_as_asked_are_drawn_of_those_that_fire_at_each_layer(cache):
    few, all_of_them = (draw_sheet(cache, SHOWN, latents=n, seed=0, of="run") for n in (6, 1000))
    assert {(item.sae, item.layer) for item in few.items} == ENTRIES
    for name, layer in ENTRIES:
        firing = set(np.flatnonzero(cache.index(name, layer).counts).tolist())
        assert sorted(drawn(all_of_them, name, layer)) == sorted(firing)
        assert not firing & set(SILENT)
        assert len(set(drawn(few, name, layer))) == len(drawn(few, name, layer)) == 6
        assert set(drawn(few, name, layer)) <= firing


def test_a_sheet_is_a_function_of_its_seed_and_run(cache):
    sheet = draw_sheet(cache, SHOWN, latents=6, seed=0, of="run")
    assert sheet == draw_sheet(cache, SHOWN, latents=6, seed=0, of="run")
    for changed in ({"seed": 1}, {"latents": 7}, {"of": "another"}):
        other = draw_sheet(cache, SHOWN, **({"latents": 6, "seed": 0, "of": "run"} | changed))
        assert other.id != sheet.id
        assert not {item.id for item in other.items} & {item.id for item in sheet.items}


def test_latents_are_mixed_and_an_sae_of_two_partitions_is_drawn_from_once(cache):
    twice = (Shown("groups", 2, SHOWN[1].saes), SHOWN[1])
    sheet = draw_sheet(cache, twice, latents=12, seed=0, of="run")
    assert len(sheet.items) == 24
    places = [i for i, item in enumerate(sheet.items) if item.layer == 0]
    assert len(places) == 12
    assert places != list(range(12))  # neither first nor last, nor in turn
    assert len({place % 2 for place in places}) == 2
    assert min(places) < 8
    assert max(places) > 15


def test_whom_else_is_shown_changes_no_latents(cache):
    both = draw_sheet(cache, SHOWN, latents=5, seed=3, of="run")
    alone = draw_sheet(cache, SHOWN[1:], latents=5, seed=3, of="run")
    for layer, name in SHOWN[1].saes.items():
        assert sorted(drawn(both, name, layer)) == sorted(drawn(alone, name, layer))


def test_an_item_shows_its_latents_strongest_contexts_and_outermost_logits(host, cache, saes):
    sheet = draw_sheet(cache, SHOWN, latents=4, seed=0, of="run")
    shown = list(shown_items(cache, saes, sheet.items, unembedding_of(host), contexts=3))
    assert [each.id for each in shown] == [item.id for item in sheet.items]
    head = host.model.get_output_embeddings().weight.detach()
    gain = host.model.gpt_neox.final_layer_norm.weight.detach()
    for item, each in zip(sheet.items, shown, strict=True):
        at_layer = latent_contexts(cache, item.sae, item.latent, top=3).by_layer[item.layer]
        assert each.contexts == at_layer.top
        row = saes[item.sae].W_dec.detach()[item.latent]
        order = torch.argsort((head @ (gain * (row - row.mean()))), descending=True).tolist()
        assert each.largest == tuple(order[:10])
        assert each.smallest == tuple(order[::-1][:10])


def test_without_an_unembedding_logits_are_left_out(cache, saes):
    sheet = draw_sheet(cache, SHOWN, latents=2, seed=0, of="run")
    shown = list(shown_items(cache, saes, sheet.items, None, contexts=3))
    assert len(shown) == 8
    assert all(each.contexts and each.largest == each.smallest == () for each in shown)


def test_a_key_says_what_the_page_does_not(cache, saes, tmp_path):
    page = annotate(
        tmp_path / "sheet", cache, saes, SHOWN, None, TEXTS, latents=5, contexts=4, of="run"
    )
    sheet = draw_sheet(cache, SHOWN, latents=5, seed=0, of="run")
    key = read_key(tmp_path / "sheet" / KEY_FILE)
    assert (key.of, key.sheet, key.shown) == ("run", sheet.id, list(SHOWN))
    assert {i: (at.sae, at.layer, at.latent) for i, at in key.items.items()} == {
        item.id: (item.sae, item.layer, item.latent) for item in sheet.items
    }
    html = page.read_text()
    assert sheet.id in html
    for name in ("layers-0", "baseline", "groups", "G=", str(tmp_path)):
        assert name not in html.replace("groupsae", "")


def test_items_of_one_latent_have_unlike_names_and_the_same_form_whatever_the_sae(
    cache, saes, tmp_path
):
    page = annotate(tmp_path, cache, saes, SHOWN, None, TEXTS, latents=9, contexts=5, of="run")
    data = json.loads(re.search(r'id="sheet">(.*?)</script>', page.read_text())[1])
    assert {re.sub("[0-9a-f]", "x", item["id"]) for item in data["items"]} == {"x" * 12}
    for item in data["items"]:
        strongest, *_ = item["contexts"]
        assert strongest["percent"][strongest["peak"]] == 100  # whatever the SAE's unit
        values = {value for context in item["contexts"] for value in context["percent"]}
        assert values <= set(range(101))
        assert set(item) == {"id", "contexts", "largest", "smallest"}
    shown = {i for item in data["items"] for context in item["contexts"] for i in context["ids"]}
    assert data["texts"] == {str(i): TEXTS[i] for i in sorted(shown)}


def test_saes_that_never_fire_are_refused(cache, tmp_path):
    with pytest.raises(InputError, match="no latent of any SAE fires on the 3"):
        annotate(tmp_path, cache, {}, (), None, TEXTS, of="run")
    with pytest.raises(InputError, match="'layers-07' is not in the latent cache"):
        annotate(tmp_path, cache, {}, (Shown("groups", 1, {7: "layers-07"}),), None, TEXTS, of="r")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing, so that nobody knows which latents were judged"),
        ("", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 1, "of": 3}', "is damaged .of: "),
    ],
)
def test_a_key_that_is_missing_or_damaged_is_named(tmp_path: Path, content, message):
    path = tmp_path / KEY_FILE
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=f"{path} {message}"):
        read_key(path)
