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
from optikit.errors import InputMissingError, StageFailedError, UsageError
from optikit.models import tokenizer
from optikit.runtime.generate import TextGenerator
from optikit.runtime.speculation.acceptors import Sampling
from tests.app.outputs import seal_output

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
    tokens = TextGenerator(Scripted([]), tiny_llama).encode(text, chat=False).tolist()
    generator = TextGenerator(Scripted([*tokens, *after], room), tiny_llama)
    return [chunk.text for chunk in generator.answer(np.array([5, 6]), max_tokens)]


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
    with pytest.raises(UsageError, match="a prompt of 2 tokens leaves no room for an answer: this model holds 2"):
        said(tiny_llama, "abcdefgh", room=2)


def test_a_prompt_becomes_a_turn_where_there_is_a_template(tiny_llama, tmp_path):
    plain = TextGenerator(Scripted([]), tiny_llama)
    assert plain.encode("hi", chat=True).tolist() == plain.encode("hi", chat=False).tolist()
    shutil.copytree(tiny_llama, directory := tmp_path / "model")
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    (directory / "chat_template.jinja").write_text(template)
    generator = TextGenerator(Scripted([]), directory)
    assert generator.encode("hi", chat=True).tolist() == plain.encode("[user]hi>", chat=False).tolist()
    assert generator.encode("hi", chat=False).tolist() == plain.encode("hi", chat=False).tolist()


def test_no_prompt_and_no_tokenizer(tiny_llama, tmp_path):
    with pytest.raises(UsageError, match="the prompt is empty"):
        TextGenerator(Scripted([]), tiny_llama).encode("", chat=True)
    with pytest.raises(InputMissingError, match=r"no tokenizer\.json"):
        TextGenerator(Scripted([]), tmp_path)


def test_what_a_tokenizer_puts_behind_a_text_does_not_end_the_prompt(tiny_llama, tmp_path):
    from tokenizers import Tokenizer, processors

    shutil.copytree(tiny_llama, directory := tmp_path / "model")
    ending = Tokenizer.from_file(str(directory / "tokenizer.json"))
    special = [("<s>", 0), ("</s>", 1)]
    ending.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    ending.enable_truncation(3)
    ending.save(str(directory / "tokenizer.json"))
    plain = TextGenerator(Scripted([]), tiny_llama).encode("a stone", chat=False).tolist()
    generator = TextGenerator(Scripted([]), directory)
    assert generator.encode("a stone", chat=False).tolist() == [0, *plain]
    (directory / "chat_template.jinja").write_text("<s>{{ messages[0].content }}")
    assert TextGenerator(Scripted([]), directory).encode("a stone", chat=True).tolist() == [0, *plain]


NAMED = {"rag": "R {{ messages[0].content }}", "default": "D {{ messages[0].content }}"}


def name_in_files(directory, templates):
    (directory / "additional_chat_templates").mkdir()
    for name, template in templates.items():
        path = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
        (directory / path).write_text(template)


def name_in_config(directory, templates):
    path = directory / "tokenizer_config.json"
    rows = [{"name": name, "template": template} for name, template in templates.items()]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": rows}))


@pytest.mark.parametrize("write", [name_in_files, name_in_config])
def test_chat_templates_have_names(tiny_llama, tmp_path, write):
    for known in ("all", "rag"):
        shutil.copytree(tiny_llama, tmp_path / known)
        write(tmp_path / known, NAMED if known == "all" else {"rag": NAMED["rag"]})
    every, one = (TextGenerator(Scripted([]), tmp_path / known) for known in ("all", "rag"))
    assert tokenizer.template_names(tmp_path / "all") == {"rag", "default"}
    assert tokenizer.template_names(tmp_path / "rag") == {"rag"}
    assert tokenizer.template_names(tiny_llama) == frozenset()
    told = {chat: bytes_of(every.encode("hi", chat=chat), tiny_llama) for chat in (True, False, "rag", "default")}
    assert told == {True: "D hi", False: "hi", "rag": "R hi", "default": "D hi"}
    with pytest.raises(UsageError, match="no chat template 'default', but rag"):
        one.encode("hi", chat=True)
    with pytest.raises(UsageError, match="no chat template 'tools', but default, rag"):
        every.encode("hi", chat="tools")
    with pytest.raises(UsageError, match="no chat template 'rag', but none at all"):
        TextGenerator(Scripted([]), tiny_llama).encode("hi", chat="rag")


