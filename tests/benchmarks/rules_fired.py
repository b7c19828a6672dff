"""Write examples/rules_fired.md: for every rule a recipe that fires it and one that does not, as tests plan them.

python tests/benchmarks/rules_fired.py
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from optikit.rules import rules

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "examples" / "rules_fired.md"
RULES = ROOT / "tests" / "rules"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, RULES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page() -> str:
    """Return the page."""
    recipes, tested = load("recipes"), load("test_every_rule_fires")
    waiting = tested.OUT_OF_REACH
    fired = [name for name in rules() if name not in waiting]
    lines = [
        "# The recipe that fires each rule",
        "",
        f"{len(fired)} of {len(rules())} rules, each with a recipe that it refuses or warns about, alone, and a change",
        "that keeps it from firing; the model is a small Llama, changed as its comment says. Written by",
        "`tests/benchmarks/rules_fired.py`; tests plan them all, both ways.",
        "",
    ]
    for name in fired:
        lines += _entry(name, recipes)
    if waiting:
        lines += ["## Waiting", "", "| rule | for |", "|---|---|"]
        lines += [f"| [`{name}`](rules.md) | {waiting[name]} |" for name in rules() if name in waiting]
    return "\n".join(lines).rstrip() + "\n"


def _entry(name: str, recipes) -> Iterator[str]:
    case, near = recipes.case_of(name), recipes.near_miss(name)
    yield from (f"## `{name}`", "", "```yaml")
    yield from (*(written := _lines(case, recipes)), "```", "")
    yield from ("It doesn't fire with", "", "```diff")
    changed = difflib.unified_diff(written, _lines(near, recipes), n=0, lineterm="")
    yield from (*(line for line in changed if not line.startswith(("---", "+++", "@@"))), "```", "")


def _lines(case, recipes) -> list[str]:
    told = (("model", "model"), ("draft", "draft"), ("host", "this machine"), ("packages", "installed"))
    lines = [f"# {where}: {json.dumps(case[what])}" for what, where in told if case.get(what)]
    lines += [f"# targets.toml: {line}" for line in recipes.targets(case).splitlines()]
    return lines + recipes.recipe(case).splitlines()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE.relative_to(ROOT)}\n")
