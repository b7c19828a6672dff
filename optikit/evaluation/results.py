"""`report.json`, schema version 1: the public contract of every number that optikit prints.

Numbers carry their unit in their name. A number that was not measured is null, and a `reason` beside it says why.
Numbers are finite: JSON has no word for the others, and what overflowed was not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field

from optikit.described import Described
from optikit.evaluation.latency_limits import Limits

GateVerdict = Literal["pass", "fail", "inconclusive"]
Verdict = Literal["pass", "fail", "inconclusive", "emitted"]
"""Of a report: what its gates decided; `emitted` where nothing was compiled, measured or gated, so nothing is known."""
Interval = tuple[float, float]
"""Lower and upper end of a 95 % confidence interval."""


class _Frozen(Described):
    model_config = ConfigDict(allow_inf_nan=False)


class Perplexity(_Frozen):
    """exp of the mean negative log-likelihood per scored token, under a named protocol."""

    protocol: str
    """E.g. `text-3f9a12cd@512x16`: first hex digits of the text's sha256, window length, number of windows; or
    `wt2-gptq@2048`, `wt2-hf@1024/512`, `wt2-lmeval@2048`: the text by its usual name, how it is cut."""
    value: float
    ratio: float | None = None
    """Divided by the baseline's, same windows."""
    ratio_ci95: Interval | None = None
    """Window-block bootstrap."""
    bits_per_byte: float | None = None
    word_perplexity: float | None = None
    """Per word as lm-evaluation-harness counts them; null under protocols that don't."""
    byte_perplexity: float | None = None
    tokens: int


class Divergence(_Frozen):
    """KL divergence from the baseline's next-token distribution, nats per token."""

    mean: float
    median: float
    p90: float
    p99: float
    max: float
    mean_ci95: Interval
    histogram: tuple[tuple[float, float, int], ...] = ()
    """Bins (from, to, count), logarithmic."""
    tokens: int


class Flip(_Frozen):
    """An item that changed sides, as an example: what both models answered."""

    item: str
    prompt: str
    """Its end."""
    expected: str
    baseline: str
    result: str
    change: Literal["lost", "won"]


class TaskResult(_Frozen):
    """Right answers to one task; against the baseline's answers to the same items where there is one."""

    protocol: str
    """E.g. `choice-3f9a12cd@200`: kind, first hex digits of the file's sha256, number of items."""
    kind: Literal["choice", "text", "sql"]
    items: int
    accuracy: float
    """Of choices: by log-likelihood per character."""
    accuracy_ci95: Interval
    """Wilson's."""
    accuracy_unnormalized: float | None = None
    """Of choices: by log-likelihood as it is."""
    change: float | None = None
    """Accuracy minus the baseline's."""
    change_ci95: Interval | None = None
    lost: int | None = None
    """Items that the baseline has right and this model wrong."""
    won: int | None = None
    flip_rate: float | None = None
    changed_answers: float | None = None
    """Share of items with another answer, right or not."""
    p_worse: float | None = None
    """Exact one-sided McNemar, adjusted for the number of tasks (Holm)."""
    detectable: float | None = None
    """Smallest change that so many items would show with 80 % power."""
    output_length_ratio: float | None = None
    output_length_ratio_ci95: Interval | None = None
    flips: tuple[Flip, ...] = ()
    """A few examples."""


class TasksVerdict(_Frozen):
    """All tasks together, against the baseline."""

    change: float
    """Mean over tasks of the change of accuracy."""
    change_ci95: Interval
    p_worse: float
    """Permutation test of the mean, one-sided."""
    worse: tuple[str, ...] = ()
    """Tasks that are worse by themselves, after Holm's adjustment."""
    conclusion: Literal["worse", "no measurable loss"]


class Quality(_Frozen):
    """How well a model predicts, measured through `runtime`."""

    runtime: str
    perplexity: Perplexity | None = None
    kl_divergence: Divergence | None = None
    top1_agreement: float | None = None
    top1_agreement_ci95: Interval | None = None
    tasks: dict[str, TaskResult] = Field(default_factory=dict)
    tasks_verdict: TasksVerdict | None = None
    reason: str = ""
    """Why a null above is null."""


