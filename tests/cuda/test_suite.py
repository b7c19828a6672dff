"""The suite for a GPU: on one, all of it as a table; here, that a part that fails leaves the others."""

from __future__ import annotations

import json

import pytest

from tests.cuda import parts, sections, suite


def raising(error):
    def do():
        raise error

    return do


def test_a_part_that_fails_is_a_row_and_so_is_one_that_lacks_a_package():
    good, bad, lacking = (
        sections.row(name, do, "cpu")
        for name, do in (
            ("good", lambda: {"gb_per_s": 1.0}),
            ("bad", raising(ValueError("no such thing"))),
            ("lacking", raising(ModuleNotFoundError("…", name="onnxruntime_genai"))),
        )
    )
    assert (good["status"], good["gb_per_s"], good["error"]) == ("ok", 1.0, "")
    assert bad["status"] == "failed"
    assert "ValueError: no such thing" in bad["error"]
    assert (lacking["status"], lacking["error"]) == ("skipped", "needs onnxruntime_genai")
    rows = [{"section": "stages", **row} for row in (good, bad, lacking)]
    made = {"sections": {"stages": {"status": "ok", "seconds": 1.0, "error": ""}}, "rows": rows, "seconds": 1.0}
    made |= {"device": suite.about("cpu"), "versions": {"torch": "2"}, "commit": ""}
    assert suite.failures(made) == 1
    assert "ValueError: no such thing" in suite.table(made)


def test_a_section_without_time_is_named(tmp_path):
    assert suite.section("blocks", tmp_path, "cpu", 1.0) == ({"status": "no time", "seconds": 0.0, "error": ""}, [])


def test_a_section_that_crashes_tells_why(tmp_path):
    told, rows = suite.section("windows", tmp_path, "no-such-device", 100)
    assert rows == [] or rows[0]["status"] == "failed"
    assert told["status"] == "failed" or "no-such-device" in rows[0]["error"]


@pytest.mark.slow
def test_all_of_it_runs_here_with_small_shapes(tmp_path):
    result = suite.run(tmp_path, "cpu", 900)
    assert json.loads((tmp_path / "cuda.json").read_text()) == result
    assert result["dry"]
    assert {row["section"] for row in result["rows"]} == set(suite.LIMITS)
    assert suite.failures(result) == 0, suite.table(result)


@pytest.mark.cuda
def test_a_gpu_finds_what_the_processor_does(tmp_path, capsys):
    """Sums are added up in another order there, so values may round otherwise; names of facts and files may not."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    result = {"sections": {}, "rows": [], "seconds": 0.0, "commit": suite.commit(), "device": suite.about("cuda")}
    result["versions"] = {"torch": torch.__version__}
    result["sections"]["stages"], result["rows"] = suite.section("stages", tmp_path, "cuda", 1200)
    with capsys.disabled():
        print("\n" + suite.table(result))
    assert {row["name"] for row in result["rows"]} == set(parts.PARTS)
    assert suite.failures(result) == 0
