from __future__ import annotations

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from groupsae.host.model import HostModel
from groupsae.interpretation.token_text import as_text, piece_bytes, token_texts
from tests.host.tiny_models import tiny_tokenizer


@given(st.text())
def test_text_stays_text(text):
    assert as_text(text.encode()) == text


@given(st.binary(max_size=20))
def test_every_byte_is_shown(data):
    """Nothing becomes a replacement character, and nothing is lost."""
    shown = as_text(data)
    assert shown.count("\N{REPLACEMENT CHARACTER}") == data.count(b"\xef\xbf\xbd")
    parts = data.decode("utf-8", errors="surrogateescape")
    expected = "".join(
        f"<0x{ord(c) - 0xDC00:02X}>" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in parts
    )
    assert shown == expected


@given(st.text(max_size=30))
def test_byte_level_pieces_spell_the_text(text):
    """The library's own way from text to pieces, and ours back."""
    to_pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = [piece for piece, _ in to_pieces.pre_tokenize_str(text)]
    decoder = [{"type": "ByteLevel"}]
    assert b"".join(piece_bytes(piece, decoder) for piece in pieces) == text.encode()


def byte_level_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Of all single bytes, and a few pieces of several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("â", "Ĥ"), ("Ġ", "a"), ("a", "â")]
    pieces = [*alphabet, *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|é|>")


def test_parts_of_characters_are_shown_as_bytes():
    tokenizer = byte_level_tokenizer()
    texts = token_texts(tokenizer, 262)
    ids = tokenizer(" a€")["input_ids"]  # the euro sign is E2 82 AC
    assert [texts[i] for i in ids] == [" a", "<0xE2><0x82>", "<0xAC>"]
    vocabulary = tokenizer.get_vocab()
    assert texts[vocabulary["aâ"]] == "a<0xE2>"
    assert texts[vocabulary["Ċ"]] == "\n"
    assert texts[vocabulary["<|é|>"]] == "<|é|>"  # an added token is no bytes
    assert texts[260:] == ["[id 260]", "[id 261]"]
    assert sum(text.startswith("<0x") for text in texts) == 128 + 1


def test_sentencepiece_with_byte_fallback():
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
    ]
    for piece, text in {"▁the": " the", "<0x0A>": "\n", "<0xE2>": "<0xE2>", "é": "é"}.items():
        assert as_text(piece_bytes(piece, steps)) == text
    assert piece_bytes("▁a▁", [{"type": "Metaspace", "replacement": "▁"}]) == b" a "
    assert piece_bytes("<0x0A>", []) == b"<0x0A>"


def test_words_and_ids():
    assert token_texts(tiny_tokenizer(5), 6) == [
        *("<|endoftext|>", "<|padding|>", "w2", "w3", "w4", "[id 5]"),
    ]
    assert token_texts(None, 2) == ["[id 0]", "[id 1]"]


@pytest.mark.shared
@pytest.mark.parametrize("name", ["pythia-tokenizer", "stories3M"])
def test_real_tokenizers_spell_their_text(name, shared):
    folder = shared / "models" / name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = token_texts(tokenizer, len(tokenizer))
    text = "Once upon a time there was a dog.\nIt said: hello!"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(texts[i] for i in ids).lstrip() == text
    replacement = "\N{REPLACEMENT CHARACTER}"  # a few tokens do stand for it: EF BF BD
    own = {
        i for piece, i in tokenizer.get_vocab().items() if replacement in piece or "ï¿½" in piece
    }
    assert {i for i, text in enumerate(texts) if replacement in text} == own
    assert sum("<0x" in text for text in texts) >= 100


def test_the_bundled_tokenizer_spells_its_text():
    host = HostModel.load("bundled")
    texts = token_texts(host.tokenizer, host.vocab_size)
    ids = host.tokenizer(" The cat, then 42 cats €")["input_ids"]
    assert "".join(texts[i] for i in ids if i) == " The cat, then 42 cats <0xE2><0x82><0xAC>"
