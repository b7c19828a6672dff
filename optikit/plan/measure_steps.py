"""The steps that measure: quality of the baseline and of everything written, speed of the result against baselines."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.util import find_spec

from optikit import stages
from optikit.plan.context import Context, Found, given
from optikit.plan.measure_served import served_steps
from optikit.plan.measure_serving import serving_step
from optikit.plan.measurements import Subject, measuring, quality_step, speed_step, tasks_step
from optikit.plan.model import BASELINE, Step, original_key
from optikit.problems import Loc, Problem
from optikit.recipe.schema import SpeedOptions
from optikit.stage import Speculating

COMPILED_RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino", "gguf": "llama-cpp"}
"""Which runtime on this machine loads a compiled artifact, by trait."""

ENGINE_BASELINE = "engine-baseline"
"""Name of the step that compiles the untouched model, to be timed."""
SPECULATION = "measure-speculation"
"""Name of the step that judges a speculator."""
OPTIONAL = {"openvino": ("openvino", "optikit[openvino]"), "llama-cpp": ("llama_cpp", "optikit[llama-cpp]")}
"""Runtimes that are no dependency of optikit: their module, and what installs it."""


def runtime(step: Step) -> str:
    """Name the runtime here that loads what a step wrote; empty where none can: a speculator is no model by itself."""
    if step.writes != "engine":
        return "" if step.writes == "speculator" else "transformers"
    return next((COMPILED_RUNTIMES[trait] for trait in step.after.traits if trait in COMPILED_RUNTIMES), "")


def measure_steps(context: Context, steps: Sequence[Step], engines: Sequence[Step] = ()) -> tuple[Step, ...]:
    """Return the measuring steps that a recipe asks for; `engines` compile earlier models, to be timed as well."""
    wanted = context.recipe.evaluate
    original = original_key(steps)
    baseline = Subject(name=BASELINE, key=original, runtime="transformers", facts=context.facts)
    written = [step for step in steps if step.writes in ("model", "engine") and runtime(step)]
    subjects = [Subject(name=step.name, key=step.key, runtime=runtime(step), facts=step.after) for step in written]
    found = _qualities(context, baseline, subjects)
    if wanted.runtime == "vllm":
        found += served_steps(context, steps, written, original, found) if wanted.perplexity or wanted.speed else ()
    elif written and written[-1].writes == "engine":
        found += _compiled(context, steps, written, original, engines)
    if wanted.serving is not None:
        found += _serving(context, steps, found, original)
    return tuple(found)


def _qualities(context: Context, baseline: Subject, subjects: Sequence[Subject]) -> list[Step]:
    """Return the steps that score texts and put tasks; what vLLM serves is scored by its own step."""
    wanted = context.recipe.evaluate
    found: list[Step] = []
    if wanted.perplexity is not None:
        found += _each(quality_step, context, baseline, subjects[:-1] if wanted.runtime == "vllm" else subjects)
    if wanted.tasks:  # logits tell what every step does; answers tell whether what is shipped still does its work
        found += _each(tasks_step, context, baseline, subjects[-1:])
    return found


def _serving(context: Context, steps: Sequence[Step], measures: Sequence[Step], original: str) -> Iterator[Step]:
    """Yield the step that loads the result behind a server, where one here serves it."""
    ends = [step for step in steps if step.writes in ("model", "engine")]
    result = ends[-1] if ends else None
    if result is not None and not runtime(result):
        return
    served = context.recipe.evaluate.runtime == "vllm"
    made = [Found(key=step.key) for step in steps if step.writes == "speculator"]
    drafts = {"speculator": made[-1]} if served and made else _chosen(measures)
    engine = "vllm" if served else runtime(result) if result else "transformers"
    yield serving_step(context, result, engine, original, drafts)


def _chosen(measures: Sequence[Step]) -> dict[str, Found]:
    """Return what a stage made for drafting and what was chosen of it, as they lie together in the output."""
    judged = [step for step in measures if step.method == "speculation"]
    if not judged:
        return {}
    return {"speculator": Found(key=judged[-1].key), "made": Found(key=judged[-1].inputs["speculator"])}


def _compiled(
    context: Context, steps: Sequence[Step], written: Sequence[Step], original: str, engines: Sequence[Step]
) -> list[Step]:
    """Return the steps that judge the speculators of a compiled model, and the one that times it."""
    choices = [
        _speculation(context, index, step, written[-1], original)
        for index, step in enumerate(each for each in steps if each.writes != "source")
        if step.writes == "speculator"
    ]
    wanted = context.recipe.evaluate.speed
    if wanted is None:
        return choices
    return [*choices, *engines, _speed(context, wanted, written, original, choices, engines)]


def runtime_problems(steps: Sequence[Step], measures: Sequence[Step]) -> Iterator[Problem]:
    """Yield which runtimes measuring needs that aren't installed here."""
    needed = {runtime(step) for step in steps} if measures else set()
    for name in sorted(needed & OPTIONAL.keys()):
        if find_spec(OPTIONAL[name][0]) is None:
            message = f"what {name} compiles is measured as {name} runs it, which is not installed"
            fix = f"pip install '{OPTIONAL[name][1]}', or leave out evaluate"
            yield Problem(code="library-missing", message=message, fix=fix, loc=("evaluate",))


