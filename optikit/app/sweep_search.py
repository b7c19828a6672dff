"""Which variants a sweep tries, round by round: all, some, the better ones of a cheap measurement, or a sampler's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from optikit.errors import RecipeError, UnavailableError
from optikit.evaluation.sweep_results import Figures, best
from optikit.recipe.variants import DRAWN, Choice, Varied

ETA = 3
"""Of `halving`: one of so many goes on (Jamieson and Talwalkar 2016, arXiv:1502.07943; Hyperband's value)."""
FULL = -1
MOST_REPEATS = 50
"""How often a sampler may ask for what it knows before it has nothing new to ask."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """Variants to run next.

    Attributes:
        choices: Their combinations.
        rung: Number of the cheap measurement, or `FULL`.
        share: Of the windows that a cheap measurement reads.
    """

    choices: tuple[Choice, ...]
    rung: int = FULL
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What is known so far: figures of each variant that ended well, by name, and who dominates it."""

    figures: Mapping[str, Figures]
    dominated: Mapping[str, tuple[str, ...]]


class Search(Protocol):
    """Says which variants come next."""

    def next(self, seen: Seen) -> Round | None:
        """Return the next round, knowing the last one's figures; None when there is nothing left to try."""


class Once:
    """One round of all combinations that the recipe asks for."""

    def __init__(self, varied: Varied) -> None:
        self._left: list[Round] = [Round(choices=varied.choices())]

    def next(self, seen: Seen) -> Round | None:  # noqa: ARG002 - nothing that was seen changes it
        """See `Search`."""
        return self._left.pop() if self._left else None


class Halving:
    """Successive halving: many measured cheaply, the better third on three times the windows, the rest in full."""

    def __init__(self, varied: Varied) -> None:
        self._varied = varied
        self._names: dict[str, Choice] = {varied.name(choice): choice for choice in varied.choices()}
        self._rungs = max(0, math.floor(math.log(max(1, len(self._names)) / ETA, ETA) + 1e-9)) if self._names else 0
        self._rungs = max(self._rungs, 1) if len(self._names) > ETA else 0
        self._rung = 0

    def next(self, seen: Seen) -> Round | None:
        """See `Search`."""
        if self._rung > self._rungs:
            return None
        if self._rung:
            measured = [name for name in self._names if name in seen.figures]
            kept = best(measured, seen.figures, seen.dominated, math.ceil(len(self._names) / ETA))
            self._names = {name: choice for name, choice in self._names.items() if name in kept}
        rung, self._rung = self._rung, self._rung + 1
        cheap = rung < self._rungs
        share = ETA ** (rung - self._rungs) if cheap else 1.0
        return Round(choices=tuple(self._names.values()), rung=rung if cheap else FULL, share=share)


class Sampled:
    """What Optuna's sampler asks for, a few at a time; what was seen is told to it."""

    def __init__(self, varied: Varied, at_once: int) -> None:
        self._optuna = _import()
        self._varied, self._at_once = varied, at_once
        self._left = min(varied.section.samples or DRAWN, varied.size)
        self._trials: dict[str, Any] = {}
        self._study: Any = None
        self._known: set[str] = set()

    def next(self, seen: Seen) -> Round | None:
        """See `Search`."""
        for name, trial in self._trials.items():
            self._tell(trial, seen.figures.get(name))
        self._trials = {}
        choices: list[Choice] = []
        for _ in range(MOST_REPEATS):
            if len(choices) == min(self._at_once, self._left):
                break
            trial, choice = self._ask()
            name = self._varied.name(choice)
            if name in self._known:
                self._tell(trial, seen.figures.get(name))
                continue
            self._known.add(name)
            self._trials[name] = trial
            choices.append(choice)
        self._left -= len(choices)
        return Round(choices=tuple(choices)) if choices else None

    def _ask(self) -> tuple[Any, Choice]:
        if self._study is None:
            sampler = self._optuna.samplers.TPESampler(seed=self._varied.section.seed, n_startup_trials=8)
            directions = ["minimize", "maximize", "minimize"]
            self._study = self._optuna.create_study(directions=directions, sampler=sampler)
        trial = self._study.ask()
        choice = tuple(
            trial.suggest_categorical(axis.text, list(range(len(axis.values)))) for axis in self._varied.axes
        )
        return trial, choice

    def _tell(self, trial: Any, figures: Figures | None) -> None:
        """Tell what a trial gave: perplexity, speed and size; what wasn't measured counts the same for all."""
        if figures is None:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            return
        perplexity, speed, size = figures.perplexity, figures.decode_tokens_per_s, figures.size_bytes
        self._study.tell(trial, [perplexity or 0.0, speed or 0.0, float(size or 0)])


def make(varied: Varied, at_once: int) -> Search:
    """Return the search that a recipe asks for.

    Args:
        varied: The recipe and what varies.
        at_once: How many variants run at a time.

    Raises:
        RecipeError: Halving without a perplexity to measure cheaply.
        UnavailableError: Optuna is asked for and isn't here.
    """
    match varied.section.search:
        case "optuna":
            return Sampled(varied, at_once)
        case "halving":
            evaluate = varied.root.child("evaluate")
            if evaluate is None or evaluate.child("perplexity") is None:
                fix = "add `evaluate: {perplexity: {text: …}}`, or take `search: grid`"
                raise RecipeError("halving measures perplexity first, and the recipe has none", fix=fix)
            return Halving(varied)
        case "grid" | "random":
            return Once(varied)


def _import() -> Any:
    try:
        import optuna
    except ImportError:
        fix = "pip install 'optikit[sweep]', or take `search: random`"
        raise UnavailableError("optuna isn't installed", fix=fix) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
