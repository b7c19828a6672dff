"""What others published of GPUs is scaled by weights, says so, and is for stages that exist."""

from __future__ import annotations

from optikit.stages import methods
from optikit.targets import published


def test_a_figure_says_whose_it_is_and_that_it_was_not_measured_here():
    row = published.find("quantize", "int8", "w8a8")
    said = row.told(4 * round(row.parameters))
    assert said.startswith("about 80 min on one A100")
    assert row.source in said
    assert "published, not measured here" in said
    assert row.told(40 * round(row.parameters)).startswith("about 13 h")


def test_rows_are_of_stages():
    named = [name.split(".")[0] for row in published.rows() for name in row.methods]
    assert set(named) <= set(methods("quantize"))
    assert published.find("prune", "gptq") is None
