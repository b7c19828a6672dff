"""Tasks through a real decoder, against transformers run choice by choice; and files that are no tasks."""

from __future__ import annotations

import json

import numpy as np
import pytest

from optikit.errors import InputMissingError
from optikit.evaluation import task_items as i
from optikit.evaluation import tasks as t
from optikit.evaluation.sql import Sandbox


class Bytes:
    """The tokenizer of the tiny model, as a task sees it."""

    def __init__(self, directory):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))

    def encode(self, text):
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens):
        return self._tokenizer.decode(list(tokens))


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return Bytes(tiny_llama)


@pytest.fixture(scope="module")
def decoder(tiny_llama):
    from optikit import runtime

    return runtime.load(tiny_llama, runtime="transformers", dtype="float32", threads=1)


@pytest.fixture(scope="module")
def model(tiny_llama):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


def slow_loglikelihood(model, head, tail):
    import torch

    with torch.no_grad():
        rows = torch.log_softmax(model(torch.tensor([head + tail])).logits[0].double(), dim=-1)
    return sum(float(rows[len(head) - 1 + i, token]) for i, token in enumerate(tail))


ITEMS = (
    i.Choice(id="1", prompt="The river", choices=("is cold", "stands near a window", "x"), answer=1),
    i.Choice(id="2", prompt="Question: which?\nAnswer: ", choices=("light", "stone"), answer=0),
    i.Choice(id="3", prompt="", choices=("light", "stones"), answer=0),
)


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.id)
def test_choices_against_a_whole_forward_pass_each(decoder, tokenizer, model, item, monkeypatch):
    monkeypatch.setattr(t, "CHUNK", 5)
    chosen = t.choose(decoder, tokenizer, item, start_token=0)
    head = tokenizer.encode(item.prompt.rstrip()) or [0]
    blanks = item.prompt[len(item.prompt.rstrip()) :]
    expected = [slow_loglikelihood(model, head, tokenizer.encode(f"{blanks} {choice}")) for choice in item.choices]
    assert chosen.loglikelihoods == pytest.approx(expected, abs=1e-3)
    assert chosen.choice == int(np.argmax(expected))
    assert chosen.choice_norm == int(np.argmax([e / len(c) for e, c in zip(expected, item.choices, strict=True)]))
    assert chosen.correct == (chosen.choice == item.answer)


def test_an_item_longer_than_the_context_is_named(decoder, tokenizer):
    long = i.Choice(id="seven", prompt="x" * 600, choices=("a", "b"), answer=0)
    with pytest.raises(InputMissingError, match=r"item seven needs 602 tokens, .* holds 512"):
        t.choose(decoder, tokenizer, long, start_token=0)
    with pytest.raises(InputMissingError, match="item q needs"):
        t.answer(decoder, tokenizer, i.Question(id="q", prompt="x" * 500, answers=("a",)), sandbox=Sandbox())


def test_an_answer_is_greedy_and_ends_where_it_should(decoder, tokenizer, model):
    import torch

    question = i.Question(id="q", prompt="The old house", answers=("?",))
    free = t.answer(decoder, tokenizer, question, sandbox=Sandbox(), max_tokens=12, stop=())
    with torch.no_grad():
        tokens = tokenizer.encode(question.prompt)
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    written = tokens[-12:]
    assert free.text == tokenizer.decode(written)
    assert (free.tokens, free.correct) == (12, False)
    ended = t.answer(
        decoder, tokenizer, question, sandbox=Sandbox(), max_tokens=12, stop=(), end_tokens=frozenset(written[3:4])
    )
    assert ended.tokens == written.index(written[3])
    mark = tokenizer.decode(written[2:3])
    stopped = t.answer(decoder, tokenizer, question, sandbox=Sandbox(), max_tokens=12, stop=(mark,))
    assert mark not in stopped.text
    right = i.Question(id="q", prompt=question.prompt, answers=("no", f"  {free.text}\n"))
    assert t.answer(decoder, tokenizer, right, sandbox=Sandbox(), max_tokens=12, stop=()).correct


