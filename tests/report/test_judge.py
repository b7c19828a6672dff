"""Gates: three verdicts, and none on what isn't measured."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from optikit import stages
from optikit.evaluation.latency_limits import Limits
from optikit.plan import check_gates
from optikit.recipe import limits
from optikit.recipe.schema import (
    GATE_METRICS,
    Evaluate,
    Gate,
    Limit,
    PerplexityOptions,
    Recipe,
    ServingOptions,
    SpeedOptions,
    StageEntry,
    TaskOptions,
)
from optikit.report import judge
from optikit.report.judge import Value
from optikit.stage import StageOptions
from optikit.targets import Target


@pytest.mark.parametrize(
    ("interval", "limits", "verdict"),
    [
        ((1.02, 1.08), {"at_most": 1.1}, "pass"),
        ((1.12, 1.18), {"at_most": 1.1}, "fail"),
        ((1.08, 1.12), {"at_most": 1.1}, "inconclusive"),
        ((4.1, 5.0), {"at_least": 4}, "pass"),
        ((3.0, 3.9), {"at_least": 4}, "fail"),
        ((3.9, 4.1), {"at_least": 4}, "inconclusive"),
        ((0.5, 0.6), {"at_least": 0.4, "at_most": 0.7}, "pass"),
        ((0.5, 0.8), {"at_least": 0.4, "at_most": 0.7}, "inconclusive"),
        ((0.1, 0.2), {"at_least": 0.4, "at_most": 0.7}, "fail"),
        ((math.nan, math.nan), {"at_most": 1}, "inconclusive"),
        ((1.1, 1.1), {"at_most": 1.1}, "pass"),
    ],
)
def test_limits_have_three_verdicts(interval, limits, verdict):
    assert judge.limit_verdict(interval, **limits) == verdict


@given(st.floats(-10, 10), st.floats(0, 5), st.floats(-10, 10))
def test_a_verdict_agrees_with_every_point_of_the_interval(middle, half, limit):
    verdict = judge.limit_verdict((middle - half, middle + half), at_most=limit)
    points = [middle - half, middle, middle + half]
    if verdict == "pass":
        assert all(point <= limit for point in points)
    if verdict == "fail":
        assert all(point > limit for point in points)


def test_gates_are_judged_by_name():
    limits = {
        "perplexity_ratio": Gate(max=1.15),
        "decode_speedup": Gate(min=4),
        "size_ratio": Gate(min=0.1, max=0.5),
        "ttft_ms_p50": Gate(max=100),
    }
    values = {
        "perplexity_ratio": Value(value=1.1, ci95=(1.05, 1.14)),
        "decode_speedup": Value(value=4.1, ci95=(3.8, 4.4)),
        "size_ratio": Value(value=0.6),
        "ttft_ms_p50": Value(reason="the result was not timed"),
    }
    judged = {result.name: result for result in judge.judge(limits, values)}
    assert {name: result.verdict for name, result in judged.items()} == {
        "perplexity_ratio": "pass",
        "decode_speedup": "inconclusive",
        "size_ratio": "fail",
        "ttft_ms_p50": "inconclusive",
    }
    assert judged["size_ratio"].limit == "min 0.1, max 0.5"
    assert judged["decode_speedup"].reason == "the interval 3.8 to 4.4 reaches across the limit: measure more"
    assert judged["ttft_ms_p50"].reason == "the result was not timed"
    assert judge.overall(judged.values()) == "fail"


def test_overall_is_the_worst():
    values = {"a": Value(value=1.0), "b": Value(value=1.0, ci95=(0.9, 1.1))}
    assert judge.overall(()) == "pass"
    assert judge.overall(judge.judge({"a": Gate(max=2)}, values)) == "pass"
    assert judge.overall(judge.judge({"a": Gate(max=2), "b": Gate(max=1)}, values)) == "inconclusive"


def recipe(gate, last="compile", **evaluate):
    entries = (StageEntry(verb=last, method=stages.methods(last)[0], options=StageOptions()),) if last else ()
    return Recipe(model="m", stages=entries, evaluate=Evaluate(**evaluate), gates={gate: Gate(max=1)})


@pytest.mark.parametrize("name", list(GATE_METRICS))
def test_every_metric_is_measurable_in_some_recipe_and_not_in_an_empty_one(name):
    tasks = (TaskOptions(name="t", text="t"),)
    everything = {"perplexity": PerplexityOptions(text="t"), "speed": SpeedOptions(), "tasks": tasks}
    everything["serving"] = ServingOptions(limits=Limits(ttft_ms=200))
    assert check_gates.unmeasurable(recipe(name, **everything)) == []
    (problem,) = check_gates.unmeasurable(recipe(name, last="", **everything))
    assert problem.loc == ("gates", name)
    assert "no stages" in problem.message


def test_a_gate_on_a_part_left_out_names_the_part():
    (problem,) = check_gates.unmeasurable(recipe("kl_divergence_mean", speed=SpeedOptions(prompts="p")))
    assert "`evaluate: perplexity`" in problem.message
    assert problem.level == "error"
    (problem,) = check_gates.unmeasurable(recipe("tpot_ms_p50", last="quantize", speed=SpeedOptions(prompts="p")))
    assert "compiled" in problem.message
    assert check_gates.unmeasurable(recipe("size_ratio", last="quantize")) == []
    without = recipe("serving_good_rate", speed=SpeedOptions(prompts="p"), serving=ServingOptions())
    (problem,) = check_gates.unmeasurable(without)
    assert "and there are none" in problem.message


def test_the_verbs_that_gates_know_exist():
    assert "compile" in stages.VERBS


@pytest.mark.parametrize("on_fail", ["stop", "rollback"])
def test_what_is_measured_last_can_neither_stop_nor_roll_back(on_fail):
    made = recipe("decode_speedup", speed=SpeedOptions(prompts="p"))
    strict = made.model_copy(update={"gates": {"decode_speedup": Gate(min=2, on_fail=on_fail)}})
    (problem,) = check_gates.unmeasurable(strict)
    assert (problem.code, problem.loc) == ("gate-measured-last", ("gates", "decode_speedup", "on_fail"))
    assert f"can't {on_fail}" in problem.message
    assert check_gates.unmeasurable(made) == []


def stacked(steps, *stages, metric="perplexity_ratio", **evaluate):
    entries = tuple(StageEntry(verb=verb, method=method, options=StageOptions()) for verb, method in stages)
    gate = Gate.model_validate({"steps": steps})
    return Recipe(model="m", stages=entries, evaluate=Evaluate(**evaluate), gates={metric: gate})


PRUNED = (("prune", "sparsegpt"), ("quantize", "gptq"), ("speculate", "medusa"), ("compile", "onnxruntime"))
SCORED = {"perplexity": PerplexityOptions(text="t")}


@pytest.mark.parametrize("name", ["prune.sparsegpt", "1-prune-sparsegpt"])
def test_a_step_is_named_by_its_method_or_as_the_plan_does(name):
    made = stacked({name: {"max": 1.1}}, *PRUNED, **SCORED)
    assert limits.steps_named(made, name) == ("1-prune-sparsegpt",)
    assert check_gates.unmeasurable(made, scored=["1-prune-sparsegpt"]) == []


@pytest.mark.parametrize(
    ("step", "stages", "message", "fix"),
    [
        ("prune.sparsgpt", PRUNED, "names a step 'prune.sparsgpt' that", "did you mean 'prune.sparsegpt'?"),
        ("wanda", PRUNED[:1], "names a step 'wanda' that", "choose from prune.sparsegpt, 1-prune-sparsegpt"),
        ("prune.wanda", [("prune", "wanda")] * 2, "and that is 2 steps", "choose from 1-prune-wanda, 2-prune-wanda"),
        ("speculate.medusa", PRUNED, "can't judge 3-speculate-medusa: it changes no weights", "name the step before"),
        ("compile.onnxruntime", PRUNED, "no runtime on this machine loads what it writes", "name a step before it"),
    ],
)
def test_a_gate_on_a_step_that_is_not_there_or_not_measured_is_refused_at_its_place(step, stages, message, fix):
    made = stacked({step: {"max": 1.1}}, *stages, **SCORED)
    (problem,) = check_gates.unmeasurable(made, scored=["1-prune-sparsegpt", "2-quantize-gptq"])
    assert problem.loc == ("gates", "perplexity_ratio", "steps", step)
    assert message in problem.message
    assert problem.fix.startswith(fix)


def test_what_is_measured_of_the_result_alone_has_no_steps():
    made = stacked({"prune.sparsegpt": {"min": 2}}, *PRUNED, metric="decode_speedup", speed=SpeedOptions(prompts="p"))
    (problem,) = check_gates.unmeasurable(made)
    assert "can't judge 1-prune-sparsegpt: speed is measured of the result only" in problem.message
    (problem,) = check_gates.unmeasurable(stacked({"prune.sparsegpt": {"min": 2}}, *PRUNED))
    assert "`evaluate: perplexity`" in problem.message
    assert check_gates.unmeasurable(stacked({"quantize.gptq": {"max": 0.5}}, *PRUNED, metric="size_ratio")) == []


def test_a_gate_needs_a_limit_of_the_result_or_of_a_step():
    one = {"size_ratio": Gate(steps={"prune.wanda": Limit(max=1)})}
    assert [each.step for each in limits.asked(one)] == ["prune.wanda"]
    both = {"size_ratio": Gate(max=0.5, steps={"prune.wanda": Limit(max=1, on_fail="stop")})}
    assert [each.step for each in limits.asked(both)] == ["", "prune.wanda"]
    assert [each.step for each in limits.asked(both, "stop")] == ["prune.wanda"]
    for empty in ({}, {"steps": {}}, {"steps": {"prune.wanda": {}}}):
        with pytest.raises(ValidationError, match="a gate needs min or max"):
            Gate.model_validate(empty)


def test_steps_are_judged_by_what_was_measured_after_them():
    limits = {"perplexity_ratio": Gate(max=1.2, steps={"prune.wanda": Limit(max=1.05)})}
    result, step = ({"perplexity_ratio": Value(value=value)} for value in (1.1, 1.08))
    first, second = judge.judge(limits, result, {"prune.wanda": ("1-prune-wanda", step)})
    assert (first.step, first.verdict, second.step, second.verdict) == ("", "pass", "1-prune-wanda", "fail")
    assert judge.describe(second) == "perplexity_ratio after 1-prune-wanda is 1.08, limit max 1.05"
    (_, lost) = judge.judge(limits, result)
    assert (lost.verdict, lost.reason) == ("inconclusive", "not measured")


def test_a_price_is_limited_where_there_is_one():
    made = recipe(check_gates.PRICE, speed=SpeedOptions(prompts="p"))
    priced = Target(name="c7i.large", device="cpu", usd_per_hour=0.1)
    assert check_gates.unmeasurable(made, target=priced) == []
    (problem,) = check_gates.unmeasurable(made, target=Target(name="cpu", device="cpu"))
    assert "limits a price, and target cpu has no price per hour" in problem.message
    (problem,) = check_gates.unmeasurable(made, target=Target(name="l4", device="cuda", usd_per_hour=1))
    assert "charges for an accelerator" in problem.message


@pytest.mark.parametrize(
    ("perplexity", "baseline", "verdict"),
    [
        (49_152.0, 18.0, "fail"),  # every logit the same
        (49_152.0, 49_152.0, "fail"),  # an all-zero model has a ratio of exactly 1
        (49_152.0, None, "fail"),
        (60_000.0, 18.0, "fail"),  # worse than guessing
        (45_000.0, 18.0, "fail"),
        (48_900.0, 49_500.0, None),  # random weights before and after: nothing was lost
        (40_000.0, 18.0, None),
    ],
)
def test_guessing_fails_whatever_the_ratio(perplexity, baseline, verdict):
    found = judge.guessing(perplexity, baseline, 49_152)
    assert (found.verdict if found else None) == verdict
    if found:
        assert (found.value, found.name) == (perplexity, "perplexity")
        assert judge.overall((found,)) == "fail"


def test_all_zero_logits_are_known_by_their_perplexity():
    """Whatever text is scored: the mean of -ln(1/n) is ln(n)."""
    torch = pytest.importorskip("torch")
    logits, targets = torch.zeros(512, 49_152), torch.arange(512)
    perplexity = math.exp(torch.nn.functional.cross_entropy(logits, targets))
    assert "every token gets the same logit" in judge.guessing(perplexity, perplexity, 49_152).reason


def test_nothing_known_is_emitted_and_no_pass():
    assert judge.overall((), known=False) == "emitted"
    assert judge.overall(()) == "pass"
