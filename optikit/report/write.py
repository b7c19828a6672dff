"""report.json, report.md and report.html, each put in place whole: a reader sees the old file or the new one.

The JSON is written first: it holds every number, and `optikit report` renders the others from it again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from optikit import text
from optikit.errors import CannotCreateError, DiskError, InputMissingError, IntegrityError
from optikit.evaluation.results import Ratio, Report
from optikit.fileio import read_regular
from optikit.process.failure import DISK_ERRNOS
from optikit.report import former_names, html, markdown

JSON = "report.json"
MOST_BYTES = 2**24
"""Of a report.json; those of long recipes have a thousandth of it."""
LARGEST = 1e100
MOST_LEVELS = 100
_AGAIN = "run the recipe again; finished steps are kept"


def write(report: Report, out: Path) -> None:
    """Write the report's three files into `out`, which is made where missing.

    Raises:
        CannotCreateError: `out` can't be made or written to.
        DiskError: The disk is full or fails.
    """
    put(out / JSON, report.model_dump_json(indent=2) + "\n")
    render(report, out)


def render(report: Report, out: Path) -> None:
    """Write report.md and report.html anew; errors as in `write`."""
    put(out / "report.md", markdown.render(report))
    put(out / "report.html", html.render(report))


def load(path: Path) -> Report:
    """Read a report from its JSON file, or from the directory that holds one; facts get the names that they have now.

    Raises:
        InputMissingError: There is none, or it can't be read.
        DiskError: The disk fails.
        IntegrityError: The file isn't a report of a schema version known here.
    """
    file = path / JSON if path.is_dir() else path
    try:
        content = read_regular(file, MOST_BYTES + 1)
    except FileNotFoundError as error:
        fix = "name a directory that `optikit run --out` wrote"
        raise InputMissingError(f"{file}: no such report", fix=fix) from error
    except OSError as error:
        failed = DiskError if error.errno in DISK_ERRNOS else InputMissingError
        raise failed(f"{file}: {error.strerror}", fix="check that the file can be read") from error
    if len(content) > MOST_BYTES:
        raise IntegrityError(f"{file} has more than {MOST_BYTES} bytes, which no report has", fix=_AGAIN)
    try:
        found = Report.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        message = f"{file}: not a report that this version reads: {text.clean(where)}: {text.clean(first['msg'])}"
        raise IntegrityError(message, fix=_AGAIN) from error
    for place, what in _unmeasured(found):
        raise IntegrityError(f"{file}: {text.clean(place)} is {what}, which nothing measured", fix=_AGAIN)
    return former_names.renamed(found)


def _unmeasured(report: Report) -> Iterator[tuple[str, str]]:
    """Yield (place, what) for values that no run writes and that can't be put into words or drawn."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), report)]
    while waiting:
        place, value = waiting.pop()
        if len(place) > MOST_LEVELS:
            yield ".".join(place[:3]), f"nested more than {MOST_LEVELS} deep"
        elif isinstance(value, int | float) and abs(value) > LARGEST:
            yield ".".join(place), f"larger than {LARGEST:g}"
        elif isinstance(value, Ratio) and not 1 / LARGEST < value.value < LARGEST:
            yield ".".join(place), f"a ratio of {value.value:g}"
        elif isinstance(value, list | tuple):
            waiting += [((*place, str(index)), each) for index, each in enumerate(value)]
        elif isinstance(value, BaseModel | Mapping):
            waiting += [((*place, str(key)), each) for key, each in dict(value).items()]


def put(path: Path, content: str, *, fix: str = "choose another --out directory") -> None:
    """Write a UTF-8 file atomically: a temporary file beside it, flushed to disk, then renamed over it.

    A link stays, and what it leads to is replaced; a device or a pipe would be lost by that, so none is.

    Raises:
        CannotCreateError: It can't be made there, or something else than a file is there.
        DiskError: The disk is full or fails.
    """
    if not path.name:
        raise CannotCreateError(f"{str(path)!r} is no name for a file", fix="name the file to write")
    place = Path(os.path.realpath(path))
    if place.exists() and not place.is_file():
        raise CannotCreateError(f"{path} is not a regular file", fix="choose another name")
    if place.exists() and not os.access(place, os.W_OK):  # renaming would not ask
        raise CannotCreateError(f"{path}: Permission denied", fix=fix)
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if place.exists():
                temporary.chmod(place.stat().st_mode & 0o7777)
            temporary.replace(place)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in DISK_ERRNOS:
            raise DiskError(f"{path}: {error.strerror}", fix="free some space, then run `optikit report`") from error
        raise CannotCreateError(f"{path}: {error.strerror}", fix=fix) from error
