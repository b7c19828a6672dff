"""Odd recipes, paths and machines end with a sentence and an exit code, never as a bug of ours."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from optikit.cli import crash
from optikit.cli.app import main
from optikit.errors import DiskError, RecipeError

Say = Callable[..., tuple[int, str]]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a command line in a directory and with a store of its own; return exit code and stderr."""
    monkeypatch.setenv("OPTIKIT_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["optikit", *arguments])
        with pytest.raises(SystemExit) as ended:
            sys.exit(main())  # main() itself ends only where something failed
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


RECIPES = {
    "UTF-16": ("model: x\n".encode("utf-16"), "r.yaml:1:1: error: the file is UTF-16 or UTF-32, not UTF-8"),
    "UTF-16, big": ("\ufeffmodel: x\n".encode("utf-16-be"), "r.yaml:1:1: error: the file is UTF-16 or UTF-32"),
    "UTF-32": ("model: x\n".encode("utf-32"), "r.yaml:1:1: error: the file is UTF-16 or UTF-32, not UTF-8"),
    "Latin-1": (b"model: m\nseed: caf\xe9\n", "r.yaml:2:10: error: byte 0xE9 is not UTF-8"),
    "half a character": (b'model: "a\\uD83Db"\n', "half a surrogate pair"),
    "brackets": (b"[" * 20_000, "more than 64 levels of nesting"),
    "braces": (b"{a: " * 5_000, "more than 64 levels of nesting"),
    "dashes": ("\n".join(" " * i + "- " for i in range(500)).encode(), "more than 64 levels of nesting"),
    "too large": (b"a: " + b"x" * 2**18, "a recipe has at most 262144"),
    "far too large": (b"a: 1\n" * 10**6, "a recipe has at most 262144"),
    "itself": (b"extends: r.yaml\n", "in a circle"),
    "links in a circle": (b"extends: loop.yaml\n", "can't read 'loop.yaml': Too many levels of symbolic links"),
    "a pipe as base": (b"extends: pipe\n", "can't read 'pipe': not a regular file"),
    "a device as base": (b"extends: /dev/zero\n", "can't read '/dev/zero': not a regular file"),
    "no memory": (b"model: m\nmax_memory: '0'\n", "leaves no step any memory"),
    "endless memory": (b"model: m\nmax_memory: '" + b"9" * 400 + b"GiB'\n", "is not a size"),
}


@pytest.mark.parametrize("verb", [["plan"], ["plan", "--fix"], ["run", "--out", "out"]], ids=" ".join)
@pytest.mark.parametrize(("content", "told"), RECIPES.values(), ids=RECIPES)
def test_an_odd_recipe_is_refused_at_its_place(say, verb, content, told):
    Path("r.yaml").write_bytes(content)
    Path("loop.yaml").symlink_to("loop.yaml")
    os.mkfifo("pipe")
    code, err = say(*verb, "r.yaml")
    assert code == 65
    assert told in err
    assert Path("r.yaml").read_bytes() == content


@pytest.mark.parametrize("verb", [["plan"], ["plan", "--fix"], ["run", "--out", "out"]], ids=" ".join)
@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("pipe", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        (".", "not a regular file"),
        ("none.yaml", "No such file or directory"),
        ("loop.yaml", "Too many levels of symbolic links"),
        ("a" * 10_000, "File name too long"),
        ("a\udcff.yaml", "No such file or directory"),
    ],
    ids=["pipe", "device", "directory", "nothing", "circle", "long", "not UTF-8"],
)
def test_what_is_no_file_is_no_recipe(say, verb, path, told):
    os.mkfifo("pipe")
    Path("loop.yaml").symlink_to("loop.yaml")
    code, err = say(*verb, path)
    assert code == 66
    assert err.startswith(f"error: can't read the recipe {path!r}: {told}\n")


@pytest.mark.parametrize(
    "command",
    [
        *("report {}", "diff {} {}", "recommend model --report {}", "generate model --prompts {}"),
        "eval http://127.0.0.1:1 --out out --text {}",
    ],
)
@pytest.mark.parametrize("path", ["pipe", "/dev/zero"])
def test_what_has_no_end_is_not_waited_for(say, command, path, tiny_llama):
    """A pipe without a writer, opened in the ordinary way, would hold us forever."""
    os.mkfifo("pipe")
    Path("model").symlink_to(tiny_llama)
    code, err = say(*command.format(path, path).split())
    assert code == 66
    assert err.startswith(f"error: {path}")


