"""`optikit recommend --measure N`: make and measure the best stacks on this machine, and rank them by what was seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optikit.app.recommend import Candidate, recipe, runs_here
from optikit.errors import InterruptError, OptikitError, TerminatedError
from optikit.targets import Target

if TYPE_CHECKING:
    from optikit.evaluation.results import Report


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A stack that was run, or why it wasn't.

    Attributes:
        candidate: The stack.
        directory: Its recipe and its output.
        report: What was measured; None where it failed.
        failure: Why, in one line; "" where it didn't.
    """

    candidate: Candidate
    directory: Path
    report: Report | None = None
    failure: str = ""

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed at batch 1, with its speculation where it has one; 0 where nothing was timed."""
        speed = self.report.result.speed if self.report else None
        if speed is None or self.report is None:
            return 0.0
        drafted = (self.report.speculation or {}).get("speedup") or {}
        return speed.decode_tokens_per_s * max(1.0, drafted.get("value") or 1.0)

    @property
    def passed(self) -> bool:
        """Whether no gate of its recipe failed."""
        return self.report is not None and self.report.verdict != "fail"


def measure(
    best: Sequence[Candidate],
    count: int,
    directory: Path,
    target: Target,
    *,
    model: str,
    most_loss: float | None,
    text: str | None,
    note: Callable[[str], None],
) -> list[Seen]:
    """Run the best stacks that this machine has a runtime for; return them, those that pass and are fastest first.

    Args:
        best: Legal candidates, the best first.
        count: How many to run.
        directory: Where each gets a folder with its recipe and its output.
        target: Where they will run: this machine.
        model: As recipes name it.
        most_loss: Most that perplexity may grow: a gate.
        text: Calibration and evaluation text, or None for prose of a package.
        note: Told what is run.
    """
    found = []
    for place, one in enumerate(runnable(best, target, count), start=1):
        where = directory / str(place)
        where.mkdir(parents=True, exist_ok=True)
        note(f"measuring {one.name} in {where}")
        path = where / "recipe.yaml"
        path.write_text(recipe(one, path, target, model=model, most_loss=most_loss, text=text), encoding="utf-8")
        found.append(_run(one, where))
        if found[-1].report is None:
            note(f"{one.name} failed: {found[-1].failure}")
    return sorted(found, key=lambda one: (one.report is None, not one.passed, -one.tokens_per_s))


def runnable(best: Sequence[Candidate], target: Target, count: int) -> list[Candidate]:
    """Return the best candidates that this machine can time: compiled ones for its own processor."""
    if target.device != "cpu":
        return []
    return [one for one in best if runs_here(one, target) and one.serve is None][:count]


def _run(one: Candidate, where: Path) -> Seen:
    from optikit.app.run import Request, run_recipe

    try:
        report = run_recipe(Request(recipe=where / "recipe.yaml", out=where / "out"))
    except (InterruptError, TerminatedError):
        raise  # who stops one stops all of them
    except OptikitError as error:
        return Seen(candidate=one, directory=where, failure=str(error).splitlines()[0])
    return Seen(candidate=one, directory=where, report=report)


def told(ranked: Sequence[Seen]) -> Iterator[str]:
    """Yield lines for people."""
    yield "measured on this machine:"
    for place, one in enumerate(ranked, start=1):
        yield f"{place}. {one.candidate.name}: {_figures(one)}"


def _figures(one: Seen) -> str:
    if one.report is None:
        return f"failed: {one.failure}"
    quality = one.report.result.quality.perplexity if one.report.result.quality else None
    ratio = f", perplexity times {quality.ratio:.3g}" if quality and quality.ratio is not None else ""
    gates = "" if one.passed else ", a gate failed"
    return f"{one.tokens_per_s:.4g} tokens/s{ratio}{gates}; {one.directory / 'out'}"
