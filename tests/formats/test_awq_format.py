"""The awq gemm packing against an unpacker that knows only the format's description."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.formats import awq


def slow_unpack(words: torch.Tensor) -> list[list[int]]:
    """(rows, out / 8) int32 → rows × out, nibble by nibble in Python integers."""
    unpacked = []
    for row in words.tolist():
        values = [0] * (8 * len(row))
        for c, word in enumerate(row):
            for nibble, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                values[8 * c + column] = (word >> (4 * nibble)) & 15
        unpacked.append(values)
    return unpacked


@given(outputs=st.integers(1, 4), inputs=st.integers(1, 9), groups=st.integers(1, 3), seed=st.integers(0, 2**16))
@settings(max_examples=50)
def test_packing_agrees_with_the_format_and_comes_back(outputs, inputs, groups, seed):
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (8 * outputs, inputs * groups), generator=draw, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (8 * outputs, groups), generator=draw, dtype=torch.uint8)
    scales = torch.rand(8 * outputs, groups, generator=draw).half()
    packed = awq.pack(codes, scales, zeros)
    assert packed["qweight"].dtype == packed["qzeros"].dtype == torch.int32
    assert packed["qweight"].shape == (inputs * groups, outputs)
    assert slow_unpack(packed["qweight"]) == codes.T.tolist()
    assert slow_unpack(packed["qzeros"]) == zeros.T.tolist()
    assert torch.equal(packed["scales"], scales.T)
    for found, expected in zip(awq.unpack(packed), (codes, scales, zeros), strict=True):
        assert torch.equal(found, expected)


def test_one_known_word():
    # AutoAWQ's pack: `order_map = [0, 2, 4, 6, 1, 3, 5, 7]; word |= column[order_map[i]] << (i * 4)`.
    codes = torch.arange(8, dtype=torch.uint8).reshape(8, 1)
    word = awq.pack(codes, torch.ones(8, 1).half(), codes)["qweight"]
    assert word.item() == 0x7531_6420
