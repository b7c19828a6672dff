"""The resolved tree against the schema: `Recipe`, or every problem.

Values are checked strictly, as JSON would be: `"4"` is not a number and `yes` is not a boolean. The options of a stage
are checked by the stage module's own `Options`.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from optikit import stages
from optikit.deploy.servers import SERVERS
from optikit.problems import Hint, Loc, Problem, did_you_mean, misspelt
from optikit.recipe.node import Marks, Node, plain
from optikit.recipe.schema import GATE_METRICS, Recipe, ServeEntry, StageEntry
from optikit.recipe.validation_messages import complaints, rename, shown
from optikit.rules import foreign_words
from optikit.stages import REFUSED

_Model = TypeVar("_Model", bound=BaseModel)


class _Bad(Exception):  # noqa: N818 - a problem on its way to the list of all problems
    def __init__(self, code: str, message: str, fix: str, loc: Loc, hint: Hint | None = None, **more: Any) -> None:
        super().__init__(message)
        self.problem = Problem(code=code, message=message, fix=fix, loc=loc, hint=hint, **more)


def check(root: Node) -> tuple[Recipe | None, tuple[Problem, ...]]:
    """Validate a resolved recipe.

    Args:
        root: A mapping without `extends` and `vars`.

    Returns:
        The recipe, or None with every problem at its place.
    """
    marks = Marks(root)
    data: dict[str, Any] = plain(root)
    written = root.child("stages")
    servers = root.child("serve")
    data.pop("stages", None)
    data.pop("serve", None)
    problems: list[Problem] = []
    recipe = _validated(Recipe, data, marks, (), problems)
    problems += _gates(marks)
    entries = _stages(written, marks, problems) if written is not None else ()
    serve = _serve(servers, marks, problems) if servers is not None else ()
    if recipe is None or problems:
        return None, tuple(problems)
    return recipe.model_copy(update={"stages": entries, "serve": serve}), ()


def section(root: Node, model: type[_Model], name: str) -> tuple[_Model | None, tuple[Problem, ...]]:
    """Return one section of a recipe, checked; where it isn't written, its defaults."""
    problems: list[Problem] = []
    written = root.child(name)
    found = _validated(model, plain(written) if written else {}, Marks(root), (name,), problems)
    return found, tuple(problems)


def _validated(
    model: type[_Model], data: dict[str, Any], marks: Marks, at: Loc, problems: list[Problem]
) -> _Model | None:
    try:
        return model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        problems += complaints(error, model, marks, at)
        return None


def _gates(marks: Marks) -> list[Problem]:
    gates = marks.root.child("gates")
    names = gates.value if gates is not None and isinstance(gates.value, dict) else {}
    return [
        Problem(
            code="unknown-gate",
            message=f"unknown metric {name!r}",
            fix=did_you_mean(name, GATE_METRICS),
            loc=("gates", name),
            mark=marks.key(("gates", name)),
            hint=_meant(name, GATE_METRICS),
        )
        for name in names
        if name not in GATE_METRICS
    ]


def _meant(word: str, choices: Collection[str]) -> Hint | None:
    """Return the edit that writes a misspelt word as it is meant."""
    meant = misspelt(word, choices)
    return rename(word, meant) if meant else None


def _stages(written: Node, marks: Marks, problems: list[Problem]) -> tuple[StageEntry, ...]:
    if not isinstance(written.value, tuple):
        message = f"stages must be a list, {_not(plain(written))}"
        fix = "begin each stage with '- '"
        mark = marks.mark(("stages",))
        listed = isinstance(written.value, dict) and set(written.value) <= set(stages.VERBS)
        hint = Hint(edit="list", told="make each stage an item of a list") if listed else None
        problems.append(Problem(code="wrong-type", message=message, fix=fix, loc=("stages",), mark=mark, hint=hint))
        return ()
    entries = []
    for index, item in enumerate(written.value):
        try:
            entry = _entry(item, ("stages", index), marks, problems)
        except _Bad as bad:
            about_key = bad.problem.code in {"unknown-key", "unknown-verb", "bad-stage"}
            mark = marks.key(bad.problem.loc) if about_key else marks.mark(bad.problem.loc)
            problems.append(bad.problem.at(mark))
        else:
            entries += [entry] if entry else []
    return tuple(entries)


