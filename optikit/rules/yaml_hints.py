"""Hints of problems, made in the text: one function per kind of edit returns spans, or None where it can't be made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import yaml

from optikit.problems import Edit, Hint, Mark, Problem
from optikit.rules.yaml_edit import (
    Block,
    Span,
    dropped,
    last_index,
    last_line,
    line_starts,
    newline,
    replaced,
    root,
    stages,
    without,
)
from optikit.stages import VERBS, load, method_key, methods

Pair = tuple[yaml.MappingNode, int]
"""A mapping and the place of one of its entries."""


def apply(text: str, problems: Sequence[Problem]) -> str:
    """Return the text with the hints of problems made, as far as they can be; of two that overlap the first is."""
    entries = _entries(text)
    spans: list[Span] = []
    for problem in problems:
        if problem.hint is not None and problem.mark is not None:
            spans += _EDITS[problem.hint.edit](text, problem.mark, problem.hint, entries) or []
    return replaced(text, spans)


def _entries(text: str) -> Mapping[int, Pair]:
    """Return every entry of every mapping by where its key starts; nothing where the text can't be read."""
    found: dict[int, Pair] = {}
    seen: set[int] = set()
    waiting: list[yaml.Node | None] = [root(text)]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node.value) in seen:  # what aliases repeat is one list
            continue
        seen.add(id(node.value))
        if isinstance(node, yaml.MappingNode):
            found |= {key.start_mark.index: (node, place) for place, (key, _) in enumerate(node.value)}
            waiting += [value for _, value in node.value]
        else:
            waiting += node.value
    return found


def _start(text: str, mark: Mark) -> int:
    return line_starts(text)[mark.line - 1] + mark.column - 1


def _write(text: str, mark: Mark, hint: Hint, entries: Mapping[int, Pair]) -> list[Span] | None:  # noqa: ARG001 - one shape
    """Put the hint's words in the place of what is marked, on one line."""
    start = _start(text, mark)
    return [Span(start, start + mark.width, hint.text)]


def _entry(text: str, mark: Mark, hint: Hint, entries: Mapping[int, Pair]) -> list[Span] | None:
    """Put the hint's words in the place of the marked key and its value."""
    found = entries.get(_start(text, mark))
    if found is None:
        return None
    key, value = found[0].value[found[1]]
    return [Span(key.start_mark.index, last_index(value), hint.text)]


def _drop(text: str, mark: Mark, hint: Hint, entries: Mapping[int, Pair]) -> list[Span] | None:  # noqa: ARG001
    """Take the marked key and its value away."""
    found = entries.get(_start(text, mark))
    if found is None:
        return None
    mapping, place = found
    if len(mapping.value) == 1:
        return list(dropped(text, mapping, [mapping.value[0][0].value]))
    return [without(text, mapping, place)]


def _beside(text: str, mark: Mark, hint: Hint, entries: Mapping[int, Pair]) -> list[Span] | None:
    """Put the hint's words behind the entry whose value is marked, as another one."""
    start = _start(text, mark)
    pairs = (mapping.value[place] + (mapping,) for mapping, place in entries.values())
    found = next((pair for pair in pairs if pair[1].start_mark.index == start), None)
    if found is None:
        return None
    key, value, mapping = found
    between = ", " if mapping.flow_style else newline(text) + " " * key.start_mark.column
    return [Span(last_index(value), last_index(value), between + hint.text)]


def _align(text: str, mark: Mark, hint: Hint, entries: Mapping[int, Pair]) -> list[Span] | None:  # noqa: ARG001
    """Indent the marked line as the lines before and behind it are, where these agree."""
    starts = line_starts(text)
    lines = [text[a:b] for a, b in pairwise(starts)]
    at = mark.line - 1
    before = next((line for line in reversed(lines[:at]) if _says_something(line)), "")
    behind = next((line for line in lines[at + 1 :] if _says_something(line)), "")
    indent = _indent(before)
    if not before or not behind or indent != _indent(behind) or not _says_something(lines[at]):
        return None
    return [Span(starts[at], starts[at] + len(_indent(lines[at])), indent)]


def _says_something(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip(" \t"))]


def _item(text: str, mark: Mark, hint: Hint, entries: Mapping[int, Pair]) -> list[Span] | None:  # noqa: ARG001
    """Begin a new item of the list at the marked key."""
    start = _start(text, mark)
    found = entries.get(start)
    if found is None or found[1] == 0:
        return None
    mapping, place = found
    if mapping.flow_style:
        return [Span(last_index(mapping.value[place - 1][1]), start, "}, {")]
    before = text[line_starts(text)[mark.line - 1] : start]
    return [Span(start - 2, start, "- ")] if len(before) >= 2 and not before.strip(" ") else None


def _listed(text: str, mark: Mark, hint: Hint, entries: Mapping[int, Pair]) -> list[Span] | None:  # noqa: ARG001
    """Make a list of the marked key's mapping, an item of each entry."""
    found = entries.get(_start(text, mark))
    value = found[0].value[found[1]][1] if found else None
    if not isinstance(value, yaml.MappingNode) or not value.value:
        return None
    if value.flow_style:
        edges = [Span(value.start_mark.index, value.start_mark.index + 1, "[")]
        edges += [Span(value.end_mark.index - 1, value.end_mark.index, "]")]
        for key, each in value.value:
            edges += [
                Span(key.start_mark.index, key.start_mark.index, "{"),
                Span(last_index(each), last_index(each), "}"),
            ]
        return edges
    spans = []
    for key, each in value.value:
        spans.append(Span(key.start_mark.index, key.start_mark.index, "- "))
        spans += _shifted(text, key.start_mark.line + 1, last_line(each), 2)
    return spans


