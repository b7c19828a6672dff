"""The nearest recipe that can work and means the same: the smallest change of the text after which it plans.

First the hints of the messages are made: a misspelt word, quotes around a number, another tool's key. Then a
uniform-cost search tries, alone and together, other values of the options complained about and the order of stages. A
change that alters what the author asked for (method, bits, engine, model, target; a stage or an option that goes) is
unsafe: it is tried only where unsafe changes are allowed, and says what is lost. Complaints of one kind about stages
of one kind get one change. Warnings don't count.
"""

from __future__ import annotations

import difflib
import heapq
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, product
from typing import Any, get_args, get_origin

from optikit.problems import Mark, Problem
from optikit.rules import yaml_edit, yaml_hints
from optikit.rules.meaning import KEPT, differences
from optikit.stages import load, method_key, registry

Attempt = Callable[[str], Sequence[Problem]]
"""Plans a recipe text and returns what is wrong with it; nothing runs. Warnings may be among it."""

SET, SORT, METHOD, REMOVE, ELSEWHERE = 2, 3, 4, 6, 3
"""What a change costs, and what it costs more where nothing was complained about."""
MAX_COST = 14
ROUNDS = 20
"""How often hints are made: each time, what is under a mended verb or method is read for the first time."""
SECONDS = 10.0
"""Time after which nothing further is tried; an attempt that has begun is finished."""
INTRODUCED = frozenset({"yaml-syntax", "duplicate-key", "unknown-alias"})
"""Faults of the text that a hint must not bring in."""


@dataclass(frozen=True, kw_only=True)
class Repair:
    """A recipe with fewer problems.

    Attributes:
        text: The whole file.
        changes: What was done, one clause each.
        lost: What the author asked for that is gone; nothing where only safe changes were made.
        left: Errors that remain; nothing where it plans.
    """

    text: str
    changes: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    left: tuple[Problem, ...] = ()

    def diff(self, before: str, name: str = "recipe.yaml") -> str:
        """Return the change as a unified diff that `patch` can apply."""
        lines = difflib.unified_diff(before.splitlines(), self.text.splitlines(), name, name, lineterm="")
        return "".join(f"{line}\n" for line in lines)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One edit of a text: its cost, the clause that tells it, the text after it, what is lost by it."""

    cost: int
    told: str
    text: str
    lost: str = ""


@dataclass(kw_only=True)
class _Budget:
    """How much may still be tried."""

    attempt: Attempt
    attempts: int
    deadline: float
    spent: int = field(default=0)

    @property
    def over(self) -> bool:
        return self.spent >= self.attempts or time.monotonic() >= self.deadline

    def errors(self, text: str) -> tuple[Problem, ...]:
        """Plan a text; return its errors."""
        self.spent += 1
        return _errors(self.attempt(text))


def repair(
    text: str,
    problems: Sequence[Problem],
    attempt: Attempt,
    *,
    file: str = "",
    unsafe: bool = False,
    attempts: int = 120,
    seconds: float = SECONDS,
) -> Repair | None:
    """Find the smallest change that makes a recipe plan, or at least takes problems away.

    Args:
        text: The recipe as written.
        problems: What planning it complained about.
        attempt: Plans another text: `lambda text: problems of make_plan(loads(text, path), …)`, () if it plans.
        file: Name of the recipe in marks: hints for other files aren't made. Empty takes all.
        unsafe: Also change what the recipe means; such a repair is returned only if it plans.
        attempts: How many texts to try at most.
        seconds: How long to try.

    Returns:
        The repaired recipe, or None if no small change helps.
    """
    budget = _Budget(attempt=attempt, attempts=attempts, deadline=time.monotonic() + seconds)
    start = Repair(text=text, left=_errors(problems))
    found = _hinted(start, budget, file=file, unsafe=unsafe)
    if found.left:
        found = _searched(found, budget, file=file, unsafe=unsafe)
    if found.text == text or (unsafe and found.left) or (not unsafe and differences(text, found.text)):
        return None
    return found


def _errors(problems: Sequence[Problem]) -> tuple[Problem, ...]:
    return tuple(problem for problem in problems if problem.level == "error")


def _hinted(state: Repair, budget: _Budget, *, file: str, unsafe: bool) -> Repair:
    """Make the hints of the messages, then those of what comes to light by it, as long as there are any."""
    for _ in range(ROUNDS):
        usable = [p for p in state.left if p.hint and p.mark and (unsafe or not p.hint.lost)]
        made = _made(state, [p for p in usable if p.mark and file in ("", p.mark.file)], budget, unsafe=unsafe)
        if made is None:
            break
        state = made
    return state


def _made(state: Repair, problems: Sequence[Problem], budget: _Budget, *, unsafe: bool) -> Repair | None:
    """Make the hints of problems, of half of them where together they do harm; None where none can be made."""
    text = yaml_hints.apply(state.text, problems)
    if text == state.text or budget.over:
        return None
    left = budget.errors(text)
    if not _harmed(state.left, left) and (unsafe or not differences(state.text, text)):
        hints = [problem.hint for problem in problems if problem.hint]
        return _after(state, text, [hint.told for hint in hints], [hint.lost for hint in hints], left)
    half = len(problems) // 2
    if not half:
        return None
    return _made(state, problems[:half], budget, unsafe=unsafe) or _made(state, problems[half:], budget, unsafe=unsafe)


def _after(state: Repair, text: str, changes: Sequence[str], lost: Sequence[str], left: tuple[Problem, ...]) -> Repair:
    return Repair(
        text=text,
        changes=tuple(dict.fromkeys((*state.changes, *changes))),
        lost=tuple(dict.fromkeys((*state.lost, *filter(None, lost)))),
        left=left,
    )


def _harmed(before: Sequence[Problem], after: Sequence[Problem]) -> bool:
    """Return whether a change broke the text: a fault that wasn't there, or none further down than before."""
    for code in INTRODUCED:
        then = [problem.mark for problem in before if problem.code == code]
        now = [problem.mark for problem in after if problem.code == code]
        if len(now) > len(then):
            return True
        if now and code == "yaml-syntax" and not _further(then[0], now[0]):
            return True
    return False


