"""Write examples/loads.md: which server loads the weights that each stage writes, how that is known, and who refuses.

    python tests/benchmarks/loads_table.py

Nothing is measured here: rows are those of optikit/deploy/support.toml and optikit/models/traits.toml.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from optikit.deploy import support
from optikit.models import traits

PAGE = Path(__file__).parents[2] / "examples" / "loads.md"
HEAD = """# Who loads what

Weights by trait (the last column of `optikit plan`), the servers that load them, and how that is known. Tested: loaded
and decoded by the slow tests, held to the tokens that optikit decodes. Source: read in that version's code. Derived:
follows from a library that it uses. Written by `python tests/benchmarks/loads_table.py`.

| weights | server | versions | known | |
|---|---|---|---|---|
"""


def lines() -> Iterator[str]:
    """Yield a line of the table for each row, refusals last of each trait."""
    for trait, storage in traits.rows().items():
        for row in support.rows():
            if row.what == trait:
                note = f"{row.note}; {row.source}" if row.note else row.source
                yield f"| {trait} | {row.server} | {row.versions} | {row.basis} | {note} |\n"
        for server, why in storage.refused.items():
            yield f"| {trait} | {server} | – | refused | {why} |\n"


def page() -> str:
    """Return the page."""
    return HEAD + "".join(lines())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
