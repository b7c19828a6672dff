"""`vars:` and `${name}`: one level of names for scalars. No environment, no expressions, no code.

A value that is `${name}` and nothing else keeps the variable's type; inside other text the variable's source text is
put in (`0.10` stays `0.10`). `$${` stands for the characters `${`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from optikit.problems import Mark, Problem, did_you_mean
from optikit.recipe.node import Node

MAX_CHARACTERS = 2**20
"""Bound on the text that all uses of variables together may put in."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_USE = re.compile(r"\$\$\{|\$\{([^}]*)\}?")


def substitute(root: Node) -> tuple[Node, tuple[Problem, ...]]:
    """Return the recipe without `vars:` and with every use replaced, and the problems of those that could not be."""
    if not isinstance(root.value, dict):
        return root, ()
    entries = dict(root.value)
    vars_node = entries.pop("vars", None)
    variables, problems = _definitions(vars_node) if vars_node else ({}, [])
    substitution = _Substitution(variables=variables, problems=problems)
    return replace(root, value={key: substitution.walk(child) for key, child in entries.items()}), tuple(problems)


def _definitions(node: Node) -> tuple[dict[str, Node], list[Problem]]:
    if not isinstance(node.value, dict):
        message = "vars must be a mapping of names to values"
        return {}, [Problem(code="bad-variable", message=message, fix="write `vars: {name: value}`", mark=node.place)]
    problems = []
    for name, value in node.value.items():
        if not _NAME.fullmatch(name):
            message = f"{name!r} is no name for a variable"
            fix = "use letters, digits, '_' and '-', a letter first"
            problems.append(Problem(code="bad-variable", message=message, fix=fix, mark=value.key))
        elif isinstance(value.value, dict | tuple) or value.value is None:
            message = f"variable {name!r} must be a number, text, true or false"
            fix = "repeat lists and mappings with a YAML anchor (&name, *name)"
            problems.append(Problem(code="bad-variable", message=message, fix=fix, mark=value.place))
        elif isinstance(value.value, str) and "${" in value.value:
            message = f"variable {name!r} can't hold another: it contains '${{'"
            problems.append(Problem(code="bad-variable", message=message, fix="write its value out", mark=value.mark))
    return dict(node.value), problems


@dataclass(kw_only=True)
class _Substitution:
    variables: Mapping[str, Node]
    problems: list[Problem]
    characters: int = field(default=0)

    def walk(self, node: Node) -> Node:
        """Return the tree with every `${name}` replaced."""
        if isinstance(node.value, dict):
            return replace(node, value={key: self.walk(child) for key, child in node.value.items()})
        if isinstance(node.value, tuple):
            return replace(node, value=tuple(self.walk(child) for child in node.value))
        if not isinstance(node.value, str) or "${" not in node.value:
            return node
        whole = _USE.fullmatch(node.value)
        if whole and whole[1] is not None and whole[0].endswith("}"):
            used = self._used(whole, node.mark)
            return replace(node, value=used.value, source=used.source) if used else node
        return replace(node, value=_USE.sub(lambda match: self._text(match, node.mark), node.value))

    def _text(self, match: re.Match[str], mark: Mark) -> str:
        if match[1] is None:
            return "${"
        used = self._used(match, mark)
        return used.source if used else match[0]

    def _used(self, match: re.Match[str], mark: Mark) -> Node | None:
        """Return the variable that is meant, or note the problem."""
        name = match[1]
        if not match[0].endswith("}"):
            self._problem("bad-variable", "'${' is never closed", "add '}', or write $${ for the characters", mark)
        elif not _NAME.fullmatch(name):
            fix = "only names from `vars:` can stand there; write $${ for the characters"
            self._problem("bad-variable", f"{name!r} is no name of a variable", fix, mark)
        elif name not in self.variables:
            fix = did_you_mean(name, self.variables) or f"define it: `vars: {{{name}: …}}`"
            self._problem("unknown-variable", f"variable {name!r} is not defined in vars", fix, mark)
        else:
            return self._counted(self.variables[name], mark)
        return None

    def _counted(self, variable: Node, mark: Mark) -> Node | None:
        before = self.characters
        self.characters += len(variable.source)
        if self.characters <= MAX_CHARACTERS:
            return variable
        if before <= MAX_CHARACTERS:
            message = f"variables expand to more than {MAX_CHARACTERS} characters"
            self._problem("too-large", message, "use shorter values", mark)
        return None

    def _problem(self, code: str, message: str, fix: str, mark: Mark) -> None:
        self.problems.append(Problem(code=code, message=message, fix=fix, mark=mark))
