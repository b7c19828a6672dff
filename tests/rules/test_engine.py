"""The engine: what a rule ranges over, where it points, and what a malformed row does."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from optikit.rules import Placed, Stack, check, rules
from optikit.rules import stack as view
from optikit.rules.conditions import holds
from optikit.rules.engine import _rule, fill
from optikit.targets import rows

spec = importlib.util.spec_from_file_location("stacks", Path(__file__).with_name("stacks.py"))
stacks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stacks)

ROW = {
    "id": "x",
    "when": {"target": {"device": "cpu"}},
    "level": "error",
    "why": "w",
    "fix": "f",
    "source": "s",
    "date": "2026-11-21",
}


def test_empty_stack_has_no_problem():
    assert list(check(Stack(stages=(), target=rows()["cpu"]))) == []


def test_plain_good_stack_has_no_problem():
    case = {"stages": ["prune.depth", "quantize.gptq bits=4", "speculate.medusa heads=3", "compile.onnxruntime"]}
    assert list(check(stacks.stack(case))) == []


def test_every_inverted_pair_is_told():
    case = {"stages": ["compile.onnxruntime", "quantize.gptq", "prune.depth"]}
    found = {(problem.code, problem.loc) for problem in check(stacks.stack(case))}
    assert found == {
        ("order-quantize-after-compile", ("stages", 1, "quantize")),
        ("order-prune-after-compile", ("stages", 2, "prune")),
        ("order-prune-after-quantize", ("stages", 2, "prune")),
    }


def test_points_at_the_option_of_the_compile_stage():
    case = {"target": "trn1.32xlarge", "stages": ["compile.neuron batch_size=1 sequence_length=64 tensor_parallel=4"]}
    (problem,) = check(stacks.stack(case))
    assert problem.code == "neuron-tensor-parallel"
    assert problem.loc == ("stages", 0, "compile", "tensor_parallel")
    assert "4 isn't a degree that trn1.32xlarge supports: 1, 2, 8, 16, 32" in problem.message


def test_serving_words_override_the_compile_stage():
    case = {"target": "trn1.32xlarge", "stages": ["compile.neuron batch_size=1 sequence_length=64 tensor_parallel=4"]}
    assert "neuron-tensor-parallel" not in [
        p.code for p in check(stacks.stack({**case, "serve": {"tensor_parallel": 8}}))
    ]


def test_options_may_be_of_any_type():
    stage = Placed(verb="quantize", method="gptq", options={"bits": "four", "group_size": None, "heads": [1]})
    stack = Stack(stages=(stage,), target=rows()["l4"], serve={"engine": "vllm", "tensor_parallel": "max"})
    assert list(check(stack)) == []


def test_known_words_only():
    with pytest.raises(ValueError, match=r"unknown word 'target\.colour'"):
        _rule({**ROW, "when": {"target": {"colour": "red"}}})
    with pytest.raises(ValueError, match=r"unknown word 'serve\.colour'"):
        _rule({**ROW, "why": "it is {serve.colour}"})


def test_known_levels_only():
    with pytest.raises(ValueError, match="unknown level 'fatal'"):
        _rule({**ROW, "level": "fatal"})


def test_unknown_column_is_refused():
    with pytest.raises(TypeError, match="severity"):
        _rule({**ROW, "severity": "error"})


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ({"target": {"device": "cpu"}}, "stack"),
        ({"stage": {"verb": "prune"}}, "stage"),
        ({"first": {"verb": "prune"}, "second": {"verb": "prune"}}, "pair"),
        ({"final": {"heads": {"not_divisible_by": "$stage.options.n"}}}, "stage"),
    ],
)
def test_range_follows_from_the_words(when, expected):
    assert _rule({**ROW, "when": when}).range == expected


def test_template_shows_values_and_unknowns():
    scope = {"serve": {"flags": frozenset({"b", "a"}), "batch_size": 2}, "fit": {"need_gb": 15.53218}}
    assert fill("{serve.flags} {serve.batch_size} {fit.need_gb} {serve.dtype} {a: b}", scope) == (
        "a, b 2 15.53 unknown {a: b}"
    )


def test_medusa_head_of_a_mistral_has_150_million_weights():
    """Hidden 4096, vocabulary 32,000, an output layer of its own."""
    case = {"stages": ["speculate.medusa heads=5"]}
    from optikit.rules.stack import stages

    ((scope, _),) = stages(stacks.stack(case))
    assert scope["stage"]["head_parameters"] == 4096**2 + 4096 + 32000 * 4096
    assert 145e6 < scope["stage"]["head_parameters"] < 155e6


def test_repairs_name_verbs_and_lists_of_options():
    from optikit.stages import VERBS

    for rule in rules().values():
        for verb, values in rule.repair.items():
            assert verb in VERBS
            assert values


def test_what_the_device_and_the_engine_rule_out_does_not_hold():
    """`check` asks a rule no further where they do; every rule asked of every stack finds the same."""
    for name in list(stacks.CASES)[::5]:
        stack = stacks.stack({key: value for key, value in stacks.CASES[name].items() if key != "near"})
        common = view.common(stack)
        whole = (rule for rule in rules().values() if rule.range == "stack" and holds(rule.when, common) is True)
        assert {rule.id for rule in whole} <= {problem.code for problem in check(stack)}
