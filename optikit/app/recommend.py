"""Which stack for this model on that target: every legal one, ranked by what it can at best reach.

Candidates are combinations of a quantize method with its usual options and a compile engine, of those that are
installed here; each is checked by its stages and by the rules. They are ranked by roofline floors, so the order says
which one can be faster, not how fast it will be. Expected quality is what reports of the user's own runs measured, or
published figures, for the same method on the model nearest in size; where there are none, it says so. The recipe that
is written measures both.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from math import log
from pathlib import Path
from typing import Any, Literal, get_args

from optikit.models import adapter
from optikit.models.facts import DTYPE_BYTES, ModelFacts
from optikit.models.reader import read, read_gguf
from optikit.problems import Problem
from optikit.rules.engine import check
from optikit.rules.stack import Placed, Stack
from optikit.stage import row_problems
from optikit.stages import load, method_key, methods
from optikit.stages.acquire import dequantize, gguf
from optikit.stages.compile import _neuron_options
from optikit.store.sources import ModelSource
from optikit.targets import Target, neuron
from optikit.targets.estimate import PRICED_BATCH, Floors, floors, price_words
from optikit.text import clean

Row = Mapping[str, Any]
"""One figure: method, bits, parameters of the model in 10⁹, ratio, source."""
Stages = tuple[tuple[str, str, Mapping[str, Any]], ...]
"""Verb, method and options of each stage."""
Goal = Literal["latency", "throughput", "cost"]
BATCH: Mapping[Goal, int] = {"latency": 1, "throughput": PRICED_BATCH, "cost": PRICED_BATCH}
"""Sequences at once that each goal is judged at."""
BITS = (4, 8)
GROUP_SIZES = (128, 64, 32)
SERVERS = {"cuda": "vllm"}
"""What loads a directory that isn't compiled; a CPU has to have an engine, for transformers gains no speed there."""
FARTHEST = 4.0
"""Published figures of a model this many times larger or smaller say nothing."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A perplexity ratio that was published or measured, and where."""

    ratio: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A stack.

    Attributes:
        stages: Verb, method and options of each stage.
        floors: What serving its result takes at least.
        gain: Time per token of the untouched model over that of this one, floors of both.
        quality: Published or measured quality of the method, or None.
        rounded: The engine that stores the weights in fewer bits although no stage quantizes them, or "".
        problems: Why it can't work; warnings if it can.
    """

    stages: Stages
    floors: Floors
    gain: float
    quality: Quality | None
    rounded: str
    problems: tuple[Problem, ...]

    @property
    def legal(self) -> bool:
        """Whether nothing refuses it."""
        return all(problem.level == "warning" for problem in self.problems)

    @property
    def name(self) -> str:
        """Methods in order, e.g. `gptq 4-bit + onnxruntime`."""
        words = [
            f"{method} {options['bits']}-bit" if "bits" in options else method for _, method, options in self.stages
        ]
        return " + ".join(words) or "as it is"


def facts_of(source: ModelSource) -> ModelFacts:
    """Return what stages will see of a model: one that they can't read is unpacked before the first of them."""
    if source.format == "gguf":
        return gguf.after(gguf.Options(), read_gguf(source.path))
    facts = (
        adapter.facts(source.path, source.base.path, promised=True) if source.base else read(source.path, promised=True)
    )
    return dequantize.after(dequantize.Options(), facts) if facts.packing else facts


def candidates(
    facts: ModelFacts, target: Target, *, goal: Goal = "latency", length: int = 2048, reports: Sequence[Path] = ()
) -> list[Candidate]:
    """Return every candidate, the best legal one first, those that can't work last.

    Args:
        facts: The model.
        target: Where it will run.
        goal: What counts.
        length: Tokens of a sequence.
        reports: Output directories of earlier runs; what they measured goes before what was published.

    Raises:
        InputMissingError: One of them has no report.
    """
    rows = (*(row for directory in reports for row in measured(directory)), *evidence())
    found = [
        _first_legal([_judge(stages, facts, target, goal, length, rows) for stages in alike])
        for alike in _stacks(facts, target)
    ]
    return sorted(found, key=lambda one: (not one.legal, one.floors.fits is False, -one.gain, _loss(one)))


def _loss(one: Candidate) -> tuple[bool, float]:
    return (one.quality is None, one.quality.ratio if one.quality else 0.0)


