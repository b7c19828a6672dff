"""Speculation on the compiled model: what a window costs, what is accepted, what pays, and whether texts stay the same.

Half of the prompts choose (lengths are tuned by predicted speed), the other half judge: each is written plainly and
with speculation, in turns, and both texts are compared token by token. Where they part, the plain logits there must be
a tie within the noise of the engine's own kernels, and with windows of two tokens at least, where all kernels are the
same, both texts must be equal to the last token. Anything else fails the step: speculation would not be lossless.

Paper   none; acceptance is counted as vLLM counts it
Cost    (prompts × 4 + remembered ones) × new_tokens decoding steps
Differs speed is decoding only: the prompt's run is the same with and without speculation
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from optikit.errors import InputMissingError
from optikit.models.facts import ModelFacts, Trait
from optikit.problems import Problem
from optikit.stages.measure import _identity, _text
from optikit.stages.measure._writing import Pair, Writer
from optikit.stages.protocol import Estimate, Facts, Job, StageOptions
from optikit.targets import Target

if TYPE_CHECKING:
    from optikit.runtime.choice import WindowCosts, Written
    from optikit.runtime.protocol import Decoder, Tokens
    from optikit.runtime.speculator import Speculator
    from optikit.runtime.text import Talker

SUMMARY = "window costs, acceptance, choice of drafter, speed-up and identity of speculation"
NEEDS: frozenset[Trait] = frozenset()
CALIBRATED = False
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "onnxruntime", "onnxruntime-genai")
ENVIRONMENT: str | None = None

FEWEST_PROMPTS = 4
CONTEXT = 200
"""Tokens in the cache while windows are timed."""


class Options(StageOptions):
    """What to measure, and how."""

    runtime: Literal["transformers", "onnxruntime"]
    """Runtime that loads the model."""
    prompts: int = Field(default=40, ge=FEWEST_PROMPTS)
    """Most prompts to use, half of them to choose, half to judge."""
    prompt_tokens: int = Field(default=128, ge=1)
    """Length of passages, where prompts have to be cut from prose."""
    new_tokens: int = Field(default=96, ge=8)
    """Most tokens to write per prompt."""
    chat: bool = True
    """Put prompts through the model's chat template, if it has one."""
    tune: bool = True
    """Choose the speculator's parameters anew."""
    remember: int = Field(default=200, ge=0)
    """Most further prompts whose answers are remembered as n-grams to draft from."""


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield nothing: prompts that don't fit are left out."""
    yield from ()


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate: every token reads all weights once, four times over."""
    tokens = (4 * options.prompts + options.remember) * options.new_tokens
    return Estimate(
        seconds=30 + tokens * facts.weight_bytes / 10e9,
        peak_bytes=int(1.3 * facts.weight_bytes) + 700 * 2**20,
        disk_bytes=10_000,
    )


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Measuring changes nothing."""
    return facts


def run(options: Options, job: Job) -> Facts:
    """Measure `job.source` with `job.inputs["speculator"]` on `job.inputs["prompts"]`; write choice.json.

    Raises:
        InputMissingError: Too few prompts that fit the context.
        StageFailedError: A speculated text differs from the plain one, and not for a tie.
    """
    from optikit.runtime import choice, load, speculator
    from optikit.runtime.text import Talker

    decoder = load(job.source, runtime=options.runtime, threads=job.threads)
    talker = Talker(decoder, job.inputs["tokenizer"])
    writer = Writer(decoder, options.new_tokens, talker.ends)
    prompts = _prompts(options, job, talker, decoder)
    used, spare = prompts[: options.prompts], prompts[options.prompts :]
    given = speculator.read(job.inputs["speculator"])
    costs = choice.measure_windows(decoder, _context(prompts))
    remembered = _texts(writer, spare, job, 0, len(prompts))
    texts = _texts(writer, used[::2], job, len(spare), len(prompts))
    trial = _tuned(given, remembered, texts, costs) if options.tune else given
    noise = _identity.kernel_noise(decoder, texts)
    pairs = _pairs(writer, trial, used[1::2], job, len(prompts))
    found = _measured(pairs, costs, trial, job.seed) | _identity.compare(writer, trial, pairs, noise)
    chosen = trial if _pays(found) else replace(trial, method="off")
    told = {name: found[name] for name in ("speedup", "predicted_speedup")}
    files = speculator.write_choice(chosen, job.dest, told)
    parameters = {"lengths": trial.as_json()["lengths"], "gate": trial.gate if trial.table else None}
    return {
        "speculation": {"method": given.method, "chosen": chosen.method, "lossless": True} | parameters | found,
        "window_ms": {str(m): ms for m, ms in costs.ms.items()},
        "remembered_texts": len(remembered) + len(texts) if trial.table else 0,
        "files": list(files),
    }


