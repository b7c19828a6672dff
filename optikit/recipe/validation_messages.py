"""pydantic's validation errors as problems: plain sentences with the value, the bound or the choices, and one fix."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ValidationError

from optikit.problems import Hint, Loc, Problem, did_you_mean, misspelt
from optikit.recipe.node import Marks
from optikit.recipe.yaml12 import resolve
from optikit.rules import foreign_words

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

KINDS: Mapping[str, str] = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
}
"""What a value must be, by pydantic's error type."""

BOUNDS: Mapping[str, tuple[str, str]] = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "above"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "below"),
    "multiple_of": ("multiple_of", "a multiple of"),
}
"""pydantic's error type → key of the bound in its context, word before the bound."""


def complaints(error: ValidationError, model: type[BaseModel], marks: Marks, at: Loc = ()) -> tuple[Problem, ...]:
    """Return the problems behind a validation error, each at its place.

    Args:
        error: What pydantic found.
        model: The class that refused the data.
        marks: The recipe, for places.
        at: Path of the data inside the recipe.
    """
    schema = model.model_json_schema()
    by_loc: dict[Loc, list[Problem]] = {}
    for details in error.errors(include_url=False):
        loc = (*at, *details["loc"])
        if details["type"] != "missing":
            loc = marks.reach(loc)  # the branches of a union add their names to the path, and complain one by one
        problem = _problem(details, loc[len(at) :], schema, _Around(marks, at, loc))
        mark = marks.key(loc) if problem.code == "unknown-key" else marks.mark(loc)
        by_loc.setdefault(loc, []).append(replace(problem, loc=loc, mark=mark))
    return tuple(_either(problems) for problems in by_loc.values())


def _either(problems: list[Problem]) -> Problem:
    first = problems[0]
    if len(problems) == 1:
        return first
    message = "; or: ".join(dict.fromkeys(problem.message for problem in problems))
    fix = next((problem.fix for problem in problems if problem.fix), "")
    hint = next((problem.hint for problem in problems if problem.hint), None)
    return replace(first, message=message, fix=fix, hint=hint)


@dataclass(frozen=True)
class _Around:
    """Where in the recipe a value stands: the tree, the path of the data that was checked, the path of the value."""

    marks: Marks
    at: Loc
    loc: Loc

    @property
    def source(self) -> str:
        """The value as it is written, without quotes."""
        return self.marks.find(self.loc).source

    @property
    def places(self) -> tuple[str, ...]:
        """Names of the mapping that the value stands in, for other tools' words: the most exact first."""
        if len(self.at) != 3:
            return (".".join(part for part in self.loc[:-1] if isinstance(part, str)) or foreign_words.TOP,)
        verb = str(self.at[2])
        key = self.marks.find((*self.at, "engine" if verb == "compile" else "method"))
        return (f"{verb}.{key.value}", verb)


@dataclass(frozen=True, kw_only=True)
class _Finding:
    """One error of pydantic's, and the JSON Schema of the class that raised it."""

    kind: str
    loc: Loc
    value: Any
    context: Mapping[str, Any]
    text: str
    schema: dict[str, Any]
    around: _Around

    @property
    def subject(self) -> str:
        """What the sentence is about: the last key of the path, with indices."""
        names = [i for i, part in enumerate(self.loc) if isinstance(part, str)]
        tail = self.loc[names[-1] :] if names else self.loc
        return "".join(f"[{part}]" if isinstance(part, int) else str(part) for part in tail) or "the recipe"

    @property
    def own_schema(self) -> dict[str, Any]:
        """The JSON Schema of the value itself."""
        return schema_at(self.schema, self.loc)


def _problem(details: ErrorDetails, loc: Loc, schema: dict[str, Any], around: _Around) -> Problem:
    finding = _Finding(
        kind=details["type"],
        loc=loc,
        value=details["input"],
        context=details.get("ctx") or {},
        text=details["msg"],
        schema=schema,
        around=around,
    )
    return Problem(**_SENTENCES.get(finding.kind, _other)(finding)._asdict())


class Sentence(NamedTuple):
    """What is said of an error: code, message, fix, and the fix as an edit of the text."""

    code: str
    message: str
    fix: str
    hint: Hint | None = None


RENAMED = {
    "judged": "eval_prompts",
    "judged_part": "eval_part",
    "remember": "datastore_answers",
    "most_tokens": "max_tokens",
}
"""Keys that were called otherwise in earlier versions."""