class Speed(_Frozen):
    """How fast a model decodes at batch 1. Definitions are printed in the report."""

    runtime: str
    dtype: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    repetitions: int
    ttft_ms_p50: float
    ttft_ms_p95: float | None
    """Null where too few requests were timed to claim a 95th percentile (90 without one beyond it)."""
    tpot_ms_p50: float
    tpot_ms_p95: float | None
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    first_call_ms: float
    load_s: float
    peak_memory_mib: float
    device: str = "cpu"
    """torch device that it ran on."""
    device_memory_mib: float | None = None
    """Most memory of the GPU that tensors took; null on a CPU, and where a server holds the model."""
    joules_per_output_token: float | None = None
    """Energy of the machine while it read prompts and wrote answers, by output tokens."""
    energy_source: str = ""
    """Which counters that is the sum of, e.g. `package-0, dram-0`."""
    energy_reason: str = ""
    """Why the energy is null."""


class Cost(_Frozen):
    """Price of tokens on the target, from the measured decode speed."""

    usd_per_million_output_tokens: float | None = None
    usd_per_million_blended_tokens: float | None = None
    usd_per_hour: float | None = None
    """List price of the machine."""
    discount: float = 0.0
    """Share that was taken off it."""
    concurrency: int = 1
    """Requests at a time that were timed for it."""
    price_source: str = ""
    reason: str = ""


class Payback(_Frozen):
    """What optimizing cost on the machine that is priced, and after how many tokens that is saved."""

    optimization_seconds: float
    """Of all steps that made the artifact, those found cached included; measuring isn't counted."""
    optimization_usd: float
    output_tokens: float | None = None
    """Output tokens until what one costs less, at one request at a time, has paid for it."""
    reason: str = ""


class Measurement(_Frozen):
    """Quality, speed, size and cost of one artifact."""

    size_bytes: int | None
    """Bytes of the weights on disk (for a compiled artifact, of its graph and weights).

    Null for a server, which doesn't tell.
    """
    quality: Quality | None = None
    speed: Speed | None = None
    cost: Cost | None = None
    reason: str = ""


class Ratio(_Frozen):
    """A paired ratio with its interval.

    `noise_floor` is how far the interval of the same ratio of the baseline to itself strays from one.
    """

    value: float
    ci95: Interval
    noise_floor: float
    verdict: Literal["faster", "slower", "no measurable change"]


Ratios = Mapping[str, Ratio]
"""Ratios of two models by what was timed: `decode`, `prefill`."""


class Machine(_Frozen):
    """The machine before and after timing; `steal_share` is what its hypervisor gave to others, null if untold."""

    before: Mapping[str, Any]
    after: Mapping[str, Any]
    steal_share: float | None


class Repeating(_Frozen):
    """Prompts whose answer repeats itself: it holds the same 8 tokens twice. No other figure of speed contains them."""

    prompts: int
    """Prompts that were answered to know."""
    repeating: int
    """How many of them have such an answer."""
    steady: int
    """Prompts that the other figures are of; none leaves the speed of decoding unknown."""
    decode: Ratio | None = None
    """Decode speed of the result against the baseline's on those that repeat, where at least two were timed."""


class Timing(_Frozen):
    """Facts that timing models in turns leaves and the report reads; every mapping but `noise` is by arm."""

    arms: Mapping[str, Speed]
    intervals: Mapping[str, Mapping[str, Interval]]
    ratios: Mapping[str, Ratios]
    """Against the first arm."""
    last_against: Mapping[str, Ratios]
    """Of the last arm against each other one."""
    chain: Mapping[str, Ratios]
    """Against the arm before, of those whose stages build on each other."""
    noise: Ratios
    """Of the first arm against itself."""
    prompts: int
    """How many there were."""
    host: Machine
    repeating: Repeating | None = None
    """What was told apart, where something drafts."""


class StepReport(_Frozen):
    """One step: what it did, what it took, what it wrote."""

    name: str
    verb: str
    method: str
    backend: str
    status: Literal["executed", "cached", "emitted", "verified"]
    key: str
    seconds: float
    """Wall time of the run that made the artifact, also when this run found it cached."""
    peak_memory_mib: float
    artifact_bytes: int
    estimate_seconds: float
    estimate_peak_memory_mib: float
    estimate_disk_bytes: int | None = None
    """Null in reports of versions that didn't keep it."""
    options: dict[str, Any] = Field(default_factory=dict)
    facts: dict[str, Any] = Field(default_factory=dict)
    measurement: Measurement | None = None


class GateResult(_Frozen):
    """One gate: pass iff the whole interval is inside the limit, fail iff it is outside, else inconclusive."""

    name: str
    step: str = ""
    """The step after which it was measured; empty is the result."""
    limit: str
    value: float | None
    ci95: Interval | None
    verdict: GateVerdict
    reason: str = ""


