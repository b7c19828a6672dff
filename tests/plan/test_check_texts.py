"""What is wrong with the texts of an evaluation is said before any work, beside everything else."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from optikit.errors import IntegrityError, RecipeError
from optikit.models import tokenizer
from optikit.plan import make_plan
from optikit.recipe.load import load
from optikit.store.store import Store
from tests.models import gguf_files


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
    plan({"p.jsonl": "prose is fine\n" * 10}, evaluate)


PROSE = "The old stone house stands near the river. " * 200
GPTQ = [{"quantize": {"method": "gptq", "group_size": 32}}]


def refused(plan, files, evaluate, **more):
    with pytest.raises(RecipeError) as caught:
        plan(files, evaluate, **more)
    found = codes(caught)
    assert all(problem.mark is not None and problem.fix for problem in found.values())
    return found


def test_lengths_beyond_the_context_are_told_together(plan):
    evaluate = {
        "perplexity": {"text": "p.txt", "window": 1024, "windows": 2},
        "speed": {"prompt_tokens": 500, "new_tokens": 64},
        "tasks": [{"name": "t", "text": "t.jsonl", "max_tokens": 600}],
    }
    files = {"p.txt": PROSE, "t.jsonl": '{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n'}
    stages = [*GPTQ, {"compile": {"engine": "onnxruntime"}}]
    calibration = {"text": "p.txt", "samples": 4, "length": 1024}
    found = refused(plan, files, evaluate, stages=stages, calibration=calibration)
    assert set(found) == {
        *("calibration-exceeds-context", "window-exceeds-context", "prompt-exceeds-context", "answer-exceeds-context"),
    }
    assert {code: problem.loc for code, problem in found.items()} == {
        "calibration-exceeds-context": ("calibration", "length"),
        "window-exceeds-context": ("evaluate", "perplexity", "window"),
        "prompt-exceeds-context": ("evaluate", "speed", "prompt_tokens"),
        "answer-exceeds-context": ("evaluate", "tasks", 0, "max_tokens"),
    }
    evaluate["perplexity"]["window"] = calibration["length"] = 512
    evaluate["speed"]["prompt_tokens"] = 448
    evaluate["tasks"][0]["max_tokens"] = 511
    plan(files, evaluate, stages=stages, calibration=calibration)


def test_an_item_beyond_the_context_is_told(plan):
    evaluate = {"tasks": [{"name": "t", "text": "t.jsonl", "max_tokens": 12}]}
    item = '{"prompt": "%s", "answer": "b"}\n'
    plan({"t.jsonl": item % "a" + item % ("x" * 500)}, evaluate)
    found = refused(plan, {"t.jsonl": item % "a" + item % ("x" * 501)}, evaluate)
    assert found["item-exceeds-context"].message == "item 2 needs 513 tokens, and the model's context holds 512"


@pytest.mark.parametrize("role", ["calibration", "perplexity"])
def test_json_that_is_read_as_prose_is_told_with_its_fields(plan, role):
    lines = '{"id": 3, "text": "The old stone house.", "title": "House"}\n' * 90
    wanted = {"text": "d.jsonl"} | ({"length": 64} if role == "calibration" else {"window": 64})
    more = {"calibration": wanted, "stages": GPTQ} if role == "calibration" else {}
    evaluate = {} if more else {"perplexity": wanted}
    problem = refused(plan, {"d.jsonl": lines}, evaluate, **more)["json-as-prose"]
    assert problem.fix == 'add `template: "{text}\\n"`; its fields are text, title'
    assert problem.loc[-2:] == (role, "text")
    wanted["template"] = "{text}\n"
    plan({}, evaluate, **more)
    del wanted["template"]
    plan({"d.jsonl": "Prose {of} [a kind].\n" * 90}, evaluate, **more)


def test_a_calibration_text_of_less_than_a_window_is_told(plan):
    calibration = {"text": "c.txt", "samples": 2, "length": 64}
    found = refused(plan, {"c.txt": "x" * 63}, {}, stages=GPTQ, calibration=calibration)
    assert found["text-too-short"].message == "c.txt has 63 bytes, fewer than one calibration window of 64 tokens"
    plan({"c.txt": "x" * 64}, {}, stages=GPTQ, calibration=calibration)


def test_tokens_are_counted_where_bytes_leave_a_doubt(plan, tiny_llama, tmp_path, merging):
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes((merging / "tokenizer.json").read_bytes())
    text = "the river " * 40
    count = len(tokenizer.load(merging).encode(text).ids)
    assert count < len(text) / 1.5
    evaluate = {"perplexity": {"text": "p.txt", "window": count // 2, "windows": 2}}
    plan({"p.txt": text}, evaluate, model="model")
    evaluate["perplexity"]["window"] = count // 2 + 1
    found = refused(plan, {}, evaluate, model="model")["text-too-short"]
    assert f"has {count} tokens, and protocol windows needs {count // 2 * 2 + 2}" in found.message
    evaluate = {"speed": {"prompts": "q.jsonl", "prompt_tokens": count + 1}}
    found = refused(plan, {"q.jsonl": json.dumps({"prompt": text})}, evaluate, model="model")["prompts-too-short"]
    assert found.message == f"no prompt of q.jsonl has {count + 1} tokens; the longest has {count} tokens"
    evaluate["speed"]["prompt_tokens"] = count
    plan({}, evaluate, model="model")


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """A byte tokenizer with merges, of fewer tokens than the tiny model's embedding has rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the river"] * 9, trainer)
    directory = tmp_path_factory.mktemp("merging")
    made.save(str(directory / "tokenizer.json"))
    return directory


