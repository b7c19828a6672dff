"""Speed of several models, timed in turns: time to first token, time per output token, prefill, decode, memory.

Every arm is a process of its own that loads its model once. All arms decode the same prompt before any takes the next
one, and every other round runs backwards (A B B A), so that a machine that slows down slows everyone. The first arm is
the baseline; it runs a second time in every round, and that ratio of the baseline to itself is the noise floor.

An arm's rounds end when its ratios are known, see `looks`. Slow arms write only as many tokens as their pace needs.

Where an arm speculates, prompts whose answer repeats itself (the same 8 tokens twice) are timed in rounds of their own:
drafts come easily there, and a speed-up that rests on them is nobody's.

Paper   none; definitions are those of vLLM's and MLPerf's benchmarks, tails need MLPerf's number of requests
Hurts   anything else that runs on the machine meanwhile; its load and steal are recorded
Cost    (rounds + warm-up) × the time of one answer of every arm; all models in memory at once
Differs output length is fixed and end-of-text ignored: a broken model that stops early would look fast
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from optikit.described import Described
from optikit.errors import StageFailedError
from optikit.evaluation import looks, texts
from optikit.evaluation.looks import SLOW, Look
from optikit.evaluation.speed_client import Arm
from optikit.evaluation.speed_schedule import (
    AGAIN,
    REPEATING,
    SEEN_PER_ROUND,
    Rounds,
    Sample,
    Sorted,
    conduct,
    joules_per_token,
    select,
    sort_prompts,
    write_samples,
)
from optikit.models import tokenizer
from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import (
    ANY,
    MACHINE,
    MAIN,
    PLANNED,
    SERVERS_PEAK,
    Estimate,
    Facts,
    Input,
    Job,
    StageOptions,
    no_objection,
)
from optikit.targets import Target

if TYPE_CHECKING:
    from optikit.evaluation.results import Machine, Ratios, Repeating, Speed, Timing
    from optikit.evaluation.speed import Summary

SUMMARY = "TTFT, TPOT, prefill, decode and memory of result and baselines, in interleaved pairs"
NEEDS = ANY
WRITES = "measurement"
USES_TARGET = False
LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "onnxruntime",
    "onnxruntime-genai",
    "openvino",
    "llama-cpp-python",
)
ENVIRONMENT = MAIN
fits = no_objection

SAMPLES = "samples.jsonl"
MANIFEST = "artifact.json"


class _Costs(NamedTuple):
    """What a runtime takes on two CPU cores.

    Attributes:
        bytes_per_second: Weights that it reads per second while decoding.
        start_s: Seconds until a model is loaded, its libraries imported.
        overhead: Bytes beside the weights; a server's cache of a GiB among them.
    """

    bytes_per_second: float
    start_s: float
    overhead: int


COSTS: Mapping[str, _Costs] = {
    "transformers": _Costs(3.6e9, 8, 340 * 2**20),
    "onnxruntime": _Costs(7e9, 8, 340 * 2**20),
    "openvino": _Costs(7e9, 8, 340 * 2**20),
    "llama-cpp": _Costs(7e9, 4, 200 * 2**20),
    "vllm": _Costs(5e9, 45, 3_500_000_000),
}
COMPILED = {"onnxruntime", "openvino", "llama-cpp"}
"""Runtimes that compute on the processor, whatever the step's device: who is compared with them has to, too."""
PREFILL_FLOPS = 60e9
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
USUAL_TOKENS = 16
"""That a slow arm writes, whose pace scatters by 8 %."""


class ArmOptions(Described):
    """One model to time."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """Its name in the result; also the name of its log."""
    role: str
    """Which input directory it loads."""
    runtime: Literal["transformers", "onnxruntime", "openvino", "llama-cpp", "vllm"]
    """Runtime that loads it; `vllm` starts a server."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of weights and arithmetic, where the runtime lets one choose."""
    speculator: str = ""
    """Which input holds the speculator that it decodes with; empty is plain decoding."""


