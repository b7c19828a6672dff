"""Two reports side by side: what is comparable, by how much they differ, and whether that is more than noise.

Perplexity: window by window where the log-likelihoods of both runs are still in the store, which is the sensitive test.
Without them, the two ratios to the same baseline are divided and their intervals combined as if they were independent;
they aren't (same windows), so that interval is too wide, never too narrow. Speed: both runs timed the same baseline
in their own session, so what slowed a whole session cancels in the quotient of the two speed-ups.
What was measured differently is not compared: other protocol, tokenizer, threads or lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from optikit import text
from optikit.errors import OptikitError
from optikit.evaluation.results import Interval, Perplexity, Ratio, Report, Speed
from optikit.report import markdown, wording

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from optikit.store.store import Store

Outcome = Literal["better", "worse", "no measurable difference", "not tested", "not compared"]

NLL = "nll.npy"
"""What a quality step keeps beside its figures: negative log-likelihoods, (windows, tokens)."""
QUALITY = "measure-quality-"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One metric in both reports.

    Attributes:
        key: Stable name.
        label: Name in words.
        a, b: Both values, written out.
        ratio: b / a; None where they aren't compared.
        ci95: Its 95 % interval, where the metric has one.
        outcome: From b's point of view; `not tested` has a ratio but no interval to judge it by.
        how: The test, or why there is none.
    """

    key: str
    label: str
    a: str
    b: str
    ratio: float | None = None
    ci95: Interval | None = None
    outcome: Outcome = "not tested"
    how: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that `optikit diff` prints; `refused` says what can't be compared and why."""

    sentence: str
    lines: tuple[Line, ...]
    refused: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One side: its report, what to call it, and its raw log-likelihoods if they are still there."""

    name: str
    report: Report
    nll: NDArray[Any] | None = None


def compare(a: Run, b: Run) -> Comparison:
    """Compare run `b` with run `a`."""
    quality = _perplexity(a, b)
    lines = tuple(line for line in (quality, *_distribution(a, b), *_speed(a, b), _size(a, b)) if line is not None)
    reasons = dict.fromkeys(line.how for line in lines if line.outcome == "not compared")
    labels = {reason: [line.label for line in lines if line.how == reason] for reason in reasons}
    refused = tuple(f"{'; '.join(labels[reason])}: {reason}" for reason in reasons)
    return Comparison(sentence=_sentence(a, b, lines), lines=lines, refused=refused)


def stored_nll(report: Report, store: Store) -> NDArray[Any] | None:
    """Return the log-likelihoods of a report's result, (windows, tokens), or None where the store has lost them."""
    import numpy as np

    measured = {step.name: step.key for step in report.measures}
    key = measured.get(f"{QUALITY}{report.steps[-1].name}" if report.steps else f"{QUALITY}baseline")
    if key is None:
        return None
    try:
        artifact = store.find(key)
        return np.load(artifact.path / NLL, allow_pickle=False) if artifact else None
    except (OptikitError, OSError, ValueError):  # lost or damaged: the report's own figures remain
        return None


def _perplexity_of(run: Run) -> Perplexity | None:
    quality = run.report.result.quality
    return quality.perplexity if quality else None


def _perplexity(a: Run, b: Run) -> Line | None:
    one, other = _perplexity_of(a), _perplexity_of(b)
    if one is None or other is None:
        return None
    line = Line(key="perplexity", label="Perplexity", a=text.number(one.value, 4), b=text.number(other.value, 4))
    if reason := _scored_differently(a, b, one, other):
        return replace(line, outcome="not compared", how=reason)
    if a.nll is not None and b.nll is not None and a.nll.shape == b.nll.shape:
        from optikit.evaluation import statistics

        ratio, ci95 = statistics.perplexity_ratio(a.nll, b.nll)
        how = f"paired over {text.plural(len(a.nll), 'window')}, bootstrap"
        return replace(line, ratio=ratio, ci95=ci95, outcome=_outcome(ci95, higher_is_better=False), how=how)
    lost = "the log-likelihoods of the windows are no longer in the store"
    same = _baseline_differs(a, b) is None
    if same and one.ratio and one.ratio_ci95 and other.ratio and other.ratio_ci95:
        ratio, ci95 = _quotient((one.ratio, one.ratio_ci95), (other.ratio, other.ratio_ci95))
        how = f"intervals of both runs combined, so too wide: {lost}"
        return replace(line, ratio=ratio, ci95=ci95, outcome=_outcome(ci95, higher_is_better=False), how=how)
    return replace(line, ratio=other.value / one.value, how=f"no interval: {lost}")


