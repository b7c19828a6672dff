"""`hf:` sources, with the real huggingface-hub client against a small hub on this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from optikit.errors import Exit, RecipeError
from optikit.store import hub
from tests.store.conftest import Child

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXT = b"a line\nanother line\n"
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "models/org/dense": {
        "config.json": b"{}",
        "model.safetensors": b"\x02\0\0\0\0\0\0\0{}",
        "tokenizer.json": b"{}",
        "modeling.py": b"raise SystemExit",
        "pytorch_model.bin": b"\x80\x02.",
        "consolidated.safetensors": b"twice",
        "onnx/model.safetensors": b"elsewhere",
    },
    "models/org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"\x80\x02."},
    "models/org/ggufs": {"a.gguf": b"GGUF-a", "b.gguf": b"GGUF-b"},
    "datasets/org/prose": {"data/train.txt": TEXT},
}


class Hub(BaseHTTPRequestHandler):
    """The few addresses of a hub that downloading a repository needs."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class names it so
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        for repo, files in REPOSITORIES.items():
            kind, _, name = repo.partition("/")
            if path in {f"/api/{repo}/revision/main", f"/api/{repo}/revision/{COMMIT}", f"/api/{repo}"}:
                siblings = [{"rfilename": file} for file in files]
                self._json({"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})
                return
            if path == f"/api/{repo}/tree/{COMMIT}":
                rows = [
                    {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha256(content).hexdigest()}
                    for file, content in files.items()
                ]
                self._json(rows)
                return
            prefix = f"/{'datasets/' if kind == 'datasets' else ''}{name}/resolve/{COMMIT}/"
            if path.startswith(prefix) and path.removeprefix(prefix) in files:
                self._file(files[path.removeprefix(prefix)])
                return
        self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def _file(self, content: bytes) -> None:
        self._send(content, 200, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


RESOLVE = """
import json, sys
from pathlib import Path
from optikit.errors import OptikitError
from optikit.recipe.schema import Text
from optikit.store.sources import resolve_model, resolve_text
from optikit.store.store import Store
store, rows = Store(Path(sys.argv[1])), []
for spec in sys.argv[3:]:
    notes = []
    given = {"base": Path(), "offline": sys.argv[2] == "offline", "note": notes.append}
    try:
        text = "datasets/" in spec
        found = resolve_text(Text(text=spec), store, **given) if text else resolve_model(spec, store, **given)
        rows.append({"path": str(found.path), "resolved": found.resolved, "digest": found.digest, "notes": notes})
    except OptikitError as error:
        rows.append({"code": int(error.code), "message": error.message, "fix": error.fix})
print(json.dumps(rows + [{"hub": "huggingface_hub" in sys.modules}]))
"""


@pytest.fixture
def resolve(child: Child, tmp_path: Path, endpoint: str):
    """Resolve sources in a process of its own: the client reads its settings when it is imported."""

    def run(*specs: str, offline: bool = False, at: str = endpoint, home: str = "hf") -> list[dict[str, object]]:
        settings = {"HF_ENDPOINT": at, "HF_HOME": str(tmp_path / home), "HF_HUB_DISABLE_XET": "1"}
        settings |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        process = child(RESOLVE, tmp_path / "store", "offline" if offline else "online", *specs, **settings)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
        rows: list[dict[str, object]] = json.loads(stdout)
        return rows

    return run


def test_a_bare_id_becomes_a_commit_and_only_harmless_files_come(resolve, tmp_path: Path) -> None:
    found, text, gguf, _ = resolve("hf:org/dense", "hf:datasets/org/prose#data/train.txt", "hf:org/ggufs#b.gguf")
    assert found["resolved"] == f"hf:org/dense@{COMMIT}"
    assert f"pin it with hf:org/dense@{COMMIT}" in found["notes"][0]
    assert sorted(path.name for path in Path(found["path"]).iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert text["resolved"] == f"hf:datasets/org/prose@{COMMIT}#data/train.txt"
    assert Path(text["path"]).read_bytes() == TEXT
    assert Path(gguf["path"]).read_bytes() == b"GGUF-b"
    assert gguf["digest"] == hashlib.sha256(b"GGUF-b").hexdigest()

    again, library = resolve(found["resolved"], at="http://127.0.0.1:1")
    assert (again["path"], again["digest"]) == (found["path"], found["digest"])
    assert library == {"hub": False}, "a pinned source that is here needs no client"
    offline, plain, missing, _ = resolve("hf:org/dense", "hf:org/ggufs#b.gguf", "hf:org/pickled", offline=True)
    assert (offline["path"], offline["resolved"]) == (found["path"], found["resolved"])
    assert plain["digest"] == gguf["digest"]
    assert (missing["code"], "--offline" in str(missing["message"])) == (Exit.UNAVAILABLE, True)
    shutil.rmtree(tmp_path / "store")  # what the hub's own cache has is enough
    cached, _ = resolve(f"hf:org/dense@{COMMIT}", offline=True)
    assert (cached["path"], cached["digest"]) == (found["path"], found["digest"])


@pytest.mark.parametrize("lost", ["blob", "link"])
def test_what_was_remembered_counts_while_its_files_are_there(resolve, tmp_path: Path, lost: str) -> None:
    pinned = f"hf:org/dense@{COMMIT}"
    found, *_ = resolve(pinned)
    file = Path(found["path"]) / "model.safetensors"
    shutil.copytree(tmp_path / "hf", tmp_path / "moved", symlinks=True)
    (file.resolve() if lost == "blob" else file).unlink()
    moved, _ = resolve(pinned, offline=True, home="moved")
    assert moved["digest"] == found["digest"]
    shutil.rmtree(tmp_path / "store")
    gone, _ = resolve(pinned, offline=True)
    if lost == "blob":  # a snapshot that never had the file can't be told from one that lost it
        assert gone["code"] == Exit.UNAVAILABLE
        assert "isn't in the hub's cache" in str(gone["message"])
    again, _ = resolve(pinned)
    assert (again["path"], again["digest"]) == (found["path"], found["digest"])


def test_what_the_hub_refuses_has_a_name(resolve) -> None:
    pickled, several, none, model, _ = resolve(
        "hf:org/pickled", "hf:org/ggufs", "hf:org/nothing@main", "hf:datasets/org/prose@main#data/other.txt"
    )
    assert pickled["code"] == Exit.REFUSED
    assert several["code"] == Exit.RECIPE
    assert several["fix"] == "name one: hf:org/ggufs#a.gguf"
    assert none["code"] == Exit.UNAVAILABLE
    assert "HF_TOKEN" in str(none["fix"])
    assert model["code"] == Exit.UNAVAILABLE
    unreachable, _ = resolve("hf:org/dense", at="http://127.0.0.1:1")
    assert unreachable["code"] == Exit.UNAVAILABLE
    assert "network" in str(unreachable["fix"])


@pytest.mark.parametrize("spec", ["hf:", "hf:a/b/c", "hf:../x", "hf:org/name@../x", "hf:org/na me", "hf:-x/y", "hf:a@"])
def test_a_source_that_names_no_repository_is_refused(spec: str) -> None:
    with pytest.raises(RecipeError, match="name a repository"):
        hub.parse(spec)
