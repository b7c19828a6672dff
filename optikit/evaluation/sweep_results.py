"""What a sweep found: the schema of sweep.json, and which variants are on the Pareto front.

A variant dominates another if no figure of it is worse and at least one is measurably better: by the paired interval
of the two where there is one, exactly for sizes. So noise alone never takes a variant off the front, and the front is
never empty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict

from optikit.described import Described
from optikit.evaluation.results import Interval, Report, Verdict

Status = Literal["refused", "waiting", "running", "done", "dropped", "failed", "stopped"]
"""`dropped`: measured cheaply, and not among the better ones; `stopped`: by a budget or a signal, goes on next time."""


class _Frozen(Described):
    model_config = ConfigDict(allow_inf_nan=False)


class Figures(_Frozen):
    """What was measured of a variant; null is not measured."""

    perplexity: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_ci95: Interval | None = None
    decode_tokens_per_s: float | None = None
    decode_speedup: float | None = None
    decode_speedup_ci95: Interval | None = None
    size_bytes: int | None = None
    usd_per_million_output_tokens: float | None = None
    peak_memory_mib: float | None = None


class StepKey(_Frozen):
    """A step of a variant, and whether this variant made it or found it made."""

    name: str
    key: str
    status: str
    seconds: float


class VariantResult(_Frozen):
    """One variant."""

    name: str
    values: dict[str, Any]
    """By path."""
    status: Status
    reason: str = ""
    """Why it was refused, dropped, failed or stopped."""
    verdict: Verdict | None = None
    rung: int = 0
    """Of successive halving: how many cheap measurements it passed."""
    figures: Figures = Figures()
    on_front: bool = False
    dominated_by: tuple[str, ...] = ()
    steps: tuple[StepKey, ...] = ()
    shared_with: int = 0
    """Variants that begin with the same step."""
    seconds: float = 0.0
    """Of all its runs."""
    attempts: int = 0
    code: int | None = None
    """Exit code of its last run."""
    node: str = ""
    estimate_seconds: float = 0.0


class Sweep(_Frozen):
    """Everything that a sweep found out."""

    schema_version: Literal[1] = 1
    recipe: str
    search: str
    seed: int
    variants: tuple[VariantResult, ...]
    front: tuple[str, ...] = ()
    steps_made: int = 0
    """Steps that a run of this sweep made."""
    steps_found: int = 0
    """Steps that one found made by another."""
    nodes: tuple[str, ...] = ()
    budget: str = ""
    spent_seconds: float = 0.0
    """Wall time of all invocations."""
    busy_seconds: float = 0.0
    """Sum of all runs' times."""
    usd_per_hour: float | None = None
    """Price of a node."""
    spent_usd: float | None = None
    ended: str = ""
    """Why it ended before all was done."""
    host: dict[str, Any]
    versions: dict[str, str]
    created: str
    command: str


def figures(report: Report) -> Figures:
    """Return what a report says of its result."""
    result, decode = report.result, report.speedup.decode
    quality = result.quality.perplexity if result.quality else None
    return Figures(
        perplexity=quality.value if quality else None,
        perplexity_ratio=quality.ratio if quality else None,
        perplexity_ratio_ci95=quality.ratio_ci95 if quality else None,
        decode_tokens_per_s=result.speed.decode_tokens_per_s if result.speed else None,
        decode_speedup=decode.value if decode else None,
        decode_speedup_ci95=decode.ci95 if decode else None,
        size_bytes=result.size_bytes,
        usd_per_million_output_tokens=result.cost.usd_per_million_output_tokens if result.cost else None,
        peak_memory_mib=result.speed.peak_memory_mib if result.speed else None,
    )


@dataclass(frozen=True)
class Objective:
    """A figure that counts; `measured` names the line of a comparison that judges a difference, "" is exact."""

    field: str
    higher: bool
    measured: str = ""


OBJECTIVES = (
    Objective("perplexity", higher=False, measured="perplexity"),
    Objective("decode_tokens_per_s", higher=True, measured="decode"),
    Objective("size_bytes", higher=False),
    Objective("usd_per_million_output_tokens", higher=False, measured="decode"),
)

Outcomes = Mapping[str, str]
"""By line of a comparison: better, worse, no measurable difference, not tested, not compared."""


def front(found: Mapping[str, Figures], compared: Callable[[str, str], Outcomes]) -> dict[str, tuple[str, ...]]:
    """Return for each variant which others dominate it; those with none are the front.

    Args:
        found: Figures by name.
        compared: Outcomes of the second name against the first, from the second's point of view; asked only about
            pairs of which no figure of the second is worse.
    """
    return {
        name: tuple(other for other in found if other != name and _dominates(found, other, name, compared))
        for name in found
    }


def _dominates(found: Mapping[str, Figures], one: str, other: str, compared: Callable[[str, str], Outcomes]) -> bool:
    """Return whether `one` is nowhere worse than `other`, and measurably better somewhere."""
    gains = _gains(found[one], found[other])
    if not gains:
        return False
    outcomes = compared(other, one)
    if "not compared" in [outcomes.get(each.measured) for each in OBJECTIVES if each.measured]:
        return False
    return any(not each.measured or outcomes.get(each.measured) == "better" for each in gains)


def _gains(one: Figures, other: Figures) -> list[Objective]:
    """Return in what the first is better; nothing where it is worse in anything, or where nobody knows."""
    gains = []
    for objective in OBJECTIVES:
        mine, its = getattr(one, objective.field), getattr(other, objective.field)
        if mine == its:
            continue
        if mine is None or its is None or (mine > its) != objective.higher:
            return []
        gains.append(objective)
    return gains


def ranks(names: Sequence[str], dominated: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """Return for each name the number of its front: 0 for what nobody dominates, 1 once those are gone, and so on."""
    rank: dict[str, int] = {}
    left = list(names)
    while left:
        level = [name for name in left if not set(dominated[name]) & set(left)]
        rank |= dict.fromkeys(level, max(rank.values(), default=-1) + 1)
        left = [name for name in left if name not in rank]
    return rank


def crowding(names: Sequence[str], found: Mapping[str, Figures]) -> dict[str, float]:
    """Return how alone each of some variants is: the sum over figures of the gap between its neighbours.

    As in NSGA-II (Deb et al. 2002, section III-B); the ends of each figure count as infinitely alone.
    """
    alone = dict.fromkeys(names, 0.0)
    for objective in OBJECTIVES:
        values = {name: getattr(found[name], objective.field) for name in names}
        order = sorted((name for name in names if values[name] is not None), key=lambda name: (values[name], name))
        if len(order) < 2 or values[order[0]] == values[order[-1]]:
            continue
        alone[order[0]] = alone[order[-1]] = float("inf")
        span = values[order[-1]] - values[order[0]]
        for before, name, after in zip(order, order[1:], order[2:], strict=False):
            alone[name] += (values[after] - values[before]) / span
    return alone


def best(
    names: Sequence[str], found: Mapping[str, Figures], dominated: Mapping[str, tuple[str, ...]], keep: int
) -> tuple[str, ...]:
    """Return the `keep` best: lower fronts first, of one front those that are most alone."""
    rank = ranks(names, dominated)
    alone = {
        name: value
        for level in set(rank.values())
        for name, value in crowding([each for each in names if rank[each] == level], found).items()
    }
    return tuple(sorted(names, key=lambda name: (rank[name], -alone[name], name))[:keep])
