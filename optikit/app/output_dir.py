"""The output directory: copies of the artifacts in the layout that users and servers expect, sealed with its report.

DIR/  artifact.json  recipe.yaml  optikit.lock  report.*  model/  speculator/  compiled/<engine>/  serve/<server>/

It is built in a directory of its own, beside DIR where a rename from there works and else inside it, and put in its
place entry by entry, the seal last; DIR itself stays, so it may be a mount point, the working directory or a link's
target. A run killed at any point leaves DIR as it was, or without a seal until the next run finishes what was begun.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit import __version__
from optikit.app import serve_folders, verify
from optikit.errors import CannotCreateError, DiskError, IntegrityError, LockedError, RefusedError
from optikit.fileio import file_sha256
from optikit.store import files, manifest
from optikit.store.manifest import NAME, Damage
from optikit.store.sources import LOCK, lock_entries
from optikit.store.store import directory_digest

if TYPE_CHECKING:
    from optikit.evaluation.results import Report
    from optikit.plan import Plan, Step
    from optikit.recipe.load import LoadedRecipe
    from optikit.store.store import Artifact, Store

RECIPE = "recipe.yaml"
POLL_SECONDS = 0.2
RETURNED = re.compile(r"compiled/[^/]+/result\.json")
"""What comes back from the device that finished an emitted folder."""


def require_writable(out: Path, *, timeout: float | None = None, resume: bool = False) -> None:
    """Refuse an output path before any work, if it can't be made or holds something that optikit didn't write.

    What a killed run left there is put right first. With `resume`, results may have come back into emitted folders.

    Raises:
        CannotCreateError: With the reason.
        LockedError: Another run has been writing there for longer than `timeout` seconds.
    """
    with _creating(out):
        place = _resolved(out)
        if place.exists():
            with _locked(place, timeout):
                _settle(place)
                _require_ours(out, place, resume=resume)
        _require_creatable(out, place)


def _require_creatable(out: Path, place: Path) -> None:
    parent = next(path for path in (place, *place.parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        why = "not writable" if parent.is_dir() else "a file"
        raise CannotCreateError(f"{out} can't be made: {parent} is {why}", fix="choose another --out")


def write(
    out: Path,
    loaded: LoadedRecipe,
    plan: Plan,
    artifacts: Mapping[str, Artifact],
    *,
    store: Store,
    report: Report | None = None,
    timeout: float | None = None,
    resume: bool = False,
) -> None:
    """Write the output directory, its report included, and seal it; an older one is replaced.

    Raises:
        IntegrityError: A file isn't what its artifact's manifest says; the artifact is set aside.
        DiskError: When the disk is full or fails; the older directory is then still there.
        CannotCreateError: The directory can't be written, or meanwhile holds what optikit didn't write.
        LockedError: Another run has been writing there for longer than `timeout` seconds.
    """
    with _creating(out):
        place = _resolved(out)
        made = not place.exists()
        with _locked(place, timeout):
            _settle(place)
            _require_ours(out, place, resume=resume)
            partial = _staging(place)
            try:
                older = _older(place)
                for name, source, digest, artifact in _layout(plan, artifacts):
                    _place(source, partial / name, digest, older.get(digest), artifact, store)
                _require_source(plan, artifacts, partial)
                (partial / RECIPE).write_text(loaded.text, encoding="utf-8")
                (partial / LOCK).write_text(json.dumps(lock_entries(plan.sources), indent=1), encoding="utf-8")
                serve_folders.write(partial, loaded, plan)
                if report is not None:
                    _write_reports(report, partial, out)
                _seal(partial, _said(plan, loaded))
            except BaseException:
                files.remove_tree(partial)
                if made:
                    with suppress(OSError):
                        place.rmdir()
                raise
            _exchange(place, partial)  # cut short, the next run finishes it
            files.remove_tree(partial)
            files.remove_tree(partial.with_suffix(".old"))


def _write_reports(report: Report, partial: Path, out: Path) -> None:
    from optikit.report import write as report_files

    try:
        report_files.write(report, partial)
    except DiskError as error:  # names the place where it is built
        raise DiskError(f"{out} can't be written: {error.message}", fix=files.GC_FIX) from error


def render_reports(directory: Path, report: Report) -> None:
    """Write report.md and report.html of a directory anew, and seal them again where they were sealed."""
    from optikit.report import write as report_files

    sealed = verify.sealed_reports(directory)
    report_files.render(report, directory)
    if sealed:
        _, values = manifest.read(directory)
        records = {name: _record(directory / name) for name in sealed}
        text = manifest.dumps({**values, "files": {**values["files"], **records}})
        files.write_whole(directory / NAME, text.encode())


def require_no_seal(out: Path) -> None:
    """Refuse, before any work, a directory for a report that can't be made, or is sealed.

    Raises:
        CannotCreateError: With the reason.
    """
    with _creating(out):
        _require_creatable(out, _resolved(out))
    if os.path.lexists(out / NAME):
        raise CannotCreateError(f"{out} is sealed: a report written there would break it", fix="choose another --out")


@contextmanager
def _creating(out: Path) -> Iterator[None]:
    """Name what goes wrong while the output is written."""
    try:
        with files.disk_errors(out.absolute().parent, f"{out} can't be written", fix="choose another --out"):
            yield
    except OSError as error:
        raise CannotCreateError(f"{out} can't be written: {error.strerror or error}", fix="choose another --out") from (
            error
        )


def _resolved(out: Path) -> Path:
    """Return the directory that a path means, links followed.

    Raises:
        CannotCreateError: It is a file, a loop of links, or the root of the file system.
    """
    try:
        place = out.resolve()
    except RuntimeError as error:
        raise CannotCreateError(f"{out} is a loop of links", fix="choose another --out") from error
    if place.exists() and not place.is_dir():
        raise CannotCreateError(f"{out} is a file", fix="choose another --out")
    return place


@contextmanager
def _locked(place: Path, timeout: float | None) -> Iterator[None]:
    """Hold a directory: one writer at a time, freed by the kernel when its holder dies."""
    began = time.monotonic()
    while True:
        place.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _flock(descriptor) and _is_there(place, descriptor):
                yield
                return
        finally:
            os.close(descriptor)
        waited = time.monotonic() - began
        if timeout is not None and waited >= timeout:
            message = f"another run has been writing {place} for {waited:.0f} s"
            raise LockedError(message, fix="wait for it, raise --lock-timeout, or choose another --out")
        time.sleep(POLL_SECONDS)


def _is_there(place: Path, descriptor: int) -> bool:
    """Say whether a directory is still the one at its path: whoever held the lock may have removed it."""
    return place.exists() and os.path.samestat(os.fstat(descriptor), place.stat())


def _flock(descriptor: int) -> bool:
    """Take the lock; some file systems have none for directories, and then one writer is all that can be hoped for."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def returned(out: Path) -> dict[str, Path]:
    """Return the results that came back into the emitted folders of an output directory, by engine.

    One that an earlier run has read already is sealed with the rest, and isn't among them.
    """
    if not os.path.lexists(out / NAME):
        return {}
    names = [name for name in verify.strangers(out) if RETURNED.fullmatch(name)]
    return {name.split("/")[1]: out / name for name in names}


