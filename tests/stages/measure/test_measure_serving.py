"""`evaluate: {serving: …}`: the step in a plan, a real `optikit serve` under load, and what the report makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from optikit import stages
from optikit.errors import RecipeError
from optikit.evaluation.cost import Hour
from optikit.evaluation.latency_limits import Limits
from optikit.evaluation.results import Loaded
from optikit.plan import Plan, make_plan
from optikit.recipe.load import load
from optikit.report import gate_values, load_table, pricing
from optikit.stage import Job
from optikit.stages.measure import serving
from optikit.store.store import Store

COMPILED: list[Any] = [{"quantize": {"method": "rtn", "group_size": 32}}, {"compile": {"engine": "onnxruntime"}}]


@pytest.fixture
def make(tiny_llama: Path, tmp_path: Path) -> Any:
    (tmp_path / "questions.jsonl").write_text('{"prompt": "The stone"}\n')

    def made(stages_: list[Any], **more: Any) -> Plan:
        wanted = {"prompts": "questions.jsonl", "new_tokens": 4, **more.pop("serving", {})}
        evaluate = {"serving": wanted, **more.pop("evaluate", {})}
        recipe = {"model": str(tiny_llama), "stages": stages_, "evaluate": evaluate, **more}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return make_plan(load(path), Store(tmp_path / "home"))

    return made


def test_the_last_artifact_is_served_by_what_loads_it(make) -> None:
    plan = make(COMPILED, serving={"clients": [1, 8]}, cost={"usd_per_hour": 1, "concurrency": 8})
    (step,) = plan.measures
    assert (step.name, step.method, step.source) == ("measure-serving", "serving", plan.steps[-1].key)
    assert (step.options.runtime, step.options.clients, step.options.batch) == ("onnxruntime", (1, 8), 8)
    assert plan.target.usd_per_hour == 1
    (step,) = make(COMPILED[:1]).measures
    assert step.options.runtime == "transformers"


def test_a_price_is_no_part_of_a_key(make) -> None:
    cheap, dear = (make(COMPILED, cost={"usd_per_hour": usd}) for usd in (1, 2))
    assert [step.key for step in cheap.measures] == [step.key for step in dear.measures]


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"cost": {"usd_per_hour": 1, "concurrency": 3}}, "price-not-timed"),
        ({"serving": {"prompt_tokens": 100_000}}, "prompt-exceeds-context"),
        ({"gates": {"serving_good_rate": {"min": 0.9}}}, "gate-not-measured"),
        ({"cost": {"instance": "c7i.xlrage"}}, "unknown-instance"),
    ],
)
def test_what_cant_be_measured_is_said_before_any_work(make, more, code) -> None:
    with pytest.raises(RecipeError) as caught:
        make(COMPILED, **more)
    assert code in [problem.code for problem in caught.value.problems]


def test_a_real_server_under_two_loads(tiny_onnx: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "questions.jsonl"
    prompts.write_text('{"prompt": "stone"}\n{"prompt": "a river", "max_tokens": 6}\n')
    (tmp_path / "out").mkdir()
    options = serving.Options(clients=(1, 2), requests=4, new_tokens=3, limits=Limits(e2e_ms=1e6))
    job = Job(
        source=tiny_onnx,
        dest=tmp_path / "out",
        scratch=tmp_path / "scratch",
        inputs={"prompts": prompts, "tokenizer": tiny_onnx},
    )
    facts = stages.load("measure", "serving").run(options, job)
    found = Loaded.model_validate(facts["loaded"])
    assert [(row.load, row.requests, row.errors, row.good_share) for row in found.rows] == [(1, 4, 0, 1), (2, 4, 0, 1)]
    assert found.end_of_text_ignored
    assert found.peak_memory_mib > 50
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [each["output_tokens"] for each in samples] == [3, 6, 3, 6] * 2

    priced = pricing.loaded(found, Hour(usd=10))
    row = priced.rows[1]
    assert row.usd_per_million_output_tokens == pytest.approx(10 / (row.output_tokens_per_s * 3600) * 1e6)
    assert row.usd_per_million_blended_tokens == pytest.approx(10 / (2 / row.tpot_ms_p50 * 3.6) / 4)
    cost = pricing.under_load(Hour(usd=10), pricing.of_clients(priced, None), 2)
    assert cost.usd_per_million_output_tokens == row.usd_per_million_output_tokens
    values = gate_values.of_loads(priced, "")
    assert values["serving_tokens_per_s"].value == max(each.output_tokens_per_s for each in found.rows)
    assert values["serving_tpot_ms_p50"].value == row.tpot_ms_p50
    assert (values["serving_good_rate"].value, values["serving_error_rate"].value) == (1, 0)
    assert [cells[1] for cells in load_table.rows(priced.rows)] == ["1 at a time", "2 at a time"]
    assert len(tuple(load_table.pictures(priced.rows))) == 4
