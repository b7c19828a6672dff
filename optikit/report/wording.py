"""A report in sentences, before any markup: what the Markdown, the page, the terminal and CI all say.

Nothing here measures or judges; it chooses, names and words what `results.Report` holds. `headline` has the sentence
above it, `figures` the table, `gates` what gates decided.
"""

from __future__ import annotations

from optikit import text
from optikit.evaluation.results import Cost, Measurement, Payback, Report, Speed, StepReport
from optikit.report.speculation_table import not_used


def model_name(report: Report) -> str:
    """Return the model's name as people say it, without registry, version and directory."""
    given = report.model.get("name") or report.model.get("source") or report.recipe.get("model") or "the model"
    return short_name(text.clean(str(given)))


def short_name(source: str) -> str:
    """Return the last meaningful part of a model source.

    >>> [short_name(s) for s in ("hf:org/Llama-3-8B@0e1f", "pypi:llm-x==0.1#llm_x/X-1B.Q4_1.gguf", "models/mine/")]
    ['Llama-3-8B', 'X-1B.Q4_1', 'mine']
    """
    scheme, colon, rest = source.partition(":")
    if not colon or scheme not in {"hf", "pypi"}:
        return source.rstrip("/").rpartition("/")[2].removesuffix(".gguf") or source
    package, _, file = rest.partition("#")
    if file:
        return file.rpartition("/")[2].removesuffix(".gguf") or source
    if scheme == "pypi":
        return package.partition("==")[0]
    return package.partition("@")[0].rpartition("/")[2] or source


def spans_one(ci95: tuple[float, float]) -> bool:
    """Tell whether an interval holds 1: then it isn't known which way a ratio goes."""
    return ci95[0] <= 1 <= ci95[1]


def is_one(ci95: tuple[float, float]) -> bool:
    """Tell whether all of an interval would be printed as 1."""
    return max(abs(end - 1) for end in ci95) < text.UNCHANGED


def source_bytes(report: Report) -> int | None:
    """Return the size of the file that the model came in, where that was packed; None where it wasn't."""
    found = report.model.get("source_bytes")
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None


def measured_only(report: Report) -> bool:
    """Tell whether a model was measured as it is: there is no baseline beside it."""
    return not report.steps


def what_was_done(report: Report) -> str:
    """Name the steps in order: "quantize gptq → compile onnxruntime"."""
    names = [f"{s.verb} {s.method}" + (f" ({note})" if (note := step_note(report, s)) else "") for s in report.steps]
    return text.clean(" → ".join(names)) or "measured only, nothing changed"


def step_note(report: Report, step: StepReport) -> str:
    """Say what a reader of the list of steps has to know of one: that it wasn't run here, or isn't used."""
    given = report.speculation or {}
    if step.verb == "speculate" and step.method == given.get("method") and not_used(given):
        return "not used"
    return "" if step.status in ("executed", "cached") else step.status


def compared(report: Report) -> str:
    """Say what is compared with what, or that only sizes are."""
    if measured_only(report):
        return f"Measured as it is: {_described(report.result)}."
    if report.baseline.speed or report.baseline.quality or report.result.speed or report.result.quality:
        return f"Baseline: {_described(report.baseline)}. Result: {_described(report.result)}."
    return (
        "Only sizes are known, and the result under load."
        if report.loaded
        else "Only sizes are known; nothing was run."
    )


def _described(measurement: Measurement) -> str:
    """Say through what a measurement was taken: "transformers, bfloat16, 2 threads"."""
    speed, quality = measurement.speed, measurement.quality
    if speed:
        return text.clean(f"{speed.runtime}, {speed.dtype}, {text.plural(speed.threads, 'thread')}")
    return (
        text.clean(quality.runtime)
        if quality
        else "from outside"
        if measurement.size_bytes is None
        else text.UNMEASURED
    )


def conditions(report: Report) -> tuple[str, ...]:
    """Say under which conditions the figures hold: protocol, runtimes, lengths, repetitions, noise floor."""
    said: list[str] = []
    quality, speed = report.result.quality, report.result.speed or report.baseline.speed
    if quality and quality.perplexity:
        before = report.baseline.quality
        through = f"result through {quality.runtime}" + (f", baseline through {before.runtime}" if before else "")
        through = f"through the {quality.runtime} runtime" if measured_only(report) else through
        said.append(
            f"Quality: protocol {quality.perplexity.protocol}, {quality.perplexity.tokens:,} scored tokens, {through}."
        )
    if speed:
        said.append(_speed_conditions(report, speed))
    if report.speedup.decode:
        said.append(
            f"Noise floor of the decode ratio on this machine: ±{100 * report.speedup.decode.noise_floor:.1f} %."
        )
    cost = report.result.cost
    if cost and cost.price_source:
        said.append(_price(cost))
    if report.payback:
        said.append(_payback(report.payback))
    return tuple(text.clean(line) for line in said)


def _speed_conditions(report: Report, speed: Speed) -> str:
    """Say how speed was timed; the baseline may have written fewer tokens, in fewer rounds."""
    said = f"Speed: prompts of {speed.prompt_tokens} tokens, {speed.new_tokens} new tokens, "
    said += text.plural(speed.repetitions, "repetition")
    before = report.baseline.speed
    if measured_only(report) or before is None:
        return f"{said}."
    if (before.new_tokens, before.repetitions) == (speed.new_tokens, speed.repetitions):
        return f"{said} of each, alternating."
    other = f"{before.new_tokens} new tokens, {text.plural(before.repetitions, 'repetition')}"
    return f"{said}, alternating with the baseline ({other})."


def _price(cost: Cost) -> str:
    hour = "" if cost.usd_per_hour is None else f"${cost.usd_per_hour:g} per hour"
    less = f"less {text.percent(cost.discount)}" if cost.discount else ""
    at = "" if cost.concurrency == 1 else f"{cost.concurrency} requests at a time"
    return f"Price: {', '.join(filter(None, (hour, less, cost.price_source, at)))}."


def _payback(found: Payback) -> str:
    took, usd = text.duration(found.optimization_seconds), text.dollars(found.optimization_usd)
    spent = f"Optimizing took {took}, {usd} at that price"
    if found.output_tokens is None:
        return f"{spent}, which is never paid back: {found.reason}."
    return f"{spent}, paid back after {found.output_tokens:,.0f} output tokens, one request at a time."


def reasons(report: Report) -> tuple[str, ...]:
    """Say why what is missing is missing."""
    found: list[str] = []
    sides = (("baseline", report.baseline), ("result", report.result))
    for name, m in sides[1:] if measured_only(report) else sides:
        parts = (
            ("", m.reason),
            ("quality", m.quality.reason if m.quality else ""),
            ("cost", m.cost.reason if m.cost and name == "result" else ""),
        )
        named = [", ".join(filter(None, ("" if measured_only(report) else name, part))) for part, _ in parts]
        found += [": ".join(filter(None, (who, why))) for who, (_, why) in zip(named, parts, strict=True) if why]
    return tuple(dict.fromkeys(text.clean(line) for line in found))


def step_label(step: StepReport) -> str:
    """Name a step: "quantize gptq", with its backend where that isn't optikit's own."""
    backend = f" ({text.clean(step.backend)})" if step.backend not in {"", "optikit"} else ""
    return text.step_words(step.name) + backend


def size_after(step: StepReport) -> int:
    """Return the bytes of the weights after a step, or of all that it wrote where nothing was measured."""
    return (step.measurement.size_bytes if step.measurement else None) or step.artifact_bytes
