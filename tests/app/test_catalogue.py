"""The table of families: what it says is what the stages' own checks say of a model of each row."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from optikit.app.catalogue import families, typical
from optikit.cli.app import app
from optikit.models import architectures
from tests.families import CONFIGS


def test_every_row_is_listed() -> None:
    assert [family.name for family in families()] == list(architectures.rows())
    assert set(CONFIGS) <= {family.name for family in families()}


@pytest.mark.parametrize("name", architectures.rows())
def test_a_typical_model_is_of_its_row(name: str) -> None:
    row = architectures.rows()[name]
    facts = typical(row)
    assert facts.architecture is row
    assert facts.linears


def test_what_a_row_rules_out_is_refused_with_the_reason() -> None:
    found = {family.name: family for family in families()}
    assert "transposed" in found["gpt2"].refused["quantize"]["int8 w8a8"]
    assert "several kinds" in found["qwen3_5_text"].refused["prune"]["depth"]
    assert not found["llama"].refused.get("quantize")
    assert "awq" in found["bloom"].works["quantize"]


def test_it_prints_a_table_json_and_markdown() -> None:
    say = CliRunner()
    table = say.invoke(app, ["models"]).stdout
    assert "qwen3_5_text" in table
    assert max(map(len, table.splitlines())) <= 80
    told = json.loads(say.invoke(app, ["models", "--json"]).stdout)
    assert [each["name"] for each in told] == list(architectures.rows())
    assert say.invoke(app, ["models", "--markdown"]).stdout.startswith("| family | prune |")
