"""The int-quantized packing against its description, element by element."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.formats import compressed_tensors


@given(rows=st.integers(1, 5), columns=st.integers(1, 7), seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=50)
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
