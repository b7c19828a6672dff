"""The command line starts at once: nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from optikit.cli.app import VERBS

HEAVY = ("torch", "transformers", "numpy", "rich", "pydantic", "yaml", "onnxruntime", "onnx", "safetensors", "jinja2")


def modules_after(code: str) -> set[str]:
    """Run code in a fresh interpreter and return the top-level packages it imported."""
    program = f"import sys, json\n{code}\nprint('\\n' + json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def help_of(*arguments: str) -> str:
    return (
        f"sys.argv = {['optikit', *arguments]!r}\n"
        "from optikit.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code"
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert modules_after(help_of(*arguments)).isdisjoint(HEAVY)


@pytest.mark.parametrize("verb", ["run", "plan", "generate", "verify"])
def test_the_help_of_a_verb_imports_no_more_than_typer_itself_does(verb: str) -> None:
    assert modules_after(help_of(verb, "--help")).isdisjoint({*HEAVY} - {"pydantic"})


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_is_listed_can_be_imported_and_has_help(verb: str) -> None:
    done = subprocess.run([sys.executable, "-m", "optikit", verb, "--help"], capture_output=True, text=True, check=True)
    assert f"optikit {verb} " in done.stdout.splitlines()[0] + done.stdout.splitlines()[1]


def test_a_misspelt_verb_is_answered_with_the_right_one() -> None:
    done = subprocess.run([sys.executable, "-m", "optikit", "rum"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'run'" in done.stderr


def test_planning_needs_no_torch() -> None:
    found = modules_after("import optikit.plan, optikit.recipe.load, optikit.execution.execute, optikit.app.output_dir")
    assert found.isdisjoint({"torch", "transformers", "onnxruntime", "rich"})


def test_stages_are_known_without_what_they_compute_with() -> None:
    """Planning, `schema`, `stages` and `explain` import every stage, for its options and its card."""
    verbs = "(*stages.VERBS, 'acquire', 'measure')"
    each = "stages.load(verb, method, backend) for backend in stages.backend_names(verb, method)"
    found = modules_after(
        f"from optikit import stages\n[[{each}] for verb in {verbs} for method in stages.methods(verb)]"
    )
    assert "optikit" in found
    assert found.isdisjoint({"torch", "transformers", "numpy", "onnxruntime", "safetensors", "rich"})


def test_an_unknown_option_is_a_usage_error() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "optikit", "run", "--nope"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--nope" in done.stderr
