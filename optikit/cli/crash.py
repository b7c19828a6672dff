"""How an unexpected exception ends: by a name where its cause has one, else by a crash report.

A report has everything needed to mend a bug, and no values of variables, which may hold secrets.
"""

from __future__ import annotations

import json
import platform
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path

from optikit.errors import DiskError, InputMissingError, OptikitError, RecipeError


def known(error: Exception) -> OptikitError | None:
    """Return the failure that an exception is, where what was read or the machine is to blame; None for a bug."""
    from optikit.process.failure import ran_out

    if isinstance(error, RecursionError):
        return RecipeError("what was read is nested too deeply", fix="look for a file with thousands of brackets")
    if isinstance(error, FileNotFoundError) and error.filename is None and not _has_directory():
        return InputMissingError("the directory that optikit was started in is gone", fix="change to one that is there")
    found = ran_out(error)
    if found is None and isinstance(error, OSError) and error.filename is not None:
        place = str(error.filename)[:200]
        found = DiskError(f"{place}: {error.strerror}", fix="check that path, and who may read and write it")
    return found


def _has_directory() -> bool:
    """Return whether this process's working directory still exists."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True


def write_report(error: Exception) -> str:
    """Write what happened to a file in the store's directory and return its path; without a store, all of it."""
    content = _report(error)
    from optikit.store.store import Store

    try:
        path = Store.default().root / f"crash-{datetime.now(UTC):%Y%m%dT%H%M%S}.json"
        path.touch(mode=0o600)
        path.write_text(content, encoding="utf-8")
    except (OSError, OptikitError):
        return content
    return str(path)


def _report(error: Exception) -> str:
    from optikit import __version__
    from optikit.host import versions
    from optikit.text import redact

    now = datetime.now(UTC)
    content = {
        "optikit": __version__,
        "created": now.isoformat(timespec="seconds"),
        "verb": sys.argv[1:2],
        "traceback": [redact(line) for line in traceback.format_exception(error)],
        "python": sys.version,
        "platform": platform.platform(),
        "versions": versions(("torch", "transformers", "onnxruntime", "onnxruntime-genai", "pydantic", "typer")),
    }
    return json.dumps(content, indent=1)
