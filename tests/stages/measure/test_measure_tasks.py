"""The tasks step on real tiny models: choices, written answers, SQL; against the baseline; and what can be wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest

from optikit.errors import InputMissingError, StageFailedError
from optikit.evaluation.results import TaskResult, TasksVerdict
from optikit.evaluation.sql import Sandbox
from optikit.stage import Job
from optikit.stages.measure import tasks
from tests.stages.measure.test_measure_quality import noisy

SCHEMA = "CREATE TABLE town (name TEXT, people INTEGER); INSERT INTO town VALUES ('Ulm', 128), ('Jena', 110);"
WORDS = ["stone", "river", "light", "window", "green", "old", "small", "house", "water", "bright", "cold"]


def choices(count=24):
    draw = np.random.default_rng(3)
    for index in range(count):
        picked = [str(word) for word in draw.choice(WORDS, 3, replace=False)]
        yield {"id": f"c{index}", "prompt": f"The {picked[0]} stands near the", "choices": picked, "answer": index % 3}


FILES = {
    "choice": list(choices()),
    "text": [{"prompt": f"{word} and", "answer": ["a", "the"]} for word in WORDS],
    "sql": [{"prompt": "-- how many towns?\n", "schema": SCHEMA, "answer": "SELECT count(*) FROM town"}] * 2,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    for name, rows in FILES.items():
        (root / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return root


def ask(dest, source, files, tokenizer, baseline=None, **task):
    dest.mkdir()
    inputs = {"tokenizer": tokenizer} | {tasks.role(path.stem): path for path in files}
    inputs |= {"baseline": baseline} if baseline else {}
    wanted = [{"name": path.stem, "max_tokens": 6, "stop": []} | task for path in files]
    options = tasks.Options.model_validate({"dtype": "float32", "tasks": wanted})
    job = Job(source=source, dest=dest, scratch=dest.with_name("scratch"), inputs=inputs, threads=1)
    return json.loads(json.dumps(tasks.run(options, job), allow_nan=False))


@pytest.fixture(scope="module")
def files(root):
    return [root / f"{name}.jsonl" for name in FILES]


@pytest.fixture(scope="module")
def baseline(root, files, tiny_llama):
    return ask(root / "baseline", tiny_llama, files, tiny_llama)


@pytest.fixture(scope="module")
def damaged(root, files, tiny_llama, baseline):
    model = noisy(tiny_llama, root / "noisy", 20.0)
    return ask(root / "damaged", model, files, tiny_llama, root / "baseline")


def test_the_baseline_has_an_accuracy_and_nothing_to_be_compared_with(baseline, root):
    found = {name: TaskResult.model_validate(each) for name, each in baseline["tasks"].items()}
    assert {name: each.kind for name, each in found.items()} == {"choice": "choice", "text": "text", "sql": "sql"}
    assert [each.items for each in found.values()] == [24, 11, 2]
    for each in found.values():
        assert each.accuracy_ci95[0] <= each.accuracy <= each.accuracy_ci95[1]
        assert each.change is None
    assert found["choice"].protocol.startswith("choice-")
    assert found["choice"].protocol.endswith("@24")
    assert "tasks_verdict" not in baseline
    kept = tasks.read_items(root / "baseline")
    right = [row["correct_norm"] for row in kept["choice"]]
    assert found["choice"].accuracy == sum(right) / 24


def test_choices_are_those_of_transformers_one_by_one(baseline, root, tiny_llama):
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    by = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for item, row in zip(FILES["choice"], tasks.read_items(root / "baseline")["choice"], strict=True):
        scores = []
        for choice in item["choices"]:
            head, tail = by.encode(item["prompt"]).ids, by.encode(f" {choice}").ids
            with torch.no_grad():
                rows = torch.log_softmax(model(torch.tensor([head + tail])).logits[0].double(), -1)
            scores.append(sum(float(rows[len(head) - 1 + i, t]) for i, t in enumerate(tail)))
        assert row["loglikelihoods"] == pytest.approx(scores, abs=1e-3)
        assert row["choice_norm"] == int(np.argmax(np.array(scores) / [len(c) for c in item["choices"]]))


def test_damage_is_counted_item_by_item_and_shown(damaged, baseline, root):
    found = TaskResult.model_validate(damaged["tasks"]["choice"])
    before, now = (tasks.read_items(root / name)["choice"] for name in ("baseline", "damaged"))
    sides = [[row["correct_norm"] for row in rows] for rows in (before, now)]
    lost = sum(one and not other for one, other in zip(*sides, strict=True))
    won = sum(other and not one for one, other in zip(*sides, strict=True))
    assert (found.lost, found.won) == (lost, won)
    assert lost + won > 0
    assert found.change == pytest.approx(
        damaged["tasks"]["choice"]["accuracy"] - baseline["tasks"]["choice"]["accuracy"]
    )
    assert found.change_ci95[0] < found.change < found.change_ci95[1]
    assert len([flip for flip in found.flips if flip.change == "lost"]) == min(3, lost)
    for flip in found.flips:
        item = next(item for item in FILES["choice"] if item["id"] == flip.item)
        right = flip.baseline if flip.change == "lost" else flip.result
        assert right == flip.expected == item["choices"][item["answer"]]
        assert flip.baseline != flip.result
    verdict = TasksVerdict.model_validate(damaged["tasks_verdict"])
    assert verdict.change == pytest.approx(np.mean([each["change"] for each in damaged["tasks"].values()]))
    assert damaged["tasks"]["text"]["output_length_ratio"] > 0
    assert damaged["tasks"]["choice"]["output_length_ratio"] is None


def test_a_model_flips_nothing_against_itself(root, files, tiny_llama, baseline):
    again = ask(root / "again", tiny_llama, files, tiny_llama, root / "baseline")
    for each in again["tasks"].values():
        assert (each["lost"], each["won"], each["changed_answers"], each["p_worse"], each["flips"]) == (0, 0, 0, 1, [])
    assert again["tasks_verdict"]["conclusion"] == "no measurable loss"
    assert again["tasks_verdict"]["change_ci95"][0] < 0 < again["tasks_verdict"]["change_ci95"][1]


def test_sql_is_judged_by_its_rows():
    from optikit.evaluation import tasks as scorer

    item = scorer.Query(id="1", prompt="p", schema=SCHEMA, answer="SELECT count(*) FROM town")
    broken = scorer.Query(id="9", prompt="p", schema="CREATE", answer="SELECT 1")
    with Sandbox() as sandbox:
        assert scorer._outcome(item, " SELECT 2", sandbox).correct
        assert scorer._outcome(item, "no idea", sandbox).reason == 'near "no": syntax error'
        with pytest.raises(InputMissingError, match="item 9: the schema fails"):
            scorer._outcome(broken, "SELECT 1", sandbox)


def test_an_item_whose_own_sql_fails_stops_before_the_model_is_asked(root, tiny_llama, tmp_path):
    path = tmp_path / "broken.jsonl"
    entry = {"prompt": "p", "answer": "SELECT 1"}
    path.write_text("\n".join(json.dumps(entry | {"schema": text}) for text in (SCHEMA, "ATTACH 'x.db' AS x")))
    with pytest.raises(InputMissingError, match="task 'broken': item 2: the schema fails: ATTACH is not allowed"):
        ask(root / "broken", tiny_llama, [path], tiny_llama)


def test_fewer_items_are_another_protocol_and_not_compared(root, files, tiny_llama, baseline):
    with pytest.raises(StageFailedError, match=r"choice: can't compare choice-\w+@5 with the baseline's choice-\w+@24"):
        ask(root / "fewer", tiny_llama, files, tiny_llama, root / "baseline", items=5)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\n\n", "has no items"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"prompt": "p"}', r":1: `answer` must be a text"),
        (json.dumps({"id": "long", "prompt": "x" * 600, "answer": "y"}).encode(), "item long needs 606 tokens"),
    ],
)
def test_files_that_hold_no_task_are_named_with_the_task(tmp_path, tiny_llama, content, said):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputMissingError, match=said) as caught:
        ask(tmp_path / "out", tiny_llama, [path], tiny_llama)
    assert "mine" in caught.value.message


def test_a_model_that_returns_nan_is_named_with_the_task(tmp_path, root, tiny_llama):
    broken = noisy(tiny_llama, tmp_path / "broken", float("nan"))
    with pytest.raises(StageFailedError, match=r"choice: transformers \(float32\): a log-likelihood of item c0"):
        ask(tmp_path / "out", broken, [root / "choice.jsonl"], tiny_llama)


def test_answers_longer_than_the_context_are_found_while_planning(facts, target):
    fits, exceeds = (
        tasks.Options.model_validate({"tasks": [{"name": "t", "max_tokens": tokens}]}) for tokens in (511, 512)
    )
    assert list(tasks.check(fits, facts, target)) == []
    (problem,) = tasks.check(exceeds, facts, target)
    assert problem.loc == ("tasks", 0, "max_tokens")


@pytest.mark.parametrize(("template", "opening"), [("$A", []), ("<s> $A", [0]), ("<s> $A </s>", [0]), ("$A </s>", [])])
def test_texts_open_as_the_tokenizer_opens_them_and_never_end(template, opening, tiny_llama, tmp_path):
    from tokenizers import Tokenizer, processors

    made = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    plain = made.encode("to be").ids
    special = [("<s>", 0), ("</s>", 1)]
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    made.save(str(tmp_path / "tokenizer.json"))
    by = tasks._Tokenizer(tmp_path)
    assert by.encode("to be") == [*opening, *plain]
    assert by.encode("") == opening
