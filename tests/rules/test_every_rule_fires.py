"""For every rule a recipe that fires it and nothing else, and one that nearly does, through `load` and `make_plan`.

The page examples/rules_fired.md shows the recipes: python tests/benchmarks/rules_fired.py
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from optikit import host
from optikit.plan import serve_section
from optikit.rules import rules

spec = importlib.util.spec_from_file_location("recipes", Path(__file__).with_name("recipes.py"))
recipes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipes)


COME: dict[str, Callable[[], bool]] = {}
"""Whether what a reason waits for is there; then its rules have to fire, or go."""

OUT_OF_REACH = {}
"""Rules that no recipe can fire yet, with what they wait for. It only ever shrinks."""


def _fired(case: recipes.Case, directory: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Plan a case's recipe on the machine that it names: the machine is an input, too."""
    here, packages = host.describe(), case.get("packages", recipes.MACHINE)
    monkeypatch.setattr(host, "describe", lambda: here | case.get("host", {}))
    monkeypatch.setattr(serve_section, "versions", lambda names: {name: packages.get(name) for name in names})
    device = "cuda" if case.get("host", {}).get("cuda", True) else "cpu"
    return recipes.fired(case, directory, device=device)


@pytest.mark.parametrize("name", rules())
def test_a_recipe_fires_every_rule_alone_and_a_near_miss_does_not(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in OUT_OF_REACH:
        return
    case, near = recipes.case_of(name), recipes.near_miss(name)
    with monkeypatch.context() as machine:
        found = _fired(case, tmp_path / "fires", machine)
    assert found == {name, *case.get("with", ())}, f"{sorted(found)}\n{recipes.recipe(case)}"
    with monkeypatch.context() as machine:
        found = _fired(near, tmp_path / "near", machine)
    assert name not in found, f"the near miss fires it, too:\n{recipes.recipe(near)}"


@pytest.mark.parametrize("reason", COME)
def test_what_rules_wait_for_has_not_come(reason: str) -> None:
    waiting = sorted(name for name, why in OUT_OF_REACH.items() if why == reason)
    assert not COME[reason](), f"teach recipes.py to write it, and take these off the list, or out: {waiting}"


def test_only_rules_are_listed() -> None:
    assert OUT_OF_REACH.keys() <= rules().keys()
    assert recipes.BY_HAND.keys() <= rules().keys() - OUT_OF_REACH.keys()
