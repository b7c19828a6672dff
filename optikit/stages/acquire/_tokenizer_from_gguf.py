"""The tokenizer of a gguf file as tokenizer.json: what `stages/compile/_gguf_tokenizer.py` writes, and llama.cpp reads.

Byte-level BPE has its tokens and merges in the file, and a name for how text is cut. Of a sentencepiece model there are
tokens and scores: pieces merge in the order of their scores, as in transformers' conversion of such models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optikit.errors import IntegrityError, RecipeError
from optikit.models import gguf_cuts, gguf_parts
from optikit.models.gguf_header import MOST_STRING, read_header
from optikit.models.strict_json import FIX

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
SPACE = "▁"
SPECIAL: Mapping[str, str] = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
"""What transformers calls a special token → its key below `tokenizer.ggml`."""


def special_ids(metadata: Mapping[str, Any], vocab: int, where: Path) -> dict[str, int]:
    """Return the ids of special tokens, by what transformers calls them.

    Raises:
        IntegrityError: One isn't the number of a token.
    """
    found = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in SPECIAL.items()}
    for name, index in found.items():
        if index is not None and (type(index) is not int or not 0 <= index < vocab):
            raise IntegrityError(f"{where}: {name} is {index!r}, and there are {vocab} tokens", fix=FIX)
    return {name: index for name, index in found.items() if index is not None}


def require_known(metadata: Mapping[str, Any], where: Path) -> None:
    """Refuse a tokenizer that isn't read here.

    Raises:
        RecipeError: Naming its kind.
    """
    kind, cut = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind not in ("gpt2", "llama"):
        message = f"{where}: its tokenizer is {kind!r}, and 'gpt2' and 'llama' are read here"
    elif kind == "gpt2" and cut not in gguf_cuts.STEPS:
        message = f"{where}: its tokenizer cuts text as {cut!r}, which isn't known here"
    else:
        return
    raise RecipeError(message, fix="start from the model's safetensors directory")


def write(path: Path, dest: Path, vocab: int) -> None:
    """Write tokenizer.json and its companions to a directory.

    Args:
        path: The file, or a part.
        dest: Existing directory.
        vocab: Rows of the embedding.

    Raises:
        RecipeError: A tokenizer that isn't read here.
        IntegrityError: Its parts don't go together.
    """
    from transformers import PreTrainedTokenizerFast

    metadata = read_header(gguf_parts.files(path)[0], keep=MOST_STRING).metadata
    require_known(metadata, path)
    tokens = _list(metadata, "tokens", str, path)
    if len(tokens) > vocab:
        raise IntegrityError(f"{path}: {len(tokens)} tokens, and the embedding has {vocab} rows", fix=FIX)
    ids = special_ids(metadata, len(tokens), path)
    try:
        backend = _built(metadata, tokens, ids, path)
    except Exception as error:  # the tokenizers library raises nothing narrower
        if isinstance(error, IntegrityError):
            raise
        raise IntegrityError(f"{path}: its tokenizer can't be built: {error}", fix=FIX) from error
    named = {name: tokens[index] for name, index in ids.items()}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        wrapped.chat_template = template
    wrapped.save_pretrained(dest)
    _name_class(dest / "tokenizer_config.json")


def _name_class(path: Path) -> None:
    """Have tokenizer.json read as it stands, by transformers of any version: classes of families build their own."""
    told = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in told.items() if key not in ("is_local", "local_files_only", "name_or_path")}
    kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _list(metadata: Mapping[str, Any], key: str, kind: type, where: Path) -> tuple[Any, ...]:
    found = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(found, tuple) or not found or not all(type(each) is kind for each in found):
        raise IntegrityError(f"{where} has no list tokenizer.ggml.{key} of {kind.__name__}", fix=FIX)
    return found


def _built(metadata: Mapping[str, Any], tokens: Sequence[str], ids: Mapping[str, int], where: Path) -> Tokenizer:
    from tokenizers import AddedToken

    types = metadata.get("tokenizer.ggml.token_type", ())
    if types and len(types) != len(tokens):
        raise IntegrityError(f"{where}: {len(types)} token types for {len(tokens)} tokens", fix=FIX)
    make = _byte_level if metadata["tokenizer.ggml.model"] == "gpt2" else _sentencepiece
    found = make(metadata, tokens, types, where)
    added = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
    chosen = [(token, added[kind]) for token, kind in zip(tokens, types, strict=False) if kind in added]
    found.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, special in chosen if special]
    )
    found.add_tokens([AddedToken(token, normalized=False) for token, special in chosen if not special])
    _add_ends(found, metadata, tokens, ids)
    return found


def _vocabulary(tokens: Sequence[str], where: Path) -> dict[str, int]:
    found = {token: index for index, token in enumerate(tokens)}
    if len(found) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if found[token] != index)
        raise IntegrityError(f"{where}: token {twice!r} is there twice", fix=FIX)
    return found


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], where: Path) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    merges = [tuple(merge.split(" ")) for merge in _list(metadata, "merges", str, where)]
    odd = next((merge for merge in merges if len(merge) != 2), None)
    if odd is not None:
        raise IntegrityError(f"{where}: merge {' '.join(odd)!r} isn't two tokens", fix=FIX)
    cut = metadata.get("tokenizer.ggml.pre", "default")
    model: Any = BPE(_vocabulary(tokens, where), merges, ignore_merges=cut in gguf_cuts.WHOLE_WORDS)
    found = Tokenizer(model)
    level = pre_tokenizers.ByteLevel
    made: dict[str, Any] = {
        gguf_cuts.DIGITS: pre_tokenizers.Digits(individual_digits=True),
        gguf_cuts.BYTES: level(add_prefix_space=False, use_regex=False),
        gguf_cuts.BYTES_CUT: level(add_prefix_space=False, use_regex=True),
    }
    steps = [made.get(step) or pre_tokenizers.Split(Regex(step), "isolated") for step in gguf_cuts.STEPS[cut]]
    found.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    found.decoder = decoders.ByteLevel()
    return found


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], where: Path) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    scores = _list(metadata, "scores", float, where)
    if len(scores) != len(tokens) or not all(map(math.isfinite, scores)):
        raise IntegrityError(f"{where}: {len(scores)} finite scores for {len(tokens)} tokens are wanted", fix=FIX)
    vocabulary = _vocabulary(tokens, where)
    unknown = next((token for token, kind in zip(tokens, types, strict=False) if kind == UNKNOWN), None)
    merges = _merges(vocabulary, scores, types)
    model: Any = BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback="<0x0A>" in vocabulary)
    found = Tokenizer(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    before = [normalizers.Prepend(SPACE)] if prefix else []
    found.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    found.decoder = decoders.Sequence(steps)
    return found


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Return which two pieces merge, the best first: every way to make a token of two others, by the token's score."""
    found: list[tuple[float, int, int, int]] = []
    names = list(vocabulary)
    for token, index in vocabulary.items():
        if types and types[index] in (UNKNOWN, CONTROL):
            continue
        ways = []
        for cut in range(1, len(token)):
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None:
                ways.append((-scores[index], index, left, right))
        found += sorted(ways)
    found.sort(key=lambda way: way[0])  # stable: ways to make one token stay in the order of their parts
    return [(names[left], names[right]) for _, _, left, right in found]


def _add_ends(found: Tokenizer, metadata: Mapping[str, Any], tokens: Sequence[str], ids: Mapping[str, int]) -> None:
    """Have begin and end tokens added where the file says so, or llama.cpp adds them by itself."""
    from tokenizers.processors import TemplateProcessing

    kind, cut = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre", "default")
    begins = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or cut in gguf_cuts.BEGIN)
    ends = metadata.get("tokenizer.ggml.add_eos_token", False)
    chosen = {name: ids[name] for name, added in (("bos_token", begins), ("eos_token", ends)) if added and name in ids}
    if not chosen:
        return
    first, last = ([tokens[chosen[name]]] if name in chosen else [] for name in ("bos_token", "eos_token"))
    second = [f"{token}:1" for token in (*first, "$B", *last)]
    found.post_processor = TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *second],
        special_tokens=[(tokens[index], index) for index in sorted(set(chosen.values()))],
    )