def _serve(written: Node, marks: Marks, problems: list[Problem]) -> tuple[ServeEntry, ...]:
    if not isinstance(written.value, tuple):
        message = f"serve must be a list of servers, {_not(plain(written))}"
        fix = "write for example `serve: [vllm]`"
        mark = marks.mark(("serve",))
        problems.append(Problem(code="wrong-type", message=message, fix=fix, loc=("serve",), mark=mark))
        return ()
    entries: list[ServeEntry] = []
    for index, item in enumerate(written.value):
        at: Loc = ("serve", index)
        try:
            name, data = _server(item, at)
        except _Bad as bad:
            problems.append(bad.problem.at(marks.mark(bad.problem.loc)))
            continue
        options = _validated(SERVERS[name].Options, data, marks, at, problems)
        entries += [ServeEntry(server=name, options=options)] if options else []
    return tuple(entries)


def _server(item: Node, at: Loc) -> tuple[str, dict[str, Any]]:
    """Return the server that an entry names, and what it says of it."""
    data = plain(item)
    if isinstance(data, dict):
        if "server" not in data:
            named = next((key for key in data if key in SERVERS), "NAME")  # as a stage names its verb
            fix = f"write `server: {named}` in it; choose from {', '.join(SERVERS)}"
            raise _Bad("missing-key", "an entry of serve has no 'server'", fix, at)
        name, at = data.pop("server"), (*at, "server")
    else:
        name, data = data, {}
    if not isinstance(name, str):
        fix = "write a name, or {server: NAME, …}"
        raise _Bad("wrong-type", f"an entry of serve must name a server, {_not(name)}", fix, at)
    if name not in SERVERS:
        message = f"unknown server {shown(name)} (known: {', '.join(SERVERS)})"
        meant = misspelt(name, SERVERS)
        hint = Hint(edit="write", text=meant, told=f"write {meant} instead of {name}") if meant else None
        raise _Bad("unknown-server", message, did_you_mean(name, SERVERS), at, hint)
    return name, data


def _not(value: Any) -> str:
    return "but has no value" if value is None else f"not {shown(value)}"


def _entry(item: Node, at: Loc, marks: Marks, problems: list[Problem]) -> StageEntry | None:
    verb = _verb(item, at)
    at = (*at, verb)
    key = stages.method_key(verb)
    written = item.child(verb)
    if written is None or not isinstance(written.value, dict):
        value = plain(written) if written else None
        meant = misspelt(value, stages.methods(verb)) if isinstance(value, str) else None
        mapping = f"{{{key}: {meant or '…'}}}"
        hint = Hint(edit="write", text=mapping, told=f"write {verb}: {mapping}") if meant else None
        fix = f"write `{verb}: {mapping}`"
        raise _Bad("wrong-type", f"{verb} must be a mapping of options, {_not(value)}", fix, at, hint)
    method = _method(verb, key, written, at)
    data: dict[str, Any] = plain(written)
    del data[key]
    backend = data.pop("backend", "optikit")
    if not isinstance(backend, str):
        raise _Bad("wrong-type", f"backend must be text, {_not(backend)}", "write a name", (*at, "backend"))
    known = _options(verb, method, backend, data, at)
    options = _validated(known, data, marks, at, problems)
    if options is None:
        return None
    return StageEntry(verb=verb, method=method, backend=getattr(options, "backend", backend), options=options)


def _options(verb: str, method: str, backend: str, data: dict[str, Any], at: Loc) -> type[BaseModel]:
    """Return the class that checks a stage's options, which each backend has of its own."""
    known = stages.load(verb, method).Options
    if "backend" in known.model_fields:
        if backend != stages.OURS:  # what it writes differs by who will do the work
            data["backend"] = backend
        return known
    available = stages.backend_names(verb, method)
    why = REFUSED.get((verb, method, backend))
    if why is not None:
        raise _Bad("backend-refused", why, f"use {' or '.join(available)}", (*at, "backend"))
    if backend not in available:
        message = f"unknown backend {shown(backend)} of {method} (available: {', '.join(available)})"
        fix = did_you_mean(backend, available)
        raise _Bad("unknown-backend", message, fix, (*at, "backend"), _meant(backend, available))
    return stages.load(verb, method, backend).Options