LENGTHS: Mapping[str, Loc] = {
    "quality": ("evaluate", "perplexity"),
    "tasks": ("evaluate",),
    "speed": ("evaluate", "speed"),
    "serving": ("evaluate",),
    "served_load": ("evaluate",),
}
"""Where the options of a measuring step are written; what a server can't serve is said in `measure_served`."""


def length_problems(context: Context, measures: Sequence[Step]) -> Iterator[Problem]:
    """Yield what measuring asks of a model beyond its context, once for all models that it is asked of."""
    found = (
        problem.under(*LENGTHS[step.method])
        for step in measures
        if step.method in LENGTHS
        for problem in stages.load(step.verb, step.method).check(step.options, step.before, context.target)
    )
    yield from dict.fromkeys(found)


def _speculation(context: Context, index: int, speculator: Step, result: Step, original: str) -> Step:
    maker = context.recipe.stages[index].stage
    assert isinstance(maker, Speculating)  # noqa: S101 - the contract tests hold every stage that writes one to it
    options = {"runtime": runtime(result), **maker.measured(speculator.options)}
    prompts = context.stage_text(index, "prompts")
    return context.step(
        SPECULATION,
        ("measure", "speculation"),
        measuring("speculation", options),
        on=(result.key, result.after),
        found={"speculator": Found(key=speculator.key), "tokenizer": Found(key=original)}
        | ({"prompts": given(prompts)} if prompts else {}),
    )


def _each(
    step: Callable[[Context, Subject, Found, Step | None], Step],
    context: Context,
    baseline: Subject,
    made: Sequence[Subject],
) -> Iterator[Step]:
    """Yield the step that measures the baseline, and those that compare each other model with it."""
    tokenizer = Found(key=baseline.key)
    reference = step(context, baseline, tokenizer, None)
    yield reference
    for subject in made:
        yield step(context, subject, tokenizer, reference)


def _speed(
    context: Context,
    wanted: SpeedOptions,
    written: Sequence[Step],
    original: str,
    choices: Sequence[Step],
    engines: Sequence[Step],
) -> Step:
    result = written[-1]
    loaded = {"runtime": runtime(result), "dtype": "auto"}
    baselines = _baseline_arms(context, loaded)
    own = _own_arms(context, written, choices, engines, loaded, {arm["role"] for arm in baselines})
    attributed = context.recipe.evaluate.attribution and engines
    chain = [*(arm["name"] for arm in (*baselines[:1], *own)), "result"] if attributed else []
    speculator = {"speculator": "speculator"} if choices else {}
    arms = [*baselines, *own, {"name": "result", "role": "result", **loaded, **speculator}]
    models = {"baseline": original, "result": result.key, **{step.name: step.key for step in engines}}
    inputs = {role: models[role] for role in {arm["role"]: None for arm in arms}} | {"tokenizer": original}
    # What the stage made and what was chosen of it, as they lie together in the output.
    options = {"arms": arms, "chain": chain, **wanted.model_dump(exclude={"prompts"})}
    found = {role: Found(key=key) for role, key in inputs.items()} | _chosen(choices)
    return speed_step(context, options, result.key, found, result=result.after)


def _own_arms(
    context: Context,
    written: Sequence[Step],
    choices: Sequence[Step],
    engines: Sequence[Step],
    loaded: Mapping[str, str],
    taken: Collection[str],
) -> list[dict[str, str]]:
    """Return what was compiled of the model before each stage, and the result without its speculation.

    Roles in `taken` are a baseline's already.
    """
    arms = [{"name": step.name, "role": step.name, **loaded} for step in engines if step.name not in taken]
    if context.recipe.evaluate.attribution and engines and choices:
        arms.append({"name": f"engine-{written[-2].name}", "role": "result", **loaded})
    return arms


def _baseline_arms(context: Context, compiled: Mapping[str, str]) -> list[dict[str, str]]:
    """Return how the untouched model is timed: as the recipe says first, then in the other precisions it names.

    Args:
        context: With the recipe.
        compiled: How this machine loads what the recipe compiles.
    """
    against = context.recipe.evaluate.baseline
    if against.runtime == "none":
        return []
    own = "bfloat16" if context.facts.dtype == "BF16" else "float32"
    dtype = own if against.dtype == "auto" else against.dtype
    others = [
        {"name": f"transformers-{other}", "role": "baseline", "runtime": "transformers", "dtype": other}
        for other in against.also
        if other != dtype
    ]
    if against.runtime == "engine":
        return [{"name": "baseline", "role": ENGINE_BASELINE, **compiled}, *others]
    return [{"name": "baseline", "role": "baseline", "runtime": against.runtime, "dtype": dtype}, *others]