class Options(StageOptions):
    """What to time, and how often."""

    arms: tuple[ArmOptions, ...] = Field(min_length=1)
    """Models to time; the first is the baseline of every ratio."""
    prompt_tokens: int = Field(default=128, ge=1)
    """Tokens per prompt."""
    new_tokens: int = Field(default=64, ge=2)
    """Tokens decoded per prompt."""
    repetitions: int = Field(default=8, ge=2)
    """Measured rounds at most; each decodes one prompt with every arm."""
    precision: float = Field(default=0.1, ge=0, le=1)
    """Share to which a ratio has to be known before its rounds end early; 0 makes them all."""
    warmup: int = Field(default=2, ge=1)
    """Runs per arm before measuring; the first of them is reported as the cold run."""
    chain: tuple[str, ...] = ()
    """Arms of which each is also compared with the one before it: what each stage alone brings."""
    hang_s: float = Field(default=900, gt=0)
    """Seconds without an answer after which an arm counts as hung."""

    @model_validator(mode="after")
    def _distinct(self) -> Options:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            msg = f"arms must have different names: {', '.join(names)}"
            raise ValueError(msg)
        return self


def inputs(options: Options) -> Mapping[str, Input]:
    """Declare every arm's model and speculator, the prompts and whose tokens; and this machine."""
    models = {role for arm in options.arms for role in (arm.role, arm.speculator) if role}
    return {**dict.fromkeys((*sorted(models), "made", "prompts", "tokenizer"), PLANNED), "machine": MACHINE}


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what can't be timed on this model."""
    need = options.prompt_tokens + options.new_tokens
    if need > facts.max_positions:
        message = f"{options.prompt_tokens} prompt tokens and {options.new_tokens} new ones exceed the model's context"
        fix = f"keep their sum at {facts.max_positions} or less"
        yield Problem(code="prompt-exceeds-context", message=message, fix=fix, loc=("prompt_tokens",))


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate: decoding reads all weights per token, prefill does two operations per weight and token."""
    sizes = [_weight_bytes(arm, facts) for arm in options.arms]
    prefill = 2 * facts.parameters * options.prompt_tokens / PREFILL_FLOPS
    costs = [COSTS[arm.runtime] for arm in options.arms]
    paces = [size / each.bytes_per_second for size, each in zip(sizes, costs, strict=True)]
    whole = [prefill + options.new_tokens * pace for pace in paces]
    usual = [prefill + _usual_tokens(options, pace, min(paces)) * pace for pace in paces]
    rounds = _looks(options)[len(_looks(options)) // 2].samples
    runs = options.warmup - 1 + rounds
    seen = SEEN_PER_ROUND * options.repetitions * whole[-1] if any(arm.speculator for arm in options.arms) else 0
    return Estimate(
        seconds=sum(each.start_s for each in costs) + sum(whole) + runs * sum(usual) + rounds * usual[0] + seen,
        peak_bytes=_peak_bytes(options, facts),
        disk_bytes=(options.warmup + options.repetitions) * len(sizes) * options.new_tokens * 20,
    )


def _usual_tokens(options: Options, pace: float, fastest: float) -> int:
    """Return how many tokens an arm writes on a quiet machine, from its and the fastest arm's seconds per token."""
    cut = options.precision and pace >= SLOW * fastest
    return min(options.new_tokens, USUAL_TOKENS) if cut else options.new_tokens


def _peak_bytes(options: Options, facts: ModelFacts) -> int:
    """Return the memory of the arm that takes most, or of all servers: they run at once."""
    peaks = [
        int(1.1 * _weight_bytes(arm, facts)) + _mapped_bytes(arm, facts) + COSTS[arm.runtime].overhead
        for arm in options.arms
    ]
    served = [peak for peak, arm in zip(peaks, options.arms, strict=True) if arm.runtime == "vllm"]
    return max(sum(served), *peaks)


def _mapped_bytes(arm: ArmOptions, facts: ModelFacts) -> int:
    """Return what of a file transformers maps while it converts the weights: its pages count until all are."""
    converted = arm.runtime == "transformers" and arm.dtype == "float32" and facts.dtype != "F32"
    return facts.weight_bytes if converted and "dense" in facts.traits else 0


