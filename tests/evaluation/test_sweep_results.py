"""The Pareto front against all pairs tried by hand, with exact figures and with noisy ones."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from optikit.evaluation.sweep_results import Figures, best, crowding, front, ranks

VALUES = st.integers(1, 4).map(float)
MANY = st.lists(
    st.builds(Figures, perplexity=VALUES, decode_tokens_per_s=VALUES, size_bytes=st.integers(1, 4)), max_size=8
)


def measurable(_: str, __: str) -> dict[str, str]:
    return {"perplexity": "better", "decode": "better"}


def noise(_: str, __: str) -> dict[str, str]:
    return {"perplexity": "no measurable difference", "decode": "no measurable difference"}


def named(figures: list[Figures]) -> dict[str, Figures]:
    return {f"v{number}": each for number, each in enumerate(figures)}


def goods(figures: Figures) -> tuple[float, float, int]:
    """Return figures of which more is better."""
    assert figures.perplexity is not None
    assert figures.decode_tokens_per_s is not None
    assert figures.size_bytes is not None
    return -figures.perplexity, figures.decode_tokens_per_s, -figures.size_bytes


@given(MANY)
def test_without_noise_it_is_the_pareto_front(figures: list[Figures]) -> None:
    found = named(figures)
    dominated = front(found, measurable)
    for one, other in itertools.permutations(found, 2):
        mine, its = goods(found[one]), goods(found[other])
        expected = all(a >= b for a, b in zip(mine, its, strict=True)) and mine != its
        assert (one in dominated[other]) == expected


@given(MANY)
def test_noise_alone_takes_nothing_off_and_the_front_is_never_empty(figures: list[Figures]) -> None:
    found = named(figures)
    dominated = front(found, noise)
    exact = front(found, measurable)
    for name, by in dominated.items():
        assert set(by) <= set(exact[name])
        assert all(found[other].size_bytes != found[name].size_bytes for other in by)
    assert not found or any(not by for by in dominated.values())


def test_what_was_measured_differently_or_not_at_all_dominates_nothing() -> None:
    found = {"good": Figures(perplexity=1.0, size_bytes=1), "bad": Figures(perplexity=2.0, size_bytes=2)}
    assert front(found, measurable)["bad"] == ("good",)
    assert front(found, lambda *_: {"perplexity": "not compared"})["bad"] == ()
    found["bad"] = Figures(perplexity=2.0, size_bytes=2, decode_tokens_per_s=9.0)
    assert front(found, measurable)["bad"] == ()


@given(MANY)
def test_ranks_peel_fronts_off(figures: list[Figures]) -> None:
    found = named(figures)
    dominated = front(found, measurable)
    rank = ranks(list(found), dominated)
    assert rank.keys() == found.keys()
    for name, by in dominated.items():
        assert rank[name] == max((rank[other] + 1 for other in by), default=0)


@given(MANY, st.integers(1, 8))
def test_the_best_are_never_behind_those_that_are_left_out(figures: list[Figures], keep: int) -> None:
    found = named(figures)
    dominated = front(found, measurable)
    kept = best(list(found), found, dominated, keep)
    rank = ranks(list(found), dominated)
    assert len(kept) == min(keep, len(found))
    assert max((rank[name] for name in kept), default=0) <= min(
        (rank[name] for name in found if name not in kept), default=len(found)
    )


def test_the_ends_of_a_front_and_what_stands_alone_go_before_a_crowd() -> None:
    found = {
        name: Figures(perplexity=x, size_bytes=int(10 - x)) for name, x in zip("abcd", (1, 2, 2.5, 9), strict=True)
    }
    alone = crowding(list(found), found)
    assert alone["a"] == alone["d"] == float("inf")
    assert alone["c"] > alone["b"]
    assert set(best(list(found), found, front(found, measurable), 3)) == {"a", "c", "d"}
