"""YAML 1.2 core schema, marks, refusals and budgets. Run: pytest tests/recipe/test_yaml12.py."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from optikit.recipe import yaml12
from optikit.recipe.node import Marks, Node, plain
from optikit.recipe.yaml12 import compose, resolve


def read(text: str) -> Any:
    document = compose(text, "recipe.yaml")
    assert document.problems == ()
    assert document.root is not None
    return plain(document.root)


def codes(text: str) -> list[tuple[str, int, int]]:
    found = compose(text, "recipe.yaml").problems
    return [(p.code, p.mark.line, p.mark.column) for p in found if p.mark is not None]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # YAML 1.2.2, chapter 10.3.2, and where YAML 1.1 differs
        *((word, None) for word in ("", "~", "null", "Null", "NULL")),
        *((word, True) for word in ("true", "True", "TRUE")),
        *((word, False) for word in ("false", "False", "FALSE")),
        *((word, word) for word in ("yes", "no", "on", "off", "y", "n", "Yes", "NO", "nULL", "tRUE", "None")),
        ("0", 0),
        ("-19", -19),
        ("+3", 3),
        ("012", 12),
        ("0o14", 12),
        ("0x1F", 31),
        ("-0x1F", "-0x1F"),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("190:20:30", "190:20:30"),
        ("2024-01-01", "2024-01-01"),
        ("2024-01-01T10:00:00Z", "2024-01-01T10:00:00Z"),
        ("1e-3", 0.001),
        ("1e3", 1000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.5E+2", -50.0),
        (".", "."),
        ("1e", "1e"),
        ("e3", "e3"),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("+.Inf", math.inf),
        (".inF", ".inF"),
        ("inf", "inf"),
        ("١٢", "١٢"),  # digits of another script are no number
        (str(2**63), 2**63),
        (str(-(2**63)), -(2**63)),
    ],
)
def test_plain_scalars_by_the_core_schema(text: str, value: object) -> None:
    got = resolve(text)
    assert (type(got), got) == (type(value), value)


def test_nan() -> None:
    assert all(math.isnan(float(str(resolve(word)))) for word in (".nan", ".NaN", ".NAN"))


@pytest.mark.parametrize("text", [str(2**64), "-" + str(2**63 + 1), "9" * 5000, "0x" + "F" * 17, "0x" + "F" * 100_000])
def test_integers_beyond_64_bits_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="64 bits"):
        resolve(text)
    assert codes(f"a: {text}") == [("number-too-large", 1, 4)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: \"no\"\nb: '1'\nc: |\n  x\n  y\nd: >-\n  p\n  q\n", {"a": "no", "b": "1", "c": "x\ny\n", "d": "p q"}),
        ("a: !!str 012\nb: !!int '3'\nc: !!float 3\nd: ! 12\n", {"a": "012", "b": 3, "c": 3.0, "d": "12"}),
        ("a: !!map {}\nb: !!seq []\nc: !!null ''\n", {"a": {}, "b": [], "c": None}),
        ("a: &x [1, {b: 2}]\nc: *x\n", {"a": [1, {"b": 2}], "c": [1, {"b": 2}]}),
        ("a: &x 1\nb: &x 2\nc: *x\n", {"a": 1, "b": 2, "c": 2}),
        ("\ufeffa: 1\n", {"a": 1}),
        ("a: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
        ("%YAML 1.2\n---\na: 1\n...\n", {"a": 1}),
        ('"no": 1\n? x\n: 2\n', {"no": 1, "x": 2}),
        ("a: x#y\nb: x #y\n", {"a": "x#y", "b": "x"}),
    ],
)
def test_documents(text: str, value: object) -> None:
    got = read(text)
    assert got == value
    assert json.dumps(got) == json.dumps(value)  # 3 is not 3.0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: 1\nb: 2\na: 3\na: 4\n", [("duplicate-key", 3, 1), ("duplicate-key", 4, 1)]),
        ("x: {k: 1, k: 1}", [("duplicate-key", 1, 11)]),
        ("a: !!python/object/apply:os.system [ls]", [("foreign-tag", 1, 4)]),
        ("a: !Path x\nb: !!set {x}\nc: !!binary eA==", [("foreign-tag", i, 4) for i in (1, 2, 3)]),
        ("a: !!timestamp 2024-01-01", [("foreign-tag", 1, 4)]),
        ("%TAG ! tag:evil,2000:\n---\na: !x b", [("foreign-tag", 3, 4)]),
        ("a: !!int x\nb: !!map [1]", [("foreign-tag", 1, 4), ("foreign-tag", 2, 4)]),
        ("b: &b {x: 1}\na:\n  <<: *b\n", [("merge-key", 3, 3)]),
        ("a: 1\n---\nb: 2\n", [("several-documents", 2, 1)]),
        ("1: a\ntrue: b\n~: c\n? [x]\n: d", [("key-not-text", i, 1) for i in (1, 2, 3)] + [("key-not-text", 4, 3)]),
        ("a:\n\t- 1", [("yaml-syntax", 2, 1)]),
        ("a: @x", [("yaml-syntax", 1, 4)]),
        ("a: b: c", [("yaml-syntax", 1, 5)]),
        ("a: 1\nb: 'x", [("yaml-syntax", 2, 4)]),
        ("a: 1\nb: [1, 2\n", [("yaml-syntax", 2, 4)]),
        ("a: 1\r\nb: \x07", [("yaml-syntax", 2, 4)]),
        ('a: "\\UFFFFFFFF"', [("yaml-syntax", 1, 7)]),
        ("%YAML " + "9" * 5000 + ".1\n---\na: 1", [("yaml-syntax", 1, 7)]),
        ("a: *x", [("unknown-alias", 1, 4)]),
        ("a: &x [*x]", [("unknown-alias", 1, 8)]),
        ('a: "\\ud800"\nb: "\\0"', [("not-text", 1, 4), ("not-text", 2, 4)]),
    ],
)
def test_refused_at_its_place(text: str, found: list[tuple[str, int, int]]) -> None:
    assert codes(text) == found


LAUGHS = 'a: &a ["x","x","x","x","x","x","x","x","x"]\n' + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
DEEP_BY_ALIASES = (
    "a0: &a0 " + "[" * 30 + "]" * 30 + "\n" + "a1: &a1 " + "[" * 30 + "*a0" + "]" * 30 + "\nb: [[[[*a1]]]]"
)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        DEEP_BY_ALIASES,
        "[" * 20_000,
        "{" * 20_000,
        "- " * 20_000,
        "? " * 20_000,
        "x: &x 1\ny: [" + "*x, " * (yaml12.MAX_ALIASES + 1) + "]",
        "x: &a " + "a" * 200_000 + "\ny: [" + ", ".join(["*a"] * 90) + "]",
        "#" * (yaml12.MAX_CHARACTERS + 1),
    ],
    ids=["laughs", "deep-by-aliases", "brackets", "braces", "dashes", "questions", "aliases", "characters", "size"],
)
def test_budgets(text: str) -> None:
    start = time.process_time()
    document = compose(text, "recipe.yaml")
    assert [p.code for p in document.problems] == ["too-large"]
    assert document.root is None
    assert time.process_time() - start < 20  # a bomb is refused, not expanded; about 0.3 s on an idle core


def test_node_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml12, "MAX_NODES", 10)
    assert read("[1, 2, 3, 4, 5, 6, 7, 8, 9]") == list(range(1, 10))
    assert codes("[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]") == [("too-large", 1, 29)]


def test_depth_budget_is_exact() -> None:
    depth = yaml12.MAX_DEPTH
    assert read("[" * depth + "]" * depth) is not None
    assert codes("[" * (depth + 1) + "]" * (depth + 1)) == [("too-large", 1, depth + 1)]


def test_marks() -> None:
    text = "model: ./x   # c\nstages:\n  - quantize: {method: gptq,\n      bits: 4}\nnote: 'é ü'\n"
    document = compose(text, "r.yaml")
    assert document.root is not None
    marks = Marks(document.root)
    place = {
        ("model",): (1, 8, 3),
        ("stages",): (2, 1, 6),  # a mapping or list is shown by its key
        ("stages", 0, "quantize"): (3, 5, 8),
        ("stages", 0, "quantize", "bits"): (4, 13, 1),
        ("stages", 0, "quantize", "absent"): (3, 5, 8),  # nearest around it
        ("stages", 0, "quantize", "bits", "deeper"): (4, 13, 1),
        ("stages", 7): (2, 1, 6),
        ("note",): (5, 7, 5),
        (): (1, 1, 1),
    }
    for loc, expected in place.items():
        mark = marks.mark(loc)
        assert mark is not None
        assert (mark.line, mark.column, mark.width) == expected, loc
        assert mark.text == text.splitlines()[mark.line - 1]
    key = marks.key(("stages", 0, "quantize", "bits"))
    assert key is not None
    assert (key.line, key.column, key.width) == (4, 7, 4)


def test_an_alias_is_marked_where_it_stands() -> None:
    root = compose("a: &x 1\nb: *x\n", "r.yaml").root
    assert root is not None
    mark = Marks(root).mark(("b",))
    assert mark is not None
    assert (mark.line, mark.column, mark.width) == (2, 4, 2)


# What JSON can say and YAML's reader lets through unescaped; keys shorter than YAML's 1024 characters.
printable = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff\ufffe\uffff\u2028\u2029")
texts = st.text(printable, max_size=40)
numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
json_data = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(texts.filter(lambda k: k != "<<"), inner, max_size=5),
    max_leaves=25,
)


def same(left: object, right: object) -> bool:
    """Equal in value and type: 1, 1.0 and True differ."""
    return json.dumps(left) == json.dumps(right)


@given(json_data, st.sampled_from([None, 2]))
def test_json_reads_as_itself(data: Any, indent: int | None) -> None:
    assert same(read(json.dumps(data, ensure_ascii=False, indent=indent)), data)


@given(json_data)
def test_quoted_and_tagged_yaml_reads_back(data: Any) -> None:
    # PyYAML writes numbers as !!int "3" and text as "…": nothing is left to guess, 1.1 and 1.2 must agree.
    assert same(read(yaml.safe_dump(data, default_style='"', allow_unicode=True, sort_keys=False)), data)


words = st.text(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=8).filter(
    lambda w: w[0] not in "eE"
)
block_data = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=20,
)


def leaves(node: Node) -> Iterator[Node]:
    if isinstance(node.value, dict | tuple):
        for child in node.value.values() if isinstance(node.value, dict) else node.value:
            yield from leaves(child)
    else:
        yield node


@given(block_data)
def test_block_yaml_reads_back_with_exact_marks(data: Any) -> None:
    text = yaml.safe_dump(data, sort_keys=False, width=10**6)
    root = compose(text, "r.yaml").root
    assert root is not None
    assert same(plain(root), data)
    for leaf in leaves(root):
        there = leaf.mark.text[leaf.mark.column - 1 :][: leaf.mark.width]
        assert there.strip("'\"") == leaf.source


pieces = st.sampled_from([
    *"[]{}:,-?&*!|>'\"%@`#~ \n\t\r\0\ufeff\x85\u2028\ud800",
    *("---", "...", ": ", "- ", "\n  ", "&a", "*a", "<<", "!!int ", "%TAG ! x", "%YAML 1.1\n"),
    *('"\\x', '"\\U', "0x", "1e", ".inf", "a", "key", "12", "${x}"),
])  # fmt: skip


@given(st.lists(pieces, max_size=60).map("".join) | st.text(max_size=200))
def test_compose_never_raises(text: str) -> None:
    document = compose(text, "r.yaml")
    assert all(p.mark is not None and p.mark.line >= 1 and p.mark.column >= 1 for p in document.problems)
    if document.root is not None:
        json.dumps(plain(document.root))
