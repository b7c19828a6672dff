"""A report in words and rows, before any markup: what the Markdown, the page, the terminal and CI all show.

Nothing here measures or judges; it chooses, names and words what `schema.Report` holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from optikit.gates import PRICE
from optikit.report import text
from optikit.report.schema import (
    GateResult,
    Interval,
    Measurement,
    Quality,
    Ratio,
    Report,
    Speed,
    StepReport,
)

Tone = Literal["better", "worse", "same", ""]

UNMEASURED = "not measured"
UNCHANGED = 0.005
"""A ratio without an interval is called unchanged within this distance of 1: half of the last digit printed."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the before-and-after table, every field ready to print; "" is no such value."""

    key: str
    label: str
    baseline: str
    result: str
    change: str = ""
    interval: str = ""
    tone: Tone = ""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Figures that belong together."""

    title: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True, kw_only=True)
class _Spec:
    """How to find and word one figure. `words`: what a ratio above 1 and one below 1 are called."""

    key: str
    label: str
    find: Callable[[Measurement], float | None]
    write: Callable[[float], str]
    words: tuple[str, str]
    higher_is_better: bool


def _speed(find: Callable[[Speed], float | None]) -> Callable[[Measurement], float | None]:
    return lambda m: find(m.speed) if m.speed else None


def _quality(find: Callable[[Quality], float | None]) -> Callable[[Measurement], float | None]:
    return lambda m: find(m.quality) if m.quality else None


def _cost(name: str) -> Callable[[Measurement], float | None]:
    return lambda m: getattr(m.cost, name) if m.cost else None


def milliseconds(value: float) -> str:
    """Write milliseconds."""
    return f"{text.number(value)} ms"


def _per_second(value: float) -> str:
    return f"{text.number(value)} tok/s"


def _dollars(value: float) -> str:
    return f"${text.number(value)}"


def _joules(value: float) -> str:
    return f"{text.number(value)} J"


_QUALITY = (
    _Spec(
        key="perplexity",
        label="Perplexity",
        find=_quality(lambda q: q.perplexity.value if q.perplexity else None),
        write=lambda v: text.number(v, 4),
        words=("", ""),
        higher_is_better=False,
    ),
    _Spec(
        key="word_perplexity",
        label="Perplexity per word",
        find=_quality(lambda q: q.perplexity.word_perplexity if q.perplexity else None),
        write=lambda v: text.number(v, 4),
        words=("", ""),
        higher_is_better=False,
    ),
    _Spec(
        key="bits_per_byte",
        label="Bits per byte",
        find=_quality(lambda q: q.perplexity.bits_per_byte if q.perplexity else None),
        write=lambda v: text.number(v, 4),
        words=("", ""),
        higher_is_better=False,
    ),
)

_SPEED = (
    _Spec(
        key="decode",
        label="Decode speed",
        find=_speed(lambda s: s.decode_tokens_per_s),
        write=_per_second,
        words=("faster", "slower"),
        higher_is_better=True,
    ),
    _Spec(
        key="prefill",
        label="Prefill speed",
        find=_speed(lambda s: s.prefill_tokens_per_s),
        write=_per_second,
        words=("faster", "slower"),
        higher_is_better=True,
    ),
    *(
        _Spec(
            key=key,
            label=f"{label}, {tail}",
            find=_speed(find),
            write=milliseconds,
            words=("longer", "shorter"),
            higher_is_better=False,
        )
        for key, label, tail, find in (
            ("ttft", "Time to first token", "median", lambda s: s.ttft_ms_p50),
            ("ttft", "Time to first token", "p95", lambda s: s.ttft_ms_p95),
            ("tpot", "Time per output token", "median", lambda s: s.tpot_ms_p50),
            ("tpot", "Time per output token", "p95", lambda s: s.tpot_ms_p95),
        )
    ),
)

_FOOTPRINT = (
    _Spec(
        key="size",
        label="Size of the weights",
        find=lambda m: m.size_bytes,
        write=text.size,
        words=("larger", "smaller"),
        higher_is_better=False,
    ),
    _Spec(
        key="peak_memory",
        label="Peak memory",
        find=_speed(lambda s: s.peak_memory_mib),
        write=text.memory,
        words=("more", "less"),
        higher_is_better=False,
    ),
    _Spec(
        key="load",
        label="Load time",
        find=_speed(lambda s: s.load_s),
        write=lambda v: f"{text.number(v)} s",
        words=("longer", "shorter"),
        higher_is_better=False,
    ),
    _Spec(
        key="first_call",
        label="First call",
        find=_speed(lambda s: s.first_call_ms),
        write=milliseconds,
        words=("longer", "shorter"),
        higher_is_better=False,
    ),
)

_ENERGY = (
    _Spec(
        key="joules",
        label="Energy per output token",
        find=_speed(lambda s: s.joules_per_output_token),
        write=_joules,
        words=("more", "less"),
        higher_is_better=False,
    ),
)

_COST = (
    _Spec(
        key="usd_output",
        label="Per million output tokens",
        find=_cost("usd_per_million_output_tokens"),
        write=_dollars,
        words=("dearer", "cheaper"),
        higher_is_better=False,
    ),
    _Spec(
        key="usd_blended",
        label="Per million, blended",
        find=_cost("usd_per_million_blended_tokens"),
        write=_dollars,
        words=("dearer", "cheaper"),
        higher_is_better=False,
    ),
)


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


def headline(report: Report) -> str:
    """Say in one sentence what the run achieved: "X is 5.2× faster and 3.4× smaller at 1.12× perplexity"."""
    before, after = report.baseline, report.result
    if measured_only(report):
        return f"{model_name(report)}: {', '.join(_measured(report)) or 'nothing could be measured'}"
    sizes = (before.size_bytes or 0, after.size_bytes or 0)
    size = _change(sizes[1] / sizes[0], ("larger", "smaller")) if all(sizes) else ""
    claims = [claim for claim in (_speed_claim(report.speedup.decode), size) if claim]
    gains = " and ".join("the same size" if claim == "unchanged" else claim for claim in claims)
    perplexity = after.quality.perplexity if after.quality else None
    at = f" at {text.ratio(perplexity.ratio)} perplexity" if perplexity and perplexity.ratio is not None else ""
    missing = [
        name for name, known in (("speed", report.speedup.decode is not None), ("quality", bool(at))) if not known
    ]
    rest = f"; its {' and '.join(missing)} {'were' if len(missing) > 1 else 'was'} not measured" if missing else ""
    return f"{model_name(report)} is {gains or 'unchanged in size'}{at}{rest}"


def measured_only(report: Report) -> bool:
    """Tell whether a model was measured as it is: there is no baseline beside it."""
    return not report.steps


def _measured(report: Report) -> Iterator[str]:
    """Yield the figures that a model without a baseline is known by."""
    rows = report.served.speed if report.served else ()
    for row in (rows[:1] + rows[-1:])[: len(rows)]:
        at = "alone" if row.concurrency == 1 else f"with {row.concurrency} at a time"
        yield f"{_per_second(row.output_tokens_per_s)} {at}"
    found = report.result
    if found.speed:
        yield _per_second(found.speed.decode_tokens_per_s)
    if found.quality and found.quality.perplexity:
        yield f"perplexity {text.number(found.quality.perplexity.value, 4)}"
    if found.quality:
        yield from (f"{text.clean(name)} {text.percent(task.accuracy)}" for name, task in found.quality.tasks.items())
    if found.size_bytes:
        yield text.size(found.size_bytes)


def _speed_claim(decode: Ratio | None) -> str:
    if decode is None:
        return ""
    if decode.verdict == "no measurable change":
        return "as fast as before"
    return _change(decode.value, ("faster", "slower"))


def _change(value: float, words: tuple[str, str], ci95: Interval | None = None) -> str:
    """Word a ratio result / baseline: "3.39× smaller" instead of 0.295."""
    if abs(value - 1) < UNCHANGED and ci95 is None:
        return "unchanged"
    if not all(words):
        return text.ratio(value, ci95)
    return f"{text.ratio(value, ci95)} {words[0]}" if value > 1 else f"{text.ratio(1 / value)} {words[1]}"


def what_was_done(report: Report) -> str:
    """Name the steps in order: "quantize gptq → compile onnxruntime"."""
    names = [f"{s.verb} {s.method}" + (" (emitted)" if s.status == "emitted" else "") for s in report.steps]
    return text.clean(" → ".join(names)) or "measured only, nothing changed"


def verdict_sentence(report: Report) -> str:
    """Say what the gates decided and, where one did not pass, which and why."""
    if not report.gates:
        return "No gates were set."
    bad = [gate for gate in report.gates if gate.verdict == report.verdict] if report.verdict != "pass" else []
    if not bad:
        return "The gate passes." if len(report.gates) == 1 else f"All {len(report.gates)} gates pass."
    verb = {"fail": ("fails", "fail"), "inconclusive": ("is inconclusive", "are inconclusive")}[report.verdict]
    count = f"{len(bad)} of {len(report.gates)} gates" if len(report.gates) > 1 else "The gate"
    named = "; ".join(f"{gate_name(g)} is {gate_value(g)}, limit {text.clean(g.limit)}" for g in bad)
    return f"{count} {verb[len(bad) > 1]}: {named}."


_WRITTEN: Sequence[tuple[tuple[str, ...], Callable[[float], str]]] = (
    (("_ratio", "_speedup"), text.ratio),
    (("_change",), text.points),
    (("_agreement", "_accuracy", "_rate"), text.percent),
    (("_mib",), text.memory),
    (("_ms_p50", "_ms_p95"), milliseconds),
    (("usd_per_million_output_tokens",), _dollars),
    (("joules_per_output_token",), _joules),
)
"""How a gate's number is written, by how its name ends."""


