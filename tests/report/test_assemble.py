"""The report that comes out of a plan and its artifacts: every number at its place, every gap with its reason."""

from __future__ import annotations

import sys
from dataclasses import replace
from subprocess import run

import numpy as np
import pytest

from optikit import stages
from optikit.app.run import roll_back, stop_at_gate
from optikit.errors import GateFailedError
from optikit.evaluation import statistics
from optikit.evaluation.results import Divergence, Perplexity, Quality, Ratio, Speed, Timing
from optikit.models.facts import ModelFacts
from optikit.plan.model import Plan, Step
from optikit.recipe.schema import (
    BaselineOptions,
    Evaluate,
    Gate,
    Limit,
    PerplexityOptions,
    Recipe,
    SpeedOptions,
    StageEntry,
)
from optikit.report import assemble, caveats, wording
from optikit.report.headline import headline
from optikit.stage import Estimate, StageOptions
from optikit.store.keys import cache_key
from optikit.store.sources import ModelSource, TextSource
from optikit.store.store import Manifest, Store
from optikit.targets import Target

FACTS = ModelFacts(
    model_type="llama",
    hidden=64,
    intermediate=128,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocab=260,
    max_positions=512,
    tied=True,
    dtype="BF16",
    weight_bytes=1000,
    linears={"up": (128, 64)},
    traits=frozenset({"dense"}),
)
WINDOWS = 12


class Options(StageOptions):
    """Options of no real stage."""

    bits: int = 4
    """Bits."""


def key(name):
    return cache_key(name=name)


def step(name, verb, method, source="", subject=""):
    return Step(
        name=name,
        verb=verb,
        method=method,
        writes=stages.load(verb, method).WRITES,
        subject=subject,
        options=Options(),
        key=key(name),
        source=source,
        estimate=Estimate(seconds=2.0, peak_bytes=3 * 2**20, disk_bytes=4),
        before=FACTS,
        after=FACTS,
    )


STEPS = (
    step("0-acquire-gguf", "acquire", "gguf"),
    step("1-quantize-gptq", "quantize", "gptq", source=key("0-acquire-gguf")),
    step("2-compile-onnxruntime", "compile", "onnxruntime", source=key("1-quantize-gptq")),
)
MEASURED = ("baseline", "1-quantize-gptq", "2-compile-onnxruntime")
MEASURES = (
    *(step(f"measure-quality-{name}", "measure", "quality", subject=name) for name in MEASURED),
    step("measure-speed", "measure", "speed"),
)


def plan(tmp_path, **changed):
    recipe = Recipe(
        model="pypi:tiny==1",
        stages=(
            StageEntry(verb="quantize", method="gptq", options=Options()),
            StageEntry(verb="compile", method="onnxruntime", options=Options()),
        ),
        evaluate=Evaluate(
            perplexity=PerplexityOptions(text="t", window=16, windows=WINDOWS),
            speed=SpeedOptions(repetitions=2),
            baseline=BaselineOptions(also=("float32",)),
        ),
        gates={"perplexity_ratio": Gate(max=1.2), "decode_speedup": Gate(min=4.0), "size_ratio": Gate(max=0.5)},
    )
    source = ModelSource(
        spec="pypi:tiny==1", kind="pypi", format="gguf", path=tmp_path, digest="a" * 64, resolved="pypi:tiny==1@x"
    )
    text = TextSource(spec="t", path=tmp_path, digest="b" * 64, resolved="t@b")
    made = Plan(
        recipe=recipe,
        target=Target(name="cpu", device="cpu", usd_per_hour=3.6, price_source="list price, today"),
        model=source,
        facts=FACTS,
        texts={"perplexity": text},
        steps=STEPS,
        measures=MEASURES,
        max_memory_bytes=None,
        device="cpu",
        warnings=(),
    )
    return replace(made, **changed)


