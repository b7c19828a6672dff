"""Kinds of attention, what a token leaves, which kernel runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from optikit.targets import attention, rows
from tests.rules import stacks

MODEL = stacks.facts({})


@pytest.mark.parametrize(
    ("changes", "kind"), [({}, "GQA"), ({"kv_heads": 32}, "MHA"), ({"kv_heads": 1}, "MQA"), ({"cached": 576}, "MLA")]
)
def test_kinds(changes, kind):
    assert attention.kind(replace(MODEL, **changes)) == kind


def test_a_line_says_what_a_token_leaves():
    assert attention.told(MODEL) == "GQA, 32 query and 8 key-value heads of 128, 128 KiB of 16-bit cache a token"
    windowed = replace(MODEL, kv_heads=32, sliding_window=4096)
    assert attention.told(windowed).endswith("512 KiB of 16-bit cache a token, window of 4096 tokens")


def test_old_gpus_and_odd_heads_take_another_kernel():
    assert attention.used("vllm", MODEL, rows()["l4"]) == "FlashAttention over a paged cache"
    assert "not below compute capability 8.0" in attention.used("vllm", MODEL, rows()["t4"])
    assert "not for heads of 260 channels" in attention.used("vllm", replace(MODEL, head_dim=260), rows()["l4"])
    assert attention.used("vllm", MODEL, rows()["inf2.xlarge"]) == ""
    assert "not first on compute capability 10.0" in attention.used("vllm", MODEL, rows()["b200"])
    assert "not for heads of 72 channels" in attention.used("vllm", replace(MODEL, head_dim=72), rows()["cpu"])
    assert attention.used("vllm", replace(MODEL, cached=576), rows()["l4"]) == ""
