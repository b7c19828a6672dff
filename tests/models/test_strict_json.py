"""Files that a directory of somebody else's may hold in place of JSON."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from optikit.errors import IntegrityError
from optikit.models import strict_json


@pytest.mark.parametrize("kind", ["directory", "pipe", "device"])
def test_what_is_no_file_is_refused_by_its_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.json"
    {"directory": path.mkdir, "pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero")}[kind]()
    with pytest.raises(IntegrityError, match=r"/x\.json is not a regular file"):
        strict_json.read_object(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 99_999, b'{"a": 1', b'{"a": 1, "a": 2}', b"\xff"])
def test_what_is_no_object_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"x\.json"):
        strict_json.read_object(path)
