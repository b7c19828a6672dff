"""Packings strip by strip: the same tensors as of the whole linear, and the same weights back."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.algorithms import int8, nf4, rtn
from optikit.algorithms.grid import Grid, dequantize
from optikit.calibration.methods.fp8 import by_block, by_channel
from optikit.errors import IntegrityError
from optikit.formats import llm_int8, packing
from optikit.formats import nf4 as nf4_format
from optikit.formats.packing import FP8_BLOCK, STRIP_ROWS, float_quantized, integers

FORMS = [("gptq", 4, True), ("gptq", 8, False), ("awq", 4, False), ("pack-quantized", 4, True),
         ("pack-quantized", 4, False), ("pack-quantized", 8, True), ("pack-quantized", 8, False)]  # fmt: skip


def same(one, other):
    assert one.keys() == other.keys()
    for suffix, tensor in one.items():
        left, right = (
            each.view(torch.uint8) if each.dtype == packing.E4M3 else each for each in (tensor, other[suffix])
        )
        assert tensor.dtype == other[suffix].dtype
        assert torch.equal(left, right), suffix


def strips(rows):
    return [(start, min(start + STRIP_ROWS, rows)) for start in range(0, rows, STRIP_ROWS)]


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(FORMS), st.integers(1, 40), st.sampled_from([32, 64, -1]), st.integers(0, 2**31))
def test_integer_codes_of_strips_are_those_of_the_whole(form, eights, group_size, seed):
    name, bits, sym = form
    rows, grid = 8 * eights, Grid(bits=bits, group_size=group_size, sym=sym)
    weight = torch.randn((rows, 64), generator=torch.Generator().manual_seed(seed))
    packed = integers(name, bits, sym=sym)
    quantized = rtn.quantize(weight, grid)
    whole = packed.pack(*quantized)
    same(packed.joined([packed.pack(*rtn.quantize(weight[a:b], grid)) for a, b in strips(rows)], rows), whole)
    assert {suffix: tensor.dtype for suffix, tensor in whole.items()} == dict(packed.dtypes)
    back = dequantize(*quantized)
    assert torch.equal(packed.dequantize(whole), back)
    for a, b in strips(rows):
        part = packed.strip(whole, a, b)
        assert torch.equal(packed.dequantize(part), back[a:b])
        assert packing.off_grid(packed, grid, part, weight[a:b]) == ""
    assert all(torch.equal(x, y) for x, y in zip(packed.unpack(whole), quantized, strict=True))


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**31))
def test_fp8_of_strips_is_that_of_the_whole(rows, seed):
    weight = torch.randn((rows, 256), generator=torch.Generator().manual_seed(seed))
    channel = partial(by_channel, dtype=torch.bfloat16, largest=448.0, search=True)
    block = partial(by_block, largest=448.0, search=False)
    for packed, rounds in ((float_quantized(torch.bfloat16), channel), (FP8_BLOCK, block)):
        whole = rounds(weight)
        same(packed.joined([rounds(weight[a:b]) for a, b in strips(rows)], rows), whole)
        for a, b in strips(rows):
            part = packed.strip(whole, a, b)
            new = packed.dequantize(part)
            assert torch.equal(new, packed.dequantize(whole)[a:b])
            assert packed.bound is not None
            assert bool(((new - weight[a:b]).abs() <= packed.bound(weight[a:b], part)).all())


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 300), st.sampled_from([64, 192, 100]), st.booleans(), st.integers(0, 2**31))
def test_bitsandbytes_of_strips_is_that_of_the_whole(rows, width, double, seed):
    """100 inputs: blocks run from one output into the next, and the last is short."""
    weight = torch.randn((rows, width), generator=torch.Generator().manual_seed(seed))
    codes, absmax = nf4.quantize(weight)
    constants = nf4.quantize_constants(absmax) if double else absmax
    four = [nf4_format.pack(*nf4.quantize(weight[a:b]), (b - a, width), "bfloat16") for a, b in strips(rows)]
    eight = [llm_int8.pack(int8.quantize(weight[a:b], s), s) for a, b in strips(rows) for s in [scales(weight[a:b])]]
    for packed, whole, parts in (
        (packing.nf4_blocks(double_quant=double), nf4_format.pack(codes, constants, (rows, width), "bfloat16"), four),
        (packing.LLM_INT8, llm_int8.pack(int8.quantize(weight, scales(weight)), scales(weight)), eight),
    ):
        same(packed.joined(parts, rows), whole)
        assert {suffix: tensor.dtype for suffix, tensor in whole.items()} == dict(packed.dtypes)
        for a, b in strips(rows):
            part = packed.strip(whole, a, b)
            new = packed.dequantize(part)
            assert torch.equal(new, packed.dequantize(whole)[a:b])
            assert bool(((new - weight[a:b]).abs() <= packed.bound(weight[a:b], part)).all())


def scales(weight):
    return int8.scales_of(weight)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 300), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_dense_weight_of_strips_is_the_whole(rows, transposed, dtype):
    weight = torch.randn((rows, 48), generator=torch.Generator().manual_seed(rows))
    packed = packing.dense(dtype, transposed=transposed)
    joined = packed.joined(({"weight": weight[a:b]} for a, b in strips(rows)), rows)
    same(joined, {"weight": (weight.T if transposed else weight).to(dtype)})
    for a, b in strips(rows):
        assert torch.equal(packed.dequantize(packed.strip(joined, a, b)), weight[a:b].to(dtype).float())


def test_the_bound_of_nf4_notices_a_code_two_further():
    weight = torch.randn((64, 64), generator=torch.Generator().manual_seed(0))
    packed = packing.nf4_blocks(double_quant=True)
    codes, absmax = nf4.quantize(weight)
    found = 0
    for place in range(0, 4096, 64):
        moved = codes.clone()
        moved[place] = moved[place] + 4 if moved[place] < 8 else moved[place] - 4
        tensors = nf4_format.pack(moved, nf4.quantize_constants(absmax), (64, 64), "bfloat16")
        off = (packed.dequantize(tensors) - weight).abs() > packed.bound(weight, packed.strip(tensors, 0, 64))
        assert int(off.sum()) == int(off.view(-1)[place])
        found += int(off.sum())
    assert found >= 60


def test_the_bound_notices_one_code_next_to_the_right_one():
    weight = torch.randn((128, 256), generator=torch.Generator().manual_seed(0))
    packed = float_quantized(torch.float32)
    tensors = by_channel(weight, dtype=torch.float32, largest=448.0, search=False)
    bits = tensors["weight"].view(torch.uint8)
    assert packed.bound is not None
    missed = 0
    for row in range(128):
        bits[row, row] ^= 1  # the neighbour whose mantissa differs in the last bit
        off = (packed.dequantize(tensors) - weight).abs() > packed.bound(weight, tensors)
        missed += not bool(off[row, row])
        bits[row, row] ^= 1
    assert missed <= 1  # a neighbour is as good where the weight lies half way


def test_zero_points_off_the_middle_are_not_called_symmetric():
    with pytest.raises(IntegrityError, match="middle"):
        integers("pack-quantized", 4, sym=True).pack(
            torch.zeros((8, 32), dtype=torch.uint8), torch.ones((8, 1)).half(), torch.full((8, 1), 7, dtype=torch.uint8)
        )
