"""Files and documents check each other: README with CI, recipes with examples, the sources with themselves."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from optikit.cli.app import VERBS
from optikit.recipe.load import load
from optikit.report.write import load as load_report
from tests.test_layout import GROUND, PACKAGES

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


def contributing() -> str:
    return (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_package_is_on_the_map_in_its_order() -> None:
    starts = re.findall(r"^- ((?:`\w+(?:/|\.py)`,? )+)\w", contributing(), re.MULTILINE)
    assert [name for start in starts for name in re.findall(r"\w+(?=/|\.py)", start)] == [*PACKAGES, *GROUND]


def missing(text: str) -> list[str]:
    """Return paths that a text names and that don't exist; from a word in capitals on, a path is a pattern."""
    for folder, names in re.findall(r"([\w/]+/)\{([\w,]+)\}", text):
        text += "".join(f" `{folder}{name}`" for name in names.split(","))
    named = re.findall(r"`(?:pytest )?((?:optikit|tests|recipes|examples|\.ci)/[\w./-]*|[A-Z]+\.md)`?", text)
    kept = [name if name.endswith(".md") else re.split(r"/[^/]*[A-Z]{3}", name)[0] for name in named]
    assert kept
    return [name for name in kept if not (ROOT / name).exists()]


def test_paths_that_contributing_names_exist() -> None:
    assert missing(contributing()) == []
    assert missing("`README.md`, `optikit/stages/VERB/METHOD.py` and `optikit/gone.py`") == ["optikit/gone.py"]
    assert missing("`pytest tests/{plan,gone} tests/test_*.py`") == ["tests/gone"]


def test_commits_that_contributing_names_exist() -> None:
    hashes = re.findall(r"\b(?=[a-f]*\d)[0-9a-f]{7}\b", contributing())
    assert len(hashes) >= 5
    git = ["git", "-C", str(ROOT)]
    if subprocess.run([*git, "rev-parse", "--verify", "HEAD"], capture_output=True, check=False).returncode:
        pytest.skip("not a clone")
    if subprocess.check_output([*git, "rev-parse", "--is-shallow-repository"], text=True).strip() == "true":
        pytest.skip("a shallow clone holds no history")
    # A commit that was rebased still lies in the clone where it was made: only what HEAD descends from is everybody's.
    ancestor = [*git, "merge-base", "--is-ancestor"]
    gone = [
        name
        for name in hashes
        if subprocess.run([*ancestor, name, "HEAD"], capture_output=True, check=False).returncode
    ]
    assert gone == []


def test_sources_are_shipped_with_the_page() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    shipped = settings["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests"} <= {*shipped, settings["project"]["readme"]}


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
