"""`optikit run` as one function: load, plan, execute, evaluate, write. This is the whole program as one list."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from optikit import evaluate, on_fail, output, targets, terminal
from optikit.errors import DiskError, UsageError
from optikit.plan import Plan, make_plan
from optikit.plan import frozen as frozen_plan
from optikit.recipe.load import load
from optikit.runner import Settings, execute
from optikit.store.store import Store

if TYPE_CHECKING:
    from optikit.plan.frozen import Frozen
    from optikit.report.schema import Report


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for."""

    recipe: Path
    out: Path
    overrides: tuple[str, ...] = ()
    until: str | None = None
    offline: bool = False
    progress: str = "auto"
    device: str = "auto"
    targets: Path | None = None
    junit: Path | None = None
    lock_timeout: float | None = None
    ranks: int = 1
    resume: bool = False


def run_recipe(request: Request) -> Report | None:
    """Run a recipe and write its output directory.

    Returns:
        The report; None with `until`, when nothing was evaluated yet.

    Raises:
        OptikitError: Anything that goes wrong, by the table of exit codes.
    """
    started = time.monotonic()
    frozen = frozen_plan.read(request.recipe)
    if frozen is not None:
        request = _as_planned(request, frozen)
    loaded = load(request.recipe, overrides=request.overrides, known_targets=targets.names(request.targets))
    if frozen is not None:
        frozen_plan.require_recipe(frozen, loaded)
    output.require_writable(request.out)
    store = Store.default()
    with terminal.make(request.progress) as progress:
        plan = make_plan(
            loaded,
            store,
            offline=request.offline,
            device=_device(request.device),
            extra_targets=request.targets,
            note=progress.note,
        )
        if frozen is not None:
            frozen_plan.require_same(frozen, plan, loaded)
        _require_step(plan, request.until)
        _require_disk(plan, store)
        for warning in plan.warnings:
            progress.note(f"warning: {warning.message}")
        settings = Settings(
            until=request.until,
            lock_timeout=request.lock_timeout,
            offline=request.offline,
            ranks=request.ranks,
            resume=request.resume,
        )
        execution = execute(plan, store, progress, settings, partial(on_fail.stop_at_gate, plan))
    if request.until is not None:
        output.write(request.out, loaded, plan, execution.artifacts)
        return None
    plan, rolled_back = on_fail.roll_back(plan, execution.artifacts)
    report = evaluate.report(
        plan,
        execution.artifacts,
        execution.statuses,
        seconds=time.monotonic() - started,
        command=shlex.join(["optikit", *sys.argv[1:]]),
        rolled_back=rolled_back,
    )
    output.write(request.out, loaded, plan, execution.artifacts)
    _tell(report, request)
    return report


def _as_planned(request: Request, frozen: Frozen) -> Request:
    """Return a request for a plan's file as one for its recipe, with what it was planned with."""
    if request.overrides or request.targets:
        fix = f"plan again: `optikit plan {frozen.recipe} --set … --out {frozen.path}`"
        raise UsageError("--set and --targets are part of a plan; they can't be given when it is run", fix=fix)
    device = frozen.device if request.device == "auto" else request.device
    return replace(request, recipe=frozen.recipe, overrides=frozen.overrides, targets=frozen.targets, device=device)


def _tell(report: Report, request: Request) -> None:
    from optikit.report import github, junit, summary, write

    write.write(report, request.out)
    if request.junit is not None:
        request.junit.write_text(junit.render(report), encoding="utf-8")
    github.publish(report)
    if request.progress != "none":
        summary.show(report, request.out)


def _device(wanted: str) -> str:
    """Return the torch device that calibrated stages will use; `auto` takes a GPU where its driver is present."""
    if wanted != "auto":
        return wanted
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def _require_step(plan: Plan, name: str | None) -> None:
    names = [step.name for step in (*plan.steps, *plan.measures)]
    if name is not None and name not in names:
        raise UsageError(f"--until {name!r} is no step of this recipe", fix=f"its steps are {', '.join(names)}")


def _require_disk(plan: Plan, store: Store) -> None:
    """Refuse before any work when the disk can't hold what the plan is expected to write."""
    missing = [step for step in (*plan.steps, *plan.measures) if store.find(step.key) is None]
    need = sum(step.estimate.disk_bytes for step in missing)
    need += max((step.estimate.scratch_bytes for step in missing), default=0)
    free = shutil.disk_usage(store.root).free
    if need > free:
        message = (
            f"the store {store.root} has {free / 2**20:.0f} MiB free, and this recipe needs {need / 2**20:.0f} MiB"
        )
        raise DiskError(message, fix="free space with `optikit cache gc`, or set OPTIKIT_HOME to a larger disk")