def nll():
    """Log-likelihoods of the baseline and of both steps: 10 % worse, then 1 % more."""
    draw = np.random.default_rng(0)
    base = draw.gamma(2, 1, (WINDOWS, 15))
    quantized = base + 0.1 + draw.normal(0, 0.02, base.shape)
    return dict(zip(MEASURED, (base, quantized, quantized + 0.01), strict=True))


def quality(name, rows):
    if name == "baseline":
        perplexity = Perplexity(protocol="text-bbbbbbbb@16x12", value=7.0, tokens=180, bits_per_byte=1.5)
        return Quality(runtime="transformers", perplexity=perplexity)
    ratio, interval = statistics.perplexity_ratio(rows["baseline"], rows[name])
    perplexity = Perplexity(protocol="text-bbbbbbbb@16x12", value=8.0, ratio=ratio, ratio_ci95=interval, tokens=180)
    apart = Divergence(mean=0.05, median=0.02, p90=0.1, p99=0.3, max=2.0, mean_ci95=(0.04, 0.06), tokens=180)
    return Quality(
        runtime="onnxruntime",
        perplexity=perplexity,
        kl_divergence=apart,
        top1_agreement=0.9,
        top1_agreement_ci95=(0.88, 0.92),
    )


def speed(runtime, dtype, tokens_per_s):
    return Speed(
        runtime=runtime,
        dtype=dtype,
        threads=2,
        prompt_tokens=128,
        new_tokens=64,
        repetitions=2,
        ttft_ms_p50=50,
        ttft_ms_p95=None,
        tpot_ms_p50=1000 / tokens_per_s,
        tpot_ms_p95=None,
        prefill_tokens_per_s=2560,
        decode_tokens_per_s=tokens_per_s,
        first_call_ms=100,
        load_s=1,
        peak_memory_mib=500,
        energy_reason="no counters",
    ).model_dump(mode="json")


def ratio(value):
    made = Ratio(value=value, ci95=(value * 0.95, value * 1.05), noise_floor=0.08, verdict="faster")
    return {"decode": made.model_dump(mode="json"), "prefill": made.model_dump(mode="json")}


SPEED_FACTS = {
    "arms": {
        "baseline": speed("transformers", "bfloat16", 40),
        "transformers-float32": speed("transformers", "float32", 20),
        "result": speed("onnxruntime", "int4", 200),
    },
    "intervals": {"result": {"ttft_ms_p50": [45, 55], "tpot_ms_p50": [4.9, 5.1]}},
    "ratios": {"transformers-float32": ratio(0.5), "result": ratio(5.0)},
    "last_against": {"transformers-float32": ratio(10.0)},
    "chain": {},
    "noise": ratio(1.0),
    "host": {"before": {"threads": 2, "load_average_1min": 7.5}, "after": {}, "steal_share": 0.2},
    "prompts": 1,
    "files": ["samples.jsonl"],
}


@pytest.fixture
def artifacts(tmp_path):
    store = Store(tmp_path / "store")
    rows = nll()

    def commit(each, facts, files):
        directory = store.staging(each.key)
        for name, content in files.items():
            if isinstance(content, np.ndarray):
                np.save(directory / name, content)
            else:
                (directory / name).write_bytes(b"x" * content)
        manifest = Manifest(verb=each.verb, method=each.method, facts=facts, seconds=7.0, peak_memory_mib=321.0)
        return store.commit(each.key, directory, manifest)

    made = {
        STEPS[0].key: commit(
            STEPS[0], {"tensor_types": {"F32": 3, "Q4_1": 9}}, {"model.safetensors": 1000, "config.json": 50}
        ),
        STEPS[1].key: commit(STEPS[1], {"bits_per_weight": 4.3}, {"model.safetensors": 400, "tokenizer.json": 99}),
        STEPS[2].key: commit(STEPS[2], {}, {"model.onnx": 10, "model.onnx.data": 290, "genai_config.json": 7}),
    }
    for name, each in zip(MEASURED, MEASURES, strict=False):
        facts = quality(name, rows).model_dump(mode="json") | {"files": ["nll.npy"], "detectable_ratio": 1.01}
        made[each.key] = commit(each, facts, {"nll.npy": rows[name]})
    made[MEASURES[-1].key] = commit(MEASURES[-1], SPEED_FACTS, {"samples.jsonl": 5})
    return made


