"""A package index that goes away in the middle of a build, or lies: a real one on this machine, asked by real pip."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from optikit import environments
from optikit.errors import IntegrityError, UnavailableError
from optikit.store.store import Store
from tests.environments.wheelhouse import define, wheel


class Index(http.server.ThreadingHTTPServer):
    """Serves wheels of a folder by PEP 503; from the distribution named `broken` on it drops every connection."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.broken = ""
        self.is_down = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/simple"

    def handle_error(self, request, client_address) -> None:
        """A dropped connection is what was asked for."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Index

    def log_message(self, format, *args) -> None:  # noqa: A002 - its name in the base class
        pass

    def do_GET(self) -> None:
        asked = self.path.strip("/").split("/")[-1]
        if self.server.broken and asked.startswith(f"{self.server.broken}-"):
            self.server.is_down = True
        if self.server.is_down:
            self.close_connection = True
            self.connection.close()
            return
        path = self.server.folder / asked
        if path.is_file():
            self.reply(path.read_bytes(), "application/octet-stream")
            return
        found = [each.name for each in self.server.folder.glob(f"{asked}-*.whl")]
        links = "".join(f'<a href="/files/{name}">{name}</a>' for name in found)
        self.reply(f"<!DOCTYPE html><html><body>{links}</body></html>".encode(), "text/html")

    def reply(self, data: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(folder: Path) -> Iterator[Index]:
    index = Index(folder)
    thread = threading.Thread(target=index.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield index
    finally:
        index.shutdown()
        thread.join()
        index.server_close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that only the index has; nothing is cached, and pip asks once."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # no uv
    for name, value in {"RETRIES": "0", "TIMEOUT": "10", "NO_CACHE_DIR": "1", "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    path = tmp_path / "wheels"
    path.mkdir()
    return path


def ensure(store: Store, root: Path) -> environments.Environment:
    return environments.ensure("tiny", store, root=root)


def test_one_that_goes_away_in_the_middle_leaves_nothing_and_the_next_build_succeeds(folder, tmp_path, monkeypatch):
    root, store = tmp_path / "definitions", Store(tmp_path / "home")
    define(root, [wheel(folder, name) for name in ("alpha", "beta", "gamma")])
    with serving(folder) as index:
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        index.broken = "beta"
        with pytest.raises(UnavailableError) as caught:
            ensure(store, root)
        assert index.is_down  # it was there when the build began
        assert "the log:" in caught.value.fix
        assert environments.locate(environments.find("tiny", root), store.root).state() == "missing"
        index.broken, index.is_down = "", False
        assert ensure(store, root).troubles() == []


def test_one_that_lies_is_found_out(folder, tmp_path, monkeypatch):
    root = tmp_path / "definitions"
    define(root, [wheel(folder, "alpha")])
    wheel(folder, "alpha", code="import os  # something else under the same name")
    with serving(folder) as index:
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        with pytest.raises(IntegrityError, match="something else than its lock says"):
            ensure(Store(tmp_path / "home"), root)
