"""The nearest legal recipe: the smallest change of the text after which it plans.

Changes, cheapest first: an option gets another value, the stages are put in order, a stage gets another method, a
stage is removed. A uniform-cost search tries them, alone and together, on what the planner complains about; a change
counts only if the planner then accepts the text. Warnings don't count.
"""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, product
from typing import Any, get_args, get_origin

from optikit.problems import Problem
from optikit.rules import yaml_edit
from optikit.stages import load, method_key, methods

Attempt = Callable[[str], Sequence[Problem]]
"""Plans a recipe text and returns what is wrong with it; nothing runs. Warnings may be among it."""

SET, SORT, METHOD, REMOVE, ELSEWHERE = 2, 3, 4, 6, 3
"""What a change costs, and what it costs more where nothing was complained about."""
MAX_COST = 14


@dataclass(frozen=True, kw_only=True)
class Repair:
    """A recipe that plans.

    Attributes:
        text: The whole file.
        changes: What was done, one sentence each.
    """

    text: str
    changes: tuple[str, ...]

    def diff(self, before: str, name: str = "recipe.yaml") -> str:
        """Return the change as a unified diff that `patch` can apply."""
        lines = difflib.unified_diff(before.splitlines(), self.text.splitlines(), name, name, lineterm="")
        return "".join(f"{line}\n" for line in lines)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One edit of a text: its cost, the sentence that tells it, the text after it."""

    cost: int
    told: str
    text: str


def repair(text: str, problems: Sequence[Problem], attempt: Attempt, *, attempts: int = 120) -> Repair | None:
    """Find the smallest change that makes a recipe plan.

    Args:
        text: The recipe as written.
        problems: What planning it complained about.
        attempt: Plans another text: `lambda text: problems of make_plan(loads(text, path), …)`, () if it plans.
        attempts: How many texts to try at most.

    Returns:
        The repaired recipe, or None if no small change helps.
    """
    serial = count()
    seen = {text}
    queue: list[tuple[int, int, str, tuple[str, ...]]] = []

    def expand(cost: int, base: str, done: tuple[str, ...], found: Sequence[Problem]) -> None:
        for change in candidates(base, found):
            total = cost + change.cost
            if total <= MAX_COST and change.text not in seen:
                seen.add(change.text)
                heapq.heappush(queue, (total, next(serial), change.text, (*done, change.told)))

    expand(0, text, (), _errors(problems))
    for _ in range(attempts):
        if not queue:
            break
        cost, _order, tried, done = heapq.heappop(queue)
        left = _errors(attempt(tried))
        if not left:
            return Repair(text=tried, changes=done)
        expand(cost, tried, done, left)
    return None


def _errors(problems: Sequence[Problem]) -> list[Problem]:
    return [problem for problem in problems if problem.level == "error"]


def candidates(text: str, problems: Sequence[Problem]) -> Iterator[Change]:
    """Yield the changes that problems suggest, then the blunt ones."""
    blocks = yaml_edit.stages(text)
    if blocks is None:
        return
    blamed = {problem.loc[1] for problem in problems if problem.loc[:1] == ("stages",) and len(problem.loc) > 1}
    for problem in problems:
        yield from _suggested(text, blocks, problem)
    ordered = yaml_edit.sort_stages(text)
    if ordered is not None:
        yield Change(cost=SORT, told="put the stages in order", text=ordered)
    for index, block in enumerate(blocks):
        more = 0 if index in blamed else ELSEWHERE
        yield from _methods(text, index, block, more)
        removed = yaml_edit.remove_stage(text, index)
        if removed is not None:
            yield Change(cost=REMOVE + more, told=f"remove {_name(block)}", text=removed)


def _suggested(text: str, blocks: Sequence[yaml_edit.Block], problem: Problem) -> Iterator[Change]:
    """Yield what the rule's own row proposes, then other values of the option that is complained about."""
    for verb, options in problem.repair.items():
        for index in [index for index, block in enumerate(blocks) if block.verb == verb][-1:]:
            for values in _combinations(options, blocks[index]):
                yield from _set(text, index, blocks[index], values)
    if len(problem.loc) > 3 and isinstance(problem.loc[1], int) and problem.loc[1] < len(blocks):
        index, name = problem.loc[1], str(problem.loc[3])
        block = blocks[index]
        for value in _values(block, name):
            yield from _set(text, index, block, {name: value})
        dropped = yaml_edit.drop_options(text, index, [name])
        if block.entry(name) is not None and dropped is not None:
            yield Change(cost=SET, told=f"leave {name} of {_name(block)} at its default", text=dropped)


def _combinations(options: Mapping[str, Any], block: yaml_edit.Block) -> Iterator[dict[str, Any]]:
    """Yield every choice among the values proposed, what is nearest to the written values first."""

    def ordered(name: str, proposed: Any) -> list[Any]:
        values = proposed if isinstance(proposed, tuple) else (proposed,)
        return sorted(values, key=lambda value: _distance(value, block.value(name)))

    for chosen in product(*(ordered(name, proposed) for name, proposed in options.items())):
        yield dict(zip(options, chosen, strict=True))


def _set(text: str, index: int, block: yaml_edit.Block, values: dict[str, Any]) -> Iterator[Change]:
    changed = yaml_edit.set_options(text, index, values)
    if changed is not None:
        told = ", ".join(f"{name}: {value}" for name, value in values.items())
        yield Change(cost=SET, told=f"set {told} in {_name(block)}", text=changed)


def _methods(text: str, index: int, block: yaml_edit.Block, more: int) -> Iterator[Change]:
    key = _key(block)
    for method in methods(block.verb):
        if method in {block.value(key), None}:
            continue
        known = {*load(block.verb, method).Options.model_fields, key, "backend"}
        changed = yaml_edit.set_options(text, index, {key: method})
        changed = changed and yaml_edit.drop_options(changed, index, [n for n in _written(block) if n not in known])
        if changed is not None:
            yield Change(cost=METHOD + more, told=f"use {method} instead of {block.value(key)}", text=changed)


def _values(block: yaml_edit.Block, name: str) -> Iterator[Any]:
    """Yield other values of an option, from its type: choices, the other truth value, smaller numbers."""
    key = _key(block)
    if block.value(key) not in methods(block.verb):
        return
    field = load(block.verb, str(block.value(key))).Options.model_fields.get(name)
    written = block.value(name)
    if field is None:
        return
    kind = field.annotation
    if get_origin(kind) is not None:
        choices = [choice for choice in get_args(kind) if isinstance(choice, (str, int)) and str(choice) != written]
        yield from sorted(choices, key=lambda choice: _distance(choice, written))
    elif kind is bool:
        yield written != "true"
    elif kind is int and written is not None and written.isdigit():
        yield from _halved(int(written))


def _distance(choice: str | int, written: str | None) -> float:
    """Return how far a choice is from what is written: numbers by their difference, words not at all."""
    if isinstance(choice, int) and written is not None and written.lstrip("-").isdigit():
        return abs(choice - int(written))
    return 0.0


def _halved(value: int) -> Iterator[int]:
    """Yield halves of a number, nearest first.

    >>> list(_halved(12))
    [6, 3, 1]
    """
    while value > 1:
        value //= 2
        yield value


def _written(block: yaml_edit.Block) -> list[str]:
    return [key.value for key, _ in block.options.value]


def _key(block: yaml_edit.Block) -> str:
    return method_key(block.verb)


def _name(block: yaml_edit.Block) -> str:
    return f"{block.verb} ({block.value(_key(block))})"
