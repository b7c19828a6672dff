"""How a compiled model lies on its target, with what drafts for it, in lines for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from optikit import stages
from optikit.models.reader import read
from optikit.plan.context import at
from optikit.recipe.schema import step_name
from optikit.stage import Drafting, Placing

if TYPE_CHECKING:
    from optikit.models.facts import ModelFacts
    from optikit.plan.model import Plan


def lines(plan: Plan) -> Iterator[str]:
    """Yield what the compile stage says of where things lie; nothing where it has nothing to say."""
    for step in plan.steps:
        stage = stages.load(step.verb, step.method, step.backend)
        if isinstance(stage, Placing):
            models = (step.before, *drafts(plan))
            yield from stage.placed(step.options, plan.target, models, _medusa_heads(plan))


def drafts(plan: Plan) -> Iterator[ModelFacts]:
    """Yield the facts of the drafts that a plan's stages bring."""
    planned = {step.name: step for step in plan.steps}
    for index, entry in enumerate(plan.recipe.stages):
        step = planned.get(step_name(index, entry))
        if step is None or not isinstance(entry.stage, Drafting):
            continue
        roles = {role: plan.models.get(at(index, role)) for role in entry.stage.inputs(entry.options)}
        models = {role: read(found.path, promised=True) for role, found in roles.items() if found is not None}
        draft = entry.stage.drafts(entry.options, step.before, models)
        yield from (each for each in (draft,) if each is not None)


def _medusa_heads(plan: Plan) -> int:
    options = (step.options for step in plan.steps if step.method == "medusa")
    return next((int(getattr(each, "heads", 0)) for each in options), 0)
