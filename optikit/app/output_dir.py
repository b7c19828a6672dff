"""The output directory: copies of the artifacts in the layout that users and servers expect, swapped in at once.

DIR/  artifact.json  recipe.yaml  optikit.lock  model/  speculator/  compiled/<engine>/  (the reports are written after)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit import __version__
from optikit.errors import CannotCreateError, DiskError
from optikit.fileio import file_sha256
from optikit.store.sources import lock_entries

if TYPE_CHECKING:
    from optikit.plan import Plan, Step
    from optikit.recipe.load import LoadedRecipe
    from optikit.store.store import Artifact

MANIFEST = "artifact.json"
UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".py")
"""Never copied from a source directory: loading them can run code."""


def require_writable(out: Path) -> None:
    """Refuse an output path that can't be made, or that holds something optikit didn't write.

    Raises:
        CannotCreateError: With the reason.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise CannotCreateError(f"{out} is not empty and was not written by optikit", fix="choose another --out")
    if out.exists() and not out.is_dir():
        raise CannotCreateError(f"{out} is a file", fix="choose another --out")
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not os.access(parent, os.W_OK):
        raise CannotCreateError(f"{out} can't be made: {parent} is not writable", fix="choose another --out")


def write(out: Path, loaded: LoadedRecipe, plan: Plan, artifacts: Mapping[str, Artifact]) -> None:
    """Write the output directory: built beside its place, then renamed into it; an older one is replaced whole.

    Raises:
        DiskError: When the disk is full or fails; the older directory is then still there.
    """
    partial = out.absolute().with_name(f".{out.name}.{os.getpid()}.part")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        files = {}
        for name, source in _layout(plan, artifacts):
            digest = _place(source, partial / name, out / name)
            files[name] = {"size": source.stat().st_size, "sha256": digest}
        (partial / "recipe.yaml").write_text(loaded.text, encoding="utf-8")
        lock = lock_entries((plan.model, *plan.texts.values(), *plan.models.values()))
        (partial / "optikit.lock").write_text(json.dumps(lock, indent=1), encoding="utf-8")
        (partial / MANIFEST).write_text(json.dumps(_manifest(plan, files), indent=1), encoding="utf-8")
        _swap(partial, out)
    except OSError as error:
        raise DiskError(f"{out} can't be written: {error}", fix="free some disk space and run again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _layout(plan: Plan, artifacts: Mapping[str, Artifact]) -> Iterator[tuple[str, Path]]:
    """Yield (name in the output, file) of everything that is shipped."""
    done = [step for step in plan.steps if step.key in artifacts]
    directories = [step for step in done if step.writes in ("source", "model")]
    if directories:
        yield from _files("model", artifacts[directories[-1].key])
    elif plan.model.format == "safetensors":
        for path in sorted(plan.model.path.iterdir()):
            if path.is_file() and path.suffix not in UNSAFE_SUFFIXES:
                yield f"model/{path.name}", path
    for step in done:
        if step.writes == "engine":
            yield from _files(f"compiled/{step.method}", artifacts[step.key])
    speculation = [step for step in plan.measures if step.method == "speculation" and step.key in artifacts]
    for step in (*done, *speculation):
        if step.writes == "speculator" or step in speculation:
            yield from _files("speculator", artifacts[step.key])


def _files(prefix: str, artifact: Artifact) -> Iterator[tuple[str, Path]]:
    for name in sorted(artifact.manifest.files):
        yield f"{prefix}/{name}", artifact.path / name


def _place(source: Path, dest: Path, older: Path) -> str:
    """Bring a file to `dest` and return its sha256; an identical one in the older output is linked, not copied."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    digest = file_sha256(source)
    if older.is_file() and older.stat().st_size == source.stat().st_size and file_sha256(older) == digest:
        os.link(older, dest)
        return digest
    shutil.copyfile(source, dest)
    if file_sha256(dest) != digest:
        raise OSError(f"{dest.name} differs from its source after copying")
    return digest


def _manifest(plan: Plan, files: Mapping[str, Any]) -> dict[str, Any]:
    last = plan.steps[-1] if plan.steps else None
    return {
        "schema_version": 1,
        "optikit": __version__,
        "key": last.key if last else plan.model.digest,
        "traits": sorted((last.after if last else plan.facts).traits),
        "model": plan.model.resolved,
        "target": plan.target.name,
        "steps": [_origin(step) for step in plan.steps],
        "files": dict(files),
    }


def _origin(step: Step) -> dict[str, Any]:
    options = step.options.model_dump(mode="json")
    return {"name": step.name, "verb": step.verb, "method": step.method, "key": step.key, "options": options}


def _swap(partial: Path, out: Path) -> None:
    """Put a finished directory in its place; the older one is moved aside first and removed last."""
    aside = partial.with_suffix(".old")
    shutil.rmtree(aside, ignore_errors=True)
    if out.exists():
        out.rename(aside)
    partial.rename(out)
    shutil.rmtree(aside, ignore_errors=True)
