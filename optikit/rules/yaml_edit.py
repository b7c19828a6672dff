"""Edits of a recipe's text, by the marks of its YAML nodes: everything else, comments and line ends included, stays.

Each function returns the new text, or None where the text doesn't hold what is to be changed (it may come from a base
recipe or from --set). `rules.yaml_hints` makes the edits that messages propose.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import yaml

from optikit.stages import VERBS

LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
"""PyYAML's, so that its line numbers fit."""


class Span(NamedTuple):
    """A piece of a text, from character `start` to before `end`, and what is to stand there."""

    start: int
    end: int
    new: str


def replaced(text: str, spans: Iterable[Span]) -> str:
    """Return the text with all spans replaced; of two that overlap the first one is."""
    ordered = sorted(spans, key=lambda span: (span.start, span.end))
    pieces, at = [], 0
    for start, end, new in ordered:
        if start >= at:
            pieces += [text[at:start], new]
            at = end
    return "".join([*pieces, text[at:]])


@dataclass(frozen=True, kw_only=True)
class Block:
    """One stage in the text.

    Attributes:
        verb: Its key.
        item: Node of the list item `{verb: {...}}`.
        options: Node of what stands under the verb.
    """

    verb: str
    item: yaml.MappingNode
    options: yaml.MappingNode

    def entry(self, name: str) -> tuple[yaml.ScalarNode, yaml.Node] | None:
        """Return key and value of an option, or None."""
        found = (pair for pair in self.options.value if pair[0].value == name)
        return next(found, None)

    def value(self, name: str) -> str | None:
        """Return an option as it is written, or None."""
        entry = self.entry(name)
        return entry[1].value if entry and isinstance(entry[1], yaml.ScalarNode) else None

    @property
    def written(self) -> tuple[str, ...]:
        """Names of the options that are written."""
        return tuple(key.value for key, _ in self.options.value if isinstance(key, yaml.ScalarNode))


class _Loader(yaml.SafeLoader):
    """PyYAML's, but an alias is a node with its own marks, not with those of what it repeats."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if not self.check_event(yaml.AliasEvent):
            return super().compose_node(parent, index)
        alias = self.peek_event()  # type: ignore[no-untyped-call] # missing in the stubs
        node = copy(super().compose_node(parent, index))
        if node is not None:
            node.start_mark, node.end_mark = alias.start_mark, alias.end_mark
        if isinstance(node, yaml.CollectionNode):
            node.flow_style = True  # it ends where its mark says
        return node


@lru_cache(maxsize=8)
def root(text: str) -> yaml.MappingNode | None:
    """Return the outermost mapping of a text, or None where it has none or can't be read."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, OverflowError, IndexError, RecursionError):
        return None
    return node if isinstance(node, yaml.MappingNode) else None


def stages(text: str) -> tuple[Block, ...] | None:
    """Return the stages that the text itself holds, or None where it has no list of them."""
    node = _list(text)
    if node is None:
        return None
    blocks = []
    for item in node.value:
        if not isinstance(item, yaml.MappingNode) or len(item.value) != 1:
            return None
        key, options = item.value[0]
        if not isinstance(key, yaml.ScalarNode) or not isinstance(options, yaml.MappingNode):
            return None
        blocks.append(Block(verb=key.value, item=item, options=options))
    return tuple(blocks)


def set_options(text: str, index: int, values: Mapping[str, Any]) -> str | None:
    """Give options of a stage new values, adding those that aren't written."""
    return change(text, {index: values}, {})


def drop_options(text: str, index: int, names: Sequence[str]) -> str | None:
    """Take options of a stage away."""
    return change(text, {}, {index: names})


def change(text: str, values: Mapping[int, Mapping[str, Any]], without: Mapping[int, Iterable[str]]) -> str | None:
    """Give options of several stages new values, and take others away.

    Args:
        text: The recipe.
        values: Values by name, by the number of the stage.
        without: Names of what goes, by the number of the stage.
    """
    blocks = stages(text)
    if blocks is None or not all(index < len(blocks) for index in (*values, *without)):
        return None
    spans: list[Span] = []
    for index, wanted in values.items():
        block = blocks[index]
        entries = {name: block.entry(name) for name in wanted}
        spans += [_at(entry[1], scalar(wanted[name])) for name, entry in entries.items() if entry]
        added = {name: wanted[name] for name, entry in entries.items() if entry is None}
        spans += [_added(text, block.options, added)] if added else []
    for index, names in without.items():
        spans += dropped(text, blocks[index].options, names)
    return replaced(text, spans)


def remove_stage(text: str, index: int) -> str | None:
    """Take a stage away; the last one stays, for a recipe without stages repairs nothing."""
    return remove_stages(text, [index])


def remove_stages(text: str, indices: Iterable[int]) -> str | None:
    """Take stages away; the last one stays."""
    blocks = stages(text)
    gone = set(indices)
    if blocks is None or len(blocks) <= len(gone) or max(gone) >= len(blocks):
        return None
    return _rearranged(text, blocks, [place for place in range(len(blocks)) if place not in gone])


def sort_stages(text: str) -> str | None:
    """Put the stages into the one order of verbs; stages of one verb keep theirs."""
    blocks = stages(text)
    if blocks is None or any(block.verb not in VERBS for block in blocks):
        return None
    order = sorted(range(len(blocks)), key=lambda index: VERBS.index(blocks[index].verb))
    return None if order == list(range(len(blocks))) else _rearranged(text, blocks, order)


def _list(text: str) -> yaml.SequenceNode | None:
    outer = root(text)
    node = entry(outer, "stages") if outer is not None else None
    return node if isinstance(node, yaml.SequenceNode) else None


