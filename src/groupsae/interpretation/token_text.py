"""What each token of a vocabulary looks like: text, or bytes where it is none by itself."""

from __future__ import annotations

import json
import re
from typing import Any

from groupsae.host.loading import PreTrainedTokenizer


def token_texts(tokenizer: PreTrainedTokenizer | None, vocab_size: int) -> list[str]:
    """How to show each token id from 0 to before `vocab_size`.

    A token is shown as the text that it stands for, its leading space included. Tokenizers of bytes
    have tokens that are only a part of a character: their bytes are shown as `<0xE2>`, and the
    characters beside them as text. An id without a token, and every id where there is no tokenizer,
    is shown as `[id 50300]`. The text is untrusted: it may hold control characters and markup.
    """
    texts = [f"[id {i}]" for i in range(vocab_size)]
    if tokenizer is None:
        return texts
    decoders = _decoders(tokenizer)
    literal = {int(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    for piece, i in tokenizer.get_vocab().items():
        if i < vocab_size:
            texts[i] = literal[i] if i in literal else as_text(piece_bytes(piece, decoders))
    return texts


def known_ids(tokenizer: PreTrainedTokenizer | None, vocab_size: int) -> list[int]:
    """The ids that stand for a token: an unembedding may be padded to more."""
    if tokenizer is None:
        return list(range(vocab_size))
    return sorted({i for i in tokenizer.get_vocab().values() if i < vocab_size})


def piece_bytes(piece: str, decoders: list[dict[str, Any]]) -> bytes:
    """The bytes that a piece of a vocabulary stands for.

    Args:
        decoders: The steps by which the tokenizer makes text of pieces, as its JSON names them.
    """
    kinds = {step["type"] for step in decoders}
    if "ByteLevel" in kinds and all(character in _BYTES for character in piece):
        return bytes(_BYTES[character] for character in piece)
    if "ByteFallback" in kinds and (match := re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece)):
        return bytes.fromhex(match[1])
    for step in decoders:
        if step["type"] == "Metaspace":
            piece = piece.replace(step["replacement"], " ")
        elif step["type"] == "Replace" and "String" in step["pattern"]:
            piece = piece.replace(step["pattern"]["String"], step["content"])
    return piece.encode("utf-8", errors="surrogatepass")


def as_text(data: bytes) -> str:
    """UTF-8 as text; bytes that are no part of a whole character as `<0xE2>`."""
    shown = ""
    while data:
        try:
            return shown + data.decode()
        except UnicodeDecodeError as error:
            broken = data[error.start : error.end]
            shown += data[: error.start].decode() + "".join(f"<0x{byte:02X}>" for byte in broken)
            data = data[error.end :]
    return shown


def _decoders(tokenizer: PreTrainedTokenizer) -> list[dict[str, Any]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # one of Python alone: sentencepiece's
        return [{"type": "ByteFallback"}, {"type": "Metaspace", "replacement": "▁"}]
    decoder = json.loads(backend.to_str())["decoder"]
    if decoder is None:
        return []
    steps: list[dict[str, Any]] = decoder.get("decoders", [decoder])
    return steps


def _byte_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable characters of Latin-1 stand for their own byte, and those from U+0100 on for the
    others in order: Radford et al. 2019 (GPT-2).
    """
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_characters()
