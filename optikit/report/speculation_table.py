"""What speculation brought, in the words of the field: names, units and order of its figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from optikit import text
from optikit.report import values

DRAFTERS: Mapping[str, str] = {
    "lookup": "prompt lookup",
    "ngram": "n-grams of earlier answers",
    "medusa": "Medusa heads",
    "eagle3": "EAGLE-3 drafter",
    "draft": "draft model",
    "off": "none: it doesn't pay here",
}
DRAWN = frozenset({"acceptance_by_position", "window_ms", "by_prompt"})
"""Figures that are pictures where there can be any."""


Rows = tuple[tuple[str, str], ...]


def grouped(given: Mapping[str, Any], *, drawn: bool) -> tuple[tuple[str, Rows], ...]:
    """Return (name, value) of every figure, by what it is about.

    One that isn't known, or isn't what it should be, is told as it stands.

    Args:
        given: `speculation` of a report.
        drawn: Whether `DRAWN` are pictures and not told in words.
    """
    known = {str(key): value for key, value in given.items() if not (drawn and key in DRAWN)}
    return tuple(
        (title, tuple(row for key in names for row in _rows(key, known[key])))
        for title, names in _titled(known).items()
        if names
    )


def _titled(known: Collection[str]) -> dict[str, list[str]]:
    """Return the keys below each title; those that nobody here knows stand last."""
    keys = {title: [key for key in group if key in known] for title, group in GROUPS.items()}
    return keys | {FURTHER: [key for key in known if key not in WORDS]}


def listed(given: Mapping[str, Any], *, drawn: bool) -> Rows:
    """Return the rows of `grouped`, one after the other."""
    return tuple(row for _, rows in grouped(given, drawn=drawn) for row in rows)


NAMES: Mapping[Any, str] = {"medusa": "Medusa", "eagle3": "EAGLE-3", "draft": "Draft model"}
"""Methods that somebody trained something for, so that its idleness is news."""


def drafters(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Return who drafts, in words: whoever was asked in any step; empty where nothing drafts or that isn't known."""
    by = given.get("by_drafter")
    used = [name for name, row in by.items() if _steps(row)] if isinstance(by, Mapping) else []
    chosen = given.get("chosen")
    named = used or ([chosen] if isinstance(chosen, str) else [])
    return () if chosen == "off" else tuple(_drafter(name) for name in named)


def not_used(given: Mapping[str, Any]) -> bool:
    """Tell whether the heads or the draft model that were asked for draft nothing."""
    asked, chosen, by = given.get("method"), given.get("chosen"), given.get("by_drafter")
    if not isinstance(chosen, str) or not (isinstance(asked, str) and asked in NAMES):
        return False
    return chosen != asked or (isinstance(by, Mapping) and not _steps(by.get(asked)))


def _steps(row: Any) -> bool:
    return isinstance(row, Mapping) and bool(row.get("steps"))


