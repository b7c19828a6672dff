"""A server under the loads that a recipe asks for: what `serving` and `served_load` share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from optikit import records
from optikit.evaluation import texts
from optikit.evaluation.latency_limits import Limits
from optikit.models import tokenizer
from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import MACHINE, PLANNED, SERVERS_PEAK, Estimate, Facts, Input, Job, StageOptions
from optikit.stages.measure import speed

if TYPE_CHECKING:
    from optikit.evaluation.load_test import Asked
    from optikit.evaluation.results import LoadRow
    from optikit.runtime.completions_client import Client

SAMPLES = "samples.jsonl"
RATE_BATCH = 16
"""Answers at once that a server has room for whose requests come at random times."""


class Options(StageOptions):
    """How much to ask of a server."""

    prompt_tokens: int = Field(default=128, ge=1)
    """Tokens of a prompt that is a passage of prose; JSON Lines keep their own lengths."""
    new_tokens: int = Field(default=64, ge=2)
    """Tokens of an answer whose prompt doesn't say."""
    requests: int = Field(default=32, ge=2)
    """Requests of each load."""
    clients: tuple[int, ...] = (1, 2, 4, 8)
    """Closed loops: clients that ask again when they are answered."""
    rates: tuple[float, ...] = ()
    """Open loops: requests per second, at random times."""
    limits: Limits = Limits()
    """What a good request keeps."""
    start_s: float = Field(default=1800, gt=0)
    """Seconds that the server may take until it answers."""
    hang_s: float = Field(default=900, gt=0)
    """Seconds without a byte after which it counts as hung."""

    @property
    def batch(self) -> int:
        """Most answers at once."""
        return max([*self.clients, *(RATE_BATCH for _ in self.rates)])

    @property
    def loads(self) -> int:
        """How many loads there are."""
        return len(self.clients) + len(self.rates)


def inputs(options: Options) -> Mapping[str, Input]:
    """Declare prompts, whose tokens, what drafts; and this machine."""
    return {**dict.fromkeys(("prompts", "tokenizer", "speculator", "made"), PLANNED), "machine": MACHINE}


def check(options: Options, facts: ModelFacts) -> Iterator[Problem]:
    """Yield what is longer than the model's context."""
    if options.prompt_tokens + options.new_tokens > facts.max_positions:
        message = f"{options.prompt_tokens} prompt tokens and {options.new_tokens} new ones exceed the model's context"
        fix = f"keep their sum at {facts.max_positions} or less"
        yield Problem(code="prompt-exceeds-context", message=message, fix=fix, loc=("serving", "prompt_tokens"))


def estimate(options: Options, facts: ModelFacts, runtime: str) -> Estimate:
    """Estimate: a start, all weights per token that is written, a quarter of that where several are written at once."""
    engine = speed.COSTS[runtime]
    per_token = max(facts.weight_bytes / engine.bytes_per_second, 0.001)
    alone = sum(each == 1 for each in options.clients)
    answers = options.requests * (alone + (options.loads - alone) / 4)
    kept = options.batch * (options.prompt_tokens + options.new_tokens)
    cache = kept * 8 * facts.layers * facts.kv_heads * facts.head_dim
    return Estimate(
        seconds=engine.start_s + answers * options.new_tokens * per_token,
        peak_bytes=int(2.2 * facts.weight_bytes + engine.overhead + cache),
        disk_bytes=2000 * options.requests * options.loads,
    )


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Measuring changes nothing."""
    return facts


def asked(options: Options, job: Job) -> list[Asked]:
    """Return what is asked: records as they are, of prose passages of so many tokens."""
    from optikit.evaluation import load_test

    path = job.inputs["prompts"]
    if records.json_fields(records.read(path)) is not None:
        return load_test.read_prompts(path, options.new_tokens)
    by = tokenizer.load(job.inputs["tokenizer"])
    found = texts.prompts(path, by, length=options.prompt_tokens, wanted=options.requests, seed=job.seed)
    return [load_test.Asked(prompt=prompt, new_tokens=options.new_tokens) for prompt in found]


def loaded(server: str, client: Client, options: Options, job: Job, group: int) -> Facts:
    """Put a server under all loads, and keep every request.

    Args:
        server: What it is called.
        client: Asks it.
        options: How much.
        job: Whose prompts, and where samples go.
        group: Process group of the server, whose memory is read.

    Raises:
        UnavailableError: It answers nothing.
        StageTimeoutError: It hangs.
    """
    from optikit.evaluation import bench_results, load_test
    from optikit.process import memory

    prompts = asked(options, job)
    target = load_test.warmed(client, client.models()[0], prompts, {"return_token_ids": True})
    rows: list[LoadRow] = []
    samples: list[str] = []
    for level in load_test.levels("result", options.clients, options.rates):
        job.progress(len(rows), options.loads, "load")
        replies = load_test.run(target.send, level, len(prompts), requests=options.requests, seed=job.seed)
        rows.append(bench_results.row(level, replies, options.limits, hour=None))
        begun = min(each.due_ns for each in replies)
        samples += [bench_results.sample(level, each, begun).model_dump_json() for each in replies]
    (job.dest / SAMPLES).write_text("".join(f"{each}\n" for each in samples), encoding="utf-8")
    peak = memory.group_peak_mib(group)
    found: dict[str, Any] = {
        "server": server,
        "rows": [row.model_dump(mode="json") for row in rows],
        "limits": options.limits.model_dump(mode="json"),
        "seed": job.seed,
        "prompts": len(prompts),
        "end_of_text_ignored": "ignore_eos" in target.extra,
        "peak_memory_mib": peak,
    }
    return {"loaded": found, "files": [SAMPLES], SERVERS_PEAK: peak}