def _require_ours(out: Path, place: Path, *, resume: bool = False) -> None:
    """Refuse a directory with anything in it that optikit didn't write, or that came back from a device unasked."""
    if not any(place.iterdir()):
        return
    fix = "choose another --out, or move away what is yours"
    if not os.path.lexists(place / NAME):
        raise CannotCreateError(f"{out} is not empty and was not written by optikit", fix=fix)
    try:
        verify.output(place)
    except IntegrityError as error:
        message = f"{out} holds an {NAME} that isn't of an output of optikit, or is damaged: {error.message}"
        raise CannotCreateError(message, fix=fix) from error
    try:
        others = [name for name in verify.strangers(place) if not (resume and RETURNED.fullmatch(name))]
    except RefusedError as error:
        raise CannotCreateError(f"{out} holds what optikit didn't write: {error.message}", fix=fix) from error
    if others:
        _refuse(out, others, fix)


def _refuse(out: Path, others: Sequence[str], fix: str) -> None:
    """Refuse a directory for the files in it that aren't ours; what a device made is no rubbish."""
    if RETURNED.fullmatch(others[0]):
        message = f"{out} holds {others[0]}, which came back from a device and isn't read yet"
        raise CannotCreateError(message, fix="run with --resume to read it into the report")
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    if all(name.startswith("compiled/") for name in others):
        fix = "what a device made here would be lost: put its result.json into a copy without the rest of it"
    raise CannotCreateError(f"{out} holds what optikit didn't write: {others[0]}{more}", fix=fix)


