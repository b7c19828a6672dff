"""A recipe as a tree of values that remember where they were written.

Every step of loading (extends, --set, variables) turns one tree into the next, so that a value keeps its place
whatever file it came from, and an error always points at what the author typed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optikit.problems import Loc, Mark

Scalar = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A value with its place.

    Attributes:
        value: A scalar, a tuple of nodes (sequence), or a dict of nodes by key (mapping).
        mark: Where the value starts.
        key: Where its key starts, for values of a mapping.
        source: A scalar's text before it became a number, a boolean or null: `0.10` for 0.1.
    """

    value: Scalar | tuple[Node, ...] | dict[str, Node]
    mark: Mark
    key: Mark | None = None
    source: str = ""

    def child(self, part: str | int) -> Node | None:
        """Return the node under a key or at an index, or None."""
        if isinstance(self.value, dict):
            return self.value.get(part) if isinstance(part, str) else None
        if isinstance(self.value, tuple) and isinstance(part, int) and 0 <= part < len(self.value):
            return self.value[part]
        return None

    @property
    def place(self) -> Mark:
        """The best place to show for this value: a scalar's own, a mapping's or sequence's key if it has one."""
        return self.key if self.key is not None and isinstance(self.value, dict | tuple) else self.mark


def plain(node: Node) -> Any:
    """Return the tree as plain dicts, lists and scalars."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, tuple):
        return [plain(child) for child in node.value]
    return node.value


def removes(over: Node, base: Node) -> bool:
    """Say whether null stands where a mapping or a list was: it takes that out. A scalar's null is a value."""
    return over.value is None and isinstance(base.value, dict | tuple)


@dataclass(frozen=True)
class Marks:
    """The places of a recipe's values, by path."""

    root: Node

    def reach(self, loc: Loc) -> Loc:
        """Return the longest beginning of `loc` that the recipe really has."""
        node: Node | None = self.root
        for depth, part in enumerate(loc):
            node = node.child(part) if node else None
            if node is None:
                return loc[:depth]
        return loc

    def find(self, loc: Loc) -> Node:
        """Return the value at `loc`, or the nearest one around it."""
        node = self.root
        for part in self.reach(loc):
            node = node.child(part) or node
        return node

    def mark(self, loc: Loc) -> Mark | None:
        """Return the place of the value at `loc`, or of the nearest one around it."""
        return self.find(loc).place

    def key(self, loc: Loc) -> Mark | None:
        """Return the place of the key at `loc`; for what has none, the same as `mark`."""
        return self.find(loc).key or self.mark(loc)
