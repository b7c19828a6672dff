"""The content-addressed store: one sealed directory per key, complete and as written, or not there at all.

    ROOT/artifacts/KEY/     files + artifact.json           scratch/KEY/   half-done work, kept for the resume
         tmp/               being written, not yet sealed   downloads/     files of models and texts
         locks/             one writer per key: `lease`    corrupt/       what didn't match its seal
         jobs/KEY/          request and log of a step       digests.json   sha256 remembered by size, times, inode

Writing: a fresh directory in tmp/ → files → fsync → artifact.json → fsync → rename → fsync. Killed anywhere, the store
holds the artifact whole or not at all, and what is left in tmp/ is swept by the next run. Reading: every size always,
every sha256 once per process, that of large files from memory until a step reads them or the output gets them; what
differs is set aside in corrupt/ and counts as absent, so that it is made again. What a process has found or made nobody
removes while it lives; see `in_use`.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn

from optikit import text
from optikit.errors import CannotCreateError, IntegrityError, LockedError
from optikit.store import fault_points, files, in_use, lease
from optikit.store.digests import Digests
from optikit.store.keys import cache_key, is_key, valid
from optikit.store.manifest import NAME, Artifact, Damage, Manifest, damages, load, seal

__all__ = ["Artifact", "Damage", "Manifest", "Store", "cache_key"]

Verify = Literal["full", "size"]
LOCK_POLL_SECONDS = 0.1
DIRECTORIES = ("artifacts", "tmp", "locks", "scratch", "downloads", "corrupt", "jobs")
ENVIRONMENTS = "environments"
"""Directory of the managed environments, made with the first: what lies there is executed."""
_TOKEN = os.urandom(4).hex()
"""Tells this process from others that have its number: earlier ones, and those of other containers."""
_NUMBERS = itertools.count(1)
_STAGING = re.compile(r"[0-9a-f]{16}-\d+-[0-9a-f]{8}-\d+@(?P<host>.*)")


class Store:
    """A store at one root directory; made where it doesn't exist, readable by its owner only.

    Args:
        root: Directory of the store.
        warn: Told about damage found and mended, which is in `warnings`, too.

    Raises:
        CannotCreateError: If the directories can't be made.
        RefusedError: If anybody else may write to them, or owns them.
    """

    def __init__(self, root: Path, *, warn: Callable[[str], None] | None = None) -> None:
        try:
            self.root = root.expanduser().absolute()
        except RuntimeError:  # HOME isn't set, and the system doesn't know this user
            message = f"the store {root} needs a home directory, and this user ({os.getuid()}) has none"
            raise CannotCreateError(message, fix="set OPTIKIT_HOME to a directory of your own") from None
        self.warnings: list[str] = []
        self.warn = partial(_warn, self.warnings, warn)
        self._verified: set[str] = set()
        self._reread: set[str] = set()
        self._holder = in_use.Holder()
        with files.disk_errors(self.root, f"store {self.root}"):
            self._make_directories()
        self._digests = Digests(self.root / "digests.json", warn=self.warn)
        self._sweep()

    @classmethod
    def default(cls, *, warn: Callable[[str], None] | None = None) -> Store:
        """Open the user's store: $OPTIKIT_HOME, else $XDG_CACHE_HOME/optikit, else ~/.cache/optikit.

        Args:
            warn: Told about damage found and mended; by default it goes to standard error.
        """
        home = os.environ.get("OPTIKIT_HOME")
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return cls(Path(home) if home else Path(cache) / "optikit", warn=warn or _to_stderr)

    def hold(self, path: Path) -> bool:
        """Keep others from removing an entry as long as this object lives; return whether it is there."""
        return self._holder.hold(path)

    def _make_directories(self) -> None:
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in DIRECTORIES:
                (self.root / name).mkdir(mode=0o700, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise CannotCreateError(f"{error.filename} is not a directory", fix="point OPTIKIT_HOME to one") from error
        for path in (self.root, *(self.root / name for name in (*DIRECTORIES, ENVIRONMENTS))):
            if path.exists():
                files.require_own(path)

    # ------------------------------------------------------------------ reading

    def find(self, key: str, *, verify: Verify = "full") -> Artifact | None:
        """Return an artifact if it is there and as sealed; else None, with what is damaged set aside.

        Args:
            key: Its cache key.
            verify: `full` compares sha256 the first time that this process asks for it; `size` never does.
        """
        path = self.artifact_path(key)
        if not self.hold(path):
            return None
        contents = verify == "full" and key not in self._verified
        if path.is_symlink() or not path.is_dir():
            self.set_aside(path, [Damage(path.name, "is no directory")])
            return None
        try:
            manifest = load(path)
            found = damages(path, manifest, contents=contents, digest=self._digests.of)
            if manifest.key != key:
                found = [Damage(NAME, f"is the seal of {manifest.key!r}")]
        except IntegrityError as error:
            found = [Damage(NAME, error.message)]
        except FileNotFoundError:  # another process sets it aside or collects it right now
            return None
        if found:
            self.set_aside(path, found)
            return None
        if contents:
            self._verified.add(key)
            self._digests.save()
        with suppress(OSError):
            os.utime(path)  # last use, for the garbage collection
        return Artifact(key, path, manifest)

    def require_intact(self, artifact: Artifact) -> None:
        """Read every byte of an artifact before something is made of it, once per process.

        Raises:
            IntegrityError: It isn't what was sealed; it is set aside, and the next run makes it again.
        """
        if artifact.key in self._reread:
            return
        found = damages(artifact.path, artifact.manifest, digest=self._digests.read)
        self._digests.save()
        if found:
            self.refuse_damaged(artifact, found)
        self._reread.add(artifact.key)

    def refuse_damaged(self, artifact: Artifact, found: Sequence[Damage]) -> NoReturn:
        """Set an artifact aside that was found damaged while it was used.

        Raises:
            IntegrityError: Always.
        """
        self.set_aside(artifact.path, found)
        message = f"{artifact.path} changed on the disk after it was sealed ({found[0]})"
        raise IntegrityError(message, fix="run again: it is set aside and will be made anew; check the disk")

    def keys(self) -> tuple[str, ...]:
        """Return the keys of all artifacts, sorted; being there doesn't mean being whole."""
        return tuple(sorted(path.name for path in (self.root / "artifacts").iterdir() if is_key(path.name)))

    def digest_file(self, path: Path) -> str:
        """Return the sha256, in hex, of a file; unchanged files aren't read again."""
        digest = self._digests.of(path)
        self._digests.save()
        return digest

    def known_digest(self, path: Path, names: Iterable[str] | None = None) -> str:
        """Return the sha256 of a file, or of some files of a directory, as far as it is remembered; "" where it isn't.

        No large file is read: what decides whether a plan is cached may be asked in no time.
        """
        if names is None:
            return self._digests.known(path)
        found = {name: self._digests.known(path / name) for name in names}
        return directory_digest(found) if all(found.values()) else ""

    def digest_directory(self, path: Path, names: Iterable[str], *, anew: bool = False) -> str:
        """Return one sha256 for some files of a directory: of their names and contents, whatever the directory is.

        Args:
            path: The directory.
            names: Files in it.
            anew: Read every byte, also of files that look unchanged.
        """
        digest = self._digests.read if anew else self._digests.of
        found = directory_digest({name: digest(path / name) for name in names})
        self._digests.save()
        return found

    def artifact_path(self, key: str) -> Path:
        """Return where the artifact of a key is, or would be."""
        return self.root / "artifacts" / valid(key)

    def set_aside(self, path: Path, found: Sequence[Damage]) -> None:
        """Move what is damaged to corrupt/ and warn: from then on it counts as absent."""
        self._verified.discard(path.name)
        aside = self.root / "corrupt" / f"{path.name}-{time.time_ns()}"
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        try:
            path.rename(aside)
        except FileNotFoundError:  # another process did so
            return
        except OSError as error:
            self.warn(f"{path} is damaged ({found[0]}{more}) and can't be set aside: {error.strerror}")
            return
        self.warn(f"{path.name[:12]} was damaged ({found[0]}{more}): set aside in {aside}, to be made again")

    # ------------------------------------------------------------------ writing

    def staging(self, key: str) -> Path:
        """Return a fresh, empty directory to write an artifact into; swept if this process dies."""
        while True:
            name = f"{valid(key)[:16]}-{os.getpid()}-{_TOKEN}-{next(_NUMBERS)}@{os.uname().nodename}"
            path = self.root / "tmp" / name
            with files.disk_errors(self.root, f"store {self.root}"):
                path.mkdir(mode=0o700)
            if self.hold(path):  # else it was swept before it was held
                return path

    def scratch(self, key: str) -> Path:
        """Return the directory that keeps half-done work of a step until its result is committed."""
        path = self.root / "scratch" / valid(key)
        with files.disk_errors(self.root, f"store {self.root}"):
            path.mkdir(mode=0o700, exist_ok=True)
        return path

    def job_dir(self, key: str) -> Path:
        """Return where request, events, response and log of a step belong; made by whoever runs it."""
        return self.root / "jobs" / valid(key)

    def commit(self, key: str, directory: Path, manifest: Manifest) -> Artifact:
        """Seal a directory from `staging` and publish it under its key.

        If the key is there already and whole, that one is kept and ours is discarded: two writers converge.

        Args:
            key: Cache key.
            directory: Finished files; gone afterwards, whether this succeeds or fails.
            manifest: Everything but the files and the time.

        Raises:
            RefusedError: If the directory holds anything but plain files.
            DiskError: If the disk is full; nothing is left of the directory.
        """
        valid(key)
        try:
            with files.disk_errors(self.root, f"storing {key[:12]}"):
                fault_points.reach("before_write")
                sealed = seal(directory, replace(manifest, key=key), digest=self._digests.of)
                fault_points.reach("before_rename")
                artifact = self._publish(directory, Artifact(key, self.artifact_path(key), sealed))
                fault_points.reach("after_rename")
        finally:
            files.remove_tree(directory)
        files.remove_tree(self.root / "scratch" / key)
        self._digests.save()
        return artifact

    def adopt(self, key: str, directory: Path) -> Artifact:
        """Publish a sealed directory from `staging` whose files came from another store, after reading every byte.

        Args:
            key: Cache key that it has to be sealed with.
            directory: Its files are on disk for good; gone afterwards, whether this succeeds or fails.

        Raises:
            IntegrityError: It isn't what its seal says.
            DiskError: If the disk is full.
        """
        try:
            manifest = self.require_sealed(key, directory)
            with files.disk_errors(self.root, f"storing {key[:12]}"):
                files.sync_tree(directory)
                artifact = self._publish(directory, Artifact(key, self.artifact_path(key), manifest))
        finally:
            files.remove_tree(directory)
        self._digests.save()
        return artifact

    def require_sealed(self, key: str, directory: Path) -> Manifest:
        """Return the seal of a directory that came from elsewhere, after reading every byte of it.

        Raises:
            IntegrityError: It isn't what was sealed under this key.
        """
        fix = "copy it again from where it was made"
        manifest = load(directory)
        if manifest.key != key:
            raise IntegrityError(f"{key[:12]} has the seal of {manifest.key[:12]!r}", fix=fix)
        if found := damages(directory, manifest, digest=self._digests.of):
            raise IntegrityError(f"{key[:12]} isn't as it was sealed: {found[0]}", fix=fix)
        return manifest

    def _publish(self, directory: Path, artifact: Artifact) -> Artifact:
        for _ in range(3):
            try:
                directory.rename(artifact.path)  # fails where a directory with anything in it is in the way
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            else:
                files.sync_directory(artifact.path.parent)
                self._digests.moved(directory, artifact.path)
                self._verified.add(artifact.key)
                return artifact
            existing = self.find(artifact.key)
            if existing is not None:
                return existing
        fix = "make it writable, or remove it by hand"
        raise CannotCreateError(f"{artifact.path} is damaged and can't be replaced", fix=fix)

    def export(self, artifact: Artifact, dest: Path) -> None:
        """Copy an artifact's files, checked on the way, to a directory that appears whole or not at all.

        Real copies: changing them can't damage the store. A directory in the way is replaced; artifact.json stays out,
        because the seal of the directory around it will cover the copies.

        Raises:
            IntegrityError: If a file isn't what the manifest says.
            DiskError: If the disk is full; nothing half-written is left.
        """
        need = artifact.manifest.size_bytes
        files.require_free(dest.parent, need, f"copying to {dest}")
        partial = dest.with_name(f".{dest.name}.{os.getpid()}.part")
        files.remove_tree(partial)
        try:
            with files.disk_errors(dest.parent, f"copying to {dest}", need=need):
                partial.mkdir(parents=True)
                for name, record in artifact.manifest.files.items():
                    (partial / name).parent.mkdir(parents=True, exist_ok=True)
                    files.copy(artifact.path / name, partial / name, digest=record.sha256)
                files.sync_tree(partial)
                replace_directory(partial, dest)
        except BaseException:
            files.remove_tree(partial)
            raise

    # ------------------------------------------------------------------ locking

    @contextmanager
    def lock(
        self,
        key: str,
        *,
        timeout: float | None = None,
        waiting: Callable[[str], None] = lambda _: None,
    ) -> Iterator[lease.Lease]:
        """Hold the lock of a key: one process of all machines at a time, free when its holder dies; see `lease`.

        Args:
            key: Cache key.
            timeout: Seconds to wait; None waits as long as it takes.
            waiting: Told once who holds it, if anybody does.

        Raises:
            LockedError: If it is still held after `timeout`.
        """
        path = self.root / "locks" / f"{valid(key)}.lock"
        if path.is_symlink() or (path.exists() and not path.is_file()):
            self.set_aside(path, [Damage(path.name, "is no file")])
        kernel, held = lease.KernelLock(path), lease.Lease(path.with_suffix(".lease"))
        deadline, told = None if timeout is None else time.monotonic() + timeout, False
        try:
            with files.disk_errors(self.root, f"lock {path}"):
                while not (kernel.take() and held.take(alone_here=kernel.works)):
                    if not told:
                        waiting(f"waiting for {held.holder()}, which works on {key[:12]}")
                        told = True
                    if deadline is not None and time.monotonic() >= deadline:
                        message = f"{held.holder()} still works on {key[:12]} after {timeout:g} s"
                        raise LockedError(message, fix="wait for it, or raise --lock-timeout")
                    time.sleep(LOCK_POLL_SECONDS)
            yield held
        finally:
            held.give_back()
            kernel.let_go()

    def is_locked(self, key: str) -> bool:
        """Return whether anybody works on a key."""
        path = self.root / "locks" / f"{valid(key)}.lock"
        kernel = lease.KernelLock(path)
        try:
            with files.disk_errors(self.root, f"lock {path}"):
                free = not path.exists() or kernel.take()
                return not free or lease.is_held(path.with_suffix(".lease"), alone_here=kernel.works)
        finally:
            kernel.let_go()

    def _sweep(self) -> None:
        """Remove what dead processes of this machine left in tmp/."""
        for path in (self.root / "tmp").iterdir():
            match = _STAGING.fullmatch(path.name)
            if match is None or match["host"] != os.uname().nodename:
                continue
            with in_use.alone(path) as unused:
                if unused:
                    files.remove_tree(path)


def directory_digest(digests: Mapping[str, str]) -> str:
    """Return one sha256 for the files of a directory, from the sha256 of each by name."""
    return cache_key(files=dict(digests))


def replace_directory(source: Path, dest: Path) -> None:
    """Rename a directory to `dest`; what is there steps aside first and goes when the new one is in place."""
    old = dest.with_name(f".{dest.name}.{os.getpid()}.old")
    files.remove_tree(old)
    in_the_way = dest.exists() or dest.is_symlink()
    if in_the_way:
        dest.rename(old)
    try:
        source.rename(dest)
    except BaseException:
        if in_the_way:
            old.rename(dest)
        raise
    files.sync_directory(dest.parent)
    files.remove_tree(old)


def _warn(warnings: list[str], also: Callable[[str], None] | None, what: str) -> None:
    warnings.append(what)
    if also is not None:
        also(what)


def _to_stderr(what: str) -> None:
    sys.stderr.write(f"warning: {text.clean(what)}\n")