def _further(then: Mark | None, now: Mark | None) -> bool:
    return bool(then and now and (now.line, now.column) > (then.line, then.column))


def _searched(start: Repair, budget: _Budget, *, file: str, unsafe: bool) -> Repair:
    """Search for the cheapest changes that leave no error; if there are none, those that leave the fewest."""
    serial = count()
    seen = {start.text}
    queue: list[tuple[int, int, Repair]] = []

    def expand(cost: int, base: Repair) -> None:
        for change in candidates(base.text, base.left):
            if budget.over:
                return
            total = cost + change.cost
            if total <= MAX_COST and change.text not in seen and (unsafe or not change.lost):
                seen.add(change.text)
                heapq.heappush(
                    queue, (total, next(serial), _after(base, change.text, [change.told], [change.lost], ()))
                )

    best = start
    expand(0, start)
    while queue and not budget.over:
        cost, _order, tried = heapq.heappop(queue)
        tried = _hinted(replace(tried, left=budget.errors(tried.text)), budget, file=file, unsafe=unsafe)
        if not tried.left:
            return tried
        if len(tried.left) < len(best.left):
            best = tried
        expand(cost, tried)
    return best


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Stages of one kind that are complained about in the same way."""

    problems: tuple[Problem, ...]
    indices: tuple[int, ...]
    blocks: tuple[yaml_edit.Block, ...]

    @property
    def problem(self) -> Problem:
        return self.problems[0]

    @property
    def block(self) -> yaml_edit.Block:
        return self.blocks[0]

    def named(self) -> str:
        others = f" and {len(self.blocks) - 1} more" if len(self.blocks) > 1 else ""
        return f"{_name(self.block)}{others}"

    def set(self, text: str, values: Mapping[str, Any]) -> Iterator[Change]:
        """Yield the change to other values; what says how many bits, of which model, by whom, is lost by it."""
        changed = yaml_edit.change(text, dict.fromkeys(self.indices, values), {})
        if changed is not None:
            told = ", ".join(f"{name}: {_shown(value)}" for name, value in values.items())
            lost = [self.becomes(name, values[name]) for name in (*KEPT, _key(self.block)) if name in values]
            told = f"set {told} in {self.named()}"
            yield Change(cost=SET, told=told, text=changed, lost="; ".join(filter(None, lost)))

    def becomes(self, name: str, value: Any) -> str:
        """Return the clause that an option has another value now; nothing if it is the same."""
        was = _effective(self.block, name)
        if _shown(value) == was:
            return ""
        return f"{name} of {self.named()} {f'was {was} and ' if was else ''}is {_shown(value)} now"

    def removed(self, text: str, cost: int) -> Iterator[Change]:
        changed = yaml_edit.remove_stages(text, self.indices)
        if changed is not None:
            yield Change(cost=cost, told=f"remove {self.named()}", text=changed, lost=f"{self.named()} isn't done")


def _groups(blocks: Sequence[yaml_edit.Block], problems: Sequence[Problem]) -> tuple[_Group, ...]:
    """Put problems of one kind about stages of one kind together."""
    found: dict[tuple[Any, ...], list[tuple[int, Problem]]] = {}
    for problem in problems:
        index = _blamed(problem, blocks)
        if index is None:
            continue
        block = blocks[index]
        option = str(problem.loc[3]) if len(problem.loc) > 3 else ""
        kind = (problem.code, problem.fix, block.verb, block.value(_key(block)), option, block.value(option))
        found.setdefault(kind, []).append((index, problem))
    return tuple(
        _group(blocks, [index for index, _ in each], [problem for _, problem in each]) for each in found.values()
    )


def _group(blocks: Sequence[yaml_edit.Block], indices: Iterable[int], problems: Sequence[Problem] = ()) -> _Group:
    unique = tuple(dict.fromkeys(indices))
    return _Group(problems=tuple(problems), indices=unique, blocks=tuple(blocks[index] for index in unique))


def _blamed(problem: Problem, blocks: Sequence[yaml_edit.Block]) -> int | None:
    """Return the number of the stage that a problem is about."""
    if problem.loc[:1] != ("stages",) or len(problem.loc) < 2:
        return None
    index = problem.loc[1]
    return index if isinstance(index, int) and index < len(blocks) else None


def candidates(text: str, problems: Sequence[Problem]) -> Iterator[Change]:
    """Yield the changes that problems suggest, then the blunt ones."""
    blocks = yaml_edit.stages(text)
    if blocks is None:
        return
    groups = _groups(blocks, problems)
    for group in groups:
        yield from _proposed(text, blocks, group.problem, group)
    grouped = {id(problem) for group in groups for problem in group.problems}
    for problem in problems:
        if id(problem) not in grouped:
            yield from _proposed(text, blocks, problem, None)
    for group in groups:
        yield from _other_values(text, group)
    ordered = yaml_edit.sort_stages(text)
    if ordered is not None:
        yield Change(cost=SORT, told="put the stages in order", text=ordered)
    yield from _blunt(text, blocks, groups)


def _proposed(
    text: str, blocks: Sequence[yaml_edit.Block], problem: Problem, blamed: _Group | None
) -> Iterator[Change]:
    """Yield what a rule's own row proposes, for the stages blamed or else for the last one of the verb it names."""
    for verb, options in problem.repair.items():
        last = [index for index, block in enumerate(blocks) if block.verb == verb][-1:]
        group = blamed if blamed and blamed.block.verb == verb else _group(blocks, last) if last else None
        if group and not options:
            yield from group.removed(text, SET)
        elif group:
            for values in _combinations(options, group.block):
                yield from group.set(text, values)