def _weight_bytes(arm: ArmOptions, facts: ModelFacts) -> int:
    return facts.first_bytes if arm.dtype == "auto" else DTYPE_BYTES[arm.dtype] * facts.parameters


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Measuring changes nothing."""
    return facts


def run(options: Options, job: Job) -> Facts:
    """Time `job.inputs[arm.role]` of every arm on `job.inputs["prompts"]`; raw samples go to samples.jsonl.

    Raises:
        InputMissingError: No prompt is long enough.
        StageFailedError: An arm failed or returned fewer tokens than asked for.
        StageTimeoutError: An arm hung.
    """
    from optikit.evaluation import energy, machine_state, results

    prompts = _prompts(options, job)
    before, ticks, meter = machine_state.state(), machine_state.cpu_times(), energy.find()
    with ExitStack() as stack:
        arms: dict[str, Arm] = {}
        loaded: dict[str, dict[str, Any]] = {}
        for arm in options.arms:
            job.progress(len(arms), len(options.arms), "model loaded")
            arms[arm.name] = stack.enter_context(_start(arm, options, job))
            loaded[arm.name] = _load(arms[arm.name], arm, options, job)
        found, prompts, rounds = _sorted(options, job, arms, prompts)
        samples = conduct(arms, prompts, rounds, job.progress, meter, found.repeating if found else ())
        peaks = {name: arm.ask("peak") for name, arm in arms.items()}
    steal = machine_state.steal_share(ticks, machine_state.cpu_times())
    machine = results.Machine(before=before, after=machine_state.state(), steal_share=steal)
    write_samples(samples, job.dest / SAMPLES)
    counted = ", ".join(counter.name for counter in meter.counters)
    energies = {name: {"joules_per_output_token": joules_per_token(samples, name)} for name in arms}
    servers = {arm.name for arm in options.arms if arm.runtime == "vllm"}
    held = {SERVERS_PEAK: sum(peaks[name]["peak_memory_mib"] for name in servers)} if servers else {}
    told = {"energy_source": counted, "energy_reason": meter.reason}
    about = {name: loaded[name] | peaks[name] | energies[name] | told for name in arms}
    timing = _timing(samples, options, about, job.seed, machine=machine, prompts=len(prompts))
    timing = timing.model_copy(update={"repeating": _repeating(found, samples, options, job.seed) if found else None})
    return timing.model_dump(mode="json") | held | {"files": [SAMPLES]}


def _looks(options: Options) -> tuple[Look, ...]:
    return looks.design(options.repetitions) if options.precision else looks.only(options.repetitions)


def _pairs(options: Options) -> tuple[tuple[str, str], ...]:
    """Return the arms whose ratio is asked for: each baseline and the last, and neighbours in the chain."""
    *others, last = (arm.name for arm in options.arms)
    baselines = [name for name in others if name not in options.chain[1:]]
    return tuple(dict.fromkeys([*((name, last) for name in baselines), *pairwise(options.chain)]))


def _rounds(options: Options, seed: int) -> Rounds:
    from optikit.evaluation.speed_stopping import Stopping

    return Rounds(
        options.warmup,
        options.repetitions,
        options.new_tokens,
        stopping=Stopping(_pairs(options), _looks(options), options.precision, seed) if options.precision else None,
        plain=frozenset(arm.name for arm in options.arms if not arm.speculator),
    )


def _drafts(options: Options) -> bool:
    return any(arm.speculator for arm in options.arms)


def _prompts(options: Options, job: Job) -> list[list[int]]:
    """Return prompts, as tokens; more of them where some may be told apart."""
    return texts.prompts(
        job.inputs["prompts"],
        tokenizer.load(job.inputs["tokenizer"]),
        length=options.prompt_tokens,
        wanted=options.warmup + options.repetitions * (SEEN_PER_ROUND if _drafts(options) else 1),
        seed=job.seed,
    )


def _sorted(
    options: Options, job: Job, arms: Mapping[str, Arm], prompts: list[list[int]]
) -> tuple[Sorted | None, list[list[int]], Rounds]:
    """Return prompts to time, those whose answer repeats itself apart from them, and how often."""
    rounds = _rounds(options, job.seed)
    if not _drafts(options):
        return None, prompts, rounds
    found = sort_prompts(arms[options.arms[-1].name], prompts[options.warmup :] or prompts, rounds, job.progress)
    kept = [*prompts[: options.warmup], *map(list, found.steady or found.repeating)]
    return found, kept, replace(rounds, repeating=len(found.repeating) if found.steady else 0)


def _start(arm: ArmOptions, options: Options, job: Job) -> Arm:
    job.scratch.mkdir(parents=True, exist_ok=True)
    return Arm(arm.name, log=job.scratch / f"{arm.name}.log", hang_s=options.hang_s)


def speculator(job: Job, chosen: str) -> Path:
    """Return a directory with what a stage made and what was chosen of it, as they lie together in the output."""
    merged = job.scratch / "speculator"
    shutil.rmtree(merged, ignore_errors=True)
    merged.mkdir(parents=True)
    for role in ("made", chosen):
        if role in job.inputs:
            for path in job.inputs[role].iterdir():
                if path.name != MANIFEST:
                    (merged / path.name).symlink_to(path.resolve())
    return merged


def _for_a_server(arm: ArmOptions, options: Options, job: Job) -> dict[str, Any]:
    if arm.runtime != "vllm":
        return {}
    return {"log": str(job.scratch / f"{arm.name}.server.log"), "hang_s": options.hang_s}


def device_of(options: Options, device: str) -> str:
    """Return where all arms run: on the step's device, unless one of them was compiled for the processor."""
    return "cpu" if any(arm.runtime in COMPILED for arm in options.arms) else device


