"""An environment on this machine: where it lies, whether it is complete, who uses it.

HOME/environments/NAME-DIGEST/                  the virtual environment
HOME/environments/NAME-DIGEST/optikit.json      written last: no marker, no environment
HOME/environments/NAME-DIGEST.use               flock: shared by whoever uses it, exclusive to remove it
HOME/environments/NAME-DIGEST.log               what the last build said
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optikit.environments.definition import Definition, normalized
from optikit.errors import UnavailableError
from optikit.fileio import file_sha256
from optikit.process import env_variables, program
from optikit.store.store import ENVIRONMENTS

MARKER = "optikit.json"
OPTIKIT = Path(__file__).parent.parent
"""Source of optikit, which goes into an environment without its dependencies."""
CHECK_SECONDS = 1800.0
"""How long a health check may take: the first import of a large library compiles it, too, and on a machine that is
busy with other things half a minute of that has been seen to take twelve."""
State = Literal["ready", "missing", "incomplete", "broken"]

_PROBE = """
import importlib, importlib.metadata, json, sys
versions = {}
for found in importlib.metadata.distributions():
    versions[found.metadata["Name"]] = found.version
failed = {}
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed[name] = f"{type(error).__name__}: {error}"
sys.stdout.write("\\n" + json.dumps({"versions": versions, "failed": failed, "python": sys.version.split()[0]}))
"""


@dataclass(frozen=True)
class Environment:
    """An environment of a definition, there or not."""

    definition: Definition
    path: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.path / "bin" / "python"

    @property
    def log(self) -> Path:
        """What its last build said."""
        return self.path.with_name(self.path.name + ".log")

    @property
    def packages(self) -> Path:
        """Where its distributions lie."""
        return self.path / "lib" / f"python{self.definition.python}" / "site-packages"

    def marker(self) -> dict[str, Any]:
        """Return what was written when it was finished; empty where it isn't."""
        try:
            read = json.loads((self.path / MARKER).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return read if isinstance(read, dict) and read.get("digest") == self.definition.digest else {}

    def state(self) -> State:
        """Say how it stands by looking at files only, in milliseconds."""
        if not self.path.is_dir():
            return "missing"
        marker = self.marker()
        if not marker:
            return "incomplete"
        if self.lacking() or not os.access(self.python, os.X_OK) or marker.get("seal") != self.seal():
            return "broken"
        return "ready"

    def seal(self) -> str:
        """Return a sha256 of what decides which code starts: programs, start-up files, lists of what was put in.

        Compiled files and what libraries write beside themselves when they run are left out.
        """
        lists = self.packages.glob("*.dist-info/RECORD")
        start = (path for pattern in ("*.pth", "*customize.py") for path in self.packages.glob(pattern))
        found = [self.path / "pyvenv.cfg", *(self.path / "bin").glob("*"), *start, *lists]
        lines = [f"{path.relative_to(self.path)} {_stands_for(path)}" for path in sorted(found)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def lacking(self) -> list[str]:
        """Return the locked distributions that aren't there in the locked version, sorted."""
        present = dict(_installed(self.packages))
        return sorted(name for name, version in self.definition.pins.items() if present.get(name) != version)

    def troubles(self) -> list[str]:
        """Import what has to import and compare every version with the lock; return what is wrong, best empty."""
        try:
            command = [str(self.python), "-I", "-W", "ignore", "-c", _PROBE, json.dumps(self.definition.imports)]
            done = program.run(command, environ=env_variables.kept() | env_variables.OFFLINE, seconds=CHECK_SECONDS)
        except TimeoutError as error:
            return [f"its interpreter doesn't answer: {error}"]
        try:
            found = json.loads(done.output.rpartition("\n")[2])
        except ValueError:
            last = (done.errors.strip().splitlines() or ["no word"])[-1]
            return [f"its interpreter ended with exit code {done.code}: {last}"]
        installed = {normalized(name): version for name, version in found["versions"].items() if name}
        troubles = [f"{name} doesn't import: {why}" for name, why in found["failed"].items()]
        if not found["python"].startswith(self.definition.python + "."):
            troubles.append(f"python is {found['python']}, not {self.definition.python}")
        for name, version in self.definition.pins.items():
            if installed.get(name) != version:
                troubles.append(f"{name} is {installed.get(name, 'missing')}, and the lock says {version}")
        return troubles

    def require(self, step: str) -> None:
        """Raise if it has been damaged since a step began: then that is why the step failed.

        Raises:
            UnavailableError: Saying what is missing.
        """
        state = self.state()
        if state != "ready":
            name = self.definition.name
            message = f"{step}: environment {name} is {state}: something changed or removed it while it was used"
            raise UnavailableError(message, fix="run the same command again: it will be built anew")

    def variables(self, base: Mapping[str, str], directory: Path) -> dict[str, str]:
        """Return the variables for its interpreter, in which optikit can be imported and nothing else of ours.

        Args:
            base: Variables to start from; those that point to another python are left out.
            directory: Where a directory with a link to optikit's source may be made: the job's own, because several
                versions of optikit share one environment.
        """
        links = directory / "path"
        links.mkdir(exist_ok=True)
        with suppress(FileExistsError):
            (links / "optikit").symlink_to(OPTIKIT, target_is_directory=True)
        kept = {name: value for name, value in base.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        path = f"{self.path / 'bin'}{os.pathsep}{base.get('PATH', '')}"
        own = {"PYTHONPATH": str(links), "PYTHONSAFEPATH": "1", "PYTHONHASHSEED": "0", "PYTHONNOUSERSITE": "1"}
        return kept | own | {"PATH": path}

    @contextmanager
    def used(self) -> Iterator[None]:
        """Hold it: as long as anybody does, nobody removes it."""
        with self._use_file(fcntl.LOCK_SH):
            yield

    def remove(self) -> bool:
        """Remove it unless somebody uses it; return whether it is gone."""
        try:
            with self._use_file(fcntl.LOCK_EX | fcntl.LOCK_NB):
                self.clear()
        except BlockingIOError:
            return False
        self.log.unlink(missing_ok=True)
        return True

    def clear(self) -> None:
        """Remove the directory, marker first, so that a removal cut short leaves nothing that looks complete."""
        with suppress(FileNotFoundError, NotADirectoryError):
            (self.path / MARKER).unlink()
        shutil.rmtree(self.path, ignore_errors=True)

    @property
    def _use_path(self) -> Path:
        return self.path.with_name(self.path.name + ".use")

    @contextmanager
    def _use_file(self, operation: int) -> Iterator[None]:
        with self._use_path.open("ab") as file:
            fcntl.flock(file, operation)
            yield


def _stands_for(path: Path) -> str:
    """Return where a link leads, or the sha256 of a file."""
    if path.is_symlink():
        return str(path.readlink())
    return file_sha256(path) if path.is_file() else ""


def _installed(packages: Path) -> Iterator[tuple[str, str]]:
    """Yield (normalized name, version) of the distributions in a site-packages directory, from directory names."""
    if not packages.is_dir():
        return
    for entry in packages.iterdir():
        if entry.name.endswith(".dist-info"):
            name, _, version = entry.name.removesuffix(".dist-info").partition("-")
            yield normalized(name), version


def home(root: Path) -> Path:
    """Return the directory of all environments of a store at `root`; made where it doesn't exist."""
    directory = root / ENVIRONMENTS
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


def locate(definition: Definition, root: Path) -> Environment:
    """Return the environment of a definition in the store at `root`, built or not."""
    return Environment(definition, home(root) / f"{definition.name}-{definition.digest[:16]}")
