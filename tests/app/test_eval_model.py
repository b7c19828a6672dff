"""`optikit eval DIR`: the measuring steps alone on a model directory, a compiled one and the output of a run."""

from __future__ import annotations

import json
import shutil

import pytest

from optikit.app import eval_model
from optikit.cli import eval as cli
from optikit.errors import CannotCreateError, InputMissingError, IntegrityError, UsageError
from optikit.recipe.schema import Evaluate, Gate
from optikit.report import compare, write
from tests.app.outputs import seal_output

PART = {"window": 16, "windows": 8}


def wanted(prose, **changed):
    parts = {"perplexity": {"text": str(prose), **PART}} | changed
    return Evaluate.model_validate(parts)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIKIT_HOME", str(tmp_path / "home"))


def test_a_compiled_directory_is_known_from_its_own_configuration(tiny_onnx, tiny_llama):
    found = eval_model.find(tiny_onnx)
    assert (found.runtime, found.place, found.tokenizer) == ("onnxruntime", tiny_onnx, tiny_onnx)
    assert (found.facts.vocab, found.facts.layers, found.facts.kv_heads) == (260, 2, 2)
    assert found.facts.max_positions == 512
    data = sum(path.stat().st_size for path in tiny_onnx.iterdir() if path.suffix in (".onnx", ".data"))
    assert found.facts.weight_bytes == data


def test_what_a_run_wrote_is_measured_as_it_is_served(tiny_onnx_int4, tiny_gptq, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(tiny_onnx_int4, out / "compiled/onnxruntime")
    shutil.copytree(tiny_gptq, out / "model")
    with pytest.raises(IntegrityError, match="isn't sealed"):
        eval_model.find(out)
    seal_output(out)
    found = eval_model.find(out)
    assert (found.runtime, found.tokenizer) == ("onnxruntime", out / "model")
    assert "int4_gptq" in found.facts.traits
    assert found.speculator is None


def test_a_report_never_breaks_a_seal(tiny_llama, prose, tmp_path):
    seal_output(tmp_path)
    with pytest.raises(CannotCreateError, match="is sealed"):
        eval_model.measure(eval_model.Request(subject=tiny_llama, out=tmp_path, wanted=wanted(prose), progress="none"))


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(InputMissingError, match="holds no model"):
        eval_model.find(tmp_path)
    (tmp_path / "genai_config.json").write_text("{}")
    with pytest.raises(InputMissingError, match="doesn't describe a model"):
        eval_model.find(tmp_path)


def test_two_directories_are_measured_and_compared(tiny_llama, tiny_gptq, prose, tmp_path):
    items = [{"prompt": "The stone", "choices": ["and", "river"], "answer": i % 2} for i in range(4)]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, items)))
    asked = wanted(prose, tasks=[{"name": "words", "text": str(tmp_path / "words.jsonl")}])
    reports = []
    for name, source in (("dense", tiny_llama), ("packed", tiny_gptq)):
        gates = {"perplexity_ratio": Gate(max=2), "task_accuracy": Gate(min=0)}
        request = eval_model.Request(subject=source, out=tmp_path / name, wanted=asked, gates=gates, progress="none")
        reports.append(eval_model.measure(request))
    for report in reports:
        assert report.steps == ()
        assert [step.name for step in report.measures] == ["measure-quality-baseline", "measure-tasks-baseline"]
        assert report.result == report.baseline
        assert report.result.quality.perplexity.tokens == 8 * 15
        assert report.result.quality.tasks["words"].items == 4
        verdicts = {gate.name: gate.verdict for gate in report.gates}
        assert verdicts == {"perplexity_ratio": "inconclusive", "task_accuracy": "pass"}
    assert reports[1].result.size_bytes < reports[0].result.size_bytes
    sides = [compare.Run(name=name, report=write.load(tmp_path / name)) for name in ("dense", "packed")]
    found = {line.key: line for line in compare.compare(*sides).lines}
    assert found["perplexity"].ratio == pytest.approx(
        reports[1].result.quality.perplexity.value / reports[0].result.quality.perplexity.value
    )
    markdown = (tmp_path / "packed" / "report.md").read_text(encoding="utf-8")
    assert "### Measured" in markdown
    assert "unchanged" not in markdown


def test_options_say_what_to_measure_or_a_recipe_does(tmp_path, prose, tiny_llama):
    given = {"text": str(prose), "prompts": None, "tasks": ["a=a.jsonl"], "new_tokens": 8}
    asked = cli._asked(None, **given)["wanted"]
    assert (asked.perplexity.text, asked.speed.new_tokens, asked.tasks[0].name) == (str(prose), 8, "a")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {tiny_llama}\nevaluate: {{perplexity: {{text: {prose}}}}}\ngates: {{size_ratio: {{max: 1}}}}\n"
        "cost: {usd_per_hour: 2}\n"
    )
    found = cli._asked(recipe, text=None, prompts=None, tasks=[], new_tokens=8)
    assert (found["wanted"].speed, list(found["gates"]), found["base"]) == (None, ["size_ratio"], tmp_path)
    assert found["cost"].usd_per_hour == 2
    assert cli._priced(usd_per_hour=None, instance=None, discount=None) == {}
    assert cli._priced(usd_per_hour=3.0, discount=0.5)["cost"].discount == 0.5
    with pytest.raises(UsageError, match="--usd-per-hour"):
        cli._priced(usd_per_hour=0.0)
    with pytest.raises(UsageError, match="--recipe says all"):
        cli._asked(recipe, **given)
    with pytest.raises(UsageError, match="names no file"):
        cli._asked(None, **given | {"tasks": ["a.jsonl"]})
    with pytest.raises(UsageError, match="can't measure that"):
        cli._asked(None, **given | {"tasks": ["A B=a.jsonl"]})
    with pytest.raises(UsageError, match="nothing to measure"):
        eval_model.measure(
            eval_model.Request(subject=tiny_llama, out=tmp_path / "o", wanted=Evaluate(), progress="none")
        )


@pytest.mark.parametrize("text", ["", "0", "a", "1,,2", "-1", "2000"])
def test_levels_that_are_none(text):
    with pytest.raises(UsageError, match="no list of numbers"):
        cli._levels(text)


def test_levels():
    assert cli._levels("1, 2,8,2") == (1, 2, 8)