def write(path, *entries):
    path.write_text("\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries), encoding="utf-8")
    return path


def test_items_of_both_kinds_are_read(tmp_path):
    choice = {"id": "a", "prompt": "p", "choices": ["x", "y"], "answer": 1}
    assert i.read(write(tmp_path / "c.jsonl", choice, "", choice)) == (
        *[i.Choice(id="a", prompt="p", choices=("x", "y"), answer=1)] * 2,
    )
    found = i.read(write(tmp_path / "q.jsonl", {"prompt": "p", "answer": "x"}, {"prompt": "p", "answer": ["x", "y"]}))
    assert found == (
        i.Question(id="1", prompt="p", answers=("x",)),
        i.Question(id="2", prompt="p", answers=("x", "y")),
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "expected"),
        ("[]", "expected"),
        ({"answer": "x"}, "expected"),
        ({"prompt": "p"}, "`answer` must be a text"),
        ({"prompt": "", "answer": "x"}, "nothing to go on from"),
        ({"prompt": "p", "schema": 1, "answer": "SELECT 1"}, "both SQL"),
        ({"prompt": "p", "answer": []}, "`answer` must be a text"),
        ({"prompt": "p", "choices": ["x"], "answer": 0}, "two or more"),
        ({"prompt": "p", "choices": ["x", ""], "answer": 0}, "two or more"),
        ({"prompt": "p", "choices": ["x", "y"], "answer": 2}, "0 to 1, got 2"),
        ({"prompt": "p", "choices": ["x", "y"], "answer": True}, "0 to 1, got True"),
        ({"prompt": "p", "choices": ["x", "y"], "answer": "x"}, "0 to 1, got 'x'"),
    ],
)
def test_a_line_that_is_no_item_is_named(tmp_path, line, problem):
    path = write(tmp_path / "t.jsonl", {"prompt": "p", "answer": "x"}, line)
    with pytest.raises(InputMissingError, match=rf"t\.jsonl:2: .*{problem}"):
        i.read(path)


def test_items_of_an_array_are_read_as_those_of_lines(tmp_path):
    rows = [{"prompt": "one\u2028line", "answer": "x"}, {"prompt": "p", "answer": "y"}]
    lines = write(tmp_path / "l.jsonl", "\ufeff" + json.dumps(rows[0], ensure_ascii=False) + "\r", rows[1])
    assert i.read(lines) == i.read(write(tmp_path / "a.json", json.dumps(rows, indent=1)))
    assert i.read(lines)[0].prompt == "one\u2028line"


@pytest.mark.parametrize(
    ("answers", "stop", "found"),
    [
        (("one\ntwo",), ("\n",), "\n"),
        (("one\ntwo", "one, two"), ("\n",), None),
        (("one\n",), ("\n",), None),
        (("\none",), ("\n",), None),
        (("one\ntwo",), (), None),
        (("one\ntwo",), ("\n\n",), None),
        (("one\n\ntwo", "a\n\nb"), (";", "\n\n"), "\n\n"),
    ],
)
def test_answers_that_hold_what_ends_them_are_found(answers, stop, found):
    items = (i.Question(id="first", prompt="p", answers=("x",)), i.Question(id="q", prompt="p", answers=answers))
    assert i.cut_short(items, stop) == (None if found is None else (items[1], found))


def test_an_answer_of_several_lines_can_be_given(decoder, tokenizer):
    question = i.Question(id="q", prompt="The old house", answers=("?",))
    free = t.answer(decoder, tokenizer, question, sandbox=Sandbox(), max_tokens=12, stop=()).text
    middle = free[len(free) // 2]
    right = i.Question(id="q", prompt=question.prompt, answers=(free,))
    assert i.cut_short((right,), (middle,)) == (right, middle)
    assert not t.answer(decoder, tokenizer, right, sandbox=Sandbox(), max_tokens=12, stop=(middle,)).correct
    assert t.answer(decoder, tokenizer, right, sandbox=Sandbox(), max_tokens=12, stop=()).correct


def test_files_that_are_no_tasks(tmp_path):
    with pytest.raises(InputMissingError, match="has no items"):
        i.read(write(tmp_path / "empty.jsonl", "", " "))
    with pytest.raises(InputMissingError, match="doesn't exist"):
        i.read(tmp_path / "nowhere.jsonl")
    mixed = write(
        tmp_path / "m.jsonl", {"prompt": "p", "answer": "x"}, {"prompt": "p", "choices": ["x", "y"], "answer": 0}
    )
    with pytest.raises(InputMissingError, match="mixes items of kinds choice and text"):
        i.read(mixed)
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    with pytest.raises(InputMissingError, match="not UTF-8"):
        i.read(tmp_path / "latin.jsonl")