# ------------------------------------------------------------------ what is shipped


def _layout(plan: Plan, artifacts: Mapping[str, Artifact]) -> Iterator[tuple[str, Path, str, Artifact | None]]:
    """Yield (name in the output, file, its sha256, its artifact) of everything that is shipped."""
    done = [step for step in plan.steps if step.key in artifacts]
    yield from _model_files(plan, [artifacts[step.key] for step in done if step.writes in ("source", "model")])
    for step in done:
        if step.writes == "engine":
            yield from _files(f"compiled/{step.method}", artifacts[step.key])
    for step in _speculators(plan):
        if step.key in artifacts:
            yield from _files("speculator", artifacts[step.key])


def _speculators(plan: Plan) -> list[Step]:
    """Return the steps that make what drafts, then those that choose how it is used: their files lie together."""
    made = [step for step in plan.steps if step.writes == "speculator"]
    return made + [step for step in plan.measures if step.method == "speculation"]


def _model_files(plan: Plan, made: Sequence[Artifact]) -> Iterator[tuple[str, Path, str, Artifact | None]]:
    """Yield the files of the last model directory made; where none was, those of the recipe's own."""
    if made:
        yield from _files("model", made[-1])
    elif plan.model.format == "safetensors":
        for name in plan.model.names:
            path = (plan.model.path / name).resolve()
            yield f"model/{name}", path, file_sha256(path), None


def layout_digests(plan: Plan, artifacts: Mapping[str, Artifact]) -> dict[str, str]:
    """Return the sha256 of every file that would be shipped, by its name in the output."""
    return {name: digest for name, _, digest, _ in _layout(plan, artifacts)}


def _files(prefix: str, artifact: Artifact) -> Iterator[tuple[str, Path, str, Artifact]]:
    for name, record in sorted(artifact.manifest.files.items()):
        yield f"{prefix}/{name}", artifact.path / name, record.sha256, artifact


