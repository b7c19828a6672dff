r"""Texts as files hold them, and records: JSON Lines or a JSON array of objects, whose fields a template puts together.

Every text that optikit reads comes through `read`, and is split into lines by `lines`: at \n alone. Unicode has other
line ends (U+2028, U+0085), and JSON allows them within a string.

Data sets come as records of their authors' fields. A template says what a model is to see of them, so that none has to
be converted first: "{context}\n\n{question}".
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from optikit.errors import InputMissingError
from optikit.fileio import read_regular

MOST_BYTES = 2**30
"""Of a text."""


def read(path: Path) -> str:
    r"""Read a UTF-8 text, which may begin with a byte order mark; lines that end in \r\n end in \n.

    Raises:
        InputMissingError: No such file, no regular one, or it isn't UTF-8.
    """
    try:
        content = read_regular(path, MOST_BYTES + 1)
    except OSError as error:
        message = f"{path} doesn't exist" if isinstance(error, FileNotFoundError) else f"{path}: {error.strerror}"
        raise InputMissingError(message, fix="check the path of the text") from error
    if len(content) > MOST_BYTES:
        raise InputMissingError(f"{path} has more than {MOST_BYTES} bytes, which no text may have", fix="cut it")
    return decode(content, path)


def decode(content: bytes, name: object) -> str:
    """Return the text of a file's bytes, as `read` does; `name` is what to call it.

    Raises:
        InputMissingError: They aren't UTF-8.
    """
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        message = f"{name} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}"
        raise InputMissingError(message, fix="convert the text to UTF-8") from error


def lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield (number, line) for the lines of a text that aren't blank."""
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def parse(text: str, name: object = "the text") -> Iterator[tuple[int, Any]]:
    """Yield (number of the line or record, value); nothing where the text is prose: no object at its start.

    A line that isn't JSON is given as it is written.

    Raises:
        InputMissingError: A record holds half a surrogate pair; `name` is what to call the text then.
    """
    for number, value in _parse(text):
        if _halved(value):
            message = f"{name}: record {number} holds half a surrogate pair, which is no character"
            raise InputMissingError(message, fix="write the whole character: two \\u escapes, or UTF-8")
        yield number, value


def _parse(text: str) -> Iterator[tuple[int, Any]]:
    whole = _value(text) if text.lstrip().startswith("[") else None
    if isinstance(whole, list) and whole and isinstance(whole[0], dict):
        yield from enumerate(whole, 1)
        return
    for count, (number, line) in enumerate(lines(text)):
        value = _value(line)
        if not count and not isinstance(value, dict):
            return
        yield number, line if value is None else value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _halved(value: Any) -> bool:
    """Say whether a value holds half a surrogate pair, which a JSON escape can write and UTF-8 can't."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str) and any("\ud800" <= each <= "\udfff" for each in {*item}):
            return True
    return False


def json_fields(text: str) -> tuple[str, ...] | None:
    """Return the fields with text of the first record of what is JSON, not prose; None for prose.

    >>> json_fields('{"text": "Once upon a time", "id": 7}')
    ('text',)
    >>> json_fields("[1] A footnote.") is None
    True
    """
    if text.lstrip()[:1] not in ("{", "["):
        return None
    record = next((value for _, value in _parse(text)), None) or _value(text)
    if not isinstance(record, dict | list):
        return None
    return tuple(name for name, each in record.items() if isinstance(each, str)) if isinstance(record, dict) else ()


def fields(template: str) -> tuple[str, ...]:
    """Return the fields that a template names.

    Raises:
        ValueError: It can't be read, or names something else than fields.

    >>> fields("{context}: {question}")
    ('context', 'question')
    """
    try:
        names = tuple(name for _, name, _, _ in string.Formatter().parse(template) if name is not None)
    except ValueError as error:
        raise ValueError(f"template {template!r} can't be read: {error}") from error
    if not all(name.isidentifier() for name in names):
        raise ValueError(f"template {template!r} names something else than fields")
    return names


def filled(entry: Any, template: str) -> str | None:
    """Return a template with the fields of a record in their places; None where it lacks one or it isn't text.

    >>> filled({"question": "How many?"}, "Q: {question}")
    'Q: How many?'
    """
    if not isinstance(entry, dict):
        return None
    out = []
    for literal, name, _, _ in string.Formatter().parse(template):
        value = "" if name is None else entry.get(name)
        if not isinstance(value, str):
            return None
        out += [literal, value]
    return "".join(out)


def rewritten(entry: Any, template: Mapping[str, str]) -> str | None:
    """Return a line of JSON with a record's fields under other names; None where it lacks one.

    >>> rewritten({"question": "How many?", "answer": "4"}, {"prompt": "Q: {question}", "answer": "{answer}"})
    '{"prompt": "Q: How many?", "answer": "4"}'
    """
    found = {name: filled(entry, each) for name, each in template.items()}
    return None if None in found.values() else json.dumps(found, ensure_ascii=False)
