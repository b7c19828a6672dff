"""`load`: a recipe file → `LoadedRecipe`, or one `RecipeError` with every problem.

The way: YAML 1.2 tree with marks → `extends` merged → `--set` applied → `${variables}` replaced → schema.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

from optikit import targets
from optikit.errors import InputMissingError, RecipeError
from optikit.fileio import read_regular
from optikit.problems import Hint, Mark, Problem, nearest
from optikit.recipe import overrides as set_
from optikit.recipe import variables
from optikit.recipe.node import Marks, Node, plain, removes
from optikit.recipe.schema import Recipe
from optikit.recipe.validate import check
from optikit.recipe.validation_messages import shown
from optikit.recipe.yaml12 import MAX_CHARACTERS, compose

MAX_BASES = 8
"""How many recipes may stand behind one through `extends`."""


@dataclass(frozen=True, kw_only=True)
class LoadedRecipe:
    """A valid recipe with its origin.

    Attributes:
        recipe: Values, checked.
        path: The file, as it was given.
        text: The file's text, verbatim.
        marks: Place of every value; of one that isn't written, the nearest around it.
        written: The recipe as plain data after `extends`, `--set` and variables; defaults are not filled in.
        base: Directory that relative paths in the recipe start from: the file's own.
    """

    recipe: Recipe
    path: Path
    text: str = field(repr=False)
    marks: Marks = field(repr=False)
    written: dict[str, Any] = field(repr=False)
    base: Path


def load(
    path: Path,
    *,
    overrides: Sequence[str] = (),
    known_targets: Collection[str] | None = None,
    base: Path | None = None,
) -> LoadedRecipe:
    """Read a recipe file.

    Args:
        path: The file.
        overrides: `--set` arguments: `stages[1].quantize.bits=8`.
        known_targets: Names that the recipe's target may have; None leaves that to whoever needs the target.
        base: Where relative paths in the recipe start; None is the file's directory.

    Raises:
        InputMissingError: If the file can't be read.
        RecipeError: With every problem found, each with its mark.
    """
    return loads(read(path), path, overrides=overrides, known_targets=known_targets, base=base)


def read(path: Path) -> bytes:
    """Return a recipe's bytes, of a file that is too large only the first.

    Raises:
        InputMissingError: It can't be read, or is no regular file: a pipe or a device may have no end.
    """
    try:
        return _read(path)
    except (OSError, ValueError) as error:  # ValueError: NUL in a path
        reason = getattr(error, "strerror", None) or str(error)
        raise InputMissingError(f"can't read the recipe {str(path)!r}: {reason}", fix="check the path") from None


def loads(
    text: str | bytes,
    path: Path,
    *,
    overrides: Sequence[str] = (),
    known_targets: Collection[str] | None = None,
    base: Path | None = None,
) -> LoadedRecipe:
    """Read a recipe from its text; `path` is its name in messages, and its directory is where relative paths start.

    Raises:
        RecipeError: With every problem found, each with its mark.
    """
    root, problems = tree(text, path, overrides)
    varying = root.child("sweep")
    if varying is not None:
        message, fix = "this recipe describes many runs", "use `optikit sweep`, or leave `sweep` out"
        problems += (Problem(code="sweep-section", message=message, fix=fix, mark=varying.key),)
    found = resolved(root, problems, path, known_targets=known_targets, base=base or path.parent)
    return replace(found, text=text if isinstance(text, str) else text.decode())


def tree(text: str | bytes, path: Path, overrides: Sequence[str]) -> tuple[Node, tuple[Problem, ...]]:
    """Return a recipe merged over what it extends, with `--set` applied, and what was wrong with that.

    Raises:
        RecipeError: There is no tree.
    """
    root, problems = _merged(text, path)
    if root is None:
        raise error(path, problems)
    root, found = set_.apply(root, overrides)
    return root, problems + found


def resolved(
    root: Node,
    problems: tuple[Problem, ...],
    path: Path,
    *,
    base: Path,
    known_targets: Collection[str] | None = None,
) -> LoadedRecipe:
    """Return the recipe of a tree, variables replaced and checked; its text is empty.

    Args:
        root: The tree.
        problems: What is wrong with it already.
        path: Its name in messages.
        base: Where relative paths start.
        known_targets: Names that its target may have; None is any.

    Raises:
        RecipeError: With every problem found, each with its mark.
    """
    root, found = variables.substitute(root)
    problems += found
    problems += _unknown_target(root.child("target"), known_targets)
    recipe, found = check(root)
    # A place that is wrong already, e.g. an unknown variable, is not said to be no number as well.
    places = {problem.mark for problem in problems}
    problems += tuple(problem for problem in found if problem.mark not in places)
    if recipe is None or problems:
        raise error(path, problems)
    return LoadedRecipe(recipe=recipe, path=path, text="", marks=Marks(root), written=plain(root), base=base)


def _unknown_target(named: Node | None, known: Collection[str] | None) -> tuple[Problem, ...]:
    if known is None or named is None or not isinstance(named.value, str) or named.value in known:
        return ()
    problem = targets.unknown(named.value, known).at(named.mark)
    near = nearest(named.value, known)
    return (replace(problem, hint=_target_hint(named.value, near) if near else None),)


def _target_hint(written: str, name: str) -> Hint:
    """Return the edit that names a target: other letters may be other hardware, as A10 and A10G are."""
    lost = (
        "" if name.lower() == written.lower() else f"target {written!r} becomes {name!r}, which may be other hardware"
    )
    return Hint(edit="write", text=name, told=f"write target: {name} instead of {written}", lost=lost)


def error(path: Path, problems: Iterable[Problem]) -> RecipeError:
    """Return the error that tells all problems, in the order of the file."""
    ordered = sorted(problems, key=_position)
    count = "1 problem" if len(ordered) == 1 else f"{len(ordered)} problems"
    return RecipeError(f"{path.name} has {count}", problems=ordered, fix="correct the recipe, or what --set changes")


def _position(problem: Problem) -> tuple[bool, str, int, int]:
    mark = problem.mark or Mark(file="", line=0, column=0)
    return mark.file == set_.FILE, mark.file, mark.line, mark.column


def _read(path: Path) -> bytes:
    """Return a regular file's first bytes, one more than a recipe may have."""
    return read_regular(path, 4 * MAX_CHARACTERS + 1)