def test_no_tokenizer_and_a_damaged_one_are_told(plan, tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    path.unlink()
    evaluate = {"perplexity": {"text": "p.txt", "window": 64}}
    found = refused(plan, {"p.txt": PROSE}, evaluate, model="model")["no-tokenizer"]
    assert found.message == "model has no tokenizer.json, and the recipe names texts to be read by it"
    plan({}, {}, model="model")  # weights alone need none
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json is a pointer of Git LFS"):
        plan({}, evaluate, model="model")


def test_added_tokens_beyond_the_embedding_are_told(plan, tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 260, "content": "[PAD]"})
    path.write_text(json.dumps(content))
    evaluate = {"perplexity": {"text": "p.txt", "window": 64}}
    found = refused(plan, {"p.txt": PROSE}, evaluate, model="model")["tokenizer-exceeds-embedding"]
    assert found.message == "the tokenizer has 261 tokens, the embedding 260 rows"
    (warning,) = plan({}, {}, model="model").warnings
    assert (warning.code, warning.level) == ("tokenizer-exceeds-embedding", "warning")


def test_an_answer_that_can_not_be_given_is_told(plan):
    evaluate = {"tasks": [{"name": "t", "text": "t.jsonl", "items": 4}]}
    line = json.dumps({"prompt": "Count:\n", "answer": "one\ntwo"})
    found = refused(plan, {"t.jsonl": f"{line}\n" * 4}, evaluate)["answer-holds-stop"]
    assert found.message == "the answer of item 1 holds '\\n', which ends what is written: it can't be given"
    evaluate["tasks"][0]["stop"] = ["\n\n"]
    plan({}, evaluate)
    evaluate["tasks"][0]["stop"] = []
    plan({}, evaluate)
    query = json.dumps({"prompt": "-- q\n", "schema": "CREATE TABLE t (a);", "answer": "SELECT a\nFROM t"})
    del evaluate["tasks"][0]["stop"]
    made = plan({"t.jsonl": f"{query}\n" * 4}, evaluate)
    assert [problem.code for problem in made.warnings] == ["answer-holds-stop"]


LOOKUP = [{"compile": {"engine": "onnxruntime"}}]


def speculating(**options):
    return [{"speculate": {"method": "lookup", "prompts": "q.jsonl", **options}}, *LOOKUP]


