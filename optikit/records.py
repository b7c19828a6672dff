r"""Records: JSON Lines or a JSON array of objects, and texts made of their fields by a template.

Data sets come as records of their authors' fields. A template says what a model is to see of them, so that none has to
be converted first: "{context}\n\n{question}".
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Mapping
from typing import Any


def parse(text: str) -> Iterator[tuple[int, Any]]:
    """Yield (number of the line or record, value); nothing where the text is prose: no object at its start."""
    whole = _value(text) if text.lstrip().startswith("[") else None
    if isinstance(whole, list) and whole and isinstance(whole[0], dict):
        yield from enumerate(whole, 1)
        return
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines or not isinstance(_value(lines[0][1]), dict):
        return
    for number, line in lines:
        value = _value(line)
        yield number, line if value is None else value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


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
