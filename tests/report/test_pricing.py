"""What tokens cost: the recipe's price over the row's, discounts, loads, and when optimizing has paid for itself."""

import pytest

from optikit import targets
from optikit.evaluation.cost import Hour
from optikit.evaluation.results import Cost, Measurement, Served, ServedSpeed
from optikit.plan import price
from optikit.recipe.schema import Price
from optikit.report import pricing
from optikit.targets import Target

CPU = Target(name="cpu", device="cpu")


def level(concurrency, tokens_per_s, tpot_ms):
    figures = dict.fromkeys(("ttft_ms_p50", "e2e_ms_p50", "output_tokens_p50", "requests_per_s"), 1.0)
    return ServedSpeed(
        concurrency=concurrency,
        requests=8,
        prompt_tokens_p50=None,
        ttft_ms_p50_ci95=(1, 1),
        ttft_ms_p95=None,
        tpot_ms_p50=tpot_ms,
        tpot_ms_p50_ci95=(1, 1),
        tpot_ms_p95=None,
        e2e_ms_p95=None,
        output_tokens_per_s=tokens_per_s,
        **figures,
    )


def test_the_recipes_price_comes_before_the_rows():
    row = Target(name="box", device="cpu", usd_per_hour=2.0, price_source="list")
    assert price.priced(row, Price()) == (row, [])
    found, _ = price.priced(row, Price(usd_per_hour=3, source="invoice"))
    assert (found.usd_per_hour, found.price_source) == (3, "invoice")
    found, _ = price.priced(CPU, Price(instance="c7i.xlarge"))
    assert found.usd_per_hour == targets.rows()["c7i.xlarge"].usd_per_hour
    assert found.price_source.startswith("as c7i.xlarge: EC2")


@pytest.mark.parametrize(
    ("instance", "code"),
    [("c7i.xlrage", "unknown-instance"), ("cpu", "instance-without-price"), ("g5.xlarge", "price-of-other-device")],
)
def test_a_price_that_isnt_this_machines_is_refused(instance, code):
    found, (problem,) = price.priced(CPU, Price(instance=instance))
    assert (found, problem.code, problem.loc) == (CPU, code, ("cost", "instance"))
    assert problem.fix


def test_every_load_has_its_price():
    """Amazon's example: 8 at a time, 20 ms per token, 10 $ per hour."""
    served = Served(
        url="u",
        model="m",
        speed=(level(1, 40, 25), level(8, 380, 20)),
        tokens_counted_by="the server",
        end_of_text_ignored=True,
    )
    hour = Hour(usd=10, source="list")
    one, eight = pricing.priced(served, hour).speed
    assert eight.usd_per_million_blended_tokens == pytest.approx(1.7361, abs=1e-4)
    assert one.usd_per_million_output_tokens == pytest.approx(10 / (40 * 3600) * 1e6)
    cost = pricing.under_load(hour, pricing.of_clients(None, served), 8)
    assert (cost.concurrency, cost.reason) == (8, "")
    assert cost.usd_per_million_blended_tokens == eight.usd_per_million_blended_tokens
    assert "no load of 4 at a time was timed" in pricing.under_load(hour, pricing.of_clients(None, served), 4).reason
    assert pricing.under_load(None, pricing.of_clients(None, served), 8, "why").reason == "why"
    assert pricing.priced(served, None) is served


def test_no_price_says_which_key_to_set():
    reason = pricing.alone(CPU, Price(), None).reason
    assert "target cpu has no price per hour: set cost.usd_per_hour, or cost.instance" in reason


def test_optimizing_is_paid_back_by_what_a_token_costs_less():
    def costing(usd):
        return Measurement(size_bytes=1, cost=Cost(usd_per_million_output_tokens=usd))

    hour = Hour(usd=3.6, discount=0.5)
    found = pricing.payback(hour, 1000, costing(6.0), costing(3.5))
    assert found.optimization_usd == pytest.approx(0.5)
    assert found.output_tokens == pytest.approx(200_000)
    never = pricing.payback(hour, 1000, costing(3.0), costing(3.0))
    assert (never.output_tokens, never.reason) == (None, "a token of the result costs no less than one of the baseline")
    assert pricing.payback(hour, 1000, costing(None), costing(3.0)) is None
