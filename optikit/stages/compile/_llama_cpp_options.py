"""Options of `compile: {engine: llama-cpp}`, and what follows from them when planning."""

from __future__ import annotations

from typing import Literal

from optikit.models import traits
from optikit.models.facts import ModelFacts
from optikit.stage import StageOptions

Kind = Literal["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0"]
BITS = {"F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5, "Q5_0": 5.5, "Q4_1": 5.0, "Q4_0": 4.5}
"""Bits per weight of ggml's types, scales counted."""
STORED: dict[str, Kind] = {"F32": "F32", "F16": "F16"}
BLOCK = 32


class Options(StageOptions):
    """Options of `compile: {engine: llama-cpp}`."""

    dense: Literal["auto", "f32", "f16", "bf16", "q8_0", "q5_0", "q4_0"] = "auto"
    """Weights that no block of ggml stands for exactly: `auto` keeps the dtype of dense ones, and rounds packed ones
    that ggml has no blocks for to q8_0."""
    table: Literal["auto", "f32", "f16", "bf16", "q8_0", "q5_0", "q4_0"] = "auto"
    """Embedding and output head: `auto` is q8_0 where the blocks are quantized, else as `dense`."""
    pre_tokenizer: str = ""
    """llama.cpp's name for how text is cut before it is tokenized; "" finds it by the tokenizer's own patterns."""


def dense_kind(options: Options, facts: ModelFacts) -> Kind:
    """Return the type of matrices without exact blocks."""
    if options.dense != "auto":
        return _named(options.dense)
    return "Q8_0" if traits.bits(facts.traits) else STORED.get(facts.dtype, "BF16")


def table_kind(options: Options, facts: ModelFacts) -> Kind:
    """Return the type of embedding and head; rows that no block divides are F16."""
    if options.table != "auto":
        kind = _named(options.table)
    else:
        kind = "Q8_0" if traits.bits(facts.traits) else dense_kind(options, facts)
    return fitting(kind, facts.hidden)


def fitting(kind: Kind, columns: int) -> Kind:
    """Return a type that rows of so many weights can have."""
    return "F16" if kind.startswith("Q") and columns % BLOCK else kind


def _named(word: str) -> Kind:
    kinds: dict[str, Kind] = {
        "f32": "F32",
        "f16": "F16",
        "bf16": "BF16",
        "q8_0": "Q8_0",
        "q5_0": "Q5_0",
        "q4_0": "Q4_0",
    }
    return kinds[word]
