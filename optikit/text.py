"""Numbers and foreign words as text: one way to write each, shared by every renderer.

Names of models, protocols and files come from outside. `clean` takes out of them whatever a terminal, a browser or a
diff viewer would act on instead of showing; escaping for HTML, Markdown or XML is the renderer's own, last step.
"""

from __future__ import annotations

import math
import re
import unicodedata
from datetime import UTC, datetime

UNMEASURED = "not measured"
UNCHANGED = 0.005
"""A ratio without an interval is called unchanged within this distance of 1: half of the last digit printed."""

_ANSI = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # control sequences: colours, cursor movement
    r"|\x1b[\]PX^_].*?(?:\x1b\\|\x07|$)"  # strings: window titles, hyperlinks
    r"|\x1b[ -/]*[0-~]"  # two-byte escapes
    r"|\x9b[0-?]*[ -/]*[@-~]",  # control sequences spelt with one byte
    re.DOTALL,
)
_BREAKS = re.compile(r"[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")
_UNSHOWN = frozenset({"Cc", "Cf", "Cs", "Co"})
"""Unicode categories that aren't shown as themselves: controls, formats (bidi overrides, zero widths), surrogates."""


def clean(value: str) -> str:
    r"""Return `value` as one line that can only be read: no ANSI, no control, no bidi or zero-width characters.

    >>> clean("a\x1b[31mb\nc\u202ed")
    'ab c\ufffdd'
    """
    line = _BREAKS.sub(" ", _ANSI.sub("", value))
    if line.isascii() and line.isprintable():
        return line
    return "".join("\ufffd" if _hidden(character) else character for character in line)


def _hidden(character: str) -> bool:
    return unicodedata.category(character) in _UNSHOWN or ord(character) & 0xFFFE == 0xFFFE  # or a noncharacter


def number(value: float, digits: int = 3) -> str:
    """Write a number with `digits` significant digits, thousands set apart.

    >>> [number(v) for v in (184.23, 20.7312, 0.03125, 12345.6, 0.0)]
    ['184', '20.7', '0.0312', '12,346', '0']
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def ratio(value: float, ci95: tuple[float, float] | None = None) -> str:
    """Write a ratio with as many decimals as its interval supports, at least two below ten.

    >>> ratio(5.214), ratio(1.0042, (1.0031, 1.0053)), ratio(12.34)
    ('5.21×', '1.0042×', '12.3×')
    """
    return f"{value:.{_decimals(value, ci95)}f}×"


def ratio_interval(value: float, ci95: tuple[float, float]) -> str:
    """Write the interval of a ratio with the decimals of the ratio itself.

    >>> ratio_interval(5.214, (5.02, 5.41))
    '5.02–5.41×'
    """
    decimals = _decimals(value, ci95)
    return f"{ci95[0]:.{decimals}f}–{ci95[1]:.{decimals}f}×"


def _decimals(value: float, ci95: tuple[float, float] | None) -> int:
    """At least three digits; more where the ends would look the same, or like 1 without being it."""
    least = 2 if abs(value) < 9.995 else 1
    if ci95 is None:
        return least
    width = ci95[1] - ci95[0]
    if 0 < width < 0.1:
        least = max(least, math.ceil(-math.log10(width / 3)))
    while least < 4 and any(round(end, least) == 1 != end for end in ci95):
        least += 1
    return min(4, least)


def percent(value: float) -> str:
    """Write a share; digits grow towards 100 %, where the difference matters.

    >>> percent(0.8731), percent(0.99962)
    ('87.3 %', '99.96 %')
    """
    return f"{100 * value:.{2 if value > 0.99 else 1}f} %"


def points(share: float) -> str:
    """Write a difference of shares.

    >>> points(-0.018), points(0.0)
    ('−1.8 points', '0.0 points')
    """
    return f"{100 * share:+.1f} points".replace("-", "−") if round(share, 3) else "0.0 points"


def interval(ci95: tuple[float, float], digits: int = 3) -> str:
    """Write an interval's two ends with the same decimals, `digits` significant ones at the larger end.

    >>> interval((0.0931, 0.1039))
    '0.093–0.104'
    """
    largest = max(abs(ci95[0]), abs(ci95[1]))
    if largest < 1e-4 or not math.isfinite(largest):
        return f"{number(ci95[0], digits)}–{number(ci95[1], digits)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(largest)))
    return f"{ci95[0]:,.{decimals}f}–{ci95[1]:,.{decimals}f}"


def size(value: float) -> str:
    """Write bytes with a binary prefix.

    >>> size(94_600_000), size(1.1 * 2**30), size(512)
    ('90.2 MiB', '1.10 GiB', '512 B')
    """
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(value) >= 1024**power:
            return f"{number(value / 1024**power)} {unit}"
    return f"{value:.0f} B"


def memory(mib: float) -> str:
    """Write mebibytes with the prefix that suits them.

    >>> memory(1126.4), memory(430)
    ('1.10 GiB', '430 MiB')
    """
    return size(mib * 2**20)


def duration(seconds: float) -> str:
    """Write a time in the units that people say.

    >>> duration(0.42), duration(31.24), duration(134), duration(3900)
    ('0.4 s', '31.2 s', '2 min 14 s', '1 h 05 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def date(iso: str) -> str:
    """Write an ISO timestamp for people; anything else is returned as it is, cleaned.

    >>> date("2026-11-21T14:03:55+00:00"), date("yesterday")
    ('21 November 2026, 14:03 UTC', 'yesterday')
    """
    try:
        moment = datetime.fromisoformat(iso)
    except ValueError:
        return clean(iso)
    if moment.tzinfo is None:
        return f"{moment.day} {moment:%B %Y, %H:%M}"
    moment = moment.astimezone(UTC)
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"


def plural(count: int, noun: str) -> str:
    """Write a count with its noun.

    >>> plural(1, "gate"), plural(3, "gate")
    ('1 gate', '3 gates')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def step_words(name: str) -> str:
    """Write a step's name as people say it.

    >>> step_words("2-quantize-gptq"), step_words("measure-quality-result")
    ('quantize gptq', 'measure quality result')
    """
    return clean(re.sub(r"^\d+-", "", name).replace("-", " "))


def milliseconds(value: float) -> str:
    """Write milliseconds."""
    return f"{number(value)} ms"


def per_second(value: float) -> str:
    """Write a speed in tokens per second."""
    return f"{number(value)} tok/s"


def dollars(value: float) -> str:
    """Write US dollars."""
    return f"${number(value)}"


def joules(value: float) -> str:
    """Write an energy in joules."""
    return f"{number(value)} J"


def change(value: float, words: tuple[str, str], ci95: tuple[float, float] | None = None) -> str:
    """Word a ratio result / baseline by what one above 1 and one below 1 are called: "3.39× smaller" for 0.295.

    >>> change(0.295, ("larger", "smaller")), change(1.001, ("larger", "smaller")), change(1.12, ("", ""))
    ('3.39× smaller', 'unchanged', '1.12×')
    """
    if abs(value - 1) < UNCHANGED and ci95 is None:
        return "unchanged"
    if not all(words):
        return ratio(value, ci95)
    return f"{ratio(value, ci95)} {words[0]}" if value > 1 else f"{ratio(1 / value)} {words[1]}"
