"""What each printed number means: its name, its formula, how it is measured. One row per metric, shown in reports."""

from __future__ import annotations

from dataclasses import dataclass

from optikit.evaluation.results import Report
from optikit.report import figures, task_table, wording


@dataclass(frozen=True, kw_only=True)
class Definition:
    """A metric in words: `formula` is the arithmetic, `meaning` why anyone looks at it."""

    name: str
    formula: str
    meaning: str


DEFINITIONS: dict[str, Definition] = {
    "perplexity": Definition(
        name="Perplexity",
        formula="exp(Σ −ln p(token | tokens before it in the window) / scored tokens)",
        meaning="How surprised the model is by running text; lower is better. Comparable only under the same "
        "protocol: text (by its hash), window length @, number of windows ×, and `opened` where each begins with the "
        "token that the model's tokenizer puts before a text.",
    ),
    "word_perplexity": Definition(
        name="Perplexity per word",
        formula="exp(Σ −ln p(token) / words of the text as it is written)",
        meaning="As lm-evaluation-harness prints it: whole documents, words parted by blanks. Far above perplexity per "
        "token, for a word is several tokens.",
    ),
    "perplexity_ratio": Definition(
        name="Perplexity ratio",
        formula="perplexity(result) / perplexity(baseline)",
        meaning="1.00× is unchanged. Both models score the same windows; the interval is a bootstrap over whole "
        "windows, because tokens within a window depend on each other.",
    ),
    "bits_per_byte": Definition(
        name="Bits per byte",
        formula="Σ −log₂ p(token) / UTF-8 bytes of the scored text",
        meaning="Perplexity without the tokenizer: comparable between models with different vocabularies.",
    ),
    "kl_divergence": Definition(
        name="KL divergence",
        formula="Σ p_baseline · (ln p_baseline − ln p_result), per token, in nats",
        meaning="How far the result's next-token distribution is from the baseline's; 0 is identical. Its upper "
        "percentiles show rare, large damage that the mean hides.",
    ),
    "top1_agreement": Definition(
        name="Top-1 agreement",
        formula="share of positions where argmax p_result = argmax p_baseline",
        meaning="How often both models would write the same next token under greedy decoding.",
    ),
    "task_accuracy": Definition(
        name="Task accuracy",
        formula="items answered right / items",
        meaning="Choices by log-likelihood per character, written answers by exact match (greedy, no chat template), "
        "SQL by the rows that it returns. Comparable only on the same items.",
    ),
    "flips": Definition(
        name="Flips",
        formula="lost: right in the baseline and wrong in the result; won: the reverse",
        meaning="Equal accuracy can hide many of both. The interval of the change is Wald's with half an item added to "
        "each kind, so that it isn't empty where nothing flipped.",
    ),
    "mcnemar": Definition(
        name="p, worse",
        formula="P[Bin(lost + won, ½) ≥ lost], adjusted for the number of tasks (Holm)",
        meaning="How likely so many losses are if the models were equally good: McNemar's exact test, one-sided. Over "
        "all tasks: a permutation test of their mean.",
    ),
    "ttft": Definition(
        name="Time to first token (TTFT)",
        formula="t(first token) − t(call with token ids ready)",
        meaning="How long a user waits before anything appears; grows with the prompt.",
    ),
    "tpot": Definition(
        name="Time per output token (TPOT)",
        formula="(t(last token) − t(first token)) / (new tokens − 1)",
        meaning="The pace of the answer; excludes the first token. Output length is fixed and end-of-text ignored, so "
        "that every run does the same work.",
    ),
    "end_to_end": Definition(
        name="End to end",
        formula="t(last token) − t(call)",
        meaning="What a client of a server waits for the whole answer, network and queue included.",
    ),
    "prefill": Definition(
        name="Prefill speed",
        formula="prompt tokens / TTFT",
        meaning="How fast the prompt is read, tokens per second.",
    ),
    "decode": Definition(
        name="Decode speed",
        formula="1 / TPOT",
        meaning="How fast one user's answer is written at batch 1, tokens per second.",
    ),
    "speedup": Definition(
        name="Speedup",
        formula="median over pairs of time(baseline) / time(result)",
        meaning="Baseline and result run alternately (A B B A), so that a busy machine slows both. The interval is a "
        "bootstrap over the pairs; the noise floor is how far the same ratio of the baseline to itself strays from 1.",
    ),
    "first_call": Definition(
        name="First call",
        formula="wall time of the very first generation after loading",
        meaning="Includes allocation and lazy compilation; no warm-up before it.",
    ),
    "load": Definition(
        name="Load time", formula="wall time from files on disk to a model ready for its first call", meaning=""
    ),
    "peak_memory": Definition(
        name="Peak memory",
        formula="highest resident set size of the process that loads and runs the model",
        meaning="What a machine needs to have to serve it.",
    ),
    "size": Definition(
        name="Size",
        formula="bytes of the weight files on disk; for a compiled artifact, of its graph and weights",
        meaning="",
    ),
    "joules": Definition(
        name="Energy per output token",
        formula="joules that the machine counts while the measured runs read their prompts and write / output tokens",
        meaning="Processors and memory by RAPL, GPUs by NVML: of the whole machine, with whatever else runs on it.",
    ),
    "usd_output": Definition(
        name="Price per million output tokens",
        formula="price per hour / (measured output tokens per second × 3600 / 10⁶)",
        meaning="At the measured throughput, with the machine always busy.",
    ),
    "usd_blended": Definition(
        name="Blended price per million tokens",
        formula="price per hour / (concurrency / TPOT × 3600 / 10⁶) / 4",
        meaning="An estimate: three input tokens for each output token, and nothing charged for reading them.",
    ),
    "acceptance_length": Definition(
        name="Acceptance length",
        formula="1 + accepted draft tokens / verification steps",
        meaning="Tokens written per run of the large model; 1 means that speculation never helped.",
    ),
    "acceptance_by_position": Definition(
        name="Acceptance by position",
        formula="steps where draft token i was accepted / steps",
        meaning="",
    ),
    "gate": Definition(
        name="Gate verdict",
        formula="pass: the whole interval is within the limit; fail: all of it is outside; otherwise inconclusive",
        meaning="An inconclusive gate asks for more samples, not for luck.",
    ),
}
"""By figure key; `figures` names the ones that a report needs."""


def needed(report: Report) -> tuple[str, ...]:
    """Return the keys of the definitions that a report's reader needs, in the order of appearance."""
    keys = [figure.key for group in figures.groups(report) for figure in group.figures]
    if "perplexity" in keys and not wording.measured_only(report):
        keys.insert(keys.index("perplexity") + 1, "perplexity_ratio")
    shown = task_table.rows(report)
    further = (
        (report.served, ("ttft", "tpot", "end_to_end")),
        (shown, ("task_accuracy",)),
        (any(row.flips for row in shown), ("flips", "mcnemar")),
        (report.speedup.decode or report.speedup.prefill, ("speedup",)),
        (report.speculation, ("acceptance_length", "acceptance_by_position")),
        (report.gates, ("gate",)),
    )
    keys += [key for found, group in further if found for key in group]
    return tuple(dict.fromkeys(keys))
