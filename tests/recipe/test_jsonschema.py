"""The exported JSON Schema: draft-07, and of one mind with the loader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from optikit import stages
from optikit.errors import RecipeError
from optikit.recipe.jsonschema import export
from optikit.recipe.load import loads
from optikit.recipe.schema import GATE_METRICS, Recipe

SCHEMA = export()
VALIDATOR = Draft7Validator(SCHEMA)


def subschemas(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for child in node.values():
            yield from subschemas(child)
    elif isinstance(node, list):
        for child in node:
            yield from subschemas(child)


def test_is_draft_07() -> None:
    Draft7Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "http://json-schema.org/draft-07/schema#"
    for schema in subschemas(SCHEMA):
        assert not {"prefixItems", "$defs", "discriminator", "unevaluatedProperties"} & set(schema)
        if "$ref" in schema:
            assert set(schema) == {"$ref"}, "draft-07 ignores everything beside a reference"
            assert schema["$ref"].removeprefix("#/definitions/") in SCHEMA["definitions"]
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


def test_every_definition_is_used() -> None:
    used = {schema["$ref"].rsplit("/", 1)[-1] for schema in subschemas(SCHEMA) if "$ref" in schema}
    assert used == set(SCHEMA["definitions"])


def test_every_key_stage_and_option_is_described() -> None:
    assert set(SCHEMA["properties"]) == set(Recipe.model_fields) | {"vars", "extends"}
    assert set(SCHEMA["properties"]["gates"]["properties"]) == set(GATE_METRICS)
    assert all("description" in inner for inner in SCHEMA["properties"].values())
    for verb, methods in stages.registry().items():
        for method in methods:
            others = stages.backend_names(verb, method)
            for backend in others:
                name = f"{verb}-{method}-{backend}" if len(others) > 1 else f"{verb}-{method}"
                written, stage = SCHEMA["definitions"][name], stages.load(verb, method, backend)
                options = stage.Options.model_fields
                key = "engine" if verb == "compile" else "method"
                assert set(written["properties"]) == set(options) | {key, "backend"}
                assert all(written["properties"][name]["description"] for name in options)
                assert written["description"] == stage.SUMMARY


QUANTIZE = {"quantize": {"method": "gptq", "bits": 4, "group_size": 64}}
GOOD: list[dict[str, Any]] = [
    {"model": "m"},
    {"model": "m", "stages": [QUANTIZE, {"quantize": {"method": "rtn", "backend": "optikit"}}]},
    {"model": "m", "stages": [{"quantize": {"method": "awq", "backend": "autoawq", "duo_scaling": False}}]},
    {"model": "m", "stages": [{"quantize": {"method": "awq", "backend": "optikit", "steps": 4}}]},
    {"model": "m", "calibration": {"text": "t", "part": [0, 0.5], "drop_lines": ["x"]}, "timeout": 1.5},
    {"model": "m", "calibration": None, "evaluate": {"perplexity": {"text": "t"}, "speed": {"new_tokens": 4}}},
    {"model": "m", "evaluate": {"baseline": {"dtype": "float32", "also": ["bfloat16"]}}, "seed": 0},
    {"model": "m", "gates": {"perplexity_ratio": {"max": 1}, "decode_speedup": {"min": 2, "max": 9}}},
    {"model": "m", "vars": {"b": 8, "s": "x"}, "stages": [{"quantize": {"method": "gptq", "bits": "${b}"}}]},
]
BAD: list[dict[str, Any]] = [
    {},
    {"modle": "m"},
    {"model": ""},
    {"model": 3},
    {"model": "m", "grop": 1},
    {"model": "m", "stages": {"quantize": {"method": "gptq"}}},
    {"model": "m", "stages": [{}]},
    {"model": "m", "stages": [{"quantize": {"method": "gptq"}, "prune": {"method": "x"}}]},
    {"model": "m", "stages": [{"quantise": {"method": "gptq"}}]},
    {"model": "m", "stages": [{"quantize": {"method": "gptk"}}]},
    {"model": "m", "stages": [{"quantize": {"bits": 4}}]},
    {"model": "m", "stages": [{"quantize": {"method": "awq", "backend": "autoawk"}}]},
    {"model": "m", "stages": [{"quantize": {"method": "awq", "backend": "autoawq", "steps": 4}}]},
    {"model": "m", "stages": [{"quantize": {"method": "awq", "duo_scaling": False}}]},
    {"model": "m", "stages": [{"quantize": {"method": "rtn", "backend": "autoawq"}}]},
    {"model": "m", "stages": [{"quantize": {"method": "gptq", "bits": 3}}]},
    {"model": "m", "stages": [{"quantize": {"method": "gptq", "bits": "4"}}]},
    {"model": "m", "stages": [{"quantize": {"method": "gptq", "grop_size": 64}}]},
    {"model": "m", "stages": [{"quantize": {"method": "gptq", "damp": 2}}]},
    {"model": "m", "stages": [{"quantize": {"method": "gptq", "sym": "no"}}]},
    {"model": "m", "calibration": {"samples": 3}},
    {"model": "m", "calibration": {"text": "t", "part": [0]}},
    {"model": "m", "calibration": {"text": "t", "part": [0, 2]}},
    {"model": "m", "calibration": {"text": "t", "part": [0, 0.5, 1]}},
    {"model": "m", "evaluate": {"perplexity": {"window": 64}}},
    {"model": "m", "gates": {"speed": {"min": 1}}},
    {"model": "m", "gates": {"decode_speedup": {}}},
    {"model": "m", "timeout": 0},
    {"model": "m", "seed": -1},
    {"model": "m", "vars": {"x": [1]}},
    {"model": "m", "extends": 3},
]


@pytest.mark.parametrize("data", GOOD)
def test_good_recipes(data: dict[str, Any]) -> None:
    VALIDATOR.validate(data)
    loads(json.dumps(data), Path("recipe.yaml"))


@pytest.mark.parametrize("data", BAD)
def test_bad_recipes(data: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(data)
    with pytest.raises(RecipeError):
        loads(json.dumps(data), Path("recipe.yaml"))


def test_what_extends_another_may_leave_anything_out() -> None:
    VALIDATOR.validate({"extends": "base.yaml", "calibration": {"samples": 3}, "evaluate": {"perplexity": {}}})
    assert not VALIDATOR.is_valid({"extends": "base.yaml", "calibration": {"smples": 3}})