def report(plan, artifacts):
    statuses = {each.name: "executed" for each in (*plan.steps, *plan.measures)}
    return assemble.report(plan, artifacts, statuses, seconds=12.5, command="optikit run r.yaml --out out")


def test_baseline_and_result_stand_side_by_side(tmp_path, artifacts):
    made = report(plan(tmp_path), artifacts)
    assert made.baseline.size_bytes == 1000
    assert made.result.size_bytes == 300
    assert made.baseline.speed is not None
    assert made.baseline.speed.dtype == "bfloat16"
    assert made.result.speed is not None
    assert made.result.speed.decode_tokens_per_s == 200
    assert made.result.quality is not None
    assert made.result.quality.runtime == "onnxruntime"
    assert made.speedup.decode is not None
    assert made.speedup.decode.value == 5
    assert (made.result.reason, made.baseline.reason) == ("", "")


def test_every_step_has_its_own_measurement(tmp_path, artifacts):
    acquired, quantized, compiled = report(plan(tmp_path), artifacts).steps
    assert [each.measurement.size_bytes for each in (acquired, quantized, compiled)] == [1000, 400, 300]
    assert quantized.measurement.quality.kl_divergence.mean == 0.05
    assert quantized.measurement.speed is None
    assert quantized.measurement.reason == "speed: timed for the last step only"
    assert compiled.measurement.speed.runtime == "onnxruntime"
    assert (quantized.seconds, quantized.peak_memory_mib, quantized.artifact_bytes) == (7.0, 321.0, 499)
    assert (quantized.estimate_seconds, quantized.estimate_peak_memory_mib) == (2.0, 3.0)
    assert quantized.facts == {"bits_per_weight": 4.3}


def test_measuring_steps_are_listed_apart_without_repeating_their_result(tmp_path, artifacts):
    measures = report(plan(tmp_path), artifacts).measures
    assert [each.name for each in measures] == [each.name for each in MEASURES]
    assert measures[0].facts == {"detectable_ratio": 1.01}
    assert "arms" not in measures[-1].facts
    assert measures[-1].facts["noise"]["decode"]["noise_floor"] == 0.08


def test_gates_decide_the_verdict(tmp_path, artifacts):
    made = report(plan(tmp_path), artifacts)
    assert {gate.name: (gate.verdict, gate.value) for gate in made.gates} == {
        "perplexity_ratio": ("pass", made.result.quality.perplexity.ratio),
        "decode_speedup": ("pass", 5.0),
        "size_ratio": ("pass", 0.3),
    }
    assert made.verdict == "pass"
    strict = plan(tmp_path).recipe.model_copy(update={"gates": {"tpot_ms_p50": Gate(max=5.0)}})
    made = report(plan(tmp_path, recipe=strict), artifacts)
    assert (made.verdict, made.gates[0].ci95) == ("inconclusive", (4.9, 5.1))
    failing = plan(tmp_path).recipe.model_copy(update={"gates": {"top1_agreement": Gate(min=0.95)}})
    assert report(plan(tmp_path, recipe=failing), artifacts).verdict == "fail"


def test_tokens_are_priced_from_the_measured_speed(tmp_path, artifacts):
    cost = report(plan(tmp_path), artifacts).result.cost
    assert cost.usd_per_million_output_tokens == pytest.approx(5.0)  # 3.6 $/h at 0.72 million tokens per hour
    assert cost.usd_per_million_blended_tokens == pytest.approx(1.25)
    assert cost.price_source == "list price, today"


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (Target(name="cpu", device="cpu"), "target cpu has no price per hour"),
        (Target(name="l4", device="cuda", usd_per_hour=1.0), "measured on this machine's processor, and l4 charges"),
    ],
)
def test_a_price_that_would_be_a_guess_is_null_with_a_reason(tmp_path, artifacts, target, reason):
    cost = report(plan(tmp_path, target=target), artifacts).result.cost
    assert cost.usd_per_million_output_tokens is None
    assert reason in cost.reason


