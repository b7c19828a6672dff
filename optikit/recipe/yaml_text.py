"""Plain data as YAML that every reader takes for the same: 1.2's rules and 1.1's, block style, strings in quotes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_PLAIN_KEY = re.compile(r"[A-Za-z][\w.-]*(?<!\.)")
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
_NO_WORDS = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n", "nan", "inf"})


def dump(data: Any) -> str:
    """Return a document.

    >>> print(dump({"model": "a b", "stages": [{"quantize": {"bits": 4}}], "gates": {}}), end="")
    model: "a b"
    stages:
      - quantize:
          bits: 4
    gates: {}
    """
    return "\n".join(_lines(data)) + "\n"


def _lines(data: Any) -> Iterator[str]:
    if isinstance(data, dict) and data:
        for key, value in data.items():
            yield from _entry(f"{_key(key)}:", value, "  ")
    elif isinstance(data, list) and data:
        for value in data:
            if isinstance(value, dict | list) and value:
                first, *rest = _lines(value)
                yield f"- {first}"
                yield from (f"  {line}" for line in rest)
            else:
                yield f"- {_scalar(value)}"
    else:
        yield _scalar(data)


def _entry(head: str, value: Any, indent: str) -> Iterator[str]:
    if isinstance(value, dict | list) and value:
        yield head
        yield from (f"{indent}{line}" for line in _lines(value))
    else:
        yield f"{head} {_scalar(value)}"


def _key(key: str) -> str:
    return key if _PLAIN_KEY.fullmatch(key) and key.lower() not in _NO_WORDS else _quoted(key)


def _scalar(value: Any) -> str:
    if isinstance(value, float):
        text = repr(value)  # 1e-05 is a number to YAML 1.2, but a text to 1.1, which wants a point
        return text if "." in text or "e" not in text else text.replace("e", ".0e")
    if isinstance(value, str):
        return _quoted(value)
    return json.dumps(value)


def _quoted(text: str) -> str:
    """Return a text in double quotes; what no file may hold as it is, or ends a line in one YAML only, as an escape."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))
