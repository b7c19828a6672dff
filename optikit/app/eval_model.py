"""`optikit eval DIR` as one function: the measuring steps alone, on a model as it lies there; nothing is optimized.

What is measured is absolute: there is no baseline, so gates on ratios stay inconclusive, and two such reports are put
side by side by `optikit diff`.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from optikit import runtime, targets
from optikit.app import device, door
from optikit.app.output_dir import require_no_seal
from optikit.errors import InputMissingError, UsageError
from optikit.execution.execute import Settings, execute
from optikit.models import reader
from optikit.models.facts import ModelFacts
from optikit.plan import measurements, price, room
from optikit.plan.context import Context, Found, resolve_texts
from optikit.plan.model import BASELINE, Plan, Step
from optikit.progress import make as make_progress
from optikit.recipe.schema import Evaluate, Gate, Price, Recipe
from optikit.report import assemble
from optikit.store.sources import ModelSource
from optikit.store.store import Store

if TYPE_CHECKING:
    from optikit.evaluation.results import Report

GENAI = "genai_config.json"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to measure: what the user named, the runtime and directory found there, and what is known of it.

    Attributes:
        tokenizer: Directory with the tokenizer and, where there is one, config.json.
        speculator: Directory of its speculation, or None.
    """

    named: Path
    runtime: str
    place: Path
    tokenizer: Path
    speculator: Path | None
    facts: ModelFacts


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for."""

    subject: Path
    out: Path
    wanted: Evaluate
    gates: Mapping[str, Gate] = field(default_factory=dict)
    cost: Price = field(default_factory=Price)
    base: Path = Path()
    offline: bool = False
    progress: str = "auto"
    device: str = "cpu"


def find(directory: Path) -> Subject:
    """Find the model in a directory: one of ours, a Hugging Face one, or a compiled one.

    Raises:
        InputMissingError: Nothing there can be loaded, or its configuration is missing.
    """
    name, place = door.enter(directory)
    model = next((path for path in (place, directory / "model", directory) if (path / "config.json").is_file()), None)
    facts = reader.read(model) if model else _compiled_facts(place)
    beside = directory / runtime.SPECULATOR
    return Subject(
        named=directory,
        runtime=name,
        place=place,
        tokenizer=model or place,
        speculator=beside if place != directory and beside.is_dir() else None,
        facts=replace(facts, weight_bytes=_weight_bytes(place)),
    )


def _compiled_facts(place: Path) -> ModelFacts:
    """Return the facts of a compiled directory that has no model beside it, from its own configuration."""
    try:
        model = json.loads((place / GENAI).read_text(encoding="utf-8"))["model"]
        decoder = model["decoder"]
        heads, width = decoder["num_attention_heads"], decoder["head_size"]
        return ModelFacts(
            model_type=str(model["type"]),
            hidden=decoder["hidden_size"],
            intermediate=0,
            layers=decoder["num_hidden_layers"],
            heads=heads,
            kv_heads=decoder.get("num_key_value_heads", heads),
            head_dim=width,
            vocab=model["vocab_size"],
            max_positions=model["context_length"],
            tied=True,
            dtype="",
            weight_bytes=0,
            linears={},
            traits=frozenset({"onnx"}),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{place / GENAI} doesn't describe a model: {error!r}"
        raise InputMissingError(message, fix="name the output of a run, which holds the model's config.json") from error


def _weight_bytes(place: Path) -> int:
    return sum(path.stat().st_size for path in place.iterdir() if path.suffix in assemble.WEIGHT_SUFFIXES)


def measure(request: Request) -> Report:
    """Measure a model directory and write the report to `request.out`.

    Raises:
        OptikitError: Anything that goes wrong, by the table of exit codes.
        UsageError: Nothing to measure was asked for.
    """
    from optikit.report import summary, write

    started = time.monotonic()
    require_no_seal(request.out)
    subject = find(request.subject)
    wanted = request.wanted
    if wanted.perplexity is None and wanted.speed is None and not wanted.tasks:
        raise UsageError("nothing to measure", fix="give --text, --task or --recipe")
    with make_progress(request.progress) as progress:
        store = Store.default(warn=progress.note)
        plan = make(subject, request, store, note=progress.note)
        room.require(plan, plan.measures, store)
        execution = execute(plan, store, progress, Settings())
    report = assemble.report(
        plan,
        execution.artifacts,
        execution.statuses,
        seconds=time.monotonic() - started,
        command=shlex.join(["optikit", *sys.argv[1:]]),
    )
    write.write(report, request.out)
    if request.progress != "none":
        summary.show(report, request.out)
    return report


def make(subject: Subject, request: Request, store: Store, *, note: Callable[[str], None]) -> Plan:
    """Return a plan of measuring steps only: the model is its own baseline and result."""
    recipe = Recipe(model=str(subject.named), evaluate=request.wanted, gates=request.gates, cost=request.cost)
    target = targets.find("cpu")
    assert target is not None  # noqa: S101 - a row of our own
    target, problems = price.priced(target, request.cost)
    if problems:
        raise UsageError(problems[0].message, fix=problems[0].fix)
    names = tuple(sorted(path.name for path in subject.place.iterdir() if path.is_file()))
    named = str(subject.named)
    source = ModelSource(
        spec=named,
        kind="path",
        format="safetensors",
        path=subject.place,
        digest=store.digest_directory(subject.place, names),
        resolved=named,
        names=names,
    )
    context = Context(
        recipe=recipe,
        device=device.choose(request.device),
        target=target,
        model=source,
        facts=subject.facts,
        texts=resolve_texts(recipe, store, base=request.base, offline=request.offline, note=note),
    )
    return Plan(
        recipe=recipe,
        target=target,
        model=source,
        facts=subject.facts,
        texts=context.texts,
        steps=(),
        measures=room.fitted(_steps(subject, context), None),
        max_memory_bytes=None,
        device=context.device,
        warnings=(),
    )


def _steps(subject: Subject, context: Context) -> Iterator[Step]:
    """Yield the measuring steps: what lies there is the baseline, and nothing is compared with it."""
    wanted = context.recipe.evaluate
    measured = measurements.Subject(name=BASELINE, key="", runtime=subject.runtime, facts=subject.facts)
    tokenizer = _placed(subject.tokenizer)
    if wanted.perplexity is not None:
        yield measurements.quality_step(context, measured, tokenizer, None, keep_logits=False)
    if wanted.tasks:
        yield measurements.tasks_step(context, measured, tokenizer, None)
    if wanted.speed is not None:
        found = {"model": _placed(subject.place), "tokenizer": tokenizer}
        found |= {"speculator": _placed(subject.speculator)} if subject.speculator else {}
        drafting = {"speculator": "speculator"} if subject.speculator else {}
        arm = {"name": "baseline", "role": "model", "runtime": subject.runtime, "dtype": "auto", **drafting}
        options = {"arms": [arm], **wanted.speed.model_dump(exclude={"prompts"})}
        yield measurements.speed_step(context, options, "", found)


def _placed(directory: Path) -> Found:
    """Return a directory as an input; its content is part of the model's digest."""
    return Found(path=str(directory.absolute()))
