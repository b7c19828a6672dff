"""`make_plan`: resolve the sources, check every stage against the facts it will meet, apply the rules, freeze."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit import stages, targets
from optikit.environments import cuda
from optikit.errors import RecipeError
from optikit.models import adapter, eagle3, traits
from optikit.models.facts import ModelFacts
from optikit.models.gguf_reader import read_gguf
from optikit.models.reader import read
from optikit.plan import check_gates, price, room, serve_section
from optikit.plan.check_texts import problems as text_problems
from optikit.plan.context import Context, Found, at, given, resolve_models, resolve_texts
from optikit.plan.measure_served import problems as served_problems
from optikit.plan.measure_serving import problems as serving_problems
from optikit.plan.measure_steps import ENGINE_BASELINE, length_problems, measure_steps, runtime_problems
from optikit.plan.measurements import scored_steps
from optikit.plan.model import Plan, Step, original_key
from optikit.problems import Problem
from optikit.recipe.schema import parse_size, step_name
from optikit.stage import Drafting, Input, Settling, row_problems
from optikit.store.sources import ModelSource, resolve_model
from optikit.targets import Target

if TYPE_CHECKING:
    from optikit.recipe.load import LoadedRecipe
    from optikit.store.store import Store


def make_plan(
    loaded: LoadedRecipe,
    store: Store,
    *,
    offline: bool = False,
    device: str = "cpu",
    extra_targets: Path | None = None,
    note: Callable[[str], None] = lambda _: None,
    weights: bool = True,
    digests: bool = True,
) -> Plan:
    """Resolve, check, estimate and freeze a recipe.

    Args:
        loaded: The recipe with its marks.
        store: Where downloads are kept; nothing else is written.
        offline: Use only what is already on this machine.
        device: torch device that calibrated stages will use; part of their keys, for it decides bits.
        extra_targets: A TOML file with more rows of targets.
        note: Told about downloads.
        weights: Fetch them; for a plan that isn't run, config.json or headers will do.
        digests: Read all of them for their sha256; a plan that isn't run knows without which of them are cached, where
            they were read before.

    Raises:
        RecipeError: With every problem at once, each at its place in the file.
        OptikitError: When a source can't be had (66, 69, 76, 77).
    """
    target = _target(loaded, extra_targets)
    how = {"offline": offline, "note": note, "weights": weights, "digests": digests}
    context = _resolve(loaded, target, store, device=device, **how)
    recipe = context.recipe
    limit = parse_size(recipe.max_memory) if recipe.max_memory else None
    steps, problems = _steps(context)
    measures = room.fitted(measure_steps(context, steps, _engine_steps(context, steps)), limit)
    steps = room.fitted(steps, limit)
    problems += [*_unjudged(loaded, context, measures), *served_problems(context, steps)]
    problems += [
        *text_problems(context, _acquired(steps, store)),
        *length_problems(context, measures),
        *runtime_problems(steps, measures),
        *serving_problems(context, measures),
    ]
    problems += _no_baseline(context, steps, measures)
    problems += serve_section.problems(context, steps, tuple(_fitting_drafts(context, steps)))
    problems += _on_the_cpu(context, (*steps, *measures))
    problems += room.problems(recipe, (*steps, *measures), limit, store)
    warnings = _refuse(loaded, problems)
    return Plan(
        recipe=recipe,
        target=context.target,
        model=context.model,
        facts=context.facts,
        texts=context.texts,
        models=context.models,
        steps=steps,
        measures=measures,
        max_memory_bytes=limit,
        device=context.device,
        warnings=warnings,
    )


def _resolve(loaded: LoadedRecipe, target: Target, store: Store, *, device: str, **how: Any) -> Context:
    recipe = loaded.recipe
    model = resolve_model(recipe.model, store, base=loaded.base, **how)
    return Context(
        recipe=recipe,
        device=device,
        target=target,
        model=model,
        facts=_facts(model),
        texts=resolve_texts(recipe, store, base=loaded.base, offline=how["offline"], note=how["note"]),
        models=resolve_models(recipe, store, base=loaded.base, **how),
    )


def _facts(model: ModelSource) -> ModelFacts:
    if model.format == "gguf":
        return read_gguf(model.path)
    if model.base is not None:
        return adapter.facts(model.path, model.base.path, promised=True)
    return read(model.path, promised=True)


def _target(loaded: LoadedRecipe, extra: Path | None) -> Target:
    name = loaded.recipe.target
    target = targets.find(name, extra)
    if target is None:
        problem = targets.unknown(name, targets.names(extra))
        raise _error(loaded, [problem.at(loaded.marks.mark(problem.loc))])
    priced, problems = price.priced(target, loaded.recipe.cost, extra)
    if problems:
        raise _error(loaded, [each.at(loaded.marks.mark(each.loc)) for each in problems])
    return priced


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
        found = [p.under("stages", index, entry.verb) for p in _stage_problems(context, index, facts)]
        problems += found
        if any(problem.code == "needs-trait" for problem in found):
            break
        step = _stage_step(context, index, facts, steps)
        steps.append(step)
        facts = step.after
    return tuple(steps), problems


def _acquire(context: Context) -> Iterator[Step]:
    """Yield the step that makes a model directory of float weights; one that has them needs none."""
    model = context.model
    method = model.format if model.format != "safetensors" else "dequantize" if _to_be_dequantized(context) else ""
    if method:
        what = ("acquire", method)
        found = {"base": given(model.base)} if model.base else {}
        options = stages.load(*what).Options()
        yield context.step(f"0-acquire-{method}", what, options, on=("", context.facts), found=found)


def _to_be_dequantized(context: Context) -> bool:
    """Tell whether no stage can read how the weights are packed, or the first one wants them as floats."""
    if context.facts.packing:
        return True
    stored = {row.trait for row in traits.of(context.facts.traits)} - {traits.DENSE}
    return bool(stored) and any("dense" in entry.stage.NEEDS for entry in context.recipe.stages[:1])


def _acquired(steps: Sequence[Step], store: Store) -> Path | None:
    """Return the directory that an earlier run made of a gguf file, where there was one."""
    made = next((store.find(step.key, verify="size") for step in steps if step.writes == "source"), None)
    return made.path if made else None


def _stage_problems(context: Context, index: int, facts: ModelFacts) -> Iterator[Problem]:
    """Yield why a stage can't do its work on a model with these facts."""
    entry = context.recipe.stages[index]
    stage = entry.stage
    missing = sorted(stage.NEEDS - facts.traits)
    if missing:
        has = ", ".join(sorted(facts.traits))
        message = f"{entry.method} needs a model that is {missing[0]}, but gets one that is {has}"
        yield Problem(code="needs-trait", message=message, fix="remove or reorder the stages before it")
        return
    for role, wanted in stage.inputs(entry.options).items():
        yield from _input_problems(context, index, role, wanted)
    models = dict(_model_facts(context, index))
    yield from stage.fits(entry.options, facts, models)
    rowless = list(row_problems(stage, entry.method, entry.options, facts))
    yield from rowless
    if not any(problem.level == "error" for problem in rowless):
        yield from stage.check(entry.options, facts, context.target)