def _scored_differently(a: Run, b: Run, one: Perplexity, other: Perplexity) -> str | None:
    """Return why two perplexities have nothing to do with each other, or None."""
    if one.protocol != other.protocol:
        return f"different protocols: {one.protocol} and {other.protocol}"
    sizes = [run.report.model.get("vocab") for run in (a, b)]
    if sizes[0] != sizes[1]:
        return f"different tokenizers: {sizes[0]} and {sizes[1]} tokens in the vocabulary"
    if one.tokens != other.tokens:
        return f"different tokenizers: the text gives {one.tokens} and {other.tokens} scored tokens"
    return None


def _distribution(a: Run, b: Run) -> Iterator[Line]:
    """Yield what is measured against a baseline: comparable where protocol and baseline are the same."""
    one, other = a.report.result.quality, b.report.result.quality
    if one is None or other is None or one.perplexity is None or other.perplexity is None:
        return
    reason = _scored_differently(a, b, one.perplexity, other.perplexity) or _baseline_differs(a, b)
    if one.kl_divergence and other.kl_divergence:
        kl = one.kl_divergence, other.kl_divergence
        line = Line(
            key="kl_divergence", label="KL divergence, mean", a=text.number(kl[0].mean), b=text.number(kl[1].mean)
        )
        outcome = _apart(kl[0].mean_ci95, kl[1].mean_ci95, higher_is_better=False)
        ratio = kl[1].mean / kl[0].mean if kl[0].mean else None
        yield _refuse_or(line, reason, ratio=ratio, outcome=outcome)
    if one.top1_agreement is not None and other.top1_agreement is not None:
        shares = one.top1_agreement, other.top1_agreement
        line = Line(key="top1_agreement", label="Top-1 agreement", a=text.percent(shares[0]), b=text.percent(shares[1]))
        outcome = _apart(one.top1_agreement_ci95, other.top1_agreement_ci95, higher_is_better=True)
        yield _refuse_or(line, reason, ratio=shares[1] / shares[0] if shares[0] else None, outcome=outcome)


def _refuse_or(line: Line, reason: str | None, *, ratio: float | None, outcome: Outcome) -> Line:
    if reason:
        return replace(line, outcome="not compared", how=reason)
    how = "both against the same baseline; called different only where their intervals are apart"
    return replace(line, ratio=ratio, outcome=outcome, how=how)


def _speed(a: Run, b: Run) -> Iterator[Line]:
    one, other = a.report.result.speed, b.report.result.speed
    if one is None or other is None:
        return
    unlike = _timed_work_differs(one, other)
    for what in ("decode", "prefill"):
        rates: tuple[float, float] = (getattr(one, f"{what}_tokens_per_s"), getattr(other, f"{what}_tokens_per_s"))
        values = [f"{text.number(rate)} tok/s" for rate in rates]
        line = Line(key=what, label=f"{what.capitalize()} speed", a=values[0], b=values[1])
        yield replace(line, outcome="not compared", how=unlike) if unlike else _timed(a, b, line, rates)
    memory = (one.peak_memory_mib, other.peak_memory_mib)
    line = Line(key="peak_memory", label="Peak memory", a=text.memory(memory[0]), b=text.memory(memory[1]))
    yield replace(line, ratio=memory[1] / memory[0], how="one measurement each")


