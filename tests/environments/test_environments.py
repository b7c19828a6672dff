"""Managed environments built for real, from wheels made here, without any index."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from optikit import environments
from optikit.environments import definition as definitions
from optikit.environments.build_errors import failure
from optikit.environments.environment import MARKER
from optikit.environments.housekeeping import collect
from optikit.errors import (
    DiskError,
    IntegrityError,
    OutOfMemoryError,
    StageFailedError,
    UnavailableError,
    UsageError,
)
from optikit.store.store import Store
from tests.environments.wheelhouse import define, wheel
from tests.process.children import SLEEPS, WRITE_PID, is_gone, wait_for, written_pid


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "definitions"


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


def build(store: Store, root: Path, wheels: Path, **more: Any) -> environments.Environment:
    return environments.ensure("tiny", store, root=root, wheels=wheels, **more)


def test_builds_once_and_is_found_afterwards(store: Store, root: Path, wheels: Path) -> None:
    define(root, [wheel(wheels, "alpha", code="value = 7")], imports=("alpha",))
    notes: list[str] = []
    made = build(store, root, wheels, note=notes.append)
    said = subprocess.run(
        [made.python, "-c", "import alpha; print(alpha.value)"], capture_output=True, text=True, check=False
    )
    assert said.stdout.strip() == "7"
    assert (made.state(), made.troubles(), len(notes)) == ("ready", [], 3)
    assert build(store, root, wheels, note=notes.append) == made
    assert len(notes) == 3


def test_its_python_sees_optikit_and_nothing_else_of_ours(
    store: Store, root: Path, wheels: Path, tmp_path: Path
) -> None:
    define(root, [wheel(wheels, "alpha")])
    made = build(store, root, wheels)
    code = "import optikit.errors, optikit.execution.worker, importlib.util as u"
    code += "; print(u.find_spec('torch'), u.find_spec('yaml'))"
    variables = made.variables({"PYTHONHOME": "/nowhere", "PATH": "/usr/bin:/bin"}, tmp_path)
    said = subprocess.run([made.python, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert said.stdout.split() == ["None", "None"], said.stderr


def test_a_wrong_hash_ends_the_build(store: Store, root: Path, wheels: Path) -> None:
    define(root, [wheel(wheels, "alpha")])
    wheel(wheels, "alpha", code="import os  # something else under the same name")
    with pytest.raises(IntegrityError, match="something else than its lock says"):
        build(store, root, wheels)
    assert environments.locate(environments.find("tiny", root), store.root).state() == "missing"


def test_what_the_index_lacks_is_named(store: Store, root: Path, wheels: Path) -> None:
    define(root, [wheel(wheels, "alpha"), wheel(wheels, "beta")])
    (wheels / "beta-1.0-py3-none-any.whl").unlink()
    with pytest.raises(UnavailableError, match="beta"):
        build(store, root, wheels)
    wheel(wheels, "beta")
    assert build(store, root, wheels).state() == "ready"


def test_what_does_not_import_is_not_healthy(store: Store, root: Path, wheels: Path) -> None:
    define(root, [wheel(wheels, "alpha", code="import os; os.abort()")], imports=("alpha",))
    with pytest.raises(StageFailedError, match="ended with exit code"):
        build(store, root, wheels)


def _plant(made: environments.Environment) -> None:
    """Put another directory in an environment's place, with all that its definition tells."""
    shutil.rmtree(made.path)
    made.packages.mkdir(parents=True)
    made.python.parent.mkdir()
    made.python.write_text("#!/bin/sh\nexit 3\n")
    made.python.chmod(0o755)
    for name, version in made.definition.pins.items():
        (made.packages / f"{name}-{version}.dist-info").mkdir()
    (made.path / MARKER).write_text(json.dumps({"digest": made.definition.digest}))


@pytest.mark.parametrize("damage", ["marker", "package", "python", "another python", "start-up file", "planted"])
def test_what_is_damaged_is_built_again(store: Store, root: Path, wheels: Path, damage: str) -> None:
    define(root, [wheel(wheels, "alpha")])
    made = build(store, root, wheels)
    if damage == "marker":
        (made.path / MARKER).write_text("{")
    elif damage == "package":
        next(made.packages.glob("alpha-*.dist-info")).rename(made.path / "elsewhere")
    elif damage == "start-up file":
        (made.packages / "x.pth").write_text("import os")
    elif damage == "planted":
        _plant(made)
    else:
        made.python.unlink()
        if damage == "another python":
            made.python.write_text("#!/bin/sh\nexit 3\n")
            made.python.chmod(0o755)
    assert made.state() != "ready"
    with pytest.raises(UnavailableError, match="while it was used"):
        made.require("1-quantize-awq")
    assert build(store, root, wheels).troubles() == []


def test_another_lock_is_another_environment(store: Store, root: Path, wheels: Path) -> None:
    define(root, [wheel(wheels, "alpha")])
    first = build(store, root, wheels)
    define(root, [wheel(wheels, "alpha", "2.0")])
    second = build(store, root, wheels)
    assert first.path != second.path
    with environments.Environment(first.definition, first.path).used():
        assert [row.what for row in collect(store, root=root)] == ["in use"]
    assert [(row.name, row.what) for row in collect(store, root=root)] == [(first.path.name, "removed")]
    assert second.state() == "ready"
    assert not first.path.exists()


