"""The user's package indexes, for uv: what pip is configured to use, uv doesn't read."""

from __future__ import annotations

import ast
import os
import sys

from optikit.process import program

VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "cert": ("SSL_CERT_FILE", ""),
}
"""pip's setting → uv's variable, and what stands between several values."""


def for_uv() -> dict[str, str]:
    """Return variables that make uv look where the user's pip looks; what the user has set for uv stays.

    They travel as variables, not as arguments, because an index address may hold a password.
    """
    # Where one index lacks a version another may have it, as pip sees it. The hashes say which bytes are right.
    found = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    for key, value in parsed(_pip_config()).items():
        variable, between = VARIABLES.get(key, ("", ""))
        if variable:
            found[variable] = between.join(value.split()) if between else value
    return {name: value for name, value in found.items() if name not in os.environ}


def _pip_config() -> str:
    done = program.run([sys.executable, "-m", "pip", "config", "list"], environ=os.environ)
    return done.output if done.code == 0 else ""  # no pip here: uv's own configuration is all there is


def parsed(listing: str) -> dict[str, str]:
    r"""Return settings from the output of `pip config list`: environment variables win over `install`, over `global`.

    >>> parsed("global.index-url='https://a/simple'\n:env:.index-url='https://b/simple'")
    {'index-url': 'https://b/simple'}
    """
    order = {"global": 0, "install": 1, ":env:": 2}
    rows = []
    for line in listing.splitlines():
        name, equals, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if equals and section in order:
            rows.append((order[section], key, str(ast.literal_eval(value))))
    return {key: value for _, key, value in sorted(rows)}
