"""What a library left is looked at here, in our own process, before it counts as a result.

Its step ran in an interpreter of its own, with code that isn't ours: that it ended without an error says little.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optikit.errors import OptikitError, RefusedError, StageFailedError
from optikit.models import traits
from optikit.models.facts import ModelFacts
from optikit.models.reader import read

RUN_CODE = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".py"})
"""Suffixes of files that can run code when they are loaded."""
LARGEST = 1.5
"""Times the promised bytes that a library may write: padding and tables of its own, not weights left as they were."""


def require(step: str, backend: str, source: Path, dest: Path, planned: ModelFacts) -> dict[str, Any]:
    """Hold a model directory to what the plan promised of it, and to the tensors of the model that it was made of.

    A library may change the dtype of every tensor, so that their numbers aren't compared; none may be lost or added.

    Args:
        step: Name of the step, for messages.
        backend: Who did it.
        source: What it was given.
        dest: What it wrote.
        planned: Facts that its stage promised.

    Returns:
        `tensors`: what became of those of the source.

    Raises:
        StageFailedError: There is nothing, or something else than promised.
        RefusedError: A file of it can run code.
    """
    files = sorted(path for path in dest.rglob("*") if path.is_file())
    fix = "use backend optikit; what the library said is in the step's log"
    if not files:
        raise StageFailedError(f"{step}: {backend} ended without an error and wrote nothing", fix=fix)
    dangerous = [path.name for path in files if path.suffix in RUN_CODE]
    if dangerous:
        message = f"{step}: {backend} wrote {dangerous[0]}, which can run code when it is loaded"
        raise RefusedError(message, fix="use backend optikit: weights are kept as safetensors only")
    try:
        found = read(dest)
    except OptikitError as error:
        raise StageFailedError(f"{step}: {backend} wrote no model: {error.message}", fix=fix) from error
    for what, ours, theirs in _compared(planned, found):
        if ours != theirs:
            message = f"{step}: {backend} promised {what} {ours}, and what it wrote has {theirs}"
            raise StageFailedError(message, fix=fix)
    if found.weight_bytes > LARGEST * planned.weight_bytes:
        message = (
            f"{step}: {backend} promised {planned.weight_bytes / 1e6:.1f} MB, and wrote {found.weight_bytes / 1e6:.1f}"
        )
        raise StageFailedError(message, fix=fix)
    return {"tensors": _census(step, backend, source, dest, fix)}


def _census(step: str, backend: str, source: Path, dest: Path, fix: str) -> dict[str, Any]:
    from optikit.formats import census  # with torch, which planning does without

    try:
        return census.take(source, dest, "all", {}).facts()
    except OptikitError as error:
        raise StageFailedError(f"{step}: {backend} wrote another model: {error.message}", fix=fix) from error


def _compared(planned: ModelFacts, found: ModelFacts) -> tuple[tuple[str, object, object], ...]:
    return (
        ("weights", _traits(planned), _traits(found)),
        ("layers", planned.layers, found.layers),
        ("a vocabulary of", planned.vocab, found.vocab),
        ("blocks of", planned.intermediate, found.intermediate),
        ("linears", len(planned.linears), len(found.linears)),
    )


def _traits(facts: ModelFacts) -> str:
    """Return the traits that a directory shows by itself; the plan carries the others."""
    return ", ".join(sorted(row.trait for row in traits.of(facts.traits))) or "none"
