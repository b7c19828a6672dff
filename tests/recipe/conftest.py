"""A recipe file in a directory of its own, and what its author would be told about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from optikit.errors import RecipeError
from optikit.recipe.load import load
from optikit.recipe.render_problems import render_problems

Told = Callable[..., str]


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    """Load a text as `recipe.yaml` (with overrides, beside other files) and return the problems as printed."""
    monkeypatch.chdir(tmp_path)

    def tell(text: str, *overrides: str, **files: str) -> str:
        for name, content in files.items():
            Path(f"{name}.yaml").write_text(content, encoding="utf-8")
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(RecipeError) as caught:
            load(Path("recipe.yaml"), overrides=overrides)
        assert all(problem.mark is not None for problem in caught.value.problems)
        return render_problems(caught.value.problems)

    return tell
