"""Numbers as text, and `clean`: whatever goes in, what comes out can only be read."""

from __future__ import annotations

import doctest
import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optikit import text
from optikit.report import compare, github, markdown, svg, wording


@pytest.mark.parametrize("module", [compare, github, markdown, svg, text, wording])
def test_examples_in_docstrings_hold(module):
    assert doctest.testmod(module).failed == 0


@given(st.text())
def test_clean_leaves_one_line_without_characters_that_act(value):
    shown = text.clean(value)
    assert not {unicodedata.category(character) for character in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert shown.encode("utf-8").decode("utf-8") == shown
    assert text.clean(shown) == shown


@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "S"])))
def test_clean_keeps_what_can_be_read(value):
    assert text.clean(value) == value


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x07", "link"),
        ("\x9b31mone byte", "one byte"),
        ("a\r\nb\u2028c\x85d", "a b c d"),
        ("\u202eevil\u2066", "\ufffdevil\ufffd"),
        ("\ud800 half", "\ufffd half"),
        ("nul\x00 \ufeff", "nul\ufffd \ufffd"),
    ],
)
def test_clean_takes_out_what_terminals_act_on(raw, shown):
    assert text.clean(raw) == shown


@given(st.floats(min_value=1e-12, max_value=1e15))
def test_a_number_is_written_within_half_of_its_last_digit(value):
    shown = float(text.number(value).replace(",", ""))
    assert shown == pytest.approx(value, rel=0.5e-2)


@given(st.floats(min_value=0.01, max_value=90), st.floats(min_value=1e-6, max_value=0.5))
def test_the_ends_of_a_ratio_are_written_apart_where_four_decimals_can(value, spread):
    ci95 = (value * (1 - spread), value * (1 + spread))
    low, high = (float(end) for end in text.ratio_interval(value, ci95).removesuffix("×").split("–"))
    assert low <= high
    if ci95[1] - ci95[0] > 0.004:
        assert low < high


def test_an_interval_that_excludes_one_never_looks_as_if_it_touched_it():
    assert text.ratio_interval(1.05, (1.003, 1.11)) == "1.003–1.110×"
    assert text.ratio_interval(1.05, (1.0, 1.11)) == "1.00–1.11×"


@given(st.integers(min_value=0, max_value=2**60))
def test_sizes_have_at_most_three_digits_before_their_unit_above_kib(value):
    figure, unit = text.size(value).split(" ")
    scale = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[unit]
    assert math.isclose(float(figure.replace(",", "")) * scale, value, rel_tol=0.006, abs_tol=0.5)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(59.94, "59.9 s"), (59.96, "1 min 00 s"), (3599.6, "1 h 00 min"), (7260, "2 h 01 min")]
)
def test_durations_never_say_sixty(seconds, shown):
    assert text.duration(seconds) == shown
