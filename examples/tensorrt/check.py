"""Checks a job folder on the device it is for, and records what became of it; needs Python 3.9 and nothing else.

Copied into the folder as check.py:

    python3 check.py                   is everything here: files, Python, packages, devices, memory, disk?
    python3 check.py packages          are the packages here? (run.sh asks before it installs them)
    python3 check.py python            does this Python run it?
    python3 check.py before            are files, devices, memory and disk here? (asked before anything is installed)
    python3 check.py record [SECONDS]  write result.json: what smoke.log decoded, where, and with which versions

Exit codes: 0 all is here; 69 something isn't, each thing told with what to do; 76 a file was changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).resolve().parent
SEAL = HERE.parents[1] / "artifact.json" if len(HERE.parents) > 1 else HERE / "artifact.json"
PRODUCT = Path("/sys/devices/virtual/dmi/id/product_name")
MISSING, CHANGED = 69, 76


def wanted() -> dict[str, Any]:
    """Return what check.json wants of the machine."""
    found: dict[str, Any] = json.loads((HERE / "check.json").read_text(encoding="utf-8"))
    return found


def sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def changed() -> Iterator[str]:
    """Yield what isn't as it was written: files of this folder, and those of the model where the seal is beside it."""
    for name, record in wanted()["files"].items():
        path = HERE / name
        if not path.is_file():
            yield f"{name} is missing: copy the folder again"
        elif sha256(path) != record:
            yield f"{name} was changed: copy the folder again, or run optikit anew with the options you want"
    if SEAL.is_file():
        files = json.loads(SEAL.read_text(encoding="utf-8"))["files"]
        for name, record in sorted(files.items()):
            path = SEAL.parent / name
            if name.startswith("model/") and (not path.is_file() or sha256(path) != record["sha256"]):
                yield f"{name} isn't the file that was written: copy it again"


def installed(name: str) -> str:
    """Return the installed version of a distribution, "" where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def python() -> Iterator[str]:
    """Yield why this Python doesn't run it."""
    low, high = (tuple(each) for each in wanted()["python"])
    if not low <= sys.version_info[:2] < high:
        have = platform.python_version()
        yield f"Python {have} runs this, not {low[0]}.{low[1]} to {high[0]}.{high[1] - 1}: use another python3"


def packages() -> Iterator[str]:
    """Yield packages that aren't here, or in another version."""
    for names, pattern in wanted()["packages"].items():
        name = next(filter(installed, names.split("|")), names.split("|")[0])
        version = installed(name)
        if not version:
            yield f"{name} isn't installed: pip install -r requirements.txt"
        elif not re.fullmatch(pattern, version):
            plain = pattern.replace("\\", "").replace("..*", ".*")  # a regular expression, as pip writes versions
            yield f"{name} {version} is installed, not {plain}: pip install -r requirements.txt"


def devices() -> list[str]:
    """Return the device files of the kind that is wanted."""
    place = Path(wanted()["devices"])
    return sorted(str(path) for path in place.parent.glob(place.name))


def uninstalled() -> Iterator[str]:
    """Yield what has to be installed."""
    yield from python()
    yield from packages()
    for tool in wanted()["tools"]:
        if not any(map(shutil.which, tool.split("|"))):
            yield f"{tool.replace('|', ' or ')} can't be found on PATH: install it, or activate its environment"


def lacking() -> Iterator[str]:
    """Yield what this machine lacks, whatever is installed."""
    want = wanted()
    found = len(devices())
    if found < want["device_count"]:
        yield f"{found} of {want['device_count']} {want['devices']} are here: this folder is for {want['target']}"
    free = shutil.disk_usage(HERE).free
    if free < want["disk_bytes"]:
        yield f"{free / 1e9:.1f} GB of disk are free here, {want['disk_bytes'] / 1e9:.1f} GB are needed"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if memory < want["host_bytes"]:
        yield f"{memory / 1e9:.0f} GB of memory are here, loading takes about {want['host_bytes'] / 1e9:.0f} GB"


def tell(problems: list[str], code: int) -> None:
    """End with a code if there are problems, each on a line."""
    if problems:
        sys.stderr.write("".join(f"check: {each}\n" for each in problems))
        sys.exit(code)


def check() -> None:
    """Check everything."""
    tell(list(changed()), CHANGED)
    tell([*uninstalled(), *lacking()], MISSING)
    sys.stdout.write(
        f"check: files, Python, packages, {len(devices())} devices, memory and disk are as they should be\n"
    )


def machine() -> dict[str, Any]:
    """Return the name of this machine and of its accelerators, as far as it tells."""
    found: dict[str, Any] = {"name": "", "devices": devices(), "accelerators": []}
    if PRODUCT.is_file():
        found["name"] = PRODUCT.read_text(encoding="utf-8").strip()
    asked = {
        "cuda": ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
        "neuron": ["neuron-ls", "--json-output"],
    }
    command = asked[wanted()["kind"]]
    if shutil.which(command[0]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = done.stdout.strip()
        if wanted()["kind"] == "cuda":
            found["accelerators"] = said.splitlines()
        elif done.returncode == 0:
            found["accelerators"] = [f"{each.get('nc_count', '?')} cores" for each in json.loads(said or "[]")]
    return found


def record(seconds: str = "0") -> None:
    """Write result.json from what the smoke test left in smoke.log, whole or not at all."""
    log = HERE / "smoke.log"
    said = log.read_text(encoding="utf-8", errors="replace").strip() if log.is_file() else ""
    if not said:
        tell(["smoke.log is empty: nothing was decoded, so there is nothing to record"], MISSING)
    names = sorted({*"|".join(wanted()["packages"]).split("|"), *wanted()["versions"]} - {""})
    written = {
        "job": sha256(HERE / "check.json"),
        "target": wanted()["target"],
        "machine": machine(),
        "python": platform.python_version(),
        "versions": {name: version for name in names if (version := installed(name))},
        "seconds": float(seconds),
        "decoded": said[-2000:],
    }
    partial = HERE / "result.json.part"
    partial.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    partial.replace(HERE / "result.json")
    sys.stdout.write(f"wrote {HERE / 'result.json'}: copy it back, and run `optikit run … --resume` there\n")


def main(verb: str = "check", *arguments: str) -> None:
    """Do what the command line says."""
    if verb == "packages":
        tell(list(packages()), MISSING)
    elif verb == "python":
        tell(list(python()), MISSING)
    elif verb == "before":
        tell(list(changed()), CHANGED)
        tell(list(lacking()), MISSING)
    elif verb == "record":
        record(*arguments)
    else:
        check()


if __name__ == "__main__":
    main(*sys.argv[1:])
