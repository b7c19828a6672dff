"""`optikit recommend MODEL --target T`: which stack, why, and its recipe."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from optikit.app.recommend import Candidate
    from optikit.models.facts import ModelFacts
    from optikit.targets import Target


SHOWN = 8
"""Stacks that are told with their reasons, and refused ones that are told at all."""


class For(StrEnum):
    """What to rank by."""

    latency = "latency"
    throughput = "throughput"
    cost = "cost"


def recommend(
    model: Annotated[str, typer.Argument(help="Directory, hf:ORG/NAME@REVISION or pypi:NAME==VERSION#file.")],
    target: Annotated[str, typer.Option(help="Where it will run; `optikit targets` lists them.")] = "cpu",
    for_: Annotated[For, typer.Option("--for", help="What counts.")] = For.latency,
    max_quality_loss: Annotated[
        float | None, typer.Option(min=0, help="Most that perplexity may grow: 0.05 is five per cent.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Sequences at once; without it, what serves the goal best.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=16, help="Tokens of a sequence; 2048 without it, less where it doesn't fit.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the best stack's recipe here.")] = None,
    measure: Annotated[
        int, typer.Option(min=0, max=20, metavar="N", help="Run the N best on this machine, and rank by measurement.")
    ] = 0,
    work: Annotated[
        Path, typer.Option("--measure-in", metavar="DIR", help="Where --measure writes recipes and outputs.")
    ] = Path("recommended"),
    text: Annotated[
        str | None, typer.Option(help="Calibration and evaluation text; without it, prose of a package.")
    ] = None,
    reports: Annotated[
        list[Path] | None,
        typer.Option("--report", metavar="DIR", help="Output of an earlier run: measured quality."),
    ] = None,
    extra: Annotated[Path | None, typer.Option("--targets", metavar="FILE", help="A TOML file of targets.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the ranking as JSON.")] = False,
) -> None:
    """Rank the stacks that are legal on a target by roofline floors, with reasons; write the best one's recipe."""
    from optikit import targets
    from optikit.app import recommend as ranking
    from optikit.errors import RecipeError, UsageError
    from optikit.problems import did_you_mean
    from optikit.report.write import put
    from optikit.text import dump_json

    row = targets.find(target, extra)
    if row is None:
        raise UsageError(f"unknown target {target!r}", fix=did_you_mean(target, targets.names(extra)))
    facts = _facts(model, offline=offline)
    ranked = ranking.candidates(facts, row, goal=for_.value, batch=batch, length=length, reports=tuple(reports or ()))
    good = ranking.within(ranked, max_quality_loss)
    if json:
        typer.echo(dump_json([_plain(one, one in good) for one in ranked], indent=1))
    else:
        typer.echo("\n".join(_shown(ranked, good)))
    if not good:
        raise RecipeError(f"no stack works on {row.name}", fix="see the reasons above; try another target")
    here = str(Path(model).absolute()) if Path(model).exists() else model
    written = str(Path(text).absolute()) if text and Path(text).exists() else text
    asked: dict[str, Any] = {"model": here, "most_loss": max_quality_loss, "text": written}
    best = _measured(good, measure, work, row, asked) if measure else good[0]
    if out is not None:
        put(out, ranking.recipe(best, out, row, **asked))
        typer.echo(f"wrote {out}; next: optikit plan {out}", err=True)


def _measured(good: list[Candidate], count: int, work: Path, target: Target, asked: dict[str, Any]) -> Candidate:
    """Run the best, tell what was seen, and return the one that did best."""
    from optikit.app import measure_best
    from optikit.errors import StageFailedError, UsageError

    if not measure_best.runnable(good, target, count):
        fix = "write the recipe with --out, run it there, and give its output to --report"
        raise UsageError(f"nothing of this can be timed on this machine: {target.name} is elsewhere", fix=fix)
    seen = measure_best.measure(good, count, work, target, note=lambda line: typer.echo(line, err=True), **asked)
    typer.echo("\n".join(measure_best.told(seen)))
    if seen[0].report is None:
        raise StageFailedError(f"none of {len(seen)} stacks could be made: {seen[0].failure}", fix=f"see {work}")
    return seen[0].candidate


def _facts(model: str, *, offline: bool) -> ModelFacts:
    from optikit.app.recommend import facts_of
    from optikit.store.sources import resolve_model
    from optikit.store.store import Store

    source = resolve_model(
        model,
        Store.default(),
        base=Path.cwd(),
        offline=offline,
        note=lambda text: typer.echo(text, err=True),
        weights=False,
        digests=False,
    )
    return facts_of(source)


def _shown(ranked: list[Candidate], good: list[Candidate]) -> list[str]:
    from optikit.app.recommend import reasons

    lines = []
    for place, one in enumerate(good[:SHOWN], start=1):
        lines += [f"{place}. {one.name}", *(f"     {reason}" for reason in reasons(one))]
    if good[SHOWN:]:
        lines.append(f"and {len(good) - SHOWN} more: {', '.join(one.name for one in good[SHOWN:])}")
    refused = [one for one in ranked if one not in good]
    lines += [f"-  {one.name}: {_why_not(one)}" for one in refused[:SHOWN]]
    if refused[SHOWN:]:
        lines.append(f"-  and {len(refused) - SHOWN} more that don't work; --json says why")
    return [*lines, "figures are roofline floors of weights and cache; run the recipe to measure"]


def _why_not(one: Candidate) -> str:
    errors = [problem.message for problem in one.problems if problem.level == "error"]
    if errors:
        return errors[0]
    if one.fits is False:
        return "weights and cache don't fit"
    return f"loses more quality than allowed (perplexity times {one.quality.ratio:g})" if one.quality else "ruled out"


def _plain(one: Candidate, is_good: bool) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "name": one.name,
        "stages": [{"verb": verb, "method": method, "options": dict(options)} for verb, method, options in one.stages],
        "serve": dict(one.serve) if one.serve else None,
        "shape": asdict(one.shape) | {"copies": one.copies},
        "drafting": dict(one.drafting) if one.drafting else None,
        "recommended": is_good,
        "why_not": None if is_good else _why_not(one),
        "gain": one.gain,
        "floors": asdict(one.floors),
        "quality": asdict(one.quality) if one.quality else None,
        "problems": [{"code": p.code, "level": p.level, "message": p.message} for p in one.problems],
    }