def _merged(text: str | bytes, path: Path) -> tuple[Node | None, tuple[Problem, ...]]:
    """Return the recipe merged over everything it extends; None where that can't be known."""
    chain: list[Node] = []
    seen = [Path(os.path.realpath(path))]
    problems: list[Problem] = []
    named: Node | None = None
    while True:
        root, found = _parsed(text, path)
        if named is not None and not _is_recipe(root):
            return None, (*problems, _no_recipe(named))
        problems += found
        if root is None:
            return None, tuple(problems)
        chain.append(root)
        named = root.child("extends")
        if named is None:
            return _without_extends(reduce(_over, reversed(chain))), tuple(problems)
        try:
            path, text = _base(named, path, seen)
        except RecipeError as bad:
            return None, (*problems, *bad.problems)
        seen.append(Path(os.path.realpath(path)))


def _parsed(text: str | bytes, path: Path) -> tuple[Node | None, tuple[Problem, ...]]:
    """Return a file's tree, whose root is a mapping."""
    try:
        document = compose(text if isinstance(text, str) else text.decode(), str(path))
    except UnicodeDecodeError as error:
        return None, (_not_utf8(error, path),)
    if document.root is None and document.problems:
        return None, document.problems
    if document.root is None or not isinstance(document.root.value, dict):
        empty = document.root is None or document.root.value is None
        message = "the recipe is empty" if empty else "a recipe must be a mapping of keys"
        mark = document.root.mark if document.root else Mark(file=str(path), line=1, column=1)
        fix = "write at least `model: …`; `optikit init` makes a recipe to start from"
        return None, (*document.problems, Problem(code="not-a-recipe", message=message, fix=fix, mark=mark))
    return document.root, document.problems


def _not_utf8(error: UnicodeDecodeError, path: Path) -> Problem:
    """Return what is wrong with a file that isn't UTF-8; other Unicode encodings begin with a mark of their own."""
    before = error.object[: error.start]
    mark = Mark(file=str(path), line=before.count(b"\n") + 1, column=len(before) - before.rfind(b"\n"))
    message = f"byte 0x{error.object[error.start]:02X} is not UTF-8"
    fix = "save the file as UTF-8"
    if error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # UTF-32's begins with UTF-16's
        message, fix = "the file is UTF-16 or UTF-32, not UTF-8", "save it as UTF-8, e.g. `iconv -f UTF-16 -t UTF-8`"
    return Problem(code="not-utf8", message=message, fix=fix, mark=mark)


def _base(named: Node, path: Path, seen: Sequence[Path]) -> tuple[Path, bytes]:
    """Return the path and content of the file that `extends` names.

    Raises:
        RecipeError: With the problem, at the name.
    """

    def refuse(message: str, fix: str) -> RecipeError:
        return RecipeError(message, problems=[Problem(code="bad-extends", message=message, fix=fix, mark=named.mark)])

    name = named.value
    if not isinstance(name, str) or not name:
        raise refuse(f"extends must name a recipe file, not {shown(plain(named))}", "write `extends: base.yaml`")
    base = path.parent / name
    real = Path(os.path.realpath(base))  # pathlib's resolve() raises on links in a circle
    if real in seen:
        names = " → ".join([*(p.name for p in seen[seen.index(real) :]), base.name])
        raise refuse(f"recipes extend each other in a circle: {names}", "take one `extends` out")
    if len(seen) > MAX_BASES:
        raise refuse(f"more than {MAX_BASES} recipes extend one another", "merge some of them")
    try:
        return base, _read(base)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise refuse(f"can't read {name!r}: {reason}", f"the path starts from {str(path.parent)!r}") from None


def _is_recipe(root: Node | None) -> bool:
    """Return whether a file has any key of a recipe."""
    keys = root.value if root is not None and isinstance(root.value, dict) else {}
    return any(key in Recipe.model_fields or key in ("extends", "vars") for key in keys)


def _no_recipe(named: Node) -> Problem:
    """Return what is wrong with a base that isn't a recipe, at its name.

    Not a word of what the file holds is told: a recipe may be somebody else's, and name any file of this machine.
    """
    message, fix = f"{named.value!r} is no recipe", "name a YAML file with keys of a recipe"
    return Problem(code="bad-extends", message=message, fix=fix, mark=named.mark)


def _over(base: Node, recipe: Node) -> Node:
    """Return `recipe` laid over `base`: mappings merge key by key, null takes one or a list out, all else replaces."""
    if not (isinstance(base.value, dict) and isinstance(recipe.value, dict)):
        return recipe
    merged = {key: _over(base.value[key], child) if key in base.value else child for key, child in recipe.value.items()}
    gone = {key for key, child in merged.items() if key in base.value and removes(child, base.value[key])}
    return replace(recipe, value={key: child for key, child in (base.value | merged).items() if key not in gone})


def _without_extends(root: Node) -> Node:
    entries = root.value if isinstance(root.value, dict) else {}
    return replace(root, value={key: child for key, child in entries.items() if key != "extends"})
