"""`optikit explain WHAT`: a rule, a stage, a target or an exit code, from where it is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from optikit.rules import Rule
    from optikit.targets import Target


def explain(
    what: Annotated[
        str, typer.Argument(help="A rule, a problem's code, a stage, a target, or an exit code.", show_default=False)
    ] = "",
    every: Annotated[bool, typer.Option("--list", help="List every rule.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="With --list: the whole rows, as a page.")] = False,
) -> None:
    """Explain a rule or problem (quantize-twice, unknown-key), a stage (gptq), a target (l4) or an exit code (65)."""
    from optikit.errors import UsageError

    if every and markdown:
        from optikit.rules.document import markdown as page

        typer.echo(page(), nl=False)
        return
    if every:
        typer.echo("\n".join(_listed()))
        return
    if not what:
        raise UsageError("nothing to explain", fix="name a rule, a stage, a target or an exit code, or give --list")
    told = (_exit_code(what), _rule(what), _problem(what), *_stages(what), _target(what), _attention(what))
    found = [text for text in told if text]
    if not found:
        from optikit.problems import did_you_mean

        known = sorted(_names())
        raise UsageError(
            f"{what!r} is no rule, problem, stage, target or exit code", fix=_near(did_you_mean(what, known))
        )
    typer.echo("\n\n".join(found))


def _attention(what: str) -> str:
    from optikit.targets.attention import card

    return "\n".join(card()) if what == "attention" else ""


def _near(fix: str) -> str:
    return fix if fix.startswith("did you mean") else "`optikit explain --list`, `optikit stages`, `optikit targets`"


def _names() -> Iterator[str]:
    from optikit.rules import rules
    from optikit.stages import OURS, backend_names, registry
    from optikit.targets import names

    yield "attention"
    yield from rules()
    yield from _problems()
    yield from names()
    for verb, methods in registry().items():
        yield from methods
        yield from (f"{verb}.{method}" for method in methods)
        yield from (f"{method}.{name}" for method in methods for name in backend_names(verb, method) if name != OURS)


def _listed() -> list[str]:
    import textwrap

    from optikit.cli._table import table
    from optikit.rules import rules

    rows = [(rule.id, rule.level, textwrap.shorten(rule.why, 80, placeholder=" ...")) for rule in rules().values()]
    return table([("rule", "level", "what"), *rows])


def _rule(what: str) -> str:
    from optikit.rules import rules

    rule = rules().get(what)
    return _rule_text(rule) if rule else ""


def _rule_text(rule: Rule) -> str:
    from optikit.rules.conditions import describe

    lines = [
        f"{rule.id} ({rule.level})",
        f"  why     {rule.why}",
        f"  fix     {rule.fix}",
        f"  source  {rule.source}",
        f"  read    {rule.date}",
        "  when    " + "\n          ".join(describe(rule.when)),
    ]
    return "\n".join(lines)


def _problems() -> dict[str, dict[str, str]]:
    """Return what is told of the problems that no rule describes, by code."""
    import tomllib
    from importlib import resources

    rows: dict[str, dict[str, str]] = tomllib.loads(
        resources.files("optikit.recipe").joinpath("problems.toml").read_text(encoding="utf-8")
    )
    return rows


def _problem(what: str) -> str:
    row = _problems().get(what)
    if row is None:
        return _checked(what)
    lines = [f"{what} (a recipe's problem)", f"  what    {row['what']}", f"  why     {row['why']}"]
    lines += [f"  {name:7} " + row[name].replace("\n", "\n          ") for name in ("wrong", "right") if name in row]
    return "\n".join(lines)


def _checked(code: str) -> str:
    """Say which stages' own checks a problem comes from; "" if none does."""
    import importlib.util
    from pathlib import Path

    from optikit.stages import module, registry

    where = []
    for verb, methods in registry().items():
        for method in methods:
            spec = importlib.util.find_spec(module(verb, method))
            source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
            if f'code="{code}"' in source:
                where.append(f"{verb}.{method}")
    if not where:
        return ""
    return f"{code} (a stage's own check)\n  of      {', '.join(where)}\n  see     optikit explain {where[0]}"


def _exit_code(what: str) -> str:
    from optikit.errors import BY_CODE, Exit

    if not what.isdigit():
        return ""
    if int(what) not in set(Exit):
        return ""
    code = Exit(int(what))
    name = code.name.lower().replace("_", " ")
    kind = BY_CODE.get(code)
    doc = (kind.__doc__ or "").strip() if kind else {Exit.OK: "Everything asked for was done."}.get(code, name)
    return f"exit code {code.value}: {name}\n  {doc}"


def _stages(what: str) -> Iterator[str]:
    """Yield what is told of a stage and of the libraries that can do it, or of one of these: `awq.autoawq`."""
    from optikit.stages import OURS, backend_names, registry

    for verb, methods in registry().items():
        for method in methods:
            others = [name for name in backend_names(verb, method) if name != OURS]
            if what in {method, f"{verb}.{method}"}:
                yield _stage_text(verb, method, OURS)
                yield _others(verb, method, others)
            for name in others:
                if what in {name, f"{method}.{name}", f"{verb}.{method}.{name}"}:
                    yield _stage_text(verb, method, name)


def _others(verb: str, method: str, names: list[str]) -> str:
    """Say which libraries can do a method instead of ours, and which can't; "" where there are none."""
    from optikit.stages import REFUSED, load

    lines = [f"  {name:16} {load(verb, method, name).SUMMARY}; `optikit explain {method}.{name}`" for name in names]
    refused = ((name, why) for (a, b, name), why in REFUSED.items() if (a, b) == (verb, method))
    lines += [f"  {name:16} not here: {why}" for name, why in refused]
    return "\n".join(["backend: other libraries that do this", *lines]) if lines else ""


def _stage_text(verb: str, method: str, backend: str) -> str:
    import inspect

    from optikit.cli._table import table
    from optikit.stages import OURS, load, method_key

    stage = load(verb, method, backend)
    key = method_key(verb)
    named = "" if backend == OURS else f", backend: {backend}"
    rows = [("option", "default", "what")]
    for name, field in stage.Options.model_fields.items():
        default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
        rows.append((name, default, " ".join((field.description or "").split())))
    card = inspect.getdoc(stage) or ""
    where = f"runs in the environment {stage.ENVIRONMENT!r}" if stage.ENVIRONMENT else "runs in the main environment"
    lines = [f"- {verb}: {{{key}: {method}{named}}}", "", card.strip(), "", where]
    if len(rows) > 1:
        lines += ["", *table(rows)]
    return "\n".join(lines)


def _target(what: str) -> str:
    from optikit.targets import find

    target = find(what)
    return "\n".join(_target_lines(target)) if target else ""


def _target_lines(target: Target) -> Iterator[str]:
    from dataclasses import asdict

    for name, value in asdict(target).items():
        if value not in (None, "", ()):
            shown = ", ".join(map(str, value)) if isinstance(value, tuple) else value
            yield f"{name:22} {shown}"
