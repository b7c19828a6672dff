"""The second store: what is there is fetched as sealed, what fails there stops nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from typer.testing import CliRunner

from optikit.cli.cache import app
from optikit.errors import UsageError
from optikit.store import remote
from optikit.store.manifest import NAME
from optikit.store.remote import ReadThrough, Remote
from optikit.store.store import Store
from tests.store.artifacts import FILES, KEY, commit, contents

ABSENT = "0" * 64


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A second store that holds one artifact, as the environment names it."""
    url = (tmp_path / "there").as_uri()
    monkeypatch.setenv(remote.URL, url)
    source = Store(tmp_path / "source")
    artifact = commit(source)
    assert Remote(url).put(source, artifact)
    assert not Remote(url).put(source, artifact), "it is there already"
    return tmp_path / "there" / "artifacts" / KEY


def test_what_is_there_is_fetched_as_it_was_sealed(there: Path, store: Store) -> None:
    notes: list[str] = []
    through = ReadThrough(store, notes.append)
    assert through.find(ABSENT) is None
    assert notes == []
    found = through.find(KEY)
    assert found is not None
    assert contents(found.path) == contents(there)
    assert Store(store.root).find(KEY) is not None
    assert "fetched from file://" in notes[0]


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "seal", "name"])
def test_what_is_damaged_there_is_not_fetched_and_is_put_again(
    there: Path, store: Store, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(remote.PUSH, "1")
    weights, seal = there / "sub" / "weights", there / NAME
    if damage == "flip":
        weights.write_bytes(bytes(len(FILES["sub/weights"])))
    elif damage == "cut":
        weights.write_bytes(FILES["sub/weights"][:-1])
    elif damage == "missing":
        weights.unlink()
    elif damage == "seal":
        seal.write_text(seal.read_text().replace("rtn", "gpt"))
    else:
        seal.write_text(seal.read_text().replace("sub/weights", "../weights"))
    notes: list[str] = []
    through = ReadThrough(store, notes.append)
    assert through.find(KEY) is None
    assert "didn't help" in notes[0]
    assert not list((store.root / "tmp").iterdir())
    assert not (store.root / "artifacts" / "weights").exists()
    again = ReadThrough(store, notes.append)
    assert again.find(KEY) is None
    again.keep(commit(store))
    if damage != "missing":  # a file that can't be had reads like a server that fails: the store isn't asked again
        assert ReadThrough(Store(store.root.parent / "third"), notes.append).find(KEY) is not None


def test_a_server_that_is_not_there_is_a_warning_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(remote.PUSH, "1")
    for url, word in (("nonsense://x", "nonsense"), ("http://127.0.0.1:9/x", "127.0.0.1:9")):
        monkeypatch.setenv(remote.URL, url)
        notes: list[str] = []
        through = ReadThrough(store, notes.append)
        assert through.find(KEY) is None
        assert through.find(ABSENT) is None
        through.keep(commit(store))
        assert len(notes) == 1
        assert word in notes[0]
        assert "isn't asked again" in notes[0]


def test_without_a_second_store_nothing_is_asked(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(remote.URL, raising=False)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)  # its import would fail
    notes: list[str] = []
    assert ReadThrough(store, notes.append).find(KEY) is None
    assert notes == []


def test_push_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Store(tmp_path / "source")
    commit(source)
    monkeypatch.setenv("OPTIKIT_HOME", str(source.root))
    monkeypatch.delenv(remote.URL, raising=False)
    with pytest.raises(UsageError, match=remote.URL):
        CliRunner().invoke(app, ["push"], catch_exceptions=False)
    monkeypatch.setenv(remote.URL, (tmp_path / "there").as_uri())
    assert CliRunner().invoke(app, ["push"], catch_exceptions=False).stdout.startswith("1 artifacts, 100.0 KiB, put in")
    assert CliRunner().invoke(app, ["push"], catch_exceptions=False).stdout.startswith("0 artifacts")


SERVER = "from moto.server import main; main(['-H', '127.0.0.1', '-p', {port!r}])"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """An object server of its own: an interpreter that has s3fs, and the server's address."""
    place = tmp_path_factory.mktemp("s3")
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    python = place / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "s3fs", "moto[s3,server]"], check=True)
    ours = "\n".join(each for each in sys.path if each.endswith("site-packages"))
    packages = next((place / "lib").glob("python3*")) / "site-packages"
    (packages / "ours.pth").write_text(f"{Path(__file__).parents[2]}\n{ours}\n")
    port = free_port()
    server = subprocess.Popen([python, "-c", SERVER.format(port=str(port))], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            urlopen(url, timeout=1).close()
            break
        except (URLError, TimeoutError):
            time.sleep(0.5)
    yield python, url
    server.kill()
    server.wait()


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.slow
def test_an_object_server(s3: tuple[Path, str], tmp_path: Path) -> None:
    python, url = s3
    source = Store(tmp_path / "source")
    artifact = commit(source)

    def run(home: str, code: str, **extra: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "OPTIKIT_HOME": str(tmp_path / home),
            remote.URL: "s3://shelf/team",
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "wordsofsomeone",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        command = [python, "-c", code]
        return subprocess.run(command, env=environment | extra, capture_output=True, text=True, check=False)

    made = run("source", "import s3fs; s3fs.S3FileSystem().mkdir('shelf')")
    assert made.returncode == 0, made.stderr
    cache = "from optikit.cli.app import main; import sys; sys.argv[1:] = {!r}; main()"
    pushed = run("source", cache.format(["cache", "push", "--json"]))
    assert KEY in pushed.stdout, pushed.stderr
    find = f"""
from optikit.store.store import Store
from optikit.store.remote import ReadThrough
found = ReadThrough(Store.default(), print).find({KEY!r})
print(found and found.path)
"""
    fetched = run("other", find)
    assert "fetched from s3://shelf/team" in fetched.stdout, fetched.stderr
    assert contents(Store(tmp_path / "other").artifact_path(KEY)) == contents(artifact.path)
    damaged = "import s3fs; s3fs.S3FileSystem().pipe('shelf/team/artifacts/%s/config.json', b'[]')"
    assert run("source", damaged % KEY).returncode == 0
    refused = run("third", find)
    assert "isn't as it was sealed: config.json" in refused.stdout, refused.stderr
    assert refused.stdout.endswith("None\n")
    started = time.monotonic()
    gone = run("third", find, AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert "isn't asked again" in gone.stdout, gone.stderr
    assert time.monotonic() - started < 300, "a client that never gives up"
