"""Write examples/rules_fired.md: for every rule the recipe that fires it, as test_every_rule_fires.py plans it.

python tests/benchmarks/rules_fired.py
"""

from __future__ import annotations

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
        f"{len(fired)} of {len(rules())} rules, each with a recipe that it refuses or warns about; the model is a",
        "small Llama, changed as its comment says. Written by `tests/benchmarks/rules_fired.py`; tests plan them all.",
        "",
    ]
    for name in fired:
        lines += _entry(name, recipes.case_of(name), recipes)
    lines += ["## Out of reach", "", "| rule | why |", "|---|---|"]
    lines += [f"| [`{name}`](rules.md) | {waiting[name]} |" for name in rules() if name in waiting]
    return "\n".join(lines) + "\n"


def _entry(name: str, case, recipes) -> Iterator[str]:
    yield from (f"## `{name}`", "", "```yaml")
    for what, where in (("model", "model"), ("draft", "draft"), ("host", "this machine")):
        if case.get(what):
            yield f"# {where}: {json.dumps(case[what])}"
    yield from (f"# targets.toml: {line}" for line in recipes.targets(case).splitlines())
    yield from (*recipes.recipe(case).splitlines(), "```", "")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE.relative_to(ROOT)}\n")
