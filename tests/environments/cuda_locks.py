"""Lock the environments of cuda.toml and write for which machines and interpreters they have wheels.

    python tests/environments/cuda_locks.py INDEX [NAME …]

INDEX is a package index's address (`…/simple`) that speaks JSON; `uv` has to be on the path. Nothing but metadata is
fetched: uv resolves from the metadata of wheels, and which files there are the index lists. Of the hashes
that uv writes those of files stay that some machine here could install: wheels for Linux, sources where they are built.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import urllib.request
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename
from packaging.version import InvalidVersion, Version

from optikit.environments.definition import CUDA_ROWS, ROOT, cuda_rows, narrowed, normalized

LOCKS = ROOT / "locks"
MACHINES = ("x86_64", "aarch64")
PYTHONS = ("3.11", "3.12", "3.13")
GLIBC = range(5, 40)
"""Minor versions of glibc 2 that manylinux wheels may ask for: that of Ubuntu 24.04 is 39."""
_PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;\\]+)")


@cache
def files(index: str, name: str) -> tuple[dict[str, Any], ...]:
    """Return what an index lists of a distribution."""
    accept = {"Accept": "application/vnd.pypi.simple.v1+json"}
    request = urllib.request.Request(f"{index.rstrip('/')}/{normalized(name)}/", headers=accept)  # noqa: S310 - the address is given
    with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
        return tuple(json.load(answer)["files"])


@cache
def tags(machine: str, python: str) -> frozenset[Tag]:
    """Return what wheels an interpreter on a machine takes."""
    version = tuple(map(int, python.split(".")))
    legacy = [f"manylinux{year}_{machine}" for year in ("1", "2010", "2014")]
    platforms = [*(f"manylinux_2_{minor}_{machine}" for minor in reversed(GLIBC)), *legacy, f"linux_{machine}"]
    return frozenset([*cpython_tags(version, platforms=platforms), *compatible_tags(version, platforms=platforms)])


def fits(file: str, machine: str, python: str) -> bool:
    """Return whether a file is a wheel for an interpreter on a machine."""
    return file.endswith(".whl") and not tags(machine, python).isdisjoint(parse_wheel_filename(file)[3])


@cache
def of_version(index: str, name: str, version: str) -> dict[str, str]:
    """Return file names by sha256 of one version of a distribution."""
    found, wanted = {}, Version(version)
    for file in files(index, name):
        stem = file["filename"].removesuffix(".tar.gz").removesuffix(".zip")
        own = stem.split("-")[1] if stem.endswith(".whl") else stem.rpartition("-")[2]
        try:
            same = Version(own) == wanted
        except InvalidVersion:  # eggs, installers
            continue
        if same:
            found[file["hashes"]["sha256"]] = file["filename"]
    return found


def lacking(index: str, lock: str, sources: set[str], machine: str, python: str) -> list[str]:
    """Return the pins of a lock that an interpreter on a machine has no wheel for, and that aren't built."""
    missing = []
    if not re.search(r"^nvidia-cublas", narrowed(lock, machine, python), re.MULTILINE):
        missing.append("torch with CUDA")
    for line in narrowed(lock, machine, python).splitlines():
        pin = _PIN.match(line)
        if pin is None or normalized(pin["name"]) in sources:
            continue
        if not any(fits(file, machine, python) for file in of_version(index, pin["name"], pin["version"]).values()):
            missing.append(f"{pin['name']} {pin['version']}")
    return missing


def trimmed(index: str, lock: str, sources: set[str]) -> Iterator[str]:
    """Yield the lines of a lock without the hashes of files that none of these machines installs."""
    for entry in re.split(r"\n(?=\S)", lock.strip()):
        head, *hashes = entry.splitlines()
        pin = _PIN.match(head)
        assert pin, head
        known = of_version(index, pin["name"], pin["version"])
        kept = [each for each in hashes if wanted(known, each, normalized(pin["name"]) in sources)]
        assert kept or not hashes or "linux" not in head, f"no file of {head} is for Linux"
        if kept:
            yield head
            yield from (f"{each.removesuffix(chr(92)).rstrip()} \\" for each in kept[:-1])
            yield kept[-1].removesuffix("\\").rstrip()


def wanted(known: dict[str, str], line: str, source: bool) -> bool:
    """Return whether a hash is of a file that one of the machines could install; unknown ones stay."""
    file = known.get(line.partition("sha256:")[2].strip(" \\"), "")
    if not file:
        return True
    return source if not file.endswith(".whl") else any(fits(file, m, p) for m in MACHINES for p in PYTHONS)


def resolve(name: str) -> str:
    """Return the lock that uv makes of locks/NAME.in."""
    command = ["uv", "pip", "compile", "--universal", "--python-version", PYTHONS[0], "--generate-hashes"]
    command += ["--no-header", "--no-annotate", str(LOCKS / f"{name}.in")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    return done.stdout


def rows(index: str, lock: str, sources: set[str]) -> dict[str, Any]:
    """Return interpreters by machine, and what is missing elsewhere."""
    found: dict[str, Any] = {}
    absent: dict[str, str] = {}
    for machine in MACHINES:
        missing = {python: lacking(index, lock, sources, machine, python) for python in PYTHONS}
        found[machine] = [python for python, each in missing.items() if not each]
        for python, each in missing.items():
            if each:
                more = f" and {len(each) - 1} more" if len(each) > 1 else ""
                absent[f"{machine} {python}"] = f"no wheel of {each[0]}{more}"
        if not found[machine]:
            absent[machine] = Counter(each for python in PYTHONS for each in missing[python]).most_common(1)[0][0]
            absent[machine] = f"the index has no wheel of {absent[machine]} for it"
    return {**found, "absent": absent}


def unlocked(index: str, name: str) -> dict[str, Any]:
    """Return the row of what has no lock: which files the index has of its newest version."""
    package = name.rpartition("-cuda")[0]
    newest = files(index, package)[-1]["filename"]
    wheels = [each["filename"] for each in files(index, package) if each["filename"].endswith(".whl")]
    why = f"the index has no wheel of {package}, only {newest}" if not wheels else f"not locked: {wheels[-1]}"
    return {**{machine: [] for machine in MACHINES}, "absent": dict.fromkeys(MACHINES, why)}


def written(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of cuda_rows.toml."""
    yield "# Written by tests/environments/cuda_locks.py: interpreters by machine, and what is missing for the others."
    for name, row in sorted(found.items()):
        yield f"\n[{name}]"
        yield from (f"{machine} = {json.dumps(row[machine])}" for machine in MACHINES)
        yield f"\n[{name}.absent]"
        yield from (f"{json.dumps(key)} = {json.dumps(why)}" for key, why in sorted(row["absent"].items()))


def main(index: str, names: list[str]) -> None:
    """Make the locks of these environments, or of all, and the table of rows."""
    path = ROOT / CUDA_ROWS
    found = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, row in cuda_rows().items():
        if names and name not in names:
            continue
        if not (LOCKS / f"{name}.in").exists():
            found[name] = unlocked(index, name)
            continue
        sources = {normalized(each) for each in row.get("sources", ())}
        lock = "\n".join(trimmed(index, resolve(name), sources)) + "\n"
        (LOCKS / f"{name}.txt").write_text(lock, encoding="utf-8")
        found[name] = rows(index, lock, sources)
        print(name, len(lock) // 1024, "KiB", {machine: found[name][machine] for machine in MACHINES}, flush=True)
    path.write_text("\n".join(written(found)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
