"""report.json, report.md and report.html, each put in place whole: a reader sees the old file or the new one.

The JSON is written first: it holds every number, and `optikit report` renders the others from it again.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationError

from optikit import text
from optikit.errors import CannotCreateError, DiskError, InputMissingError, IntegrityError
from optikit.evaluation.results import Report
from optikit.fileio import read_regular
from optikit.process.failure import DISK_ERRNOS
from optikit.report import former_names, html, markdown

JSON = "report.json"


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
        content = read_regular(file)
    except FileNotFoundError as error:
        fix = "name a directory that `optikit run --out` wrote"
        raise InputMissingError(f"{file}: no such report", fix=fix) from error
    except OSError as error:
        failed = DiskError if error.errno in DISK_ERRNOS else InputMissingError
        raise failed(f"{file}: {error.strerror}", fix="check that the file can be read") from error
    try:
        return former_names.renamed(Report.model_validate_json(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        message = f"{file}: not a report that this version reads: {text.clean(where)}: {text.clean(first['msg'])}"
        raise IntegrityError(message, fix="run the recipe again; finished steps are kept") from error


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
