r"""Perplexity protocols: which tokens of a text are read together, and which of them are scored.

    windows  the first windows of the text, tokenized as one piece: the protocol of this project's recipes. Before each
             stands what the tokenizer puts before any text, and nothing else that is special
    gptq     all windows of the text that don't overlap, tail dropped (Frantar et al. 2022, arXiv:2210.17323)
    hf       windows that overlap, each scores only what is new in it ("Perplexity of fixed-length models",
             transformers' documentation)
    lmeval   whole documents, every token scored, per word and per byte (lm-evaluation-harness, task `wikitext`)

The same model has a different perplexity under each of them: Llama-2-7B on WikiText-2 has 5.47, 5.12 and 8.79. So the
protocol is part of the number's name, and the text's hash is, too. `wt2` is written only for the very file.

Differs  `hf` weighs every scored token alike (the documentation's loop weighs a window by one token less); `lmeval`
         gives per-token perplexity as its value, and per word and per byte beside it
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Protocol = Literal["windows", "gptq", "hf", "lmeval"]

WIKITEXT2 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
"""sha256 of wiki.test.raw (1,290,590 bytes) of wikitext-2-raw-v1."""
KNOWN_TEXTS: Mapping[str, str] = {WIKITEXT2: "wt2"}
"""Names that a text has in papers, by its sha256."""


class TooShortError(ValueError):
    """Fewer windows fit into a text than were asked for; `fit` says how many do."""

    def __init__(self, tokens: int, shape: Shape, fit: int) -> None:
        asked = f"{fit} windows of {shape.window} fit, {shape.windows} were asked for"
        super().__init__(f"the text has {tokens} tokens: {asked}")
        self.fit = fit


@dataclass(frozen=True)
class Span:
    """Tokens [begin, end) of a document, read together from an empty cache; the last `scored` of them are scored."""

    begin: int
    end: int
    scored: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How a protocol cuts a text.

    Attributes:
        window: Most tokens that the model reads at once.
        windows: Number of windows from the start of the text; None is all of it.
        stride: New tokens per window, where windows overlap.
        opening: Tokens of each window that the tokenizer puts before a text, under `windows`; Gemma without its <bos>
            is another model.
    """

    protocol: Protocol
    window: int
    windows: int | None
    stride: int
    opening: int = 0


def name(digest: str, shape: Shape) -> str:
    """Return the protocol's id: what the text is, how it is cut, and which part of it is scored if not all.

    >>> name(WIKITEXT2, Shape(protocol="gptq", window=2048, windows=None, stride=0))
    'wt2-gptq@2048'
    >>> name("3f9a12cd" + 56 * "0", Shape(protocol="hf", window=1024, windows=40, stride=512))
    'text-3f9a12cd-hf@1024/512:first40'
    >>> name(WIKITEXT2, Shape(protocol="windows", window=512, windows=16, stride=0))
    'text-173c87a5@512x16'
    >>> name(WIKITEXT2, Shape(protocol="windows", window=512, windows=16, stride=0, opening=1))
    'text-173c87a5@512x16:opened'
    """
    hashed = f"text-{digest[:8]}"
    if shape.protocol == "windows":
        return f"{hashed}@{shape.window}x{shape.windows}{':opened' if shape.opening else ''}"
    stride = f"/{shape.stride}" if shape.protocol == "hf" else ""
    part = f":first{shape.windows}" if shape.windows is not None else ""
    return f"{KNOWN_TEXTS.get(digest, hashed)}-{shape.protocol}@{shape.window}{stride}{part}"


def spans(tokens: int, shape: Shape) -> tuple[Span, ...]:
    """Cut a document of `tokens` tokens; for `lmeval` the first of them is the one that opens it.

    Raises:
        TooShortError: Fewer windows fit than were asked for.
    """
    if shape.protocol == "lmeval":
        return tuple(_rolling(tokens, shape.window))
    overlap = shape.protocol == "hf"
    found = tuple(_overlapping(tokens, shape.window, shape.stride) if overlap else _apart(tokens, shape))
    if shape.windows is not None and len(found) < shape.windows:
        raise TooShortError(tokens, shape, len(found))
    return found[: shape.windows]


def _apart(tokens: int, shape: Shape) -> Iterator[Span]:
    """Yield windows that don't overlap; one of L tokens scores all that have context, L - 1 as a rule."""
    own = shape.window - shape.opening
    for begin in range(0, tokens - own + 1, own):
        yield Span(begin, begin + own, own if shape.opening else own - 1)


def _overlapping(tokens: int, window: int, stride: int) -> Iterator[Span]:
    """Yield windows that begin every `stride` tokens, up to the one that reaches the end; each scores what is new."""
    reached = 1  # the first token of all has no context
    for begin in range(0, tokens, stride):
        end = min(begin + window, tokens)
        if end <= reached:
            return
        yield Span(begin, end, end - reached)
        reached = end


def _rolling(tokens: int, window: int) -> Iterator[Span]:
    """Yield spans that score every token but the first.

    The model reads at most `window` tokens: a full span has one token of context, the last one as many as fit.
    """
    reached = 1
    while reached < tokens:
        end = min(reached + window, tokens)
        yield Span(max(0, end - window - 1), end, end - reached)
        reached = end


@dataclass(frozen=True)
class Document:
    """A text to score: as the model reads it, and the words and bytes of how it was written."""

    text: str
    words: int
    bytes: int


def documents(text: str, digest: str, protocol: Protocol) -> Sequence[Document]:
    """Return what a protocol reads of a text: WikiText-2 as the field prepares it, any other text as it is."""
    if KNOWN_TEXTS.get(digest) != "wt2" or protocol == "windows":
        return (_document(text, text),)
    if protocol == "lmeval":
        return tuple(_document(page, detokenized(page)) for page in pages(text))
    rows = (row + "\n" for row in text.removesuffix("\n").split("\n"))
    joined = "\n\n".join(row if row.strip() else "" for row in rows)
    return (_document(joined, joined),)


def _document(written: str, text: str) -> Document:
    return Document(text, len(re.split(r"\s+", written)), len(written.encode()))


def pages(text: str) -> Iterator[str]:
    """Yield the articles of a WikiText file, each from its title on, as lm-eval's data set parts them."""
    lines: list[str] = []
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            page = "\n".join(lines)
            if page.strip():
                yield page
            lines = []
        lines.append(line)
    yield "\n".join(lines)


def _literal(*pairs: tuple[str, str]) -> list[tuple[str, str]]:
    return [(re.escape(before), after) for before, after in pairs]


_PROSE: Sequence[tuple[str, str]] = [
    *_literal(("s '", "s'")),
    (r"/' [0-9]/", "/'[0-9]/"),
    *_literal(*((f" @{mark}@ ", mark) for mark in "-,.")),
    *_literal(*((f" {mark} ", f"{mark} ") for mark in ":;.!?,")),
    *((rf"\{a}\s*([^\{b}]*?)\s*\{b}", rf"{a}\1{b}") for a, b in ("()", "[]", "{}", '""', "''")),
    *_literal(*(((" =" * count).strip(), "=" * count) for count in (4, 3, 2))),
    *_literal((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
]
"""What lm-eval's task `wikitext` rewrites before it tokenizes, in its order: pattern and what takes its place."""


def detokenized(page: str) -> str:
    """Return a WikiText page as prose: blanks before marks, `@-@` and the like are how that data set was split."""
    for pattern, after in _PROSE:
        page = re.sub(pattern, after, page)
    return page
