"""Progress and summary: live on a terminal, lines elsewhere, JSON for programs; never markup, never fatal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optikit import progress as showing
from optikit.errors import UsageError
from optikit.report import summary

ROOT = Path(showing.__file__).parents[1]
NAMES = ("1-quantize-gptq", "2-compile-onnxruntime")
HOSTILE = "\x1b[31m[/red]\x1b]0;t\x07\u202e<b>\n::error::x\r[bold]"


def wait_for(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def test_plain_is_a_line_at_the_start_and_one_at_the_end():
    out = io.StringIO()
    with showing.Plain(out, patience=0) as progress:
        progress.plan(NAMES)
        progress.start(NAMES[0])
        wait_for(out.getvalue)
        progress.finish(NAMES[0], "executed", 31.24, 1126.4)
        progress.start(NAMES[1])
        wait_for(lambda: out.getvalue().count("\n") == 3)
        progress.finish(NAMES[1], "emitted", 2.0, 100, note="no device")
    assert out.getvalue().splitlines() == [
        "[1/2] quantize gptq …",
        "[1/2] quantize gptq … ok 31.2 s, peak 1.10 GiB",
        "[2/2] compile onnxruntime …",
        "[2/2] compile onnxruntime … emitted 2.0 s: files written, not run here: no device",
    ]


def test_a_cached_step_is_one_line_and_its_old_time_is_not_claimed():
    out = io.StringIO()
    with showing.Plain(out) as progress:
        progress.plan(NAMES)
        for name in NAMES:
            progress.start(name)
            progress.finish(name, "cached", 900.0, 5000.0)
    assert out.getvalue().splitlines() == ["[1/2] quantize gptq … cached", "[2/2] compile onnxruntime … cached"]


def test_a_long_step_gives_signs_of_life_and_stops_when_it_ends():
    out = io.StringIO()
    with showing.Plain(out, heartbeat=0.02, patience=0) as progress:
        progress.plan(NAMES)
        progress.start(NAMES[0])
        wait_for(lambda: "still running" in out.getvalue())
        progress.update(NAMES[0], 12, 30, "blocks")
        progress.update("another", 1, 1, "ignored")
        wait_for(lambda: "12/30 blocks" in out.getvalue())
        progress.finish(NAMES[0], "failed", 0.0, 0.0)
        written = out.getvalue()
        time.sleep(0.08)
        assert out.getvalue() == written
    assert re.search(r"^\[1/2\] quantize gptq … 12/30 blocks, 0\.\d s$", written, re.MULTILINE)
    assert written.endswith("[1/2] quantize gptq … failed\n")


def test_json_is_one_object_per_line():
    out = io.StringIO()
    with showing.make("json", out) as progress:
        progress.plan(NAMES)
        progress.start(NAMES[0])
        for done in range(1, 31):
            progress.update(NAMES[0], done, 30, "blocks")
        progress.note(HOSTILE)
        progress.finish(NAMES[0], "executed", 1.5, 10.0)
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert events[0]["names"] == list(NAMES)
    updates = [event for event in events if event["event"] == "update"]
    assert 1 <= len(updates) < 30  # throttled
    assert updates[-1]["done"] == 30
    assert events[-2] == {"event": "note", "time": events[-2]["time"], "text": HOSTILE}
    assert events[-1] | {"time": 0} == {
        "event": "finish",
        "time": 0,
        "name": NAMES[0],
        "status": "executed",
        "seconds": 1.5,
        "peak_memory_mib": 10.0,
        "note": "",
    }


def test_none_says_nothing_and_an_unknown_mode_is_refused():
    out = io.StringIO()
    with showing.make("none", out) as progress:
        progress.plan(NAMES)
        progress.start(NAMES[0])
        progress.finish(NAMES[0], "executed", 1, 1)
        progress.note("x")
    assert out.getvalue() == ""
    with pytest.raises(UsageError, match="fancy"):
        showing.make("fancy", out)


def test_auto_without_a_terminal_is_plain():
    assert type(showing.make("auto", io.StringIO())) is showing.Plain


@pytest.mark.parametrize("mode", ["plain", "json"])
def test_a_closed_stream_never_ends_a_run(mode):
    out = io.StringIO()
    progress = showing.make(mode, out)
    progress.plan(NAMES)
    out.close()
    progress.start(NAMES[0])
    progress.update(NAMES[0], 1, 1, "x")
    progress.note("x")
    progress.finish(NAMES[0], "executed", 1, 1)
    progress.close()
    assert not showing.is_terminal(out)


def test_an_ascii_stream_gets_ascii():
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    progress = showing.Plain(out)
    progress.plan(NAMES)
    progress.finish(NAMES[0], "executed", 1, 1)
    progress.note("5× é")
    assert raw.getvalue().decode() == "[1/2] quantize gptq ... ok 1.0 s, peak 1.00 MiB\n5x ?\n"


def test_hostile_names_stay_on_their_line():
    out = io.StringIO()
    with showing.Plain(out, patience=0, heartbeat=0.02) as progress:
        progress.plan([HOSTILE])
        progress.start(HOSTILE)
        progress.update(HOSTILE, 1, 2, HOSTILE)
        wait_for(lambda: "1/2" in out.getvalue())
        progress.note(HOSTILE)
        progress.finish(HOSTILE, "executed", 1, 1, note=HOSTILE)
    written = out.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", written)
    assert all(line.startswith(("[1/1] [/red]", "[/red]")) for line in written.splitlines())


def run_in_terminal(script, *, columns=80, **environ):
    """Run Python with stderr on a pseudo-terminal and stdout on a pipe; return (stdout, what the terminal got)."""
    leader, follower = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "TERM": "xterm-256color",
        "PYTHONUTF8": "1",
    } | environ
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=follower, stdin=subprocess.DEVNULL, env=environ
    )
    os.close(follower)
    seen = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(leader)
    out = child.communicate()[0]
    assert child.returncode == 0, seen.decode(errors="replace")
    return out.decode(), seen.decode()


LIVE = f"""
import sys, time
from optikit import progress as showing
names = ["1-quantize-gptq", {HOSTILE!r}]
with showing.make("auto") as progress:
    assert type(progress) is showing.Live
    progress.plan(names)
    progress.start(names[0])
    print("data")  # a verb's output, while the display is up
    for done in range(4):
        progress.update(names[0], done, 30, "blocks")
        time.sleep(0.15)
    time.sleep(0.3)  # drawn four times a second
    progress.note("waiting for " + names[1])
    progress.finish(names[0], "executed", 31.2, 1126.4)
    progress.start(names[1])
    progress.update(names[1], 1, 2, names[1])
    time.sleep(0.3)
    progress.finish(names[1], "failed", 0, 0, note=names[1])