def sentence(given: Mapping[str, Any]) -> str:
    """Say what speculation brought; nothing where that isn't known."""
    if given.get("chosen") == "off":
        return "Measured here, no drafter pays: the model decodes without one."
    try:
        steady = given.get("speedup_without_loops")
        found = steady or given["speedup"]
        value, (low, high) = _finite(found["value"]), map(_finite, found["ci95"])
        gain = f"{text.ratio(value)} ({text.ratio_interval(value, (low, high))})"
        where = " on answers that don't repeat themselves" if steady else ""
        said = f"Tokens come {gain} as fast as from the same graph without drafts{where}; "
        said += f"{_times(given['predicted_speedup'])}{' for all of them' if steady else ''}"
        ties, unlike = int(given["explained_ties"]), int(given["unexplained"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return ""
    same = "texts part from plain decoding at near-ties only" if ties else "every text is that of plain decoding"
    same = f"{text.plural(unlike, 'text')} part from plain decoding, and nothing explains it" if unlike else same
    if unlike and given.get("lossless") is False:
        same = f"{text.plural(unlike, 'text')} part from plain decoding, as acceptor {given.get('acceptor')} lets them"
    if given.get("verify_path") == "int8":
        same += "; drafts are checked by the int8 graph, whose own greedy text is what texts are held to"
    return f"{said} was predicted; {same}."


def _rows(key: str, value: Any) -> Iterator[tuple[str, str]]:
    known = WORDS.get(key)
    if known is None or value is None:
        yield from values.listed({key: value}) if known is None else [(known[0], "–")]
        return
    name, words = known
    try:
        shown = words(value)
    except (TypeError, ValueError, AttributeError, KeyError):
        yield from values.listed({key: value})
        return
    if isinstance(shown, str):
        yield name, shown
    else:
        yield from ((f"{name}: {part}", each) for part, each in shown)


Shown = str | list[tuple[str, str]]


def _drafter(name: Any) -> str:
    return text.clean(DRAFTERS.get(name, str(name)))


def _percent(share: Any) -> str:
    return text.percent(_finite(share))


def _percents(shares: Any) -> str:
    return ", ".join(map(_percent, shares)) or "–"


def _times(value: Any) -> str:
    return text.ratio(_finite(value))


def _ms(value: Any) -> str:
    return text.milliseconds(_finite(value))


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _lengths(lengths: Any) -> str:
    longest_first = sorted(((int(n), int(k)) for n, k in lengths.items()), reverse=True)
    return ", ".join(f"{k} after {text.plural(n, 'token')}" for n, k in longest_first) or "none"


def _accepted(by: Any) -> Shown:
    rows = []
    for name, row in by.items():
        drafted, kept, steps = int(row["drafted"]), int(row["accepted"]), int(row["steps"])
        rate = text.percent(kept / max(1, drafted))
        rows.append((_drafter(name), f"{rate}, {kept:,} of {drafted:,} draft tokens in {text.plural(steps, 'step')}"))
    return rows


def _alone(by: Any) -> Shown:
    return [(_drafter(name), _times(value)) for name, value in by.items()]


PATHS: Mapping[str, str] = {"own": "the first graph", "int8": "the int8 graph", "verify": "the int8 graph"}


def _path(name: Any) -> str:
    return PATHS[name]


def _singles(given: Any) -> str:
    return ", ".join(f"{PATHS[name]}: {_ms(ms)}" for name, ms in given.items())


def _own(given: Any) -> str:
    name = _drafter(given["name"])
    if not given["used"]:
        return f"{name}: not used, 1.00× predicted"
    gain = given.get("predicted_speedup")
    return name if gain is None else f"{name}: {_times(gain)} predicted beside lookup"


def _costs(given: Any) -> str:
    return f"{_ms(given['ask'])} per draft and {_ms(given['per_token'])} per token of it"


def _windows(given: Any) -> str:
    return ", ".join(f"{int(m)}: {_ms(ms)}" for m, ms in given.items())


def _latency(given: Any) -> Shown:
    return [
        (text.clean(str(name)), f"{_ms(row['p50'])} median, {_ms(row['p90'])} at the 90th percentile")
        for name, row in given.items()
    ]


def _prompts(rows: Any) -> str:
    best = max(rows, key=lambda row: _finite(row["speedup"]))
    return f"the best {_times(best['speedup'])} at an acceptance length of {text.number(best['acceptance_length'])}"


GROUPS: Mapping[str, Mapping[str, tuple[str, Callable[[Any], Shown]]]] = {
    "What it brings": {
        "speedup_without_loops": ("speed-up on answers that don't repeat themselves", values.worded),
        "speedup": ("speed-up on all answers, measured", values.worded),
        "predicted_speedup": ("speed-up on all answers, predicted", _times),
        "speedup_end_to_end": ("speed-up, the prompt's run included", values.worded),
        "latency_ms": ("time per answer", _latency),
        "looping": ("answers that hold the same 8 tokens twice", _percent),
        "acceptance_length": ("acceptance length: tokens per forward pass", values.worded),
        "acceptance_by_position": ("acceptance rate by draft position", _percents),
        "by_prompt": ("speed-up by prompt", _prompts),
    },
    "What drafts": {
        "method": ("method asked for", _drafter),
        "chosen": ("method chosen by measuring", _drafter),
        "lengths": ("prompt lookup: tokens drafted after a match", _lengths),
        "gate": ("n-grams of earlier answers: least confidence", _percent),
        "ahead": ("heads or draft model: most tokens drafted", values.worded),
        "ahead_gate": ("heads or draft model: least confidence", _percent),
        "by_drafter": ("acceptance rate", _accepted),
        "acceptor": ("acceptor", values.worded),
        "own_drafter": ("what the stage's own drafter brings", _own),
        "drafting_steps": ("forward passes that checked a draft", _percent),
    },
    "Whether texts stay the same": {
        "lossless": ("lossless", values.worded),
        "verify_path": ("drafts are checked by", _path),
        "single_path": ("a token alone is run by", _path),
        "prompts": ("prompts judged on", values.worded),
        "exact_match": ("answers identical to plain decoding", _percent),
        "explained_ties": ("answers that part at a near-tie of logits", values.worded),
        "unexplained": ("answers that part anywhere else", values.worded),
        "largest_tie_margin": ("largest margin of such a tie, logits", values.worded),
        "kernel_noise": ("largest difference between the engine's kernels, logits", values.worded),
    },
    "Why this drafter": {
        "predicted_single_drafter": ("speed-up predicted for one drafter alone", _alone),
        "single_ms": ("time of one token", _singles),
        "drafting_ms": ("cost of heads or draft model", _costs),
        "window_ms": ("verification cost T(m): time of a forward pass of m tokens", _windows),
    },
}
"""Name of each figure, and how its value is written, by what it is about."""
WORDS = {key: words for group in GROUPS.values() for key, words in group.items()}
FURTHER = "Further figures"
"""Group of figures that nobody gave a name."""
