"""Building an environment: a virtual environment, the lock installed into it, a health check, the marker.

With uv where there is one, else with venv and pip. Nothing is resolved: the lock names every package, its version and
its hash, so that an index can only deliver those bytes or fail. Wheels first; what has none is built afterwards, with
what is in the environment by then, so that a build fetches nothing that isn't locked.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from optikit.environments import indexes
from optikit.environments.build_errors import failure
from optikit.environments.definition import find
from optikit.environments.environment import MARKER, Environment, locate
from optikit.errors import StageFailedError, UnavailableError
from optikit.fileio import write_json
from optikit.process import child, program

if TYPE_CHECKING:
    from optikit.store.store import Store

Progress = Callable[[int, int, str], None]


def _silent(done: int, total: int, what: str) -> None:
    """Report nothing."""


def ensure(
    name: str,
    store: Store,
    *,
    offline: bool = False,
    wheels: Path | None = None,
    rebuild: bool = False,
    root: Path | None = None,
    note: Callable[[str], None] = lambda _: None,
    progress: Progress = _silent,
) -> Environment:
    """Return an environment that is complete, building it if it isn't.

    One process builds, others wait for it. What is incomplete or broken is removed and built again.

    Args:
        name: A row of environments.toml.
        store: In whose home environments lie.
        offline: Build from `wheels` or not at all.
        wheels: Folder of distributions to build from, instead of any index.
        rebuild: Build even if it is complete.
        root: Another directory of definitions.
        note: Told about every phase of a build.
        progress: Told (installed, all, "packages") while it builds.

    Raises:
        UsageError: There is no such environment.
        UnavailableError: No interpreter of its version, or the index can't be reached or lacks a package.
        IntegrityError: The index delivered something else than the lock says.
        StageFailedError: It was built and isn't healthy.
        DiskError: The disk is full.
    """
    definition = find(name, root)
    environment = locate(definition, store.root)
    if not rebuild and environment.state() == "ready":
        return environment
    with store.lock(definition.digest, waiting=note), environment.used():  # in use: not to be collected half-built
        state = environment.state()
        if state == "ready" and not rebuild:  # whoever held the lock has built it
            return environment
        if offline and wheels is None:
            fix = f"run `optikit env build {name}` where the package index can be reached, or give it --wheels DIR"
            raise UnavailableError(f"environment {name} isn't built, and this run is offline", fix=fix)
        if state in ("incomplete", "broken"):
            note(f"environment {name} is {state}: building it again")
        environment.clear()
        _build(environment, wheels, note, progress)
    return environment


@contextmanager
def use(
    name: str,
    store: Store,
    *,
    offline: bool = False,
    note: Callable[[str], None] = lambda _: None,
    progress: Progress = _silent,
) -> Iterator[Environment]:
    """Hold an environment that is complete, built if it wasn't; see `ensure` for arguments and errors."""
    with locate(find(name), store.root).used():  # before it is looked at: what is held isn't removed
        yield ensure(name, store, offline=offline, note=note, progress=progress)


def _build(environment: Environment, wheels: Path | None, note: Callable[[str], None], progress: Progress) -> None:
    definition, started = environment.definition, time.monotonic()
    uv, pins = shutil.which("uv"), definition.pins
    tool = "uv" if uv else "pip"
    note(f"building environment {definition.name}: {len(pins)} packages, with {tool}")
    environment.log.write_text("", encoding="utf-8")
    try:
        _create(environment, uv)
        for sources in (False, True):
            _install(environment, uv, wheels, progress, sources=sources)
        note(f"checking environment {definition.name}")
        _require_health(environment)
    except BaseException:
        environment.clear()
        raise
    seconds = round(time.monotonic() - started, 1)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    made = {
        "digest": definition.digest,
        "created": created,
        "seconds": seconds,
        "tool": tool,
        "seal": environment.seal(),
    }
    write_json(environment.path / MARKER, made)
    note(f"environment {definition.name} is ready after {seconds:.0f} s")


