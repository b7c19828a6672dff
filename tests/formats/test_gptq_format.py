"""The gptq packing against an independent, slow unpacker, in both directions."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.algorithms.grid import dequantize as grid_dequantize
from optikit.formats import gptq


def slow_unpack(tensors, bits, shape, groups):
    """As AutoGPTQ documents it: walk over every code, take its word, shift, mask; zeros are stored minus one."""
    rows, columns = shape
    per_word, mask = 32 // bits, (1 << bits) - 1
    words, zero_words = tensors["qweight"].tolist(), tensors["qzeros"].tolist()
    codes = [[(words[i // per_word][o] >> (bits * (i % per_word))) & mask for i in range(columns)] for o in range(rows)]
    zeros = [
        [((zero_words[g][o // per_word] >> (bits * (o % per_word))) & mask) + 1 for g in range(groups)]
        for o in range(rows)
    ]
    return codes, zeros


@st.composite
def packed_layers(draw):
    bits = draw(st.sampled_from([4, 8]))
    per_word = 32 // bits
    rows, groups = draw(st.integers(1, 3)) * per_word, draw(st.integers(1, 3))
    columns = groups * per_word * draw(st.integers(1, 2))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    most = 2**bits - 1
    codes = torch.randint(0, most + 1, (rows, columns), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(1, most + 1, (rows, groups), generator=generator, dtype=torch.uint8)
    scales = (torch.randn(rows, groups, generator=generator) * 0.01).half()
    return bits, codes, scales, zeros


@settings(max_examples=40)
@given(packed_layers())
def test_packing_is_what_the_slow_unpacker_reads(layer):
    bits, codes, scales, zeros = layer
    rows, columns = codes.shape
    tensors = gptq.pack(codes, scales, zeros, bits)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "qweight": (torch.int32, (columns * bits // 32, rows)),
        "qzeros": (torch.int32, (scales.shape[1], rows * bits // 32)),
        "scales": (torch.float16, (scales.shape[1], rows)),
        "g_idx": (torch.int32, (columns,)),
    }
    slow_codes, slow_zeros = slow_unpack(tensors, bits, codes.shape, scales.shape[1])
    assert slow_codes == codes.tolist()
    assert slow_zeros == zeros.tolist()
    size = columns // scales.shape[1]
    assert tensors["g_idx"].tolist() == [i // size for i in range(columns)]


@settings(max_examples=40)
@given(packed_layers())
def test_unpacking_undoes_packing(layer):
    bits, codes, scales, zeros = layer
    back = gptq.unpack(gptq.pack(codes, scales, zeros, bits), bits)
    for got, expected in zip(back, (codes, scales, zeros), strict=True):
        assert torch.equal(got, expected)


@settings(max_examples=20)
@given(packed_layers())
def test_dequantized_weights_are_those_that_were_chosen(layer):
    bits, codes, scales, zeros = layer
    tensors = gptq.pack(codes, scales, zeros, bits)
    chosen = grid_dequantize(codes, scales, zeros)
    assert torch.equal(gptq.dequantize(*gptq.unpack(tensors, bits)), chosen)
    assert torch.equal(gptq.dequantize(*gptq.unpack(tensors, bits), tensors["g_idx"]), chosen)


def test_a_group_index_in_any_order_is_followed():
    codes = torch.arange(16, dtype=torch.uint8).reshape(1, 16).repeat(8, 1)
    scales = torch.tensor([[1.0, 2.0]]).half().repeat(8, 1)
    zeros = torch.tensor([[1, 3]], dtype=torch.uint8).repeat(8, 1)
    g_idx = torch.tensor([0, 1] * 8)
    new = gptq.dequantize(codes, scales, zeros, g_idx)
    assert new[0, :4].tolist() == [-1.0, -4.0, 1.0, 0.0]


def test_the_highest_code_reaches_the_sign_bit():
    codes = torch.full((8, 8), 15, dtype=torch.uint8)
    packed = gptq.pack_words(codes, 4)
    assert packed.unique().tolist() == [-1]
    assert torch.equal(gptq.unpack_words(packed, 4), codes)