def _verb(item: Node, at: Loc) -> str:
    """Return a stage's one verb."""
    if not isinstance(item.value, dict):
        fix = "write for example `- quantize: {method: gptq}`"
        raise _Bad("wrong-type", f"a stage must be a mapping of a verb to its options, {_not(plain(item))}", fix, at)
    names = list(item.value)
    verbs = [name for name in names if name in stages.VERBS]
    if len(verbs) > 1:
        fix = f"begin a new stage with '- {verbs[1]}:'"
        hint = Hint(edit="item", told=f"begin a new stage with {verbs[1]!r}")
        raise _Bad("bad-stage", f"one stage has the verbs {' and '.join(verbs)}", fix, (*at, verbs[1]), hint)
    if not verbs:
        raise _no_verb(names, at)
    others = [name for name in names if name != verbs[0]]
    if others:
        fix = f"indent {others[0]!r} below {verbs[0]!r}"
        hint = Hint(edit="indent", text=verbs[0], told=f"indent {', '.join(map(repr, others))} below {verbs[0]!r}")
        raise _Bad("bad-stage", f"{others[0]!r} stands beside {verbs[0]!r}, not in it", fix, (*at, others[0]), hint)
    return verbs[0]


def _no_verb(names: list[str], at: Loc) -> _Bad:
    if not names:
        return _Bad("bad-stage", "a stage without a verb", f"choose from {', '.join(stages.VERBS)}", at)
    name = names[0]
    owner = next((verb for verb in stages.VERBS if name in stages.methods(verb)), None)
    if owner is not None:
        fix = f"write `{owner}: {{{stages.method_key(owner)}: {name}}}`"
        hint = Hint(edit="name", text=f"{owner}: {stages.method_key(owner)}", told=f"name {owner} the verb of {name!r}")
        return _Bad("unknown-verb", f"{name!r} is a method of {owner}, not a verb", fix, (*at, name), hint)
    fix = did_you_mean(name, stages.VERBS)
    return _Bad("unknown-verb", f"unknown verb {name!r}", fix, (*at, name), _meant(name, stages.VERBS))


def _method(verb: str, key: str, written: Node, at: Loc) -> str:
    """Return the method that a stage names."""
    node = written.child(key)
    available = stages.methods(verb)
    if not available:
        raise _Bad("unknown-method", f"{verb} has no methods in this version of optikit", "remove the stage", at)
    if node is None:
        raise _unnamed(verb, key, written, at)
    if node.value not in available:
        message = f"unknown {key} {shown(plain(node))} of {verb} (available: {', '.join(available)})"
        name = str(node.value)
        foreign = foreign_words.method(verb, name)
        if foreign:
            raise _Bad("unknown-method", message, foreign.told, (*at, key), repair=foreign.repair(verb))
        raise _Bad("unknown-method", message, did_you_mean(name, available), (*at, key), _meant(name, available))
    return str(node.value)


def _unnamed(verb: str, key: str, written: Node, at: Loc) -> _Bad:
    """Return what is wrong with a stage that names no method: its key is called otherwise, or isn't there."""
    other = "method" if key == "engine" else "engine"
    if written.child(other) is not None:
        return _Bad("unknown-key", f"unknown key {other!r}", f"{verb} takes {key!r}", (*at, other), rename(other, key))
    for name in written.value if isinstance(written.value, dict) else ():
        word = foreign_words.find((verb,), name, (key,))
        if (word and word.becomes == key) or misspelt(name, (key,)):
            fix = word.fix() if word else did_you_mean(name, (key,))
            return _Bad("unknown-key", f"unknown key {name!r}", fix, (*at, name), rename(name, key))
    return _without_method(verb, key, written, at)


def _without_method(verb: str, key: str, written: Node, at: Loc) -> _Bad:
    """Return that the key which names the method is missing; a quantization scheme may tell which one is meant."""
    scheme = plain(written).get("scheme")
    foreign = foreign_words.method(verb, scheme) if isinstance(scheme, str) else None
    fix = foreign.told if foreign else f"choose from {', '.join(stages.methods(verb))}"
    return _Bad("missing-key", f"{verb} has no {key!r}", fix, at, repair=foreign.repair(verb) if foreign else {})
