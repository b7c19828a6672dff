"""Packings strip by strip: the same tensors as of the whole linear, and the same weights back."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.algorithms import rtn
from optikit.algorithms.grid import Grid, dequantize
from optikit.calibration.methods.fp8 import by_block, by_channel
from optikit.errors import IntegrityError
from optikit.formats import packing
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
