"""The digest of the code behind a result follows what the code really imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from optikit.store import code_digest
from optikit.store.code_digest import closure, source_digest


def test_a_stage_depends_on_its_algorithm_and_not_on_the_report() -> None:
    found = closure("optikit.stages.quantize.gptq")
    assert "optikit.algorithms.gptq" in found
    assert "optikit.calibration.blockwise" in found
    assert not any(name.startswith(("optikit.report", "optikit.cli", "optikit.evaluation")) for name in found)


def test_the_digest_changes_with_a_module_it_reaches_and_with_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "optikit"
    package.mkdir()
    (package / "method.py").write_text("def run():\n    from optikit import helper\n")
    (package / "helper.py").write_text("A = 1\n")
    (package / "other.py").write_text("B = 1\n")
    monkeypatch.setattr(code_digest, "ROOT", package)

    def digest() -> str:
        source_digest.cache_clear()
        return source_digest("optikit.method")

    before = digest()
    (package / "other.py").write_text("B = 2\n")
    assert digest() == before
    (package / "helper.py").write_text("A = 2\n")
    assert digest() != before
    source_digest.cache_clear()


def test_imports_that_lead_in_circles_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "optikit"
    package.mkdir()
    (package / "a.py").write_text("from optikit import b\n")
    (package / "b.py").write_text("import optikit.a\n")
    monkeypatch.setattr(code_digest, "ROOT", package)
    assert closure("optikit.a") == ("optikit.a", "optikit.b")


def test_imports_are_found_as_the_parser_finds_them() -> None:
    def parsed(source: str) -> set[str]:
        found: set[str] = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        return {name for name in found if name.startswith("optikit")}

    sources = [path.read_text(encoding="utf-8") for path in code_digest.ROOT.rglob("*.py")]
    sources.append("if a:\n    from optikit.b import (  # why\n  c as d,  # because\n  e,\n )\nimport optikit.f as g\n")
    assert len(sources) > 100
    for source in sources:
        assert parsed(source) <= set(code_digest._imports(source))
