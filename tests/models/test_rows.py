"""Rows of traits.toml and engines.toml, and that no list of families is left in code."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest

import optikit
from optikit.models import architectures, engines, traits
from optikit.models.facts import Trait

OF_GGUF = {"gguf_names.py", "_tokenizer_from_gguf.py"}
"""Their words are architectures and tokenizers of gguf files, some of which are called like families."""
CODE = sorted(each for each in Path(optikit.__file__).parent.rglob("*.py") if each.name not in OF_GGUF)


def families_listed(text: str) -> Iterator[int]:
    """Yield the lines of tuples, lists, sets and dicts that hold two or more families."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            parts = node.elts
        elif isinstance(node, ast.Dict):
            parts = [*filter(None, node.keys), *node.values]
        else:
            continue
        held = {part.value for part in parts if isinstance(part, ast.Constant)} & set(architectures.names())
        if len(held) > 1:
            yield node.lineno


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_families_are_listed_in_rows_only(path: Path) -> None:
    assert not list(families_listed(path.read_text(encoding="utf-8"))), "ask architectures.known_to instead"


def test_a_list_of_families_is_found() -> None:
    assert list(families_listed('x = 1\nKNOWN = frozenset({"llama", "qwen2"})\n')) == [2]
    assert list(families_listed('NAMES = {"llama": "qwen2"}')) == [1]
    assert not list(families_listed('MODEL = ("llama", "another")'))


def test_rows_of_storage_are_traits() -> None:
    assert set(traits.rows()) <= set(get_args(Trait))
    assert traits.DENSE in traits.rows()


@pytest.mark.parametrize("row", traits.rows().values(), ids=lambda row: row.trait)
def test_what_tells_one_storage_tells_no_other(row: traits.Storage) -> None:
    settings = _chosen(row.config) | ({"config_groups": {"g": _group(row)}} if row.groups or row.weights else {})
    assert [other.trait for other in traits.rows().values() if other.config and other.fits(settings)] == (
        [row.trait] if row.config else []
    )


@pytest.mark.parametrize("row", traits.rows().values(), ids=lambda row: row.trait)
def test_another_value_or_none_does_not_tell_it(row: traits.Storage) -> None:
    for key in row.config:
        assert not row.fits({**row.config, key: "something else"})
        assert key in row.absent or not row.fits({name: row.config[name] for name in row.config if name != key})


def _group(row: traits.Storage) -> dict[str, object]:
    return {"weights": _chosen({**row.groups, **row.weights}), "input_activations": dict(row.groups)}


def _chosen(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with the first of each choice."""
    return {key: value[0] if isinstance(value, list) else value for key, value in values.items()}


def test_every_group_has_to_fit() -> None:
    row = traits.rows()["int8_w8a8"]
    four = {"weights": {"num_bits": 4, "type": "int"}, "input_activations": dict(row.groups)}
    assert row.fits({**row.config, "config_groups": {"a": _group(row)}})
    assert not row.fits({**row.config, "config_groups": {"a": _group(row), "b": four}})
    assert not row.fits({**row.config, "config_groups": {"a": {"weights": dict(row.groups)}}})
    assert not row.fits({**row.config, "config_groups": {}})


def test_an_engine_reads_or_refuses() -> None:
    for row in traits.rows().values():
        assert not set(row.engines) & set(row.refused), row.trait


def test_no_family_takes_another_ones_proofs() -> None:
    """`like` copies names of modules; which engine knows a family, and what gguf calls it, is its own."""
    names = architectures.gguf_names()
    assert len(names) == len(set(names))
    assert "gemma3_text" not in architectures.known_to("onnxruntime")
    assert architectures.known_to("nxd-inference") == ("llama",)


def test_an_unknown_engine_is_a_fault() -> None:
    with pytest.raises(KeyError):
        engines.find("another")
