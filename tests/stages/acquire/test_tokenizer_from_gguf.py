"""Tokenizers of gguf files: the ids that transformers' own conversion gives, and the original's where that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optikit.errors import IntegrityError, RecipeError
from optikit.models import gguf_cuts
from optikit.stages.acquire import _tokenizer_from_gguf as made

TEXTS = (
    "Hello, world! It's 2024, and 1234567 isn't 12.",
    "  two spaces\n\n\tdef f(x):\n    return x**2  # naïve café 🙂 漢字かな",
    "I'LL don't WE'RE O'Neill\r\nÉCOLE école 3.14159 ½",
    "",
)
PROSE = [
    "the old harbour stands near the water and it's bright 1999 times",
    "don't run, we're late: 12345 lines of code",
]


def trained(steps: tuple[str, ...]) -> Any:
    """Return a byte-level BPE tokenizer with real merges, whose text is cut by these steps."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    found = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel
    parts = {
        "digits": pre_tokenizers.Digits(individual_digits=True),
        "bytes": level(add_prefix_space=False, use_regex=False),
        "bytes, cut": level(add_prefix_space=False),
    }
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [parts.get(step) or pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    )
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=level.alphabet(), special_tokens=["<s>", "</s>", "<pad>"]
    )
    found.train_from_iterator([*PROSE * 5, *TEXTS], trainer)
    return found


def write(path: Path, tokens: list[str], types: list[int], kind: str = "gpt2", **more: Any) -> Path:
    """Write a gguf file of a tokenizer alone."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (("context_length", 64), ("embedding_length", 8), ("block_count", 1), ("feed_forward_length", 8)):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in {"bos_token_id": 0, "eos_token_id": 1, **more}.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        add[type(value)](f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_level(path: Path, pre: str, steps: tuple[str, ...] | None = None, **more: Any) -> Any:
    """Write a trained tokenizer under llama.cpp's name for its cuts; return it."""
    found = trained(steps or gguf_cuts.STEPS[pre])
    told = json.loads(found.to_str())["model"]
    tokens = sorted(told["vocab"], key=told["vocab"].__getitem__)
    write(
        path, tokens, [3, 3, 3, *[1] * (len(tokens) - 3)], pre=pre, merges=[" ".join(m) for m in told["merges"]], **more
    )
    return found


def read(path: Path, dest: Path) -> Any:
    """Return the tokenizer that is written of a file, as transformers loads it."""
    from transformers import AutoTokenizer

    dest.mkdir()
    made.write(path, dest, 10**6)
    (dest / "config.json").write_text('{"model_type": "llama"}')
    return AutoTokenizer.from_pretrained(dest)


def theirs(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("pre", sorted(gguf_cuts.NAMES.values()))
def test_byte_level_tokens_are_the_original_s(pre: str, tmp_path: Path) -> None:
    original = byte_level(tmp_path / "a.gguf", pre)
    mine = read(tmp_path / "a.gguf", tmp_path / "dest")
    begins = [0] if pre in gguf_cuts.BEGIN else []
    for text in TEXTS:
        assert mine(text).input_ids == begins + original.encode(text).ids
        assert mine.decode(mine(text, add_special_tokens=False).input_ids) == text
    assert mine.encode("<s>a</s>", add_special_tokens=False)[::2] == [0, 1]


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "tekken", "gpt-4o", "qwen35", "gpt-2"])
def test_byte_level_tokens_are_those_of_transformers_conversion(pre: str, tmp_path: Path) -> None:
    byte_level(tmp_path / "a.gguf", pre, add_bos_token=pre == "qwen2")
    mine, other = read(tmp_path / "a.gguf", tmp_path / "dest"), theirs(tmp_path / "a.gguf")
    for text in (*TEXTS, "a<s>b</s> c"):
        assert mine(text).input_ids == other(text).input_ids
    assert (mine.bos_token, mine.eos_token) == (other.bos_token, other.eos_token) == ("<s>", "</s>")


def pieces() -> tuple[list[str], list[int], list[float]]:
    """Return a small sentencepiece model with every byte, and words whose scores aren't in order."""
    words = ["▁", *"abcdehilnorstw", "▁t", "he", "▁the", "in", "▁in", "er", "re", "▁a", "nd", "▁and", "es", "▁s", "st"]
    words += ["▁st", "an", "and", "ands", "▁stands", "▁sta", "or", "ol", "old", "▁o", "▁old"]
    tokens = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    types = [3, 3, 2, *[6] * 256, *[1] * len(words)]
    scores = [0.0] * 259 + [-float((7 * index) % 41) for index in range(len(words))]
    return tokens, types, scores


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    place = tmp_path_factory.mktemp("pieces")
    tokens, types, scores = pieces()
    write(place / "a.gguf", tokens, types, "llama", scores=scores, unknown_token_id=2)
    return read(place / "a.gguf", place / "dest"), theirs(place / "a.gguf")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("the old sands in \n\tæ漢🙂"), max_size=30))
def test_pieces_are_those_of_transformers_conversion(both: tuple[Any, Any], text: str) -> None:
    mine, other = both
    if text.startswith(" "):  # sentencepiece and llama.cpp put a space before it nonetheless; that conversion doesn't
        assert mine(text).input_ids == other("▁" + text).input_ids
    else:
        assert mine(text).input_ids == other(text).input_ids
    if text.strip() == text:
        assert mine.decode(mine(text).input_ids, skip_special_tokens=True) == text


BROKEN: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "kind": ({"kind": "t5"}, RecipeError, "its tokenizer is 't5'"),
    "cut": ({"pre": "somebody's"}, RecipeError, 'cuts text as "somebody\'s"'),
    "no merges": ({}, IntegrityError, r"no list tokenizer\.ggml\.merges"),
    "merge of three": ({"merges": ["a b c"]}, IntegrityError, "merge 'a b c' isn't two tokens"),
    "merge of nothing": ({"merges": ["x y"]}, IntegrityError, "its tokenizer can't be built"),
    "begin": ({"merges": ["a b"], "bos_token_id": 9}, IntegrityError, "bos_token is 9, and there are 5 tokens"),
    "scores": ({"kind": "llama", "scores": [0.5]}, IntegrityError, "1 finite scores for 5 tokens"),
    "no scores": ({"kind": "llama"}, IntegrityError, r"no list tokenizer\.ggml\.scores"),
    "types": ({"merges": ["a b"], "types": [1, 1]}, IntegrityError, "2 token types for 5 tokens"),
    "twice": ({"merges": ["a b"], "tokens": ["<s>", "</s>", "a", "b", "a"]}, IntegrityError, "'a' is there twice"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_parts_that_do_not_go_together_are_told(name: str, tmp_path: Path) -> None:
    told, error, message = BROKEN[name]
    tokens = told.pop("tokens", ["<s>", "</s>", "a", "b", "ab"])
    write(tmp_path / "a.gguf", tokens, told.pop("types", [3, 3, 1, 1, 1]), **told)
    with pytest.raises(error, match=message):
        read(tmp_path / "a.gguf", tmp_path / "dest")
    write(tmp_path / "b.gguf", ["<s>", "</s>", "a"], [3, 3, 1], merges=["a b"])
    with pytest.raises(IntegrityError, match="3 tokens, and the embedding has 2 rows"):
        made.write(tmp_path / "b.gguf", tmp_path, 2)