def _load(process: Arm, arm: ArmOptions, options: Options, job: Job) -> dict[str, Any]:
    """Load an arm's model; return what was really loaded, and how long that took."""
    loaded = process.ask(
        "load",
        directory=str(job.inputs[arm.role]),
        runtime=arm.runtime,
        dtype=arm.dtype,
        threads=job.threads,
        max_tokens=options.prompt_tokens + options.new_tokens,
        speculator=str(speculator(job, arm.speculator)) if arm.speculator else None,
        device=device_of(options, job.device),
        **_for_a_server(arm, options, job),
    )
    if arm.dtype not in ("auto", loaded["dtype"]):
        message = f"{arm.name}: asked for {arm.dtype}, but {loaded['runtime']} loaded {loaded['dtype']}"
        raise StageFailedError(message, fix=f"set its dtype to auto or {loaded['dtype']}")
    return loaded


def _timing(
    samples: Sequence[Sample],
    options: Options,
    about: Mapping[str, dict[str, Any]],
    seed: int,
    *,
    machine: Machine,
    prompts: int,
) -> Timing:
    from optikit.evaluation import results, speed

    traces = {arm.name: select(samples, arm.name, "measured") for arm in options.arms}
    summaries = {name: speed.summarize(each, seed=seed) for name, each in traces.items()}
    first, *others = traces
    last = others[-1] if others else first
    again = select(samples, first, AGAIN)
    noise = speed.compare(traces[first], again, seed=seed)

    def seen(name: str) -> dict[str, Any]:
        cold = select(samples, name, "cold")[0]
        return {"first_call_ms": cold.e2e_ms, "new_tokens": len(traces[name][0].token_ns)}

    def ratio(one: str, other: str) -> Ratios:
        level = looks.level(_looks(options), min(len(traces[one]), len(traces[other])))
        return speed.compare(traces[one], traces[other], noise=noise, seed=seed, level=level)

    return results.Timing(
        arms={name: _speed(summary, options, about[name] | seen(name)) for name, summary in summaries.items()},
        intervals={
            name: {"ttft_ms_p50": summary.ttft_ms_p50_ci95, "tpot_ms_p50": summary.tpot_ms_p50_ci95}
            for name, summary in summaries.items()
        },
        ratios={name: ratio(first, name) for name in others},
        last_against={name: ratio(name, last) for name in others if name != last},
        chain={name: ratio(before, name) for before, name in pairwise(options.chain)},
        noise=noise,
        prompts=prompts,
        host=machine,
    )


def _repeating(found: Sorted, samples: Sequence[Sample], options: Options, seed: int) -> Repeating:
    """Return what is told apart: prompts whose answer repeats itself, and the result's speed-up on them."""
    from optikit.evaluation import results, speed

    first, last = options.arms[0].name, options.arms[-1].name
    traces = [select(samples, name, REPEATING) for name in (first, last)]
    decode = speed.compare(*traces, seed=seed)["decode"] if len(traces[0]) > 1 and first != last else None
    return results.Repeating(prompts=found.seen, repeating=found.repeats, steady=len(found.steady), decode=decode)


def _speed(summary: Summary, options: Options, about: Mapping[str, Any]) -> Speed:
    from optikit.evaluation import results

    read_back = [
        "runtime",
        "dtype",
        "threads",
        "first_call_ms",
        "load_s",
        "peak_memory_mib",
        "device",
        "device_memory_mib",
        "new_tokens",
    ]
    read_back += ["joules_per_output_token", "energy_source", "energy_reason"]
    found = ("ttft_ms_p50", "ttft_ms_p95", "tpot_ms_p50", "tpot_ms_p95", "prefill_tokens_per_s", "decode_tokens_per_s")
    return results.Speed(
        prompt_tokens=options.prompt_tokens,
        repetitions=summary.requests,
        **{name: about[name] for name in read_back},
        **{name: getattr(summary, name) for name in found},
    )
