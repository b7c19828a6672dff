"""Quality on running text: perplexity, KL divergence from the baseline, top-1 agreement.

The model is asked through the runtime that will serve it, so what a compiled graph or an int4 kernel changes is seen.
The baseline's run keeps its logits, and every candidate is compared with those same logits, streamed from disk.

Paper   perplexity protocols of GPTQ (arXiv:2210.17323), transformers' documentation and lm-evaluation-harness, see
        `perplexity_protocols`; divergence statistics of llama.cpp's `perplexity --kl-divergence`
Cost    one forward pass over the text (`hf`: window / stride passes); the baseline keeps two bytes per scored token and
        vocabulary entry, 4 GiB at most: divergence is that of the windows whose logits fit. A model for
        transformers that is larger than memory is read a block at a time, and all windows go through that
Differs intervals come from a bootstrap over windows: tokens of one window depend on each other
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optikit.errors import StageFailedError
from optikit.evaluation.windows import Cut, CutOptions, cut
from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import ANY, MAIN, PLANNED, Estimate, Facts, Input, Job, no_objection
from optikit.stages.measure._streaming import is_streamed, opened, streaming, whole_bytes
from optikit.targets import Target

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from optikit.evaluation.scoring import Reading, Scores, Window
    from optikit.evaluation.streamed import Streamed
    from optikit.runtime.decoder import Decoder

SUMMARY = "perplexity, KL divergence and top-1 agreement against the baseline"
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

NLL, TOP1, LOGITS, DIVERGENCE, ABOUT = "nll.npy", "top1.npy", "logits.f16", "divergence.npy", "about.json"
HOPELESS_NATS = 100.0
"""A uniform guess over a vocabulary of 50,000 costs 10.8 nats; ten times that is no language model."""
FLOPS, TORCH_FLOPS = 150e9, 120e9
"""Floating-point operations per second of two CPU cores, as compiled runtimes and transformers reach them."""
ATTENTION_FLOPS = 90e9
"""The same for products of queries, keys and values."""
SECONDS_PER_LOGIT = 2e-8
"""Time for log-likelihood, float16 and divergence of one logit."""
MOST_KEPT = 4 * 2**30
"""Bytes of kept logits; a whole test set's would fill a disk."""


class Options(CutOptions):
    """What to score, and how."""

    runtime: Literal["transformers", "onnxruntime", "openvino", "llama-cpp"] = "transformers"
    """Runtime that loads the model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of weights and arithmetic, where the runtime lets one choose."""
    keep_logits: bool = False
    """Keep the logits, so that other models can be compared with this one."""


def inputs(options: Options) -> Mapping[str, Input]:
    """Declare the text, whose tokens, and the scores that these are compared with."""
    return dict.fromkeys(("text", "tokenizer", "baseline"), PLANNED)


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what can't be measured on this model."""
    if options.window > facts.max_positions:
        message = f"windows of {options.window} tokens are longer than the model's context of {facts.max_positions}"
        fix = f"set window to {facts.max_positions} or less"
        yield Problem(code="window-exceeds-context", message=message, fix=fix, loc=("window",))


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate: two operations per weight and token, attention over windows, logits; `calibration_tokens` of text."""
    return _estimate(options, facts, calibration_tokens)


def _estimate(options: Options, facts: ModelFacts, calibration_tokens: int = 0) -> Estimate:
    windows, step = options.expected(calibration_tokens)
    tokens = windows * options.window
    logits = windows * step * facts.vocab
    attended = 4 * options.window * facts.hidden * facts.layers * tokens
    compiled = options.runtime != "transformers"
    whole = Estimate(
        seconds=(3 if compiled else 7)
        + 2 * facts.parameters * tokens / (FLOPS if compiled else TORCH_FLOPS)
        + attended / ATTENTION_FLOPS
        + logits * SECONDS_PER_LOGIT,
        peak_bytes=whole_bytes(facts, options.runtime, options.window),
        disk_bytes=min(2 * logits, MOST_KEPT) if options.keep_logits else 20 * tokens,
    )
    return whole if compiled else streaming(whole, facts, length=options.window, tokens=tokens)


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Measuring changes nothing."""
    return facts