def _unknown_key(finding: _Finding) -> Sentence:
    known = schema_at(finding.schema, finding.loc[:-1]).get("properties", {})
    name = str(finding.loc[-1])
    message = f"unknown key {name!r}"
    today = RENAMED.get(name, "")
    if today in known:
        return Sentence("unknown-key", message, f"it is called {today!r} now", rename(name, today))
    word = foreign_words.find(finding.around.places, name, known)
    if word is not None:
        hint = None if word.told else word.hint(finding.value) or _dropped(name)
        return Sentence("unknown-key", message, word.fix(), hint)
    meant = misspelt(name, known)
    hint = rename(name, meant) if meant else _dropped(name)
    return Sentence("unknown-key", message, did_you_mean(name, known) or "remove it", hint)


def rename(name: str, meant: str) -> Hint:
    """Return the edit that writes a word as it is meant."""
    return Hint(edit="write", text=meant, told=f"write {meant!r} instead of {name!r}")


def _dropped(name: str) -> Hint:
    return Hint(edit="drop", told=f"leave out {name!r}", lost=f"{name!r} goes, whatever it was to do")


def _missing(finding: _Finding) -> Sentence:
    if isinstance(finding.loc[-1], int):
        parent = replace(finding, loc=finding.loc[:-1])
        return _length(replace(parent, context={"actual_length": len(finding.value)}))
    name = finding.subject
    about = " ".join(str(finding.own_schema.get("description", "")).split())
    fix = f"add `{name}: …`" + (f" ({about.rstrip('.')})" if about else "")
    return Sentence("missing-key", f"missing key {name!r}", fix)


def _wrong_type(finding: _Finding) -> Sentence:
    if finding.value is None:
        message = f"{finding.subject} must be {KINDS[finding.kind]}, but has no value"
        return Sentence("wrong-type", message, "write a value, or remove the key")
    message = f"{finding.subject} must be {KINDS[finding.kind]}, not {shown(finding.value)}"
    fix, text = _typed(finding)
    return Sentence("wrong-type", message, fix, _value_hint(finding, text))


def _value_hint(finding: _Finding, text: str) -> Hint | None:
    told = f"write {finding.subject}: {text} instead of {shown(finding.value)}"
    return Hint(edit="write", text=text, told=told) if text else None


def _typed(finding: _Finding) -> tuple[str, str]:
    """Return the fix for a value of the wrong type, and the same value as it should be written, "" if nobody knows."""
    wanted, value = KINDS[finding.kind], finding.value
    if wanted == "text":
        return _quoted(finding)
    if wanted == "a list" and isinstance(value, str | int | float):
        return f"write [{value}]", f"[{json.dumps(value, ensure_ascii=False)}]"
    if wanted == "a mapping of keys" and _is_gate(finding):
        return f"write {{max: {value}}}, or {{min: {value}}}", ""
    text = _plain(wanted, value)
    if text and isinstance(value, str) and "number" in wanted:
        return "remove the quotes", text
    return f"write {text or wanted}", text


def _quoted(finding: _Finding) -> tuple[str, str]:
    if not isinstance(finding.value, int | float):
        return "write one text", ""
    quoted = json.dumps(finding.around.source or str(finding.value))
    return f"put it in quotes: {quoted}", quoted


def _is_gate(finding: _Finding) -> bool:
    return finding.around.loc[0] == "gates" and isinstance(finding.value, int | float)


def _plain(wanted: str, value: Any) -> str:
    """Return how a value that is surely meant to be a boolean or a number is written, or ""."""
    if isinstance(value, str) and wanted == "true or false":
        return _BOOLEANS.get(value.lower(), "")
    if isinstance(value, str) and "number" in wanted:
        return value.strip() if _fits(wanted, _resolved(value.strip())) else ""
    if wanted == "a whole number" and isinstance(value, float) and value.is_integer():
        return str(int(value))
    return ""


def _fits(wanted: str, number: Any) -> bool:
    return type(number) is int or (type(number) is float and wanted != "a whole number")


_BOOLEANS = {
    **dict.fromkeys(("yes", "on", "y", "true"), "true"),
    **dict.fromkeys(("no", "off", "n", "false"), "false"),
}
"""What YAML 1.1 or quotes make of a boolean."""


def _resolved(text: str) -> Any:
    try:
        return resolve(text)
    except ValueError:
        return None


def _out_of_range(finding: _Finding) -> Sentence:
    key, word = BOUNDS[finding.kind]
    bound = finding.context[key]
    message = f"{finding.subject} must be {word} {_bound(bound)}, not {shown(finding.value)}"
    return Sentence("out-of-range", message, _range(finding.own_schema) or f"write a number {word} {_bound(bound)}")


