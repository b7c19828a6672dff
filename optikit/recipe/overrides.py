"""`--set stages[1].quantize.bits=8`: change one value of a recipe from the command line.

The value is read as in the file (`8` is a number, `[1, 2]` a list, `"8"` text) and checked by the same schema; `null`
takes a mapping or a list out, but no stage: the number of a later one would change. Its mark
is `--set:N:COLUMN`, N counting the overrides, so that an error points into what was typed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from optikit.problems import Mark, Problem, did_you_mean
from optikit.recipe.node import Node, removes
from optikit.recipe.yaml12 import compose, resolve

FILE = "--set"
_PART = re.compile(r"(?:\A|(?!\A)\.)(?P<key>[^.\[\]\s]+)|\[(?P<index>[0-9]{1,6})\]")
_MAX_PARTS = 16
_EXAMPLE = "write for example stages[0].quantize.bits=8"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a path: a key or an index, and its place in the override."""

    name: str | int
    mark: Mark


class BadOverrideError(Exception):
    """A problem on its way to the list of all problems."""

    def __init__(self, message: str, fix: str, mark: Mark) -> None:
        super().__init__(message)
        self.problem = Problem(code="bad-override", message=message, fix=fix, mark=mark)


def apply(root: Node, overrides: Sequence[str]) -> tuple[Node, tuple[Problem, ...]]:
    """Return the tree with every override applied in order, and the problems of those that could not be."""
    problems: list[Problem] = []
    for number, text in enumerate(overrides, start=1):
        try:
            parts, found = _parse(text, number)
            root = put(root, parts, found)
        except BadOverrideError as bad:
            problems.append(bad.problem)
    return root, tuple(problems)


def _parse(text: str, number: int) -> tuple[tuple[Part, ...], Node]:
    """Split `path=value`."""

    def mark(start: int, end: int) -> Mark:
        return Mark(file=FILE, line=number, column=start + 1, text=text, width=max(1, end - start))

    written, equals, rest = text.partition("=")
    if not equals:
        raise BadOverrideError(f"{text!r} has no '='", _EXAMPLE, mark(0, len(text)))
    parts = path(written, mark)
    if parts[0].name == "extends":
        raise BadOverrideError("'extends' can't be set here", "write it in the recipe", parts[0].mark)
    return parts, value(rest, mark(len(written) + 1, len(text)))


def path(text: str, mark: Callable[[int, int], Mark]) -> tuple[Part, ...]:
    """Return the parts of a path, `mark` telling the place of each by where it starts and ends.

    Raises:
        BadOverrideError: It is no path.
    """
    parts, end = [], 0
    for match in _PART.finditer(text):
        if match.start() != end:
            break
        end = match.end()
        name = match["key"] or int(match["index"])
        parts.append(Part(name=name, mark=mark(end - len(match[0].lstrip(".")), end)))
    if end != len(text) or not 1 <= len(parts) <= _MAX_PARTS:
        raise BadOverrideError(f"{text!r} is no path of keys and [indices]", _EXAMPLE, mark(end, len(text)))
    return tuple(parts)


def value(text: str, mark: Mark) -> Node:
    """Return a value as the file would have it, all of it at one place.

    Raises:
        BadOverrideError: It is no value.
    """
    stripped = text.strip()
    if stripped.startswith(("[", "{", '"', "'")):
        document = compose(stripped, FILE)
        if document.problems or document.root is None:
            problem = document.problems[0]
            raise BadOverrideError(problem.message, problem.fix, mark)
        return _at(document.root, mark)
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise BadOverrideError("the value is not valid text", "write it in UTF-8", mark)
    try:
        return Node(value=resolve(stripped), mark=mark, source=stripped)
    except ValueError as error:
        raise BadOverrideError(f"{stripped[:40]!r} is {error}", "put it in quotes inside the value", mark) from None