def run(options: Options, job: Job) -> Facts:
    """Score `job.source` on `job.inputs["text"]`; against `job.inputs["baseline"]` where there is one.

    Raises:
        InputMissingError: The text is too short for the windows.
        StageFailedError: The model returned NaN, or was compared across protocols or vocabularies.
    """
    made = cut(job.inputs["text"], job.inputs["tokenizer"], options.shape)
    loaded: dict[str, Any] = {"runtime": options.runtime, "dtype": options.dtype, "max_tokens": options.window}
    model = opened(job, partial(_estimate, options), **loaded)
    about = {
        "protocol": made.protocol,
        "vocab": model.vocab,
        "runtime": model.runtime,
        "dtype": model.dtype,
        "threads": model.threads,
    }
    baseline = job.inputs.get("baseline")
    if baseline is not None:
        require_comparable(about, json.loads((baseline / ABOUT).read_text(encoding="utf-8")))
    scores = _score(options, job, model, made.windows)
    (job.dest / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
    return told(about, scores, made, job)


def require_comparable(about: dict[str, Any], baseline: dict[str, Any]) -> None:
    """Refuse to compare what was measured on other windows, or with another vocabulary.

    Raises:
        StageFailedError: Saying what differs.
    """
    for what in ("protocol", "vocab"):
        if about[what] != baseline[what]:
            message = f"can't compare with the baseline: its {what} is {baseline[what]}, this one's is {about[what]}"
            raise StageFailedError(message, fix="measure both on the same text, with the same tokenizer")


def _compared_windows(windows: Sequence[Window], vocab: int) -> int:
    """Return of how many windows, the first ones, logits are kept: all, or as many as fit; two have an interval."""
    from itertools import accumulate

    sizes = accumulate(2 * vocab * window.scored for window in windows)
    return max(2, sum(size <= MOST_KEPT for size in sizes))


def _score(options: Options, job: Job, model: Decoder | Streamed, windows: Sequence[Window]) -> Scores:
    from optikit.evaluation.scoring import NotFiniteError, score

    kept = job.inputs["baseline"] / LOGITS if "baseline" in job.inputs else None
    try:
        with ExitStack() as files:
            reading = files.enter_context(_reading(model, windows, job))
            keep = files.enter_context((job.dest / LOGITS).open("wb")) if options.keep_logits else None
            against = files.enter_context(kept.open("rb")) if kept and kept.is_file() else None
            compared = _compared_windows(windows, model.vocab)
            scores = score(reading, windows, against=against, keep=keep, compared=compared, progress=job.progress)
    except NotFiniteError as error:
        message = f"{model.runtime} ({model.dtype}): {error}"
        raise StageFailedError(message, fix="the model overflows; try another dtype, or a milder stage") from error
    if scores.known.mean() > HOPELESS_NATS:
        message = f"the model is broken: {scores.known.mean():.0f} nats per token, a uniform guess costs less than 13"
        raise StageFailedError(message, fix="look at the stages before this one")
    keep_scores(scores, job.dest)
    return scores


def _reading(model: Decoder | Streamed, windows: Sequence[Window], job: Job) -> AbstractContextManager[Reading]:
    from optikit.evaluation.scoring import cached

    if is_streamed(model):
        return model.reading(windows, job.scratch, progress=job.progress, note=job.note)
    return nullcontext(cached(model, windows))


def keep_scores(scores: Scores, dest: Path) -> None:
    """Keep what was found at every scored position, for the models that are compared with this one."""
    import numpy as np

    np.save(dest / NLL, scores.nll)
    np.save(dest / TOP1, scores.top1)
    if scores.divergence is not None:
        np.save(dest / DIVERGENCE, scores.divergence)


def told(about: dict[str, Any], scores: Scores, made: Cut, job: Job) -> Facts:
    """Return the facts of a model whose windows were scored, by whatever runtime, and kept in `job.dest`."""
    import numpy as np

    from optikit.evaluation import perplexity, statistics
    from optikit.evaluation.results import Perplexity, Quality

    nll = scores.known
    found: dict[str, Any] = {"ratio": None, "ratio_ci95": None}
    compared: dict[str, Any] = {}  # the baseline has nothing to be compared with: nulls that miss nothing
    extra: dict[str, Any] = {}
    if "baseline" in job.inputs:
        base = np.load(job.inputs["baseline"] / NLL, allow_pickle=False)
        found["ratio"], found["ratio_ci95"] = statistics.perplexity_ratio(base, scores.nll, seed=job.seed)
        shift = statistics.detectable_shift(statistics.block_means(scores.nll - base))
        extra["detectable_ratio"] = float(np.exp(shift))
        compared, statistic_set = _compared(scores, base, job)
        extra |= statistic_set
    quality = Quality(
        runtime=about["runtime"],
        perplexity=Perplexity(
            protocol=about["protocol"],
            value=perplexity.perplexity(nll),
            bits_per_byte=perplexity.bits_per_byte(nll, made.scored_bytes),
            tokens=nll.size,
            **_per_word(nll, made),
            **found,
        ),
        **compared,
    )
    files = sorted(path.name for path in job.dest.iterdir())
    return quality.model_dump(mode="json") | extra | {"about": about, "files": files}


def _per_word(nll: NDArray[np.float64], made: Cut) -> dict[str, float]:
    """Return perplexity per word and per byte where the protocol counts words; without what overflows."""
    import math

    from optikit.evaluation import perplexity

    if made.words is None:
        return {}
    units = {"word_perplexity": made.words, "byte_perplexity": made.scored_bytes}
    found = {name: perplexity.perplexity(nll, count) for name, count in units.items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _compared(scores: Scores, base: NDArray[np.float64], job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of `Quality` that compare with the baseline, and the full statistic set."""
    import numpy as np

    from optikit.evaluation import divergence, statistics
    from optikit.evaluation.results import Divergence

    agree = scores.top1 == np.load(job.inputs["baseline"] / TOP1, allow_pickle=False)
    shares = statistics.block_means(np.where(np.isnan(scores.nll), np.nan, agree))
    compared: dict[str, Any] = {
        "top1_agreement": float(shares.mean()),
        "top1_agreement_ci95": statistics.mean_interval(shares, seed=job.seed),
    }
    apart = scores.divergence
    if apart is None:
        return compared | {"reason": "no divergence: the baseline's logits were not kept"}, {}
    blocks = ~np.isnan(apart).all(axis=1)
    found = ~np.isnan(apart)
    tokens = int(found.sum())
    if tokens < divergence.FEWEST_TOKENS:
        reason = f"no divergence: {tokens} scored tokens are too few, {divergence.FEWEST_TOKENS} are needed"
        return compared | {"reason": reason}, {}
    full = divergence.statistics(apart[found], base[found], scores.nll[found], agree[found])
    compared["kl_divergence"] = Divergence(
        mean=full.mean,
        median=full.median,
        p90=full.percentiles["p90"],
        p99=full.percentiles["p99"],
        max=full.max,
        mean_ci95=statistics.mean_interval(statistics.block_means(apart[blocks]), seed=job.seed),
        histogram=divergence.histogram(apart[found]),
        tokens=full.tokens,
    )
    return compared, {"divergence": asdict(full)}
