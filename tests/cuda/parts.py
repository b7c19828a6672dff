"""Everything that computes on a device, as parts that each do one job there: stages, training, measuring, decoding.

A part gets the device and a directory of its own, and returns what it found, to be compared with another device's.
`second_device` compares bytes; a GPU adds up in another order, so there shapes and names are compared (`suite`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from optikit.stage import Job
from tests.conftest import build_tiny_llama, write_prose
from tests.stages import test_contract as contract

WORDS = ("one", "two", "row", "sea", "abc", "cat")
TIMES = ("_ms", "_s", "seconds", "per_s", "speed")
"""What is in the name of a fact that is a time, or follows from one."""


@dataclass(frozen=True, kw_only=True)
class World:
    """What the parts read: a model of four tiny blocks, prose, prompts, and the items of a task."""

    source: Path
    prose: Path
    prompts: Path
    items: Path


def make_world(directory: Path) -> World:
    """Write it."""
    directory.mkdir(parents=True, exist_ok=True)
    prompts, items = directory / "prompts.jsonl", directory / "choice.jsonl"
    asked = [f"{a} {b} {i}" for i in range(2) for a in WORDS for b in WORDS]
    prompts.write_text("\n".join(json.dumps({"prompt": each}) for each in asked), encoding="utf-8")
    rows = [{"prompt": f"The {a} and", "choices": ["one", "two", "sea"], "answer": i % 3} for i, a in enumerate(WORDS)]
    items.write_text("\n".join(json.dumps(row) for row in rows * 2), encoding="utf-8")
    source = build_tiny_llama(directory / "source", layers=4)
    return World(source=source, prose=write_prose(directory / "prose.txt"), prompts=prompts, items=items)


Part = Callable[[World, Path, str], Mapping[str, Any]]


def _stage(row: contract.Row, world: World, place: Path, device: str) -> dict[str, Any]:
    """Perform a stage that writes a model: its facts, and the sha256 of every file."""
    facts = contract.perform(row, world.source, world.prose, place, device=device)
    digests = contract.digests(place / "model")
    return _begun(facts, digests) if row.verb == "finetune" else {**facts, **digests}


def _begun(facts: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """Return what doesn't depend on how rounding errors grow while a model learns: the first losses, names of files."""
    found = {name: each for name, each in facts.items() if name.endswith("_before")}
    return {**found, "losses": [round(each, 3) for each in facts["losses"][:2]], "files": sorted(files)}


def job_of(place: Path, device: str, source: Path, **inputs: Path) -> Job:
    """Return a job with places of its own below a directory."""
    for name in ("dest", "scratch"):
        (place / name).mkdir(parents=True, exist_ok=True)
    places = {"dest": place / "dest", "scratch": place / "scratch"}
    return Job(source=source, **places, inputs=inputs, device=device, threads=1)


def _medusa(world: World, place: Path, device: str, *, sequential: bool = False) -> dict[str, Any]:
    """Write texts with the model, and train heads on them."""
    from optikit.stages.speculate import medusa

    small = {"heads": 2, "tokens": 400, "new_tokens": 12, "eval_prompts": 8, "epochs": 2, "draft_vocab": 64}
    job = job_of(place, device, world.source, prompts=world.prompts)
    facts = medusa.run(medusa.Options(**small, sequential=sequential), job)
    return {**_written(facts), "losses": [round(each, 3) for each in facts["training"]["losses"][:2]]}


def _draft(world: World, place: Path, device: str) -> dict[str, Any]:
    """Shorten the model to a draft, and train it on the model's own texts."""
    from optikit.stages.speculate import draft

    make = {"layers": 2, "tokens": 400, "epochs": 2, "learning_rate": 0.005}
    options = draft.Options(new_tokens=12, eval_prompts=8, make=make, precision="fp32")
    facts = draft.run(options, job_of(place, device, world.source, prompts=world.prompts))
    return {"blocks": facts["blocks_kept"], "losses": [round(each, 3) for each in facts["training"]["losses"][:2]]}