def test_further_baselines_are_what_the_result_is_compared_with(tmp_path, artifacts):
    (other,) = report(plan(tmp_path), artifacts).other_baselines
    assert other.name == "transformers-float32"
    assert other.speed.decode_tokens_per_s == 20
    assert other.speedup.decode.value == 10


def test_attribution_compares_each_step_with_what_it_was_made_from(tmp_path, artifacts):
    quantized, compiled = report(plan(tmp_path), artifacts).attribution
    assert quantized["step"] == "1-quantize-gptq"
    assert quantized["perplexity_ratio"]["value"] == pytest.approx(np.exp(0.1), rel=0.01)
    assert quantized["size_ratio"] == 0.4
    assert compiled["perplexity_ratio"]["value"] == pytest.approx(np.exp(0.01))
    low, high = compiled["perplexity_ratio"]["ci95"]
    assert low <= compiled["perplexity_ratio"]["value"] * (1 + 1e-9)
    assert high >= compiled["perplexity_ratio"]["value"] * (1 - 1e-9)
    assert compiled["size_ratio"] == 0.75


def test_warnings_say_what_to_distrust(tmp_path, artifacts):
    warnings = " ".join(report(plan(tmp_path), artifacts).warnings)
    assert "gave 20% of the processor time to other machines" in warnings
    assert "differs from itself by up to 8% in decode speed" in warnings
    assert "the machine was already busy: a load of 7.5 on 2 threads" in warnings
    assert "95th percentiles are left out: 2 repetitions are too few, 90 are needed" in warnings
    assert statistics.requests_needed(0.95) == caveats.FOR_P95
    assert "weights came from a Q4_1 file" in warnings
    assert "only 1 prompts of that length" in warnings


def test_nothing_measured_is_null_with_reasons(tmp_path, artifacts):
    recipe = plan(tmp_path).recipe.model_copy(update={"evaluate": Evaluate(), "gates": {}})
    made = report(plan(tmp_path, recipe=recipe, measures=()), artifacts)
    assert made.result.quality is None
    assert "quality: the recipe has no `evaluate: {perplexity: …}`" in made.result.reason
    assert "speed: the recipe has no `evaluate: {speed: …}`" in made.result.reason
    assert made.speedup.decode is None
    assert made.result.cost.reason == "speed was not measured"
    assert [set(each) for each in made.attribution] == [{"step", "size_ratio"}] * 2


def test_an_artifact_that_no_runtime_here_loads_is_not_measured_and_its_gate_inconclusive(tmp_path, artifacts):
    measures = tuple(each for each in MEASURES if each.name not in ("measure-speed", f"measure-quality-{MEASURED[2]}"))
    made = report(plan(tmp_path, measures=measures), artifacts)
    assert "no runtime on this machine loads this artifact" in made.result.reason
    judged = {gate.name: gate for gate in made.gates}
    assert judged["decode_speedup"].verdict == "inconclusive"
    assert "no runtime on this machine" in judged["perplexity_ratio"].reason
    assert made.verdict == "inconclusive"


def test_without_stages_the_result_is_the_baseline(tmp_path, artifacts):
    recipe = plan(tmp_path).recipe.model_copy(update={"stages": (), "gates": {}})
    made = report(plan(tmp_path, recipe=recipe, steps=STEPS[:1], measures=MEASURES[:1]), artifacts)
    assert made.result == made.baseline
    assert made.attribution == ()


def test_the_recipe_is_reported_as_written(tmp_path, artifacts):
    made = report(plan(tmp_path), artifacts)
    assert made.recipe["stages"][1] == {"compile": {"engine": "onnxruntime", "bits": 4}}
    assert made.model["source"] == "pypi:tiny==1@x"
    assert made.versions["python"] == sys.version.split()[0]
    assert made.command == "optikit run r.yaml --out out"


