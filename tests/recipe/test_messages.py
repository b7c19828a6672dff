"""What an author is told, to the letter. Run: pytest tests/recipe/test_messages.py."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from optikit import stages

Told = Callable[..., str]

STAGE = "model: ./m\nstages:\n  - quantize:\n      method: gptq\n"

GOLDEN: dict[str, tuple[str, tuple[str, ...], str]] = {
    "misspelt key": (
        STAGE + "      grop_size: 64\n",
        (),
        """\
        recipe.yaml:5:7: error: unknown key 'grop_size' [unknown-key]
          5 |       grop_size: 64
            |       ^^^^^^^^^
            = fix: did you mean 'group_size'?
        """,
    ),
    "misspelt key at the top": (
        "modle: ./m\n",
        (),
        """\
        recipe.yaml:1:1: error: missing key 'model' [missing-key]
          1 | modle: ./m
            | ^
            = fix: add `model: …` (Directory, `hf:ORG/NAME@REVISION`, or `pypi:NAME==VERSION[@sha256:HEX][#file]`)

        recipe.yaml:1:1: error: unknown key 'modle' [unknown-key]
          1 | modle: ./m
            | ^^^^^
            = fix: did you mean 'model'?
        """,
    ),
    "wrong type": (
        'model: ./m\ncalibration: {text: t, samples: "64"}\n',
        (),
        """\
        recipe.yaml:2:33: error: samples must be a whole number, not '64' [wrong-type]
          2 | calibration: {text: t, samples: "64"}
            |                                 ^^^^
            = fix: remove the quotes
        """,
    ),
    "YAML 1.1 boolean": (
        STAGE + "      sym: no\n",
        (),
        """\
        recipe.yaml:5:12: error: sym must be true or false, not 'no' [wrong-type]
          5 |       sym: no
            |            ^^
            = fix: write false
        """,
    ),
    "no value": (
        "model: ./m\nstages:\ntarget: # cpu\n",
        (),
        """\
        recipe.yaml:2:8: error: stages must be a list, but has no value [wrong-type]
          2 | stages:
            |        ^
            = fix: begin each stage with '- '

        recipe.yaml:3:8: error: target must be text, but has no value [wrong-type]
          3 | target: # cpu
            |        ^
            = fix: write a value, or remove the key
        """,
    ),
    "unknown method": (
        "model: ./m\nstages:\n  - quantize: {method: gptk}\n",
        (),
        """\
        recipe.yaml:3:24: error: unknown method 'gptk' of quantize (available: @quantize) [unknown-method]
          3 |   - quantize: {method: gptk}
            |                        ^^^^
            = fix: did you mean 'gptq'?
        """,
    ),
    "out of range": (
        STAGE + "      damp: 7\n",
        (),
        """\
        recipe.yaml:5:13: error: damp must be at most 1, not 7 [out-of-range]
          5 |       damp: 7
            |             ^
            = fix: write a number above 0 and at most 1
        """,
    ),
    "not a choice": (
        STAGE + "      bits: 3\n",
        (),
        """\
        recipe.yaml:5:13: error: bits can't be 3 [bad-choice]
          5 |       bits: 3
            |             ^
            = fix: choose from 4, 8
        """,
    ),
    "duplicate key": (
        "model: ./m\ntarget: cpu\nmodel: ./n\n",
        (),
        """\
        recipe.yaml:3:1: error: key 'model' is written twice; first on line 1 [duplicate-key]
          3 | model: ./n
            | ^^^^^
            = fix: keep one of them
        """,
    ),
    "foreign tag": (
        "model: !!python/object/apply:os.exit [ls]\n",
        (),
        """\
        recipe.yaml:1:1: error: model must be text, not a list [wrong-type]
          1 | model: !!python/object/apply:os.exit [ls]
            | ^^^^^
            = fix: write one text

        recipe.yaml:1:8: error: tag '!!python/object/apply:os.exit' is not allowed: a recipe is plain data [foreign-tag]
          1 | model: !!python/object/apply:os.exit [ls]
            |        ^
            = fix: remove the tag
        """,
    ),
    "merge key": (
        "model: ./m\nx: &x {a: 1}\ngates:\n  <<: *x\n",
        (),
        """\
        recipe.yaml:2:1: error: unknown key 'x' [unknown-key]
          2 | x: &x {a: 1}
            | ^
            = fix: choose from model, target, seed, calibration, stages, serve, evaluate, cost, gates, sweep, max_memory, timeout

        recipe.yaml:4:3: error: merge keys ('<<') are not part of YAML 1.2 [merge-key]
          4 |   <<: *x
            |   ^^
            = fix: use `extends: base.yaml`, or write the keys out
        """,  # noqa: E501 - as it is told
    ),
    "tab": (
        "model: ./m\ngates:\n\tsize_ratio: {max: 1}\n",
        (),
        """\
        recipe.yaml:3:1: error: a tab can't indent [yaml-syntax]
          3 |  size_ratio: {max: 1}
            | ^
            = fix: indent with spaces
        """,
    ),
    "undefined variable": (
        "model: ./m\nvars: {seeds: 3}\nseed: ${seed}\ntarget: x-${sed}\n",
        (),
        """\
        recipe.yaml:3:7: error: variable 'seed' is not defined in vars [unknown-variable]
          3 | seed: ${seed}
            |       ^^^^^^^
            = fix: did you mean 'seeds'?

        recipe.yaml:4:9: error: variable 'sed' is not defined in vars [unknown-variable]
          4 | target: x-${sed}
            |         ^^^^^^^^
            = fix: did you mean 'seeds'?
        """,
    ),
    "bad --set paths": (
        STAGE,
        ("stages[4].quantize.bits=8", "stages[0].quantise.bits=8", "stages.quantize.bits=8", "sed=1", "seed"),
        """\
        --set:1:7: error: stages has 1 item, number 0: there is no [4] [bad-override]
          1 | stages[4].quantize.bits=8
            |       ^^^
            = fix: count from 0

        --set:2:11: error: stages[0] has no 'quantise' [bad-override]
          2 | stages[0].quantise.bits=8
            |           ^^^^^^^^
            = fix: did you mean 'quantize'?

        --set:3:8: error: stages is a list [bad-override]
          3 | stages.quantize.bits=8
            |        ^^^^^^^^
            = fix: did you mean 'stages[0].quantize.bits'?

        --set:4:1: error: unknown key 'sed' [unknown-key]
          4 | sed=1
            | ^^^
            = fix: did you mean 'seed'?

        --set:5:1: error: 'seed' has no '=' [bad-override]
          5 | seed
            | ^^^^
            = fix: write for example stages[0].quantize.bits=8
        """,
    ),
    "bad --set value": (
        STAGE,
        ("stages[0].quantize.damp=7",),
        """\
        --set:1:25: error: damp must be at most 1, not 7 [out-of-range]
          1 | stages[0].quantize.damp=7
            |                         ^
            = fix: write a number above 0 and at most 1
        """,
    ),
    "unknown gate": (
        "model: ./m\ngates:\n  perplexity_ration: {max: 1.1}\n",
        (),
        """\
        recipe.yaml:3:3: error: unknown metric 'perplexity_ration' [unknown-gate]
          3 |   perplexity_ration: {max: 1.1}
            |   ^^^^^^^^^^^^^^^^^
            = fix: did you mean 'perplexity_ratio'?
        """,
    ),
    "empty gate": (
        "model: ./m\ngates: {size_ratio: {}}\n",
        (),
        """\
        recipe.yaml:2:9: error: a gate needs min or max [bad-value]
          2 | gates: {size_ratio: {}}
            |         ^^^^^^^^^^
            = fix: write for example {max: 1.1}
        """,
    ),
    "method for verb": (
        "model: ./m\nstages:\n  - gptq: {bits: 4}\n",
        (),
        """\
        recipe.yaml:3:5: error: 'gptq' is a method of quantize, not a verb [unknown-verb]
          3 |   - gptq: {bits: 4}
            |     ^^^^
            = fix: write `quantize: {method: gptq}`
        """,
    ),
    "engine, not method": (
        "model: ./m\nstages:\n  - compile: {method: onnxruntime}\n  - compile: {}\n",
        (),
        """\
        recipe.yaml:3:15: error: unknown key 'method' [unknown-key]
          3 |   - compile: {method: onnxruntime}
            |               ^^^^^^
            = fix: compile takes 'engine'

        recipe.yaml:4:5: error: compile has no 'engine' [missing-key]
          4 |   - compile: {}
            |     ^^^^^^^
            = fix: choose from @compile
        """,
    ),
    "options not indented": (
        "model: ./m\nstages:\n  - quantize:\n    method: gptq\n",
        (),
        """\
        recipe.yaml:4:5: error: 'method' stands beside 'quantize', not in it [bad-stage]
          4 |     method: gptq
            |     ^^^^^^
            = fix: indent 'method' below 'quantize'
        """,
    ),
    "shorthand": (
        "model: ./m\nstages: [quantize, {quantize: gptq}]\n",
        (),
        """\
        recipe.yaml:2:10: error: a stage must be a mapping of a verb to its options, not 'quantize' [wrong-type]
          2 | stages: [quantize, {quantize: gptq}]
            |          ^^^^^^^^
            = fix: write for example `- quantize: {method: gptq}`

        recipe.yaml:2:31: error: quantize must be a mapping of options, not 'gptq' [wrong-type]
          2 | stages: [quantize, {quantize: gptq}]
            |                               ^^^^
            = fix: write `quantize: {method: gptq}`
        """,
    ),
    "tuple too short": (
        "model: ./m\ncalibration: {text: t, part: [0.5]}\n",
        (),
        """\
        recipe.yaml:2:24: error: part must have 2 values, not 1 [wrong-length]
          2 | calibration: {text: t, part: [0.5]}
            |                        ^^^^
            = fix: write 2 values
        """,
    ),
    "own validator": (
        "model: ./m\nmax_memory: plenty\n",
        (),
        """\
        recipe.yaml:2:13: error: 'plenty' is not a size [bad-value]
          2 | max_memory: plenty
            |             ^^^^^^
            = fix: write for example 2GiB or 500MB
        """,
    ),
    "empty file": (
        "# nothing yet\n",
        (),
        """\
        recipe.yaml:1:1: error: the recipe is empty [not-a-recipe]
           = fix: write at least `model: …`; `optikit init` makes a recipe to start from
        """,
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_told_to_the_letter(name: str, told: Told) -> None:
    text, overrides, expected = GOLDEN[name]
    for verb, methods in stages.registry().items():
        expected = expected.replace(f"@{verb}", ", ".join(methods))
    assert told(text, *overrides) + "\n" == textwrap.dedent(expected)


def test_extends_in_a_circle(told: Told) -> None:
    expected = """\
    b.yaml:1:10: error: recipes extend each other in a circle: a.yaml → b.yaml → a.yaml [bad-extends]
      1 | extends: a.yaml
        |          ^^^^^^
        = fix: take one `extends` out
    """
    got = told("extends: a.yaml\n", a="extends: b.yaml\n", b="extends: a.yaml\n")
    assert got + "\n" == textwrap.dedent(expected)


def test_problem_of_a_base_is_shown_in_the_base(told: Told) -> None:
    expected = """\
    base.yaml:2:7: error: seed must be at least 0, not -1 [out-of-range]
      2 | seed: -1
        |       ^^
        = fix: write a number at least 0 and below 4294967296
    """
    assert told("extends: base.yaml\n", base="model: ./m\nseed: -1\n") + "\n" == textwrap.dedent(expected)


def test_everything_at_once_in_the_order_of_the_file(told: Told) -> None:
    text = told(
        'modle: x\nseed: "1"\nstages:\n  - quantize: {method: gptq, bts: 4, bits: 5}\n  - qantize: {}\n'
        "  - quantize: {method: awk}\ngates: {speed: {min: 1}}\ntimeout: -1\n",
        "target=4",
    )
    places = [line.split(": error")[0] for line in text.splitlines() if ": error: " in line]
    assert places == [
        "recipe.yaml:1:1",
        "recipe.yaml:1:1",
        "recipe.yaml:2:7",
        "recipe.yaml:4:30",
        "recipe.yaml:4:44",
        "recipe.yaml:5:5",
        "recipe.yaml:6:24",
        "recipe.yaml:7:9",
        "recipe.yaml:8:10",
        "--set:1:8",
    ]


@pytest.mark.parametrize(
    ("named", "reason"),
    [("missing.yaml", "No such file or directory"), (".", "not a regular file"), ("/dev/zero", "not a regular file")],
)
def test_base_that_cannot_be_read(named: str, reason: str, told: Told) -> None:
    first = told(f"extends: {named}\n").splitlines()[0]
    assert first == f"recipe.yaml:1:10: error: can't read {named!r}: {reason} [bad-extends]"


def test_too_many_bases(told: Told, tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"b{number}.yaml").write_text(f"extends: b{number + 1}.yaml\n")
    (tmp_path / "b12.yaml").write_text("model: ./m\n")
    assert "b7.yaml:1:10: error: more than 8 recipes extend one another" in told("extends: b0.yaml\n")
