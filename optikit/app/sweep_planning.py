"""What a sweep will do, before anything runs: every variant planned, refused with its reason, shared steps counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optikit.errors import OptikitError, RecipeError
from optikit.evaluation.sweep_results import VariantResult
from optikit.plan import make_plan
from optikit.recipe import yaml_text
from optikit.recipe.load import LoadedRecipe, loads
from optikit.recipe.variants import Choice, Variant, Varied
from optikit.report.write import put
from optikit.store.store import Store

RECIPE, OUTPUT, LOG = "recipe.yaml", "out", "run.log"
FEWEST_WINDOWS = 4


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One run of a variant: in full, or measured cheaply.

    Attributes:
        variant: Its name.
        rung: Which cheap measurement this is; -1 is the full one.
        recipe, out, log: Where they lie.
        keys: Of its steps, in order.
        seconds: By key, what each is expected to take.
        memory_bytes: What its largest step is expected to take.
    """

    variant: str
    rung: int
    recipe: Path
    out: Path
    log: Path
    keys: tuple[str, ...]
    seconds: Mapping[str, float]
    memory_bytes: int

    @property
    def name(self) -> str:
        """Unique in the sweep."""
        return self.variant if self.rung < 0 else f"{self.variant}@{self.rung}"


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Makes units of a recipe's variants.

    Attributes:
        varied: The recipe.
        out: The sweep's directory.
        device: torch device of the runs.
        offline, targets: As of `optikit run`.
        note: Told about downloads.
    """

    varied: Varied
    out: Path
    store: Store
    device: str
    offline: bool
    targets: Path | None
    note: Callable[[str], None]

    def directory(self, name: str) -> Path:
        """Return where a variant's recipe, log and output lie."""
        return self.out / "variants" / name

    def units(self, choices: Sequence[Choice], rung: int, share: float) -> tuple[list[Unit], list[VariantResult]]:
        """Plan variants; return what can run, and what becomes of every variant.

        Args:
            choices: Their combinations.
            rung: See `Unit`.
            share: Of the windows, where it is a cheap measurement.

        Raises:
            OptikitError: None of them can run; the first one's reason.
        """
        units: list[Unit] = []
        results: list[VariantResult] = []
        errors: list[OptikitError] = []
        for variant in map(self.varied.variant, choices):
            result = VariantResult(name=variant.name, values=dict(variant.values), status="waiting")
            try:
                unit = self._unit(variant, rung, share)
            except OptikitError as error:  # also a model that isn't there: the others go on
                errors.append(error)
                results.append(result.model_copy(update={"status": "refused", "reason": _reason(error)}))
                continue
            units.append(unit)
            results.append(result.model_copy(update={"estimate_seconds": sum(unit.seconds.values())}))
        if errors and not units:
            raise _none(errors)
        shared = Counter(unit.keys[0] for unit in units if unit.keys)
        by_name = {unit.variant: shared[unit.keys[0]] - 1 for unit in units if unit.keys}
        return units, [result.model_copy(update={"shared_with": by_name.get(result.name, 0)}) for result in results]

    def _unit(self, variant: Variant, rung: int, share: float) -> Unit:
        if variant.loaded is None:
            raise RecipeError(f"{variant.name} isn't valid", problems=variant.problems)
        loaded = variant.loaded if rung < 0 else self._cheap(variant.loaded, share)
        plan = make_plan(
            loaded, self.store, offline=self.offline, device=self.device, extra_targets=self.targets, note=self.note
        )
        directory = self.directory(variant.name)
        suffix = "" if rung < 0 else f"-{rung}"
        recipe = directory / f"recipe{suffix}.yaml"
        directory.mkdir(parents=True, exist_ok=True)
        put(recipe, _head(variant) + yaml_text.dump(loaded.written))
        return Unit(
            variant=variant.name,
            rung=rung,
            recipe=recipe,
            out=directory / f"{OUTPUT}{suffix}",
            log=directory / f"run{suffix}.log",
            keys=tuple(step.key for step in plan.order),
            seconds={step.key: step.estimate.seconds for step in plan.order},
            memory_bytes=max((step.estimate.peak_bytes for step in plan.order), default=0),
        )

    def _cheap(self, loaded: LoadedRecipe, share: float) -> LoadedRecipe:
        """Return a recipe that measures perplexity alone, on a share of its windows."""
        written = cheap(loaded.written, share)
        found = loads(yaml_text.dump(written), loaded.path, known_targets=self.varied.known_targets, base=loaded.base)
        return replace(found, marks=loaded.marks)


def cheap(written: Mapping[str, Any], share: float) -> dict[str, Any]:
    """Return a recipe's data that measures perplexity alone, on a share of its windows, and judges nothing."""
    perplexity = dict(written["evaluate"]["perplexity"])
    if perplexity.get("protocol", "windows") != "lmeval":
        perplexity["windows"] = max(FEWEST_WINDOWS, round((perplexity.get("windows") or 64) * share))
    evaluate = {name: written["evaluate"][name] for name in ("runtime",) if name in written["evaluate"]}
    kept = {name: value for name, value in written.items() if name != "gates"}
    return {**kept, "evaluate": {**evaluate, "perplexity": perplexity}}


def _head(variant: Variant) -> str:
    values = ", ".join(f"{path}={value}" for path, value in variant.values.items())
    return f"# A variant made by `optikit sweep`: {' '.join(values.split())}\n"


def _none(errors: Sequence[OptikitError]) -> OptikitError:
    """Return the error for variants of which none can run: the first one's."""
    first = errors[0]
    if not isinstance(first, RecipeError):
        return first
    message = f"none of {len(errors)} variants can work; the first: {first.message}"
    return RecipeError(message, problems=first.problems, fix=first.fix)


def _reason(error: OptikitError) -> str:
    problems = getattr(error, "problems", ())
    first = next((p for p in problems if p.level == "error"), None)
    if first is None:
        return error.message
    more = sum(p.level == "error" for p in problems) - 1
    place = f"{first.mark}: " if first.mark else ""
    return f"{place}{first.message}" + (f" (and {more} more)" if more else "")
