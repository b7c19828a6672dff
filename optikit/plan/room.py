"""Which steps need more memory than this machine has, or than the recipe allows: told by `plan`, refused by `run`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from optikit import host
from optikit.errors import RecipeError
from optikit.plan.model import Plan, Step
from optikit.problems import Loc, Mark, Problem
from optikit.recipe.schema import Recipe, step_name

if TYPE_CHECKING:
    from optikit.store.store import Store

GIB = 2**30
MEASURED: Mapping[str, Loc] = {
    "quality": ("evaluate", "perplexity"),
    "tasks": ("evaluate", "tasks"),
    "speed": ("evaluate", "speed"),
}
"""Where a recipe asks for what a measuring step does; others are asked for by `evaluate` as a whole."""


def fitted(steps: Iterable[Step], limit: int | None) -> tuple[Step, ...]:
    """Return steps with what they take within this machine's memory and a recipe's limit."""
    room = host.room_bytes(limit)
    return tuple(replace(step, estimate=step.estimate.within(room)) for step in steps)


def problems(
    recipe: Recipe, steps: Iterable[Step], limit: int | None, store: Store, ranks: int = 1
) -> Iterator[Problem]:
    """Yield which steps that aren't in the store yet would run out of memory.

    Beyond the recipe's own limit nothing is planned. A plan for a larger machine may be looked at on this one, so what
    only this machine lacks is a warning here.
    """
    here = host.room_bytes()
    for step in steps:
        each = step.estimate.peak_bytes
        need = each * (ranks if step.split else 1)
        bound = limit is not None and each > limit
        if (need <= here and not bound) or store.find(step.key) is not None:
            continue
        if limit is not None and bound:
            message = f"{step.name} needs about {each / 2**20:.0f} MiB, and max_memory is {limit / 2**20:.0f} MiB"
            elsewhere = " on a machine that has it" if need > here else ""
            fix = f"raise max_memory to {_rounded(each)} GiB{elsewhere}"
            yield Problem(code="memory-bound", message=message, fix=fix, loc=("max_memory",))
        else:
            message = f"{step.name} needs about {need / GIB:.1f} GiB of memory, and this machine has {here / GIB:.1f}"
            fix = f"run it on a machine that has {_rounded(need + host.KEPT_BYTES)} GiB"
            yield Problem(code="memory-machine", message=message, fix=fix, loc=_place(recipe, step), level="warning")


def _rounded(size: int) -> int:
    return -(-size // GIB)


def _place(recipe: Recipe, step: Step) -> Loc:
    """Return where a recipe asks for a step."""
    if step.verb == "acquire":
        return ("model",)
    if step.verb == "measure":
        return MEASURED.get(step.method, ("evaluate",))
    stages = {step_name(index, entry): ("stages", index, entry.verb) for index, entry in enumerate(recipe.stages)}
    return stages.get(step.name, ("evaluate", "attribution"))


def require(
    plan: Plan,
    steps: Iterable[Step],
    store: Store,
    mark: Callable[[Loc], Mark | None] = lambda _: None,
    *,
    ranks: int = 1,
) -> None:
    """Refuse to run steps of a plan that this machine's memory can't hold, calibrated ones `ranks` times.

    Where a GPU computes, estimates are too high, for they are of the processor: there a warning has to do.

    Raises:
        RecipeError: With every such step, at its `mark` in the recipe.
    """
    found = tuple(
        each
        for each in problems(plan.recipe, steps, plan.max_memory_bytes, store, ranks)
        if each.code == "memory-machine"
    )
    if found and plan.device == "cpu":
        message = f"this machine can't hold {'one step' if len(found) == 1 else f'{len(found)} steps'} of the plan"
        raise RecipeError(message, problems=[replace(each, level="error").at(mark(each.loc)) for each in found])
