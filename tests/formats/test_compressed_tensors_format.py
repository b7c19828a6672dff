"""The int-quantized packing against its description, element by element."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.errors import StageFailedError
from optikit.formats import compressed_tensors, gptq


@given(rows=st.integers(1, 5), columns=st.integers(1, 7), seed=st.integers(0, 2**16))
@settings(max_examples=50)
def test_dequantizing_is_code_times_row_scale(rows, columns, seed):
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (rows, columns), generator=draw).to(torch.int8)
    scales = torch.rand(rows, generator=draw).bfloat16()
    packed = compressed_tensors.pack(codes, scales)
    assert packed["weight"].dtype == torch.int8
    assert packed["weight_scale"].shape == (rows, 1)
    weight = compressed_tensors.dequantize(packed)
    for row in range(rows):
        for column in range(columns):
            assert weight[row, column] == codes[row, column].item() * scales[row].float()


@given(
    rows=st.sampled_from([8, 24]),
    groups=st.integers(1, 3),
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40)
def test_pack_quantized_repacked_as_gptq_stands_for_the_same_weights(rows, groups, bits, dtype, seed):
    draw = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (rows, 32 * groups), generator=draw)
    scales = (torch.rand(rows, groups, generator=draw) / 50 + 1e-4).to(dtype)
    words = torch.zeros(rows, 32 * groups * bits // 32, dtype=torch.int64)
    for column in range(codes.shape[1]):  # as the format's description has it, one code after the other
        words[:, column * bits // 32] |= (codes[:, column] + half) << (column * bits % 32)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    tensors = compressed_tensors.as_gptq(words, scales, bits)
    weight = gptq.dequantize(*gptq.unpack(tensors, bits), tensors["g_idx"])
    assert torch.equal(weight, codes.float() * scales.float().repeat_interleave(32, dim=1))


def test_a_scale_without_an_exact_float16_is_refused():
    words, scales = torch.zeros(8, 4, dtype=torch.int32), torch.full((8, 1), 1e-30, dtype=torch.bfloat16)
    with pytest.raises(StageFailedError, match="no exact float16"):
        compressed_tensors.as_gptq(words, scales, 4)
