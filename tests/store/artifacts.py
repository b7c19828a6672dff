"""An artifact for tests, and a child that writes it: light, because many children are started."""

from __future__ import annotations

from pathlib import Path

from optikit.store.store import Artifact, Manifest, Store, cache_key

KEY = cache_key(what="an artifact for tests")
MANIFEST = Manifest(verb="quantize", method="rtn", traits=("int4_gptq",), facts={"layers": 2}, seconds=1.5)
FILES = {"config.json": b"{}", "sub/weights": bytes(range(256)) * 400}

WRITE = """
import sys
from pathlib import Path
from optikit.errors import OptikitError
from optikit.store.store import Manifest, Store
from tests.store.artifacts import FILES, KEY, MANIFEST, fill
store = Store(Path(sys.argv[1]))
directory = store.staging(KEY)
(store.scratch(KEY) / "block-0").write_text("half-done")
fill(directory)
print("ready", flush=True)
sys.stdin.readline()
try:
    print(store.commit(KEY, directory, MANIFEST).path)
except OptikitError as error:
    print(error.message, error.fix, file=sys.stderr)
    sys.exit(int(error.code))
"""
"""A child that stages an artifact, says so, waits for a line, and commits."""


def fill(directory: Path) -> None:
    for name, content in FILES.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def commit(store: Store, key: str = KEY) -> Artifact:
    directory = store.staging(key)
    fill(directory)
    return store.commit(key, directory, MANIFEST)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
