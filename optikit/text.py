"""Numbers and foreign words as text: one way to write each, shared by every renderer.

Names of models, protocols and files come from outside. `clean` takes out of them whatever a terminal, a browser or a
diff viewer would act on instead of showing; escaping for HTML, Markdown or XML is the renderer's own, last step.
Whatever a verb prints goes through `printable` and `redact` once more, at the edge (`progress.Output`).
"""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

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


_JOINERS = "\u200c\u200d"
"""Without them Persian, Hindi and many emoji aren't spelt right; they move nothing."""
_COMMAND = re.compile(r"((?:^|%0[AaDd])[^\S\n]*:)(?=:)|(##\w*)(?=\[)", re.MULTILINE)
"""What a CI system takes for an order: `::error::` at the start of a line, `##[error]` or `##vso[…]` anywhere."""


def printable(value: str) -> str:
    r"""Return text of any number of lines that neither a terminal nor a CI system can take for a command.

    What comes out stays as it is when it is put in again, also when more text is put behind it.

    >>> print(printable("a\x1b[31mb\u202ec\n::error::d ##[group]"))
    a\ufffd[31mb\ufffdc
    : :error::d ## [group]
    """
    if not (value.isascii() and value.replace("\n", "").isprintable()):
        value = "".join(c if c in f"\n\t{_JOINERS}" or not _acts(c) else "\ufffd" for c in value)
    return _COMMAND.sub(lambda found: f"{found[1] or found[2]} ", value)


def _acts(character: str) -> bool:
    return _hidden(character) or character in "\u2028\u2029"


def dump_json(value: Any, *, indent: int | None = None) -> str:
    r"""Write JSON in which nothing is left for `printable` to change: what a terminal would act on is a \u escape.

    >>> dump_json({"name": "é\x9b\u202e ##[x]"})
    '{"name": "é\\u009b\\u202e ##\\u005bx]"}'
    """
    written = json.dumps(value, indent=indent, ensure_ascii=False)
    if not (written.isascii() and written.replace("\n", "").isprintable()):
        written = "".join(c if c == "\n" or c in _JOINERS or not _acts(c) else _escaped(c) for c in written)
    return re.sub(r"(##\w*)\[|(%0[AaDd][^\S\n]*):(?=:)", lambda m: f"{m[1] or m[2]}{_escaped(m[0][-1])}", written)


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))


HIDDEN = "***"
_TOKENS = tuple(
    (marks, re.compile(pattern))
    for marks, pattern in (
        (("://",), r"""(?P<kept>://)[^\s/?#"'<>\\]*(?=@)"""),  # user and password of an address
        (("earer ", "asic "), r"(?P<kept>\b(?:[Bb]earer|[Bb]asic) +)(?=\S*\d)[\w.~+/=-]{8,}"),
        (("hf_",), r"\bhf_[A-Za-z0-9]{16,}"),  # Hugging Face
        (("gho_", "ghp_", "ghs_", "ghu_", "ghr_"), r"\bgh[opsur]_[A-Za-z0-9]{16,}"),
        (("github_pat_",), r"\bgithub_pat_\w{16,}"),
        (("glpat-",), r"\bglpat-[\w-]{16,}"),
        (("sk-",), r"\bsk-[\w-]{16,}"),
        (("xox",), r"\bxox[a-z]-[\w-]{8,}"),
        (("AKIA",), r"\bAKIA[A-Z0-9]{16}\b"),
        (("pypi-Ag",), r"\bpypi-Ag[\w-]{16,}"),
        (("-----BEGIN ",), r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
        (("$",), r"""\$(?:[1567y]|2[abxy]|argon2\w+)\$[^:\s'"]{8,}"""),  # a password's hash, as in /etc/shadow
    )
)
"""Credentials of known shape: strings without one of which there is none, which are found far quicker, and the shape;
what it calls `kept` stays."""
_SECRET_NAME = re.compile(
    r"TOKEN(?!IZER)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|APIKEY"
    r"|(^|_)(PASS|PWD|AUTH|KEYS?|CREDS?|COOKIE|PRIVATE|PAT|DSN|WEBHOOK)(_|$)"
)
LEAST_SECRET = 8
"""Characters of a variable's value that is hidden wherever it is printed; shorter ones are words like `true`."""


def redact(value: str, environ: Mapping[str, str] | None = None) -> str:
    """Return text without credentials: those of known shape, and values of variables whose names say that they are.

    >>> redact("GET https://me:pw@host/x with hf_0123456789abcdefgh", {"DB_PASSWORD": "swordfish"})
    'GET https://***@host/x with ***'
    >>> redact("it said swordfish", {"DB_PASSWORD": "swordfish"})
    'it said ***'
    """
    for secret in _secrets(os.environ if environ is None else environ):
        value = value.replace(secret, HIDDEN)
    for marks, shape in _TOKENS:
        if any(mark in value for mark in marks):
            value = shape.sub(lambda found: found.groupdict().get("kept", "") + HIDDEN, value)
    return value


def _secrets(environ: Mapping[str, str]) -> list[str]:
    """Return values to hide, the longest first: one may hold another."""
    named = {value for name, value in environ.items() if _SECRET_NAME.search(name.upper())}
    return sorted((value for value in named if _is_secret(value)), key=len, reverse=True)


def _is_secret(value: str) -> bool:
    return len(value) >= LEAST_SECRET and not value.startswith("/")  # a path, as SSH_AUTH_SOCK has


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
