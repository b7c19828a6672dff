"""Texts and prompts: one tokenization for everybody, and clear words about files that can't be used."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optikit.errors import InputMissingError
from optikit.evaluation import texts
from optikit.models import tokenizer


@pytest.fixture(scope="module")
def reader(tiny_llama):
    return tokenizer.load(tiny_llama)


@given(st.text(min_size=1, max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_byte_of_the_text_belongs_to_a_token(reader, text):
    encoded = texts.encode(text, reader)
    assert encoded.ends[-1] == len(text.encode())
    assert np.all(np.diff(encoded.ends) >= 0)
    assert reader.decode(encoded.tokens.tolist()) == text or "<" in text


@pytest.fixture(scope="module")
def merging(tmp_path_factory, prose):
    """A tokenizer with merges, so that how a word splits depends on what follows."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted(alphabet), show_progress=False)
    made.train_from_iterator([prose.read_text(encoding="utf-8")], trainer)
    directory = tmp_path_factory.mktemp("merging")
    made.save(str(directory / "tokenizer.json"))
    return tokenizer.load(directory)


@pytest.mark.parametrize("at_least", [1, 100, 700, 5000, 10**9])
def test_the_start_of_a_text_is_tokenized_as_in_the_whole(merging, prose, at_least):
    text = prose.read_text(encoding="utf-8")
    whole, start = texts.encode(text, merging), texts.encode(text, merging, at_least=at_least)
    count = len(start.tokens)
    assert count >= min(at_least, len(whole.tokens))
    assert start.tokens.tolist() == whole.tokens[:count].tolist()
    assert start.ends.tolist() == whole.ends[:count].tolist()
    if at_least == 100:
        assert count < len(whole.tokens)


def test_truncation_that_a_tokenizer_file_asks_for_is_off(tiny_llama, tmp_path):
    from tokenizers import Tokenizer

    cutting = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    cutting.enable_truncation(4)
    cutting.save(str(tmp_path / "tokenizer.json"))
    assert len(texts.encode("a longer sentence", tokenizer.load(tmp_path)).tokens) == 17


