"""The one way from a directory that a user names to a model: sealed where it is ours, harmless whoever made it."""

from __future__ import annotations

from pathlib import Path

from optikit import runtime
from optikit.app.verify import require_sealed
from optikit.errors import RecipeError
from optikit.models import config, headers, intake, quantization, reader, traits


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
    if name == "transformers":
        _require_whole(place)
    return name, place


def _require_whole(directory: Path) -> None:
    """Refuse weights that aren't what config.json says: a loader would draw random ones for some, and drop others.

    Of a model that can't be walked here, only packed weights that nothing tells of can be seen without its code.
    """
    settings = config.load(directory)
    try:
        reader.architecture_of(directory, settings)
    except RecipeError:
        if "quantization_config" not in settings:
            tensors = headers.read_directory(directory)
            quantization.require_agreement(traits.rows()[traits.DENSE], (), tensors, directory)
        return
    reader.read(directory)
