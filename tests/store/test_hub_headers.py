"""A plan of a model on the hub reads headers by range, with the real client, and not one byte of a weight."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from optikit.errors import Exit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = 3


class Server(ThreadingHTTPServer):
    """A hub of one repository that counts the bytes of each file that it sends."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.sent = files, dict.fromkeys(files, 0)
        self.ranges = True
        self.digests = True
        self.cut = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """The addresses that planning and downloading need, and byte ranges."""

    server: Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class names it so
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, files = self.path.partition("?")[0], self.server.files
        name = path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")
        if path in {"/api/models/org/tiny", f"/api/models/org/tiny/revision/{COMMIT}"}:
            told = {"id": "org/tiny", "sha": COMMIT, "tags": [], "private": False}
            self._json(told | {"siblings": [self._sibling(file) for file in files]})
        elif path == f"/api/models/org/tiny/tree/{COMMIT}":
            self._json([{"type": "file", "path": file, "size": len(files[file]), "oid": "0"} for file in files])
        elif name in files:
            self._file(name)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _sibling(self, file: str) -> dict[str, Any]:
        content = self.server.files[file]
        row: dict[str, Any] = {"rfilename": file, "size": len(content)}
        if file.endswith(".safetensors") and self.server.digests:
            row["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return row

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str) -> None:
        content = self.server.files[name]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        wanted = self.headers.get("Range", "")
        if not wanted or not self.server.ranges:
            self._send(200, content, headers, name)
            return
        first, last = (int(edge) for edge in wanted.removeprefix("bytes=").split("-"))
        part = content[first : last + 1 - self.server.cut]
        self._send(206, part, headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}, name)

    def _send(self, status: int, content: bytes, headers: dict[str, str], name: str = "") -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            if name:
                self.server.sent[name] += len(content)
            self.wfile.write(content)


@pytest.fixture(scope="module")
def files(tiny_llama: Path) -> dict[str, bytes]:
    """The tiny model, its weights in three shards."""
    from safetensors.torch import load_file, save

    tensors = load_file(tiny_llama / "model.safetensors")
    names = sorted(tensors)
    found = {path.name: path.read_bytes() for path in tiny_llama.iterdir() if path.suffix == ".json"}
    where = {}
    for index in range(SHARDS):
        shard = f"model-{index + 1:05}-of-{SHARDS:05}.safetensors"
        part = {name: tensors[name] for name in names[index::SHARDS]}
        found[shard] = save(part, {"format": "pt"})
        where |= dict.fromkeys(part, shard)
    found["model.safetensors.index.json"] = json.dumps({"weight_map": where}).encode()
    return found


@pytest.fixture
def server(files: dict[str, bytes]) -> Iterator[Server]:
    found = Server(files)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


Optikit = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def optikit(tmp_path: Path, prose: Path) -> Optikit:
    """Run a verb on a recipe whose model lies on the hub: the client reads its settings when it is imported."""
    recipe = {
        "model": f"hf:org/tiny@{COMMIT}",
        "calibration": {"text": str(prose), "samples": 2, "length": 32},
        "stages": [{"quantize": {"method": "gptq", "group_size": 32}}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def run(server: Server, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        settings = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        settings |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        settings |= {"OPTIKIT_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-m", "optikit", verb, str(tmp_path / "recipe.yaml"), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, env=os.environ | settings, check=False, timeout=120
        )

    return run


def header_bytes(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def test_a_plan_reads_headers_only_and_a_run_has_the_same_keys(optikit: Optikit, server: Server) -> None:
    planned = optikit(server, "plan", "--json")
    assert planned.returncode == 0, planned.stderr
    for name, content in server.files.items():
        if name.endswith(".safetensors"):
            assert server.sent[name] == header_bytes(content), name
    assert "files of weights stay there" in planned.stderr
    sent = dict(server.sent)
    again = optikit(server, "plan")
    assert "only headers were fetched: its weights are asked for when it is run" in again.stdout
    assert server.sent == sent
    step = json.loads(planned.stdout)["steps"][0]
    ran = optikit(server, "run", "--out", str(Path(planned.args[4]).parent / "out"), "--progress", "none")
    assert ran.returncode == 0, ran.stderr
    for name, content in server.files.items():
        if name.endswith(".safetensors"):
            assert server.sent[name] >= len(content), name
    warm = json.loads(optikit(server, "plan", "--json").stdout)["steps"][0]
    assert (warm["key"], warm["cached"]) == (step["key"], True)


def test_a_server_that_can_not_send_parts_is_told_and_one_without_digests_sends_all(
    optikit: Optikit, server: Server
) -> None:
    server.ranges = False
    refused = optikit(server, "plan")
    assert refused.returncode == Exit.INTEGRITY, refused.stderr
    assert "can't be read in parts" in refused.stderr
    server.ranges, server.cut = True, 1
    cut = optikit(server, "plan")
    assert cut.returncode == Exit.INTEGRITY, cut.stderr
    assert "Traceback" not in cut.stderr
    server.cut, server.digests = 0, False
    whole = optikit(server, "plan")
    assert whole.returncode == 0, whole.stderr
    assert all(server.sent[name] >= len(content) for name, content in server.files.items())
