"""Which stack for this model on that target: the legal ones, ranked by what they can at best reach.

A stack is how the weights are stored, what runs them, on how many accelerators, for how many sequences of which length,
and what drafts for it; stacks.py looks for them, and stages and rules agree to each. They are ranked by roofline
floors, so the order says which one can be faster, not how fast it will be; `--measure` runs the best ones. Expected
quality and speed-ups of speculation are what reports of the user's own runs measured, or published figures, for the
same method on the model nearest in size; where there are none, it says so. The recipe that is written measures both.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from importlib.util import find_spec
from math import log
from pathlib import Path
from typing import Any

from optikit.app import presets, stacks
from optikit.app.stacks import Goal, Judged, Shape, Stages
from optikit.models import adapter
from optikit.models.facts import ModelFacts
from optikit.models.gguf_reader import read_gguf
from optikit.models.reader import read
from optikit.plan.measure_steps import OPTIONAL
from optikit.problems import Problem
from optikit.stages import method_key
from optikit.stages.acquire import dequantize, gguf
from optikit.store.sources import ModelSource
from optikit.targets import Target
from optikit.targets.estimate import Floors, decode_floor, floors, price_words
from optikit.text import clean

Row = Mapping[str, Any]
"""One figure: method, bits, parameters of the model in 10⁹, ratio, source."""
FARTHEST = 4.0
"""Published figures of a model this many times larger or smaller say nothing."""
MOST_LOSS = 0.5
"""Growth of perplexity above which a known loss rules a stack out, where the user names none."""


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
        serve: The entry of `serve:`, or None where a compile stage says what runs it.
        shape: Accelerators that share it, sequences at once, tokens of each.
        copies: How many of it work side by side on the target.
        floors: What serving its result takes at least, on the accelerators of one copy.
        gain: Time per token of the untouched model on the whole target over that of this one, floors of both, times
            what speculation was published to bring.
        quality: Published or measured quality of the method, or None.
        drafting: Published speed-up of its speculation, or None.
        rounded: The engine that stores the weights in fewer bits although no stage quantizes them, or "".
        fits: Weights and caches are smaller than the memory; None where that isn't known.
        problems: Why it can't work; warnings if it can.
    """

    stages: Stages
    serve: Mapping[str, Any] | None = None
    shape: Shape = field(default_factory=Shape)
    copies: int = 1
    floors: Floors
    gain: float
    quality: Quality | None
    drafting: Row | None = None
    rounded: str
    fits: bool | None
    problems: tuple[Problem, ...]

    @property
    def legal(self) -> bool:
        """Whether nothing refuses it."""
        return all(problem.level == "warning" for problem in self.problems)

    @property
    def unproven(self) -> bool:
        """Whether it was pruned, and nothing is known of the loss."""
        return self.quality is None and any(verb == "prune" for verb, _, _ in self.stages)

    @property
    def window(self) -> int:
        """Tokens of a calibration sample and of a measured window."""
        return min(512, self.floors.length)

    @property
    def name(self) -> str:
        """Methods in order, and what runs them, e.g. `gptq 4-bit + vllm tp 4`."""
        words = [_word(method, options) for _, method, options in self.stages]
        if self.serve:
            words.append(self.serve["server"])
        shared = [f"{name} {number}" for name, number in (("tp", self.shape.tensor), ("pp", self.shape.pipeline))]
        return " ".join([" + ".join(words), *(each for each in shared if not each.endswith(" 1"))])


def _word(method: str, options: Mapping[str, Any]) -> str:
    told = [f"{options['bits']}-bit"] if "bits" in options else []
    told += [str(options[name]) for name in ("scheme", "backend", "quantization_dtype") if name in options]
    return " ".join([method, *told])


def facts_of(source: ModelSource) -> ModelFacts:
    """Return what stages will see of a model: one that they can't read is unpacked before the first of them."""
    if source.format == "gguf":
        return gguf.after(gguf.Options(), read_gguf(source.path))
    facts = (
        adapter.facts(source.path, source.base.path, promised=True) if source.base else read(source.path, promised=True)
    )
    return dequantize.after(dequantize.Options(), facts) if facts.packing else facts


