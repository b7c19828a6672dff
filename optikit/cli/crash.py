"""A crash report: everything needed to mend a bug, without values of variables and without credentials."""

from __future__ import annotations

import json
import platform
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path


def write_report(error: Exception) -> Path:
    """Write what happened to a file in the store's directory and return its path."""
    from optikit import __version__
    from optikit.host import versions
    from optikit.store.store import Store
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
    path = Store.default().root / f"crash-{now:%Y%m%dT%H%M%S}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path