def gate_number(name: str, value: float) -> str:
    """Write a number in the unit that a gate's name carries."""
    return next((write for ends, write in _WRITTEN if name.endswith(ends)), text.number)(value)


def gate_name(gate: GateResult) -> str:
    """Name what a gate limits, and the step after which: "perplexity_ratio after prune wanda"."""
    return text.clean(gate.name) + (f" after {text.step_words(gate.step)}" if gate.step else "")


def gate_value(gate: GateResult) -> str:
    """Write what a gate saw, or why it saw nothing."""
    return UNMEASURED if gate.value is None else gate_number(gate.name, gate.value)


def gate_interval(gate: GateResult) -> str:
    """Write the interval of what a gate saw, or nothing."""
    if gate.ci95 is None:
        return ""
    if gate.value is not None and gate.name.endswith(("_ratio", "_speedup")):
        return text.ratio_interval(gate.value, gate.ci95)
    return f"{gate_number(gate.name, gate.ci95[0])} – {gate_number(gate.name, gate.ci95[1])}"


def bounds(report: Report, gate: str, step: str = "") -> tuple[float | None, float | None]:
    """Return the numeric (min, max) of a gate on the result, or after a step, by the recipe; or (None, None)."""
    gates = report.recipe.get("gates")
    limits = gates.get(gate) if isinstance(gates, Mapping) else None
    if step and isinstance(limits, Mapping):
        limits = _limits_after(limits.get("steps"), step)
    if not isinstance(limits, Mapping):
        return None, None
    low, high = (limits.get(end) for end in ("min", "max"))
    return (
        float(low) if isinstance(low, int | float) else None,
        float(high) if isinstance(high, int | float) else None,
    )