def candidates(
    facts: ModelFacts,
    target: Target,
    *,
    goal: Goal = "latency",
    batch: int | None = None,
    length: int | None = None,
    reports: Sequence[Path] = (),
) -> list[Candidate]:
    """Return every candidate, the best legal one first, those that can't work last.

    Args:
        facts: The model.
        target: Where it will run.
        goal: What counts.
        batch: Sequences at once; None is one for latency, and else as many as serve most tokens.
        length: Tokens of a sequence; None is 2048, or what the model has. Shorter ones are tried where it doesn't fit.
        reports: Output directories of earlier runs; what they measured goes before what was published.

    Raises:
        InputMissingError: One of them has no report.
    """
    rows = (*(row for directory in reports for row in measured(directory)), *presets.evidence(), *evidence())
    length = min(length or 2048, facts.max_positions or 2048)
    found = stacks.search(facts, target, goal=goal, batch=batch, length=length)
    best = sorted((one for one in found if one.legal and one.fits), key=lambda one: one.seconds_per_token)
    found += stacks.pruned(best, facts, goal=goal, batch=batch, length=length)
    judged = [_candidate(one, facts, rows) for one in found]
    if best and best[0].shape.batch == 1:
        judged += [_drafted(*one, facts, rows) for one in stacks.speculating(best)]
    return sorted(
        judged, key=lambda one: (not one.legal, one.fits is False, one.unproven, -one.gain, len(one.stages), _loss(one))
    )


def _loss(one: Candidate) -> tuple[bool, float]:
    return (one.quality is None, one.quality.ratio if one.quality else 0.0)


def within(ranked: list[Candidate], most_loss: float | None) -> list[Candidate]:
    """Return the legal candidates that fit and whose published loss is allowed, in the same order.

    A method without published figures stays: the recipe's gate decides about it.
    """
    most = MOST_LOSS if most_loss is None else most_loss
    return [
        one
        for one in ranked
        if one.legal and one.fits is not False and (one.quality is None or one.quality.ratio <= 1 + most)
    ]


def _candidate(one: Judged, facts: ModelFacts, rows: Sequence[Row]) -> Candidate:
    after, shape, target = one.made.facts, one.shape, one.target
    mine = stacks.part(target, shape)
    stored = stacks.as_served(after, one.end)
    served = floors(stored, mine, batch=shape.batch, length=shape.length)
    if shape.batch == 1 and shape.pipeline > 1:  # a token goes through the stages one after another
        alone = stacks.part(target, replace(shape, pipeline=1))
        served = replace(served, decode_seconds=decode_floor(stored, alone, length=shape.length))
    made = [verb for verb, _, _ in one.made.stages]
    kept = stored.weight_bytes >= min(facts.weight_bytes, 2 * facts.parameters) or bool({"quantize", "prune"} & {*made})
    return Candidate(
        stages=one.made.stages,
        serve=one.served,
        shape=shape,
        copies=stacks.copies(target, shape),
        floors=served,
        gain=_plain(facts, target, shape) / one.seconds_per_token,
        quality=_known(one.made.stages, facts, rows) if kept else None,
        rounded="" if kept else one.made.stages[-1][1],
        fits=one.fits and served.fits,
        problems=one.problems,
    )


def _plain(facts: ModelFacts, target: Target, shape: Shape) -> float:
    """Return the least time per token of the untouched model on the whole target, whether it fits or not."""
    whole = replace(shape, tensor=target.cores or target.count, pipeline=1)
    return stacks.per_token(facts, target, whole)


def _drafted(one: Judged, method: str, facts: ModelFacts, rows: Sequence[Row]) -> Candidate:
    """Return a candidate that speculates, faster by what was published of it where anything was."""
    found = _candidate(one, facts, rows)
    row = _nearest([row for row in speedups() if row["method"] == method], facts)
    return replace(found, drafting=row, gain=found.gain * (row["speedup"] if row else 1.0))


def evidence() -> tuple[Row, ...]:
    """Return the published figures."""
    return tuple(_published()["row"])


def speedups() -> tuple[Row, ...]:
    """Return the published speed-ups of speculation."""
    return tuple(_published()["speculation"])


@cache
def _published() -> Mapping[str, Sequence[Row]]:
    text = resources.files("optikit.rules").joinpath("evidence.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


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
            "scheme": changed[0].options.get("scheme"),
            "parameters": report.model["parameters"] / 1e9,
            "ratio": round(found.ratio, 3),
            "source": f"measured: {directory}, {found.protocol}",
        }


