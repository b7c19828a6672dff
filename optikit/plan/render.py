"""A plan as people and programs read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from optikit.plan import placement, serve_section, speculated
from optikit.plan.model import Plan, Step
from optikit.targets import attention, published
from optikit.targets.estimate import floors, told

if TYPE_CHECKING:
    from optikit.models.facts import ModelFacts
    from optikit.problems import Problem
    from optikit.store.store import Store

SHORT_SECONDS = 600
"""Below this nobody asks where it would be faster."""
HEADINGS = ("step", "status", "time", "peak memory", "disk", "writes")


def render(plan: Plan, store: Store) -> str:
    """Return the plan as a table with totals, 100 columns at most.

    The time of a cached step is counted as nothing; all figures are estimates and say so.
    """
    steps = (*plan.steps, *plan.measures)
    todo = [step for step in steps if store.find(step.key) is None]
    rows = [HEADINGS, *(_row(step, cached=step not in todo) for step in steps)]
    total = sum(step.estimate.seconds for step in todo)
    peak = max((step.estimate.peak_bytes for step in todo), default=0)
    disk = sum(step.estimate.disk_bytes for step in todo)
    model = plan.facts
    final = plan.steps[-1].after if plan.steps else plan.facts
    shape = f"{model.parameters / 1e6:.0f} M parameters, {model.layers} layers, hidden {model.hidden}"
    if model.experts:
        active = f"{model.active_parameters / 1e6:.0f} M active"
        shape += f", {model.experts_chosen} of {model.experts} experts ({active})"
    expected = f"about {_seconds(total)}, peak {_mib(peak)}, disk {_mib(disk)} (estimates)"
    lines = [
        f"model   {plan.model.resolved}",
        f"        {model.model_type}, {shape}, {_mib(model.weight_bytes)}",
        f"        {attention.told(model)}{_computed(plan)}",
        *(f"        carried as it is: {name} ({count} tensors)" for name, count in model.carried.items()),
        *_beside(plan),
        f"target  {plan.target.name}",
        *serve_section.lines(plan),
        *speculated.lines(plan),
        "",
        *_table(rows),
        "",
        f"to do   {len(todo)} of {len(steps)} steps, {expected}",
        *_elsewhere(plan, todo),
        "",
        *_floors(plan, final),
        *placement.lines(plan),
        *(line for warning in plan.warnings for line in _warning(warning)),
    ]
    return "\n".join(lines)


def _elsewhere(plan: Plan, todo: Sequence[Step]) -> Iterator[str]:
    """Yield that times are a CPU's where a GPU computes, and what others published of GPUs."""
    if plan.device == "cuda":
        yield "        times are those of two CPU cores: none was measured on a GPU"
    for step in todo:
        row = published.find(step.verb, step.method, str(getattr(step.options, "scheme", "")))
        if row is not None and step.estimate.seconds > SHORT_SECONDS:
            yield f"        {step.name}: {row.told(step.before.parameters)}"


def _computed(plan: Plan) -> str:
    """Say what the engines that the recipe names compute attention with."""
    engines = [step.method for step in plan.steps if step.verb == "compile"]
    engines += [entry.server for entry in plan.recipe.serve]
    used = {name: attention.used(name, plan.facts, plan.target) for name in engines}
    return "".join(f"; {name}: {kernel}" for name, kernel in used.items() if kernel)


def _warning(problem: Problem) -> Iterator[str]:
    place = f"{problem.mark}: " if problem.mark else ""
    yield f"warning: {place}{problem.message} [{problem.code}]"
    if problem.fix:
        yield f"    = fix: {problem.fix}"


def _beside(plan: Plan) -> Iterator[str]:
    """Yield what else is to be known of a model: what isn't here yet, and how its weights are packed."""
    if plan.model.absent:
        yield f"        {plan.model.absent}: its weights are asked for when it is run"
    elif plan.unread:
        names = ", ".join(dict.fromkeys(model.spec for model in plan.unread))
        yield f"        not read yet: {names}; steps count as to run"
    if plan.facts.packing:
        yield f"        {plan.facts.packing}: {plan.steps[0].after.dtype} weights are made of it first"


def _floors(plan: Plan, final: ModelFacts) -> list[str]:
    """Return floors of serving as the recipe says it is served; on the whole target where it doesn't say."""
    words = serve_section.served(plan)
    devices = (words.get("tensor_parallel") or 0) * (words.get("pipeline_parallel") or 1)
    length = min(words.get("sequence_length") or _length(plan), plan.facts.max_positions)
    whole = plan.target
    mine = whole.part(devices) if 0 < devices <= whole.devices else whole
    found = told(floors(final, mine, batch=words.get("batch_size") or 1, length=length), mine)
    if 0 < devices < whole.devices:
        kind = "cores" if whole.cores else "GPUs"
        found[0] = found[0].replace("serving on ", f"serving on {devices} of {whole.devices} {kind} of ", 1)
    return found


def _length(plan: Plan) -> int:
    """Return the tokens of one request as the recipe measures it; 2048 where it doesn't."""
    speed = plan.recipe.evaluate.speed
    wanted = speed.prompt_tokens + speed.new_tokens if speed else 2048
    return min(wanted, plan.facts.max_positions)


def _row(step: Step, *, cached: bool) -> tuple[str, ...]:
    estimate = step.estimate
    writes = ", ".join(sorted(step.after.traits)) if step.writes != "measurement" else ""
    if cached:
        return (step.name, "cached", "", "", "", writes)
    figures = (_seconds(estimate.seconds), _mib(estimate.peak_bytes), _mib(estimate.disk_bytes))
    return (step.name, "to run", *figures, writes)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _mib(size: int) -> str:
    if size >= 10 * 2**30:
        return f"{size / 2**30:.1f} GiB"
    return f"{size / 2**20:.0f} MiB"


def as_json(plan: Plan, store: Store) -> dict[str, Any]:
    """Return the plan as plain data; sizes in bytes, times in seconds."""
    return {
        "schema_version": 1,
        "model": {"spec": plan.model.spec, "resolved": plan.model.resolved, "digest": plan.model.digest},
        "packing": plan.facts.packing,
        "target": plan.target.name,
        "steps": [_step(step, store, plan.keyless) for step in plan.steps],
        "measures": [_step(step, store, plan.keyless) for step in plan.measures],
        "serve": serve_section.as_json(plan),
        "speculators": speculated.as_json(plan),
        "warnings": [warning.message for warning in plan.warnings],
    }


def _step(step: Step, store: Store, keyless: frozenset[str]) -> dict[str, Any]:
    return {
        "name": step.name,
        "verb": step.verb,
        "method": step.method,
        "backend": step.backend,
        "options": step.options.model_dump(mode="json"),
        "key": "" if step.key in keyless else step.key,
        "cached": store.find(step.key) is not None,
        "estimate_seconds": step.estimate.seconds,
        "estimate_peak_bytes": step.estimate.peak_bytes,
        "estimate_disk_bytes": step.estimate.disk_bytes,
        "traits": sorted(step.after.traits),
    }
