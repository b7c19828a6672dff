"""Which variants a search tries: halving against a count by hand, Optuna's sampler on a known function."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from optikit.app import sweep_search
from optikit.app.sweep_planning import cheap
from optikit.app.sweep_search import FULL, Round, Seen
from optikit.errors import RecipeError
from optikit.evaluation import sweep_results
from optikit.evaluation.sweep_results import Figures
from optikit.recipe import variants
from optikit.recipe.variants import Choice, Varied

RECIPE = """\
model: some/model
stages: [{quantize: {method: rtn, bits: 4, group_size: 32}}]
evaluate: {perplexity: {text: prose.txt, windows: 16}}
"""


@pytest.fixture
def varied(tmp_path: Path) -> Callable[..., Varied]:
    def make(search: str, count: int = 12, text: str = RECIPE, **changed: object) -> Varied:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        numbers = ",".join(map(str, range(count)))
        return variants.read(path, varied=[f"seed={numbers}"], changed={"search": search, **changed})

    return make


def exact(_: str, __: str) -> dict[str, str]:
    return {"perplexity": "better", "decode": "better"}


def rounds(varied: Varied, figures: Callable[[Choice], Figures], at_once: int = 2) -> list[Round]:
    """Return the rounds of a search whose variants have known figures."""
    search, found = sweep_search.make(varied, at_once), []
    seen = Seen(figures={}, dominated={})
    while wanted := search.next(seen):
        found.append(wanted)
        known = dict(seen.figures) | {varied.name(choice): figures(choice) for choice in wanted.choices}
        seen = Seen(figures=known, dominated=sweep_results.front(known, exact))
    return found


def worse_with_number(choice: Choice) -> Figures:
    return Figures(perplexity=1.0 + choice[0], size_bytes=100 + choice[0])


@pytest.mark.parametrize(
    ("count", "sizes", "shares"),
    [
        (3, [3], [1.0]),
        (4, [4, 2], [1 / 3, 1.0]),
        (12, [12, 4], [1 / 3, 1.0]),
        (27, [27, 9, 3], [1 / 9, 1 / 3, 1.0]),
        (81, [81, 27, 9, 3], [1 / 27, 1 / 9, 1 / 3, 1.0]),
    ],
)
def test_halving_keeps_the_better_third_on_three_times_the_windows(
    varied: Callable[..., Varied], count: int, sizes: list[int], shares: list[float]
) -> None:
    found = rounds(varied("halving", count), worse_with_number)
    assert [len(each.choices) for each in found] == sizes
    assert [each.share for each in found] == pytest.approx(shares)
    assert [each.rung for each in found] == [*range(len(sizes) - 1), FULL]
    assert sorted(found[-1].choices) == [(n,) for n in range(sizes[-1])]


def test_halving_keeps_both_ends_of_a_front(varied: Callable[..., Varied]) -> None:
    def traded(choice: Choice) -> Figures:  # small or good
        return Figures(perplexity=1.0 + choice[0], size_bytes=100 - choice[0])

    found = rounds(varied("halving", 12), traded)
    assert {(0,), (11,)} <= set(found[-1].choices)


def test_halving_goes_on_without_what_failed(varied: Callable[..., Varied]) -> None:
    search = sweep_search.make(varied("halving", 12), 1)
    assert search.next(Seen(figures={}, dominated={}))
    found = search.next(Seen(figures={"seed-7": Figures(perplexity=1.0)}, dominated={"seed-7": ()}))
    assert found is not None
    assert found.choices == ((7,),)


def test_halving_needs_something_cheap_to_measure(varied: Callable[..., Varied]) -> None:
    with pytest.raises(RecipeError, match="halving measures perplexity first"):
        sweep_search.make(varied("halving", text=RECIPE.replace("evaluate", "# ")), 1)


def test_a_grid_is_one_round_and_random_draws_some_of_it(varied: Callable[..., Varied]) -> None:
    (grid,) = rounds(varied("grid"), worse_with_number)
    assert len(grid.choices) == 12
    (drawn,) = rounds(varied("random", samples=5), worse_with_number)
    assert len(set(drawn.choices)) == 5
    assert set(drawn.choices) < set(grid.choices)


def test_optunas_sampler_asks_for_new_variants_only_and_finds_better_ones_than_chance(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    numbers = ",".join(map(str, range(5)))
    best: dict[str, list[float]] = {"optuna": [], "random": []}
    for seed in range(3):
        for name, bests in best.items():
            changed = {"search": name, "samples": 40, "seed": seed}
            many = variants.read(path, varied=[f"{axis}={numbers}" for axis in ("a", "b", "c", "d")], changed=changed)
            asked = rounds(many, lambda choice: Figures(perplexity=1.0 + sum(choice)), at_once=2)
            found = [choice for each in asked for choice in each.choices]
            assert len(found) == len(set(found)) == 40
            bests.append(min(map(sum, found)))
    assert math.fsum(best["optuna"]) < math.fsum(best["random"])


def test_a_cheap_measurement_reads_few_windows_and_judges_nothing() -> None:
    written = {
        "model": "m",
        "evaluate": {
            "perplexity": {"text": "t", "windows": 30},
            "speed": {"new_tokens": 8},
            "tasks": [{"name": "a"}],
            "runtime": "vllm",
        },
        "gates": {"perplexity_ratio": {"max": 1.1}},
    }
    found = cheap(written, 1 / 3)
    assert found == {"model": "m", "evaluate": {"perplexity": {"text": "t", "windows": 10}, "runtime": "vllm"}}
    assert cheap(written, 1e-9)["evaluate"]["perplexity"]["windows"] == 4
    assert written["gates"], "the recipe itself stays as it is"