def _known(stages: Stages, facts: ModelFacts, known: Sequence[Row]) -> Quality | None:
    if any(verb in {"prune", "finetune"} for verb, _, _ in stages):
        return None
    for verb, method, options in stages:
        if verb != "quantize":
            continue
        told = ("bits", "scheme")
        alike = [row for row in known if row["method"] == method]
        row = _nearest([row for row in alike if all(row.get(n) == options[n] for n in told if n in options)], facts)
        return Quality(ratio=row["ratio"], source=row["source"]) if row else None
    return Quality(ratio=1.0, source="the weights stay as they are")


def _nearest(rows: Sequence[Row], facts: ModelFacts) -> Row | None:
    """Return the row of the model nearest in size, if any is near."""
    size = log(facts.parameters / 1e9)
    near = sorted(rows, key=lambda row: abs(log(row["parameters"]) - size))
    return near[0] if near and abs(log(near[0]["parameters"]) - size) <= log(FARTHEST) else None


def recipe(
    best: Candidate, path: Path, target: Target, *, model: str, most_loss: float | None, text: str | None = None
) -> str:
    """Return a recipe of a candidate, with its reasons as comments; it is loaded once to be sure that it is valid.

    Args:
        best: The candidate.
        path: Where the recipe will lie.
        target: Where its result will run.
        model: As recipes name it.
        most_loss: Most that perplexity may grow.
        text: Calibration and evaluation text as recipes name it; None is encyclopedia prose of a package.
    """
    import json

    from optikit.recipe.load import loads
    from optikit.recipe.starter import PROSE

    lines = [
        f"# {best.name} for {target.name}, recommended by optikit. Floors by roofline, not measurements:",
        *(f"#   {clean(line)}" for line in reasons(best)),
        "",
        f"model: {json.dumps(model)}",
        f"target: {json.dumps(target.name)}",
        "",
        "calibration:",
        f"  text: &prose {PROSE if text is None else json.dumps(text)}",
        "  part: [0.0, 0.8]                     # the last fifth is kept for measuring",
        '  drop_lines: &markup ["<doc", "</doc"]',
        "  samples: 64",
        f"  length: {best.window}",
        "",
        "stages:" if best.stages else "stages: []",
        *(line for stage in best.stages for line in _stage_lines(*stage)),
        *(["", "serve:", f"  - {json.dumps(best.serve)}"] if best.serve else []),
        "",
        *(
            _measured_here(best, most_loss)
            if runs_here(best, target)
            else ["# No runtime of this is here: measure it where it runs, with `optikit eval URL`."]
        ),
        "",
    ]
    written = "\n".join(lines)
    loads(written, path)
    return written


def runs_here(one: Candidate, target: Target) -> bool:
    """Return whether a runtime of this machine loads what a candidate leaves."""
    engines = [method for verb, method, _ in one.stages if verb == "compile"]
    missing = any(name in OPTIONAL and find_spec(OPTIONAL[name][0]) is None for name in engines)
    return not engines or (target.device == "cpu" and not missing)


def _measured_here(best: Candidate, most_loss: float | None) -> Iterator[str]:
    """Yield measurements and gates of what a runtime on this machine can load."""
    yield from (
        "evaluate:",
        "  perplexity:",
        "    text: *prose",
        "    part: [0.8, 1.0]",
        "    drop_lines: *markup",
        f"    window: {best.window}",
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
    if verb == "speculate":
        yield "      prompts: *prose                  # better: prompts of the kind that it will get"
    for name, value in options.items():
        yield f"      {name}: {value}"


def _place(one: Candidate) -> Iterator[str]:
    """Yield on what it lies, and what its speculation was seen to bring."""
    shape = one.shape
    if shape.devices > 1:
        parts = f"tensor parallel {shape.tensor}" + (f", pipeline parallel {shape.pipeline}" * (shape.pipeline > 1))
        yield f"{parts}; the target has room for {one.copies} of it; {shape.length} tokens a sequence"
    if one.drafting:
        row = one.drafting
        yield f"speculation: {row['speedup']:g} times as fast on {row['text']} ({row['source']}); text decides"
    elif any(verb == "speculate" for verb, _, _ in one.stages):
        yield "speculation: nothing published for a model of this size; the run measures it"


def reasons(one: Candidate) -> list[str]:
    """Return why a candidate stands where it stands."""
    found = one.floors
    step = f"a token takes at best {100 / one.gain:.0f} % of the untouched model's time on the whole target"
    lines = [f"weights {found.weight_bytes / 1e9:.3g} GB; {step}", *_place(one)]
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
