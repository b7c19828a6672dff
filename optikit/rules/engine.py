"""The rules: rows of compat.toml, read once; `check` says which of them a stack breaks.

What a rule ranges over follows from the words it uses: `first`/`second` make it one of pairs of stages, `stage` one of
single stages; otherwise it is asked once of the whole stack.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import resources
from typing import Any, Literal, get_args

from optikit.problems import Level, Loc, Problem
from optikit.rules import stack as view
from optikit.rules.conditions import All, Condition, Question, fields, holds, lookup, parse
from optikit.rules.stack import Scope, Stack
from optikit.rules.vocabulary import unknown

_PLACES = re.compile(r"\{([\w.-]+)\}")
Range = Literal["pair", "stage", "stack"]
SAME = ("target.device", "serve.engine")
"""Words that most rules ask for and that are the same for all of a stack: what they rule out isn't asked further."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One row.

    Attributes:
        id: Stable name; `optikit explain ID` prints the row.
        when: The condition that makes it a problem.
        level: Errors refuse the recipe, warnings are printed.
        why: Message; `{field}` is replaced by the field's value.
        fix: The smallest change that helps; a template too.
        source: Documentation, paper or source file behind it.
        date: When that was read, ISO 8601.
        at: Option of the stage that the problem points at, or a path from the top of the recipe (`target`).
        repair: Options by verb that mend it, for `nearest`: {"compile": {"batch_size": 1}}; "$field" stands for each of
            that field's values.
    """

    id: str
    when: Condition
    level: Level
    why: str
    fix: str
    source: str
    date: str
    at: str = ""
    repair: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    @cached_property
    def range(self) -> Range:
        """What the rule is asked of."""
        roots = {path.split(".")[0] for path in fields(self.when)}
        if roots & {"first", "second"}:
            return "pair"
        return "stage" if "stage" in roots else "stack"

    @cached_property
    def wanted(self) -> tuple[tuple[str, tuple[Any, ...]], ...]:
        """What has to be said by words of `SAME`, of whatever the rule is asked, if it is to hold."""
        parts = self.when.parts if isinstance(self.when, All) else (self.when,)
        asked = (part for part in parts if isinstance(part, Question) and part.path in SAME)
        operands = ((each.path, each.operator, each.operand) for each in asked if each.operator in ("is", "in"))
        return tuple(
            (path, tuple(operand) if operator == "in" else (operand,))
            for path, operator, operand in operands
            if not str(operand).startswith("$")
        )


def _rule(row: Mapping[str, Any]) -> Rule:
    rule = Rule(**{**row, "when": parse(row["when"])})
    if rule.level not in get_args(Level):
        raise ValueError(f"rule {rule.id}: unknown level {rule.level!r}")
    proposed = [value for options in rule.repair.values() for value in options.values() if isinstance(value, str)]
    named = [value[1:] for value in proposed if value.startswith("$")]
    for path in (*fields(rule.when), *_PLACES.findall(rule.why), *_PLACES.findall(rule.fix), *named):
        if unknown(path):
            raise ValueError(f"rule {rule.id}: unknown word {path!r}")
    return rule


@cache
def rules() -> Mapping[str, Rule]:
    """Return every rule by id, in the order of the file.

    Raises:
        ValueError: Two rows share an id, or a row is malformed: a fault of the package, found by its tests.
    """
    text = resources.files("optikit.rules").joinpath("compat.toml").read_text(encoding="utf-8")
    read: dict[str, Rule] = {}
    for row in tomllib.loads(text)["rule"]:
        rule = _rule(row)
        if rule.id in read:
            raise ValueError(f"rule {rule.id}: the id is taken")
        read[rule.id] = rule
    return read


def packages() -> tuple[str, ...]:
    """Return the distributions of the main environment whose versions some rule asks for."""
    asked = (path for rule in rules().values() for path in fields(rule.when))
    return tuple(sorted({path.removeprefix("package.") for path in asked if path.startswith("package.")}))


def check(stack: Stack) -> Iterator[Problem]:
    """Yield every rule that the stack breaks, as problems whose `loc` points into the recipe. Pure."""
    common = view.common(stack)
    ranges: Mapping[Range, Callable[[Stack], Iterator[tuple[Scope, Loc]]]] = {
        "pair": view.pairs,
        "stage": view.stages,
        "stack": lambda _: iter([({}, ())]),
    }
    subjects = {name: [({**common, **own}, loc) for own, loc in items(stack)] for name, items in ranges.items()}
    said = {path: lookup(common, path) for path in SAME}
    for rule in rules().values():
        if any(said[path] not in values for path, values in rule.wanted):
            continue
        for scope, loc in subjects[rule.range]:
            if holds(rule.when, scope) is True:
                yield _problem(rule, scope, _place(rule, loc, stack))


def _problem(rule: Rule, scope: Scope, loc: Loc) -> Problem:
    return Problem(
        code=rule.id,
        message=fill(rule.why, scope),
        fix=fill(rule.fix, scope),
        loc=loc,
        level=rule.level,
        source=rule.source,
        repair={
            verb: {name: _values(value, scope) for name, value in options.items()}
            for verb, options in rule.repair.items()
        },
    )


def _values(value: Any, scope: Scope) -> Any:
    """Replace "$field" by the field's values."""
    return tuple(sorted(lookup(scope, value[1:]) or ())) if isinstance(value, str) and value.startswith("$") else value


def _place(rule: Rule, loc: Loc, stack: Stack) -> Loc:
    """Return the path of the value to blame: an option of a stage, what names the server, or a key of the recipe."""
    if loc:
        return (*loc, rule.at) if rule.at else loc
    if rule.at.startswith("serve"):
        option = rule.at.partition(".")[2]
        if stack.compiled is None or not stack.loads_compiled or (stack.server and option in stack.serve):
            return (*stack.server, option) if option in stack.serve and option != "engine" else stack.server
        index, stage = stack.compiled
        return ("stages", index, "compile", option) if option in stage.options else ("stages", index, "compile")
    return tuple(rule.at.split(".")) if rule.at else ()


def fill(template: str, scope: Scope) -> str:
    """Put fields' values into a template.

    >>> fill("{stage.options.bits} bits", {"stage": {"options": {"bits": 4}}})
    '4 bits'
    """
    return _PLACES.sub(lambda match: _shown(lookup(scope, match[1])), template)


def _shown(value: Any) -> str:
    if isinstance(value, (set, frozenset, list, tuple)):
        ordered = sorted(value) if all(isinstance(item, int) for item in value) else sorted(map(str, value))
        return ", ".join(map(str, ordered)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "unknown" if value is None else str(value)