def _input_problems(context: Context, index: int, role: str, wanted: Input) -> Iterator[Problem]:
    """Yield why an input that a stage declares can't be had."""
    method = context.recipe.stages[index].method
    if wanted.of == "calibration" and context.recipe.calibration is None:
        message = f"{method} reads calibration text, and the recipe names none"
        yield Problem(code="needs-calibration", message=message, fix="add `calibration: {text: …}` to the recipe")
    if wanted.of == "prompts" and context.stage_text(index, role) is None:
        message = f"{method} is chosen and judged on prompts, and the recipe names none"
        fix = f"add `{wanted.option}: FILE.jsonl` to the stage, or `prompts:` to `evaluate: {{speed: …}}`"
        yield Problem(code="needs-prompts", message=message, fix=fix)
    model = context.models.get(at(index, role))
    if model is not None and model.format != "safetensors":
        kind = "an adapter" if model.base else "a gguf file"
        message, fix = f"{model.spec} is {kind}", "name a directory that transformers can load"
        yield Problem(code="draft-format", message=message, fix=fix, loc=(wanted.option,))


def _model_facts(context: Context, index: int) -> Iterator[tuple[str, ModelFacts]]:
    """Yield the facts of the models that a stage names, by role."""
    entry = context.recipe.stages[index]
    for role, wanted in entry.stage.inputs(entry.options).items():
        model = context.models.get(at(index, role))
        if model is not None and model.format == "safetensors":
            yield role, eagle3.facts(model.path) if wanted.of == "drafter" else read(model.path, promised=True)


def _engine_steps(context: Context, steps: Sequence[Step]) -> tuple[Step, ...]:
    """Return the steps that compile the model as it was before stages, as the result is compiled, to be timed.

    Before each stage where the recipe asks for attribution, the untouched one where it is the baseline. Nothing where
    the engine can't take one of these models.
    """
    most = _timed_before(context, steps)
    if not most:
        return ()
    index = len(context.recipe.stages) - 1
    acquired = [step for step in steps if step.writes == "source"]
    written = [step for step in steps if step.writes == "model"]
    found = []
    for count in range(most):
        before = [*acquired, *written[:count]]
        facts = before[-1].after if before else context.facts
        if _is_refused(context, index, facts):
            return ()
        name = written[count - 1].name if count else "baseline"
        found.append(replace(_stage_step(context, index, facts, before), name=f"engine-{name}"))
    return tuple(found)


