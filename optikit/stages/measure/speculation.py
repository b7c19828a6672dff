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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import Field

from optikit.errors import InputMissingError
from optikit.evaluation import lossless, texts
from optikit.evaluation.paired_decoding import Pair, Writer
from optikit.models import tokenizer
from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import ANY, MACHINE, MAIN, PLANNED, Estimate, Facts, Input, Job, StageOptions, no_objection
from optikit.targets import Target

if TYPE_CHECKING:
    from optikit.runtime.decoder import Decoder, SinglePath, Tokens
    from optikit.runtime.generate import TextGenerator
    from optikit.runtime.speculation.cost_model import DraftCosts, WindowCosts
    from optikit.runtime.speculation.speculator import ChoosingDecoder, Speculator
    from optikit.runtime.speculation.tuning import Written

SUMMARY = "window costs, acceptance, choice of drafter, speed-up and identity of speculation"
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

CONTEXT = 200
"""Tokens in the cache while windows are timed."""


class Options(StageOptions):
    """What to measure, and how."""

    runtime: Literal["transformers", "onnxruntime", "openvino", "llama-cpp"]
    """Runtime that loads the model."""
    prompts: int = Field(default=40, ge=texts.FEWEST_PROMPTS)
    """Most prompts to use, half of them to choose, half to judge."""
    eval_part: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    """Share of the file that these are drawn from; those of the datastore come from the rest."""
    template: str = ""
    """How a prompt is made of the fields of a record; empty is its `prompt`."""
    prompt_tokens: int = Field(default=128, ge=1)
    """Length of passages, where prompts have to be cut from prose."""
    new_tokens: int = Field(default=96, ge=8)
    """Most tokens to write per prompt."""
    chat: bool = True
    """Put prompts through the model's chat template, if it has one."""
    chat_template: str = ""
    """Name of that template, of a model with several; empty is the one called `default`."""
    acceptor: str = "greedy"
    """What decides on drafts; one that is lossy isn't held to plain decoding's texts."""
    tune: bool = True
    """Choose the speculator's parameters anew."""
    datastore_answers: int = Field(default=200, ge=0)
    """Most further prompts whose answers become n-grams to draft from."""


def inputs(options: Options) -> Mapping[str, Input]:
    """Declare the speculator, the prompts, whose tokens; and this machine, for a time is its own."""
    return {**dict.fromkeys(("speculator", "prompts", "tokenizer"), PLANNED), "machine": MACHINE}


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield nothing: prompts that don't fit are left out."""
    yield from ()


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate: every token reads all weights once, four times over."""
    tokens = (4 * options.prompts + options.datastore_answers) * options.new_tokens
    return Estimate(
        seconds=30 + tokens * facts.first_bytes / 9e9,
        peak_bytes=int(1.3 * facts.weight_bytes) + 900 * 2**20,
        disk_bytes=10_000,
    )


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Measuring changes nothing."""
    return facts


def run(options: Options, job: Job) -> Facts:
    """Measure `job.source` with `job.inputs["speculator"]` on `job.inputs["prompts"]`; write tuning.json.

    Raises:
        InputMissingError: Too few prompts that fit the context.
        StageFailedError: A speculated text differs from the plain one, and not for a tie.
    """
    from optikit.runtime import load
    from optikit.runtime.generate import TextGenerator
    from optikit.runtime.speculation import acceptors, speculator, tuning
    from optikit.runtime.speculation.cost_model import measure_drafting, measure_windows

    decoder = load(job.source, runtime=options.runtime, threads=job.threads, device=job.device)
    generator = TextGenerator(decoder, job.inputs["tokenizer"])
    acceptor = acceptors.kept(options.acceptor)
    writer = Writer(decoder, options.new_tokens, generator.ends, acceptor)
    used, spare = _prompts(options, job, generator, decoder)
    given = speculator.read(job.inputs["speculator"])
    speculator.require_fit(decoder, given)
    total = len(used) + len(spare)
    context = _context(used)
    paths, given = _single(decoder, given, context)
    costs = measure_windows(decoder, context)
    drafting = measure_drafting(given, context)
    remembered = _texts(writer, spare, job, 0, total)
    texts = [tuning.cache_drafts(given, decoder, each) for each in _texts(writer, used[::2], job, len(spare), total)]
    trial = _tuned(given, remembered, texts, costs, drafting) if options.tune else given
    noise = lossless.kernel_noise(decoder, texts)
    pairs = _pairs(writer, trial, used[1::2], job, total)
    found = _measured(pairs, costs, drafting, trial, job.seed)
    found |= lossless.compare(writer, trial, pairs, noise) if acceptor.lossless else lossless.count(pairs, noise)
    chosen = _named(trial if _pays(found) else replace(trial, method="off"))
    told = {name: found[name] for name in ("speedup", "predicted_speedup")}
    files = speculator.write_tuning(chosen, job.dest, told)
    return {
        "speculation": {
            "method": given.method,
            "chosen": chosen.method,
            "acceptor": options.acceptor,
            "lossless": acceptor.lossless,
            **paths,
            **_parameters(trial),
            **found,
            "predicted_single_drafter": _alone(given, texts, costs, drafting),
            "own_drafter": _own_drafter(given, trial, texts, costs, drafting),
            "drafting_ms": {"ask": drafting.ask_ms, "per_token": drafting.per_token_ms},
            "window_ms": {str(m): ms for m, ms in costs.ms.items()},
        },
        "remembered_texts": len(remembered) + len(texts) if trial.datastore else 0,
        "files": list(files),
    }