def test_files_that_cannot_be_read_as_text(tmp_path):
    with pytest.raises(InputMissingError, match="doesn't exist"):
        texts.read(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(InputMissingError, match="not UTF-8: byte 0xe9 at offset 3"):
        texts.read(tmp_path / "latin.txt")
    (tmp_path / "blank.txt").write_text(" \n\t\n")
    with pytest.raises(InputMissingError, match="holds no text"):
        texts.read(tmp_path / "blank.txt")
    with pytest.raises(InputMissingError, match=r"no tokenizer\.json"):
        tokenizer.load(tmp_path)


def test_prose_gives_passages_that_do_not_overlap(reader, prose):
    found = texts.prompts(prose, reader, length=100, wanted=5, seed=0)
    assert [len(prompt) for prompt in found] == [100] * 5
    text = prose.read_text(encoding="utf-8")
    starts = sorted(text.index(reader.decode(prompt)) for prompt in found)
    assert np.all(np.diff(starts) >= 100)
    assert found == texts.prompts(prose, reader, length=100, wanted=5, seed=0)
    assert found != texts.prompts(prose, reader, length=100, wanted=5, seed=1)


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_json_lines_are_cut_and_short_ones_left_out(reader, tmp_path):
    lines = [json.dumps({"prompt": prompt, "id": 1}) for prompt in ("abcdefgh", "abc", "zyxwvut")]
    path = write(tmp_path / "prompts.jsonl", lines[0], "", *lines[1:])
    found = {reader.decode(prompt) for prompt in texts.prompts(path, reader, length=6, wanted=9, seed=0)}
    assert found == {"abcdef", "zyxwvu"}


@pytest.mark.parametrize("line", ['{"text": "x"}', "[1]", "{", '{"prompt": ""}', '{"prompt": 3}'])
def test_a_line_that_is_no_prompt_is_named(reader, tmp_path, line):
    path = write(tmp_path / "prompts.jsonl", '{"prompt": "abc"}', line)
    with pytest.raises(InputMissingError, match=r"prompts\.jsonl:2: expected"):
        texts.prompts(path, reader, length=1, wanted=1, seed=0)


def test_prompts_that_are_all_too_short_say_how_long_they_are(reader, tmp_path):
    path = write(tmp_path / "prompts.jsonl", '{"prompt": "abc"}', '{"prompt": "abcde"}')
    with pytest.raises(InputMissingError, match="has 8 tokens; the longest has 5") as caught:
        texts.prompts(path, reader, length=8, wanted=1, seed=0)
    assert "prompt_tokens to 5" in caught.value.fix


RECORDS = [{"context": f"CREATE TABLE t{i} (a INTEGER)", "question": f"How many are in {{t{i}}}?"} for i in range(9)]


@pytest.mark.parametrize("array", [True, False], ids=["array", "lines"])
def test_a_template_makes_prompts_of_other_fields(tmp_path, array):
    text = json.dumps(RECORDS, indent=1) if array else "\n".join(map(json.dumps, RECORDS))
    found = list(texts.prompt_fields(tmp_path, text, "{context}\n{question} {{SQL}}"))
    assert found[3] == "CREATE TABLE t3 (a INTEGER)\nHow many are in {t3}? {SQL}"
    assert len(found) == 9


@pytest.mark.parametrize(
    ("record", "template"),
    [({"question": "a"}, "{context}"), ({"context": 3}, "{context}"), ({"context": ""}, "{context}"), ("text", "{a}")],
)
def test_a_record_without_the_fields_is_named(tmp_path, record, template):
    text = json.dumps({"context": "fine", "a": "fine"}) + "\n" + json.dumps(record)
    with pytest.raises(InputMissingError, match=r":2: expected the fields of"):
        list(texts.prompt_fields(tmp_path / "p.jsonl", text, template))


@settings(max_examples=30)
@given(count=st.integers(4, 60), judged=st.integers(4, 80), seed=st.integers(0, 99))
def test_prompts_are_divided_without_overlap_or_loss(tmp_path_factory, count, judged, seed):
    path = tmp_path_factory.mktemp("divided") / "p.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i}"}) for i in range(count)))
    options = {"eval_prompts": judged, "template": "", "length": 4, "seed": seed}
    first, again = (
        texts.divided(path, None, lambda prompt: np.array([int(prompt)]), **options)  # type: ignore[arg-type]
        for _ in range(2)
    )
    ours = [int(each[0]) for each in (*first.judged, *first.others)]
    assert sorted(ours) == list(range(count))
    assert len(first.judged) == min(judged, max(4, 2 * count // 3))
    assert ours == [int(each[0]) for each in (*again.judged, *again.others)]


@settings(max_examples=30)
@given(count=st.integers(40, 90), judged=st.integers(4, 80), seed=st.integers(0, 99), edge=st.floats(0.2, 0.9))
def test_prompts_that_judge_come_from_their_part_and_others_never(tmp_path_factory, count, judged, seed, edge):
    path = tmp_path_factory.mktemp("divided") / "p.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i}"}) for i in range(count)))
    options = {"eval_prompts": judged, "template": "", "length": 4, "seed": seed, "eval_part": (edge, 1.0)}
    found = texts.divided(path, None, lambda prompt: np.array([int(prompt)]), **options)  # type: ignore[arg-type]
    first = int(count * edge)
    assert sorted(int(each[0]) for each in found.others) == list(range(first))
    assert {int(each[0]) for each in found.judged} <= set(range(first, count))
    assert len(found.judged) == min(judged, count - first)


def test_a_part_of_too_few_prompts_is_refused(tmp_path):
    path = write(tmp_path / "p.jsonl", *[json.dumps({"prompt": f"{i}"}) for i in range(20)])
    options = {"eval_prompts": 9, "template": "", "length": 4, "seed": 0, "eval_part": (0.9, 1.0)}
    with pytest.raises(InputMissingError, match=r"2 of the 20 prompts of .* are in eval_part \[0\.9, 1\.0\]"):
        texts.divided(path, None, lambda prompt: np.array([int(prompt)]), **options)
