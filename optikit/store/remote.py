"""A second store behind a URL, read where a step isn't in the first: `s3://`, `gs://`, `file://`, whatever fsspec has.

    OPTIKIT_REMOTE_STORE=s3://bucket/prefix     a step that is there is fetched instead of run
    OPTIKIT_REMOTE_PUSH=1                       and one that was run is put there

Files lie at URL/artifacts/KEY/; the seal is written last and read first, and what is fetched is compared with it. A
second store that fails is a warning, and isn't asked again by that run. What lies there is believed as the first store
is: whoever may write to it decides what steps with these keys hold.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optikit import text
from optikit.errors import DiskError, IntegrityError, OptikitError, UnavailableError, UsageError
from optikit.store import files
from optikit.store.keys import valid
from optikit.store.manifest import NAME, load
from optikit.store.store import Artifact, Store

URL = "OPTIKIT_REMOTE_STORE"
PUSH = "OPTIKIT_REMOTE_PUSH"
PATIENCE = {"s3": {"config_kwargs": {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 2}}}}
"""Options of clients that would otherwise try for minutes to reach a server that isn't there, by protocol."""


def configured() -> str:
    """Return the URL of the second store, "" where there is none."""
    return os.environ.get(URL, "")


def pushes() -> bool:
    """Return whether runs put what they made into the second store."""
    return os.environ.get(PUSH, "") not in ("", "0")


class Remote:
    """A second store.

    Args:
        url: Where it is.

    Raises:
        UnavailableError: fsspec, or the package that it needs for this protocol, isn't installed.
        UsageError: It knows no such protocol.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            from fsspec.core import url_to_fs
        except ModuleNotFoundError as error:
            raise UnavailableError(f"{url} needs {error.name}", fix="pip install 'optikit[remote]'") from error
        protocol = url.partition("://")[0]
        try:
            # What a listing once said isn't believed later: other machines write, too.
            system, root = url_to_fs(url, use_listings_cache=False, **PATIENCE.get(protocol, {}))
        except ImportError as error:
            raise UnavailableError(f"{url}: {error}", fix="install the package that it names") from error
        except ValueError as error:
            raise UsageError(f"{url}: {error}", fix=f"set {URL} to s3://, gs:// or file://") from error
        self._system: Any = system
        self._root: str = root.rstrip("/")

    def _place(self, key: str, name: str) -> str:
        return f"{self._root}/artifacts/{valid(key)}/{name}"

    def has(self, key: str) -> bool:
        """Return whether an artifact is there.

        Raises:
            UnavailableError: It can't be asked.
        """
        with self._failures():
            return bool(self._system.exists(self._place(key, NAME)))

    def fetch(self, store: Store, key: str) -> Artifact | None:
        """Bring an artifact into the store; None where it isn't there.

        Raises:
            IntegrityError: What is there isn't as it was sealed.
            UnavailableError: It can't be had.
            DiskError: The disk is full.
        """
        if not self.has(key):
            return None
        staged = store.staging(key)
        try:
            self._get(key, NAME, staged)
            manifest = load(staged)
            files.require_free(store.root, manifest.size_bytes, f"fetching {key[:12]}")
            for name, record in manifest.files.items():
                with self._failures():
                    size = self._system.size(self._place(key, name))
                if size != record.size:
                    raise IntegrityError(f"{name} of {key[:12]} in {self.url} has {size} bytes, not {record.size}")
                self._get(key, name, staged)
            return store.adopt(key, staged)
        finally:
            files.remove_tree(staged)

    def _get(self, key: str, name: str, staged: Path) -> None:
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        with files.disk_errors(staged, f"fetching {key[:12]}"), self._failures():
            self._system.get_file(self._place(key, name), str(staged / name))

    def put(self, store: Store, artifact: Artifact, *, replace: bool = False) -> bool:
        """Put an artifact there, the seal last; return False where it is already, and isn't to be replaced.

        Raises:
            IntegrityError: It isn't as it was sealed.
            RefusedError: A text in it holds a credential.
            UnavailableError: It isn't taken.
        """
        if not replace and self.has(artifact.key):
            return False
        store.require_intact(artifact)
        for name in (*artifact.manifest.files, NAME):
            files.require_no_credential(artifact.path / name)
            place = self._place(artifact.key, name)
            with self._failures():
                self._system.makedirs(place.rpartition("/")[0], exist_ok=True)
                self._system.put_file(str(artifact.path / name), place)
        return True

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OptikitError:
            raise
        except Exception as error:  # clients of clouds raise anything
            message = f"{self.url}: {type(error).__name__}: {text.clean(str(error))[:300]}"
            raise UnavailableError(message, fix="check the address and its credentials") from error


class ReadThrough:
    """What a run does with the second store: nothing that fails there stops it.

    Args:
        store: Where artifacts come to.
        note: Told what is fetched and put, and what failed.
    """

    def __init__(self, store: Store, note: Callable[[str], None]) -> None:
        self._store = store
        self._note = note
        self._remote: Remote | None = None
        self._open = bool(configured())
        self._damaged: set[str] = set()

    def find(self, key: str) -> Artifact | None:
        """Return an artifact that the second store has, now in the first."""
        found: Artifact | None = None
        with self._asking(key):
            found = self._opened().fetch(self._store, key) if self._open else None
            if found:
                size = files.in_units(found.manifest.size_bytes)
                self._note(f"{key[:12]} fetched from {configured()} ({size})")
        return found

    def keep(self, artifact: Artifact) -> None:
        """Put an artifact in the second store, where that is asked for, also in the place of a damaged one."""
        if not (self._open and pushes()):
            return
        with self._asking(artifact.key):
            if self._opened().put(self._store, artifact, replace=artifact.key in self._damaged):
                self._note(f"{artifact.key[:12]} put in {configured()}")

    def _opened(self) -> Remote:
        self._remote = self._remote or Remote(configured())
        return self._remote

    @contextmanager
    def _asking(self, key: str) -> Iterator[None]:
        """Tell what fails there instead of failing; a second store that can't be reached isn't asked again."""
        try:
            yield
        except DiskError:
            raise
        except OptikitError as error:
            self._open = self._open and not isinstance(error, UnavailableError | UsageError)
            self._damaged |= {key} if isinstance(error, IntegrityError) else set()
            more = "" if self._open else "; it isn't asked again in this run"
            self._note(f"warning: the second store didn't help: {error.message}{more}")
