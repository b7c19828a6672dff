"""`optikit sweep` as one function: variants of a recipe, planned, run here or on a cluster, compared, reported.

    OUT/  sweep.json   every variant with its figures, written anew whenever a run ends
          sweep.html   the same for people, with the Pareto picture
          variants/NAME/  recipe.yaml   run.log   out/   what `optikit run` left

A sweep that was killed goes on with the same command: finished variants are recognized by their outputs, the others by
the store. Variants that begin with the same step wait for the first that makes it; leases of the store see to it that
no two make it at once, wherever they run.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from optikit import __version__, host, targets
from optikit.app import device, sweep_search
from optikit.app.sweep_planning import RECIPE, Planner, Unit
from optikit.app.sweep_search import FULL, Round, Seen
from optikit.errors import CannotCreateError, LockedError, OptikitError, UsageError
from optikit.evaluation import sweep_results
from optikit.evaluation.results import Report
from optikit.evaluation.sweep_results import Figures, StepKey, Sweep, VariantResult
from optikit.execution import child_runs
from optikit.execution.child_runs import RETRIED, InTurn, Outcome, Runner, Task
from optikit.execution.execute import Signals
from optikit.progress import make as make_progress
from optikit.recipe import variants
from optikit.recipe.sweep_section import parse_budget
from optikit.recipe.variants import Varied
from optikit.report import compare, sweep_page
from optikit.report.write import load as load_report
from optikit.report.write import put
from optikit.store.lease import KernelLock
from optikit.store.store import Store

JSON = "sweep.json"
LOCK = ".sweep.lock"
MOST_ATTEMPTS = 3
POLL_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for.

    Attributes:
        recipe: Recipe file.
        out: Directory of the sweep.
        varied: `--vary` arguments.
        overrides: `--set` arguments.
        changed: Keys of the recipe's section that the command line decides.
        address: Ray cluster; "" runs one after another in this process.
        cpus, gpus: Of one run on a cluster; no number of processors is all of a node.
        usd_per_hour: Price of a node.
        device, offline, targets, progress: As of `optikit run`.
    """

    recipe: Path
    out: Path
    varied: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    changed: Mapping[str, Any] = field(default_factory=dict)
    address: str = ""
    cpus: int | None = None
    gpus: int = 0
    usd_per_hour: float | None = None
    device: str = "auto"
    offline: bool = False
    targets: Path | None = None
    progress: str = "auto"


def sweep(request: Request) -> Sweep:
    """Run a sweep and write its report.

    Returns:
        What it found, also where a budget ended it.

    Raises:
        RecipeError: What varies is wrong, or no variant can work.
        InterruptError, TerminatedError: A signal; the report is written, and the same command goes on.
        OptikitError: As `optikit plan`, of no variant in particular.
    """
    known = targets.names(request.targets)
    varied = variants.read(
        request.recipe,
        varied=request.varied,
        overrides=request.overrides,
        changed=request.changed,
        known_targets=known,
    )
    budget = parse_budget(varied.section.budget)
    if budget.usd is not None and request.usd_per_hour is None:
        raise UsageError("a budget in $ needs the price of a node", fix="add --usd-per-hour 3.06, or give a time: 2h")
    with _directory(request.out), make_progress(request.progress) as progress:
        store = Store.default(warn=progress.note)
        driver = Driver(request=request, varied=varied, store=store, note=progress.note)
        with Signals(), driver.shared():  # after Ray, which takes signals for itself when it starts
            try:
                driver.run()
            except BaseException as error:
                driver.halted(error)
                raise
            finally:
                found = driver.report()
    return found


