"""The before-and-after table: which figures a report has, how each is found, written and called better or worse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from optikit import text
from optikit.evaluation.results import Interval, Measurement, Quality, Report, Speed
from optikit.report.wording import is_one, measured_only, source_bytes, spans_one

Tone = Literal["better", "worse", "same", ""]


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
        write=text.per_second,
        words=("faster", "slower"),
        higher_is_better=True,
    ),
    _Spec(
        key="prefill",
        label="Prefill speed",
        find=_speed(lambda s: s.prefill_tokens_per_s),
        write=text.per_second,
        words=("faster", "slower"),
        higher_is_better=True,
    ),
    *(
        _Spec(
            key=key,
            label=f"{label}, {tail}",
            find=_speed(find),
            write=text.milliseconds,
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
        write=text.milliseconds,
        words=("longer", "shorter"),
        higher_is_better=False,
    ),
)


_ENERGY = (
    _Spec(
        key="joules",
        label="Energy per output token",
        find=_speed(lambda s: s.joules_per_output_token),
        write=text.joules,
        words=("more", "less"),
        higher_is_better=False,
    ),
)


_COST = (
    _Spec(
        key="usd_output",
        label="Per million output tokens",
        find=_cost("usd_per_million_output_tokens"),
        write=text.dollars,
        words=("dearer", "cheaper"),
        higher_is_better=False,
    ),
    _Spec(
        key="usd_blended",
        label="Per million, blended",
        find=_cost("usd_per_million_blended_tokens"),
        write=text.dollars,
        words=("dearer", "cheaper"),
        higher_is_better=False,
    ),
)


def groups(report: Report) -> tuple[Group, ...]:
    """Return every figure that was measured, before and after, grouped."""
    found = (
        Group(title="Quality", figures=(*_figures(report, _QUALITY), *_against_baseline(report.result.quality))),
        Group(title="Speed at batch 1", figures=_figures(report, _SPEED)),
        Group(title="Footprint", figures=(*_packed(report), *_figures(report, _FOOTPRINT))),
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
    old, new = (text.UNMEASURED if value is None else spec.write(value) for value in (before, after))
    if measured_only(report):
        return Figure(key=spec.key, label=spec.label, baseline="", result=new)
    value, ci95, verdict = _paired(report, spec.key)
    if value is None and before and after is not None:
        value = after / before
    if value is None:
        return Figure(key=spec.key, label=spec.label, baseline=old, result=new)
    doubtful = verdict == "no measurable change"
    return Figure(
        key=spec.key,
        label=spec.label,
        baseline=old,
        result=new,
        change=_doubt(ci95) if doubtful else text.change(value, spec.words, ci95),
        interval=_oriented(value, ci95, spec.words),
        tone="same" if doubtful else _tone(value, ci95, higher_is_better=spec.higher_is_better),
    )


def _doubt(ci95: Interval | None) -> str:
    return "unchanged" if ci95 and is_one(ci95) else "undetermined"


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


def _tone(value: float, ci95: Interval | None, *, higher_is_better: bool) -> Tone:
    """Call a change better or worse only where its interval excludes 1."""
    if ci95 is None:
        return "same" if abs(value - 1) < text.UNCHANGED else ""
    if spans_one(ci95):
        return "same"
    return "better" if (value > 1) == higher_is_better else "worse"


def _packed(report: Report) -> tuple[Figure, ...]:
    """Compare the result's size with that of the file that the model came in, where that was packed."""
    before, after = source_bytes(report), report.result.size_bytes
    if before is None or not after or measured_only(report):
        return ()
    return (
        Figure(
            key="size",
            label="Size against its file",
            baseline=text.size(before),
            result=text.size(after),
            change=text.change(after / before, ("larger", "smaller")),
        ),
    )


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