def _timed(a: Run, b: Run, line: Line, rates: tuple[float, float]) -> Line:
    pair: tuple[Ratio | None, Ratio | None] = (
        getattr(a.report.speedup, line.key),
        getattr(b.report.speedup, line.key),
    )
    before = (
        _machine_differs(a, b)
        or _baseline_differs(a, b)
        or _timed_differently(a.report.baseline.speed, b.report.baseline.speed)
    )
    if pair[0] is None or pair[1] is None or before:
        why = before or "not both were timed in pairs with a baseline"
        return replace(line, ratio=rates[1] / rates[0], how=f"no interval: {why}")
    ratio, ci95 = _quotient((pair[0].value, pair[0].ci95), (pair[1].value, pair[1].ci95))
    floor = max(pair[0].noise_floor, pair[1].noise_floor)
    outcome = _outcome(ci95, higher_is_better=True) if abs(ratio - 1) >= floor else "no measurable difference"
    how = f"quotient of both speed-ups over the same baseline, noise floor ±{100 * floor:.1f} %"
    return replace(line, ratio=ratio, ci95=ci95, outcome=outcome, how=how)


def _size(a: Run, b: Run) -> Line:
    sizes = a.report.result.size_bytes or 0, b.report.result.size_bytes or 0
    line = Line(key="size", label="Size of the weights", a=text.size(sizes[0]), b=text.size(sizes[1]), how="exact")
    ratio = sizes[1] / sizes[0] if sizes[0] else None
    same: Outcome = "no measurable difference"
    return replace(line, ratio=ratio, outcome=same if sizes[0] == sizes[1] else _lower_is_better(sizes))


def _lower_is_better(values: tuple[float, float]) -> Outcome:
    return "better" if values[1] < values[0] else "worse"


def _baseline_differs(a: Run, b: Run) -> str | None:
    """Return how the models that both runs started from differ, or None."""
    digests = [run.report.model.get("digest") or run.report.model.get("source") for run in (a, b)]
    return None if digests[0] == digests[1] else "they started from different models"


def _machine_differs(a: Run, b: Run) -> str | None:
    machines = [text.clean(str(run.report.host.get("cpu", "unknown"))) for run in (a, b)]
    return None if machines[0] == machines[1] else f"different machines, {machines[0]} and {machines[1]}"


def _timed_work_differs(one: Speed, other: Speed) -> str | None:
    if one.threads != other.threads:
        return f"different numbers of threads: {one.threads} and {other.threads}"
    lengths = [f"{speed.prompt_tokens} + {speed.new_tokens}" for speed in (one, other)]
    return None if lengths[0] == lengths[1] else f"different lengths: {lengths[0]} and {lengths[1]} tokens"


def _timed_differently(one: Speed | None, other: Speed | None) -> str | None:
    described = [f"{s.runtime} {s.dtype}, {text.plural(s.threads, 'thread')}" if s else "none" for s in (one, other)]
    return None if described[0] == described[1] else f"different baselines: {described[0]} and {described[1]}"


def _quotient(a: tuple[float, Interval], b: tuple[float, Interval]) -> tuple[float, Interval]:
    """Return b / a and its 95 % interval: errors of the logarithms added in squares, as if independent.

    >>> value, (low, high) = _quotient((2.0, (1.9, 2.1)), (2.2, (2.1, 2.3)))
    >>> round(value, 2), round(low, 2), round(high, 2)
    (1.1, 1.03, 1.18)
    """
    middle = math.log(b[0] / a[0])
    below = math.hypot(math.log(b[0] / b[1][0]), math.log(a[1][1] / a[0]))
    above = math.hypot(math.log(b[1][1] / b[0]), math.log(a[0] / a[1][0]))
    return math.exp(middle), (math.exp(middle - below), math.exp(middle + above))


def _outcome(ci95: Interval, *, higher_is_better: bool) -> Outcome:
    if ci95[0] <= 1 <= ci95[1]:
        return "no measurable difference"
    return "better" if (ci95[0] > 1) == higher_is_better else "worse"


