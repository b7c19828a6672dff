"""Plan every recipe of a folder with and without `--fix`; print what is said and what the fix wrote as Markdown.

    python tests/benchmarks/broken_recipes.py FOLDER > examples/broken.md

The folder is copied first: nothing in it is changed. Models that its recipes name by relative paths are looked for
beside it, under the paths that they name.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from optikit.rules.meaning import differences

HEAD = """# Broken recipes, planned with and without `--fix`

Made by `python tests/benchmarks/broken_recipes.py FOLDER` over recipes that are broken in usual ways: misspelt keys,
other tools' words, wrong types, wrong order. A safe fix never changes method, bits, engine, model or target; where the
meaning would change, nothing is written and the message says what is left to decide.

| recipe | place | message | hint | what `--fix` wrote | then |
| :-- | :-- | :-- | :-- | :-- | :-- |"""
_ERROR = re.compile(r"^(?P<file>[^:\s]+):(?P<line>\d+):(?P<column>\d+): error: (?P<message>.*) \[(?P<code>[\w-]+)\]$")
_FIX = re.compile(r"^\s*= fix: (?P<fix>.*)$")


@dataclass(frozen=True)
class Said:
    """One problem as it is printed."""

    place: str
    message: str
    fix: str


def plan(path: Path, *more: str) -> tuple[int, str]:
    """Run `optikit plan` beside a recipe; return its exit code and what it printed."""
    command = [sys.executable, "-m", "optikit", "plan", path.name, *more]
    settings = {**os.environ, "NO_COLOR": "1", "COLUMNS": "400"}
    done = subprocess.run(
        command, cwd=path.parent, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    return done.returncode, done.stdout


def problems(text: str) -> Iterator[Said]:
    """Yield the problems of a plan's output."""
    found = None
    for line in text.splitlines():
        error, fix = _ERROR.match(line), _FIX.match(line)
        if error:
            if found:
                yield found
            found = Said(f"{error['line']}:{error['column']}", error["message"], "")
        elif fix and found:
            yield Said(found.place, found.message, fix["fix"])
            found = None
    if found:
        yield found


def row(path: Path) -> str:
    """Return the row of one recipe; it is changed by the fix."""
    before = path.read_text(encoding="utf-8")
    said = list(problems(plan(path)[1]))
    plan(path, "--fix")
    after = path.read_text(encoding="utf-8")
    code, left = plan(path)
    lost = list(differences(before, after))
    if lost:
        raise SystemExit(f"{path.name}: the fix changed what is asked for: {lost}")
    lines = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    wrote = [f"`{cell(line[2:].strip())}`" for line in lines if line.startswith("+ ")]
    wrote = wrote or [f"~~`{cell(line[2:].strip())}`~~" for line in lines if line.startswith("- ")]
    ended = "plans" if code == 0 else "left: " + "; ".join(each.message for each in problems(left))
    columns = [
        "<br>".join(cell(each.place) for each in said),
        "<br>".join(cell(each.message) for each in said),
        "<br>".join(cell(each.fix) for each in said),
        "<br>".join(wrote) or "–",
        cell(ended),
    ]
    return f"| {path.stem} | {' | '.join(columns)} |"


def cell(text: str) -> str:
    """Return a text as a table's cell holds it."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def main(folder: Path) -> None:
    """Print the table of a folder."""
    sys.stdout.write(HEAD + "\n")
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(folder, Path(scratch) / "recipes" / folder.name))
        for beside in folder.parent.iterdir():
            if beside.is_dir() and beside != folder:
                (copy.parent / beside.name).symlink_to(beside.resolve())
        for path in sorted(copy.glob("*.yaml")):
            path.chmod(0o644)
            sys.stdout.write(row(path) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