"""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_live_progress_on_a_real_terminal():
    out, seen = run_in_terminal(LIVE)
    assert out == "data\n"
    words = CONTROL.sub("", seen)
    assert "3/30 blocks" in words
    assert re.search(r"✓ quantize gptq +31\.2 s +1\.10 GiB", words)
    assert "[1/2]" in words
    assert "in all" in words
    assert "✗ [/red]" in words
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") == 1  # the cursor is back
    assert COLOUR.search(seen)
    assert "\x1b]0" not in seen
    assert "\u202e" not in seen
    assert "\x1b[31m[/red]" not in seen


def test_no_color_is_honoured_on_a_terminal():
    _, seen = run_in_terminal(LIVE, NO_COLOR="1")
    codes = {code for found in COLOUR.findall(seen) for code in found[2:-1].split(";")}
    assert codes <= {"", "0", "1", "2"}  # weight, no colour


def test_a_dumb_terminal_gets_plain_lines():
    script = "from optikit import progress\nprint(type(progress.make('auto')).__name__)"
    assert run_in_terminal(script, TERM="dumb")[0] == "Plain\n"


def summary_script(name):
    return (
        "import importlib.util, pathlib\n"
        f"spec = importlib.util.spec_from_file_location('reports', {str(ROOT / 'tests/report/conftest.py')!r})\n"
        "reports = importlib.util.module_from_spec(spec); spec.loader.exec_module(reports)\n"
        "from optikit.report import summary\n"
        f"summary.show({name}, pathlib.Path('out'))\n"
    )


@pytest.mark.parametrize("name", ["reports.full()", "reports.thin()", "reports.named(reports.HOSTILE)"])
def test_the_summary_fits_eighty_columns_and_holds_no_control(name):
    _, seen = run_in_terminal(summary_script(name))
    words = COLOUR.sub("", seen).replace("\r\n", "\n")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2066]", words)
    assert max(len(line) for line in words.splitlines()) <= 80
    assert COLOUR.search(seen)


def test_the_plain_summary_says_the_same(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", summary_script("reports.full()")],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONUTF8": "1"},
    )
    assert done.stdout == ""
    assert "\x1b" not in done.stderr
    for expected in (
        "✓ pass  SmolLM2-135M-Instruct is 5.21× faster and 3.39× smaller at 1.12×",
        "All 3 gates pass: perplexity_ratio is 1.12×, allowed max 1.15;",
        "decode_speedup             min 4.0        5.21×        5.03–5.40×   pass",
        "Decode speed               37.1 tok/s   193 tok/s    5.21× faster    5.03–5.40×",
    ):
        assert expected in done.stderr
    assert max(len(line) for line in done.stderr.splitlines()) <= 80


def test_the_summary_names_the_files_that_are_there(tmp_path):
    for name in ("report.html", "model", "compiled/onnxruntime", "serve/vllm"):
        (tmp_path / name).mkdir(parents=True)
    assert summary.written(tmp_path) == tuple(
        tmp_path / name for name in ("report.html", "model", "compiled/onnxruntime", "serve/vllm")
    )


def test_lines_cost_no_import_of_rich():
    script = (
        "import sys\nfrom optikit import progress\n"
        "with progress.make('plain') as p:\n    p.plan(['a'])\n    p.start('a')\n    p.finish('a', 'cached', 1, 1)\n"
        "heavy = {'rich', 'torch', 'numpy', 'pydantic', 'jinja2'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": str(ROOT), "PATH": ""})
