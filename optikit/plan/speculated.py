"""What becomes of each speculator that a recipe makes beside the engine that it compiles for: rows of engines.toml."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from optikit.deploy import engines

if TYPE_CHECKING:
    from optikit.plan.model import Plan, Step


def _engine(steps: Sequence[Step]) -> Step | None:
    """Return the step that compiles; None where none does."""
    return next((step for step in reversed(steps) if step.writes == "engine"), None)


def _rows(steps: Sequence[Step]) -> Iterator[tuple[Step, engines.Row]]:
    engine = _engine(steps)
    for step in steps:
        if step.writes == "speculator":
            row = engines.find(step.method, engine.method if engine else "")
            if row is not None:
                yield step, row


def lines(plan: Plan) -> Iterator[str]:
    """Yield a line per speculator, and one for what checks drafts."""
    for step, row in _rows(plan.steps):
        yield f"drafts  {step.method}: {engines.said(row)}"
    engine = _engine(plan.steps)
    if engine is not None and _verify(engine) == "int8":
        yield "        prompts and drafts run an int8 graph of the same weights, beside the one for single tokens"


def _verify(step: Step) -> Any:
    return getattr(step.options, "verify", "own")


def as_json(plan: Plan) -> list[dict[str, str]]:
    """Return what becomes of each speculator, as plain data."""
    return [
        {"step": step.name, "engine": row.engine, "word": row.word, "why": row.why} for step, row in _rows(plan.steps)
    ]
