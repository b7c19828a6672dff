"""A sweep's table fits 80 columns whatever variants are called, and its page shows every variant once."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optikit.cli.sweep import code_of
from optikit.errors import Exit
from optikit.evaluation.sweep_results import Figures, Status, Sweep, VariantResult, figures, front
from optikit.report import compare, sweep_page
from optikit.report.write import load

EXAMPLES = Path(__file__).parents[2] / "examples"


def swept(*variants: VariantResult, ended: str = "") -> Sweep:
    return Sweep(
        recipe="recipe.yaml",
        search="grid",
        seed=0,
        variants=variants,
        front=tuple(each.name for each in variants if each.on_front),
        nodes=("one", "two"),
        spent_seconds=60.0,
        busy_seconds=100.0,
        usd_per_hour=3.0,
        spent_usd=0.1,
        ended=ended,
        host={"cpu": "a processor", "threads": 2},
        versions={"optikit": "0"},
        created="2026-01-01T00:00:00+00:00",
        command="optikit sweep recipe.yaml",
    )


def variant(name: str, status: Status = "done", **more: object) -> VariantResult:
    return VariantResult.model_validate({"name": name, "values": {"model": name}, "status": status, **more})


GOOD = variant(
    "bits-8",
    on_front=True,
    verdict="pass",
    figures=Figures(
        perplexity=20.5,
        perplexity_ratio=1.002,
        perplexity_ratio_ci95=(1.001, 1.003),
        decode_tokens_per_s=88.0,
        decode_speedup=1.5,
        decode_speedup_ci95=(1.4, 1.6),
        size_bytes=150 * 2**20,
        usd_per_million_output_tokens=1.25,
    ),
)
SMALL = GOOD.model_copy(
    update={"name": "bits-4", "figures": GOOD.figures.model_copy(update={"perplexity_ratio": 1.2, "size_bytes": 2**26})}
)
WORSE = variant("bits-3", dominated_by=("bits-4",), verdict="fail", figures=SMALL.figures)
REFUSED = variant("bits-5", "refused", reason="recipe.yaml:7:1: bits can't be 5")


def test_the_table_has_the_front_first_and_says_why_others_have_no_figures() -> None:
    lines = sweep_page.terminal(swept(REFUSED, WORSE, SMALL, GOOD)).splitlines()
    assert lines[0] == "2 of 3 measured variants on the front; fastest is bits-4"
    assert [line.split()[1] for line in lines[3:7]] == ["bits-8", "bits-4", "bits-3", "bits-5"]
    assert lines[3].endswith("front")
    assert lines[5].endswith("dominated, fail")
    assert lines[-1] == "4: recipe.yaml:7:1: bits can't be 5"


def test_a_sweep_without_a_result_says_why() -> None:
    assert sweep_page.headline(swept(REFUSED, ended="the budget of 1s is spent")) == (
        "None of 1 variant has a result; the budget of 1s is spent"
    )


@given(st.lists(st.text(min_size=1, max_size=120), min_size=1, max_size=5, unique=True), st.text(max_size=200))
def test_the_table_fits_80_columns(names: list[str], reason: str) -> None:
    variants = [GOOD.model_copy(update={"name": name}) for name in names]
    variants.append(variant("failed", "failed", reason=reason))
    for line in sweep_page.terminal(swept(*variants, ended=reason)).splitlines():
        assert len(line) <= 80


class Text(HTMLParser):
    """Collects what a page shows, and that its elements are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002 - the parser's signature
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        self.cells += tag == "td"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_draws_what_is_dominated_in_grey_and_runs_nothing() -> None:
    page = sweep_page.render_html(swept(REFUSED, WORSE, SMALL, GOOD))
    parser = Text()
    parser.feed(page)
    assert parser.open == []
    assert parser.cells == 4 * len(sweep_page.PAGE_HEADER)
    assert len(re.findall(r'<circle[^>]*class="variant front"', page)) == 2 * 3
    assert len(re.findall(r'<circle[^>]*class="variant dominated"', page)) == 1 * 3
    assert "<script" not in page
    assert ": 2 nodes at $3.00 an hour." in page


def test_a_hostile_name_is_read_and_not_run() -> None:
    page = sweep_page.render_html(swept(GOOD.model_copy(update={"name": "<script>alert(1)</script>"}), SMALL))
    assert "<script" not in page


def test_the_front_of_recorded_runs_is_what_their_reports_say() -> None:
    names = ("gptq-cpu", "awq-cpu", "gptqmodel-gptq-cpu", "depth-cpu", "int8-llm-cpu")
    reports = {name: load(EXAMPLES / f"smollm2-135m-{name}") for name in names}

    def compared(one: str, other: str) -> dict[str, str]:
        runs = [compare.Run(name=name, report=reports[name]) for name in (one, other)]
        return {line.key: line.outcome for line in compare.compare(*runs).lines}

    dominated = front({name: figures(report) for name, report in reports.items()}, compared)
    assert [name for name in names if not dominated[name]] == [name for name in names if name != "depth-cpu"]
    assert dominated["depth-cpu"] == ("awq-cpu", "gptqmodel-gptq-cpu"), "larger, slower and worse than both"


@pytest.mark.parametrize(
    ("variants", "ended", "code"),
    [
        ((GOOD, SMALL, REFUSED), "", Exit.OK),
        ((GOOD, WORSE), "", Exit.OK),
        ((WORSE,), "", Exit.GATE_FAILED),
        ((GOOD, variant("a", "failed", code=137)), "", Exit.OUT_OF_MEMORY),
        ((GOOD, variant("a", "failed", code=137), variant("b", "failed", code=74)), "", Exit.STAGE_FAILED),
        ((GOOD, variant("a", "stopped")), "the budget of 2h is spent", Exit.TIMEOUT),
    ],
)
def test_exit_codes(variants: tuple[VariantResult, ...], ended: str, code: Exit) -> None:
    assert code_of(swept(*variants, ended=ended)) == code
