"""What tokens cost on a machine with a price per hour.

Two figures, never mixed. The measured one divides the price by measured output tokens per second, with the machine
always busy. The blended one is Amazon's estimate for comparing endpoints: throughput is taken as concurrency divided
by time per output token, and three input tokens are counted for each output token. It charges nothing for reading the
prompt and ignores waiting, so it is labelled an estimate wherever it is printed.
"""

from __future__ import annotations

from dataclasses import dataclass

SECONDS_PER_HOUR = 3600
MILLION = 1e6


@dataclass(frozen=True, kw_only=True)
class Hour:
    """What an hour of a machine costs.

    Attributes:
        usd: List price.
        discount: Share that is taken off.
        source: Where the price was read.
    """

    usd: float
    discount: float = 0.0
    source: str = ""

    def output(self, tokens_per_s: float) -> float:
        """Return the price of a million output tokens at a measured throughput."""
        return (1 - self.discount) * usd_per_million_output(self.usd, tokens_per_s)

    def blended(self, *, tpot_ms: float, concurrency: int) -> float:
        """Return the estimated price of a million tokens, input and output together.

        >>> round(Hour(usd=10).blended(tpot_ms=20, concurrency=8), 4)
        1.7361
        """
        return usd_per_million_blended(self.usd, tpot_ms=tpot_ms, concurrency=concurrency, discount=self.discount)

    def of(self, seconds: float) -> float:
        """Return what the machine costs for some time."""
        return (1 - self.discount) * self.usd * seconds / SECONDS_PER_HOUR


def usd_per_million_output(usd_per_hour: float, output_tokens_per_s: float) -> float:
    """Return the price of a million output tokens at a measured throughput.

    >>> round(usd_per_million_output(10, 400), 4)
    6.9444
    """
    _require_positive(output_tokens_per_s, "output tokens per second")
    return usd_per_hour / (output_tokens_per_s * SECONDS_PER_HOUR / MILLION)


def usd_per_million_blended(
    usd_per_hour: float, *, tpot_ms: float, concurrency: int = 1, discount: float = 0.0, input_per_output: float = 3.0
) -> float:
    """Return the estimated price of a million tokens, input and output together.

    (1 - discount) · $/h ÷ (concurrency / TPOT · 3600 / 10⁶) ÷ (1 + input tokens per output token).

    >>> round(usd_per_million_blended(10, tpot_ms=20, concurrency=8), 4)
    1.7361
    """
    _require_positive(tpot_ms, "time per output token")
    tokens_per_s = concurrency / (tpot_ms / 1000)
    return (1 - discount) * usd_per_million_output(usd_per_hour, tokens_per_s) / (1 + input_per_output)


def tokens_to_pay_back(optimization_usd: float, *, before: float, after: float) -> float | None:
    """Return output tokens after which an optimization has paid for itself; None where it never does.

    `before` and `after` are prices per million output tokens.

    >>> tokens_to_pay_back(3.0, before=6.0, after=3.0)
    1000000.0
    """
    return optimization_usd / (before - after) * MILLION if before > after else None


def _require_positive(value: float, what: str) -> None:
    if not value > 0:
        msg = f"{what} must be above zero, got {value}"
        raise ValueError(msg)
