"""Recommendations: legal, ranked by floors, honest about quality, and a recipe that loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from optikit.app import measure_best
from optikit.app.recommend import candidates, evidence, facts_of, measured, reasons, recipe, within
from optikit.cli.recommend import recommend
from optikit.errors import InterruptError, OptikitError, RecipeError, TerminatedError, UsageError
from optikit.stages import VERBS
from optikit.store.sources import resolve_model
from optikit.store.store import Store
from optikit.targets import rows
from optikit.targets.estimate import price_words
from tests.models import gguf_files
from tests.rules import stacks

MODEL = stacks.facts({})
CPU = replace(rows()["cpu"], memory_gib=64.0, bandwidth_gb_s=40.0)
app = typer.Typer()
app.command()(recommend)


def pruned(one):
    return any(verb == "prune" for verb, _, _ in one.stages)


def test_best_first_and_every_one_legal():
    ranked = within(candidates(MODEL, CPU), None)
    good = [one for one in ranked if not pruned(one)]
    assert ranked[: len(good)] == good, "of what pruning loses nothing is known: it comes last"
    assert [one.gain for one in good] == sorted((one.gain for one in good), reverse=True)
    assert good[0].name == "awq 4-bit + lookup + onnxruntime"
    assert good[0].drafting["speedup"] == 2.4
    assert all(one.legal and one.floors.fits for one in good)
    assert all(
        [verb for verb, _, _ in one.stages] == sorted((v for v, _, _ in one.stages), key=VERBS.index) for one in good
    )


def test_gain_is_bytes_when_the_bandwidth_is_not_known():
    of = [candidates(MODEL, replace(CPU, **none)) for none in ({"bf16_tflops": None}, {"bandwidth_gb_s": None})]
    known, unknown = ({one.name: one.gain for one in ranked if not pruned(one)} for ranked in of)
    assert known.keys() == unknown.keys()
    assert all(unknown[name] == pytest.approx(known[name], rel=0.1) for name in known)


def test_group_size_divides_the_model():
    odd = stacks.facts({"hidden": 4096, "intermediate": 11040})
    found = [options for one in candidates(odd, CPU) for _, _, options in one.stages]
    groups = {options["group_size"] for options in found if "group_size" in options}
    assert groups == {32}


def test_quality_is_of_the_nearest_size():
    by_name = {one.name: one for one in candidates(MODEL, CPU)}
    assert by_name["gptq 4-bit + onnxruntime"].quality.ratio == 1.040
    assert by_name["gptq 8-bit + onnxruntime"].quality is None
    assert by_name["onnxruntime"].quality.ratio == 1.0
    huge = replace(MODEL, linears={"w": (400_000, 400_000)})
    assert all(one.quality is None for one in candidates(huge, CPU) if "4-bit" in one.name)


def test_what_own_runs_measured_goes_before_what_was_published():
    examples = Path(__file__).parents[2] / "examples"
    (row,) = measured(examples / "smollm2-135m-awq-cpu")
    assert (row["method"], row["bits"]) == ("awq", 4)
    assert row["parameters"] == pytest.approx(0.1345, rel=1e-3)
    assert 1 < row["ratio"] < 1.2
    assert list(measured(examples / "smollm2-135m-sparsegpt-gptq-cpu")) == [], "pruning is part of that figure"
    assert list(measured(examples / "smollm2-135m-llmcompressor-gptq-cpu")) == [], "another program's GPTQ"
    small = replace(MODEL, linears={"w": (10_000, 12_800)})
    by_name = {one.name: one for one in candidates(small, CPU, reports=[examples / "smollm2-135m-awq-cpu"])}
    ours = by_name["awq 4-bit + onnxruntime"].quality
    assert ours.ratio == row["ratio"]
    assert ours.source.startswith("measured: ")


def test_most_loss_rules_out_what_is_published_above_it():
    ranked = candidates(MODEL, CPU)
    names = [one.name for one in within(ranked, 0.045)]
    assert "gptq 4-bit + onnxruntime" in names
    assert "rtn 4-bit + onnxruntime" not in names
    assert "gptq 8-bit + onnxruntime" in names


def test_neuron_takes_no_packed_weights():
    ranked = candidates(MODEL, rows()["inf2.48xlarge"])
    good = [one for one in within(ranked, None) if not pruned(one)]
    assert good
    assert all(len(one.stages) == 1 and one.name.startswith("neuron") for one in good)
    refused = next(one for one in ranked if one.name.startswith("gptq 4-bit"))
    assert "neuron-no-awq-gptq" in [problem.code for problem in refused.problems]


def test_small_memory_needs_few_bits():
    """Beside dense weights a T4 has room for the cache of fewer sequences than beside four bits."""
    by_name = {one.name: one for one in candidates(MODEL, rows()["t4"], goal="throughput", length=4096)}
    assert by_name["vllm"].shape.batch < by_name["awq 4-bit + vllm"].shape.batch
    asked = {one.name: one for one in candidates(MODEL, rows()["t4"], goal="throughput", batch=16, length=4096)}
    assert asked["vllm"].shape.length < 4096, "shorter sequences, where all that was asked for doesn't fit"
    assert next(iter(by_name)) == "awq 4-bit + vllm"


@pytest.mark.parametrize("target", ["cpu", "l4", "inf2.48xlarge"])
def test_recipe_of_the_best_loads(target, tmp_path):
    from optikit.recipe.load import load

    row = CPU if target == "cpu" else rows()[target]
    best = within(candidates(MODEL, row), None)[0]
    path = tmp_path / "r.yaml"
    path.write_text(recipe(best, path, row, model="hf:a/b@0123456789012345678901234567890123456789", most_loss=0.1))
    loaded = load(path).recipe
    assert [(entry.verb, entry.method) for entry in loaded.stages] == [(v, m) for v, m, _ in best.stages]
    if target == "inf2.48xlarge":
        assert not loaded.gates, "nothing here runs what it compiles to"
    else:
        assert loaded.gates["perplexity_ratio"].max == 1.1
    assert all(reason in path.read_text() for reason in reasons(best))


def test_published_figures_have_sources():
    for row in evidence():
        numbers = row["source"].split(": ")[1].split(" (")[0]
        quantized, plain = map(float, numbers.split(" / "))
        assert row["ratio"] == round(quantized / plain, 3)


def test_command_line(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIKIT_HOME", str(tmp_path / "home"))
    run = CliRunner()
    out = tmp_path / "best.yaml"
    result = run.invoke(app, [str(tiny_llama), "--out", str(out)], catch_exceptions=False)
    assert result.stdout.startswith("1. ")
    assert "floors" in result.stdout
    assert out.exists()
    rows_ = json.loads(run.invoke(app, [str(tiny_llama), "--json"], catch_exceptions=False).stdout)
    assert any(row["recommended"] for row in rows_)
    assert isinstance(run.invoke(app, [str(tiny_llama), "--target", "l5"]).exception, UsageError)


@pytest.mark.parametrize("target", ["inf2.48xlarge", "trainium2", "trn1.32xlarge"])
def test_a_model_too_large_for_one_neuron_core_gets_those_it_fits_on(target):
    """11.9 GB of weights and their cache are within every core's memory; 47 GB aren't."""
    row = rows()[target]
    wide = replace(MODEL, weight_bytes=4 * MODEL.weight_bytes, dtype="F32")
    for model in (MODEL, wide):
        best = within(candidates(model, row, goal="cost"), None)[0]
        ((_, _, options),) = best.stages
        assert options["tensor_parallel"] == best.shape.devices
        assert best.floors.weight_bytes + best.floors.kv_bytes < best.shape.devices * row.core_memory_gb * 1e9
        assert options["batch_size"] == best.shape.batch


def test_a_gguf_file_is_what_it_will_be_unpacked_to(tmp_path):
    gguf_files.write(tmp_path / "tiny.gguf")
    source = resolve_model("tiny.gguf", Store(tmp_path / "home"), base=tmp_path, offline=True, note=print)
    facts = facts_of(source)
    assert facts.traits == {"dense"}
    assert facts.weight_bytes == 2 * facts.parameters
    good = within(candidates(facts, CPU), None)
    assert {"gptq", "rtn", "awq"} <= {method for one in good for _, method, _ in one.stages}


def test_an_engine_that_rounds_does_not_leave_the_weights_as_they_are():
    by_name = {one.name: one for one in candidates(MODEL, CPU)}
    assert by_name["openvino"].quality is None
    assert any("openvino stores the weights in fewer bits" in reason for reason in reasons(by_name["openvino"]))
    assert by_name["onnxruntime"].quality.source == "the weights stay as they are"
    for one in by_name.values():
        told = "the weights stay as they are" in " ".join(reasons(one))
        assert told == (one.quality is not None and not any(verb == "quantize" for verb, _, _ in one.stages))


def test_a_stack_has_one_price_whatever_counts():
    found = {goal: candidates(MODEL, rows()["ml.g5.2xlarge"], goal=goal) for goal in ("latency", "throughput", "cost")}
    prices = [{one.name: price_words(one.floors) for one in ranked} for ranked in found.values()]
    for name in set.intersection(*map(set, prices)):
        assert prices[0][name] == prices[1][name] == prices[2][name]
    said = " ".join(reasons(found["cost"][0]))
    assert "per million output tokens at batch 8, 2048 tokens (" in said or "at batch 16, 2048 tokens (" in said
    assert "at least $" not in said


def test_nothing_works_is_an_error(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIKIT_HOME", str(tmp_path / "home"))
    extra = tmp_path / "my.toml"
    extra.write_text('[dust]\ndevice = "cpu"\nmemory_gib = 0.00001\nengines = ["onnxruntime"]\n')
    result = CliRunner().invoke(app, [str(tiny_llama), "--target", "dust", "--targets", str(extra)])
    assert isinstance(result.exception, RecipeError)


@pytest.mark.parametrize(("error", "tried"), [(InterruptError, 1), (TerminatedError, 1), (OptikitError, 2)])
def test_who_stops_one_run_stops_all(error, tried, tmp_path, monkeypatch):
    notes = []

    def fail(request):
        raise error(f"{request.recipe.parent.name} ended")

    monkeypatch.setattr("optikit.app.run.run_recipe", fail)
    best = within(candidates(MODEL, CPU), None)
    given = {"target": CPU, "model": "m", "most_loss": None, "text": None, "note": notes.append}
    if error is OptikitError:
        assert [one.failure for one in measure_best.measure(best, 2, tmp_path, **given)] == ["1 ended", "2 ended"]
    else:
        with pytest.raises(error):
            measure_best.measure(best, 2, tmp_path, **given)
    assert sum(note.startswith("measuring") for note in notes) == tried
