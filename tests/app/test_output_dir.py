"""The output directory: what goes in, whose it may replace, and what a kill at any moment leaves."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from optikit.app import output_dir, verify
from optikit.errors import CannotCreateError, DiskError, IntegrityError, LockedError
from optikit.execution.execute import Settings, execute
from optikit.fileio import file_sha256
from optikit.plan import Plan, make_plan
from optikit.progress import Status
from optikit.progress import make as make_progress
from optikit.recipe.load import LoadedRecipe, loads
from optikit.report import assemble
from optikit.report import write as report_files
from optikit.store.manifest import NAME
from optikit.store.store import Artifact, Store
from tests.app.outputs import fill, seal_output


@dataclass(frozen=True)
class Made:
    """A finished run that was not written out yet."""

    loaded: LoadedRecipe
    plan: Plan
    store: Store
    artifacts: dict[str, Artifact]

    def write(self, out: Path, *, note: str = "", timeout: float | None = None) -> None:
        statuses: dict[str, Status] = {step.name: "executed" for step in self.plan.steps}
        report = assemble.report(self.plan, self.artifacts, statuses, seconds=1.0, command=f"optikit run {note}")
        loaded = replace(self.loaded, text=f"{self.loaded.text}# {note}\n")
        output_dir.write(out, loaded, self.plan, self.artifacts, store=self.store, report=report, timeout=timeout)

    def copy(self, root: Path) -> Made:
        """Return the same with a store of its own, to be damaged."""
        shutil.copytree(self.store.root, root)
        store = Store(root)
        artifacts = {key: found for key in self.artifacts if (found := store.find(key)) is not None}
        return replace(self, store=store, artifacts=artifacts)


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    directory = tmp_path_factory.mktemp("made")
    text = json.dumps({"model": str(tiny_llama), "stages": [{"quantize": {"method": "rtn", "group_size": 32}}]})
    loaded, store = loads(text, directory / "recipe.yaml"), Store(directory / "store")
    plan = make_plan(loaded, store)
    with make_progress("none") as progress:
        return Made(loaded, plan, store, execute(plan, store, progress, Settings()).artifacts)


def whole(out: Path, note: str | None = None) -> bool:
    """Say whether an output is as sealed, and of one run: recipe and report agree."""
    if verify.verify(out).damage:
        return False
    command = report_files.load(out).command
    text = (out / "recipe.yaml").read_text()
    return text.endswith(f"# {command.removeprefix('optikit run ')}\n") and note in (
        None,
        command.removeprefix("optikit run "),
    )


def beside(out: Path) -> list[str]:
    """Return what writing left around and inside, which is nothing."""
    found = [path.name for directory in (out.parent, out) for path in directory.iterdir()]
    return sorted(name for name in found if name.endswith((".part", ".old")))


def test_everything_is_sealed_and_the_report_with_it(made: Made, tmp_path: Path) -> None:
    made.write(tmp_path / "out", note="one")
    assert whole(tmp_path / "out", "one")
    sealed, said = verify.output(tmp_path / "out")
    assert set(verify.BESIDE) < set(sealed.files)
    assert said["steps"][0]["method"] == "rtn"
    assert beside(tmp_path / "out") == []
    artifact = next(iter(made.artifacts.values()))
    for name, record in artifact.manifest.files.items():
        path = tmp_path / "out" / "model" / name
        assert file_sha256(path) == record.sha256
        assert path.stat().st_ino != (artifact.path / name).stat().st_ino


def test_reports_rendered_again_are_sealed_again(made: Made, tmp_path: Path) -> None:
    made.write(tmp_path / "out", note="one")
    (tmp_path / "out" / "report.md").write_text("something else")
    output_dir.render_reports(tmp_path / "out", report_files.load(tmp_path / "out"))
    assert whole(tmp_path / "out", "one")
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    (tmp_path / "out" / "report.json").write_text(json.dumps(found | {"command": "optikit run two"}))
    with pytest.raises(IntegrityError, match=r"report\.json is not as sealed"):
        output_dir.render_reports(tmp_path / "out", report_files.load(tmp_path / "out"))


def test_reports_of_the_version_before_are_rendered_without_a_seal(made: Made, tmp_path: Path) -> None:
    made.write(tmp_path, note="one")
    seal_output(tmp_path, version=1)
    before = (tmp_path / NAME).read_bytes()
    output_dir.render_reports(tmp_path, report_files.load(tmp_path))
    assert (tmp_path / NAME).read_bytes() == before
    assert verify.verify(tmp_path).damage == ()


def test_a_bit_that_the_disk_lost_is_not_shipped(made: Made, tmp_path: Path) -> None:
    mine = made.copy(tmp_path / "store")
    (key,) = mine.artifacts
    path = mine.artifacts[key].path / "model.safetensors"
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-9] ^= 0x10
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(IntegrityError, match=r"changed on the disk after it was sealed \(model.safetensors"):
        mine.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert mine.store.find(key) is None  # set aside: the next run makes it again
    assert beside(tmp_path) == []


def test_a_model_shipped_as_it_is_must_be_what_was_resolved(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "model" / "modeling.py").write_text("evil")
    loaded = loads(json.dumps({"model": str(tmp_path / "model"), "stages": []}), tmp_path / "recipe.yaml")
    store = Store(tmp_path / "store")
    plan = make_plan(loaded, store)
    output_dir.write(tmp_path / "out", loaded, plan, {}, store=store)
    assert sorted(path.name for path in (tmp_path / "out/model").iterdir()) == sorted(plan.model.names)
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(IntegrityError, match="changed while it was worked on"):
        output_dir.write(tmp_path / "out", loaded, plan, {}, store=store)


# ------------------------------------------------------------------ whose it may replace

FOREIGN: dict[str, Callable[[Path], object]] = {
    "another tool's artifact.json": lambda out: (out / NAME).write_text('{"contract": "solidity"}'),
    "no artifact.json": lambda out: (out / "thesis.txt").write_text("irreplaceable"),
    "broken": lambda out: (out / NAME).write_text("{"),
    "an artifact of a store": lambda out: (fill(out), seal_output(out, optikit=None)),
    "a file of the user's": lambda out: (fill(out), seal_output(out), (out / "notes.txt").write_text("x")),
    "a file of the user's inside": lambda out: (fill(out), seal_output(out), (out / "model/x").write_text("x")),
    "a link of the user's": lambda out: (fill(out), seal_output(out), (out / "link").symlink_to("/")),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_ours_is_left_alone(made: Made, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    FOREIGN[name](out)
    (out / "precious").write_text("x")
    before = _looks(out)
    for refuse in (output_dir.require_writable, made.write):
        with pytest.raises(CannotCreateError):
            refuse(out)
    assert _looks(out) == before


def test_what_a_device_left_in_an_emitted_folder_is_left_alone_and_told_apart(made: Made, tmp_path: Path) -> None:
    made.write(tmp_path / "out")
    left = tmp_path / "out" / "compiled" / "neuron"
    left.mkdir(parents=True)
    (left / "smoke.log").write_text("Paris")
    with pytest.raises(CannotCreateError, match=r"compiled/neuron/smoke\.log") as refused:
        output_dir.require_writable(tmp_path / "out", resume=True)
    assert "result.json" in refused.value.fix
    (tmp_path / "out" / "compiled" / "neuron" / "smoke.log").rename(tmp_path / "out" / "smoke.log")
    with pytest.raises(CannotCreateError) as refused:
        output_dir.require_writable(tmp_path / "out", resume=True)
    assert "move away what is yours" in refused.value.fix


def _looks(directory: Path) -> dict[Path, tuple[int, int, int, int]]:
    """Return what a write would change of every file; reading changes its time of access."""
    found = ((path, path.lstat()) for path in directory.rglob("*"))
    return {path: (each.st_mode, each.st_ino, each.st_size, each.st_mtime_ns) for path, each in found}


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_output_is_replaced(made: Made, tmp_path: Path, version: int) -> None:
    fill(tmp_path / "out")
    seal_output(tmp_path / "out", version=version)
    output_dir.require_writable(tmp_path / "out")
    made.write(tmp_path / "out", note="new")
    assert whole(tmp_path / "out", "new")
    assert not (tmp_path / "out/compiled").exists()


def test_odd_paths(made: Made, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    long = tmp_path / ("x" * 300)
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "loop", long):
        for refuse in (output_dir.require_writable, output_dir.require_no_seal, made.write):
            with pytest.raises(CannotCreateError):
                refuse(path)
    made.write(tmp_path / ("y" * 250))  # too long for a name with a suffix
    assert whole(tmp_path / ("y" * 250))


def test_a_link_is_followed_and_stays(made: Made, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("later")
    for name, target in (("link", "real"), ("link", "real"), ("dangling", "later")):
        made.write(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert whole(tmp_path / target)


def test_the_working_directory_stays_the_same(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    for note in ("one", "two"):
        made.write(Path(), note=note)
        assert whole(Path(), note)
    assert tmp_path.stat().st_ino == before
    assert beside(tmp_path) == []


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, as containers mount for their output."""
    mount = tmp_path / "volume"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_mount_point(made: Made, volume: Path) -> None:
    for note in ("one", "two"):
        output_dir.require_writable(volume)
        made.write(volume, note=note)
        assert whole(volume, note)
        assert beside(volume) == []
    (volume / "filler").write_bytes(b"")
    with pytest.raises(CannotCreateError, match="filler"):
        made.write(volume)
    (volume / "filler").unlink()
    with pytest.raises(DiskError), _filled(volume):
        made.write(volume, note="three")
    assert whole(volume, "two")