def test_importing_it_stays_light():
    code = "import optikit.report.assemble, sys; print(*{'numpy', 'torch', 'transformers', 'rich'} & set(sys.modules))"
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def gated(on_fail, **limits):
    return {name: Gate(**limit, on_fail=on_fail) for name, limit in limits.items()}


def finished(plan, artifacts):
    """What an execution tells, step by step in its order; artifacts as far as they are made."""
    done = {}
    for each in plan.order:
        done[each.key] = artifacts[each.key]
        yield each, done


def test_a_plan_that_may_stop_measures_every_step_as_soon_as_it_is_made(tmp_path):
    made = plan(tmp_path)
    names = [each.name for each in made.order]
    assert names == [each.name for each in (*made.steps, *made.measures)]
    inputs = {"baseline": key("measure-quality-baseline")}
    measures = [
        replace(each, source=own.key, inputs=inputs if number else {})
        for number, (each, own) in enumerate(zip(MEASURES, STEPS, strict=False))
    ]
    measures.append(replace(MEASURES[-1], source=STEPS[-1].key))
    recipe = made.recipe.model_copy(update={"gates": gated("stop", size_ratio={"max": 1.0})})
    stopping = replace(made, recipe=recipe, measures=tuple(measures))
    assert [each.name for each in stopping.order] == [
        "0-acquire-gguf",
        "measure-quality-baseline",
        "1-quantize-gptq",
        "measure-quality-1-quantize-gptq",
        "2-compile-onnxruntime",
        "measure-quality-2-compile-onnxruntime",
        "measure-speed",
    ]
    ended = stopping.until("1-quantize-gptq")
    assert [each.name for each in ended.steps] == ["0-acquire-gguf", "1-quantize-gptq"]
    assert [each.name for each in ended.measures] == ["measure-quality-baseline", "measure-quality-1-quantize-gptq"]


@pytest.fixture
def chained(tmp_path):
    """Return a maker of plans whose measuring steps name what they measure, with gates."""

    def made(gates):
        original = plan(tmp_path)
        pairs = zip(MEASURES, STEPS, strict=False)
        measures = [replace(each, source=own.key, method="quality") for each, own in pairs]
        measures.append(replace(MEASURES[-1], source=STEPS[-1].key))
        return replace(original, recipe=original.recipe.model_copy(update={"gates": gates}), measures=tuple(measures))

    return made


def test_a_run_stops_at_the_first_step_that_fails(chained, artifacts):
    stopping = chained(gated("stop", perplexity_ratio={"max": 1.05}))
    order = finished(stopping, artifacts)
    for each, done in order:
        if each.name == "measure-quality-1-quantize-gptq":
            break
        stop_at_gate(stopping, each, done)
    with pytest.raises(GateFailedError, match=r"stopped after 1-quantize-gptq: perplexity_ratio is 1\.1") as caught:
        stop_at_gate(stopping, each, done)
    assert "limit max 1.05" in caught.value.message
    going = chained(gated("keep_going", perplexity_ratio={"max": 1.05}))
    for each, done in finished(going, artifacts):
        stop_at_gate(going, each, done)


