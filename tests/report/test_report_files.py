"""report.json, .md, .html on disk: whole or not at all, and read back as they were."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from optikit.errors import CannotCreateError, DiskError, InputMissingError, IntegrityError
from optikit.report import compare, former_names, speculation_table, write


def test_what_is_written_is_read_back(full_report, hostile_report, tmp_path):
    for report in (full_report, hostile_report):
        write.write(report, tmp_path / "out")
        assert write.load(tmp_path / "out") == report
        assert write.load(tmp_path / "out" / "report.json") == report
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.json", "report.md"]


def test_the_json_is_the_public_contract(full_report, tmp_path):
    write.write(full_report, tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["schema_version"] == 1
    assert content["result"]["quality"]["perplexity"]["ratio_ci95"] == [1.1042, 1.1377]
    assert content["speedup"]["decode"]["value"] == 5.214


def test_a_missing_report_names_the_file_and_a_fix(tmp_path):
    with pytest.raises(InputMissingError, match=r"report\.json: no such report") as caught:
        write.load(tmp_path)
    assert "optikit run" in caught.value.fix


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema_version": 2}', b"\xff\xfe", b"null"])
def test_what_is_no_report_is_said_to_be_none(content, tmp_path):
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(IntegrityError, match="not a report"):
        write.load(tmp_path)


DEEP = json.loads("[" * 150 + "]" * 150)
UNMEASURED = {
    "a ratio of 0": ({"speedup": {"decode": {"value": 0.0}}}, "speedup.decode is a ratio of 0,"),
    "a ratio of nearly 0": ({"speedup": {"decode": {"value": 1e-320}}}, "speedup.decode is a ratio of"),
    "a size of 400 digits": ({"baseline": {"size_bytes": 10**400}}, "baseline.size_bytes is larger than"),
    "a fact of 400 digits": (
        {"steps": {0: {"facts": {"z": {"value": -(10**400)}}}}},
        "steps.0.facts.z.value is larger",
    ),
    "a value": ({"result": {"quality": {"perplexity": {"value": 1e308}}}}, "result.quality.perplexity.value is larger"),
    "nested facts": ({"steps": {0: {"facts": {"z": DEEP}}}}, "steps.0.facts is nested more than 100 deep"),
}


def _merged(into: Any, changes: Mapping[Any, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and key != "facts":
            _merged(into[key], value)
        else:
            into[key] = value


@pytest.mark.parametrize(("changes", "told"), UNMEASURED.values(), ids=UNMEASURED)
def test_what_nothing_measured_is_refused_by_its_place(full_report, tmp_path, changes, told):
    content = json.loads(full_report.model_dump_json())
    _merged(content, changes)
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(IntegrityError) as caught:
        write.load(tmp_path)
    assert told in caught.value.message


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()])
def test_a_report_that_is_no_file_is_not_waited_for(tmp_path, make):
    make(tmp_path / "report.json")
    with pytest.raises((IntegrityError, InputMissingError, DiskError)):
        write.load(tmp_path)


def test_a_report_has_a_size(tmp_path):
    with (tmp_path / "report.json").open("wb") as file:
        file.truncate(2**24 + 1)
    with pytest.raises(IntegrityError, match="more than 16777216 bytes"):
        write.load(tmp_path)


def test_an_older_report_of_the_same_schema_renders_and_compares_under_the_names_of_now(tmp_path):
    recorded = Path(__file__).parent / "recorded" / "schema_1_medusa.json"
    assert {"predicted_alone", "rounded_for_want_of_a_hessian"} < set(re.findall(r"\w+", recorded.read_text()))
    report = write.load(recorded)
    assert report.speculation["predicted_single_drafter"] == {"lookup": 1.7615160191269055, "medusa": 1.0}
    assert list(report.speculation["by_drafter"]) == ["ngram", "lookup"]
    assert {"rtn_fallback", "damping_increased"} < set(report.steps[1].facts)
    write.write(report, tmp_path)
    assert write.load(tmp_path) == report
    page = (tmp_path / "report.md").read_text()
    assert "speed-up predicted for one drafter alone: prompt lookup" in page
    assert "acceptance rate: n-grams of earlier answers" in page
    assert speculation_table.FURTHER not in dict(speculation_table.grouped(report.speculation, drawn=False))
    assert not {*former_names.NOW} & set(re.findall(r"\w+", (tmp_path / "report.json").read_text()))
    assert compare.compare(*(compare.Run(name=name, report=report) for name in "ab")).lines


def test_a_newer_schema_is_refused(full_report, tmp_path):
    content = json.loads(full_report.model_dump_json()) | {"schema_version": 2}
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match="schema_version"):
        write.load(tmp_path)


def test_an_old_file_stays_when_the_new_one_cannot_be_put_in_place(full_report, tmp_path):
    write.write(full_report, tmp_path)
    before = (tmp_path / "report.md").read_bytes()
    with pytest.raises(UnicodeEncodeError):
        write.put(tmp_path / "report.md", "half \ud800")
    assert (tmp_path / "report.md").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_link_and_a_mode_stay_and_a_pipe_is_not_replaced(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    write.put(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CannotCreateError, match="pipe is not a regular file"):
        write.put(tmp_path / "pipe", "x")
    assert not (tmp_path / "pipe").is_file()


def test_a_file_in_the_way_of_the_directory(full_report, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(CannotCreateError, match="out"):
        write.write(full_report, tmp_path / "out")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110 - a device node
def test_a_full_disk_has_its_own_error(tmp_path):
    """Writing to /dev/full fails with the error number of a full disk."""
    (tmp_path / f".report.md.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(DiskError, match="No space left"):
        write.put(tmp_path / "report.md", "x" * 100_000)
    assert not (tmp_path / "report.md").exists()