def _require_health(environment: Environment) -> None:
    troubles = environment.troubles()
    if troubles:
        name = environment.definition.name
        fix = f"`optikit env build {name}` tries again; {environment.log} has what the build said"
        raise StageFailedError(f"environment {name} isn't healthy: {troubles[0]}", fix=fix)


def interpreter(version: str) -> Path:
    """Return an interpreter of a version (`3.11`) on this machine.

    Raises:
        UnavailableError: There is none.
    """
    base = Path(getattr(sys, "_base_executable", sys.executable))
    if f"{sys.version_info.major}.{sys.version_info.minor}" == version and base.exists():
        return base
    found = shutil.which(f"python{version}")
    if found is None or not _is_version(found, version):
        raise UnavailableError(f"there is no python {version} here", fix=f"install python{version}, or uv, which can")
    return Path(found)


def _is_version(python: str, version: str) -> bool:
    # A shim of a version manager is there even when its version isn't.
    command = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    said = program.run(command)
    return said.code == 0 and said.output.strip() == version


def _has_pip() -> bool:
    return importlib.util.find_spec("pip") is not None


def _create(environment: Environment, uv: str | None) -> None:
    version = environment.definition.python
    if uv is None:
        bare = ["--without-pip"] if _has_pip() else []
        command = [str(interpreter(version)), "-m", "venv", *bare, str(environment.path)]
    else:
        try:
            python = str(interpreter(version))
        except UnavailableError:
            python = version  # uv finds or fetches it
        command = [uv, "venv", "--no-project", "--python", python, str(environment.path)]
    _run(command, environment, _silent)


def _install(
    environment: Environment, uv: str | None, wheels: Path | None, progress: Progress, *, sources: bool
) -> None:
    text = environment.definition.requirements(sources=sources)
    if not text:
        return
    requirements = environment.path / ("sources.txt" if sources else "wheels.txt")
    requirements.write_text(text, encoding="utf-8")
    python = str(environment.python)
    if uv is not None:
        command = [uv, "pip", "install", "--python", python]
    elif _has_pip():  # ours is there already, and a new one takes seconds to unpack
        command = [sys.executable, "-m", "pip", "--python", python, "install"]
    else:
        command = [python, "-m", "pip", "install"]
    command += ["--no-deps", "--require-hashes", "-r", str(requirements)]
    # A wheel that lies in the installer's cache was compiled with other variables, or for another processor.
    afresh = "--no-cache" if uv is not None else "--no-cache-dir"
    command += ["--no-build-isolation", afresh] if sources else ["--only-binary", ":all:"]
    command += ["--no-index", "--find-links", str(wheels.absolute())] if wheels else []
    more = dict(environment.definition.variables)
    _run(command, environment, progress, more | (indexes.for_uv() if uv and wheels is None else {}))


def _run(
    command: Sequence[str], environment: Environment, progress: Progress, more: dict[str, str] | None = None
) -> None:
    """Run one command of a build, its output to the log, and count packages meanwhile."""
    total = len(environment.definition.pins)
    name, began = environment.definition.name, environment.log.stat().st_size
    environ = _variables(environment) | (more or {})
    with child.started(command, environ=environ, log=environment.log, kept=True) as installer:
        code = installer.watch(name, between=lambda: progress(min(_count(environment), total), total, "packages"))
    if code:
        said = environment.log.read_bytes()
        told = said[began:] or said  # it was begun anew
        raise failure(name, told.decode("utf-8", "replace"), environment.log)


def _variables(environment: Environment) -> dict[str, str]:
    """Return the variables of a build: the user's, with the environment's own programs first and no other python."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    path = f"{environment.path / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    return kept | {"PATH": path, "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "NO_COLOR": "1"}


def _count(environment: Environment) -> int:
    packages = environment.packages
    return sum(entry.name.endswith(".dist-info") for entry in packages.iterdir()) if packages.is_dir() else 0
