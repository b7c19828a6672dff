"""Cast: every float weight in 16 bits, bfloat16 or float16, where the model came in more or in the other one.

Paper   none; IEEE 754-2019, section 4.3.1
Helps   models published in float32: half the bytes, for engines that compute in 16 bits anyway
Hurts   float16 ends at 65,504 and at 6e-8: what is larger fails the step, and what is smaller becomes zero; bfloat16
        keeps the range and 8 bits of each number
Cost    the disk's time; a few megabytes of memory, however large the model
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from optikit.errors import StageFailedError
from optikit.models import architectures
from optikit.models.facts import DTYPE_BYTES, ModelFacts
from optikit.problems import Problem
from optikit.stage import DENSE, MAIN, Estimate, Facts, Job, StageOptions, directory_bytes, no_objection, nothing
from optikit.stages.quantize._grid import ignored
from optikit.targets import Target

if TYPE_CHECKING:
    from pathlib import Path

    from optikit.formats.checkpoint import Entry

SUMMARY = "cast: weights in bfloat16 or float16; what doesn't fit is told"
NEEDS = DENSE
WRITES = "model"
USES_TARGET = False
LIBRARIES = ("torch", "safetensors")
ENVIRONMENT = MAIN
inputs = nothing
fits = no_objection

STORED = {"bfloat16": "BF16", "float16": "F16"}
"""Safetensors name of a dtype."""


class Options(StageOptions):
    """Options of `quantize: {method: cast}`."""

    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """What weights are stored in."""
    overflow: Literal["refuse", "saturate"] = "refuse"
    """What to do with a value beyond the largest of the dtype: fail and name it, or make it the largest."""
    keep: tuple[str, ...] = ()
    """Tensors to leave as they are: ends of names (`norm.weight`) or patterns (`*.layers.0.*`)."""


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield where there is nothing to do."""
    if facts.architecture is None:
        known = ", ".join(architectures.names())
        message = f"model_type {facts.model_type!r} is not one whose tensors are known"
        yield Problem(code="unknown-architecture", message=message, fix=f"known: {known}")
    elif facts.dtype == STORED[options.dtype]:
        message = f"the weights are in {options.dtype} already"
        yield Problem(code="option-without-effect", message=message, fix="leave the stage out", level="warning")


def _bytes(options: Options, facts: ModelFacts) -> int:
    return int(facts.weight_bytes * DTYPE_BYTES[STORED[options.dtype]] / DTYPE_BYTES[facts.dtype])


def _changes(options: Options, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of config.json that tell the dtype, with the new one."""
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    changes: dict[str, Any] = {key: options.dtype}
    inner = config.get("text_config")
    if isinstance(inner, dict):
        changes["text_config"] = {
            **inner,
            **{name: options.dtype for name in ("dtype", "torch_dtype") if name in inner},
        }
    return changes


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the cast model."""
    config = {**facts.config, **_changes(options, facts.config)}
    return replace(facts, dtype=STORED[options.dtype], weight_bytes=_bytes(options, facts), config=config)


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate reading once, writing twice and comparing."""
    written = _bytes(options, facts)
    return Estimate(
        seconds=3 + 4e-9 * facts.weight_bytes,
        peak_bytes=310_000_000 + min(facts.weight_bytes, 20_000_000),
        disk_bytes=directory_bytes(written, facts.vocab),
        scratch_bytes=written,
    )


def run(options: Options, job: Job) -> Facts:
    """Cast a block's tensors after the other's, then hold the files to the source, value by value."""
    import torch

    from optikit.calibration.resume import ResumeState
    from optikit.formats import cast
    from optikit.formats.checkpoint import Checkpoint
    from optikit.formats.directory import write_model

    source, dtype = Checkpoint(job.source), getattr(torch, options.dtype)
    left = frozenset(
        name for name, entry in source.entries.items() if not cast.is_cast(entry, dtype) or ignored(name, options.keep)
    )
    for pattern in options.keep:
        if not any(ignored(name, (pattern,)) for name in source):
            raise StageFailedError(f"keep {pattern!r} matches no tensor", fix=f"names look like {min(source)}")
    parts = _parts({name: entry for name, entry in source.entries.items() if name not in left})
    state = ResumeState(job.scratch, {"method": f"cast {options!r}"}, job.note)
    for index, part in enumerate(parts[state.done :], state.done):
        state.commit_written(partial(_write, part, options))
        job.progress(index + 1, len(parts), "block")
    entries = {**{name: source.entries[name] for name in left}, **state.entries()}
    write_model(job.source, job.dest, entries, changes=_changes(options, source.config()))
    cast.verify(source.entries, Checkpoint(job.dest).entries, dtype, left)
    return _findings(state.facts, len(source.entries) - len(left))


def _parts(entries: Mapping[str, Entry]) -> list[dict[str, Entry]]:
    """Return tensors by block, in order; those outside of blocks come first."""
    found: dict[tuple[str, int], dict[str, Entry]] = {}
    for name, entry in entries.items():
        words = name.split(".")
        place = next((i for i, word in enumerate(words) if word.isdigit()), None)
        key = ("", -1) if place is None else (".".join(words[:place]), int(words[place]))
        found.setdefault(key, {})[name] = entry
    return [found[key] for key in sorted(found)]


def _write(part: Mapping[str, Entry], options: Options, path: Path) -> dict[str, Any]:
    """Write tensors in the new dtype; return what they lost, as JSON. Those that lost nothing aren't named.

    Raises:
        StageFailedError: A value is too large, and that is to be refused.
    """
    import torch

    from optikit.formats import cast

    lost = cast.write(path, part, getattr(torch, options.dtype))
    for name, each in lost.items():
        if each.overflowed and options.overflow == "refuse":
            message = f"{name} holds {each.overflowed} values too large for {options.dtype}, up to {each.largest:.6g}"
            other = "dtype: bfloat16, or " if options.dtype == "float16" else ""
            raise StageFailedError(message, fix=f"use {other}overflow: saturate")
    return {
        name: {"overflowed": each.overflowed, "vanished": each.vanished, "largest": each.largest}
        for name, each in lost.items()
        if each.overflowed or each.vanished
    }


def _findings(rows: Mapping[str, Mapping[str, Any]], count: int) -> Facts:
    """Return how many tensors were cast, how many values were too large or became zero, and where most of them are."""
    found: Facts = {"tensors_cast": count}
    for kind in ("overflowed", "vanished"):
        found[kind] = sum(row[kind] for row in rows.values())
        if found[kind]:
            worst = max(rows, key=lambda name: rows[name][kind])
            found[f"most_{kind}"] = {"tensor": worst, "values": rows[worst][kind]}
    return found
