"""Texts and records as anybody's editor writes them."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optikit import records
from optikit.errors import InputMissingError

CHARACTERS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\u2028\u2029\u0085\x0b\x0c\x1c\ufeff"))
ROWS = st.lists(st.dictionaries(CHARACTERS, CHARACTERS | st.integers() | st.none()), min_size=1)


@given(ROWS, st.booleans(), st.booleans(), st.sampled_from(["\n", "\r\n"]), st.sampled_from(["", "\ufeff"]))
def test_records_are_read_back_however_they_are_written(rows, ascii_only, array, end, mark):
    if array and not rows[0]:
        return
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    text = f"[{f',{end}'.join(lines)}]" if array else end.join(lines) + end
    found = list(records.parse(records.decode((mark + text).encode(), "x")))
    assert found == list(enumerate(rows, 1))


@given(CHARACTERS)
def test_a_line_ends_at_its_own_end_only(text):
    assert "\n".join(line for _, line in records.lines(f"{text}")) == "\n".join(
        line for line in text.split("\n") if line.strip()
    )


def test_a_text_is_read_without_its_mark_and_with_one_kind_of_line_end(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\rthree")
    assert records.read(tmp_path / "a") == "one\ntwo\n\rthree"
    with pytest.raises(InputMissingError, match="b doesn't exist"):
        records.read(tmp_path / "b")
    with pytest.raises(InputMissingError, match="not a regular file"):
        records.read(tmp_path)
    (tmp_path / "c").write_bytes("caf\xe9".encode("utf-16-le"))
    with pytest.raises(InputMissingError, match="c is not UTF-8: byte 0xe9 at offset 6"):
        records.read(tmp_path / "c")


@pytest.mark.parametrize("record", ['{"a": "\\ud83d"}', '{"\\udc00": 1}', '{"a": [{"b": "x\\ud83dy"}]}'])
def test_half_a_character_is_refused_by_its_number(record):
    with pytest.raises(InputMissingError, match=r"t\.jsonl: record 2 holds half a surrogate pair"):
        list(records.parse('{"a": "\\ud83d\\ude00"}\n' + record, "t.jsonl"))


def test_deep_nesting_is_no_record():
    deep = '{"a": ' + "[" * 100_000
    assert list(records.parse(deep)) == []
    assert list(records.parse('{"a": 1}\n' + deep)) == [(1, {"a": 1}), (2, deep)]


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ('{"text": "a", "n": 1, "title": "b"}\n{"text": "c"}', ("text", "title")),
        ('\n [{"text": "a"},\n {"text": "b"}]', ("text",)),
        ('{"n": 1}\n', ()),
        ('{\n "data": [\n  {"text": "a"}\n ]\n}', ()),
        ('["a",\n "b"]', ()),
        ("Once upon a time {there} was [one].", None),
        ("[1] A footnote.\n{and another}", None),
        ('{"a": 1, "b"', None),
        ('He said:\n{"text": "a"}', None),
        ("", None),
    ],
)
def test_json_is_told_from_prose(text, fields):
    assert records.json_fields(text) == fields


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()])
def test_what_has_no_end_is_no_text(tmp_path, monkeypatch, make):
    make(tmp_path / "a")
    with pytest.raises(InputMissingError, match="a: not a regular file"):
        records.read(tmp_path / "a")
    monkeypatch.setattr(records, "MOST_BYTES", 10)
    (tmp_path / "b").write_text("x" * 11)
    with pytest.raises(InputMissingError, match="b has more than 10 bytes"):
        records.read(tmp_path / "b")
