r"""Items of tasks, as JSON Lines or a JSON array: multiple choice, questions, SQL. Light: planning reads them, too.

{"prompt": "The sky is", "choices": ["blue", "made of cheese"], "answer": 0}
{"prompt": "Q: 2 + 2?\nA:", "answer": "4"}            or "answer": ["4", "four"]
{"prompt": "-- How many towns?\n", "schema": "CREATE TABLE …; INSERT …", "answer": "SELECT count(*) FROM town"}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optikit import records
from optikit.errors import InputMissingError

LINES = 'write {"prompt": "…", "choices": ["…", "…"], "answer": 0}, or a text as answer and no choices'
DELIMITER = " "
"""Between prompt and choice."""


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
    text = records.read(path)
    entries = list(records.parse(text, path)) or records.lines(text)
    items = tuple(_item(path, number, entry) for number, entry in entries)
    if not items:
        raise InputMissingError(f"task file {path} has no items", fix="every line is one JSON object")
    kinds = sorted({KINDS[type(item)] for item in items})
    if len(kinds) > 1:
        raise InputMissingError(f"{path} mixes items of kinds {' and '.join(kinds)}", fix="split it into tasks")
    return items


def tokens_needed(item: Item, max_tokens: int, count: Callable[[str], int]) -> int:
    """Return how many tokens of context an item takes; `count` tells how many a text has."""
    if isinstance(item, Choice):
        return 1 + max(count(f"{item.prompt}{DELIMITER}{choice}") for choice in item.choices)
    return count(item.prompt) + max_tokens


def cut_short(items: Sequence[Item], stop: Sequence[str]) -> tuple[Item, str] | None:
    """Return the first item all of whose answers hold a text that ends an answer, and that text; None if none does.

    What is written up to there can't be one of them, but for how blanks are counted.
    """
    for item in items:
        if isinstance(item, Choice):
            continue
        answers = item.answers if isinstance(item, Question) else (item.answer,)
        marks = [next((mark for mark in stop if mark in answer.strip()), "") for answer in answers]
        if all(marks):
            return item, marks[0]
    return None


def _item(path: Path, number: int, entry: Any) -> Item:
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
