"""`optikit run` as one function: load, plan, execute, evaluate, write. This is the whole program as one list."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from optikit import targets
from optikit.app import device, output_dir
from optikit.errors import DiskError, GateFailedError, UsageError
from optikit.execution.execute import Settings, execute, until
from optikit.plan import Plan, make_plan, room
from optikit.plan import frozen as frozen_plan
from optikit.plan.measurements import SCORING
from optikit.progress import make as make_progress
from optikit.recipe import limits
from optikit.recipe.load import load
from optikit.report import assemble, judge
from optikit.store.sources import LOCK, check_lock, read_lock
from optikit.store.store import Store

if TYPE_CHECKING:
    from collections.abc import Mapping

    from optikit.evaluation.results import Report
    from optikit.plan import Step
    from optikit.plan.frozen import Frozen
    from optikit.store.store import Artifact


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for."""

    recipe: Path
    out: Path
    overrides: tuple[str, ...] = ()
    progress: str = "auto"
    device: str = "auto"
    targets: Path | None = None
    junit: Path | None = None
    update_lock: bool = False
    base: Path | None = None
    """Where the recipe's relative paths start; None is its own directory."""
    settings: Settings = field(default_factory=Settings)


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
    known = targets.names(request.targets)
    loaded = load(request.recipe, overrides=request.overrides, known_targets=known, base=request.base)
    if frozen is not None:
        frozen_plan.require_recipe(frozen, loaded)
    resume, waiting = request.settings.resume, request.settings.lock_timeout
    output_dir.require_writable(request.out, timeout=waiting, resume=resume)
    settings = replace(request.settings, returned=output_dir.returned(request.out) if resume else {})
    with make_progress(request.progress) as progress:
        store = Store.default(warn=progress.note)
        plan = make_plan(
            loaded,
            store,
            offline=request.settings.offline,
            device=device.choose(request.device),
            extra_targets=request.targets,
            note=progress.note,
        )
        if frozen is not None:
            frozen_plan.require_same(frozen, plan, loaded)
        _require_lock(plan, request)
        _require_step(plan, request.settings.until)
        steps = until(plan.order, request.settings.until)
        room.require(plan, steps, store, loaded.marks.mark, ranks=request.settings.ranks)
        _require_disk(plan, store)
        for warning in plan.warnings:
            progress.note(f"warning: {warning.message}")
        execution = execute(plan, store, progress, settings, partial(stop_at_gate, plan))
    written = partial(output_dir.write, request.out, loaded, store=store, timeout=waiting, resume=resume)
    if request.settings.until is not None:
        written(plan, execution.artifacts)
        return None
    plan, rolled_back = roll_back(plan, execution.artifacts)
    report = assemble.report(
        plan,
        execution.artifacts,
        execution.statuses,
        seconds=time.monotonic() - started,
        command=shlex.join(["optikit", *sys.argv[1:]]),
        rolled_back=rolled_back,
    )
    written(plan, execution.artifacts, report=report)
    _tell(report, request)
    return report


def _as_planned(request: Request, frozen: Frozen) -> Request:
    """Return a request for a plan's file as one for its recipe, with what it was planned with."""
    if request.overrides or request.targets or request.base:
        fix = f"plan again: `optikit plan {frozen.recipe} --set … --out {frozen.path}`"
        raise UsageError("--set, --targets and --base are part of a plan; they can't be given when it is run", fix=fix)
    planned = frozen.device if request.device == "auto" else request.device
    return replace(request, recipe=frozen.recipe, overrides=frozen.overrides, targets=frozen.targets, device=planned)


def _tell(report: Report, request: Request) -> None:
    from optikit.report import github, junit, summary, write

    if request.junit is not None:
        write.put(request.junit, junit.render(report))
    github.publish(report)
    if request.progress != "none":
        summary.show(report, request.out)


def _require_lock(plan: Plan, request: Request) -> None:
    """Compare every source with the locks of earlier runs, beside the recipe and in the output directory.

    Raises:
        IntegrityError: One changed, and --update-lock doesn't accept that.
    """
    if request.update_lock:
        return
    for directory in (request.base or request.recipe.parent, request.out):
        check_lock(read_lock(directory / LOCK), plan.sources)


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


def stop_at_gate(plan: Plan, finished: Step, artifacts: Mapping[str, Artifact]) -> None:
    """End the run if a step was measured that fails a gate with `on_fail: stop`.

    Raises:
        GateFailedError: Naming step, gate, value and limit.
    """
    made = next((step for step in plan.steps if step.name == finished.subject), None)
    if made is None or finished.method not in SCORING:
        return
    judged = assemble.judge(plan.until(made.name), artifacts, on_fail="stop")
    failed = [judge.describe(result, made.name) for result in judged if result.verdict == "fail"]
    if failed:
        fix = "change that step or the gate; `on_fail: keep_going` would measure the rest. Finished steps are kept"
        raise GateFailedError(f"stopped after {made.name}: {'; '.join(failed)}", fix=fix)


def _broken_gates(plan: Plan, name: str, artifacts: Mapping[str, Artifact]) -> list[str] | None:
    """Return the gates that a step doesn't pass, in words; None where it is emitted: nothing was measured of it."""
    judged = assemble.judge(plan.until(name), artifacts, on_fail="rollback")
    if judged and all(result.value is None for result in judged):
        return None
    return [judge.describe(result, name) for result in judged if result.verdict == "fail"]


def roll_back(plan: Plan, artifacts: Mapping[str, Artifact]) -> tuple[Plan, str]:
    """Return the plan that ends with the last step that passes all gates with `on_fail: rollback`, and why it does.

    Raises:
        GateFailedError: Not one step passes them.
    """
    made = [step for step in plan.steps if step.writes in ("model", "engine")]
    if not any(limits.asked(plan.recipe.gates, "rollback")):
        return plan, ""
    failed: list[str] = []
    for step in reversed(made):
        wrong = _broken_gates(plan, step.name, artifacts)
        if wrong is None:
            continue
        if not wrong:
            ended = f"Rolled back to {step.name}: " + "; ".join(failed)
            return (plan.until(step.name), ended + ".") if failed else (plan, "")
        failed.append(f"after {step.name} {', '.join(wrong)}")
    if not failed:
        return plan, ""
    fix = "use milder stages, or another limit; finished steps are kept"
    raise GateFailedError(f"no step passes, so nothing is left to roll back to: {'; '.join(failed)}", fix=fix)
