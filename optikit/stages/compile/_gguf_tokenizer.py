"""A tokenizer in the words of gguf: tokens, types, merges, and how text is cut before (llama.cpp, src/llama-vocab.cpp).

llama.cpp has its own tokenizers and takes a name for the patterns that cut a text. The name is found by those patterns
as tokenizer.json has them, which works for any vocabulary; whoever has others says it (`pre_tokenizer`), and the trial
compares the tokens of both. A sentencepiece model that was made a BPE one has its merges' ranks for scores.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit.errors import StageFailedError
from optikit.models import gguf_cuts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BYTES = re.compile(r"<0x[0-9A-F]{2}>")
"""A token that stands for a byte that no other token has."""
SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unk": "unk_token", "pad": "pad_token"}
LOWEST = -1e6
"""Score of a piece that no merge makes."""


def add(writer: GGUFWriter, directory: Path, vocab: int, pre: str) -> None:
    """Write the tokenizer of a model directory.

    Args:
        writer: Where to.
        directory: Hugging Face directory.
        vocab: Rows of the embedding; those without a token are told to be unused.
        pre: Name of the pre-tokenizer, or "".

    Raises:
        StageFailedError: gguf has no words for this tokenizer, or none are known here.
    """
    from transformers import AutoTokenizer

    told = _read(directory)
    model = told["model"]
    if model.get("type") != "BPE":
        message = f"{directory.name}/tokenizer.json holds a {model.get('type')} model, and gguf files here BPE ones"
        raise StageFailedError(message, fix="use another engine for this model")
    tokens, types = _tokens(told, vocab)
    if not model["merges"]:
        message = f"{directory.name}/tokenizer.json has no merges, and llama.cpp loads no tokenizer without"
        raise StageFailedError(message, fix="use another engine for this model")
    merges = [" ".join(each) if isinstance(each, list) else each for each in model["merges"]]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix("prepend" in json.dumps([told["normalizer"], told["pre_tokenizer"]]).lower())
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre or _pre(told["pre_tokenizer"], directory))
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _special(writer, AutoTokenizer.from_pretrained(str(directory), local_files_only=True), vocab)


def _read(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise StageFailedError(f"{directory.name} has no tokenizer.json", fix="gguf files hold their tokenizer: add it")
    told = json.loads(path.read_text(encoding="utf-8"))
    return {"normalizer": None, "pre_tokenizer": None, "added_tokens": [], **told}


def _tokens(told: Mapping[str, Any], vocab: int) -> tuple[list[str], list[int]]:
    """Return the token of every row and its type."""
    tokens = [f"[PAD{index}]" for index in range(vocab)]
    types = [UNUSED] * vocab
    model = told["model"]
    unknown = model.get("unk_token") if model.get("byte_fallback") else None
    for token, index in model["vocab"].items():
        if index < vocab:
            tokens[index], types[index] = token, UNKNOWN if token == unknown else _type(token, model)
    for added in told["added_tokens"]:
        if added["id"] < vocab and types[added["id"]] != UNKNOWN:
            tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    return tokens, types


def _type(token: str, model: Mapping[str, Any]) -> int:
    return BYTE if model.get("byte_fallback") and BYTES.fullmatch(token) else NORMAL


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return what makes sentencepiece merge in the order of the ranks."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    return [-float(ranks[token]) if token in ranks else LOWEST for token in tokens]


def cuts(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return what a pre-tokenizer of tokenizer.json does, in words and patterns."""
    if pre_tokenizer is None:
        return ()
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return tuple(each for part in pre_tokenizer["pretokenizers"] for each in cuts(part))
    if kind == "ByteLevel":
        return (gguf_cuts.BYTES_CUT if pre_tokenizer.get("use_regex", True) else gguf_cuts.BYTES,)
    if kind == "Digits" and pre_tokenizer.get("individual_digits"):
        return (gguf_cuts.DIGITS,)
    if kind == "Split" and pre_tokenizer.get("behavior") == "Isolated":
        return (str(pre_tokenizer["pattern"].get("Regex", pre_tokenizer["pattern"])),)
    return (json.dumps(pre_tokenizer),)


def _pre(pre_tokenizer: Mapping[str, Any] | None, directory: Path) -> str:
    found = cuts(pre_tokenizer)
    if found not in gguf_cuts.NAMES:
        message = f"{directory.name}/tokenizer.json cuts text by {', '.join(found) or 'nothing'}"
        fix = "say what llama.cpp calls that: pre_tokenizer: NAME"
        raise StageFailedError(f"{message}, which has no name here", fix=fix)
    return gguf_cuts.NAMES[found]


def _special(writer: GGUFWriter, tokenizer: Any, vocab: int) -> None:
    """Write which tokens begin and end a text, whether they are added, and the chat template.

    A tokenizer's class may make up one that the model has no row for: that isn't written.
    """
    ids = {name: getattr(tokenizer, f"{attribute}_id") for name, attribute in SPECIAL.items()}
    for name, index in ids.items():
        if index is not None and index < vocab:
            getattr(writer, f"add_{name}_token_id")(index)
    example = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(example) and example[0] == ids["bos"])
    writer.add_add_eos_token(bool(example) and example[-1] == ids["eos"])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
