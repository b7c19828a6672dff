r"""Items of tasks, as JSON Lines: multiple choice, questions, SQL. Light: planning reads them, too.

{"prompt": "The sky is", "choices": ["blue", "made of cheese"], "answer": 0}
{"prompt": "Q: 2 + 2?\nA:", "answer": "4"}            or "answer": ["4", "four"]
{"prompt": "-- How many towns?\n", "schema": "CREATE TABLE …; INSERT …", "answer": "SELECT count(*) FROM town"}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optikit.errors import InputMissingError

LINES = 'write {"prompt": "…", "choices": ["…", "…"], "answer": 0}, or a text as answer and no choices'


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A prompt with choices, of which `answer` is the right one."""

    id: str
    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt with the texts that count as right."""

    id: str
    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Query:
    """A prompt for an SQL query; `schema` makes the database that it and the right `answer` are run on."""

    id: str
    prompt: str
    schema: str
    answer: str


Item = Choice | Question | Query
Kind = Literal["choice", "text", "sql"]
KINDS: Mapping[type[Item], Kind] = {Choice: "choice", Question: "text", Query: "sql"}


def kind(items: Sequence[Item]) -> Kind:
    """Name what the items of a task ask for."""
    return KINDS[type(items[0])]


def read(path: Path) -> tuple[Item, ...]:
    """Read the items of a task: all of one kind.

    Raises:
        InputMissingError: No items, or a line that isn't one; says which line and why.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputMissingError(f"task file {path} doesn't exist", fix="check its path") from error
    except UnicodeDecodeError as error:
        raise InputMissingError(f"task file {path} is not UTF-8", fix="convert it to UTF-8") from error
    items = tuple(_item(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    if not items:
        raise InputMissingError(f"task file {path} has no items", fix="every line is one JSON object")
    kinds = sorted({KINDS[type(item)] for item in items})
    if len(kinds) > 1:
        raise InputMissingError(f"{path} mixes items of kinds {' and '.join(kinds)}", fix="split it into tasks")
    return items


def _item(path: Path, number: int, line: str) -> Item:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    problem = _problem(entry)
    if problem:
        raise InputMissingError(f"{path}:{number}: {problem}", fix=LINES)
    name, prompt, answer = str(entry.get("id", number)), entry["prompt"], entry["answer"]
    if "choices" in entry:
        return Choice(id=name, prompt=prompt, choices=tuple(entry["choices"]), answer=answer)
    if "schema" in entry:
        return Query(id=name, prompt=prompt, schema=entry["schema"], answer=answer)
    return Question(id=name, prompt=prompt, answers=(answer,) if isinstance(answer, str) else tuple(answer))


def _problem(entry: Any) -> str:
    """Say what is wrong with a parsed line; "" if nothing is."""
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        return 'expected {"prompt": "…", "answer": …}'
    answer = entry.get("answer")
    if "choices" not in entry:
        return _problem_of_writing(entry, answer)
    if not _texts(entry["choices"]) or len(entry["choices"]) < 2:
        return "`choices` must be two or more texts"
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(entry["choices"]):
        return f"`answer` must be a number from 0 to {len(entry['choices']) - 1}, got {answer!r}"
    return ""


def _problem_of_writing(entry: Mapping[str, Any], answer: Any) -> str:
    if not entry["prompt"]:
        return "`prompt` is empty, and there is nothing to go on from"
    if "schema" in entry:
        return "" if _texts([entry["schema"], answer]) else "`schema` and `answer` must be texts, both SQL"
    return "" if _texts(answer if isinstance(answer, list) else [answer]) else "`answer` must be a text, or several"


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text for text in value)
