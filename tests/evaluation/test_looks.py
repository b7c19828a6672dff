"""Looks fixed beforehand: whoever stops at any of them, for whatever reason, is wrong as seldom as is said."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optikit.evaluation import looks
from optikit.evaluation.statistics import paired_ratio

PATHS = 250
MOST = 8


@given(st.integers(2, 5000))
def test_a_design_ends_at_its_end_and_spends_the_error_once(most):
    design = looks.design(most)
    counts = [look.samples for look in design]
    assert counts == sorted(set(counts))
    assert counts[-1] == most
    assert all(count >= looks.FIRST for count in counts[:-1])
    assert sum(1 - look.level for look in design) == pytest.approx(looks.ALPHA)
    assert len(design) <= 3 * np.log2(most) + 1
    assert looks.level(design, most) == design[-1].level


def missed(design, draw):
    """Return the share of tests of equals in which an interval at any look excludes one."""
    wrong = 0
    for _ in range(PATHS):
        ratios = np.exp(draw(design[-1].samples))
        ends = [paired_ratio(ratios[: look.samples], np.ones(look.samples), level=look.level)[1] for look in design]
        wrong += any(not low <= 1 <= high for low, high in ends)
    return wrong / PATHS


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "bursts"])
def test_false_alarms_stay_below_the_error_at_any_stopping_time(kind):
    source = np.random.default_rng(7)
    draws = {
        "normal": lambda n: source.normal(0, 0.03, n),
        "heavy tails": lambda n: 0.03 * source.standard_t(3, n),
        "bursts": lambda n: source.normal(0, 0.03, n) + source.choice([-0.3, 0.3], n) * (source.random(n) < 0.1),
    }
    error = 2 * np.sqrt(looks.ALPHA * (1 - looks.ALPHA) / PATHS)
    assert missed(looks.design(MOST), draws[kind]) <= looks.ALPHA + error


def test_looking_often_without_sharing_the_error_would_be_wrong_too_often():
    source = np.random.default_rng(1)
    naive = [look._replace(level=0.95) for look in looks.design(MOST)]
    assert missed(naive, lambda n: source.normal(0, 0.03, n)) > 1.6 * looks.ALPHA
