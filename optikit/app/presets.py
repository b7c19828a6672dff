"""Presets: stacks worth trying first, with the figures that a recorded run has of them, or the words "not recorded"."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from optikit.errors import UsageError
from optikit.problems import did_you_mean
from optikit.recipe.starter import preset
from optikit.store.files import in_units

NOT_RECORDED = "not recorded"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A stack worth trying.

    Attributes:
        name: Of the preset.
        models: `model_type` of the models that it is meant for.
        billions: Their parameters, 10⁹, from and to.
        target: Row of `optikit targets`.
        kind: What it is best at.
        model: Source that its recipe starts with.
        why: One sentence.
        stages, serve: As the recipe has them.
        calibrated: Its stages read calibration text.
        record: Name of the recorded run, "" without one.
        recorded: Its figures, with hardware and commit; empty without one.
    """

    name: str
    models: tuple[str, ...]
    billions: tuple[float, float]
    target: str
    kind: Literal["cheap", "fast", "small", "exact"]
    model: str
    why: str
    stages: tuple[str, ...]
    serve: tuple[str, ...] = ()
    calibrated: bool
    record: str = ""
    recorded: Mapping[str, Any]

    def figures(self) -> str:
        """Say what was recorded, in one line."""
        if not self.recorded:
            return NOT_RECORDED
        row = self.recorded
        speed = f", {row['decode_tokens_per_s']:.3g} tokens/s ({row['decode_speedup']:.2g}×)" if self.is_timed else ""
        return f"perplexity {row['perplexity_ratio']:.3f}×{speed}, {in_units(row['size_bytes'])}"

    @property
    def is_timed(self) -> bool:
        """Whether the record has a speed."""
        return self.recorded.get("decode_tokens_per_s") is not None

    def provenance(self) -> str:
        """Say on what machine, at which commit and in which run it was recorded; "" without a record."""
        row = self.recorded
        if not row:
            return ""
        return f"{row['cpu']}, {row['threads']} threads, commit {row['commit']}, examples/{self.record}"


@cache
def rows() -> Mapping[str, Preset]:
    """Return all presets by name."""
    found = _toml("presets.toml")
    recorded = _toml("presets_recorded.toml")
    return {name: _preset({**row, "name": name, "recorded": recorded.get(name, {})}) for name, row in found.items()}


def _preset(row: dict[str, Any]) -> Preset:
    frozen: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return Preset(**frozen)


def _toml(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files("optikit.app").joinpath(name).read_text(encoding="utf-8"))


def find(name: str) -> Preset:
    """Return a preset.

    Raises:
        UsageError: There is none of that name.
    """
    found = rows().get(name)
    if found is None:
        raise UsageError(f"unknown preset {name!r}", fix=did_you_mean(name, list(rows())) or "see `optikit presets`")
    return found


def matching(what: str) -> list[Preset]:
    """Return the presets for a model or a target; all for "".

    Args:
        what: A target, a directory with config.json, a model_type, or a part of a preset's or a model's name.

    Raises:
        UsageError: There is none.
    """
    fits = _of_directory(Path(what)) if what and (Path(what) / "config.json").is_file() else _of_word(what)
    if not fits:
        message = f"no preset is for {what!r}"
        raise UsageError(message, fix="`optikit presets` lists all; `optikit recommend MODEL --target T` ranks stacks")
    return fits


def _of_word(what: str) -> list[Preset]:
    word = what.lower()
    return [
        one
        for one in rows().values()
        if not word
        or word in (one.target, one.target.removeprefix("ml."), *one.models)
        or word in one.name
        or word in one.model.lower()
    ]


def _of_directory(path: Path) -> list[Preset]:
    from optikit.models.reader import read

    facts = read(path, promised=True)
    size = facts.parameters / 1e9
    return [
        one for one in rows().values() if facts.model_type in one.models and one.billions[0] <= size <= one.billions[1]
    ]


def recipe(one: Preset, path: Path, *, model: str | None, target: str | None, schema: str) -> str:
    """Return a preset's recipe, with its figures as comments.

    Args:
        one: The preset.
        path: Where it will be written.
        model: Source in the place of the preset's own; None keeps that.
        target: Row of targets in the place of the preset's own; None keeps that.
        schema: Path of the JSON Schema, from the recipe; "" leaves it out.
    """
    about = [f"{one.name}: {one.why}.", f"Record: {one.figures()}"]
    about += [f"  {one.provenance()}"] if one.recorded else []
    return preset(
        path,
        about=about,
        model=model or one.model,
        target=target or one.target,
        stages=one.stages,
        serve=one.serve,
        calibrated=one.calibrated,
        schema=schema,
    )


def evidence() -> Iterator[Mapping[str, Any]]:
    """Yield what recorded runs say of the quality of quantized weights, for `optikit recommend`."""
    for one in rows().values():
        if found := one.recorded.get("evidence"):
            yield {**found, "source": f"recorded: examples/{one.record}, {one.recorded['protocol']}"}