def entry(mapping: yaml.MappingNode, name: str) -> yaml.Node | None:
    """Return the value of a mapping's key, or None."""
    found: yaml.Node | None = next((value for key, value in mapping.value if key.value == name), None)
    return found


def scalar(value: Any) -> str:
    """Write a value as YAML 1.2: JSON is a subset of it, and plain words need no quotes."""
    if isinstance(value, str) and value.replace("-", "").replace("_", "").isalnum() and value[0].isalpha():
        return value
    return json.dumps(value, ensure_ascii=False)


def _at(node: yaml.Node, new: str) -> Span:
    return Span(node.start_mark.index, last_index(node), new)


def _added(text: str, mapping: yaml.MappingNode, values: Mapping[str, Any]) -> Span:
    """Return the span that writes new options behind those of a mapping."""
    pairs = [f"{name}: {scalar(value)}" for name, value in values.items()]
    last = mapping.value[-1] if mapping.value else None
    if mapping.flow_style or last is None:
        end = last_index(last[1]) if last else mapping.end_mark.index - 1
        return Span(end, end, (", " if last else "") + ", ".join(pairs))
    ends = LINE_BREAK.search(text, last_index(last[1]))
    end = ends.start() if ends else len(text)
    indent = newline(text) + " " * last[0].start_mark.column
    return Span(end, end, "".join(indent + pair for pair in pairs))


def newline(text: str) -> str:
    """Return how the first line of a text ends."""
    found = LINE_BREAK.search(text)
    return found[0] if found else "\n"


def dropped(text: str, mapping: yaml.MappingNode, names: Iterable[str]) -> Iterator[Span]:
    """Yield the spans that take entries of a mapping away."""
    gone = tuple(names)
    places = [place for place, (key, _) in enumerate(mapping.value) if key.value in gone]
    if len(places) == len(mapping.value):
        yield Span(mapping.start_mark.index, last_index(mapping), "{}")
    elif mapping.flow_style and places:
        kept = [(key, value) for key, value in mapping.value if key.value not in gone]
        pieces = (text[key.start_mark.index : last_index(value)] for key, value in kept)
        yield Span(mapping.value[0][0].start_mark.index, last_index(mapping.value[-1][1]), ", ".join(pieces))
    else:
        yield from (without(text, mapping, place) for place in places)


def without(text: str, mapping: yaml.MappingNode, place: int) -> Span:
    """Return the span that takes one entry of a mapping away, of which others stay."""
    key, value = mapping.value[place]
    following = mapping.value[place + 1][0].start_mark.index if place + 1 < len(mapping.value) else None
    if mapping.flow_style:
        if following is not None:
            return Span(key.start_mark.index, following, "")
        return Span(last_index(mapping.value[place - 1][1]), last_index(value), "")
    starts = line_starts(text)
    start = starts[key.start_mark.line]
    if text[start : key.start_mark.index].strip():  # behind the dash of a list item
        return Span(key.start_mark.index, following or last_index(value), "")
    return Span(start, starts[last_line(value) + 1], "")


@lru_cache(maxsize=8)
def line_starts(text: str) -> tuple[int, ...]:
    """Return where each line of a text starts, and where the text ends, twice."""
    return (0, *(found.end() for found in LINE_BREAK.finditer(text)), len(text), len(text))


def _rearranged(text: str, blocks: Sequence[Block], order: Sequence[int]) -> str | None:
    """Write the stages in another order, or some of them only."""
    node = _list(text)
    if node is None:
        return None
    if node.flow_style:
        pieces = [text[block.item.start_mark.index : block.item.end_mark.index] for block in blocks]
        start, end = blocks[0].item.start_mark.index, blocks[-1].item.end_mark.index
        return text[:start] + ", ".join(pieces[index] for index in order) + text[end:]
    return _rearranged_lines(text, blocks, order)


def _rearranged_lines(text: str, blocks: Sequence[Block], order: Sequence[int]) -> str:
    """Write stages that stand on lines of their own in another order, each with the comments above it."""
    starts = line_starts(text)
    lines = [text[a:b] for a, b in pairwise(starts) if a < b]
    if lines and not LINE_BREAK.search(lines[-1]):
        lines[-1] += newline(text)
    begins = [_begin(lines, block) for block in blocks]
    ends = [*begins[1:], last_line(blocks[-1].item) + 1]
    chunks = [lines[begin:end] for begin, end in zip(begins, ends, strict=True)]
    kept = [line for index in order for line in chunks[index]]
    return "".join([*lines[: begins[0]], *kept, *lines[ends[-1] :]])


def _begin(lines: Sequence[str], block: Block) -> int:
    """Return the first line of a stage: its comment lines above it belong to it."""
    line: int = block.item.start_mark.line
    while line > 0 and lines[line - 1].lstrip().startswith("#"):
        line -= 1
    return line


def last_index(node: yaml.Node) -> int:
    """Return where a node really ends; a block node's own end mark lies behind the comments that follow it."""
    if not isinstance(node, yaml.CollectionNode) or node.flow_style or not node.value:
        return int(node.end_mark.index)
    last = node.value[-1]
    return last_index(last[1] if isinstance(node, yaml.MappingNode) else last)


def last_line(node: yaml.Node) -> int:
    """Return the number of the last line of a node, from 0."""
    if not isinstance(node, yaml.CollectionNode) or node.flow_style or not node.value:
        over = node.end_mark.column == 0 and node.end_mark.line > node.start_mark.line  # a block scalar's end
        return int(node.end_mark.line) - over
    last = node.value[-1]
    return last_line(last[1] if isinstance(node, yaml.MappingNode) else last)
