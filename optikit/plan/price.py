"""What an hour of the machine costs that serves the result: as the recipe says, else as the target's row does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from optikit import targets
from optikit.problems import Problem, did_you_mean
from optikit.recipe.schema import Price
from optikit.targets import Target

SAID = "cost.usd_per_hour"
"""Source of a price whose author gave none."""


def priced(target: Target, wanted: Price, extra: Path | None = None) -> tuple[Target, list[Problem]]:
    """Return a target with the price that a recipe names, before any discount; and what is wrong with that.

    Args:
        target: Where the result will run.
        wanted: `cost` of the recipe.
        extra: A TOML file with more rows of targets.
    """
    if wanted.usd_per_hour is not None:
        return replace(target, usd_per_hour=wanted.usd_per_hour, price_source=wanted.source or SAID), []
    if not wanted.instance:
        return target, []
    rows = targets.rows(extra)
    row = rows.get(wanted.instance)
    loc = ("cost", "instance")
    if row is None:
        message, fix = f"unknown instance {wanted.instance!r}", did_you_mean(wanted.instance, rows)
        return target, [Problem(code="unknown-instance", message=message, fix=fix, loc=loc)]
    if row.usd_per_hour is None:
        known = sorted(name for name, other in rows.items() if other.usd_per_hour and other.device == row.device)
        message, fix = f"{row.name} has no price", f"name one that has: {', '.join(known)}; or give usd_per_hour"
        return target, [Problem(code="instance-without-price", message=message, fix=fix, loc=loc)]
    if row.device != target.device:
        message = f"{row.name} computes on {row.device}, and target {target.name} on {target.device}"
        fix = f"name an instance with {target.device}, or give usd_per_hour"
        return target, [Problem(code="price-of-other-device", message=message, fix=fix, loc=loc)]
    source = f"as {row.name}: {row.price_source}"
    return replace(target, usd_per_hour=row.usd_per_hour, price_source=source), []
