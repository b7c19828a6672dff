"""The steps that measure: quality of the baseline and of everything written, speed of the result against baselines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from optikit.models.facts import ModelFacts
from optikit.plan.context import Context, here, tokens_of
from optikit.plan.measure_served import served_steps
from optikit.plan.model import QUALITY, Step
from optikit.problems import Problem
from optikit.recipe.schema import PerplexityOptions, SpeedOptions, TaskOptions
from optikit.store.sources import TextSource

COMPILED_RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}
"""Which runtime on this machine loads a compiled artifact, by trait."""

OPTIONAL = {"openvino": "optikit[openvino]"}
"""Runtimes that are no dependency of optikit, each with what installs it."""


def runtime(step: Step) -> str:
    """Name the runtime here that loads what a step wrote; empty where none can: a speculator is no model by itself."""
    if step.verb == "speculate":
        return ""
    if step.verb != "compile":
        return "transformers"
    return next((COMPILED_RUNTIMES[trait] for trait in step.after.traits if trait in COMPILED_RUNTIMES), "")


def measure_steps(context: Context, steps: Sequence[Step], engines: Sequence[Step] = ()) -> tuple[Step, ...]:
    """Return the measuring steps that a recipe asks for; `engines` compile earlier models, to be timed as well."""
    wanted = context.recipe.evaluate
    baseline = steps[0].key if steps and steps[0].verb == "acquire" else ""
    written = [step for step in steps if step.verb != "acquire" and runtime(step)]
    found: list[Step] = []
    is_served = wanted.runtime == "vllm"
    if wanted.perplexity is not None:
        found += _quality(context, wanted.perplexity, written[:-1] if is_served else written, baseline)
    if wanted.tasks:
        found += _tasks(context, written[-1:], baseline)
    if is_served:
        return (*found, *served_steps(context, steps, written, baseline, found))
    if not written or written[-1].verb != "compile":
        return tuple(found)
    speculators = [(index, step) for index, step in enumerate(_stages(steps)) if step.verb == "speculate"]
    choices = [_speculation(context, index, step, written[-1], baseline) for index, step in speculators]
    found += choices
    if wanted.speed is not None:
        found += [*engines, _speed(context, wanted.speed, written, baseline, choices, engines)]
    return tuple(found)


def runtime_problems(steps: Sequence[Step], measures: Sequence[Step]) -> Iterator[Problem]:
    """Yield which runtimes measuring needs that aren't installed here."""
    needed = {runtime(step) for step in steps} if measures else set()
    for name in sorted(needed & OPTIONAL.keys()):
        if find_spec(name) is None:
            message = f"what {name} compiles is measured as {name} runs it, which is not installed"
            fix = f"pip install '{OPTIONAL[name]}', or leave out evaluate"
            yield Problem(code="library-missing", message=message, fix=fix, loc=("evaluate",))


def scored_steps(measures: Sequence[Step]) -> frozenset[str]:
    """Return the names of the steps whose quality is measured."""
    return frozenset(step.name.removeprefix(QUALITY) for step in measures if step.name.startswith(QUALITY))


def _stages(steps: Sequence[Step]) -> Sequence[Step]:
    """Return the steps that the author wrote, in their order."""
    return [step for step in steps if step.verb != "acquire"]


def stage_prompts(context: Context, index: int) -> TextSource | None:
    """Return the prompts of a stage that reads some: its own, or else those of the speed test."""
    if not hasattr(context.recipe.stages[index].options, "prompts"):
        return None
    return context.texts.get(f"stages[{index}].prompts") or context.texts.get("prompts")


def _speculation(context: Context, index: int, speculator: Step, result: Step, baseline: str) -> Step:
    stage = context.stage("measure", "speculation")
    names = ("tune", "chat", "new_tokens", "datastore_answers", "template", "prompt_tokens", "eval_part")
    wanted = {name: getattr(speculator.options, name) for name in names}
    wanted["prompts"] = getattr(speculator.options, "eval_prompts")  # noqa: B009 - the options of any stage of this verb
    options = stage.Options.model_validate({"runtime": runtime(result), **wanted})
    prompts = stage_prompts(context, index)
    files = {"prompts": str(prompts.path)} if prompts else {}
    inputs = {"speculator": speculator.key, "tokenizer": baseline}
    parts: dict[str, Any] = {
        "parent": result.key,
        "inputs": inputs,
        "prompts": prompts.digest if prompts else "",
        "host": here(),
    }
    return Step(
        name="measure-speculation",
        verb="measure",
        method="speculation",
        options=options,
        key=context.key("measure", "speculation", options, **parts),
        source=result.key,
        inputs=inputs,
        files=files,
        estimate=stage.estimate(options, result.after, context.target, 0),
        before=result.after,
        after=result.after,
    )


def _loaded(engine: str) -> dict[str, Any]:
    """Return how quality is measured: torch models in float32, so that their own rounding is not a part of it."""
    return {"runtime": engine, "dtype": "float32" if engine == "transformers" else "auto"}


def quality_options(engine: str, wanted: PerplexityOptions) -> dict[str, Any]:
    """Return options of `measure quality`."""
    return _loaded(engine) | wanted.model_dump(include={"protocol", "window", "windows", "stride"})


def tasks_options(engine: str, wanted: Sequence[TaskOptions]) -> dict[str, Any]:
    """Return options of `measure tasks`."""
    fields = {"name", "items", "max_tokens", "stop"}
    return _loaded(engine) | {"tasks": [task.model_dump(include=fields) for task in wanted]}