def _single(decoder: Decoder, given: Speculator, context: Tokens) -> tuple[dict[str, Any], Speculator]:
    """Choose what runs a token alone, where several tokens have a graph of their own: that one, if it is as fast.

    Then a text doesn't depend on drafts at all, for whole numbers sum up the same in windows of any length.
    """
    from optikit.runtime.speculation.cost_model import measure_singles
    from optikit.runtime.speculation.speculator import run_single
    from optikit.runtime.speculation.tuning import WORTHWHILE

    if not getattr(decoder, "verifies_apart", False):
        return {"verify_path": "own"}, given
    ms = measure_singles(cast("ChoosingDecoder", decoder), context)
    single: SinglePath = "verify" if ms["verify"] <= ms["own"] * WORTHWHILE else "own"
    run_single(decoder, single)
    return {"verify_path": "int8", "single_path": single, "single_ms": ms}, replace(given, single=single)


def _own_drafter(
    given: Speculator, trial: Speculator, texts: Sequence[Written], costs: WindowCosts, drafting: DraftCosts
) -> dict[str, Any]:
    """Return what heads or a draft model bring beside lookup, predicted on the prompts that choose; a lookup is all."""
    from optikit.runtime.speculation import tuning
    from optikit.runtime.speculation.speculator import MODELS

    if given.method not in MODELS:
        return {"name": given.method, "used": trial.drafts}
    without = tuning.tune(replace(given, ahead=0), texts, costs, drafting=drafting) if trial.ahead else trial
    ms = [tuning.price(each, texts, costs, drafting).ms_per_token for each in (without, trial)]
    gain = ms[0] / ms[1] if trial.ahead and ms[1] else 1.0
    return {"name": given.method, "used": trial.ahead > 0, "predicted_speedup": gain}


def _prompts(
    options: Options, job: Job, generator: TextGenerator, decoder: Decoder
) -> tuple[list[Tokens], list[Tokens]]:
    """Return the prompts to choose and judge on, and some for the datastore, as tokens, in an order by the seed."""
    path = job.inputs["prompts"]
    divided = texts.divided(
        path,
        tokenizer.load(job.inputs["tokenizer"]),
        lambda prompt: generator.encode(prompt, chat=options.chat and (options.chat_template or True)),
        eval_prompts=options.prompts,
        template=options.template,
        length=options.prompt_tokens,
        seed=job.seed,
        eval_part=options.eval_part,
    )
    room = decoder.max_tokens - options.new_tokens
    used, spare = ([tokens for tokens in part if len(tokens) <= room] for part in (divided.judged, divided.others))
    if len(used) < texts.FEWEST_PROMPTS:
        message = f"{path} has {len(used)} prompts of at most {room} tokens; {texts.FEWEST_PROMPTS} are needed"
        raise InputMissingError(message, fix="give more prompts: half of them choose, the other half judge")
    return used, spare[: options.datastore_answers]


def _named(speculator: Speculator) -> Speculator:
    """Return the speculator under the name of what it really does: heads that are never asked are none."""
    from optikit.runtime.speculation.speculator import MODELS

    unasked = speculator.method in MODELS and speculator.ahead == 0
    return replace(speculator, method="lookup") if unasked else speculator


def _parameters(speculator: Speculator) -> dict[str, Any]:
    """Return what was tuned."""
    asked = speculator.ahead > 0
    return {
        "lengths": speculator.as_json()["lengths"],
        "gate": speculator.gate if speculator.datastore else None,
        "ahead": speculator.ahead,
        "ahead_gate": speculator.ahead_gate if asked else None,
    }


def _alone(given: Speculator, texts: Sequence[Written], costs: WindowCosts, drafting: DraftCosts) -> dict[str, float]:
    """Return what each drafter would bring alone, predicted on the prompts that choose, tuned for it."""
    from optikit.runtime.speculation import tuning

    found = {}
    alone = {"lookup": replace(given, ahead=0)}
    if given.ahead:
        alone[given.method] = replace(given, lengths={})
    for name, each in alone.items():
        matches: tuple[int, ...] = tuning.MATCHES if name == "lookup" else ()
        tuned = tuning.tune(each, texts, costs, drafting=drafting, matches=matches)
        found[name] = tuning.price(tuned, texts, costs, drafting).speedup
    return found


