"""The offline default: a small trained language model, and the generator of the English it knows.

`MODEL` is the folder of the model, as `transformers` loads it. Nothing heavy is imported here.
"""

from pathlib import Path

from groupsae.host.bundled.english import (
    Document,
    Span,
    document,
    documents,
    texts,
    token_attributes,
)
from groupsae.host.bundled.tasks import prompts

MODEL = Path(__file__).parent / "model"

__all__ = [
    "MODEL",
    "Document",
    "Span",
    "document",
    "documents",
    "prompts",
    "texts",
    "token_attributes",
]
