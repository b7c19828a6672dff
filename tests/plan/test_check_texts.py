"""What is wrong with the texts of an evaluation is said before any work, beside everything else."""

from __future__ import annotations

import pytest
import yaml

from optikit.errors import RecipeError
from optikit.plan import make_plan
from optikit.recipe.load import load
from optikit.store.store import Store


@pytest.fixture
def plan(tmp_path, tiny_llama):
    def made(files, evaluate, **more):
        for name, content in files.items():
            (tmp_path / name).write_text(content, encoding="utf-8")
        stages = [{"quantize": {"method": "rtn", "group_size": 32}}]
        recipe = {"model": str(tiny_llama), "stages": stages, "evaluate": evaluate} | more
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return make_plan(load(tmp_path / "r.yaml"), Store(tmp_path / "home"))

    return made


def codes(error):
    return {problem.code: problem for problem in error.value.problems}


def test_a_task_that_is_none_and_a_text_that_is_too_short_are_told_together(plan):
    evaluate = {
        "tasks": [{"name": "t", "text": "t.jsonl"}],
        "perplexity": {"text": "p.txt", "window": 64, "windows": 4},
    }
    wrong = '{"prompt": "p", "choices": ["a", "b"], "answer": 7}'
    with pytest.raises(RecipeError) as caught:
        plan({"t.jsonl": wrong, "p.txt": "x" * 255}, evaluate)
    found = codes(caught)
    assert set(found) == {"bad-items", "text-too-short"}
    assert found["bad-items"].message == "t.jsonl:1: `answer` must be a number from 0 to 1, got 7"
    assert found["text-too-short"].message == "p.txt has 255 bytes, and protocol windows needs 256 tokens"
    assert all(problem.mark is not None and problem.fix for problem in found.values())
    plan({"t.jsonl": wrong.replace("7", "1"), "p.txt": "x" * 256}, evaluate)


def test_a_line_that_is_no_prompt_is_told(plan):
    evaluate = {"speed": {"prompts": "p.jsonl"}}
    with pytest.raises(RecipeError) as caught:
        plan({"p.jsonl": '{"prompt": "x"}\n{"Prompt": "y"}\n'}, evaluate)
    assert codes(caught)["bad-items"].message.startswith("p.jsonl:2: expected")
    plan({"p.jsonl": "prose is fine\n"}, evaluate)


@pytest.mark.parametrize(("content", "said"), [("", "holds no text: it has 0"), (" \n", "holds no text: it has 2")])
def test_a_text_without_text_is_refused(plan, content, said):
    with pytest.raises(RecipeError, match=f"p.txt {said} characters"):
        plan({"p.txt": content}, {"perplexity": {"text": "p.txt"}})


def test_a_gate_on_a_step_is_refused_where_the_step_is_named(plan):
    evaluate = {"perplexity": {"text": "p.txt", "protocol": "gptq", "window": 64}}
    limits = {"perplexity_ratio": {"steps": {"quantise.rtn": {"max": 1.1}}}}
    with pytest.raises(RecipeError) as caught:
        plan({"p.txt": "x" * 900}, evaluate, gates=limits)
    problem = codes(caught)["unknown-step"]
    assert problem.fix == "did you mean 'quantize.rtn'?"
    assert problem.mark.text.strip() == "quantise.rtn:"
    limits["perplexity_ratio"]["steps"] = {"quantize.rtn": {"max": 1.1}}
    made = plan({}, evaluate, gates=limits)
    assert made.measures[0].options.windows is None
    assert made.recipe.evaluate.perplexity.windows is None
