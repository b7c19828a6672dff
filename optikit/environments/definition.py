"""What an environment is made of: a row of environments.toml and a lock file with a hash for every package."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optikit.errors import IntegrityError, UnavailableError, UsageError
from optikit.problems import did_you_mean

ROOT = Path(__file__).parent
"""Holds environments.toml, cuda.toml and locks/."""
CUDA_ROWS = "cuda_rows.toml"
"""Interpreters by kind of machine for which a row of cuda.toml has all wheels."""
SCHEMA = 1
"""Raised when environments are built in another way, so that none built before is taken for one."""
_PIN = re.compile(r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[^\s;\\]+)")


@dataclass(frozen=True, kw_only=True)
class Definition:
    """An environment as it is written down.

    Attributes:
        name: What stages and users call it.
        summary: One line.
        python: Version of the interpreter, `3.11`.
        lock: Text of the lock file: `name==version` lines with sha256 hashes.
        imports: Modules that have to import for it to be healthy.
        sources: Distributions without a wheel: built with what is in the environment, after everything else.
        variables: Environment variables of those builds.
        cuda: Major version of CUDA that it was built for; 0 computes on the CPU.
    """

    name: str
    summary: str
    python: str
    lock: str
    imports: tuple[str, ...]
    sources: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    cuda: int = 0

    @property
    def device(self) -> str:
        """Torch device that it computes on."""
        return "cuda" if self.cuda else "cpu"

    @property
    def pins(self) -> dict[str, str]:
        """Version of every distribution, by normalized name."""
        matches = (_PIN.match(line) for line in self.lock.splitlines())
        return {normalized(match["name"]): match["version"] for match in matches if match}

    @property
    def digest(self) -> str:
        """sha256, in hex, of everything that decides what is installed."""
        parts = [SCHEMA, self.lock, self.python, list(self.sources), dict(self.variables), platform.machine()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def requirements(self, *, sources: bool) -> str:
        """Return the part of the lock that is installed from wheels, or the part that is built from source."""
        wanted = {normalized(name) for name in self.sources}
        kept, keep = [], False
        for line in self.lock.splitlines(keepends=True):
            match = _PIN.match(line)
            if match:
                keep = (normalized(match["name"]) in wanted) is sources
            if keep:
                kept.append(line)
        return "".join(kept)


def normalized(name: str) -> str:
    """Return a distribution's name as package indexes compare it.

    >>> normalized("Typing_Extensions")
    'typing-extensions'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def names(root: Path | None = None) -> tuple[str, ...]:
    """Return the names of all environments, sorted."""
    return tuple(sorted(_rows(root or ROOT)))


def find(name: str, root: Path | None = None) -> Definition:
    """Return a definition by name.

    Raises:
        UsageError: There is no such environment.
        IntegrityError: Its lock holds a line without a hash or without an exact version.
    """
    root = root or ROOT
    rows = _rows(root)
    if name not in rows and name in cuda_rows(root):
        return _for_cuda(name, root)
    if name not in rows:
        raise UsageError(f"there is no environment {name!r}", fix=did_you_mean(name, (*rows, *cuda_rows(root))))
    row = rows[name]
    definition = Definition(
        name=name,
        summary=row["summary"],
        python=row["python"],
        lock=(root / "locks" / f"{name}.txt").read_text(encoding="utf-8"),
        imports=tuple(row["imports"]),
        sources=tuple(row.get("sources", ())),
        variables=row.get("variables", {}) | row.get("variables_on", {}).get(platform.machine(), {}),
    )
    _check(definition)
    return definition


def cuda_rows(root: Path | None = None) -> dict[str, Any]:
    """Return the rows of cuda.toml, by name."""
    path = (root or ROOT) / "cuda.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _for_cuda(name: str, root: Path) -> Definition:
    """Return a row of cuda.toml as it is on this kind of machine, for the interpreter that is at hand if it may be.

    Raises:
        UnavailableError: A package of it has no wheel for this kind of machine.
    """
    row, machine = cuda_rows(root)[name], platform.machine()
    wheels = tomllib.loads((root / CUDA_ROWS).read_text(encoding="utf-8"))[name]
    pythons = wheels.get(machine, [])
    if not pythons:
        message = f"there is no environment {name} for {machine}: {wheels['absent'].get(machine, 'nobody locked it')}"
        raise UnavailableError(message, fix="use the one for CPUs, or another backend")
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    python = own if own in pythons else pythons[-1]
    lock = (root / "locks" / f"{name}.txt").read_text(encoding="utf-8")
    definition = Definition(
        name=name,
        summary=row["summary"],
        python=python,
        lock=narrowed(lock, machine, python),
        imports=tuple(row["imports"]),
        sources=tuple(row.get("sources", ())),
        variables=dict(row.get("variables", {})),
        cuda=row["cuda"],
    )
    _check(definition)
    return definition


def narrowed(lock: str, machine: str, python: str) -> str:
    r"""Return what of a lock with markers is for a kind of machine under Linux and a version of python, without them.

    >>> print(narrowed('a==1 ; python_full_version < "3.12" \\\n    --hash=sha256:0\nb==2 \\\n', "x86_64", "3.12"))
    b==2 \
    <BLANKLINE>
    """
    from packaging.markers import Marker

    place = {
        "platform_machine": machine,
        "platform_system": "Linux",
        "sys_platform": "linux",
        "os_name": "posix",
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    kept, keep = [], False
    for line in lock.splitlines(keepends=True):
        match = _PIN.match(line)
        if match:
            pin, semicolon, marker = line.partition(" ; ")
            marker = marker.strip().removesuffix("\\").strip()
            keep = not marker or Marker(marker).evaluate(place)
            line = f"{pin} \\\n" if semicolon else line  # noqa: PLW2901
        if keep:
            kept.append(line)
    return "".join(kept)


def _rows(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "environments.toml").read_text(encoding="utf-8"))


def _check(definition: Definition) -> None:
    """Refuse a lock that leaves anything open."""
    joined = definition.lock.replace("\\\n", " ")
    for line in joined.splitlines():
        written = line.split("#")[0].strip()
        if written and not (_PIN.match(written) and "--hash=sha256:" in written):
            message = f"the lock of {definition.name} has a line without an exact version and a hash: {written[:80]!r}"
            raise IntegrityError(message, fix="make it again by the command in environments.toml")
