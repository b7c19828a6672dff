"""A text cut into windows as a perplexity protocol says, by the baseline's tokenizer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from optikit.errors import InputMissingError
from optikit.evaluation import texts
from optikit.models import tokenizer
from optikit.stage import StageOptions

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from optikit.evaluation.perplexity_protocols import Document, Shape
    from optikit.evaluation.scoring import Window

FEWEST = 2
"""Windows without which nothing says how windows differ."""
BATCH_TOKENS = 1024
"""Tokens that go through a block together, where a model is read block by block."""


class CutOptions(StageOptions):
    """How a text is cut into windows."""

    protocol: Literal["windows", "gptq", "hf", "lmeval"] = "windows"
    """How the text is cut, see `perplexity_protocols`."""
    window: int = Field(default=512, ge=2)
    """Tokens per window."""
    windows: int | None = Field(default=16, ge=2)
    """Number of windows, from the start of the text; null is all of it."""
    stride: int = Field(default=512, ge=1)
    """New tokens per window, where windows overlap."""

    @property
    def shape(self) -> Shape:
        """How the text is cut."""
        from optikit.evaluation.perplexity_protocols import Shape

        return Shape(protocol=self.protocol, window=self.window, windows=self.windows, stride=self.stride)

    def expected(self, tokens: int) -> tuple[int, int]:
        """Return of how many windows a text of about so many tokens will be, and how many of each are new."""
        step = self.stride if self.protocol == "hf" else self.window
        return (self.windows if self.windows is not None else max(1, tokens // step)), step


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What is scored.

    Attributes:
        protocol: Its name.
        windows: Tokens to read, and which of them to score.
        scored_bytes: UTF-8 bytes of what is scored, as it is written in the file.
        words: Words of what is scored, where the protocol counts them.
    """

    protocol: str
    windows: tuple[Window, ...]
    scored_bytes: int
    words: int | None


def cut(path: Path, directory: Path, shape: Shape) -> Cut:
    """Cut the text in `path` by the tokenizer in `directory`.

    Raises:
        InputMissingError: No text, or too little of it; no tokenizer.
    """
    from optikit.evaluation import perplexity_protocols

    text = texts.read(path)
    digest = hashlib.sha256(text.encode()).hexdigest()
    by = tokenizer.load(directory)
    rolling = shape.protocol == "lmeval"
    first = [texts.opening_token(directory)] if rolling else []
    if shape.protocol == "windows":
        first = tokenizer.opening(by)
        shape = replace(shape, opening=len(first))
    documents = perplexity_protocols.documents(text, digest, shape.protocol)
    cuts = [_document(document, by, shape, first) for document in documents]
    windows = tuple(window for windows, _ in cuts for window in windows)
    if len(windows) < FEWEST:
        message = f"the text makes {len(windows)} windows of {shape.window} tokens, and {FEWEST} are needed"
        raise InputMissingError(message, fix="give a longer text, or a shorter window")
    return Cut(
        protocol=perplexity_protocols.name(digest, shape),
        windows=windows,
        scored_bytes=sum(each.bytes for each in documents) if rolling else sum(scored for _, scored in cuts),
        words=sum(each.words for each in documents) if rolling else None,
    )


def _document(document: Document, by: Tokenizer, shape: Shape, first: list[int]) -> tuple[tuple[Window, ...], int]:
    """Return the windows of a document, and how many bytes of it they score.

    Args:
        document: The text.
        by: The tokenizer.
        shape: How the text is cut.
        first: Tokens that stand before it, under `lmeval`, or before every window.
    """
    import numpy as np

    from optikit.evaluation.perplexity_protocols import TooShortError, spans
    from optikit.evaluation.scoring import Window

    special = shape.protocol != "windows"
    needed = None if shape.windows is None else shape.windows * shape.window
    encoded = texts.encode(document.text, by, at_least=needed, special=special)
    once, each = ([], first) if shape.opening else (first, [])
    tokens = np.concatenate([once, encoded.tokens]).astype(np.int64)
    ends = np.concatenate([[0] * (1 + len(once)), encoded.ends])  # ends[i]: bytes before token i
    try:
        found = spans(len(tokens), shape)
    except TooShortError as error:
        fix = f"set windows to {error.fit}" if error.fit >= FEWEST else "give a longer text, or a shorter window"
        raise InputMissingError(str(error), fix=fix) from error
    scored = sum(int(ends[span.end] - ends[span.end - span.scored]) for span in found)
    windows = (np.concatenate([each, tokens[span.begin : span.end]]).astype(np.int64) for span in found)
    return tuple(Window(window, span.scored) for window, span in zip(windows, found, strict=True)), scored
