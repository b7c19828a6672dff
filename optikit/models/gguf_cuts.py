"""llama.cpp's names for how a text is cut before it is tokenized, and the steps of each, for writing and for reading.

A gguf file has no patterns, only a name that stands for some in llama.cpp's code. The steps here are those that the
models' own tokenizer.json has: `digits` takes digits apart, `bytes` spells bytes as letters, `bytes, cut` first cuts as
GPT-2 does, and everything else is a pattern whose matches stand alone.

Source: src/llama-vocab.cpp of llama.cpp, which quotes the original patterns.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

DIGITS, BYTES, BYTES_CUT = "digits", "bytes", "bytes, cut"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = QWEN2.replace(r"?\p{L}+|", r"?[\p{L}\p{M}]+|").replace(r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+")
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_SOFT = r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
TEKKEN = f"{_LOWER}|{_UPPER}{_SOFT}"
GPT4O = f"{_LOWER}{_SHORT}|{_UPPER}{_SHORT}{_SOFT}".replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_HAN = "[一-龥぀-ゟ\u30a0-ヿ]+"
_KINDS: Mapping[tuple[str, ...], str] = {
    (BYTES_CUT,): "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum modern-bert jina-v1-en"
    " jina-v2-code roberta-bpe mpt olmo jais trillion granite-docling exaone4 default",
    (DIGITS, BYTES_CUT): "smollm starcoder refact command-r codeshell exaone minerva-7b",
    (QWEN2, BYTES): "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 hunyuan megrez grok-2",
    (QWEN35, BYTES): "qwen35",
    (LLAMA3, BYTES): "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe"
    " chatglm-bpe glm4 glm5",
    (TEKKEN, BYTES): "tekken",
    (GPT4O, BYTES): "gpt-4o llama4 kanana2 talkie minimax-m2",
    ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", DIGITS, BYTES): "deepseek-coder",
    (r"\p{N}{1,3}", _HAN, _DEEPSEEK3, BYTES): "deepseek-v3 hunyuan-dense joyai-llm",
    (r"[\p{P}\$\+<=>\^~\|`]+", BYTES_CUT, "[0-9][0-9][0-9]"): "falcon",
}
STEPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {name: steps for steps, names in _KINDS.items() for name in names.split()}
)
"""Name → steps; `default` is what files have whose converter knew no better."""
NAMES: Mapping[tuple[str, ...], str] = MappingProxyType({steps: names.split()[0] for steps, names in _KINDS.items()})
"""Steps → the name that is written."""
_LLAMA3_KIND = frozenset(
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano")
)
WHOLE_WORDS = _LLAMA3_KIND | {"glm4", "glm5", "tekken"}
"""Names with which a word that is a token is one, whatever merges make of it."""
BEGIN = _LLAMA3_KIND | {"tekken"}
"""Names with which a text begins with the begin token where the file doesn't say."""