def _is_refused(context: Context, index: int, facts: ModelFacts) -> bool:
    return any(problem.level == "error" for problem in _stage_problems(context, index, facts))


def _timed_before(context: Context, steps: Sequence[Step]) -> int:
    """Return of how many models before the result the speed is asked for, as the engine runs them."""
    wanted = context.recipe.evaluate
    if not steps or steps[-1].writes != "engine" or wanted.speed is None:
        return 0
    written = sum(step.writes == "model" for step in steps)
    return max(written if wanted.attribution else 0, int(_is_the_baseline(context)))


def _is_the_baseline(context: Context) -> bool:
    """Tell whether speed is compared with the untouched model as the engine runs it."""
    return context.recipe.evaluate.baseline.runtime == "engine"


def _no_baseline(context: Context, steps: Sequence[Step], measures: Sequence[Step]) -> Iterator[Problem]:
    """Yield why the untouched model can't be timed on the recipe's engine."""
    wanted = context.recipe.evaluate
    if wanted.speed is None or not _is_the_baseline(context) or wanted.runtime == "vllm":
        return
    if not any(step.name == ENGINE_BASELINE for step in measures):
        compiled = steps and steps[-1].writes == "engine"
        why = f"{steps[-1].method} can't take the untouched model" if compiled else "the recipe compiles for no engine"
        fix = "set runtime to transformers, or to none"
        message = f"the baseline is to run on the recipe's engine, and {why}"
        yield Problem(code="baseline-engine", message=message, fix=fix, loc=("evaluate", "baseline", "runtime"))


def _stage_step(context: Context, index: int, facts: ModelFacts, before: Sequence[Step]) -> Step:
    entry = context.recipe.stages[index]
    directories = [step.key for step in before if step.writes in ("source", "model")]
    calibration = context.recipe.calibration
    return context.step(
        step_name(index, entry),
        (entry.verb, entry.method),
        entry.stage.settle(entry.options, facts) if isinstance(entry.stage, Settling) else entry.options,
        on=(directories[-1] if directories else "", facts),
        found=dict(_found(context, index, before)),
        backend=entry.backend,
        tokens=calibration.samples * calibration.length if calibration else 0,
    )


def _found(context: Context, index: int, before: Sequence[Step]) -> Iterator[tuple[str, Found]]:
    """Yield what there is of the inputs that a stage declares, by role."""
    entry, calibration = context.recipe.stages[index], context.recipe.calibration
    for role, wanted in entry.stage.inputs(entry.options).items():
        if wanted.of == "calibration" and calibration is not None:
            text = given(context.texts["calibration"])
            yield role, replace(text, digest=f"{text.digest}:{calibration.samples}x{calibration.length}")
        elif wanted.of == "original":
            yield role, Found(key=original_key(before))
        elif wanted.of == "step":
            keys = [step.key for step in before if (step.verb, step.method) == wanted.made_by]
            yield from ((role, Found(key=key)) for key in keys[-1:])
        else:
            source = context.stage_text(index, role) if wanted.of == "prompts" else context.models.get(at(index, role))
            yield from ((role, given(one)) for one in (source,) if one is not None)


def _on_the_cpu(context: Context, steps: Sequence[Step]) -> Iterator[Problem]:
    """Yield which environments compute on the CPU although a GPU is asked for, and why."""
    named = {stages.load(step.verb, step.method, step.backend).ENVIRONMENT for step in steps} - {None}
    for name in sorted(each for each in named if each):
        _, why = cuda.choose(name, context.device)
        if why:
            message = f"what runs in the environment {name} computes on the CPU: {why}"
            fix = "use backend optikit, which computes on the GPU, or leave it so"
            yield Problem(code="environment-for-cpu", message=message, fix=fix, level="warning")


def _fitting_drafts(context: Context, steps: Sequence[Step]) -> Iterator[ModelFacts]:
    """Yield facts of drafts that fit; rules about one that doesn't would only say it again."""
    planned = {step.name: step for step in steps}
    for index, entry in enumerate(context.recipe.stages):
        step, models = planned.get(step_name(index, entry)), dict(_model_facts(context, index))
        if step is None or any(entry.stage.fits(entry.options, step.before, models)):
            continue
        if isinstance(entry.stage, Drafting) and (draft := entry.stage.drafts(entry.options, step.before, models)):
            yield draft


def _unjudged(loaded: LoadedRecipe, context: Context, measures: Sequence[Step]) -> Iterator[Problem]:
    """Yield why gates have nothing to judge; one on a step is shown where the step is named."""
    for problem in check_gates.unmeasurable(context.recipe, target=context.target, scored=scored_steps(measures)):
        yield problem.at(loaded.marks.key(problem.loc)) if problem.loc[2:3] == ("steps",) else problem
