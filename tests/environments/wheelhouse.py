"""Distributions made on the spot: a wheel from a few lines of python, and what is installed here packed up again."""

from __future__ import annotations

import hashlib
import zipfile
from importlib import metadata
from pathlib import Path


def wheel(folder: Path, name: str, version: str = "1.0", code: str = "") -> Path:
    """Write a pure wheel with one module of the distribution's name."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in files.items():
            archive.writestr(zipfile.ZipInfo(inside), text)  # no time of day: same lines, same bytes
    return path


def installed(folder: Path, name: str) -> Path:
    """Pack an installed distribution into a wheel again."""
    found = metadata.distribution(name)
    told = found.read_text("WHEEL") or ""
    tag = next(line.split(": ")[1] for line in told.splitlines() if line.startswith("Tag: "))
    path = folder / f"{name.replace('-', '_')}-{found.version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in found.files or ():
            if ".." not in file.parts and file.suffix != ".pyc" and file.name not in {"INSTALLER", "direct_url.json"}:
                archive.write(str(file.locate()), str(file))
    return path


def define(
    root: Path, wheels: list[Path], *, imports: tuple[str, ...] = (), name: str = "tiny", python: str = ""
) -> None:
    """Write environments.toml and the lock of one environment that installs some wheels."""
    import sys

    version = python or f"{sys.version_info.major}.{sys.version_info.minor}"
    (root / "locks").mkdir(parents=True, exist_ok=True)
    row = f'[{name}]\nsummary = "for tests"\npython = "{version}"\nimports = {list(imports)}\n'
    (root / "environments.toml").write_text(row)
    lines = []
    for path in wheels:
        distribution, locked = path.name.split("-")[:2]
        lines.append(
            f"{distribution}=={locked} \\\n    --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"
        )
    (root / "locks" / f"{name}.txt").write_text("".join(lines))
