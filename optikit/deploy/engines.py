"""What becomes of a speculator beside each engine: rows of engines.toml, and who loads what is written beside."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Literal

from optikit.deploy import support

Word = Literal["used", "beside", "refused"]
LAYOUTS: Mapping[str, tuple[str, ...]] = MappingProxyType({"medusa": ("v1", "vllm", "nxdi")})
"""Layouts that a method's speculator is written in, where that isn't its own name."""
NONE = "no compile stage"
WORDS: Mapping[Word, str] = MappingProxyType({"used": "used", "beside": "written beside", "refused": "refused"})


@dataclass(frozen=True, kw_only=True)
class Row:
    """What becomes of a method's speculator beside an engine; see engines.toml."""

    method: str
    engine: str
    word: Word
    why: str
    rule: str = ""


@cache
def rows() -> tuple[Row, ...]:
    """Return all rows."""
    text = resources.files("optikit.deploy").joinpath("engines.toml").read_text(encoding="utf-8")
    return tuple(Row(**row) for row in tomllib.loads(text)["row"])


def find(method: str, engine: str) -> Row | None:
    """Return the row of a method and an engine, "" for none; None where there is no such row."""
    return next((row for row in rows() if (row.method, row.engine) == (method, engine)), None)


def loaders(method: str) -> tuple[str, ...]:
    """Return the servers that load a method's speculator, each once, with their releases.

    >>> loaders("lookup")[0]
    'vllm >=0.10'
    """
    found: dict[str, str] = {}
    for layout in LAYOUTS.get(method, (method,)):
        for server, versions in support.loads_in(layout).items():
            found.setdefault(server, versions)
    return tuple(f"{server} {versions}" for server, versions in found.items())


def said(row: Row) -> str:
    """Return a row in words.

    >>> said(rows()[0])
    'used: drafts are checked by the compiled graph'
    """
    if row.word == "beside":
        return f"written beside: {row.why}; loaded by {', '.join(loaders(row.method))}"
    return f"{row.word}: {row.why}"


def markdown() -> Iterator[str]:
    """Yield the lines of the table: methods in columns, engines in rows."""
    methods = tuple(dict.fromkeys(row.method for row in rows()))
    engines = tuple(dict.fromkeys(row.engine for row in rows()))
    yield f"| engine | {' | '.join(methods)} |"
    yield "|---" * (len(methods) + 1) + "|"
    for engine in engines:
        cells = [row for method in methods if (row := find(method, engine))]
        yield f"| {engine or NONE} | {' | '.join(f'{WORDS[each.word]}: {each.why}' for each in cells)} |"
    yield ""
    for method in methods:
        yield f"- `{method}` written beside a model is loaded by {', '.join(loaders(method))}."