@pytest.mark.parametrize("model", ["a" * 10_000, "a/" * 3_000, "~nobody-of-that-name/x", "x/" + "b" * 300])
def test_a_model_that_no_path_can_name_is_missing(say, model):
    Path("r.yaml").write_text(f"model: {model}\n", encoding="utf-8")
    code, err = say("plan", "r.yaml")
    assert code == 66
    assert len(err) < 1000


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"[x]\na=" + b"[" * 3000 + b"]" * 3000, 65), ("[x]\n".encode("utf-16"), 65), (b"[[[", 65), (None, 65)],
    ids=["deep", "UTF-16", "not TOML", "pipe"],
)
def test_odd_targets_are_refused(say, content, code):
    Path("r.yaml").write_text("model: m\n", encoding="utf-8")
    if content is None:
        os.mkfifo("t.toml")
    else:
        Path("t.toml").write_bytes(content)
    ended, err = say("plan", "r.yaml", "--targets", "t.toml")
    assert ended == code
    assert err.startswith("error: t.toml ")


def test_a_deep_plan_is_no_plan(say):
    Path("p.json").write_text('{"optikit_plan": ' + "[" * 100_000, encoding="utf-8")
    code, err = say("run", "p.json", "--out", "out")
    assert code == 65
    assert "more than 64 levels of nesting" in err


def test_a_user_without_a_home_is_told_what_to_set(say, monkeypatch, tmp_path):
    def nobody(_uid: int) -> None:
        raise KeyError

    for name in ("HOME", "OPTIKIT_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    Path("r.yaml").write_text("model: m\n", encoding="utf-8")
    code, err = say("plan", "r.yaml")
    assert code == 73
    assert f"this user ({os.getuid()}) has none" in err
    assert "OPTIKIT_HOME" in err
    code, err = say("targets")
    assert code == 0
    assert "optikit has a bug" not in err


def test_a_bug_without_a_store_is_told_whole(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("OPTIKIT_HOME", str(tmp_path / "file" / "store"))
    told = json.loads(crash.write_report(KeyError("oh")))
    assert "KeyError" in "".join(told["traceback"])
    monkeypatch.setenv("OPTIKIT_HOME", str(tmp_path / "store"))
    written = Path(crash.write_report(KeyError("oh")))
    assert "KeyError" in written.read_text(encoding="utf-8")


def test_a_working_directory_that_is_gone_is_told(say, tmp_path):
    (tmp_path / "r.yaml").write_text("model: m\n", encoding="utf-8")
    (tmp_path / "work").rmdir()
    code, err = say("plan", str(tmp_path / "r.yaml"))
    assert code == 66
    assert err.startswith("error: the directory that optikit was started in is gone\n")


def test_what_the_machine_or_a_file_did_is_no_bug():
    found = crash.known(PermissionError(13, "Permission denied", "/x/" + "y" * 500))
    assert isinstance(found, DiskError)
    assert found.message.startswith("/x/yyy")
    assert len(found.message) < 300
    assert isinstance(crash.known(RecursionError("maximum recursion depth exceeded")), RecipeError)
    assert crash.known(KeyError("oh")) is None


LOCKS = {"another": ({"sha256": "0" * 64}, 76, "changed: sha256 "), "none": ("x", 76, "a row isn't an object")}


@pytest.mark.parametrize(("row", "code", "told"), LOCKS.values(), ids=LOCKS)
def test_a_plan_tells_what_run_would_refuse_by_the_lock(say, tiny_llama, row, code, told):
    Path("r.yaml").write_text(f"model: {tiny_llama}\n", encoding="utf-8")
    Path("optikit.lock").write_text(json.dumps({str(tiny_llama): row}), encoding="utf-8")
    for verb in (["plan"], ["plan", "--out", "p.json"], ["run", "--out", "out"]):
        ended, err = say(*verb, "r.yaml")
        assert (ended, told in err) == (code, True), err
    assert not Path("p.json").exists()


OPENING = {
    "plan": ["plan", "r.yaml"],
    "run": ["run", "r.yaml", "--out", "out"],
    "generate": ["generate", "m", "--prompt", "a"],
    "eval": ["eval", "m", "--out", "out", "--text", "t.txt"],
    "recommend": ["recommend", "m", "--target", "cpu"],
    "init": ["init", "new.yaml", "--model", "m"],
}


@pytest.mark.parametrize("verb", OPENING)
def test_packed_weights_that_nothing_tells_of_are_refused_by_every_verb(say, tiny_gptq, verb):
    shutil.copytree(tiny_gptq, "m")
    settings = json.loads(Path("m/config.json").read_text(encoding="utf-8"))
    del settings["quantization_config"]
    Path("m/config.json").write_text(json.dumps(settings), encoding="utf-8")
    Path("r.yaml").write_text("model: m\n", encoding="utf-8")
    Path("t.txt").write_text("the old stone house " * 500, encoding="utf-8")
    code, err = say(*OPENING[verb])
    assert code == 65
    assert "holds packed weights (model.layers.0." in err
    assert "and config.json has no quantization_config" in err