def _shifted(text: str, first: int, last: int, columns: int) -> list[Span]:
    """Return the spans that move lines, from `first` to `last`, to the right."""
    starts = line_starts(text)
    return [Span(starts[line], starts[line], " " * columns) for line in range(first, last + 1)]


def _indented(text: str, mark: Mark, hint: Hint, entries: Mapping[int, Pair]) -> list[Span] | None:
    """Move what stands beside a stage's verb below it."""
    found = entries.get(_start(text, mark))
    if found is None or found[0].flow_style:
        return None
    (verb, options), *others = found[0].value
    if verb.value != hint.text or any(key.start_mark.column != verb.start_mark.column for key, _ in others):
        return None
    column = _options_column(verb, options)
    if column is None:
        return None
    columns = column - verb.start_mark.column
    moved = (_shifted(text, key.start_mark.line, last_line(value), columns) for key, value in others)
    return [span for spans in moved for span in spans]


def _options_column(verb: yaml.Node, options: yaml.Node) -> int | None:
    """Return where the keys below a verb begin; None where no key can stand there: its value is none of blocks."""
    if isinstance(options, yaml.MappingNode) and options.value and not options.flow_style:
        column: int = options.value[0][0].start_mark.column
        return column
    if isinstance(options, yaml.ScalarNode) and not options.value:
        return verb.start_mark.column + 2
    return None


def _named(text: str, mark: Mark, hint: Hint, entries: Mapping[int, Pair]) -> list[Span] | None:
    """Write the verb in the place of a method, and the method below it: `verb: key` is the hint's text."""
    found = entries.get(_start(text, mark))
    if found is None:
        return None
    key, value = found[0].value[found[1]]
    verb, name = hint.text.split(": ")
    method = f"{name}: {key.value}"
    spans = [Span(key.start_mark.index, key.end_mark.index, verb)]
    if isinstance(value, yaml.MappingNode) and value.value:
        first = value.value[0][0]
        between = ", " if value.flow_style else newline(text) + " " * first.start_mark.column
        return [*spans, Span(first.start_mark.index, first.start_mark.index, method + between)]
    if isinstance(value, yaml.MappingNode):
        return [*spans, Span(value.start_mark.index, value.end_mark.index, f"{{{method}}}")]
    empty = isinstance(value, yaml.ScalarNode) and value.start_mark.index == value.end_mark.index > key.end_mark.index
    return [*spans, Span(value.start_mark.index, value.start_mark.index, f" {{{method}}}")] if empty else None


def _merged(text: str, mark: Mark, hint: Hint, entries: Mapping[int, Pair]) -> list[Span] | None:
    """Write out what a merge key brings, as far as it can mean something where it stands."""
    found = entries.get(_start(text, mark))
    if found is None:
        return None
    mapping, place = found
    key, value = mapping.value[place]
    sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
    if not all(isinstance(source, yaml.MappingNode) for source in sources):
        return None
    brought = _brought(text, mapping, sources)
    if any(isinstance(each, yaml.CollectionNode) and not each.flow_style for each in brought.values()):
        return None
    if not brought:
        return _drop(text, mark, hint, entries)
    pairs = [f"{name}: {text[each.start_mark.index : each.end_mark.index]}" for name, each in brought.items()]
    between = ", " if mapping.flow_style else newline(text) + " " * key.start_mark.column
    return [Span(key.start_mark.index, last_index(value), between.join(pairs))]


def _brought(text: str, mapping: yaml.MappingNode, sources: Sequence[yaml.MappingNode]) -> dict[str, yaml.Node]:
    """Return what merged mappings bring, by key: the first of each, unless it is written or means nothing there."""
    known, written = _known(text, mapping), [each.value for each, _ in mapping.value]
    found: dict[str, yaml.Node] = {}
    for name, each in (pair for source in sources for pair in source.value):
        wanted = known is None or name.value in known
        if isinstance(name, yaml.ScalarNode) and name.value not in written and wanted:
            found.setdefault(name.value, each)
    return found


def _known(text: str, mapping: yaml.MappingNode) -> tuple[str, ...] | None:
    """Return the options that a stage takes, if a mapping is that of a stage; else None."""
    block = next((block for block in stages(text) or () if block.options is mapping), None)
    return None if block is None else options_of(block)


def options_of(block: Block) -> tuple[str, ...] | None:
    """Return the keys that a stage takes; None where its verb or method isn't known."""
    key = method_key(block.verb)
    method = block.value(key)
    if block.verb not in VERBS or method not in methods(block.verb):
        return None
    backend = block.value("backend") or "optikit"
    return (*load(block.verb, str(method), backend).Options.model_fields, key, "backend")


_EDITS: Mapping[Edit, Callable[[str, Mark, Hint, Mapping[int, Pair]], list[Span] | None]] = {
    "write": _write,
    "entry": _entry,
    "drop": _drop,
    "beside": _beside,
    "align": _align,
    "item": _item,
    "list": _listed,
    "indent": _indented,
    "name": _named,
    "merge": _merged,
}