def _context(prompts: Sequence[Tokens]) -> Tokens:
    import numpy as np

    longest = max(prompts, key=len)
    return np.resize(longest, CONTEXT)


def _texts(writer: Writer, prompts: Sequence[Tokens], job: Job, done: int, total: int) -> list[Written]:
    """Return what the model writes for prompts."""
    from optikit.runtime.speculation.tuning import Written

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
    given: Speculator,
    remembered: Sequence[Written],
    texts: Sequence[Written],
    costs: WindowCosts,
    drafting: DraftCosts,
) -> Speculator:
    """Return the speculator with the best prediction; as it was given where none beats plain decoding."""
    from optikit.runtime.speculation import tuning

    found = tuning.tune_with_datastore(given, remembered, texts, costs, drafting)
    return found if found.drafts else given


def _pays(found: dict[str, Any]) -> bool:
    """Return whether speculation is worth having here, both by prediction and by measurement."""
    from optikit.runtime.speculation.tuning import WORTHWHILE

    measured, steady = found["speedup"], found["speedup_without_loops"]
    if measured is None or (steady is not None and steady["value"] < 1):
        return False
    return bool(min(found["predicted_speedup"], measured["value"]) >= WORTHWHILE)


def _measured(
    pairs: Sequence[Pair], costs: WindowCosts, drafting: DraftCosts, speculator: Speculator, seed: int
) -> dict[str, Any]:
    """Return speed-up, predicted and measured, and acceptance."""
    from optikit.runtime.speculation import tuning
    from optikit.runtime.speculation.cost_model import FREE

    steps = [step for pair in pairs for step in pair.steps]
    asked = drafting if speculator.ahead else FREE
    predicted = tuning.predict(steps, costs, drafting=asked, min_window=speculator.min_window)
    counted = predicted.statistics
    steady = [pair for pair in pairs if not pair.loops]
    return {
        "speedup": _speedup(pairs, seed),
        "predicted_speedup": predicted.speedup,
        "speedup_without_loops": _speedup(steady, seed),
        "speedup_end_to_end": _ratio([pair.answer_ms for pair in pairs], seed),
        "latency_ms": _latency(pairs),
        "looping": 1 - len(steady) / len(pairs),
        "acceptance_length": counted.acceptance_length,
        "acceptance_by_position": list(counted.acceptance_by_position),
        "drafting_steps": sum(counted.drafted[:1]) / max(1, counted.steps),
        "by_drafter": {
            name: {"steps": count, "drafted": drafted, "accepted": kept}
            for name, (count, drafted, kept) in counted.by.items()
        },
        "by_prompt": [_by_prompt(pair, costs, asked, speculator) for pair in pairs if pair.ms_per_token is not None],
        "prompts": len(pairs),
    }


def _by_prompt(pair: Pair, costs: WindowCosts, asked: DraftCosts, speculator: Speculator) -> dict[str, float]:
    """Return acceptance and speed-up of one prompt, predicted and measured."""
    from optikit.runtime.speculation import tuning

    found = tuning.predict(pair.steps, costs, drafting=asked, min_window=speculator.min_window)
    plain, speculated = pair.ms_per_token or (1.0, 1.0)
    return {
        "acceptance_length": found.statistics.acceptance_length,
        "speedup": plain / speculated,
        "predicted_speedup": found.speedup,
    }


def _latency(pairs: Sequence[Pair]) -> dict[str, dict[str, float]]:
    """Return median and 90th percentile of the time of an answer, the prompt's run included."""
    import numpy as np

    times = zip(("plain", "speculated"), np.array([pair.answer_ms for pair in pairs]).T, strict=True)
    return {name: {"p50": float(np.median(each)), "p90": float(np.percentile(each, 90))} for name, each in times}


def _speedup(pairs: Sequence[Pair], seed: int) -> dict[str, Any] | None:
    """Return the ratio of times per token, over pairs; None where fewer than two have any."""
    return _ratio([pair.ms_per_token for pair in pairs if pair.ms_per_token is not None], seed)


def _ratio(timed: Sequence[tuple[float, float]], seed: int) -> dict[str, Any] | None:
    """Return the ratio of (plain, speculated) times; None for fewer than two."""
    import numpy as np

    from optikit.evaluation import statistics

    if len(timed) < 2:
        return None
    value, interval = statistics.paired_ratio(*np.array(timed).T, seed=seed)
    return {"value": value, "ci95": list(interval)}