def within(ranked: list[Candidate], most_loss: float | None) -> list[Candidate]:
    """Return the legal candidates that fit and whose published loss is allowed, in the same order.

    A method without published figures stays: the recipe's gate decides about it.
    """
    return [
        one
        for one in ranked
        if one.legal
        and one.floors.fits is not False
        and (most_loss is None or one.quality is None or one.quality.ratio <= 1 + most_loss)
    ]


def _stacks(facts: ModelFacts, target: Target) -> Iterator[list[Stages]]:
    """Yield every stack, each as the ways to compile it that are worth a try, in order."""
    engines = [method for method in methods("compile") if method in target.engines]
    ends: list[list[Stages]] = [
        [(("compile", engine, options),) for options in _engine_presets(engine, target)] for engine in engines
    ]
    if not ends or target.device in SERVERS:
        ends.append([()])
    for end in ends:
        yield end
        for method in methods("quantize"):
            for options in _presets(method, facts):
                yield [(("quantize", method, options), *each) for each in end]


def _engine_presets(engine: str, target: Target) -> list[Mapping[str, Any]]:
    """Return options to try for an engine: of Neuron, as few cores as the model fits on."""
    if engine != "neuron":
        return [{}]
    backend = _neuron_options.backend_for(target)
    return [{"backend": backend, "tensor_parallel": degree} for degree in neuron.degrees(target)]


def _first_legal(alike: Sequence[Candidate]) -> Candidate:
    return next((one for one in alike if one.legal), alike[-1])


def _presets(method: str, facts: ModelFacts) -> Iterator[Mapping[str, Any]]:
    """Yield the options to try: bits where the method lets one choose, the largest usual group that divides."""
    known = load("quantize", method).Options.model_fields
    if "dtype" in known and DTYPE_BYTES.get(facts.dtype, 0) <= 2:
        return  # a cast that saves nothing
    widths = [columns for _, columns in facts.linears.values()]
    fitting = [size for size in GROUP_SIZES if all(width % size == 0 for width in widths)]
    group = {"group_size": fitting[0]} if fitting and "group_size" in known else {}
    if "bits" not in known:
        yield group
        return
    allowed = get_args(known["bits"].annotation)
    for bits in BITS:
        if bits in allowed:
            yield {"bits": bits, **group}


def _judge(
    stages: Stages,
    facts: ModelFacts,
    target: Target,
    goal: Goal,
    length: int,
    rows: Sequence[Row],
) -> Candidate:
    placed, problems, after = [], [], facts
    for verb, method, chosen in stages:
        stage, before = load(verb, method), after
        options = stage.Options(**chosen)
        problems += [Problem(code="needs-trait", message=f"{method} needs {t}") for t in stage.NEEDS - before.traits]
        problems += [each for each in row_problems(stage, method, options, before) if each.level == "error"]
        problems += stage.check(options, before, target)
        after = stage.after(options, before)
        values = options.model_dump(mode="json")
        placed.append(Placed(verb=verb, method=method, options=values, before=before, after=after))
    compiled = any(verb == "compile" for verb, _, _ in stages)
    server = None if compiled else SERVERS.get(target.device)
    stack = Stack(
        stages=tuple(placed),
        target=target,
        model=facts,
        serve={"engine": server} if server else {},
        gates=("decode_speedup",),
    )
    problems += check(stack)
    served = floors(after, target, batch=BATCH[goal], length=length)
    plain = floors(facts, target, batch=BATCH[goal], length=length)
    kept = after.weight_bytes >= facts.weight_bytes or any(verb == "quantize" for verb, _, _ in stages)
    return Candidate(
        stages=stages,
        floors=served,
        gain=_moved(plain) / _moved(served),
        quality=_known(stages, facts, rows) if kept else None,
        rounded="" if kept else stages[-1][1],
        problems=tuple(problems),
    )


def _moved(found: Floors) -> float:
    """Return what a decoding step takes: seconds, or bytes where the bandwidth isn't known; ratios are the same."""
    return found.decode_seconds or float(found.weight_bytes + found.kv_bytes)


@cache
def evidence() -> tuple[Row, ...]:
    """Return the published figures."""
    text = resources.files("optikit.rules").joinpath("evidence.toml").read_text(encoding="utf-8")
    return tuple(tomllib.loads(text)["row"])


