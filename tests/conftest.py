"""Fixtures every test may use: tiny real checkpoints, built once per session, no network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def byte_tokenizer(directory: Path) -> None:
    """Write a real byte-level tokenizer of 256 tokens plus <s>, </s>, <pad>: any text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def build_tiny_llama(directory: Path, *, layers: int = 2, hidden: int = 64, intermediate: int = 128) -> Path:
    """Save a seeded random Llama (vocabulary 260, 4 heads, 2 KV heads) as a Hugging Face directory in bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama, hidden 64: treat as read-only."""
    return build_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UTF-8 text of about 40 kB with some structure, for calibration and perplexity."""
    import random

    draw = random.Random(0)
    words = [
        "the",
        "of",
        "stone",
        "river",
        "light",
        "and",
        "a",
        "window",
        "under",
        "green",
        "old",
        "small",
        "house",
        "stands",
        "near",
        "water",
        "bright",
        "cold",
    ]
    lines = [" ".join(draw.choice(words) for _ in range(draw.randint(5, 14))).capitalize() + "." for _ in range(700)]
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
