"""What varies in a recipe: combinations, names, places of what is wrong, and the YAML that variants are written in."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from optikit.errors import RecipeError
from optikit.recipe import variants, yaml_text
from optikit.recipe.load import load
from optikit.recipe.node import plain
from optikit.recipe.sweep_section import Budget, parse_budget, pieces
from optikit.recipe.yaml12 import compose

RECIPE = """\
model: some/model
vars: {group: 32}
stages:
  - quantize: {method: rtn, bits: 4, group_size: "${group}"}
"""
SECTION = """\
sweep:
  vary:
    stages[0].quantize.bits: [4, 5.5, 8]
    vars.group: [32, 64]
"""
Read = Callable[..., variants.Varied]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def write(text: str = RECIPE + SECTION, **asked: Any) -> variants.Varied:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return variants.read(path, **asked)

    return write


def problem(read: Read, text: str = RECIPE, **asked: Any) -> tuple[str, str]:
    """Return the place and the sentence of the one problem that is found."""
    with pytest.raises(RecipeError) as raised:
        read(text, **asked)
    (found,) = raised.value.problems
    assert found.fix
    assert found.mark is not None
    return f"{Path(found.mark.file).name}:{found.mark.line}:{found.mark.column}", found.message


def test_every_combination_is_a_recipe_with_a_name_and_what_is_wrong_with_it_at_its_place(read: Read) -> None:
    varied = read()
    found = [varied.variant(choice) for choice in varied.choices()]
    assert [each.name for each in found] == [
        *("bits-4_group-32", "bits-4_group-64", "bits-5.5_group-32"),
        *("bits-5.5_group-64", "bits-8_group-32", "bits-8_group-64"),
    ]
    good = [each.loaded for each in found if each.loaded]
    options = [(each.recipe.stages[0].options.bits, each.recipe.stages[0].options.group_size) for each in good]  # type: ignore[attr-defined]
    assert options == [(4, 32), (4, 64), (8, 32), (8, 64)]
    assert all("sweep" not in each.written and "vars" not in each.written for each in good)
    (wrong,) = found[2].problems
    assert wrong.mark is not None
    assert (wrong.mark.line, wrong.mark.column, wrong.code) == (7, 34, "bad-choice")


def test_the_command_line_adds_to_what_varies_and_goes_before_it(read: Read) -> None:
    varied = read(varied=["stages[0].quantize.bits=8", "target=cpu,l4"], overrides=["seed=7"])
    found = [varied.variant(choice) for choice in varied.choices()]
    assert [each.name for each in found] == [f"group-{g}_target-{t}" for g in (32, 64) for t in ("cpu", "l4")]
    assert {each.loaded.recipe.seed for each in found if each.loaded} == {7}


def test_whole_stacks_vary_and_are_called_by_their_methods(read: Read) -> None:
    stacks = "[{quantize: {method: rtn, bits: 4}}],[{quantize: {method: nf4}}],[]"
    varied = read(RECIPE, varied=[f"stages={stacks}"])
    found = [varied.variant(choice) for choice in varied.choices()]
    assert [each.name for each in found] == ["stages-rtn4", "stages-nf4", "stages-x"]
    assert [len(each.loaded.recipe.stages) for each in found if each.loaded] == [1, 1, 0]


@pytest.mark.parametrize(
    ("varied", "place", "words"),
    [
        ("model", "--vary:1:1", "has no '='"),
        ("stages[0].quantize.bits=4,4", "--vary:1:27", "the same value twice"),
        ("sweep.seed=1,2", "--vary:1:1", "can't vary"),
        ("extends=a,b", "--vary:1:1", "can't vary"),
        ("a b=1", "--vary:1:2", "no path of keys"),
        ("model=[", "--vary:1:7", ""),
    ],
)
def test_what_is_wrong_with_an_argument_is_told_where_it_stands(
    read: Read, varied: str, place: str, words: str
) -> None:
    where, said = problem(read, varied=[varied])
    assert where == place
    assert words in said


@pytest.mark.parametrize(
    ("section", "place", "words"),
    [
        ("sweep: {vary: {model: 4}}", "recipe.yaml:5:23", "must be a list"),
        ("sweep: {vary: {model: []}}", "recipe.yaml:5:16", "has no values"),
        ("sweep: {vary: {model: [a]}, serach: grid}", "recipe.yaml:5:29", "unknown key 'serach'"),
        ("sweep: {vary: {model: [a]}, search: all}", "recipe.yaml:5:37", "can't be 'all'"),
        ("sweep: {vary: {model: [a]}, budget: later}", "recipe.yaml:5:37", "budget can't be 'later'"),
        ("sweep: {vary: {model: [a]}, samples: 0}", "recipe.yaml:5:38", "at least 1"),
    ],
)
def test_what_is_wrong_with_the_section_is_told_where_it_stands(
    read: Read, section: str, place: str, words: str
) -> None:
    where, said = problem(read, RECIPE + section + "\n")
    assert where == place
    assert words in said


def test_nothing_that_varies_is_refused(read: Read) -> None:
    with pytest.raises(RecipeError, match="nothing of recipe"):
        read(RECIPE)


def test_more_than_a_thousand_combinations_have_to_be_drawn(read: Read) -> None:
    many = [f"seed={','.join(map(str, range(40)))}", f"max_memory={','.join(f'{n}GiB' for n in range(1, 41))}"]
    with pytest.raises(RecipeError, match="1600 combinations"):
        read(RECIPE, varied=many)
    drawn = read(RECIPE, varied=many, changed={"search": "random", "samples": 20, "seed": 3}).choices()
    assert len(set(drawn)) == 20
    assert drawn == read(RECIPE, varied=many, changed={"search": "random", "samples": 20, "seed": 3}).choices()
    assert drawn != read(RECIPE, varied=many, changed={"search": "random", "samples": 20, "seed": 4}).choices()


def test_combinations_are_those_of_nested_loops(read: Read) -> None:
    varied = read(RECIPE, varied=["seed=1,2,3", "target=cpu,l4", "timeout=1,2"])
    assert varied.choices() == tuple(itertools.product(range(3), range(2), range(2)))


def test_names_are_unique_short_and_safe(read: Read) -> None:
    long = ",".join(f"'/{'x' * 70}/{n}/m'" for n in range(4))
    varied = read(RECIPE, varied=[f"model={long}", "stages[0].quantize={method: rtn, bits: 4},{method: rtn, bits: 8}"])
    names = [varied.name(choice) for choice in varied.choices()]
    assert len(set(names)) == 8
    assert all(len(name) <= 60 and name.isascii() and "/" not in name and name[0] not in ".-" for name in names)


def test_other_verbs_refuse_a_recipe_that_describes_many_runs(read: Read, tmp_path: Path) -> None:
    read()
    with pytest.raises(RecipeError) as raised:
        load(tmp_path / "recipe.yaml")
    assert [each.code for each in raised.value.problems] == ["sweep-section"]
    assert "optikit sweep" in raised.value.problems[0].fix


def test_relative_paths_of_a_variant_start_where_the_recipe_lies(read: Read, tmp_path: Path) -> None:
    varied = read()
    loaded = varied.variant(varied.choices()[0]).loaded
    assert loaded is not None
    written = tmp_path / "deep" / "variant.yaml"
    written.parent.mkdir()
    written.write_text(yaml_text.dump(loaded.written), encoding="utf-8")
    again = load(written, base=tmp_path)
    assert (again.recipe, again.base) == (loaded.recipe, tmp_path)


@pytest.mark.parametrize(
    ("text", "budget"),
    [("2h", Budget(seconds=7200)), ("1.5 m", Budget(seconds=90)), ("30s", Budget(seconds=30)), ("$20", Budget(usd=20))],
)
def test_budgets(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["2", "0h", "$0", "-1h", "20$", "2 hours", "$", "1e3h", "nan h"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(ValueError, match="; write a time"):
        parse_budget(text)


@given(st.lists(st.sampled_from(["4", "[1, 2]", "'a,b'", '"]"', "{a: [1, {b: 2}]}", "x"]), min_size=1, max_size=6))
def test_commas_part_only_outside_of_brackets_and_quotes(parts: list[str]) -> None:
    text = ",".join(parts)
    assert [text[start:end] for start, end in pieces(text)] == parts


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=12)
SCALARS = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | TEXT
SCALARS |= st.floats(allow_nan=False, allow_infinity=False)
KEYS = TEXT | st.sampled_from(["yes", "null", "a.b", "1", "-", "stages", "y", "~", "0x1"])
DATA = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@given(st.dictionaries(KEYS, DATA, min_size=1, max_size=4))
def test_what_is_written_is_read_as_the_same_by_our_reader_and_by_another(data: dict[str, Any]) -> None:
    text = yaml_text.dump(data)
    document = compose(text, "written")
    assert document.root is not None
    assert document.problems == ()
    assert plain(document.root) == data
    assert yaml.safe_load(text) == data
