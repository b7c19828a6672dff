"""`optikit plan RECIPE`: what would be done, what it would take, what is wrong with it; nothing is run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from optikit.errors import RecipeError
    from optikit.plan import Plan
    from optikit.problems import Problem
    from optikit.recipe.load import LoadedRecipe
    from optikit.rules.repair import Repair

LEFT = "left by it: "
MOST_NOTES = 5
"""Problems left by a repair that are named; with --fix all are printed."""


def plan(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, YAML.", show_default=False)],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the recipe.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")] = False,
    targets: Annotated[Path | None, typer.Option(metavar="FILE", help="A TOML file of more targets.")] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Write the nearest recipe that means the same.")] = False,
    unsafe_fixes: Annotated[
        bool, typer.Option("--unsafe-fixes", help="Also change methods, bits, engines, target, or drop stages.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write it, for `optikit run FILE`: .json.")
    ] = None,
) -> None:
    """Check a recipe and print its steps with estimates of time, memory and disk. No weight is read.

    Of a recipe that can't work, problems come first, then the smallest change that takes them away and means the same,
    as a diff; --fix makes it. What would change the meaning is told, and done with --unsafe-fixes only.
    Which steps are cached is known where the weights were read before: by `run`, or for --out, which reads them.
    What --out wrote runs only while recipe, model, texts, target, code and libraries are what they were. Where a source
    isn't what optikit.lock beside the recipe says, the plan is printed and the command fails, as `run` would.
    """
    from optikit.errors import RecipeError
    from optikit.plan import make_plan
    from optikit.plan.render import as_json, render
    from optikit.recipe.load import loads, read
    from optikit.store.sources import LOCK, check_lock, read_lock
    from optikit.store.store import Store
    from optikit.targets import names
    from optikit.text import dump_json

    store = Store.default()
    content = read(recipe)

    def planned(source: str | bytes, note: Callable[[str], None] = lambda _: None) -> Plan:
        loaded = loads(source, recipe, overrides=tuple(set_ or ()), known_targets=names(targets))
        how: dict[str, Any] = {"offline": offline, "extra_targets": targets, "note": note}
        return make_plan(loaded, store, **how, weights=False, digests=out is not None)

    started = time.monotonic()
    try:
        made = planned(content, _note)
    except RecipeError as error:
        mending = _Mending(recipe, content, planned, unsafe=unsafe_fixes, took=time.monotonic() - started)
        content = mending.mend(error, write=fix, to_stderr=json)
        made = planned(content, _note)
    typer.echo(dump_json(as_json(made, store), indent=1) if json else render(made, store))
    check_lock(read_lock(recipe.parent / LOCK), made.sources)
    if out is not None:
        _write(out, made, loads(content, recipe, overrides=tuple(set_ or ())), tuple(set_ or ()), targets)


def _note(line: str) -> None:
    typer.echo(line, err=True)


def _write(out: Path, made: Plan, loaded: LoadedRecipe, overrides: tuple[str, ...], targets: Path | None) -> None:
    from optikit.errors import UsageError
    from optikit.plan.frozen import freeze
    from optikit.report.write import put
    from optikit.text import dump_json

    if out.suffix != ".json":
        raise UsageError(f"--out {out} doesn't end in .json", fix=f"write --out {out.with_suffix('.json')}")
    put(out, dump_json(freeze(made, loaded, overrides=overrides, targets=targets), indent=1) + "\n")


class _Mending:
    """The way from a recipe with problems to one without, or to what is said of it."""

    def __init__(
        self, recipe: Path, content: bytes, planned: Callable[[str], Plan], *, unsafe: bool, took: float
    ) -> None:
        self.recipe, self.content, self.planned, self.unsafe, self.took = recipe, content, planned, unsafe, took

    def mend(self, error: RecipeError, *, write: bool, to_stderr: bool) -> bytes:
        """Print the problems, then the repair as a diff; write it where that is asked for.

        Returns:
            The file's new content.

        Raises:
            RecipeError: There are no problems to mend.
            typer.Exit: With the code of an invalid recipe: nothing was written.
        """
        from optikit.cli.app import tell

        if not error.problems:
            raise error
        tell(error)
        text = self.text
        found, notes = self._found(text, error.problems) if text is not None else (None, [])
        if found is not None and text is not None:
            self._show(found, text, written=write, to_stderr=to_stderr)
        if found is not None and write:
            notes = [note for note in notes if not note.startswith(LEFT)]  # what is left is printed whole, at the end
        typer.echo("".join(f"{note}\n" for note in notes), err=True, nl=False)
        if found is None or not write:
            raise typer.Exit(int(error.code))
        return self._put(found.text)

    def _show(self, found: Repair, text: str, *, written: bool, to_stderr: bool) -> None:
        command = f"`optikit plan --fix{' --unsafe-fixes' if found.lost else ''}` writes:"
        typer.echo(f"# {'; '.join(found.changes)}", err=to_stderr)
        typer.echo(f"# {f'written to {self.recipe}:' if written else command}", err=to_stderr)
        typer.echo(found.diff(text, self.recipe.name), err=to_stderr, nl=False)
        typer.echo("".join(f"lost by it: {lost}\n" for lost in found.lost), err=True, nl=False)

    @property
    def text(self) -> str | None:
        """The file's text without a byte order mark; None where it isn't UTF-8."""
        try:
            return self.content.decode().removeprefix("\ufeff")
        except UnicodeDecodeError:
            return None

    def _found(self, text: str, problems: tuple[Problem, ...]) -> tuple[Repair | None, list[str]]:
        """Return the repair to show or make, and what is to be said of one that isn't, or isn't allowed."""
        from optikit.rules.repair import SECONDS

        if any(problem.code == "too-large" for problem in problems):
            return None, []
        if self.took > SECONDS:
            return None, [f"no fix was looked for: reading the recipe took {self.took:.0f} s"]
        deadline = time.monotonic() + SECONDS
        safe = self._repaired(text, problems, seconds=SECONDS)
        if safe is not None and not safe.left:
            return safe, []
        base, left = (safe.text, safe.left) if safe else (text, problems)
        return self._dared(safe, base, left, deadline)

    def _dared(
        self, safe: Repair | None, base: str, left: tuple[Problem, ...], deadline: float
    ) -> tuple[Repair | None, list[str]]:
        """Return what `_found` does, where safe fixes leave problems: those that need --unsafe are looked for."""
        from dataclasses import replace

        from optikit.recipe.render_problems import visible
        from optikit.rules.repair import SECONDS

        notes = [f"{LEFT}{visible(problem.message)}" for problem in left[:MOST_NOTES]] if safe else []
        if not any(problem.loc or problem.mark for problem in left):  # a source can't be had
            return safe, notes
        bold = self._repaired(base, left, unsafe=True, seconds=deadline - time.monotonic())
        if bold is not None and self.unsafe:
            return replace(bold, changes=(*(safe.changes if safe else ()), *bold.changes)), []
        start = "no safe fix for what is left" if safe else "no safe fix"
        late = f" in {SECONDS:.0f} s" if time.monotonic() >= deadline else ""
        return safe, [*notes, *_unsafe_notes(bold, start, late)]

    def _repaired(self, text: str, problems: tuple[Problem, ...], **how: Any) -> Repair | None:
        from optikit.rules.repair import repair

        return repair(text, problems, self._problems, file=str(self.recipe), **how)

    def _problems(self, source: str) -> tuple[Problem, ...]:
        from optikit.errors import OptikitError, RecipeError
        from optikit.problems import Problem

        try:
            self.planned(source)
        except RecipeError as found:
            return found.problems or (Problem(code="recipe", message=found.message),)
        except OptikitError as found:
            return (Problem(code="source", message=found.message),)
        return ()

    def _put(self, text: str) -> bytes:
        from optikit.report.write import put

        content = "\ufeff" + text if self.content.startswith(b"\xef\xbb\xbf") else text
        put(self.recipe, content, fix="plan a copy of it that you may write")
        return content.encode()


def _unsafe_notes(bold: Repair | None, start: str, late: str) -> list[str]:
    """Return what is said where no safe repair was found: what an unsafe one would do, and what is lost by it."""
    if bold is None:
        return [f"{start}, and no unsafe one was found{late}"]
    return [f"{start}; --unsafe-fixes would {'; '.join(bold.changes)}", *(f"lost by it: {lost}" for lost in bold.lost)]
