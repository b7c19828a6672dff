"""Prices, with the golden value of the SageMaker estimate."""

from __future__ import annotations

import pytest

from optikit.evaluation import cost


def test_blended_price_of_the_article():
    assert round(cost.usd_per_million_blended(10, tpot_ms=20, concurrency=8), 4) == 1.7361


def test_discount_and_mix_scale_the_blended_price():
    full = cost.usd_per_million_blended(10, tpot_ms=20, concurrency=8)
    assert cost.usd_per_million_blended(10, tpot_ms=20, concurrency=8, discount=0.4) == pytest.approx(0.6 * full)
    assert cost.usd_per_million_blended(10, tpot_ms=20, concurrency=8, input_per_output=0) == pytest.approx(4 * full)


def test_price_of_output_tokens_from_measured_throughput():
    assert cost.usd_per_million_output(1.44, 400) == pytest.approx(1)


def test_an_optimization_pays_back_or_never_does():
    assert cost.tokens_to_pay_back(3.0, before=6.0, after=3.0) == 1e6
    assert cost.tokens_to_pay_back(3.0, before=3.0, after=3.0) is None


@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_no_speed_no_price(value):
    with pytest.raises(ValueError, match="above zero"):
        cost.usd_per_million_output(1, value)
    with pytest.raises(ValueError, match="above zero"):
        cost.usd_per_million_blended(1, tpot_ms=value)
