"""The one way from a directory that a user names to a model: sealed where it is ours, harmless whoever made it."""

from __future__ import annotations

from pathlib import Path

from optikit import runtime
from optikit.app.verify import require_sealed
from optikit.models import intake


def enter(directory: Path) -> tuple[str, Path]:
    """Return the runtime that loads a directory, and the directory inside it that it loads, after checking both.

    Raises:
        InputMissingError: Nothing there can be loaded.
        IntegrityError: It is an output of a run, and not as it was sealed.
        RefusedError: It would make a loader run code, or read what isn't the model's.
    """
    name, place = runtime.find(directory)
    inside = "" if place == directory else place.relative_to(directory).as_posix()
    require_sealed(directory, inside, runtime.SPECULATOR)
    intake.admit(place)
    return name, place