def _combinations(options: Mapping[str, Any], block: yaml_edit.Block) -> Iterator[dict[str, Any]]:
    """Yield every choice among the values proposed, what is nearest to the written values first."""

    def ordered(name: str, proposed: Any) -> list[Any]:
        values = proposed if isinstance(proposed, tuple) else (proposed,)
        return sorted(values, key=lambda value: _distance(value, block.value(name)))

    for chosen in product(*(ordered(name, proposed) for name, proposed in options.items())):
        yield dict(zip(options, chosen, strict=True))


def _other_values(text: str, group: _Group) -> Iterator[Change]:
    """Yield other values of the option that is complained about: numbers are safe, words and truth values aren't."""
    if len(group.problem.loc) < 4:
        return
    name, block = str(group.problem.loc[3]), group.block
    for value in _values(block, name):
        for change in group.set(text, {name: value}):
            word = isinstance(value, (str, bool))
            yield replace(change, lost=change.lost or (group.becomes(name, value) if word else ""))
    dropped = yaml_edit.change(text, {}, dict.fromkeys(group.indices, (name,)))
    if block.entry(name) is not None and dropped is not None:
        told = f"leave {name} of {group.named()} at its default"
        yield Change(cost=SET, told=told, text=dropped, lost=f"{name} of {group.named()} goes")