def test_a_result_that_fails_is_rolled_back_to_the_last_step_that_passes(chained, artifacts):
    whole = chained(gated("rollback", perplexity_ratio={"max": 1.2}))
    assert roll_back(whole, artifacts) == (whole, "")
    ratios = {name: statistics.perplexity_ratio(nll()["baseline"], nll()[name]) for name in MEASURED[1:]}
    between = (ratios[MEASURED[1]][1][1] + ratios[MEASURED[2]][1][0]) / 2
    assert ratios[MEASURED[1]][1][1] < between < ratios[MEASURED[2]][1][0]
    shorter, why = roll_back(chained(gated("rollback", perplexity_ratio={"max": between})), artifacts)
    assert shorter.steps[-1].name == "1-quantize-gptq"
    assert why.startswith("Rolled back to 1-quantize-gptq: after 2-compile-onnxruntime perplexity_ratio is 1.1")
    statuses = {each.name: "executed" for each in (*shorter.steps, *shorter.measures)}
    made = assemble.report(shorter, artifacts, statuses, seconds=1, command="optikit", rolled_back=why)
    assert (made.verdict, made.warnings[0]) == ("pass", why)
    assert made.result.size_bytes == 400
    assert made.result.speed is None
    with pytest.raises(GateFailedError, match="nothing is left to roll back to: after 2-compile"):
        roll_back(chained(gated("rollback", perplexity_ratio={"max": 1.01})), artifacts)


def test_each_step_has_its_own_speed_where_attribution_was_asked_for(tmp_path, artifacts, monkeypatch):
    facts = SPEED_FACTS | {"chain": {"engine-baseline": ratio(2.0), "result": ratio(2.5)}}
    timing = Timing.model_validate({name: facts[name] for name in Timing.model_fields if name in facts})
    monkeypatch.setattr(assemble._Run, "timing", timing)
    rows = {row["step"]: row for row in report(plan(tmp_path), artifacts).attribution}
    assert rows["1-quantize-gptq"]["decode_speedup"]["value"] == 2.5
    assert rows["2-compile-onnxruntime"]["decode_speedup"]["value"] == 2.0
    assert rows["2-compile-onnxruntime"]["decode_speedup"]["ci95"] == pytest.approx([1.9, 2.1])


def test_a_gate_on_a_step_is_judged_by_that_steps_own_measurement(tmp_path, artifacts):
    limits = {"perplexity_ratio": Gate(max=1.2, steps={"quantize.gptq": Limit(max=1.05)})}
    made = report(plan(tmp_path, recipe=plan(tmp_path).recipe.model_copy(update={"gates": limits})), artifacts)
    whole, quantized = made.gates
    assert (whole.step, whole.verdict) == ("", "pass")
    assert (quantized.step, quantized.verdict) == ("1-quantize-gptq", "fail")
    assert quantized.value == made.steps[1].measurement.quality.perplexity.ratio != whole.value
    assert made.verdict == "fail"


def test_a_run_stops_at_the_step_whose_own_gate_fails(chained, artifacts):
    strict = {"perplexity_ratio": Gate(steps={"compile.onnxruntime": Limit(max=1.05, on_fail="stop")})}
    stopping = chained(strict)
    for each, done in finished(stopping, artifacts):
        if each.name == "measure-quality-2-compile-onnxruntime":
            break
        stop_at_gate(stopping, each, done)
    with pytest.raises(GateFailedError, match=r"stopped after 2-compile-onnxruntime: perplexity_ratio is 1\.1"):
        stop_at_gate(stopping, each, done)


def test_a_step_that_fails_its_own_gate_is_rolled_back_and_those_before_it_kept(chained, artifacts):
    made = chained({"perplexity_ratio": Gate(steps={"compile.onnxruntime": Limit(max=1.05, on_fail="rollback")})})
    kept, why = roll_back(made, artifacts)
    assert [each.name for each in kept.steps] == ["0-acquire-gguf", "1-quantize-gptq"]
    assert "after 2-compile-onnxruntime perplexity_ratio is 1.1" in why
    assert report(kept, artifacts).gates == ()  # it judges a step that isn't part of what was written


def test_a_gate_on_price_has_the_interval_of_the_time_per_token(tmp_path, artifacts):
    limits = {"usd_per_million_output_tokens": Gate(max=5.5), "joules_per_output_token": Gate(max=1)}
    made = report(plan(tmp_path, recipe=plan(tmp_path).recipe.model_copy(update={"gates": limits})), artifacts)
    price, energy = made.gates
    assert (price.verdict, price.value) == ("pass", pytest.approx(5.0))
    assert price.ci95 == pytest.approx((4.9, 5.1))
    assert (energy.verdict, energy.reason) == ("inconclusive", "no counters")