class Speedup(_Frozen):
    """Result against baseline."""

    decode: Ratio | None = None
    """Of answers that don't repeat themselves, where something drafts."""
    prefill: Ratio | None = None
    repeating: Repeating | None = None
    """What was told apart, where something drafts."""


class OtherBaseline(_Frozen):
    """A further baseline timed in the same interleaved session."""

    name: str
    speed: Speed
    speedup: Speedup


class ServedSpeed(_Frozen):
    """What clients of a server saw with so many requests at a time; medians over requests."""

    concurrency: int
    requests: int
    prompt_tokens_p50: float | None
    """As the server counts them; null where it doesn't."""
    output_tokens_p50: float
    ttft_ms_p50: float
    ttft_ms_p50_ci95: Interval
    ttft_ms_p95: float | None
    tpot_ms_p50: float
    tpot_ms_p50_ci95: Interval
    tpot_ms_p95: float | None
    e2e_ms_p50: float
    e2e_ms_p95: float | None
    output_tokens_per_s: float
    """Of all requests together, from the first call to the last token."""
    requests_per_s: float
    usd_per_million_output_tokens: float | None = None
    """Null where the machine has no price: `cost` of the result says why."""
    usd_per_million_blended_tokens: float | None = None


Kind = Literal["clients", "rate"]
"""Closed loop of clients, or open loop of a request rate."""


class LoadRow(_Frozen):
    """What clients of one variant saw under one load; times from when a request was due, medians over requests."""

    variant: str
    kind: Kind
    load: float
    """Clients that each ask again when they are answered, or requests per second on average, whatever comes back."""
    requests: int
    errors: int
    ttft_ms_p50: float | None
    ttft_ms_p50_ci95: Interval | None
    ttft_ms_p95: float | None
    tpot_ms_p50: float | None
    tpot_ms_p50_ci95: Interval | None
    tpot_ms_p95: float | None
    e2e_ms_p50: float | None
    e2e_ms_p95: float | None
    e2e_ms_mean: float | None = None
    output_tokens_per_s: float
    """Of all requests together, from the first that was due to the last token."""
    requests_per_s: float
    good_share: float | None
    """Of all requests, those that kept every limit; an error keeps none. Null without limits."""
    goodput_per_s: float | None
    """Good requests per second."""
    usd_per_million_output_tokens: float | None
    usd_per_million_blended_tokens: float | None
    reason: str = ""
    """Why a null above is null."""


class Loaded(_Frozen):
    """The result under load, as the clients of a server saw it that was started for this on this machine."""

    server: str
    """`optikit serve` or `vLLM`."""
    rows: tuple[LoadRow, ...]
    limits: Limits
    seed: int
    """Of the times of open loops, and of the choice of prompts."""
    prompts: int
    """How many there were, asked in turn."""
    end_of_text_ignored: bool
    """Whether every answer was as long as asked, whatever the text."""
    peak_memory_mib: float
    """Of all processes of the server together."""


class Served(_Frozen):
    """A server, measured from outside."""

    url: str
    model: str
    speed: tuple[ServedSpeed, ...] = ()
    tokens_counted_by: Literal["the server", "chunks of its stream"]
    end_of_text_ignored: bool
    """Whether the server was willing to write the asked number of tokens whatever the text."""
    reason: str = ""
    """Why quality or another number is missing."""


class Report(_Frozen):
    """Everything a run found out."""

    schema_version: Literal[1] = 1
    verdict: Verdict
    recipe: dict[str, Any]
    model: dict[str, Any]
    target: dict[str, Any]
    host: dict[str, Any]
    versions: dict[str, str]
    baseline: Measurement
    result: Measurement
    steps: tuple[StepReport, ...]
    measures: tuple[StepReport, ...] = ()
    """The steps that measured; kept apart because they change nothing."""
    speedup: Speedup = Speedup()
    other_baselines: tuple[OtherBaseline, ...] = ()
    attribution: tuple[dict[str, Any], ...] = ()
    speculation: dict[str, Any] | None = None
    served: Served | None = None
    """Where a server was measured."""
    loaded: Loaded | None = None
    """Where the result was served and loaded: `evaluate: {serving: …}`."""
    payback: Payback | None = None
    """Null where baseline or result has no price: their `cost` says why."""
    gates: tuple[GateResult, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float
    created: str
    command: str