def _place(source: Path, dest: Path, digest: str, older: Path | None, artifact: Artifact | None, store: Store) -> None:
    """Bring a file to `dest`, checked against its manifest; one of the older output that is intact is linked."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    dest.unlink(missing_ok=True)
    if older is not None and older.is_file() and file_sha256(older) == digest:
        with suppress(OSError):  # not every file system has links
            os.link(older, dest)
            return
    try:
        files.copy(source, dest, digest=digest)
    except IntegrityError as error:
        if artifact is None:
            raise
        found = Damage(source.relative_to(artifact.path).as_posix(), error.message)
        store.refuse_damaged(artifact, [found])


def _older(place: Path) -> dict[str, Path]:
    """Return the files of the older output by their sha256."""
    if not (place / NAME).is_file():
        return {}
    sealed, _ = verify.output(place)
    return {record.sha256: place / name for name, record in sealed.files.items()}


def _require_source(plan: Plan, artifacts: Mapping[str, Artifact], partial: Path) -> None:
    """Compare a model that is shipped as it is with the digest that it was resolved to.

    Raises:
        IntegrityError: It changed since.
    """
    made = any(step.writes in ("source", "model") and step.key in artifacts for step in plan.steps)
    if made or plan.model.format != "safetensors":
        return
    found = directory_digest({path.name: file_sha256(path) for path in sorted((partial / "model").iterdir())})
    if found != plan.model.digest:
        message = f"{plan.model.spec} changed while it was worked on: sha256 {found}, expected {plan.model.digest}"
        raise IntegrityError(message, fix="run again; if it happens twice, check the disk")


def _said(plan: Plan, loaded: LoadedRecipe) -> dict[str, Any]:
    last = plan.steps[-1] if plan.steps else None
    return {
        "schema_version": manifest.SCHEMA_VERSION,
        "optikit": __version__,
        "key": last.key if last else plan.model.digest,
        "traits": sorted((last.after if last else plan.facts).traits),
        "model": plan.model.resolved,
        "target": plan.target.name,
        "device": plan.device,
        "recipe": loaded.written,
        "steps": [_origin(step) for step in plan.steps],
    }


def _origin(step: Step) -> dict[str, Any]:
    options = step.options.model_dump(mode="json")
    return {"name": step.name, "verb": step.verb, "method": step.method, "key": step.key, "options": options}


def _seal(partial: Path, said: Mapping[str, Any]) -> None:
    records = {name: _record(partial / name) for name in files.walk(partial)}
    (partial / NAME).write_text(manifest.dumps({**said, "files": records}), encoding="utf-8")
    files.sync_tree(partial)


def _record(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


# ------------------------------------------------------------------ how it gets there


def _staging(place: Path) -> Path:
    """Return a fresh directory from which entries can be renamed into `place`: beside it, or else inside it."""
    beside = place.with_name(f".{place.name}.{os.getpid()}.part")
    probe = place / f".optikit.{os.getpid()}.part"
    try:  # a border of file systems, a mount of the same one, and a parent that isn't ours all show here
        beside.mkdir()
        (beside / "probe").mkdir()
        (beside / "probe").rename(probe)
        probe.rmdir()
    except OSError:
        with suppress(OSError):  # a name that is too long
            files.remove_tree(beside)
        probe.mkdir()
        return probe
    return beside


def _exchange(place: Path, partial: Path) -> None:
    """Put what is in `partial` in its place; can be begun again wherever it was cut short.

    The older entries step aside, the seal first; then the new ones come in, the seal last.
    """
    old = partial.with_suffix(".old")
    if not os.path.lexists(partial / NAME):  # the seal is in its place: the rest is, too
        return
    if os.path.lexists(place / NAME):
        names = verify.entries(place)
        old.mkdir(exist_ok=True)
        (old / "names").write_text(json.dumps(names), encoding="utf-8")
        (place / NAME).rename(old / NAME)
    names = json.loads((old / "names").read_text(encoding="utf-8")) if (old / "names").is_file() else []
    (old / "entries").mkdir(parents=True, exist_ok=True)
    for name in names:
        if os.path.lexists(place / name) and not os.path.lexists(old / "entries" / name):
            (place / name).rename(old / "entries" / name)
    for name in sorted((path.name for path in partial.iterdir()), key=lambda name: name == NAME):
        (partial / name).rename(place / name)
    files.sync_directory(place)


def _settle(place: Path) -> None:
    """Put right what killed runs left: finish an exchange that had begun, bring back what only stepped aside, clear.

    The lock is held, so whatever is found is left by the dead.
    """
    for partial in _left(place, "part"):
        if partial.with_suffix(".old").is_dir():
            _exchange(place, partial)
        files.remove_tree(partial)
    for old in _left(place, "old"):
        if (old / NAME).is_file() and not any(place.iterdir()):  # as earlier versions of optikit left it
            place.rmdir()
            old.rename(place)
        files.remove_tree(old)


def _left(place: Path, suffix: str) -> Iterator[Path]:
    """Yield what runs left beside or inside an output directory, by its name."""
    beside = re.compile(rf"\.{re.escape(place.name)}\.\d+\.{suffix}")
    inside = re.compile(rf"\.optikit\.\d+\.{suffix}")
    for directory, pattern in ((place.parent, beside), (place, inside)):
        with suppress(OSError):
            yield from sorted(path for path in directory.iterdir() if pattern.fullmatch(path.name) and path.is_dir())
