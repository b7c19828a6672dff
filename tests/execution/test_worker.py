"""The worker as a process: what it answers, with which exit code, also where there is no room for an answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from optikit.errors import Exit
from tests.execution.toys import write_job
from tests.process.children import small_disk


def work(place: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "optikit.execution.worker", str(directory)]
    environ = os.environ | {"PYTHONPATH": str(place)}
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


def test_an_answer(tmp_path: Path) -> None:
    directory = write_job(tmp_path, "job.progress(1, 2, 'block'); return {'bits': options.bits}")
    done = work(tmp_path, directory)
    assert done.returncode == 0, done.stderr
    response = json.loads((directory / "response.json").read_text())
    assert (response["ok"], response["facts"]) == (True, {"bits": 3})
    assert response["seconds"] >= 0
    assert 5 < response["peak_memory_mib"] < 2000
    assert list(response["versions"]) == ["pydantic"]
    assert json.loads((directory / "events.jsonl").read_text()) == {"done": 1, "total": 2, "what": "block"}


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("raise ValueError('odd')", Exit.STAGE_FAILED, "ValueError: odd"),
        ("from optikit.errors import RefusedError\n    raise RefusedError('no', fix='ask')", Exit.REFUSED, "no"),
        ("bytearray(2**60)", Exit.OUT_OF_MEMORY, "MemoryError"),
        ("open('/dev/full', 'w').write('x' * 10**6)", Exit.IO, "No space left on device"),
        ("import sys; sys.exit(3)", Exit.STAGE_FAILED, "SystemExit: 3"),
    ],
)
def test_a_failure_crosses_the_border_and_is_the_exit_code(tmp_path: Path, body: str, code: Exit, said: str) -> None:
    directory = write_job(tmp_path, body)
    done = work(tmp_path, directory)
    response = json.loads((directory / "response.json").read_text())
    assert (done.returncode, response["ok"], response["code"]) == (code, False, code)
    assert said in response["message"]
    assert response["traceback"] in done.stderr


def test_the_peak_is_its_own_not_that_of_who_started_it(tmp_path: Path) -> None:
    """The kernel's maximum survives exec: a worker that was started by a large process would report that one's."""
    directory = write_job(tmp_path, "return {}")
    code = (
        "import subprocess, sys\nheld = b'x' * (600 << 20)\n"
        "sys.exit(subprocess.run([sys.executable, '-m', 'optikit.execution.worker', sys.argv[1]]).returncode)"
    )
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code, str(directory)], env=environ, check=True)
    assert json.loads((directory / "response.json").read_text())["peak_memory_mib"] < 500


FILL = """import os
    filler = os.open(job.dest / 'filler', os.O_WRONLY | os.O_CREAT)
    try:
        while os.write(filler, bytes(4096)): pass
    except OSError:
        if {fails}: raise
    return {{}}"""


@pytest.mark.parametrize("fails", [False, True])
def test_no_room_for_an_answer_is_an_exit_code(tmp_path: Path, fails: bool) -> None:
    with small_disk(tmp_path / "disk") as disk:
        directory = write_job(tmp_path, FILL.format(fails=fails), directory=disk / "job")
        done = work(tmp_path, directory)
        assert done.returncode == Exit.IO
        assert not (directory / "response.json").exists()
    assert "No space left on device" in done.stderr


def test_a_job_that_is_not_there(tmp_path: Path) -> None:
    done = work(tmp_path, tmp_path / "nothing")
    assert done.returncode == Exit.STAGE_FAILED
    assert "FileNotFoundError" in done.stderr


def test_a_model_directory_that_nothing_can_load_is_no_result(tmp_path: Path, tiny_llama: Path) -> None:
    copied = f"import shutil; shutil.copytree({str(tiny_llama)!r}, job.dest, dirs_exist_ok=True)"
    whole = write_job(tmp_path, f"{copied}; return {{}}", writes="model", source=tiny_llama)
    assert work(tmp_path, whole).returncode == 0
    counts = json.loads((whole / "response.json").read_text())["facts"]["tensors"]
    assert counts == {"same": 20, "changed": 0, "replaced": 0, "dropped": {}}
    lost = "import json; path = job.dest / 'config.json'; told = json.loads(path.read_text())"
    body = f"{copied}; {lost}; path.write_text(json.dumps(told | {{'tie_word_embeddings': False}})); return {{}}"
    directory = write_job(tmp_path, body, directory=tmp_path / "lost", writes="model", source=tiny_llama)
    assert work(tmp_path, directory).returncode == Exit.INTEGRITY
    assert "no tensor lm_head.weight" in json.loads((directory / "response.json").read_text())["message"]