@pytest.mark.parametrize(
    ("content", "options", "code", "said"),
    [
        ('{"prompt": "a"}\n{"text": "b"}\n', {}, "bad-items", "q.jsonl:2: expected"),
        ('{"prompt": "a"}\n' * 3, {}, "too-few-prompts", "3 of the 3 prompts of q.jsonl judge: 4 are needed"),
        ('{"prompt": "a"}\n' * 20, {"eval_part": [0.9, 1.0]}, "too-few-prompts", "2 of the 20 prompts"),
        ("x" * 255, {}, "too-few-prompts", "q.jsonl has 255 bytes, and 4 passages of 64 are needed"),
        ("x" * 9000, {"prompt_tokens": 500}, "prompt-exceeds-context", "passages of 500 tokens and answers of 96"),
        ('{"prompt": "a"}\n' * 9, {"new_tokens": 512}, "answer-exceeds-context", "answers of 512 tokens leave no room"),
        ('{"prompt": "a"}\n' * 9, {"chat_template": "rag"}, "no-chat-template", "no chat template 'rag', but none"),
    ],
)
def test_prompts_of_a_stage_that_can_not_be_used_are_told(plan, content, options, code, said):
    found = refused(plan, {"q.jsonl": content}, {}, stages=speculating(**options))
    assert said in found[code].message
    plan({"q.jsonl": '{"prompt": "a"}\n' * 40}, {}, stages=speculating())


def test_a_model_with_named_chat_templates_only_wants_one_named(plan, tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "model" / "additional_chat_templates").mkdir()
    (tmp_path / "model" / "additional_chat_templates" / "rag.jinja").write_text("{{ messages[0].content }}")
    files = {"q.jsonl": '{"prompt": "a"}\n' * 9}
    found = refused(plan, files, {}, stages=speculating(), model="model")["no-chat-template"]
    assert found.message == "the model has no chat template 'default', but rag"
    for options in ({"chat_template": "rag"}, {"chat": False}):
        plan(files, {}, stages=speculating(**options), model="model")


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


@pytest.mark.parametrize(("samples", "length", "refused"), [(65536, 256, True), (2200, 256, True), (2000, 256, False)])
def test_windows_that_read_a_text_over_and_over_are_refused(plan, samples, length, refused):
    calibration = {"text": "c.txt", "samples": samples, "length": length}
    if not refused:
        plan({"c.txt": PROSE}, {}, stages=GPTQ, calibration=calibration)
        return
    with pytest.raises(RecipeError) as caught:
        plan({"c.txt": PROSE}, {}, stages=GPTQ, calibration=calibration)
    problem = codes(caught)["calibration-repeats"]
    assert problem.mark.text.strip() == f"samples: {samples}"
    wanted = int(problem.fix.split()[3])
    plan({"c.txt": PROSE}, {}, stages=GPTQ, calibration=calibration | {"samples": wanted})


def test_texts_of_a_gguf_file_are_counted_as_well_as_can_be(plan, tmp_path, tiny_llama, monkeypatch):
    """Its tokenizer is no file before a run has made it one; then it counts as any other does."""
    gguf_files.write(tmp_path / "m.gguf", llama__context_length=64)
    task = '{"prompt": "%s", "answer": "b"}'
    evaluate = {"tasks": [{"name": "t", "text": "t.jsonl", "max_tokens": 8}]}
    small = {"model": str(tmp_path / "m.gguf"), "stages": []}
    found = refused(plan, {"t.jsonl": task % ("x" * 2000)}, evaluate, **small)
    assert "item 1 needs at least 13" in found["item-exceeds-context"].message
    plan({"t.jsonl": task % ("x" * 100)}, evaluate, **small)  # may be 7 tokens, or 100
    monkeypatch.setattr("optikit.plan.make._acquired", lambda *_: tiny_llama)
    found = refused(plan, {"t.jsonl": task % ("x" * 100)}, evaluate, **small)
    assert "item 1 needs 10" in found["item-exceeds-context"].message


@pytest.mark.parametrize(
    ("item", "written"),
    [
        ({"choices": ["a", "b"], "answer": 0}, False),
        ({"answer": "a"}, True),
        ({"schema": "CREATE TABLE t (a)", "answer": "SELECT 1"}, True),
    ],
)
def test_a_plan_knows_which_answers_are_written(plan, item, written):
    line = json.dumps({"prompt": "p"} | item)
    made = plan({"t.jsonl": f"{line}\n{line}\n"}, {"tasks": [{"name": "t", "text": "t.jsonl"}]})
    assert [step.options.tasks[0].written for step in made.measures] == [written, written]
