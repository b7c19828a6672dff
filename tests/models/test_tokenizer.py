"""A tokenizer is what it does: the same for every way to write its file, another one for every change that counts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from optikit.errors import InputMissingError, IntegrityError, UsageError
from optikit.evaluation import texts
from optikit.models import tokenizer

PIPELINES = {
    "byte level": (pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
    "metaspace": (pre_tokenizers.Metaspace(), decoders.Metaspace()),
}


@pytest.fixture(scope="module", params=[*PIPELINES, "unigram"])
def content(request):
    """The file of a trained tokenizer, as JSON."""
    lines = ["the old stone house stands near the river", "cold bright water under a green window"] * 5
    if request.param == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        special = ["<s>", "</s>", "<unk>"]
        trainer = trainers.UnigramTrainer(
            vocab_size=60, special_tokens=special, unk_token=special[2], show_progress=False
        )
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = PIPELINES[request.param]
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    made.normalizer = normalizers.NFC()
    made.train_from_iterator(lines, trainer)
    return json.loads(made.to_str())


def described(tmp_path, content, **how):
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, **how))
    return tokenizer.describe(tmp_path)


def changed(content, change):
    copy = json.loads(json.dumps(content))
    change(copy)
    return copy


def old_merges(content):
    content["model"]["merges"] = [" ".join(each) for each in content["model"].get("merges", [])]


def old_metaspace(content):
    for part in (content["pre_tokenizer"], content.get("decoder") or {}):
        if part.get("type") == "Metaspace":
            del part["prepend_scheme"], part["split"]
            part |= {"add_prefix_space": True, "str_rep": part["replacement"]}


def without_defaults(content):
    for name in ("dropout", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges", "continuing_subword_prefix"):
        if not content["model"].get(name):
            content["model"].pop(name, None)
    if content["pre_tokenizer"]["type"] == "ByteLevel":
        content["pre_tokenizer"].pop("use_regex")
    del content["truncation"], content["padding"]


def stored_use(content):
    content["truncation"] = {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_id": 0, "pad_type_id": 0}
    content["padding"] |= {"pad_token": "<s>", "pad_to_multiple_of": None}


def more_framing(content):
    content["post_processor"] = json.loads(template("<s> $A </s>").__getstate__())


def template(single):
    return processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])


@pytest.mark.parametrize("change", [old_merges, old_metaspace, without_defaults, stored_use, more_framing])
def test_a_tokenizer_saved_again_is_the_same(tmp_path, content, change):
    plain = described(tmp_path, content)
    assert plain == described(tmp_path, content, indent=2)
    assert plain == described(tmp_path, changed(content, change))
    # and the library agrees: it reads the changed file as the same tokenizer
    text = "the old stone </s> window \u00e9"
    first, again = Tokenizer.from_str(json.dumps(content)), tokenizer.load(tmp_path)
    assert first.encode(text, add_special_tokens=False).ids == again.encode(text, add_special_tokens=False).ids


def other_ids(content):
    vocab = content["model"]["vocab"]
    if isinstance(vocab, list):
        vocab[-1], vocab[-2] = vocab[-2], vocab[-1]
    else:
        one, two = list(vocab)[-2:]
        vocab[one], vocab[two] = vocab[two], vocab[one]


def other_merges(content):
    merges = content["model"].get("merges")
    if merges is None:
        content["model"]["vocab"][-1][1] -= 1.0
    else:
        merges[0], merges[1] = merges[1], merges[0]


def other_normalizer(content):
    content["normalizer"] = {"type": "Lowercase"}


def other_special(content):
    content["added_tokens"][0]["special"] = False


def another_token(content):
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 900, "content": "[PAD]"})


def other_splitting(content):
    content["pre_tokenizer"] = {"type": "Whitespace"}


@pytest.mark.parametrize(
    "change", [other_ids, other_merges, other_normalizer, other_special, another_token, other_splitting]
)
def test_whatever_makes_other_tokens_is_another_tokenizer(tmp_path, content, change):
    assert described(tmp_path, content).sha256 != described(tmp_path, changed(content, change)).sha256


def test_the_largest_id_counts_wherever_it_stands(tmp_path, content):
    vocab = content["model"]["vocab"]
    assert described(tmp_path, content).tokens == len(vocab)
    assert described(tmp_path, changed(content, another_token)).tokens == 901


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n", "is a pointer of Git LFS"),
        ("{", "Expecting"),
        ("{}", "is no tokenizer: KeyError: 'model'"),
        ('{"model": {"vocab": {"a": "b"}}}', "is no tokenizer"),
        ('{"model": {"vocab": 3}}', "is no tokenizer"),
    ],
)
def test_a_damaged_file_is_told(tmp_path, written, said):
    (tmp_path / "tokenizer.json").write_text(written)
    with pytest.raises(IntegrityError, match=f"tokenizer.json.* {said}|tokenizer.json: {said}"):
        tokenizer.load(tmp_path)


def test_what_describes_and_does_not_load_is_damaged_too(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"pre_tokenizer": {"type": "NoSuch"}}))
    with pytest.raises(IntegrityError, match="can't be loaded"):
        tokenizer.load(tmp_path)


def test_no_tokenizer(tmp_path):
    assert tokenizer.describe(tmp_path) is None
    with pytest.raises(InputMissingError, match=r"no tokenizer\.json"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize("single", ["$A", "<s> $A", "<s> <s> $A </s>", "$A </s>"])
@given(text=st.text(st.characters(codec="utf-8"), max_size=30))
def test_a_text_is_opened_and_never_ended(tiny_llama, single, text):
    by = tokenizer.load(tiny_llama)
    plain = by.encode(text, add_special_tokens=False).ids
    by.post_processor = template(single)
    opening = [0] * single.partition("$")[0].count("<s>")
    assert tokenizer.opening(by) == opening
    assert tokenizer.encode(by, text) == [*opening, *plain]
    assert tokenizer.encode(by, text, opened=False) == plain


def test_half_a_character_is_refused(tiny_llama):
    with pytest.raises(UsageError, match=r"half a surrogate pair, '\\ud83d', at character 2"):
        tokenizer.encode(tokenizer.load(tiny_llama), "ab\ud83d")


@pytest.mark.parametrize(
    "model",
    [models.Unigram([("a", -1.0)], None), models.WordLevel({"a": 0}, "?"), models.WordPiece({"a": 0})],
)
def test_a_tokenizer_without_a_token_for_the_unknown_says_so(model):
    by = Tokenizer(model)
    assert tokenizer.encode(by, "a") == [0]
    with pytest.raises(IntegrityError, match="has no tokens for a text that begins 'house by the river'") as caught:
        tokenizer.encode(by, "house by the river")
    assert "unk_id" in caught.value.fix
    with pytest.raises(IntegrityError, match="begins 'b'"):
        texts.encode("b", by)


def test_stored_truncation_and_padding_are_off(tmp_path, tiny_llama):
    made = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    made.enable_truncation(4)
    made.enable_padding(length=64, pad_id=2)
    made.save(str(tmp_path / "tokenizer.json"))
    assert len(tokenizer.encode(tokenizer.load(tmp_path), "a longer sentence")) == 17


def test_a_copy_has_the_chat_templates_with_names(tmp_path, tiny_llama):
    source, dest = tmp_path / "source", tmp_path / "dest"
    for each in (source / "additional_chat_templates", dest):
        each.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((tiny_llama / name).read_bytes())
    (source / "additional_chat_templates" / "rag.jinja").write_text("R")
    (source / "model.safetensors").write_text("no")
    (tmp_path / "secret").write_text("S")
    (source / "additional_chat_templates" / "linked.jinja").symlink_to(tmp_path / "secret")
    tokenizer.copy(source, dest)
    copied = {path.relative_to(dest).as_posix() for path in dest.rglob("*") if path.is_file()}
    assert copied == {"tokenizer.json", "tokenizer_config.json", "additional_chat_templates/rag.jinja"}
    assert tokenizer.template_names(dest) == {"rag"}
