"""extends, --set, variables, and what a loaded recipe holds. Run: pytest tests/recipe/test_load.py."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optikit.errors import InputMissingError, RecipeError
from optikit.problems import Problem
from optikit.recipe import overrides, variables
from optikit.recipe.load import LoadedRecipe, load, loads
from optikit.recipe.node import plain
from optikit.recipe.render_problems import render_problems, visible
from optikit.recipe.schema import as_written
from optikit.recipe.yaml12 import compose, resolve

FULL = """\
# verbatim
model: ./m
target: cpu
vars: {g: 32, name: wiki, half: 0.50}
calibration: {text: "${name}-${half}.txt", samples: 4, part: [0, 0.8]}
stages:
  - quantize: {method: gptq, bits: 8, group_size: "${g}"}
evaluate:
  perplexity: {text: held.txt}
gates:
  perplexity_ratio: {max: 1.5}
"""


def read(text: str | bytes, *sets: str) -> LoadedRecipe:
    return loads(text, Path("recipe.yaml"), overrides=sets)


def codes(text: str | bytes, *sets: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(text, *sets)
    return [problem.code for problem in caught.value.problems]


def test_loaded_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(FULL.replace("\n", "\r\n").encode())
    loaded = load(path)
    assert loaded.text.encode() == path.read_bytes()
    assert (loaded.path, loaded.base) == (path, tmp_path)
    recipe = loaded.recipe
    assert (recipe.model, recipe.seed, recipe.gates["perplexity_ratio"].max) == ("./m", 0, 1.5)
    assert recipe.calibration is not None
    assert (recipe.calibration.text, recipe.calibration.part) == ("wiki-0.50.txt", (0.0, 0.8))
    (stage,) = recipe.stages
    assert (stage.verb, stage.method, stage.backend) == ("quantize", "gptq", "optikit")
    options = as_written(stage)["quantize"]
    assert (options["bits"], options["group_size"], options["sym"]) == (8, 32, True)
    assert loaded.written["stages"] == [{"quantize": {"method": "gptq", "bits": 8, "group_size": 32}}]
    assert "vars" not in loaded.written
    mark = loaded.marks.mark(("stages", 0, "quantize", "group_size"))
    assert mark is not None
    assert (mark.file, mark.line, mark.column) == (str(path), 7, 51)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


def test_what_is_written_loads_to_the_same_recipe() -> None:
    loaded = read(FULL)
    again = read(json.dumps(loaded.written))
    assert again.recipe == loaded.recipe
    assert again.written == loaded.written


def test_missing_recipe_is_a_missing_input(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(InputMissingError, match="can't read the recipe"):
            load(path)


def test_not_utf8() -> None:
    with pytest.raises(RecipeError) as caught:
        read(b"model: ./m\ntarget: \xff\n")
    (problem,) = caught.value.problems
    assert problem.mark is not None
    assert (problem.code, problem.mark.line, problem.mark.column) == ("not-utf8", 2, 9)
    assert codes("model: ./m\n".encode("utf-16")) == ["not-utf8"]


@pytest.mark.parametrize("text", ["", "# c\n", "~", "x", "[]", "- a\n", "3"])
def test_not_a_mapping(text: str) -> None:
    assert codes(text) == ["not-a-recipe"]


def test_too_large_a_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("#" * 2_000_000)
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert [p.code for p in caught.value.problems] == ["too-large"]


# extends


@pytest.fixture
def family(tmp_path: Path) -> Path:
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases/root.yaml").write_text(FULL)
    (tmp_path / "bases/middle.yaml").write_text("extends: root.yaml\nseed: 3\nvars: {g: 64}\nevaluate:\n  speed: {}\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "extends: bases/middle.yaml\ncalibration: {samples: 9}\nstages:\n  - quantize: {method: rtn}\n"
        "gates: {size_ratio: {max: 1}}\n"
    )
    return path


def test_extends_merges_mappings_and_replaces_lists(family: Path) -> None:
    loaded = load(family)
    assert loaded.written == {
        "model": "./m",
        "target": "cpu",
        "seed": 3,
        "calibration": {"text": "wiki-0.50.txt", "samples": 9, "part": [0, 0.8]},
        "stages": [{"quantize": {"method": "rtn"}}],
        "evaluate": {"perplexity": {"text": "held.txt"}, "speed": {}},
        "gates": {"perplexity_ratio": {"max": 1.5}, "size_ratio": {"max": 1}},
    }
    assert loaded.base == family.parent
    assert loaded.text == family.read_text()
    files = {
        loc: str(mark.file).removeprefix(f"{family.parent}/")
        for loc in (("model",), ("seed",), ("calibration", "samples"), ("calibration", "text"))
        if (mark := loaded.marks.mark(loc))
    }
    assert list(files.values()) == ["bases/root.yaml", "bases/middle.yaml", "recipe.yaml", "bases/root.yaml"]


def test_extends_can_take_a_part_out(tmp_path: Path, family: Path) -> None:
    family.write_text("extends: bases/root.yaml\ncalibration: ~\n")
    assert load(family).recipe.calibration is None


def test_null_takes_out_what_the_base_has_there(family: Path) -> None:
    family.write_text("extends: bases/root.yaml\nevaluate: ~\ngates: {perplexity_ratio: ~}\n")
    assert load(family).written.keys() == {"model", "target", "calibration", "stages", "gates"}
    assert load(family).written["gates"] == {}
    overridden = load(family, overrides=["gates=~", "calibration.part=null"]).written
    assert "gates" not in overridden
    assert "part" not in overridden["calibration"]
    for alone in ("model: m\nevaluate: ~\n", "model: m\ngates: {perplexity_ratio: ~}\n"):
        assert codes(alone) == ["wrong-type"]
    with pytest.raises(RecipeError):  # a stage's number is its name
        load(family, overrides=["stages[0].quantize=null"])


def test_extends_must_be_a_name(tmp_path: Path) -> None:
    for value in ("3", "[a.yaml]", "''", "~"):
        assert codes(f"extends: {value}\nmodel: m\n") == ["bad-extends"]


# variables

LONG = "vars: {x: " + "y" * 100_000 + "}\nmodel: m\n"


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("${int}", 4),
        ("${float}", 0.1),
        ("${yes}", True),
        ("${text}", "wiki"),
        ("a-${int}-${float}-${yes}-${text}", "a-4-0.10-true-wiki"),
        ("$${int}", "${int}"),
        ("$${int}${int}", "${int}4"),
        ("$int $ {int}", "$int $ {int}"),
        ("${zero}", 12),
        ("v${zero}", "v012"),
    ],
)
def test_variables(written: str, value: object) -> None:
    text = "vars: {int: 4, float: 0.10, yes: true, text: wiki, zero: 012}\na: [{b: '" + written + "'}]\n"
    root = compose(text, "r").root
    assert root is not None
    tree, problems = variables.substitute(root)
    assert problems == ()
    assert plain(tree) == {"a": [{"b": value}]}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("model: ${x}", "unknown-variable"),
        ("model: a${x}b", "unknown-variable"),
        ("vars: {x: 1}\nmodel: ./${x", "bad-variable"),
        ("model: ${env:HOME}", "bad-variable"),
        ("model: ${1+1}", "bad-variable"),
        ("model: ${}", "bad-variable"),
        ("vars: {x: [1]}\nmodel: m", "bad-variable"),
        ("vars: {x: ~}\nmodel: m", "bad-variable"),
        ("vars: {x: '${y}', y: 1}\nmodel: m", "bad-variable"),
        ("vars: {'x y': 1}\nmodel: m", "bad-variable"),
        ("vars: 3\nmodel: m", "bad-variable"),
        (LONG + "calibration: {text: t, drop_lines: [" + "'${x}'," * 99 + "]}", "too-large"),
        (LONG + "target: '" + "a${x}" * 99 + "'", "too-large"),
    ],
)  # fmt: skip
def test_variables_refused_once(text: str, code: str) -> None:
    assert codes(text) == [code]


def test_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hush")
    with pytest.raises(RecipeError) as caught:
        read("model: ${SECRET}")
    assert "hush" not in str(caught.value.problems)


# --set


@pytest.mark.parametrize(
    ("override", "loc", "value"),
    [
        ("seed=7", ("seed",), 7),
        ("stages[0].quantize.bits=4", ("stages", 0, "quantize", "bits"), 4),
        ("stages[0]={quantize: {method: rtn}}", ("stages", 0), {"quantize": {"method": "rtn"}}),
        ("stages=[]", ("stages",), []),
        ("calibration.part=[0.1, 0.2]", ("calibration", "part"), [0.1, 0.2]),
        ("calibration.part[0]=0.1", ("calibration", "part", 0), 0.1),
        ("gates.size_ratio.max=1e-1", ("gates", "size_ratio", "max"), 0.1),
        ("evaluate.speed.new_tokens=9", ("evaluate", "speed", "new_tokens"), 9),
        ("model=a=b", ("model",), "a=b"),
        ('model="123"', ("model",), "123"),
        ("target= no ", ("target",), "no"),
        ("model=pypi:x==1#f*&!", ("model",), "pypi:x==1#f*&!"),
        ("vars.g=128", ("stages", 0, "quantize", "group_size"), 128),
        ("model=${name}/x", ("model",), "wiki/x"),
    ],
)
def test_set(override: str, loc: tuple[str | int, ...], value: object) -> None:
    got: Any = read(FULL, override).written
    for part in loc:
        got = got[part]
    assert got == value
    assert type(got) is type(value)


def test_later_overrides_win_and_the_others_stay() -> None:
    written = read(FULL, "seed=1", "seed=2", "calibration.samples=5").written
    assert written == {
        **read(FULL).written,
        "seed": 2,
        "calibration": {**read(FULL).written["calibration"], "samples": 5},
    }


@pytest.mark.parametrize(
    "override",
    [
        "",
        "=1",
        "a",
        "a.=1",
        ".a=1",
        "a..b=1",
        "a[=1",
        "a[-1]=1",
        "a[x]=1",
        "a b=1",
        "model.x=1",
        "model[0]=1",
        "seed[0]=1",
        "stages[1]=1",
        "stages[99999999999]=1",
        "stages.bits=1",
        "stages[0].prune.sparsity=1",
        "extends=x.yaml",
        "seed=[1",
        "seed={a: !x 1}",
        "seed=\udcff",
        "seed=" + "9" * 30,
        ".".join(["a"] * 99) + "=1",
    ],
)
def test_set_refused(override: str) -> None:
    assert "bad-override" in codes(FULL, override)


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff\ufffe\uffff\u2028\u2029"))
)


@given(scalars)
def test_any_scalar_can_be_set(value: object) -> None:
    root = compose("a: {b: [1, 2]}", "r").root
    assert root is not None
    text = json.dumps(value, ensure_ascii=False)
    tree, problems = overrides.apply(root, [f"a.b[1]={text}", f"c.d={text}"])
    assert problems == ()
    assert json.dumps(plain(tree)) == json.dumps({"a": {"b": [1, value]}, "c": {"d": value}})


@given(st.text())
def test_bare_text_is_a_plain_scalar_or_refused(text: str) -> None:
    root = compose("{}", "r").root
    assert root is not None
    tree, problems = overrides.apply(root, [f"a={text}"])
    if problems:
        assert [p.code for p in problems] == ["bad-override"]
    elif not text.strip().startswith(("[", "{", '"', "'")):
        got, expected = plain(tree)["a"], resolve(text.strip())
        assert got == expected or (math.isnan(got) and math.isnan(float(str(expected))))


# nothing but RecipeError


def attempt(text: str | bytes, *sets: str) -> LoadedRecipe | tuple[Problem, ...]:
    try:
        return read(text, *sets)
    except RecipeError as error:
        return error.problems


words = st.sampled_from([
    *"[]{}:,-&*!|>'\"%@`#~ \n\t\0",
    *(": ", "\n- ", "\n  ", "model: m\n", "vars: ", "${a}", "$${", "${", "stages:\n", "<<"),
    *("  - quantize: ", "method: gptq", "bits: ", "evaluate: ", "gates: ", "extends: x.yaml\n", "calibration: "),
    *("{max: 1}", "perplexity_ratio", "speed: {}", "perplexity: ", "{text: a, part: ", "[0, 1]", ".nan", "1e400"),
])  # fmt: skip
documents = st.lists(words, max_size=40).map("".join) | st.text(max_size=300)


@given(documents | st.binary(max_size=200), st.lists(st.text(max_size=20) | documents, max_size=2))
def test_loading_raises_nothing_but_recipe_errors(text: str | bytes, sets: list[str]) -> None:
    outcome = attempt(text, *sets)
    if isinstance(outcome, LoadedRecipe):
        assert json.loads(json.dumps(outcome.written, allow_nan=False)) == outcome.written
    else:
        assert outcome
        assert all(p.mark is not None and p.message for p in outcome)
        assert all(line == visible(line) for line in render_problems(outcome).split("\n"))


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats()
    | st.sampled_from(["gptq", "rtn", "x", "4", "2GiB", ""]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "max", "bits", "method"]), inner)
    ),
    max_leaves=6,
)
keys = ["model", "target", "seed", "calibration", "stages", "evaluate", "gates", "max_memory", "timeout", "vars", "x"]


@given(
    st.dictionaries(st.sampled_from(keys), junk),
    st.lists(st.dictionaries(st.sampled_from(["quantize", "prune"]), junk)),
)
def test_wrong_shapes_are_problems_with_marks(data: dict[str, Any], stages: list[Any]) -> None:
    text = json.dumps({"stages": stages, **data}).replace("NaN", ".nan").replace("Infinity", ".inf")
    outcome = attempt(text)
    assert isinstance(outcome, LoadedRecipe) or all(p.mark is not None for p in outcome)


def test_an_unknown_target_is_told_beside_what_else_is_wrong(tmp_path):
    text = "model: m\ntarget: cpuu\nstages: [{quantize: {method: gtpq}}]\n"
    with pytest.raises(RecipeError) as caught:
        loads(text, tmp_path / "r.yaml", known_targets=("cpu", "l4"))
    assert [problem.code for problem in caught.value.problems] == ["unknown-target", "unknown-method"]
    assert str(caught.value.problems[0].mark).endswith("r.yaml:2:9")
    assert loads("model: m\ntarget: my-box\nstages: []\n", tmp_path / "r.yaml").recipe.target == "my-box"
