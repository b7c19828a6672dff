"""Conditions as data: a small closed vocabulary, three-valued, no Python and no eval.

A condition is a TOML table. Its keys are fields (`target.device`), its values either a plain value (equality), an array
(one of), or a table of operators; all of them must hold. `all`, `any` and `not` combine conditions. An operand that
starts with `$` is another field. A field that isn't known makes a question unknown, and unknown is never true: not even
under `not`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from optikit.rules.stack import Scope


def _version(value: Any, specifiers: Any) -> bool:
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    return SpecifierSet(specifiers).contains(Version(str(value)), prereleases=True)


OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = MappingProxyType(
    {
        "is": lambda value, operand: value == operand,
        "is_not": lambda value, operand: value != operand,
        "in": lambda value, operand: value in operand,
        "not_in": lambda value, operand: value not in operand,
        "lt": lambda value, operand: value < operand,
        "le": lambda value, operand: value <= operand,
        "gt": lambda value, operand: value > operand,
        "ge": lambda value, operand: value >= operand,
        "divisible_by": lambda value, operand: value % operand == 0,
        "not_divisible_by": lambda value, operand: value % operand != 0,
        "divides": lambda value, operand: operand % value == 0,
        "has": lambda value, operand: not set(operand).isdisjoint(value),
        "has_all": lambda value, operand: set(operand).issubset(value),
        "lacks": lambda value, operand: set(operand).isdisjoint(value),
        "version": _version,
    }
)
"""What may be asked of a field. `has`, `has_all` and `lacks` are for sets, `version` takes PEP 440 specifiers."""

_ALWAYS: Mapping[str, Callable[[Any], bool]] = MappingProxyType(
    {"set": lambda value: value is not None, "on": lambda value: value is True}
)
"""What may be asked of a field that isn't known: whether it is, and whether a switch is on."""


@dataclass(frozen=True)
class Question:
    """One question about one field."""

    path: str
    operator: str
    operand: Any


@dataclass(frozen=True)
class All:
    """Every part holds."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True)
class AnyOf:
    """At least one part holds."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True)
class Not:
    """The part doesn't hold."""

    part: Condition


Condition = Question | All | AnyOf | Not


def lookup(scope: Scope, path: str) -> Any:
    """Return the value of a dotted field, or None where it isn't known.

    >>> lookup({"target": {"device": "cpu"}}, "target.device")
    'cpu'
    >>> lookup({"target": {}}, "target.cores") is None
    True
    """
    value: Any = scope
    for part in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def parse(table: Mapping[str, Any], prefix: str = "") -> Condition:
    """Read a condition from a TOML table.

    Raises:
        ValueError: A table asks nothing, or a connective isn't an array (`not`: a table).

    >>> parse({"target": {"device": "cpu"}, "final": {"heads": {"not_divisible_by": "$serve.tensor_parallel"}}})
    ... # doctest: +ELLIPSIS
    All(parts=(Question(path='target.device', operator='is', operand='cpu'), Question(path='final.heads', ...
    """
    parts = [part for key, value in table.items() for part in _entry(prefix, key, value)]
    if not parts:
        raise ValueError(f"empty condition at {prefix or 'the top'}")
    return parts[0] if len(parts) == 1 else All(tuple(parts))


def _entry(prefix: str, key: str, value: Any) -> list[Condition]:
    if not prefix and key in {"all", "any"}:
        parts = tuple(parse(part) for part in value)
        return [All(parts) if key == "all" else AnyOf(parts)]
    if not prefix and key == "not":
        return [Not(parse(value))]
    path = f"{prefix}.{key}" if prefix else key
    if not isinstance(value, Mapping):
        return [Question(path, "in" if isinstance(value, list) else "is", value)]
    if set(value) <= {*OPERATORS, *_ALWAYS}:
        return [Question(path, operator, operand) for operator, operand in value.items()]
    return [parse(value, path)]


def holds(condition: Condition, scope: Scope) -> bool | None:
    """Decide a condition: True, False, or None where a field that matters isn't known."""
    match condition:
        case Question():
            return _answer(condition, scope)
        case Not(part):
            verdict = holds(part, scope)
            return None if verdict is None else not verdict
        case All(parts):
            return _of(parts, scope, decisive=False)
        case AnyOf(parts):
            return _of(parts, scope, decisive=True)


def _of(parts: tuple[Condition, ...], scope: Scope, *, decisive: bool) -> bool | None:
    """Decide parts in order until one decides for all; what isn't known leaves it open."""
    verdict: bool | None = not decisive
    for part in parts:
        found = holds(part, scope)
        if found is decisive:
            return decisive
        if found is None:
            verdict = None
    return verdict


def _answer(question: Question, scope: Scope) -> bool | None:
    value = lookup(scope, question.path)
    if question.operator in _ALWAYS:
        return _ALWAYS[question.operator](value) is question.operand
    operand = question.operand
    if isinstance(operand, str) and operand.startswith("$"):
        operand = lookup(scope, operand[1:])
    if value is None or operand is None:
        return None
    try:
        return OPERATORS[question.operator](value, operand)
    except (
        TypeError,
        ValueError,
        ZeroDivisionError,
        AttributeError,
    ):  # an option of another type than the rule speaks about
        return None


def questions(condition: Condition) -> tuple[Question, ...]:
    """Return every question of a condition."""
    match condition:
        case Question():
            return (condition,)
        case Not(part):
            return questions(part)
        case All(parts) | AnyOf(parts):
            return tuple(question for part in parts for question in questions(part))


def fields(condition: Condition) -> frozenset[str]:
    """Return every field that a condition mentions, operands included."""
    asked = questions(condition)
    named = (question.operand for question in asked if isinstance(question.operand, str))
    return frozenset({question.path for question in asked} | {name[1:] for name in named if name.startswith("$")})


def describe(condition: Condition, *, negated: bool = False) -> list[str]:
    """Return a condition as lines of words, for people.

    >>> describe(parse({"target": {"device": "neuron"}, "final": {"heads": {"not_divisible_by": "$serve.n"}}}))
    ['target.device is neuron', 'final.heads not divisible by serve.n']
    """
    match condition:
        case Question(path, operator, operand):
            words = _words(path, operator, operand)
            return [f"not ({words})" if negated else words]
        case All(parts) if not negated:
            return [line for part in parts for line in describe(part)]
        case Not(part) if not negated:
            return describe(part, negated=True)
        case Not(part):
            return describe(part)
        case AnyOf(parts) | All(parts):
            joint = " or " if isinstance(condition, AnyOf) else " and "
            inner = joint.join("(" + " and ".join(describe(part)) + ")" for part in parts)
            return [f"not ({inner})" if negated else inner]


def _words(path: str, operator: str, operand: Any) -> str:
    if operator == "set":
        return f"{path} is {'known' if operand else 'not given'}"
    if operator == "on":
        return f"{path} is {'on' if operand else 'not on'}"
    shown = operand[1:] if isinstance(operand, str) and operand.startswith("$") else operand
    if isinstance(shown, list):
        shown = ", ".join(map(str, shown))
    return f"{path} {operator.replace('_', ' ')} {str(shown).lower() if isinstance(shown, bool) else shown}"
