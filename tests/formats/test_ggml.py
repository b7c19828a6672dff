"""Blocks of ggml against the gguf package's own dequantizer, an independent reader of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.algorithms import grid, rtn
from optikit.formats import ggml, gptq

SCALES = st.floats(-8.0, 8.0, width=16).filter(lambda value: value != 0)


def read_back(grid, kind):
    return dequantize(ggml.pack(grid, kind).numpy(), GGMLQuantizationType[kind])


def meant(grid):
    return gptq.dequantize(*grid).numpy()


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    size=st.sampled_from([32, 64, 128]),
    bits=st.sampled_from([4, 8]),
    sym=st.booleans(),
)
def test_blocks_stand_for_the_grid_s_weights_bit_by_bit(data, rows, groups, size, bits, sym):
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    scales = torch.tensor(
        data.draw(st.lists(SCALES, min_size=rows * groups, max_size=rows * groups)), dtype=torch.float16
    ).reshape(rows, groups)
    codes = torch.from_numpy(draw.integers(0, 2**bits, (rows, groups * size), dtype=np.uint8))
    zeros = torch.from_numpy(draw.integers(0, 2**bits, (rows, groups), dtype=np.uint8))
    zeros = torch.full_like(zeros, 2 ** (bits - 1)) if sym else zeros
    made = ggml.Grid(codes, scales, zeros)
    kind = ggml.exact_type(scales, zeros, bits=bits, columns=groups * size)
    if bits == 8:
        assert kind == ("Q8_0" if (zeros == 128).all() else None)
    else:
        assert kind in ({"Q4_0"} if (zeros == 8).all() else {"Q4_1", "Q5_0"})
    if kind is not None:
        np.testing.assert_array_equal(read_back(made, kind), meant(made))
        codes[0, 17] ^= 1
        assert (read_back(ggml.Grid(codes, scales, zeros), kind) != read_back(made, kind)).sum() <= 1


def test_which_asymmetric_grids_are_q4_1():
    zeros = torch.tensor([[3, 15]], dtype=torch.uint8)
    short, long = torch.tensor([[0.5, 1.25]]), torch.tensor([[0.5, 1 + 2.0**-10]])
    assert ggml.exact_type(short, zeros, bits=4, columns=64) == "Q4_1"
    assert ggml.exact_type(long, zeros, bits=4, columns=64) == "Q5_0"


@pytest.mark.parametrize(
    ("scale", "columns", "bits"), [(1 + 2.0**-12, 64, 4), (1.0, 32, 4), (1.0, 96, 4), (1.0, 64, 2), (1e-9, 64, 4)]
)
def test_what_no_block_stands_for(scale, columns, bits):
    zeros = torch.full((1, 2), 2 ** (bits - 1), dtype=torch.uint8)
    assert ggml.exact_type(torch.full((1, 2), scale), zeros, bits=bits, columns=columns) is None


@pytest.mark.parametrize("sym", [True, False])
def test_grids_of_our_quantizers_are_blocks(sym):
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    made = ggml.Grid(*rtn.quantize(weight, grid.Grid(bits=4, group_size=64, sym=sym)))
    kind = ggml.exact_type(made.scales, made.zeros, bits=4, columns=256)
    assert kind == "Q4_0" if sym else kind in ("Q4_1", "Q5_0")
    np.testing.assert_array_equal(read_back(made, kind), meant(made))


@given(heads=st.integers(1, 5), half=st.integers(1, 6))
def test_rows_of_queries_are_paired_and_nothing_is_lost(heads, half):
    order = ggml.paired(heads * 2 * half, heads).reshape(heads, half, 2)
    for head in range(heads):
        for channel in range(half):
            first = head * 2 * half + channel
            assert order[head, channel].tolist() == [first, first + half]
