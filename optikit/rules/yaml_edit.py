"""Edits of a recipe's text, by the marks of its YAML nodes: everything else, comments included, stays as it was.

Each function returns the new text, or None where the text doesn't hold what is to be changed (it may come from a base
recipe or from --set).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from optikit.stages import VERBS


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
        if not isinstance(options, yaml.MappingNode):
            return None
        blocks.append(Block(verb=key.value, item=item, options=options))
    return tuple(blocks)


def set_options(text: str, index: int, values: Mapping[str, Any]) -> str | None:
    """Give options of a stage new values, adding those that aren't written."""
    for name, value in values.items():
        blocks = stages(text)
        if blocks is None or index >= len(blocks):
            return None
        entry = blocks[index].entry(name)
        text = _replace(text, entry[1], _scalar(value)) if entry else _add(text, blocks[index], name, value)
    return text


def drop_options(text: str, index: int, names: Sequence[str]) -> str | None:
    """Take options of a stage away."""
    for name in names:
        blocks = stages(text)
        if blocks is None or index >= len(blocks):
            return None
        if blocks[index].entry(name) is not None:
            text = _drop(text, blocks[index], name)
    return text


def remove_stage(text: str, index: int) -> str | None:
    """Take a stage away; the last one stays, for a recipe without stages repairs nothing."""
    blocks = stages(text)
    if blocks is None or len(blocks) < 2 or index >= len(blocks):
        return None
    return _rearranged(text, blocks, [place for place in range(len(blocks)) if place != index])


def sort_stages(text: str) -> str | None:
    """Put the stages into the one order of verbs; stages of one verb keep theirs."""
    blocks = stages(text)
    if blocks is None or any(block.verb not in VERBS for block in blocks):
        return None
    order = sorted(range(len(blocks)), key=lambda index: VERBS.index(blocks[index].verb))
    return None if order == list(range(len(blocks))) else _rearranged(text, blocks, order)


def _list(text: str) -> yaml.SequenceNode | None:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return None
    if not isinstance(root, yaml.MappingNode):
        return None
    found = (value for key, value in root.value if key.value == "stages")
    node = next(found, None)
    return node if isinstance(node, yaml.SequenceNode) else None


def _scalar(value: Any) -> str:
    """Write a value as YAML 1.2: JSON is a subset of it, and plain words need no quotes."""
    if isinstance(value, str) and value.replace("-", "").replace("_", "").isalnum() and value[0].isalpha():
        return value
    return json.dumps(value)


def _replace(text: str, node: yaml.Node, new: str) -> str:
    return text[: node.start_mark.index] + new + text[node.end_mark.index :]


def _add(text: str, block: Block, name: str, value: Any) -> str:
    last = block.options.value[-1] if block.options.value else None
    if block.options.flow_style or last is None:
        end = _last_index(last[1]) if last else block.options.end_mark.index - 1
        comma = ", " if last else ""
        return f"{text[:end]}{comma}{name}: {_scalar(value)}{text[end:]}"
    indent = " " * last[0].start_mark.column
    end = text.find("\n", _last_index(last[1]))
    end = len(text) if end < 0 else end
    return f"{text[:end]}\n{indent}{name}: {_scalar(value)}{text[end:]}"


def _drop(text: str, block: Block, name: str) -> str:
    names = [key.value for key, _ in block.options.value]
    place = names.index(name)
    key, value = block.options.value[place]
    if block.options.flow_style:
        if place + 1 < len(names):
            return text[: key.start_mark.index] + text[block.options.value[place + 1][0].start_mark.index :]
        start = _last_index(block.options.value[place - 1][1]) if place else key.start_mark.index
        return text[:start] + text[_last_index(value) :]
    lines = text.splitlines(keepends=True)
    del lines[key.start_mark.line : _last_line(value) + 1]
    return "".join(lines)


def _rearranged(text: str, blocks: Sequence[Block], order: Sequence[int]) -> str | None:
    """Write the stages in another order, or some of them only."""
    node = _list(text)
    if node is None:
        return None
    if node.flow_style:
        pieces = [text[block.item.start_mark.index : block.item.end_mark.index] for block in blocks]
        start, end = blocks[0].item.start_mark.index, blocks[-1].item.end_mark.index
        return text[:start] + ", ".join(pieces[index] for index in order) + text[end:]
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    begins = [_begin(lines, block) for block in blocks]
    ends = [*begins[1:], _last_line(blocks[-1].item) + 1]
    chunks = [lines[begin:end] for begin, end in zip(begins, ends, strict=True)]
    kept = [line for index in order for line in chunks[index]]
    return "".join([*lines[: begins[0]], *kept, *lines[ends[-1] :]])


def _begin(lines: Sequence[str], block: Block) -> int:
    """Return the first line of a stage: its comment lines above it belong to it."""
    line = block.item.start_mark.line
    while line > 0 and lines[line - 1].lstrip().startswith("#"):
        line -= 1
    return line


def _last_index(node: yaml.Node) -> int:
    """Return where a node really ends; a block node's own end mark lies behind the comments that follow it."""
    if not isinstance(node, yaml.CollectionNode) or node.flow_style or not node.value:
        return int(node.end_mark.index)
    last = node.value[-1]
    return _last_index(last[1] if isinstance(node, yaml.MappingNode) else last)


def _last_line(node: yaml.Node) -> int:
    if not isinstance(node, yaml.CollectionNode) or node.flow_style or not node.value:
        return int(node.end_mark.line)
    last = node.value[-1]
    return _last_line(last[1] if isinstance(node, yaml.MappingNode) else last)