def _limits_after(steps: object, step: str) -> object:
    """Return the limits after a step: its key is its name, or verb.method."""
    _, _, rest = step.partition("-")
    keys = (step, rest.replace("-", ".", 1))
    return next((steps[key] for key in keys if key in steps), None) if isinstance(steps, Mapping) else None


def groups(report: Report) -> tuple[Group, ...]:
    """Return every figure that was measured, before and after, grouped."""
    found = (
        Group(title="Quality", figures=(*_figures(report, _QUALITY), *_against_baseline(report.result.quality))),
        Group(title="Speed at batch 1", figures=_figures(report, _SPEED)),
        Group(title="Footprint", figures=_figures(report, _FOOTPRINT)),
        Group(title="Energy", figures=_figures(report, _ENERGY)),
        Group(title="Cost", figures=_figures(report, _COST)),
    )
    return tuple(group for group in found if group.figures)


def _figures(report: Report, specs: tuple[_Spec, ...]) -> tuple[Figure, ...]:
    made = (_figure(report, spec) for spec in specs)
    return tuple(figure for figure in made if figure is not None)


def _figure(report: Report, spec: _Spec) -> Figure | None:
    before, after = spec.find(report.baseline), spec.find(report.result)
    if before is None and after is None:
        return None
    old, new = (UNMEASURED if value is None else spec.write(value) for value in (before, after))
    if measured_only(report):
        return Figure(key=spec.key, label=spec.label, baseline="", result=new)
    value, ci95, verdict = _paired(report, spec.key)
    if value is None and before and after is not None:
        value = after / before
    if value is None:
        return Figure(key=spec.key, label=spec.label, baseline=old, result=new)
    changed = verdict != "no measurable change"
    return Figure(
        key=spec.key,
        label=spec.label,
        baseline=old,
        result=new,
        change=_change(value, spec.words, ci95) if changed else verdict,
        interval=_oriented(value, ci95, spec.words),
        tone=_tone(value, higher_is_better=spec.higher_is_better) if changed else "same",
    )


