"""`optikit plan --fix`, as its user sees it: problems first, then the diff, what is lost or left, and the exit code."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from optikit.cli.app import main
from optikit.rules import repair as repairing

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a command line in a directory and with a store of its own; return exit code, stdout and stderr."""
    monkeypatch.setenv("OPTIKIT_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["optikit", *arguments])
        with pytest.raises(SystemExit) as ended:
            sys.exit(main())  # main() itself ends only where something failed
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def recipe(tiny_llama: Path, prose: Path, say: Say) -> Callable[[str], Path]:
    """Write a recipe with these stages."""

    def write(stages: str, *, target: str = "cpu") -> Path:
        path = Path("r.yaml")
        text = f"model: {tiny_llama}\ntarget: {target}\ncalibration: {{text: {prose}, samples: 4, length: 32}}\n"
        path.write_text(f"{text}stages:\n{stages}", encoding="utf-8")
        return path

    return write


TYPO = "  - quantize: {method: gptq, grop_size: 32}  # mine\n"


def test_a_diff_is_shown_and_nothing_written_without_fix(say, recipe):
    path = recipe(TYPO)
    before = path.read_bytes()
    code, out, err = say("plan", "r.yaml")
    assert code == 65
    assert "r.yaml:5:30: error: unknown key 'grop_size'" in err
    assert "+  - quantize: {method: gptq, group_size: 32}  # mine\n" in out
    assert "`optikit plan --fix` writes:" in out
    assert path.read_bytes() == before


def test_fix_writes_it_and_plans(say, recipe):
    path = recipe(TYPO)
    code, out, err = say("plan", "--fix", "r.yaml")
    assert code == 0
    assert path.read_text(encoding="utf-8").endswith("group_size: 32}  # mine\n")
    assert "unknown key 'grop_size'" in err
    assert out.index("+++ r.yaml") < out.index("1-quantize-gptq")


def test_problems_come_before_the_diff(recipe, tmp_path):
    """On one terminal: both streams go to one file."""
    import subprocess

    recipe(TYPO)
    done = subprocess.run(
        [sys.executable, "-m", "optikit", "plan", "r.yaml"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd=tmp_path / "work",
    )
    assert done.stdout.index("error: unknown key") < done.stdout.index("+++ r.yaml")


def test_json_stays_json(say, recipe):
    recipe(TYPO)
    code, out, err = say("plan", "--fix", "--json", "r.yaml")
    assert code == 0
    assert json.loads(out)["steps"]
    assert "+++ r.yaml" in err


def test_what_changes_the_meaning_waits_for_the_flag(say, recipe):
    path = recipe("  - quantize: {method: gptq, bits: 3}\n")
    before = path.read_bytes()
    code, out, err = say("plan", "--fix", "r.yaml")
    assert code == 65
    assert out == ""
    assert "no safe fix; --unsafe-fixes would set bits: 4 in quantize (gptq)\n" in err
    assert "lost by it: bits of quantize (gptq) was 3 and is 4 now\n" in err
    assert path.read_bytes() == before
    code, out, err = say("plan", "--unsafe-fixes", "r.yaml")
    assert (code, path.read_bytes()) == (65, before)
    assert "`optikit plan --fix --unsafe-fixes` writes:" in out
    code, out, err = say("plan", "--fix", "--unsafe-fixes", "r.yaml")
    assert code == 0
    assert "lost by it: bits of quantize (gptq) was 3 and is 4 now" in err
    assert path.read_bytes() == before.replace(b"bits: 3", b"bits: 4")


def test_safe_fixes_are_written_and_what_is_left_is_said(say, recipe):
    path = recipe("  - quantize: {method: gptq, bits: 3, smy: true}\n")
    code, out, err = say("plan", "--fix", "r.yaml")
    assert code == 65
    assert "sym: true" in path.read_text(encoding="utf-8")
    assert "no safe fix for what is left; --unsafe-fixes would set bits: 4" in err
    assert err.count("bits can't be 3") == 2  # of two problems, and the one that is left
    assert "+++ r.yaml" in out


def test_the_order_of_stages_is_mended_and_an_engine_is_not_changed(say, recipe):
    stages = ["  - compile: {engine: onnxruntime}  # last\n", "  - quantize: {method: gptq, group_size: 32}\n"]
    path = recipe("".join(stages), target="l4")
    code, _out, err = say("plan", "--fix", "r.yaml")
    assert code == 65
    assert path.read_text(encoding="utf-8").endswith("".join(reversed(stages)))
    assert "doesn't run onnxruntime" in err
    assert "--unsafe-fixes would " in err


def test_a_rules_own_value_is_tried(say, recipe):
    path = recipe("  - quantize: {method: gptq, group_size: 128}\n")
    code, out, _err = say("plan", "--fix", "r.yaml")
    assert code == 0
    assert "group_size: 64" in path.read_text(encoding="utf-8")
    assert out.startswith("# set group_size: 64 in quantize (gptq)\n")


@pytest.mark.parametrize(
    ("pattern", "ours"),
    [("re:.*down_proj", '["*down_proj*"]'), (r"re:model\.layers\.0\..*$", '["model.layers.0.*"]'), ("lm_head", "[]")],
)
def test_what_is_to_stay_dense_stays_dense(say, recipe, pattern, ours):
    path = recipe(f"  - quantize: {{method: gptq, group_size: 32, ignore: ['{pattern}']}}\n")
    code, _out, _err = say("plan", "--fix", "r.yaml")
    assert code == 0
    assert f"ignore: {ours}}}" in path.read_text(encoding="utf-8")


def test_a_pattern_nobody_can_translate_is_left(say, recipe):
    path = recipe("  - quantize: {method: gptq, group_size: 32, ignore: ['re:.*(q|k)_proj']}\n")
    before = path.read_bytes()
    assert say("plan", "--fix", "r.yaml")[0] == 65
    assert path.read_bytes() == before


def test_line_ends_and_byte_order_mark_stay(say, recipe):
    path = recipe(TYPO)
    content = b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n")
    path.write_bytes(content)
    assert say("plan", "--fix", "r.yaml")[0] == 0
    assert path.read_bytes() == content.replace(b"grop", b"group")


def test_a_base_recipe_is_not_written_to(say, recipe):
    base = recipe(TYPO).rename("base.yaml")
    Path("r.yaml").write_text("extends: base.yaml\nsede: 1\n", encoding="utf-8")
    before = base.read_bytes()
    code, _out, err = say("plan", "--fix", "r.yaml")
    assert code == 65
    assert base.read_bytes() == before
    assert Path("r.yaml").read_text(encoding="utf-8") == "extends: base.yaml\nseed: 1\n"
    assert "base.yaml:5:30: error: unknown key 'grop_size'" in err


def test_a_recipe_that_cannot_be_written_is_told(say, recipe, monkeypatch):
    recipe(TYPO)
    monkeypatch.setattr("os.access", lambda _path, mode: mode != os.W_OK)
    code, _out, err = say("plan", "--fix", "r.yaml")
    assert code == 73
    assert "r.yaml: Permission denied" in err


def test_a_recipe_is_whole_where_its_disk_is_full(say, recipe, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = recipe(TYPO)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", full)
    code, _out, err = say("plan", "--fix", "r.yaml")
    assert code == 74
    assert "No space left on device" in err
    assert path.read_bytes() == before


def test_a_source_that_is_missing_is_said_of_the_mended_recipe(say, recipe):
    path = recipe(TYPO)
    path.write_text(path.read_text(encoding="utf-8").replace("text: ", "text: no"), encoding="utf-8")
    code, _out, err = say("plan", "--fix", "r.yaml")
    assert code == 66
    assert "group_size" in path.read_text(encoding="utf-8")
    assert "doesn't exist" in err
    assert "no safe fix" not in err


def test_a_search_without_time_says_so(say, recipe, monkeypatch):
    recipe("  - quantize: {method: gptq, bits: 3}\n")
    monkeypatch.setattr(repairing, "SECONDS", 0.0)
    code, _out, err = say("plan", "--fix", "r.yaml")
    assert code == 65
    assert "no fix was looked for: reading the recipe took" in err


def test_a_file_too_large_to_read_is_not_repaired(say):
    Path("r.yaml").write_text("model: " + "x" * 2**19, encoding="utf-8")
    code, out, err = say("plan", "--fix", "r.yaml")
    assert (code, out) == (65, "")
    assert err.endswith("r.yaml has 1 problem\n")


HINTS = {
    "JSON, inline": (
        "calibration: {text: t.jsonl, samples: 4, length: 32}  # mine\n",
        'calibration: {text: t.jsonl, template: "{words}\\n", samples: 4, length: 32}  # mine\n',
    ),
    "JSON, in lines": (
        "calibration:\n  text: t.jsonl\n  samples: 4\n  length: 32\n",
        'calibration:\n  text: t.jsonl\n  template: "{words}\\n"\n  samples: 4\n  length: 32\n',
    ),
    "a length beyond the context": (
        "calibration: {text: prose.txt, samples: 4, length: 9000}\n",
        "calibration: {text: prose.txt, samples: 4, length: 512}\n",
    ),
}


@pytest.mark.parametrize(("before", "after"), HINTS.values(), ids=HINTS)
def test_what_a_message_about_texts_says_is_what_fix_writes(say, tiny_llama, before, after):
    Path("t.jsonl").write_text(json.dumps({"words": "the old stone house " * 200}) + "\n", encoding="utf-8")
    Path("prose.txt").write_text("the old stone house " * 2000, encoding="utf-8")
    start, end = f"model: {tiny_llama}\ntarget: cpu\n", "stages:\n  - quantize: {method: gptq, group_size: 32}\n"
    Path("r.yaml").write_text(start + before + end, encoding="utf-8")
    code, _, err = say("plan", "--fix", "r.yaml")
    assert (code, Path("r.yaml").read_text(encoding="utf-8")) == (0, start + after + end), err