class _filled:  # noqa: N801  read as a word
    """Hold the rest of a file system by a file without a name."""

    def __init__(self, mount: Path) -> None:
        self._mount = mount

    def __enter__(self) -> None:
        self._file = (self._mount / "filler").open("wb")
        (self._mount / "filler").unlink()
        try:
            while True:
                self._file.write(b"\0" * 4096)
                self._file.flush()
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017  the end of the loop

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        except OSError as error:  # what was left in its buffer
            assert error.errno == errno.ENOSPC  # noqa: PT017  as above


def test_without_links_files_are_copied(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for note in ("one", "two"):
        made.write(tmp_path / "out", note=note)
        assert whole(tmp_path / "out", note)


# ------------------------------------------------------------------ two at once, and kills


def test_one_writes_at_a_time(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made.write(out, note="one")
    with output_dir._locked(out, None):
        for wait in (output_dir.require_writable, made.write):
            with pytest.raises(LockedError, match="another run has been writing"):
                wait(out, timeout=0.0)
    threads = [threading.Thread(target=made.write, args=(out,), kwargs={"note": str(each)}) for each in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert whole(out)
    assert beside(out) == []


class Killed(BaseException):
    """A stand-in for SIGKILL: nothing in the program catches it."""


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_killed_at_any_rename_the_next_run_finishes_and_clears(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool, inside: bool
) -> None:
    """Every rename of the exchange is once the last thing that a run does."""
    rename, left = Path.rename, [0]

    def dying(self: Path, target: Path) -> Path:
        if target.name != "probe" and "probe" not in self.parts:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
        return rename(self, target)

    if inside:  # as at a mount point: nothing can be renamed from beside
        monkeypatch.setattr(output_dir, "_staging", _made_inside)
    for count in range(40):
        out = tmp_path / f"out{count}"
        if older:
            made.write(out, note="older")
        left[0] = count
        monkeypatch.setattr(Path, "rename", dying)
        try:
            made.write(out, note="newer")
        except Killed:
            monkeypatch.setattr(Path, "rename", rename)
        else:
            assert count > 5
            break
        output_dir.require_writable(out)
        assert beside(out) == []
        assert not any(out.iterdir()) or whole(out)
        made.write(out, note="again")
        assert whole(out, "again")
        assert beside(out) == []
    else:
        pytest.fail("more renames than entries")


def _made_inside(place: Path) -> Path:
    partial = place / f".optikit.{os.getpid()}.part"
    partial.mkdir()
    return partial


def test_what_the_dead_left_is_cleared(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made.write(out, note="one")
    for name in (".out.1.part", ".out.2.part", ".out.3.old", "out/.optikit.4.part"):
        fill(tmp_path / name)
    (tmp_path / ".other.5.part").mkdir()
    output_dir.require_writable(out)
    assert whole(out, "one")
    assert beside(out) == [".other.5.part"]


def test_an_output_that_an_earlier_version_had_moved_aside_comes_back(made: Made, tmp_path: Path) -> None:
    made.write(tmp_path / ".out.7.old", note="older")
    (tmp_path / "out").mkdir()
    output_dir.require_writable(tmp_path / "out")
    assert whole(tmp_path / "out", "older")
    assert beside(tmp_path / "out") == []