def _quality(context: Context, wanted: PerplexityOptions, written: Sequence[Step], baseline: str) -> Iterator[Step]:
    reference = _quality_step(context, wanted, "baseline", ("transformers", baseline, context.facts), baseline, "")
    yield reference
    for step in written:
        subject = (runtime(step), step.key, step.after)
        yield _quality_step(context, wanted, step.name, subject, baseline, reference.key)


def _quality_step(
    context: Context,
    wanted: PerplexityOptions,
    name: str,
    subject: tuple[str, str, ModelFacts],
    baseline: str,
    reference: str,
) -> Step:
    engine, source, facts = subject
    stage = context.stage("measure", "quality")
    text = context.texts["perplexity"]
    options = stage.Options.model_validate(quality_options(engine, wanted) | {"keep_logits": not reference})
    inputs = {"tokenizer": baseline} | ({"baseline": reference} if reference else {})
    parent = source or context.model.digest
    return Step(
        name=f"{QUALITY}{name}",
        verb="measure",
        method="quality",
        options=options,
        key=context.key("measure", "quality", options, parent=parent, inputs=inputs, text=text.digest),
        source=source,
        inputs=inputs,
        files={"text": str(text.path)},
        estimate=stage.estimate(options, facts, context.target, tokens_of(text)),
        before=facts,
        after=facts,
    )


def _tasks(context: Context, written: Sequence[Step], baseline: str) -> Iterator[Step]:
    """Yield the steps that put tasks to the baseline and to the result: twice all items, however many steps there are.

    Logits tell what every step does to quality; answers tell whether what is shipped still does its work.
    """
    reference = _tasks_step(context, "baseline", ("transformers", baseline, context.facts), baseline, "")
    yield reference
    for step in written:
        yield _tasks_step(context, step.name, (runtime(step), step.key, step.after), baseline, reference.key)


def _tasks_step(
    context: Context, name: str, subject: tuple[str, str, ModelFacts], baseline: str, reference: str
) -> Step:
    engine, source, facts = subject
    stage = context.stage("measure", "tasks")
    wanted = context.recipe.evaluate.tasks
    options = stage.Options.model_validate(tasks_options(engine, wanted))
    texts = {task.name: context.texts[f"tasks.{task.name}"] for task in wanted}
    inputs = {"tokenizer": baseline} | ({"baseline": reference} if reference else {})
    parts: dict[str, Any] = {"parent": source or context.model.digest, "inputs": inputs}
    return Step(
        name=f"measure-tasks-{name}",
        verb="measure",
        method="tasks",
        options=options,
        key=context.key(
            "measure", "tasks", options, tasks={name: text.digest for name, text in texts.items()}, **parts
        ),
        source=source,
        inputs=inputs,
        files={f"task:{name}": str(text.path) for name, text in texts.items()},
        estimate=stage.estimate(options, facts, context.target, 0),
        before=facts,
        after=facts,
    )


def _speed(
    context: Context,
    wanted: SpeedOptions,
    written: Sequence[Step],
    baseline: str,
    choices: Sequence[Step],
    engines: Sequence[Step],
) -> Step:
    result = written[-1]
    against = context.recipe.evaluate.baseline
    own = "bfloat16" if context.facts.dtype == "BF16" else "float32"
    dtype = own if against.dtype == "auto" else against.dtype
    arms = [{"name": "baseline", "role": "baseline", "runtime": against.runtime, "dtype": dtype}]
    arms += [
        {"name": f"transformers-{other}", "role": "baseline", "runtime": "transformers", "dtype": other}
        for other in against.also
        if other != dtype
    ]
    speculator = {"speculator": "speculator"} if choices else {}
    loaded = {"runtime": runtime(result), "dtype": "auto"}
    own_arms = [{"name": step.name, "role": step.name, **loaded} for step in engines]
    if engines and choices:  # the result without its speculation
        own_arms.append({"name": f"engine-{written[-2].name}", "role": "result", **loaded})
    arms += own_arms
    chain = ["baseline", *(arm["name"] for arm in own_arms), "result"] if engines else []
    arms.append({"name": "result", "role": "result", "runtime": runtime(result), "dtype": "auto", **speculator})
    stage = context.stage("measure", "speed")
    options = stage.Options.model_validate({"arms": arms, "chain": chain, **wanted.model_dump(exclude={"prompts"})})
    prompts = context.texts["prompts" if wanted.prompts else "perplexity"]
    inputs = {"baseline": baseline, "result": result.key, "tokenizer": baseline}
    inputs |= {step.name: step.key for step in engines}
    # What the stage made and what was chosen of it, as they lie together in the output.
    inputs |= {"speculator": choices[-1].key, "made": choices[-1].inputs["speculator"]} if choices else {}
    parts: dict[str, Any] = {
        "parent": context.model.digest,
        "inputs": inputs,
        "prompts": prompts.digest,
        "host": here(),
    }
    return Step(
        name="measure-speed",
        verb="measure",
        method="speed",
        options=options,
        key=context.key("measure", "speed", options, **parts),
        source=result.key,
        inputs=inputs,
        files={"prompts": str(prompts.path)},
        estimate=stage.estimate(options, context.facts, context.target, 0),
        before=result.after,
        after=result.after,
    )