def _apart(a: Interval | None, b: Interval | None, *, higher_is_better: bool) -> Outcome:
    """Judge two intervals: a difference where they don't touch."""
    if a is None or b is None:
        return "not tested"
    if a[0] <= b[1] and b[0] <= a[1]:
        return "no measurable difference"
    return "better" if (b[0] > a[1]) == higher_is_better else "worse"


def _sentence(a: Run, b: Run, lines: tuple[Line, ...]) -> str:
    """Say in one sentence what someone who decides needs: speed, size, quality."""
    by_key = {line.key: line for line in lines}
    gains = " and ".join((_speed_words(by_key.get("decode"), a.name), _size_words(by_key["size"])))
    return f"{b.name} {gains}; {_quality_words(by_key.get('perplexity'), a.name)}."


def _speed_words(line: Line | None, other: str) -> str:
    if line is None or line.ratio is None:
        return f"was not compared in speed with {other}"
    if line.outcome == "no measurable difference":
        reach = f" ({text.ratio_interval(line.ratio, line.ci95)})" if line.ci95 else ""
        same = line.ci95 is not None and wording.is_one(line.ci95)
        return f"writes as fast as {other}{reach}" if same else f"is of undetermined speed against {other}{reach}"
    word, value = ("faster", line.ratio) if line.ratio > 1 else ("slower", 1 / line.ratio)
    doubt = " (not tested for noise)" if line.outcome == "not tested" else ""
    return f"writes {text.ratio(value)} {word} than {other}{doubt}"


def _size_words(line: Line) -> str:
    if line.ratio is None or abs(line.ratio - 1) < text.UNCHANGED:
        return "is the same size"
    return f"is {text.ratio(line.ratio)} larger" if line.ratio > 1 else f"is {text.ratio(1 / line.ratio)} smaller"


def _quality_words(line: Line | None, other: str) -> str:
    if line is None:
        return "quality was not measured in both"
    if line.outcome == "not compared" or line.ratio is None:
        return f"their perplexities can't be compared ({line.how})"
    reach = f", 95 % interval {text.ratio_interval(line.ratio, line.ci95)}" if line.ci95 else ""
    measured = f"its perplexity is {text.ratio(line.ratio, line.ci95)} {other}'s{reach}"
    said = {
        "better": "it predicts better",
        "worse": "it predicts worse",
        "no measurable difference": "no difference in quality could be measured",
        "not tested": "whether quality differs could not be tested",
    }
    return f"{said[line.outcome]}: {measured}"


HEADER = ("", "A", "B", "B / A", "95 % interval", "B is")


def rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Return the table's rows in words, as `HEADER` names them."""
    return [
        (
            line.label,
            line.a,
            line.b,
            text.ratio(line.ratio, line.ci95) if line.ratio is not None else "–",
            text.ratio_interval(line.ratio, line.ci95) if line.ratio is not None and line.ci95 else "–",
            line.outcome,
        )
        for line in comparison.lines
    ]


def as_markdown(a: Run, b: Run, comparison: Comparison) -> str:
    """Return the comparison for a pull request."""
    cells = [[markdown.escape(cell) for cell in row] for row in rows(comparison)]
    lines = [
        f"**{markdown.escape(comparison.sentence)}**",
        "",
        f"A: {markdown.code(a.name)}, {markdown.escape(wording.what_was_done(a.report))}.",
        f"B: {markdown.code(b.name)}, {markdown.escape(wording.what_was_done(b.report))}.",
        "",
        *markdown.table(HEADER, cells, "lrrrrl"),
        "",
        *(f"- {markdown.escape(f'{line.label}: {line.how}')}" for line in comparison.lines if line.how),
    ]
    return "\n".join(lines) + "\n"


def as_json(a: Run, b: Run, comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as JSON values."""
    sides = {
        side: {"name": run.name, "verdict": run.report.verdict, "model": wording.model_name(run.report)}
        for side, run in (("a", a), ("b", b))
    }
    return {
        "schema_version": 1,
        **sides,
        "sentence": comparison.sentence,
        "metrics": [asdict(line) for line in comparison.lines],
        "refused": list(comparison.refused),
    }