def _range(schema: Mapping[str, Any]) -> str:
    """Return the whole range as a fix, where it has both ends."""
    low, high = (
        next((key for key in keys if key in schema), None)
        for keys in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"))
    )
    if low is None or high is None:
        return ""
    start = f"{'above' if 'exclusive' in low else 'at least'} {_bound(schema[low])}"
    end = f"{'below' if 'exclusive' in high else 'at most'} {_bound(schema[high])}"
    return f"write a number {start} and {end}"


def _bound(value: float) -> str:
    """Return a bound of a number, without `.0`."""
    return str(int(value)) if float(value).is_integer() else str(value)


def _length(finding: _Finding) -> Sentence:
    wanted = finding.own_schema
    low, high = wanted.get("minItems", 0), wanted.get("maxItems")
    actual = finding.context.get("actual_length", 0)
    need = f"{low} values" if low == high else f"at least {low} values" if actual < low else f"at most {high} values"
    return Sentence("wrong-length", f"{finding.subject} must have {need}, not {actual}", f"write {need}")


def _too_short(finding: _Finding) -> Sentence:
    least = finding.context["min_length"]
    need = "not be empty" if least == 1 else f"have at least {least} characters"
    return Sentence("out-of-range", f"{finding.subject} must {need}", "write more, or remove the key")


def _choice(finding: _Finding) -> Sentence:
    schema = finding.own_schema
    choices = [str(choice) for choice in schema.get("enum", [schema["const"]] if "const" in schema else [])]
    message = f"{finding.subject} can't be {shown(finding.value)}"
    fix, meant = "", None
    if isinstance(finding.value, str):
        fix = "remove the quotes" if finding.value in choices else did_you_mean(finding.value, choices)
        meant = finding.value if finding.value in choices else misspelt(finding.value, choices)
    fix = fix or f"choose from {', '.join(choices) or finding.context.get('expected', '')}"
    return Sentence("bad-choice", message, fix, _value_hint(finding, meant or ""))


def _own_words(finding: _Finding) -> Sentence:
    """A validator of ours said it: a sentence, and after a semicolon the fix."""
    message, _, fix = str(finding.context.get("error", finding.text)).partition("; ")
    return Sentence("bad-value", message, fix)


def _other(finding: _Finding) -> Sentence:
    return Sentence(
        "bad-value",
        f"{finding.subject}: {finding.text}, not {shown(finding.value)}",
        "`optikit schema` says what it may be",
    )


_SENTENCES: Mapping[str, Callable[[_Finding], Sentence]] = {
    **dict.fromkeys(KINDS, _wrong_type),
    **dict.fromkeys(BOUNDS, _out_of_range),
    "extra_forbidden": _unknown_key,
    "missing": _missing,
    "literal_error": _choice,
    "too_long": _length,
    "too_short": _length,
    "string_too_short": _too_short,
    "value_error": _own_words,
}


def shown(value: Any) -> str:
    """Return a value as a message shows it: short, text in quotes, YAML's words.

    >>> shown("4"), shown(True), shown(None), shown([1, 2]), shown("x" * 80)[-5:]
    ("'4'", 'true', 'null', 'a list', "xxx…'")
    """
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:59] + "…")
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list) else str(value).replace("inf", ".inf").replace("nan", ".nan")


def schema_at(schema: Mapping[str, Any], loc: Loc) -> dict[str, Any]:
    """Return the part of a JSON Schema that describes the value at `loc`; empty where it says nothing."""
    node = _target(schema, schema)
    for part in loc:
        if isinstance(part, int):
            fixed = node.get("prefixItems", [])
            inner = fixed[part] if part < len(fixed) else node.get("items")
        else:
            inner = node.get("properties", {}).get(part, node.get("additionalProperties"))
        if not isinstance(inner, dict):
            return {}
        node = _target(schema, inner)
    return node


def _target(root: Mapping[str, Any], node: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a schema refers to, or what it is when it isn't null, with its own words on top."""
    outer = {key: value for key, value in node.items() if key not in {"$ref", "anyOf", "allOf"}}
    if "$ref" in node:
        return _target(root, root["$defs"][node["$ref"].rsplit("/", 1)[-1]]) | outer
    branches = [b for b in node.get("anyOf", node.get("allOf", [])) if b.get("type") != "null"]
    return (_target(root, branches[0]) if len(branches) == 1 else {}) | outer
