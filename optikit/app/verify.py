"""`optikit verify` as one function: every byte of a sealed directory, and every file that doesn't belong there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optikit.errors import InputMissingError, IntegrityError, RefusedError
from optikit.store import files, manifest
from optikit.store.manifest import NAME, UNSEALED_VERSION, Damage, Manifest, damages

REPORTS = ("report.json", "report.md", "report.html")
SIGNATURE = "model.sig"
"""Covers the seal, and so can't be part of it; OpenSSF's `model_signing verify` reads it."""
BESIDE = ("recipe.yaml", "optikit.lock", *REPORTS)
"""Written beside an output by versions whose seal didn't cover them."""
MADE_AGAIN = "run its recipe again into a new directory; what is in the store is used again"


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was found in a sealed directory.

    Attributes:
        files: Files that the seal names.
        size_bytes: Their bytes.
        damage: What isn't as sealed: changed, missing or added.
        unsealed: Files that the seal of an earlier version leaves out.
    """

    files: int
    size_bytes: int
    damage: tuple[Damage, ...]
    unsealed: tuple[str, ...]


def verify(directory: Path) -> Verified:
    """Compare a directory with its seal.

    Raises:
        InputMissingError: It isn't a directory, or was never sealed.
        IntegrityError: The seal itself can't be read, or was changed.
    """
    if not directory.is_dir():
        raise InputMissingError(f"{directory} is not a directory", fix="name an output directory of `optikit run`")
    if not os.path.lexists(directory / NAME):
        raise InputMissingError(f"{directory} has no {NAME}: it was never finished", fix="run its recipe again")
    sealed = manifest.load(directory)
    found = damages(directory, sealed)
    beside = tuple(one.path for one in found if _is_beside(one, sealed))
    return Verified(
        files=len(sealed.files),
        size_bytes=sealed.size_bytes,
        damage=tuple(one for one in found if one.path not in beside),
        unsealed=beside,
    )


def _is_beside(one: Damage, sealed: Manifest) -> bool:
    former = sealed.schema_version == UNSEALED_VERSION and one.path in BESIDE
    return one.unlisted and (former or one.path == SIGNATURE)


def output(directory: Path) -> tuple[Manifest, dict[str, Any]]:
    """Return the seal of an output directory, and all that it says.

    Raises:
        IntegrityError: It can't be read, was changed, or isn't an output's.
    """
    sealed, values = manifest.read(directory)
    if not isinstance(values.get("optikit"), str) or not isinstance(values.get("steps"), list):
        raise IntegrityError(f"{directory / NAME} is not of an output of `optikit run`", fix=MADE_AGAIN)
    return sealed, values


def strangers(directory: Path) -> list[str]:
    """Return the files in an output directory that no run wrote.

    Raises:
        RefusedError: Something there is a link or no regular file.
    """
    sealed, _ = output(directory)
    return [name for name in files.walk(directory) if name not in (NAME, *BESIDE) and name not in sealed.files]


def entries(directory: Path) -> list[str]:
    """Return the names of what an output directory holds of ours, its seal left out."""
    sealed, _ = output(directory)
    return sorted({*BESIDE, *(name.partition("/")[0] for name in sealed.files)})


def sealed_reports(directory: Path) -> tuple[str, ...]:
    """Return the rendered reports that a directory's seal covers.

    Raises:
        IntegrityError: The seal was changed, or the report's numbers aren't as sealed.
    """
    if not os.path.lexists(directory / NAME):
        return ()
    sealed, _ = output(directory)
    record = sealed.files.get(REPORTS[0])
    if record is None:
        return ()
    with files.open_regular(directory / REPORTS[0]) as file:
        if files.sha256(file) != record.sha256:
            message = f"{directory / REPORTS[0]} is not as sealed: its sha256 differs"
            raise IntegrityError(message, fix=MADE_AGAIN)
    return REPORTS[1:]


def require_sealed(directory: Path, *used: str) -> None:
    """Refuse an output of a run, or a directory inside one, that isn't as it was sealed.

    Every name and size is compared, and the bytes of what is used. A directory without a seal that isn't laid out as
    an output, such as a model of Hugging Face's, is none of ours and passes.

    Args:
        directory: What a user named.
        used: Directories below it that will be loaded; "" is itself.

    Raises:
        IntegrityError: Something was changed, added or removed, or the seal is missing.
    """
    found = _enclosing(directory)
    if found is None:
        if "" not in used:
            message = f"{directory} is laid out as an output of `optikit run` and has no {NAME}: it isn't sealed"
            raise IntegrityError(message, fix=f"run its recipe again, or name {directory / used[0]} to use it as it is")
        return
    base, sealed = found
    inside = directory.resolve().relative_to(base.resolve()).as_posix()
    prefixes = tuple(_prefix(inside, name) for name in used)
    damaged = damages(base, sealed, contents=_within(prefixes))
    wrong = [one for one in damaged if not _is_beside(one, sealed)]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise IntegrityError(f"{base} is not as it was sealed: {wrong[0]}{more}", fix=MADE_AGAIN)


def _enclosing(directory: Path) -> tuple[Path, Manifest] | None:
    """Return the sealed directory that a directory is, or is part of: DIR/model, DIR/compiled/ENGINE."""
    if os.path.lexists(directory / NAME):
        return directory, manifest.load(directory)
    parents = directory.resolve().parents[:2]
    base = next((each for each in parents if _is_an_output(each)), None)
    return None if base is None else (base, manifest.load(base))


def _is_an_output(directory: Path) -> bool:
    try:
        with files.open_regular(directory / NAME) as file:
            loaded = json.loads(file.read(manifest.MOST_BYTES))
    except (OSError, ValueError, RecursionError, RefusedError):  # whatever it is, it isn't ours
        return False
    return isinstance(loaded, dict) and "optikit" in loaded and "files" in loaded


def _prefix(inside: str, name: str) -> str:
    parts = [part for part in (inside, name) if part not in ("", ".")]
    return "/".join(parts) + "/" if parts else ""


def _within(prefixes: tuple[str, ...]) -> Callable[[str], bool]:
    return lambda name: name.startswith(prefixes)