def test_a_machine_without_a_price_says_which_key_to_set(tmp_path, artifacts):
    unpriced = plan(tmp_path, target=Target(name="cpu", device="cpu"))
    (said,) = (reason for reason in wording.reasons(report(unpriced, artifacts)) if "price" in reason)
    assert said.startswith("result, cost: target cpu has no price per hour: set cost.usd_per_hour")
    asked = unpriced.recipe.model_copy(update={"gates": {"usd_per_million_output_tokens": Gate(max=1)}})
    found = report(replace(unpriced, recipe=asked), artifacts)
    assert "cost: target cpu has no price per hour" in " ".join(wording.reasons(found))
    assert found.verdict == "inconclusive"


def test_a_run_that_compiled_measured_and_gated_nothing_is_emitted(tmp_path, artifacts):
    recipe = plan(tmp_path).recipe.model_copy(update={"evaluate": Evaluate(), "gates": {}})
    only_weights = plan(tmp_path, recipe=recipe, measures=(), steps=STEPS[:2])
    assert report(only_weights, artifacts).verdict == "emitted"
    folder = replace(only_weights, steps=STEPS)
    statuses = dict.fromkeys((each.name for each in STEPS), "emitted")
    found = assemble.report(folder, artifacts, statuses, seconds=1.0, command="")
    assert found.verdict == "emitted", "files for another machine were written, and nothing ran"


def test_whatever_was_compiled_measured_or_gated_is_judged(tmp_path, artifacts):
    nothing = plan(tmp_path).recipe.model_copy(update={"evaluate": Evaluate(), "gates": {}})
    assert report(plan(tmp_path, recipe=nothing, measures=()), artifacts).verdict == "pass"
    assert report(plan(tmp_path, recipe=nothing, steps=STEPS[:2]), artifacts).verdict == "pass"
    gated = nothing.model_copy(update={"gates": {"size_ratio": Gate(max=0.5)}})
    assert report(plan(tmp_path, recipe=gated, measures=(), steps=STEPS[:2]), artifacts).verdict == "pass"


def test_a_model_that_guesses_fails_though_its_gates_pass(tmp_path, artifacts):
    made = report(plan(tmp_path, facts=replace(FACTS, vocab=8)), artifacts)
    assert made.result.quality.perplexity.value == 8.0
    assert [gate.verdict for gate in made.gates] == ["pass", "pass", "pass", "fail"]
    assert made.verdict == "fail"
    assert made.gates[-1].value == 8.0
    assert "it guesses: a perplexity of 8 with 8 tokens is chance" in made.gates[-1].reason
    assert "it guesses" in headline(made)


def test_a_model_that_guessed_before_is_told_of(tmp_path, artifacts):
    warnings = report(plan(tmp_path, facts=replace(FACTS, vocab=7)), artifacts).warnings
    assert any("The model guesses before anything is done to it (a perplexity of 7 with 7" in each for each in warnings)


def test_the_packed_file_s_size_is_kept(tmp_path, artifacts):
    packed = tmp_path / "tiny.gguf"
    packed.write_bytes(b"x" * 305)
    source = replace(plan(tmp_path).model, path=packed)
    made = report(plan(tmp_path, model=source), artifacts)
    assert made.model["source_bytes"] == 305
    assert "; 1.02× smaller than the 305 B file that it came in" in headline(made)
    assert "source_bytes" not in report(plan(tmp_path), artifacts).model


def test_the_command_is_kept_without_a_password(tmp_path, artifacts):
    statuses = {each.name: "executed" for each in (*STEPS, *MEASURES)}
    made = assemble.report(
        plan(tmp_path), artifacts, statuses, seconds=1.0, command="optikit eval http://me:pw@host/v1"
    )
    assert made.command == "optikit eval http://***@host/v1"