def _written(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the model itself wrote to learn from."""
    return {name: each for name, each in facts.items() if name.startswith("self_generated")}


def _quality(world: World, place: Path, device: str, *, streamed: bool = False) -> dict[str, Any]:
    """Measure perplexity, with the whole model in memory or a block at a time."""
    from dataclasses import replace

    from optikit.stages.measure import quality

    options = quality.Options(dtype="float32", window=64, windows=8)
    job = job_of(place, device, world.source, text=world.prose, tokenizer=world.source)
    return _timeless(quality.run(options, replace(job, max_memory_bytes=1) if streamed else job))


def _tasks(world: World, place: Path, device: str) -> dict[str, Any]:
    """Ask a task's questions."""
    from optikit.stages.measure import tasks

    wanted = [{"name": "choice", "max_tokens": 6, "stop": []}]
    options = tasks.Options.model_validate({"dtype": "float32", "tasks": wanted})
    inputs = {"tokenizer": world.source, tasks.role("choice"): world.items}
    return _timeless(tasks.run(options, job_of(place, device, world.source, **inputs)))


def _speculation(world: World, place: Path, device: str) -> dict[str, Any]:
    """Measure window costs T(m), draft from the text, and prove that every text stays."""
    from optikit.stages.measure import speculation
    from optikit.stages.speculate import lookup

    made = place / "speculator"
    made.mkdir(parents=True)
    lookup.run(lookup.Options(), Job(source=world.source, dest=made, scratch=place))
    options = speculation.Options(runtime="transformers", prompts=8, new_tokens=16, tune=False)
    job = job_of(place, device, world.source, speculator=made, tokenizer=world.source, prompts=world.prompts)
    found = speculation.run(options, job)["speculation"]
    return {name: found[name] for name in ("exact_match", "unexplained", "prompts", "acceptance_length")}


def _decoding(world: World, place: Path, device: str) -> dict[str, Any]:
    """Write texts one at a time and in a batch; return them, and the numbers behind the first."""
    import numpy as np

    from optikit import runtime
    from optikit.runtime.speculation.acceptors import Greedy
    from optikit.runtime.speculation.batch_loop import write
    from optikit.runtime.speculation.decoding_loop import Request

    decoder = runtime.load(world.source, dtype="float32", threads=1, max_tokens=128, device=device)
    prompts = [np.arange(5, 5 + length) for length in (4, 9, 6)]
    alone = [list(decoder.greedy(prompt, 12)) for prompt in prompts]
    together: dict[int, list[int]] = {number: [] for number in range(len(prompts))}
    requests = [Request(max_new_tokens=12)] * len(prompts)
    for number, step in write(decoder, prompts, requests, batch=3, acceptor=Greedy()):
        together[number] += step.tokens
    logits = decoder.forward(prompts[1], 0)
    assert list(together.values()) == alone
    return {"texts": alone, "logits": float(np.abs(logits).sum()), "hidden": float(np.abs(decoder.hidden(0)).sum())}


def _speed(world: World, place: Path, device: str) -> dict[str, Any]:
    """Time the model in a process of its own; return what that process loaded."""
    from optikit.stages.measure import speed

    arm = {"name": "baseline", "role": "model", "runtime": "transformers", "dtype": "float32"}
    options = speed.Options(arms=[arm], prompt_tokens=8, new_tokens=4, repetitions=2, warmup=1)
    inputs = {"model": world.source, "prompts": world.prose, "tokenizer": world.source}
    found = speed.run(options, job_of(place, device, world.source, **inputs))["arms"]["baseline"]
    return {name: found[name] for name in ("runtime", "dtype")}


def _timeless(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts without those that are times."""
    return {name: each for name, each in found.items() if not any(part in name for part in TIMES)}


PARTS: dict[str, Part] = {
    **{row.name: partial(_stage, row) for row in contract.ROWS},
    "speculate-medusa": _medusa,
    "speculate-medusa-sequential": partial(_medusa, sequential=True),
    "speculate-draft": _draft,
    "measure-quality": _quality,
    "measure-quality-streamed": partial(_quality, streamed=True),
    "measure-tasks": _tasks,
    "measure-speculation": _speculation,
    "measure-speed": _speed,
    "decoding": _decoding,
}
"""By name: what writes a model, what learns, what measures, what decodes."""
OWN_PROCESS = {"measure-speed"}
"""Parts that compute in a process that they start, where a second device isn't installed."""