def _blunt(text: str, blocks: Sequence[yaml_edit.Block], groups: Sequence[_Group]) -> Iterator[Change]:
    """Yield other methods and fewer stages: first of those complained about, together and alone, then of the others."""
    together = dict.fromkeys(group.indices for group in groups)
    alone = dict.fromkeys((index,) for indices in together for index in indices)
    others = [(index,) for index in range(len(blocks)) if (index,) not in alone]
    for indices in (*dict.fromkeys((*together, *alone)), *others):
        group = _group(blocks, indices)
        more = ELSEWHERE if indices in others else 0
        yield from _methods(text, group, more)
        yield from group.removed(text, REMOVE + more)


def _methods(text: str, group: _Group, more: int) -> Iterator[Change]:
    """Yield other methods of a verb: options that they don't have go."""
    block, key = group.block, _key(group.block)
    for method in registry().get(block.verb, ()):
        if method == block.value(key):
            continue
        known = {*load(block.verb, method).Options.model_fields, key, "backend"}
        gone = [name for name in block.written if name not in known]
        values = {index: {key: method} for index in group.indices}
        changed = yaml_edit.change(text, values, dict.fromkeys(group.indices, tuple(gone)))
        if changed is not None:
            was = block.value(key) or f"no {key}"
            lost = "; ".join([f"{group.named()} becomes {method}", *(f"its {name} goes" for name in gone)])
            told = f"use {method} instead of {was}"
            yield Change(cost=METHOD + more + len(gone), told=told, text=changed, lost=lost)


def _values(block: yaml_edit.Block, name: str) -> Iterator[Any]:
    """Yield other values of an option, from its type: choices, the other truth value, smaller numbers."""
    key = _key(block)
    if block.value(key) not in registry().get(block.verb, ()):
        return
    field = load(block.verb, str(block.value(key))).Options.model_fields.get(name)
    if field is None:
        return
    written = _effective(block, name)
    kind = field.annotation
    if get_origin(kind) is not None:
        choices = [choice for choice in get_args(kind) if isinstance(choice, (str, int)) and str(choice) != written]
        yield from sorted(choices, key=lambda choice: _distance(choice, written))
    elif kind is bool:
        yield written != "true"
    elif kind is int and written is not None and written.isdigit():
        yield from _halved(int(written))


def _effective(block: yaml_edit.Block, name: str) -> str | None:
    """Return an option as it is written, or its default as it would be."""
    written = block.value(name)
    method = block.value(_key(block))
    if written is not None or method not in registry().get(block.verb, ()):
        return written
    field = load(block.verb, str(method)).Options.model_fields.get(name)
    return None if field is None or field.default is None else _shown(field.default)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else yaml_edit.scalar(value)


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


def _key(block: yaml_edit.Block) -> str:
    return method_key(block.verb)


def _name(block: yaml_edit.Block) -> str:
    method = block.value(_key(block))
    return f"{block.verb} ({method})" if method else block.verb