def test_two_builds_at_once_make_one(store: Store, root: Path, wheels: Path) -> None:
    define(root, [wheel(wheels, "alpha")])
    notes: list[str] = []
    threads = [
        threading.Thread(target=build, args=(Store(store.root), root, wheels), kwargs={"note": notes.append})
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum("is ready" in note for note in notes) == 1


BUILDS = """
import sys
from pathlib import Path
from optikit.environments import build
from optikit.environments.definition import find
from optikit.environments.environment import Environment
environment = Environment(find("tiny", Path(sys.argv[1])), Path(sys.argv[2]))
environment.log.touch()
build._run([sys.executable, "-c", sys.argv[3]], environment, build._silent)
"""


def test_an_installer_and_what_it_started_end_with_a_killed_build(tmp_path: Path, root: Path, wheels: Path) -> None:
    define(root, [wheel(wheels, "alpha")])
    compiler = SLEEPS.format(path=str(tmp_path / "compiler"))
    installer = WRITE_PID.format(path=str(tmp_path / "installer"))
    installer += f"import subprocess\nsubprocess.run([sys.executable, '-c', {compiler!r}])"
    with subprocess.Popen([sys.executable, "-c", BUILDS, root, tmp_path / "tiny", installer]) as building:
        pids = [written_pid(tmp_path / name) for name in ("installer", "compiler")]
        building.kill()
    assert all(wait_for(lambda pid=pid: is_gone(pid)) for pid in pids)


def test_offline_builds_nothing_from_an_index(store: Store, root: Path, wheels: Path) -> None:
    define(root, [wheel(wheels, "alpha")])
    with pytest.raises(UnavailableError, match="this run is offline"):
        environments.ensure("tiny", store, root=root, offline=True)
    assert build(store, root, wheels, offline=True).state() == "ready"


def test_a_missing_interpreter_is_said(store: Store, root: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    define(root, [wheel(wheels, "alpha")], python="3.99")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UnavailableError, match=r"no python 3\.99"):
        build(store, root, wheels)


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(UsageError) as error:
        environments.find("auto-awq")
    assert "autoawq" in error.value.fix


@pytest.mark.parametrize(
    "line", ["alpha==1.0\n", "alpha>=1.0 --hash=sha256:00\n", "-r other.txt\n", "--index-url https://x\n"]
)
def test_a_lock_that_leaves_anything_open_is_refused(root: Path, line: str) -> None:
    define(root, [])
    (root / "locks" / "tiny.txt").write_text(line)
    with pytest.raises(IntegrityError, match="without an exact version and a hash"):
        environments.find("tiny", root)


@pytest.mark.parametrize("name", environments.names())
def test_shipped_locks_are_complete_and_have_what_the_worker_needs(name: str) -> None:
    found = environments.find(name)
    assert {"pydantic", "packaging"} <= set(found.pins)
    assert not [pin for pin in found.pins if pin.startswith("nvidia-cu")]
    sources = {definitions.normalized(source) for source in found.sources}
    assert sources <= set(found.pins)
    halves = found.requirements(sources=True) + found.requirements(sources=False)
    assert sorted(halves) == sorted(found.lock)


def test_the_digest_is_of_what_is_installed(root: Path, wheels: Path) -> None:
    define(root, [wheel(wheels, "alpha")])
    first = environments.find("tiny", root).digest
    define(root, [wheel(wheels, "alpha")], imports=("alpha",))
    assert environments.find("tiny", root).digest == first
    define(root, [wheel(wheels, "alpha", code="1")])
    assert environments.find("tiny", root).digest != first


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE", IntegrityError),
        ("error: Hash mismatch for `alpha==1.0`", IntegrityError),
        ("ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu", UnavailableError),
        ("error: Failed to fetch: `https://user:secret@index/simple/`\n  Connection refused", UnavailableError),
        ("error: failed to build `autoawq==0.2.9`", StageFailedError),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", DiskError),
        ("error: failed to write to `/cache`: Disk quota exceeded (os error 122)", DiskError),
        ("c++: fatal error: out of memory\nERROR: Failed building wheel for alpha", OutOfMemoryError),
    ],
)
def test_what_an_installer_says_becomes_an_error_with_a_name(said: str, error: type[Exception], tmp_path: Path) -> None:
    found = failure("tiny", said, tmp_path / "log")
    assert type(found) is error
    assert "secret" not in found.message
    assert str(tmp_path) in found.fix


def test_the_command_line_lists_builds_checks_and_collects(
    store: Store, root: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from optikit.cli import env

    define(root, [wheel(wheels, "alpha")], imports=("alpha",))
    monkeypatch.setattr(definitions, "ROOT", root)
    monkeypatch.setenv("OPTIKIT_HOME", str(store.root))
    env.build(wheels=wheels)
    env.list_(as_json=True)
    listed = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert [(row["name"], row["state"], row["packages"]) for row in listed] == [("tiny", "ready", 1)]
    env.check()
    (
        Path(listed[0]["python"]).parents[1]
        / "lib"
        / f"python3.{sys.version_info.minor}"
        / "site-packages"
        / "alpha.py"
    ).unlink()
    with pytest.raises(UnavailableError, match="1 of 1"):
        env.check()
    env.gc(all_=True)
    assert "removed  tiny-" in capsys.readouterr().out
    assert not Path(listed[0]["python"]).exists()


def test_variables_of_builds_may_depend_on_the_kind_of_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / "a.txt").write_text("a==1 --hash=sha256:0\n")
    row = '[a]\nsummary = "a"\npython = "3.11"\nimports = ["a"]\nvariables = { BOTH = "1", ONE = "1" }\n'
    (tmp_path / "environments.toml").write_text(row + 'variables_on.x86_64.ONE = "2"\n')
    for machine, one in (("x86_64", "2"), ("aarch64", "1")):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        assert definitions.find("a", tmp_path).variables == {"BOTH": "1", "ONE": one}
