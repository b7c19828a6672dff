"""The limits that a recipe's gates set, each with the metric and the step that it is about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optikit.problems import Loc
from optikit.recipe.schema import step_name

if TYPE_CHECKING:
    from optikit.recipe.schema import Gate, Limit, Recipe


@dataclass(frozen=True)
class Asked:
    """One limit of a recipe: on which metric, after which step as the author wrote it ("" is the result)."""

    metric: str
    step: str
    limit: Limit

    @property
    def loc(self) -> Loc:
        """Its place in the recipe."""
        return ("gates", self.metric, "steps", self.step) if self.step else ("gates", self.metric)


def asked(gates: Mapping[str, Gate], on_fail: str = "") -> Iterator[Asked]:
    """Yield every limit of a recipe's gates, the result's before those of steps; `on_fail` picks some of them."""
    for metric, gate in gates.items():
        own = [] if gate.min is None and gate.max is None else [Asked(metric, "", gate)]
        for each in (*own, *(Asked(metric, step, limit) for step, limit in gate.steps.items())):
            if on_fail in ("", each.limit.on_fail):
                yield each


def steps_named(recipe: Recipe, written: str) -> tuple[str, ...]:
    """Return the names of the steps that an author may have meant: one, unless a recipe has a method twice."""
    entries = ((step_name(index, entry), entry) for index, entry in enumerate(recipe.stages))
    return tuple(name for name, entry in entries if written in (name, f"{entry.verb}.{entry.method}"))
