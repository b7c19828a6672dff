"""From a prompt to text, through the command and in Python."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from optikit import runtime
from optikit.cli.generate import generate
from optikit.errors import InputMissingError, UsageError
from optikit.runtime.text import Talker

app = typer.Typer()
app.command()(generate)


class Scripted:
    """A decoder that says what it is told: the text around it is what is tested here."""

    runtime, dtype, threads, vocab = "script", "none", 1, 260

    def __init__(self, tokens, max_tokens=64):
        self.tokens, self.max_tokens = tokens, max_tokens

    def greedy(self, _, new_tokens):
        yield from self.tokens[:new_tokens]


def said(tiny_llama, text, *after, max_tokens=40, room=64):
    tokens = Talker(Scripted([]), tiny_llama).encode(text, chat=False).tolist()
    talker = Talker(Scripted([*tokens, *after], room), tiny_llama)
    return [chunk.text for chunk in talker.answer(np.array([5, 6]), max_tokens)]


def test_tokens_come_back_as_text_character_by_character(tiny_llama):
    pieces = said(tiny_llama, "aß→")
    assert "".join(pieces) == "aß→"
    assert pieces == ["a", "", "ß", "", "", "→"]  # bytes of one character are held back until it is whole


def test_the_end_of_text_ends_the_answer_and_is_not_shown(tiny_llama):
    assert "".join(said(tiny_llama, "ab", 1, 70, 71)) == "ab"


def test_further_ends_from_the_configuration(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, directory := tmp_path / "model")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 70]}))
    assert "".join(said(directory, "ab", 70, 71)) == "ab"


def test_an_answer_stops_where_the_cache_ends(tiny_llama):
    assert len(said(tiny_llama, "abcdefgh", max_tokens=6)) == 6
    assert len(said(tiny_llama, "abcdefgh", room=5)) == 3
    with pytest.raises(UsageError, match="3 tokens don't fit"):
        said(tiny_llama, "abcdefgh", room=2)


def test_a_prompt_becomes_a_turn_where_there_is_a_template(tiny_llama, tmp_path):
    plain = Talker(Scripted([]), tiny_llama)
    assert plain.encode("hi", chat=True).tolist() == plain.encode("hi", chat=False).tolist()
    shutil.copytree(tiny_llama, directory := tmp_path / "model")
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    (directory / "chat_template.jinja").write_text(template)
    talker = Talker(Scripted([]), directory)
    assert talker.encode("hi", chat=True).tolist() == plain.encode("[user]hi>", chat=False).tolist()
    assert talker.encode("hi", chat=False).tolist() == plain.encode("hi", chat=False).tolist()


def test_no_prompt_and_no_tokenizer(tiny_llama, tmp_path):
    with pytest.raises(UsageError, match="the prompt is empty"):
        Talker(Scripted([]), tiny_llama).encode("", chat=True)
    with pytest.raises(InputMissingError, match=r"no tokenizer\.json"):
        Talker(Scripted([]), tmp_path)


@pytest.mark.parametrize("compiled", [True, False])
def test_the_command_prints_the_text_of_greedy_decoding(tiny_onnx, tiny_llama, tmp_path, compiled):
    shutil.copytree(tiny_llama, tmp_path / "out" / "model")
    if compiled:
        shutil.copytree(tiny_onnx, tmp_path / "out" / "compiled" / "onnxruntime")
    decoder = runtime.load(tmp_path / "out")
    prompt = Talker(decoder, tiny_llama).encode("stone", chat=False)
    wanted = "".join(chunk.text for chunk in Talker(decoder, tiny_llama).answer(prompt, 6))
    result = CliRunner().invoke(app, [str(tmp_path / "out"), "--prompt", "stone", "--max-tokens", "6", "--stats"])
    assert result.exit_code == 0, result.output
    assert result.stdout == wanted + "\n"
    assert "tokens/s after the first" in result.stderr
    assert ("onnxruntime, float32" if compiled else "transformers, bfloat16") in result.stderr
