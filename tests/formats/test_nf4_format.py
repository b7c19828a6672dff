"""The NF4 packing against bitsandbytes' own, bit for bit, and against itself."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optikit.algorithms import nf4 as arithmetic
from optikit.errors import IntegrityError
from optikit.formats import nf4
from optikit.models.quantization import NF4_STATE


def packed(weight: torch.Tensor, *, double: bool) -> dict[str, torch.Tensor]:
    codes, absmax = arithmetic.quantize(weight)
    constants = arithmetic.quantize_constants(absmax) if double else absmax
    return nf4.pack(codes, constants, (weight.shape[0], weight.shape[1]), str(weight.dtype).removeprefix("torch."))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_bitsandbytes_packs_the_same_bits(dtype, double):
    from bitsandbytes import functional

    weight = torch.randn(96, 512, generator=torch.Generator().manual_seed(3))
    weight[5, 64:128] = 0
    weight = weight.to(dtype)
    data, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    theirs = {"weight": data, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
    ours = packed(weight, double=double)
    assert ours.keys() == theirs.keys()
    for suffix in ours.keys() - ({"weight.absmax"} if double else set()):
        assert ours[suffix].dtype == theirs[suffix].dtype, suffix
        assert torch.equal(ours[suffix], theirs[suffix]), suffix
    exact = arithmetic.quantize(weight)[1]
    mine, other = nf4.unpack(ours)[1], nf4.unpack(theirs)[1]
    assert ((mine - exact).abs() <= (other - exact).abs() + 1e-7).all()
    assert (mine != other).float().mean() < 0.01


@given(st.integers(1, 9), st.integers(1, 70), st.booleans(), st.integers(0, 2**31))
def test_what_is_packed_is_unpacked(rows, columns, double, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    codes, absmax = arithmetic.quantize(weight)
    found, constants, state = nf4.unpack(packed(weight, double=double))
    assert state["shape"] == [rows, columns]
    assert torch.equal(found, codes)
    if not double:
        assert torch.equal(constants, absmax)
    assert nf4.dequantize(packed(weight, double=double)).shape == weight.shape


def test_a_byte_holds_two_codes_the_first_above():
    codes = torch.arange(16, dtype=torch.uint8).repeat(4)
    tensors = nf4.pack(codes, torch.ones(1), (1, 64), "float32")
    assert tensors["weight"].shape == (32, 1)
    assert [hex(byte) for byte in tensors["weight"][:3, 0].tolist()] == ["0x1", "0x23", "0x45"]


@pytest.mark.parametrize(("key", "value"), [("blocksize", 128), ("nested_blocksize", 4), ("blocksize", 0)])
def test_blocks_that_do_not_go_with_the_constants_are_refused(key, value):
    tensors = packed(torch.randn(8, 64), double=True)
    state = json.loads(bytes(tensors[NF4_STATE].tolist())) | {key: value}
    tensors[NF4_STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(IntegrityError, match=f"{key} {value}"):
        nf4.dequantize(tensors)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bitsandbytes_reads_the_same_weights(kind, double, blocksize, dtype):
    from bitsandbytes import functional

    weight = torch.randn(96, 512, generator=torch.Generator().manual_seed(5)).to(dtype)
    data, state = functional.quantize_4bit(weight, blocksize=blocksize, compress_statistics=double, quant_type=kind)
    tensors = {"weight": data, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
    assert torch.equal(nf4.dequantize(tensors).to(dtype), functional.dequantize_4bit(data, state))


def test_a_map_of_another_size_is_refused():
    tensors = packed(torch.randn(8, 64), double=False)
    tensors["weight.quant_map"] = tensors["weight.quant_map"][:8]
    with pytest.raises(IntegrityError, match="map"):
        nf4.unpack(tensors)
