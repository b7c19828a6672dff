"""Keys: one value, one key; another value, another key; nothing that can leave a directory."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.store.keys import cache_key, is_key, valid

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6)


@settings(max_examples=40)
@given(parts=st.dictionaries(st.text(min_size=1), values))
def test_the_order_of_names_does_not_matter(parts: dict[str, Any]) -> None:
    assert cache_key(**parts) == cache_key(**dict(reversed(parts.items())))


@settings(max_examples=60)
@given(one=values, other=values)
def test_different_values_have_different_keys(one: Any, other: Any) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (cache_key(value=one) == cache_key(value=other)) is same


def test_one_meaning_has_one_form() -> None:
    assert cache_key(a=(1, 2)) == cache_key(a=[1, 2])
    assert cache_key(a={"x", "y"}) == cache_key(a=frozenset(["y", "x"])) == cache_key(a=["x", "y"])
    assert cache_key(a=MappingProxyType({"x": 1})) == cache_key(a={"x": 1})
    assert len({cache_key(a=value) for value in (1, 1.0, True, "1", None, [1])}) == 6


@pytest.mark.parametrize("bad", [Path("a"), object(), {1: 2}, b"x", {"a": [Path()]}])
def test_what_has_no_single_form_is_refused(bad: Any) -> None:
    with pytest.raises(TypeError):
        cache_key(value=bad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_equal_nothing_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="cache key"):
        cache_key(value=bad)


@pytest.mark.parametrize("text", ["", "a" * 63, "a" * 65, "A" * 64, "../" + "a" * 61, "a" * 64 + "\n", "g" * 64])
def test_only_64_hex_digits_are_a_key(text: str) -> None:
    assert not is_key(text)
    with pytest.raises(ValueError, match="not a key"):
        valid(text)