def bytes_of(tokens, directory):
    return tokenizer.load(directory).decode(tokens.tolist())


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ 1 // 0 }}", "division"),
    ],
)
def test_a_chat_template_that_fails_is_told(tiny_llama, tmp_path, template, said):
    shutil.copytree(tiny_llama, directory := tmp_path / "model")
    (directory / "chat_template.jinja").write_text(template)
    generator = TextGenerator(Scripted([]), directory)
    with pytest.raises(UsageError, match=f"chat template fails on one turn of the user: .*{said}"):
        generator.encode("hi", chat=True)
    assert len(generator.encode("hi", chat=False)) == 2


def test_half_a_character_is_no_prompt(tiny_llama):
    with pytest.raises(UsageError, match=r"half a surrogate pair, '\\udce9', at character 3"):
        TextGenerator(Scripted([]), tiny_llama).encode("caf\udce9", chat=False)


@pytest.mark.parametrize("batch", [1, 3])
def test_answers_come_in_the_order_of_their_prompts(tiny_llama, batch):
    decoder = runtime.load(tiny_llama, dtype="float32", threads=1)
    generator = TextGenerator(decoder, tiny_llama)
    prompts = [generator.encode(each, chat=False) for each in ("stone", "a", "the river", "st", "light and")]
    wanted = [list(generator.answer(each, 9)) for each in prompts]
    generator.ends = frozenset({*generator.ends, next(decoder.greedy(prompts[1], 1))})  # one ends at once, others go on
    found = list(generator.answers(prompts, 9, batch=batch))
    assert (found[1].text, found[1].tokens, found[1].finish) == ("", 0, "eos")
    for answer, chunks in zip(found, wanted, strict=True):
        assert answer.finish == "eos" or answer.tokens == 9
        assert "".join(chunk.text for chunk in chunks).startswith(answer.text.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert [each.tokens for each in found].count(9) >= 2
    with pytest.raises(UsageError, match="a prompt of 512 tokens leaves no room"):
        next(generator.answers([np.zeros(512, np.int64)], 4))


def test_a_decoder_for_one_text_says_so(tiny_llama):
    generator = TextGenerator(Scripted([5, 6]), tiny_llama)
    with pytest.raises(UsageError, match="this script decoder writes one text at a time"):
        next(generator.answers([np.array([5])], 4, batch=2))


@pytest.mark.parametrize(
    "lines",
    [
        "stone\n\na river\nst\n",
        '{"prompt": "stone"}\n{"prompt": "a river"}\n{"prompt": "st"}\n',
        '\ufeff{"prompt": "stone", "by": "a\u2028b\u0085c"}\r\n{"prompt": "a river"}\r\n{"prompt": "st"}\r\n',
        "\ufeffstone\r\na river\r\nst",
    ],
)
def test_a_file_of_prompts_is_answered_line_by_line(tiny_onnx, tmp_path, lines):
    (tmp_path / "prompts").write_bytes(lines.encode())
    given = [str(tiny_onnx), "--prompts", str(tmp_path / "prompts"), "--max-tokens", "6", "--stats"]
    result = CliRunner().invoke(app, [*given, "--batch", "2"])
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [each["prompt"] for each in answers] == ["stone", "a river", "st"]
    assert "in 3 answers" in result.stderr
    for each in answers:
        alone = CliRunner().invoke(app, [str(tiny_onnx), "--prompt", each["prompt"], "--max-tokens", "6"])
        assert alone.stdout.rstrip("\n\N{REPLACEMENT CHARACTER}") == each["text"].rstrip("\n\N{REPLACEMENT CHARACTER}")
        assert each["finish"] in ("eos", "length")


@pytest.mark.parametrize(
    ("given", "text", "told"),
    [
        ([], "", "nothing to answer"),
        (["--prompt", "a", "--prompts", "prompts"], "a", "or too much"),
        (["--prompt", "a", "--batch", "2"], "", "has one prompt to answer"),
        (["--prompts", "prompts"], "\n \n", "holds no prompts"),
        (["--prompts", "prompts"], '{"prompt": "a"}\n{"text": "b"}', "record 2 has no `prompt`"),
        (["--prompts", "absent"], "", "absent doesn't exist"),
        (
            ["--prompts", "prompts"],
            "a\n" + 9999 * "long ",
            "prompts, line 2: a prompt of 49995 characters leaves no room",
        ),
        (["--prompts", "prompts"], "a\n\n" + 99 * " river", "prompts, line 3: a prompt of "),
        (
            ["--prompts", "prompts"],
            '{"prompt": "a"}\n\n{"prompt": "' + 99 * " river" + '"}',
            "prompts, record 3: a prompt of ",
        ),
        (["--prompts", "prompts", "--no-chat"], '[{"prompt": "a"}, {"prompt": "' + 99 * " river" + '"}]', "record 2: "),
    ],
)
def test_prompts_that_are_none(tiny_onnx, tmp_path, monkeypatch, given, text, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").write_text(text)
    result = CliRunner().invoke(app, [str(tiny_onnx), *given])
    assert isinstance(result.exception, UsageError | InputMissingError)
    assert told in str(result.exception)


def test_bytes_of_another_encoding_are_told(tiny_onnx):
    asked = [str(tiny_onnx), "--no-chat", "--max-tokens", "3", "--prompt"]
    found = CliRunner().invoke(app, [*asked, "caf\udce9 \udcff"])
    assert found.exit_code == 0, found.output
    assert "2 bytes of it are put to the model as U+FFFD" in found.stderr
    whole = CliRunner().invoke(app, [*asked, "caf\ufffd \ufffd"])
    assert (whole.stdout, whole.stderr) == (found.stdout, "")


@pytest.mark.parametrize("compiled", [True, False])
def test_the_command_prints_the_text_of_greedy_decoding(tiny_onnx, tiny_llama, tmp_path, compiled):
    shutil.copytree(tiny_llama, tmp_path / "out" / "model")
    if compiled:
        shutil.copytree(tiny_onnx, tmp_path / "out" / "compiled" / "onnxruntime")
    seal_output(tmp_path / "out")
    decoder = runtime.load(tmp_path / "out")
    prompt = TextGenerator(decoder, tiny_llama).encode("stone", chat=False)
    wanted = "".join(chunk.text for chunk in TextGenerator(decoder, tiny_llama).answer(prompt, 6))
    result = CliRunner().invoke(app, [str(tmp_path / "out"), "--prompt", "stone", "--max-tokens", "6", "--stats"])
    assert result.exit_code == 0, result.output
    assert result.stdout == wanted + "\n"
    assert "tokens/s after the first" in result.stderr
    assert ("onnxruntime, float32" if compiled else "transformers, bfloat16") in result.stderr


def written(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_drawn_texts_repeat_with_their_seed_and_greedy_ones_need_none(tiny_onnx, tmp_path):
    asked = [tiny_onnx, "--prompt", "stone", "--max-tokens", "12", "--temperature", "1.5"]
    assert written(*asked, "--seed", "1") == written(*asked, "--seed", "1")
    assert written(*asked, "--seed", "1") != written(*asked, "--seed", "2")
    assert written(*asked, "--top-k", "1") == written(tiny_onnx, "--prompt", "stone", "--max-tokens", "12")
    (tmp_path / "prompts").write_text("stone\nstone\n")
    both = written(tiny_onnx, "--prompts", tmp_path / "prompts", "--temperature", "1.5", "--batch", "2", "--seed", "1")
    one, two = (json.loads(line)["text"] for line in both.splitlines())
    assert one != two
    alone = written(tiny_onnx, "--prompts", tmp_path / "prompts", "--temperature", "1.5", "--seed", "1")
    assert [json.loads(line)["text"] for line in alone.splitlines()] == [one, two]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--top-p", "0.5"], "temperature 0 doesn't"),
        (["--acceptor", "rejection"], "temperature 0 doesn't"),
        (["--acceptor", "greedy", "--temperature", "1"], "doesn't sample"),
        (["--acceptor", "typical", "--temperature", "1"], "is lossy"),
        (["--acceptor", "none"], "there is no acceptor 'none'"),
        (["--temperature", "1", "--top-p", "0"], "outside (0, 1]"),
        (["-k", "3"], "no speculator that drafts"),
    ],
)
def test_draws_that_cannot_be_had(tiny_onnx, arguments, told):
    result = CliRunner().invoke(app, [str(tiny_onnx), "--prompt", "a", *arguments])
    assert isinstance(result.exception, UsageError)
    assert told in str(result.exception)


def speculated(tiny_onnx, tmp_path, **tuned):
    directory = tmp_path / "out"
    shutil.copytree(tiny_onnx, directory / "compiled" / "onnxruntime")
    (directory / "speculator").mkdir()
    told = {"method": "lookup", "lengths": {"2": 4, "1": 2}, "gate": 0.4, "min_window": 2} | tuned
    (directory / "speculator" / "speculator.json").write_text(json.dumps(told))
    seal_output(directory)
    return directory


def test_an_installed_acceptor_is_found_by_name_and_held_to_its_word(tiny_onnx, tmp_path, monkeypatch):
    """A package's entry point, as pip leaves it on disk."""
    package = tmp_path / "site"
    (package / "mine-1.dist-info").mkdir(parents=True)
    (package / "mine-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    points = "[optikit.acceptors]\nfirst_only = mine:FirstOnly\ngreedy_liar = mine:Liar\nbroken = mine:absent\n"
    (package / "mine-1.dist-info" / "entry_points.txt").write_text(points)
    (package / "mine.py").write_text(
        "from optikit.runtime.speculation.acceptors import Acceptance, Greedy\n"
        "class FirstOnly:\n"
        "    lossless = True\n"
        "    def __init__(self, sampling):\n        self.sampling = sampling\n"
        "    def accept(self, draft, probs, logits, rng):\n"
        "        kept, token = Greedy().accept(draft[:1], None, logits[: len(draft[:1]) + 1], rng)\n"
        "        return Acceptance(kept, token)\n"
        "class Liar(FirstOnly):\n"
        "    def accept(self, draft, probs, logits, rng):\n        return Acceptance(len(draft) + 1, 0)\n"
    )
    monkeypatch.syspath_prepend(str(package))
    directory = speculated(tiny_onnx, tmp_path)
    asked = [directory, "--prompt", "on and on and on and", "--max-tokens", "20", "--stats"]
    greedy = written(*asked)
    assert written(*asked, "--acceptor", "first_only") == greedy
    assert written(*asked, "-k", "1") == greedy
    liar = CliRunner().invoke(app, [*map(str, asked), "--acceptor", "greedy_liar"])
    assert isinstance(liar.exception, StageFailedError)
    assert "acceptor greedy_liar of mine:Liar kept 1 of 0 draft tokens" in str(liar.exception)
    broken = CliRunner().invoke(app, [*map(str, asked), "--acceptor", "broken"])
    assert isinstance(broken.exception, UsageError)
    assert "broken of mine:absent can't be had" in str(broken.exception)


DRAWS = 1500


def shares(directory, tmp_path, *arguments):
    """Return how often the command writes each text of three tokens, over many seeds."""
    path = tmp_path / "prompts.jsonl"
    path.write_text((json.dumps({"prompt": "on and on and on and"}) + "\n") * DRAWS)
    asked = [directory, "--prompts", path, "--no-chat", "--max-tokens", "3", "--top-k", "3", "--temperature", "1.3"]
    texts = [json.loads(line)["text"] for line in written(*asked, *arguments).splitlines()]
    return {text: texts.count(text) / len(texts) for text in set(texts)}


@pytest.mark.parametrize(("acceptor", "batch"), [("rejection", 1), ("sample_match", 4), ("typical", 4)])
def test_the_command_draws_what_the_model_alone_would(tiny_onnx, tiny_llama, tmp_path, acceptor, batch):
    directory = speculated(tiny_onnx, tmp_path, acceptor=acceptor)
    asked = ["--acceptor", acceptor, "--batch", batch, "--seed", 7]
    found = shares(directory, tmp_path, *asked, *(["--allow-lossy"] if acceptor == "typical" else []))
    decoder = runtime.load(tiny_onnx)
    generator = TextGenerator(decoder, tiny_llama)
    prompt = generator.encode("on and on and on and", chat=False)
    sampling = Sampling(temperature=1.3, top_k=3)
    wanted: dict[str, float] = {}
    paths = [((), 1.0)]
    for _ in range(3):
        paths = [
            ((*path, int(token)), mass * float(p[token]))
            for path, mass in paths
            for p in [sampling.probabilities(decoder.forward(np.append(prompt, path).astype(np.int64), 0, 1)[0])]
            for token in np.flatnonzero(p)
        ]
    for path, mass in paths:
        text = generator.tokenizer.decode(list(path), skip_special_tokens=True)
        wanted[text] = wanted.get(text, 0.0) + mass
    apart = 0.5 * sum(abs(found.get(text, 0) - wanted.get(text, 0)) for text in found.keys() | wanted.keys())
    if acceptor == "typical":  # the trivial baseline: what changes the text is seen
        assert apart > 0.3
    else:
        assert apart < 0.09  # 27 texts, 1,500 draws: about 0.05 by chance


def test_the_acceptor_of_the_recipe_decides_where_nobody_asks_for_another(tiny_onnx, tmp_path):
    """`typical` takes the likeliest token where it drafts nothing, so that no seed changes its text."""
    typical = speculated(tiny_onnx, tmp_path, acceptor="typical")
    asked = [typical, "--prompt", "on and on and on and", "--no-chat", "--max-tokens", "24", "--temperature", "1.5"]
    seeds = [("--seed", "1"), ("--seed", "2")]
    kept = {written(*asked, *seed) for seed in seeds}
    assert len(kept) == 1
    assert {written(*asked, *seed, "--acceptor", "typical", "--allow-lossy") for seed in seeds} == kept
    assert len({written(*asked, *seed, "--acceptor", "rejection") for seed in seeds}) == 2