def _paired(report: Report, key: str) -> tuple[float | None, Interval | None, str]:
    """Return the paired ratio that was measured for a figure: better than dividing two medians."""
    if key == "perplexity":
        perplexity = report.result.quality.perplexity if report.result.quality else None
        return (perplexity.ratio, perplexity.ratio_ci95, "") if perplexity else (None, None, "")
    ratio = {"decode": report.speedup.decode, "prefill": report.speedup.prefill}.get(key)
    return (ratio.value, ratio.ci95, ratio.verdict) if ratio else (None, None, "")


def _oriented(value: float, ci95: Interval | None, words: tuple[str, str]) -> str:
    """Write an interval the way round that its ratio is worded: "2.0× slower" has the interval of the inverse."""
    if ci95 is None:
        return ""
    if value < 1 and all(words) and ci95[0] > 0:
        return text.ratio_interval(1 / value, (1 / ci95[1], 1 / ci95[0]))
    return text.ratio_interval(value, ci95)


def _tone(value: float, *, higher_is_better: bool) -> Tone:
    if abs(value - 1) < UNCHANGED:
        return "same"
    return "better" if (value > 1) == higher_is_better else "worse"


def _against_baseline(quality: Quality | None) -> tuple[Figure, ...]:
    """Figures that compare the result with the baseline, so that there is no "before"."""
    made: list[Figure] = []
    if quality and (kl := quality.kl_divergence):
        made += [
            Figure(
                key="kl_divergence",
                label="KL divergence, mean",
                baseline="",
                result=text.number(kl.mean),
                interval=text.interval(kl.mean_ci95),
            ),
            Figure(key="kl_divergence", label="KL divergence, p99", baseline="", result=text.number(kl.p99)),
        ]
    if quality and quality.top1_agreement is not None:
        ci95 = quality.top1_agreement_ci95
        made.append(
            Figure(
                key="top1_agreement",
                label="Top-1 agreement",
                baseline="",
                result=text.percent(quality.top1_agreement),
                interval=f"{text.percent(ci95[0])} – {text.percent(ci95[1])}" if ci95 else "",
            )
        )
    return tuple(made)


def compared(report: Report) -> str:
    """Say what is compared with what, or that only sizes are."""
    if measured_only(report):
        return f"Measured as it is: {_described(report.result)}."
    if report.baseline.speed or report.baseline.quality or report.result.speed or report.result.quality:
        return f"Baseline: {_described(report.baseline)}. Result: {_described(report.result)}."
    return "Only sizes are known; nothing was run."


def _described(measurement: Measurement) -> str:
    """Say through what a measurement was taken: "transformers, bfloat16, 2 threads"."""
    speed, quality = measurement.speed, measurement.quality
    if speed:
        return text.clean(f"{speed.runtime}, {speed.dtype}, {text.plural(speed.threads, 'thread')}")
    return text.clean(quality.runtime) if quality else "from outside" if measurement.size_bytes is None else UNMEASURED


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
        said.append(
            f"Speed: prompts of {speed.prompt_tokens} tokens, {speed.new_tokens} new tokens, "
            f"{text.plural(speed.repetitions, 'repetition')}{'' if measured_only(report) else ' of each, alternating'}."
        )
    if report.speedup.decode:
        said.append(
            f"Noise floor of the decode ratio on this machine: ±{100 * report.speedup.decode.noise_floor:.1f} %."
        )
    cost = report.result.cost
    if cost and cost.price_source:
        said.append(f"Price: {cost.price_source}.")
    return tuple(text.clean(line) for line in said)


def _unpriced(report: Report) -> bool:
    """Tell whether the target has no price and no gate asks for one: then its absence is no news."""
    asked = report.recipe.get("gates")
    wants_price = isinstance(asked, Mapping) and PRICE in asked
    return report.target.get("usd_per_hour") is None and not wants_price


def reasons(report: Report) -> tuple[str, ...]:
    """Say why what is missing is missing."""
    found: list[str] = []
    sides = (("baseline", report.baseline), ("result", report.result))
    for name, m in sides[1:] if measured_only(report) else sides:
        parts = (
            ("", m.reason),
            ("quality", m.quality.reason if m.quality else ""),
            ("cost", m.cost.reason if m.cost and not _unpriced(report) else ""),
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
