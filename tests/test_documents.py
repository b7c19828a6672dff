"""Files and documents check each other: README with CI, recipes with examples, the sources with themselves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from optikit.cli.app import VERBS
from optikit.recipe.load import load
from optikit.report.write import load as load_report

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
EXAMPLES = sorted(path.parent for path in (ROOT / "examples").glob("*/report.json"))


def readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.strip().splitlines()]


def test_two_command_lines_do_everything_and_ci_runs_the_second() -> None:
    main, tests = readme_commands()[:2]
    assert "optikit run recipes/quickstart.yaml --out out/" in main
    assert tests in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_readme_names_every_verb() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not {name for name in VERBS if f"`{name}" not in text and f", `{name}" not in text}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_says_how_to_run_it(path: Path) -> None:
    load(path)
    assert f"optikit run recipes/{path.name} --out" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_a_recorded_report_belongs_to_a_recipe_and_says_how_it_was_made(example: Path) -> None:
    assert (ROOT / "recipes" / f"{example.name}.yaml").is_file()
    assert f"optikit run recipes/{example.name}.yaml" in (example / "README.md").read_text(encoding="utf-8")
    assert load_report(example).verdict in ("pass", "fail", "inconclusive")


def test_the_quickstart_has_its_recorded_report() -> None:
    assert "quickstart" in {example.name for example in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_a_recorded_report_tells_no_path_of_the_machine_that_made_it(example: Path) -> None:
    for path in example.iterdir():
        if path.suffix in (".json", ".md", ".html"):
            assert not re.search(r"/(work|root|home|tmp)/", path.read_text(encoding="utf-8")), path


def test_the_shipped_examples_are_small() -> None:
    for path in (ROOT / "examples").rglob("*"):
        assert path.is_dir() or path.stat().st_size < 1_000_000, path


def test_recorded_json_is_json() -> None:
    for path in (ROOT / "examples").rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))