@contextmanager
def _directory(out: Path) -> Iterator[None]:
    """Make the sweep's directory, or take one that a sweep wrote, for this process alone."""
    try:
        if out.is_dir() and any(out.iterdir()) and not (out / LOCK).exists():
            raise CannotCreateError(f"{out} holds something else than a sweep", fix="choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        lock = KernelLock(out / LOCK)
        taken = lock.take()
    except OSError as error:
        raise CannotCreateError(f"{out} can't be written: {error.strerror}", fix="choose another --out") from error
    try:
        if not taken:
            raise LockedError(f"another sweep writes {out}", fix="wait for it, or choose another --out")
        yield
    finally:
        lock.let_go()


def _device(request: Request) -> str:
    """Return what runs are told to compute on: on a cluster a GPU only where they get one."""
    if request.address and request.device == "auto":
        return "cuda" if request.gpus else "cpu"
    return request.device


def _gpus(request: Request) -> int:
    return max(request.gpus, 1) if request.device == "cuda" else request.gpus


@dataclass(kw_only=True)
class Driver:
    """A sweep on its way."""

    request: Request
    varied: Varied
    store: Store
    note: Any
    results: dict[str, VariantResult] = field(default_factory=dict)
    reports: dict[str, Report] = field(default_factory=dict)
    ended: str = ""

    def __post_init__(self) -> None:
        request = self.request
        self._began = time.monotonic()
        self._before = self._earlier()
        self._budget = parse_budget(self.varied.section.budget)
        self._token = f"sweep-{os.urandom(8).hex()}.token"
        self._made: set[str] = set()
        self._busy = self._before.busy_seconds if self._before else 0.0
        self.runner: Runner = self._runner()
        self._device = _device(request)
        self.planner = Planner(
            varied=self.varied,
            out=request.out.absolute(),
            store=self.store,
            device=device.choose(self._device) if self._device != "cuda" else self._device,
            offline=request.offline,
            targets=request.targets,
            note=self.note,
        )

    def _runner(self) -> Runner:
        if not self.request.address:
            return InTurn(self._require_budget)
        from optikit.execution.ray_nodes import OnRay

        return OnRay(self.request.address, cpus=self.request.cpus, gpus=_gpus(self.request))

    def _earlier(self) -> Sweep | None:
        with suppress(OSError, ValidationError):
            return Sweep.model_validate_json((self.request.out / JSON).read_text(encoding="utf-8"))
        return None

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Leave a file in the store by which nodes know that it is theirs, too."""
        path = self.store.root / "locks" / self._token
        path.touch()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    # ------------------------------------------------------------------ running

    def run(self) -> None:
        """Run rounds of variants until there is nothing left to try, or the budget is spent."""
        search = sweep_search.make(self.varied, self.runner.slots)
        seen = Seen(figures={}, dominated={})
        while not self.ended and (wanted := search.next(seen)):
            self._round(wanted)
            seen = self._seen(wanted)

    def _round(self, wanted: Round) -> None:
        """Plan the variants of a round, and run those that have no result yet."""
        if wanted.rung == FULL:
            self._drop(wanted)
        units, results = self.planner.units(wanted.choices, wanted.rung, wanted.share)
        for result in results:
            self._know(result, wanted.rung)
        waiting = [unit for unit in units if not self._is_done(unit)]
        self.note(f"{len(units)} of {len(results)} variants can run, {len(units) - len(waiting)} are done")
        refused = [result for result in results if result.status == "refused"]
        for result in refused:
            self.note(f"{result.name} is refused: {result.reason}")
        self._write()
        self._run(waiting)

    def _run(self, waiting: list[Unit]) -> None:
        """Keep the runner busy until nothing waits or runs, or the budget is spent."""
        running: dict[str, Unit] = {}
        while (waiting or running) and not self._is_over():
            while unit := self._next(waiting, running):
                waiting.remove(unit)
                running[unit.name] = unit
                self._start(unit)
            for outcome in self.runner.ended(POLL_SECONDS):
                self._take(running.pop(outcome.name), outcome, waiting)
        self._stop(running, waiting)

    def _drop(self, wanted: Round) -> None:
        kept = {self.varied.name(choice) for choice in wanted.choices}
        for name, result in self.results.items():
            if name not in kept and result.status == "done" and result.rung:
                reason = f"not among the better third of cheap measurement {result.rung}"
                self.results[name] = result.model_copy(update={"status": "dropped", "reason": reason})

    def _know(self, result: VariantResult, rung: int) -> None:
        """Enter a variant, with what earlier runs of it took."""
        earlier = {each.name: each for each in self._before.variants} if self._before else {}
        before = self.results.get(result.name) or earlier.get(result.name)
        if before is not None:
            names = ("seconds", "attempts", "steps", "node", "rung")
            result = result.model_copy(update={name: getattr(before, name) for name in names})
        self.results[result.name] = result if rung == FULL else result.model_copy(update={"rung": rung + 1})

    def _next(self, waiting: Sequence[Unit], running: Mapping[str, Unit]) -> Unit | None:
        """Return what to start next: what most others wait for, of what needn't wait for what is being made.

        None where nothing can start now.
        """
        if len(running) >= self.runner.slots:
            return None
        claimed = {key for unit in running.values() for key in self._missing(unit)}
        wanted: dict[str, int] = {}
        for unit in waiting:
            for key in self._missing(unit):
                wanted[key] = wanted.get(key, 0) + 1
        ready = [unit for unit in waiting if not (set(self._missing(unit)[:1]) & claimed)]

        def worth(unit: Unit) -> tuple[bool, float]:
            begun = self.results[unit.variant].attempts > 0  # what was stopped is nearer to a result
            return begun, sum(unit.seconds[key] * wanted[key] for key in self._missing(unit))

        return max(ready, key=worth, default=None)

    def _missing(self, unit: Unit) -> list[str]:
        """Return the keys of the steps that nobody made yet."""
        self._made |= {key for key in unit.keys if key not in self._made and self.store.artifact_path(key).is_dir()}
        return [key for key in unit.keys if key not in self._made]

    def _start(self, unit: Unit) -> None:
        result = self.results[unit.variant]
        self._set(unit, status="running", attempts=result.attempts + 1)
        self.note(f"{unit.name} starts{'' if not result.attempts else f', attempt {result.attempts + 1}'}")
        self.runner.start(self._task(unit))

    def _task(self, unit: Unit) -> Task:
        request = self.request
        options = ["--device", self._device, *(["--offline"] if request.offline else [])]
        options += ["--targets", str(request.targets.absolute())] if request.targets else []
        return Task(
            name=unit.name,
            recipe=unit.recipe,
            base=self.varied.base.absolute(),
            out=unit.out,
            log=unit.log,
            options=tuple(options),
            store=self.store.root,
            seen=self.planner.out / LOCK,
            store_token=self._token,
            cpus=request.cpus,
            gpus=_gpus(request),
            memory_bytes=unit.memory_bytes,
        )

    def _take(self, unit: Unit, outcome: Outcome, waiting: list[Unit]) -> None:
        """Enter how a run ended; one that may end well another time waits again."""
        result = self.results[unit.variant]
        self._busy += outcome.seconds
        known = {"seconds": result.seconds + outcome.seconds, "node": outcome.node, "code": outcome.code}
        if outcome.code is None:
            self._set(unit, status="stopped", reason=self.ended or "stopped", **known)
        elif self._is_done(unit):
            self._set(unit, **known)
        elif outcome.code in RETRIED and result.attempts < MOST_ATTEMPTS:
            self._set(unit, status="waiting", reason=outcome.message, **known)
            waiting.append(unit)
        else:
            reason = outcome.message or f"exit code {outcome.code}; see {unit.log}"
            self._set(unit, status="failed", reason=reason, **known)
        now = self.results[unit.variant]
        self.note(f"{unit.name} {now.status} after {outcome.seconds:.0f} s{f': {now.reason}' if now.reason else ''}")
        self._write()

    def _is_done(self, unit: Unit) -> bool:
        """Return whether a unit's output is there, of this very recipe and these steps; enter what it says."""
        try:
            same = (unit.out / RECIPE).read_bytes() == unit.recipe.read_bytes()
            report = load_report(unit.out) if same else None
        except (OSError, OptikitError):
            return False
        if report is None or not {step.key for step in (*report.steps, *report.measures)} <= set(unit.keys):
            return False
        self.reports[unit.variant] = report
        steps = tuple(
            StepKey(name=step.name, key=step.key, status=step.status, seconds=step.seconds)
            for step in (*report.steps, *report.measures)
        )
        self._set(
            unit,
            status="done",
            reason="",
            verdict=report.verdict if unit.rung == FULL else None,
            figures=sweep_results.figures(report),
            steps=steps,
        )
        return True

    def _set(self, unit: Unit, **changes: Any) -> None:
        self.results[unit.variant] = self.results[unit.variant].model_copy(update=changes)

    # ------------------------------------------------------------------ ending

    @property
    def _spent(self) -> float:
        before = self._before.spent_seconds if self._before else 0.0
        return before + time.monotonic() - self._began

    @property
    def _usd(self) -> float | None:
        """Price of all nodes for the time that it took."""
        price = self.request.usd_per_hour
        return None if price is None else price * len(self.runner.nodes) * self._spent / 3600

    def _is_over(self) -> bool:
        usd, most = self._usd, self._budget
        late = most.seconds is not None and self._spent > most.seconds
        if late or (most.usd is not None and usd is not None and usd > most.usd):
            self.ended = f"the budget of {self.varied.section.budget} is spent"
        return bool(self.ended)

    def _require_budget(self) -> None:
        if self._is_over():
            raise child_runs.stopped()

    def _stop(self, running: Mapping[str, Unit], waiting: Sequence[Unit]) -> None:
        if not (running or waiting):
            return
        for outcome in self.runner.stop():
            if outcome.name in running:
                self._take(running[outcome.name], outcome, [])
        for unit in waiting:
            self._set(unit, status="stopped", reason=self.ended)

    def halted(self, error: BaseException) -> None:
        """Enter that an error or a signal ends the sweep; what runs is stopped, and can go on."""
        self.ended = getattr(error, "message", "") or type(error).__name__
        self.runner.stop()
        for name, result in self.results.items():
            if result.status in ("waiting", "running"):
                self.results[name] = result.model_copy(update={"status": "stopped", "reason": self.ended})

    # ------------------------------------------------------------------ reporting

    def _seen(self, wanted: Round) -> Seen:
        names = {self.varied.name(choice) for choice in wanted.choices}
        done = {name: r.figures for name, r in self.results.items() if name in names and r.status == "done"}
        return Seen(figures=done, dominated=self._dominated(done))

    def _dominated(self, figures: Mapping[str, Figures]) -> dict[str, tuple[str, ...]]:
        runs: dict[str, compare.Run] = {}

        def run(name: str) -> compare.Run:
            if name not in runs:
                report = self.reports[name]
                runs[name] = compare.Run(name=name, report=report, nll=compare.stored_nll(report, self.store))
            return runs[name]

        def compared(one: str, other: str) -> dict[str, str]:
            return {line.key: line.outcome for line in compare.compare(run(one), run(other)).lines}

        return sweep_results.front(figures, compared)

    def report(self) -> Sweep:
        """Judge who is on the front, write everything, and return it."""
        done = {name: result.figures for name, result in self.results.items() if result.status == "done"}
        dominated = self._dominated(done)
        for name, by in dominated.items():
            self.results[name] = self.results[name].model_copy(update={"on_front": not by, "dominated_by": by})
        found = self._write()
        put(self.request.out / "sweep.html", sweep_page.render_html(found))
        return found

    def _write(self) -> Sweep:
        found = self._found()
        put(self.request.out / JSON, found.model_dump_json(indent=1) + "\n")
        return found

    def _found(self) -> Sweep:
        results = tuple(self.results.values())
        steps = [step for result in results for step in result.steps]
        return Sweep(
            recipe=str(self.request.recipe),
            search=self.varied.section.search,
            seed=self.varied.section.seed,
            variants=results,
            front=tuple(result.name for result in results if result.on_front),
            steps_made=sum(step.status == "executed" for step in steps),
            steps_found=sum(step.status == "cached" for step in steps),
            nodes=self.runner.nodes,
            budget=self.varied.section.budget,
            spent_seconds=self._spent,
            busy_seconds=self._busy,
            usd_per_hour=self.request.usd_per_hour,
            spent_usd=self._usd,
            ended=self.ended,
            host=host.describe(),
            versions={"optikit": __version__, "python": platform.python_version()},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=shlex.join(["optikit", *sys.argv[1:]]),
        )