def _prompts(options: Options, job: Job, talker: Talker, decoder: Decoder) -> list[Tokens]:
    """Return prompts as tokens, in an order that the seed decides."""
    import numpy as np

    path = job.inputs["prompts"]
    lines = list(_text.prompt_fields(path, _text.read(path)))
    if lines:
        found = [talker.encode(line, chat=options.chat) for line in lines]
    else:
        by = _text.tokenizer(job.inputs["tokenizer"])
        length = options.prompt_tokens
        passages = _text.prompts(path, by, length=length, wanted=options.prompts, seed=job.seed)
        found = [np.array(tokens, np.int64) for tokens in passages]
    room = decoder.max_tokens - options.new_tokens
    fitting = [tokens for tokens in found if len(tokens) <= room]
    if len(fitting) < FEWEST_PROMPTS:
        message = f"{path} has {len(fitting)} prompts of at most {room} tokens; {FEWEST_PROMPTS} are needed"
        raise InputMissingError(message, fix="give more prompts: half of them choose, the other half judge")
    order = np.random.default_rng(job.seed).permutation(len(fitting))[: options.prompts + options.remember]
    return [fitting[index] for index in order]


def _context(prompts: Sequence[Tokens]) -> Tokens:
    import numpy as np

    longest = max(prompts, key=len)
    return np.resize(longest, CONTEXT)


def _texts(writer: Writer, prompts: Sequence[Tokens], job: Job, done: int, total: int) -> list[Written]:
    """Return what the model writes for prompts."""
    from optikit.runtime.choice import Written

    found = []
    for number, prompt in enumerate(prompts, done):
        job.progress(number, total, "prompt")
        found.append(Written(prompt, writer.plain(prompt)[0]))
    return found


def _pairs(writer: Writer, speculator: Speculator, prompts: Sequence[Tokens], job: Job, total: int) -> list[Pair]:
    """Write the prompts that judge, both ways; who begins alternates. A first pair warms up."""
    writer.pair(speculator, prompts[0], plain_first=True)
    found = []
    for number, prompt in enumerate(prompts, total - len(prompts)):
        job.progress(number, total, "prompt")
        found.append(writer.pair(speculator, prompt, plain_first=bool(number % 2)))
    return found


def _tuned(
    given: Speculator, remembered: Sequence[Written], texts: Sequence[Written], costs: WindowCosts
) -> Speculator:
    """Return the speculator with the best prediction; as it was given where none beats plain decoding."""
    from optikit.runtime import choice

    found = choice.tune_with_recall(given, remembered, texts, costs)
    return found if found.lengths or found.table else given


def _pays(found: dict[str, Any]) -> bool:
    """Return whether speculation is worth having here, both by prediction and by measurement."""
    from optikit.runtime.choice import WORTHWHILE

    measured = found["speedup"]
    return measured is not None and min(found["predicted_speedup"], measured["value"]) >= WORTHWHILE


def _measured(pairs: Sequence[Pair], costs: WindowCosts, speculator: Speculator, seed: int) -> dict[str, Any]:
    """Return speed-up, predicted and measured, and acceptance."""
    from optikit.runtime import choice

    steps = [step for pair in pairs for step in pair.steps]
    predicted = choice.predict(steps, costs, min_window=speculator.min_window)
    counted = predicted.statistics
    steady = [pair for pair in pairs if not pair.loops]
    return {
        "speedup": _speedup(pairs, seed),
        "predicted_speedup": predicted.speedup,
        "speedup_without_loops": _speedup(steady, seed),
        "looping": 1 - len(steady) / len(pairs),
        "acceptance_length": counted.acceptance_length,
        "acceptance_by_position": list(counted.acceptance_by_position),
        "drafting_steps": sum(counted.drafted[:1]) / max(1, counted.steps),
        "prompts": len(pairs),
    }


def _speedup(pairs: Sequence[Pair], seed: int) -> dict[str, Any] | None:
    """Return the ratio of times per token, over pairs; None where fewer than two have any."""
    import numpy as np

    from optikit.metrics import statistics

    timed = [pair.ms_per_token for pair in pairs if pair.ms_per_token is not None]
    if len(timed) < 2:
        return None
    value, interval = statistics.paired_ratio(*np.array(timed).T, seed=seed)
    return {"value": value, "ci95": list(interval)}
