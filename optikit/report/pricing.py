"""What tokens cost on the machine that a recipe prices: one request at a time, and under every load that was timed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optikit.evaluation import cost
from optikit.evaluation.cost import Hour
from optikit.evaluation.results import Cost, Loaded, LoadRow, Measurement, Payback, Served, Speed

if TYPE_CHECKING:
    from optikit.recipe.schema import Price
    from optikit.targets import Target

SAY = "set cost.usd_per_hour, or cost.instance to a row of `optikit targets` that has a price"
"""What to do where a target has no price."""


@dataclass(frozen=True, kw_only=True)
class Clients:
    """A server under a closed loop: clients, output tokens per second of all together, median time per token, ms."""

    concurrency: int
    tokens_per_s: float
    tpot_ms: float | None


def of_clients(loaded: Loaded | None, served: Served | None) -> Iterator[Clients]:
    """Yield the closed loops that were timed."""
    for row in loaded.rows if loaded else ():
        if row.kind == "clients":
            yield Clients(concurrency=int(row.load), tokens_per_s=row.output_tokens_per_s, tpot_ms=row.tpot_ms_p50)
    for each in served.speed if served else ():
        yield Clients(concurrency=each.concurrency, tokens_per_s=each.output_tokens_per_s, tpot_ms=each.tpot_ms_p50)


def hour_of(target: Target, wanted: Price) -> Hour | None:
    """Return what an hour of a target costs; None where it has no price."""
    if target.usd_per_hour is None:
        return None
    return Hour(usd=target.usd_per_hour, discount=wanted.discount, source=target.price_source)


def unpriced(target: Target, device: str = "cpu") -> str:
    """Say why figures that were measured on a device can't be priced for a target; "" where they can."""
    if target.usd_per_hour is None:
        return f"target {target.name} has no price per hour: {SAY}"
    if target.device != device.partition(":")[0]:
        where = "this machine's processor" if device == "cpu" else device
        return f"speed was measured on {where}, and {target.name} charges for its accelerator"
    return ""


def alone(target: Target, wanted: Price, speed: Speed | None) -> Cost:
    """Return what tokens cost at one request at a time, or why that isn't known."""
    hour = hour_of(target, wanted)
    reason = unpriced(target, speed.device if speed else target.device) or ("" if speed else "speed was not measured")
    if hour is None or speed is None or reason:
        return _unknown(hour, reason)
    return _told(hour, speed.decode_tokens_per_s, speed.tpot_ms_p50, 1)


def under_load(hour: Hour | None, rows: Iterable[Clients], concurrency: int, reason: str = "") -> Cost:
    """Return what tokens cost at a number of requests at a time, or why that isn't known.

    Args:
        hour: Price of the machine.
        rows: What was timed.
        concurrency: Requests at a time.
        reason: Why nothing can be priced, if nothing can.
    """
    found = next((row for row in rows if row.concurrency == concurrency), None)
    if not reason and found is None:
        reason = f"no load of {concurrency} at a time was timed, as cost.concurrency says"
    if hour is None or found is None or not found.tpot_ms or reason:
        return _unknown(hour, reason or "no answer had two tokens")
    return _told(hour, found.tokens_per_s, found.tpot_ms, concurrency)


def priced(served: Served, hour: Hour | None) -> Served:
    """Return what clients of a server saw with the price of each number of requests at a time."""
    if hour is None:
        return served
    rows = (
        row.model_copy(
            update={
                "usd_per_million_output_tokens": hour.output(row.output_tokens_per_s),
                "usd_per_million_blended_tokens": hour.blended(tpot_ms=row.tpot_ms_p50, concurrency=row.concurrency),
            }
        )
        for row in served.speed
    )
    return served.model_copy(update={"speed": tuple(rows)})


def loaded(found: Loaded, hour: Hour | None) -> Loaded:
    """Return what clients saw under load with the price of each load, or why it has none."""
    return found.model_copy(update={"rows": tuple(_priced(row, hour) for row in found.rows)})


def _priced(row: LoadRow, hour: Hour | None) -> LoadRow:
    kept = [each for each in row.reason.split("; ") if each and not each.startswith("price:")]
    if hour is None:
        return row.model_copy(update={"reason": "; ".join([*kept, "price: cost of the result says why"])})
    blended = None
    if row.kind == "clients" and row.tpot_ms_p50:
        blended = hour.blended(tpot_ms=row.tpot_ms_p50, concurrency=int(row.load))
    elif row.kind == "rate":
        kept.append("blended price: it is that of a fixed number of requests at a time")
    output = hour.output(row.output_tokens_per_s) if row.output_tokens_per_s else None
    found = {"usd_per_million_output_tokens": output, "usd_per_million_blended_tokens": blended}
    return row.model_copy(update={**found, "reason": "; ".join(kept)})


def payback(hour: Hour | None, seconds: float, before: Measurement, after: Measurement) -> Payback | None:
    """Return what optimizing cost and when it has paid for itself; None where baseline or result has no price.

    Args:
        hour: Price of the machine.
        seconds: What the steps took that made the artifact.
        before: The baseline.
        after: The result.
    """
    prices = [each.cost.usd_per_million_output_tokens if each.cost else None for each in (before, after)]
    if hour is None or prices[0] is None or prices[1] is None:
        return None
    usd = hour.of(seconds)
    tokens = cost.tokens_to_pay_back(usd, before=prices[0], after=prices[1])
    reason = "" if tokens is not None else "a token of the result costs no less than one of the baseline"
    return Payback(optimization_seconds=seconds, optimization_usd=usd, output_tokens=tokens, reason=reason)


def _unknown(hour: Hour | None, reason: str) -> Cost:
    if hour is None:
        return Cost(reason=reason)
    return Cost(reason=reason, usd_per_hour=hour.usd, discount=hour.discount, price_source=hour.source)


def _told(hour: Hour, tokens_per_s: float, tpot_ms: float, concurrency: int) -> Cost:
    return Cost(
        usd_per_million_output_tokens=hour.output(tokens_per_s),
        usd_per_million_blended_tokens=hour.blended(tpot_ms=tpot_ms, concurrency=concurrency),
        usd_per_hour=hour.usd,
        discount=hour.discount,
        concurrency=concurrency,
        price_source=hour.source,
    )