def _at(node: Node, mark: Mark) -> Node:
    """Return the tree with every mark at the whole value."""
    if isinstance(node.value, dict):
        return replace(
            node,
            mark=mark,
            value={key: replace(_at(child, mark), key=mark) for key, child in node.value.items()},
        )
    if isinstance(node.value, tuple):
        return replace(node, mark=mark, value=tuple(_at(child, mark) for child in node.value))
    return replace(node, mark=mark)


def put(root: Node, parts: tuple[Part, ...], found: Node) -> Node:
    """Return the tree with a value at a path.

    Raises:
        BadOverrideError: The tree has no such place.
    """
    return _put(root, parts, (), found)


def _put(node: Node | None, parts: tuple[Part, ...], done: tuple[str | int, ...], value: Node) -> Node:
    """Return the node with `value` at the path `parts` below it; `done` is the path down to it."""
    if not parts:
        return value
    part, rest = parts[0], parts[1:]
    if isinstance(part.name, int):
        items, index = _items(node, part, done), part.name
        changed = _put(items[index], rest, (*done, index), value)
        return replace(node, value=(*items[:index], changed, *items[index + 1 :])) if node else changed
    entries = _entries(node, part, done, rest)
    changed = replace(_put(entries.get(part.name), rest, (*done, part.name), value), key=part.mark)
    made = node or Node(value={}, mark=part.mark)
    written = {**entries, part.name: changed}
    if not rest and part.name in entries and removes(value, entries[part.name]) and not _in_a_stage(done):
        del written[part.name]
    return replace(made, value=written)


def _in_a_stage(path: tuple[str | int, ...]) -> bool:
    return len(path) == 2 and path[0] == "stages"


def _items(node: Node | None, part: Part, done: tuple[str | int, ...]) -> tuple[Node, ...]:
    """Return the items of a sequence that has the index, or raise."""
    where = _written(done)
    if node is None or not isinstance(node.value, tuple):
        raise BadOverrideError(f"{where} is not a list", "write the key that is meant", part.mark)
    if int(part.name) >= len(node.value):
        count = len(node.value)
        has = "1 item, number 0" if count == 1 else f"{count} items, numbers 0 to {count - 1}" if count else "no items"
        raise BadOverrideError(f"{where} has {has}: there is no [{part.name}]", "count from 0", part.mark)
    return node.value


def _entries(node: Node | None, part: Part, done: tuple[str | int, ...], rest: tuple[Part, ...]) -> dict[str, Node]:
    """Return the entries of a mapping (empty where nothing is written yet) that may have the key, or raise."""
    if node is None or node.value is None:
        return {}
    if isinstance(node.value, tuple):
        fix = _item_with(node.value, str(part.name), done, rest) or f"write {_written(done)}[0]"
        raise BadOverrideError(f"{_written(done)} is a list", fix, part.mark)
    if not isinstance(node.value, dict):
        raise BadOverrideError(f"{_written(done)} is a value without keys", f"set {_written(done)} itself", part.mark)
    if _in_a_stage(done) and part.name not in node.value:
        # Elsewhere a new key is checked by the schema; here it would give the stage a second verb.
        raise BadOverrideError(
            f"{_written(done)} has no {part.name!r}", did_you_mean(str(part.name), node.value), part.mark
        )
    return node.value


def _item_with(items: tuple[Node, ...], key: str, done: tuple[str | int, ...], rest: tuple[Part, ...]) -> str:
    """Return the fix that names the index: `stages.quantize.bits` → `stages[0].quantize.bits`."""
    index = next((i for i, item in enumerate(items) if item.child(key) is not None), None)
    if index is None:
        return ""
    return f"did you mean {_written((*done, index, key, *(p.name for p in rest)))!r}?"


def _written(path: tuple[str | int, ...]) -> str:
    """Return a path as the author writes it.

    >>> _written(("stages", 1, "quantize", "bits"))
    'stages[1].quantize.bits'
    """
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or "the recipe"