def measured(directory: Path) -> Iterator[Row]:
    """Yield the quality that a run's report has of quantized weights, if nothing else had changed them."""
    from optikit.report.write import load as load_report

    report = load_report(directory)
    changed = [step for step in report.steps if step.verb in {"prune", "finetune", "quantize"}]
    if len(changed) != 1 or changed[0].verb != "quantize" or changed[0].backend != "optikit":
        return
    quality = changed[0].measurement.quality if changed[0].measurement else None
    found = quality.perplexity if quality else None
    if found is not None and found.ratio is not None:
        yield {
            "method": changed[0].method,
            "bits": changed[0].options.get("bits", 8),
            "parameters": report.model["parameters"] / 1e9,
            "ratio": round(found.ratio, 3),
            "source": f"measured: {directory}, {found.protocol}",
        }


def _known(stages: Stages, facts: ModelFacts, known: Sequence[Row]) -> Quality | None:
    for verb, method, options in stages:
        if verb != "quantize":
            continue
        size = log(facts.parameters / 1e9)
        rows = [row for row in known if row["method"] == method and row["bits"] == options.get("bits", row["bits"])]
        near = sorted(rows, key=lambda row: abs(log(row["parameters"]) - size))
        if not near or abs(log(near[0]["parameters"]) - size) > log(FARTHEST):
            return None
        return Quality(ratio=near[0]["ratio"], source=near[0]["source"])
    return Quality(ratio=1.0, source="the weights stay as they are")


def recipe(best: Candidate, path: Path, target: Target, *, model: str, most_loss: float | None) -> str:
    """Return a recipe of a candidate, with its reasons as comments; it is loaded once to be sure that it is valid."""
    import json

    from optikit.recipe.load import loads
    from optikit.recipe.starter import PROSE

    runs_here = not _compiled(best) or target.device == "cpu"
    lines = [
        f"# {best.name} for {target.name}, recommended by optikit. Floors by roofline, not measurements:",
        *(f"#   {clean(line)}" for line in reasons(best)),
        "",
        f"model: {json.dumps(model)}",
        f"target: {json.dumps(target.name)}",
        "",
        "calibration:",
        f"  text: &prose {PROSE}",
        "  part: [0.0, 0.8]                     # the last fifth is kept for measuring",
        '  drop_lines: &markup ["<doc", "</doc"]',
        "  samples: 64",
        "  length: 512",
        "",
        "stages:" if best.stages else "stages: []",
        *(line for stage in best.stages for line in _stage_lines(*stage)),
        "",
        *(
            _measured_here(best, most_loss)
            if runs_here
            else ["# Nothing here runs what this compiles to: measure it where it runs, with `optikit eval URL`."]
        ),
        "",
    ]
    text = "\n".join(lines)
    loads(text, path)
    return text


def _measured_here(best: Candidate, most_loss: float | None) -> Iterator[str]:
    """Yield measurements and gates of what a runtime on this machine can load."""
    yield from (
        "evaluate:",
        "  perplexity:",
        "    text: *prose",
        "    part: [0.8, 1.0]",
        "    drop_lines: *markup",
        "    window: 512",
        "    windows: 16",
    )
    if _compiled(best):
        yield "  speed: {prompt_tokens: 128, new_tokens: 64, repetitions: 8}"
    yield from ("", "gates:", f"  perplexity_ratio: {{max: {1 + (0.5 if most_loss is None else most_loss):g}}}")
    if _compiled(best):
        yield "  decode_speedup: {min: 1.0}"


def _compiled(one: Candidate) -> bool:
    return any(verb == "compile" for verb, _, _ in one.stages)


def _stage_lines(verb: str, method: str, options: Mapping[str, Any]) -> Iterator[str]:
    yield f"  - {verb}:"
    yield f"      {method_key(verb)}: {method}"
    for name, value in options.items():
        yield f"      {name}: {value}"


def reasons(one: Candidate) -> list[str]:
    """Return why a candidate stands where it stands."""
    found = one.floors
    step = f"a decoding step takes at best {100 / one.gain:.0f} % of the untouched model's"
    lines = [f"weights {found.weight_bytes / 1e9:.3g} GB; {step}"]
    if found.decode_seconds is not None:
        lines.append(f"decodes at most {found.batch / found.decode_seconds:.4g} tokens/s at batch {found.batch}")
    if price := price_words(found):
        lines.append(price)
    if one.rounded:
        lines.append(f"quality: {one.rounded} stores the weights in fewer bits, and nothing is published of that loss")
    elif one.quality is None:
        lines.append("quality: nothing published for this method on a model of this size; the gate decides")
    else:
        lines.append(f"quality: perplexity times {one.quality.ratio:g} expected ({one.quality.source})")
    return [*lines, *(f"warning: {problem.message}" for problem in one.problems if problem.level == "warning")]
