"""What tests of trained speculators share."""

from __future__ import annotations

import json

import pytest


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    words = ("one", "two", "row", "sea", "abc", "cat")
    lines = [json.dumps({"prompt": f"{a} {b} {i}"}) for i in range(2) for a in words for b in words]
    path.write_text("\n".join(lines))
    return path
