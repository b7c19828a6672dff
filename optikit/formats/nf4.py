"""The bitsandbytes checkpoint format for 4 bits: codes of sixteen levels, a constant per block of weights.

NF4 is written here, in blocks of 64; FP4, which has other levels and `__fp4` in a name, and other blocks are read.

For a linear of `in` inputs and `out` outputs, with n = out · in weights, row after row, in b = ceil(n / 64) blocks:

    weight                                  (ceil(n / 2), 1)   uint8     code 2k in the upper half of byte k
    weight.absmax                           (b,)               float32   largest magnitude of each block; or uint8
    weight.quant_map                        (16,)              float32   what the codes stand for
    weight.nested_absmax                    (ceil(b / 256),)   float32   scales of `absmax`, where that is uint8
    weight.nested_quant_map                 (256,)             float32   what its codes stand for
    weight.quant_state.bitsandbytes__nf4    bytes              uint8     JSON: shape, dtype, blocksize, nested_offset

Source: bitsandbytes 0.50, functional.py, QuantState.as_dict(packed=True).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optikit.algorithms import nf4
from optikit.errors import IntegrityError
from optikit.models.quantization import NF4_STATE
from optikit.models.strict_json import parse_object

FIX = "get the checkpoint again, or quantize the model anew"


def pack(codes: Tensor, absmax: Tensor | nf4.Constants, shape: tuple[int, int], dtype: str) -> dict[str, Tensor]:
    """Return the tensors of one linear by suffix.

    Args:
        codes: (out · in,) uint8 in 0 … 15.
        absmax: Constants of the blocks, (blocks,) float32, or what they were quantized to.
        shape: (out, in).
        dtype: What a server computes in, as torch names it: `bfloat16`.
    """
    even = torch.nn.functional.pad(codes, (0, len(codes) % 2), value=nf4.ZERO)
    state = {"quant_type": "nf4", "blocksize": nf4.BLOCK, "dtype": dtype, "shape": list(shape)}
    return _tensors(((even[::2] << 4) | even[1::2]).unsqueeze(1), absmax, state)


def _tensors(codes: Tensor, absmax: Tensor | nf4.Constants, state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of one linear from codes as they are packed, constants, and what is stated of them."""
    tensors = {"weight": codes, "weight.quant_map": torch.tensor(nf4.LEVELS)}
    if isinstance(absmax, nf4.Constants):
        tensors["weight.absmax"] = absmax.codes
        tensors["weight.nested_absmax"] = absmax.scales
        tensors["weight.nested_quant_map"] = nf4.dynamic_map().clone()
        state = {**state, "nested_blocksize": nf4.CONSTANTS_BLOCK, "nested_dtype": "float32"}
        state["nested_offset"] = float(absmax.offset)
    else:
        tensors["weight.absmax"] = absmax
    return {**tensors, NF4_STATE: _told(state)}


def _told(state: Mapping[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def unpack(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return the codes (out · in,) uint8, constants (blocks,) float32, and the stated shape and block size.

    Raises:
        IntegrityError: The statement is no such thing, or a level isn't one of 4 bits.
    """
    name = next(name for name in tensors if ".quant_state." in name)
    state = parse_object(bytes(tensors[name].tolist()))
    rows, columns = state["shape"]
    packed = tensors["weight"].view(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: rows * columns]
    absmax = tensors["weight.absmax"]
    if "weight.nested_absmax" in tensors:
        spread = _spread(tensors["weight.nested_absmax"], state, "nested_blocksize", len(absmax))
        absmax = tensors["weight.nested_quant_map"][absmax.int()] * spread + torch.tensor(state["nested_offset"])
    if tensors["weight.quant_map"].shape != (16,):
        raise IntegrityError(f"a map of {tensors['weight.quant_map'].numel()} levels", fix=FIX)
    return codes, absmax.float(), state


def outputs(tensors: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """Return the tensors of outputs `start` to `stop` of a linear, their constants in float32.

    Blocks of constants begin with `start`: it is a multiple of 64, or the width is.
    """
    state = parse_object(bytes(tensors[NF4_STATE].tolist()))
    width, size = state["shape"][1], state["blocksize"]
    first, last = start * width, stop * width
    blocks = slice(first // size, -(-last // size))
    absmax = tensors["weight.absmax"][blocks]
    if "weight.nested_absmax" in tensors:
        number = torch.arange(blocks.start, blocks.start + len(absmax)) // state["nested_blocksize"]
        spread = tensors["weight.nested_absmax"][number]
        absmax = tensors["weight.nested_quant_map"][absmax.int()] * spread + torch.tensor(state["nested_offset"])
    told = {key: value for key, value in state.items() if not key.startswith("nested")}
    return {
        "weight": tensors["weight"][first // 2 : -(-last // 2)],
        "weight.absmax": absmax,
        "weight.quant_map": tensors["weight.quant_map"],
        NF4_STATE: _told({**told, "shape": [stop - start, width]}),
    }


def joined(strips: Sequence[Mapping[str, Tensor]], rows: int, *, double_quant: bool) -> dict[str, Tensor]:
    """Return the tensors of a linear of so many outputs from those of its strips, as `outputs` cuts them."""
    state = parse_object(bytes(strips[0][NF4_STATE].tolist()))
    codes, absmax = (torch.cat([strip[suffix] for strip in strips]) for suffix in ("weight", "weight.absmax"))
    constants = nf4.quantize_constants(absmax) if double_quant else absmax
    return _tensors(codes, constants, {**state, "shape": [rows, state["shape"][1]]})


def bound(weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return how far each weight of some outputs (out, in) may be off: half a gap, and what its constant is off."""
    flat = torch.nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % nf4.BLOCK))
    largest, stored = flat.view(-1, nf4.BLOCK).abs().amax(dim=1), tensors["weight.absmax"]
    off = largest * nf4.HALF_GAP + (stored - largest).abs()
    return off.mul_(1.0001).repeat_interleave(nf4.BLOCK)[: weight.numel()].view_as(weight)


def _spread(constants: Tensor, state: Mapping[str, Any], key: str, count: int) -> Tensor:
    """Return the constant of each of `count` elements, in blocks of the size that `state` has under a key."""
    size = state.get(key)
    if type(size) is not int or size < 1 or len(constants) != -(-count // size):
        raise IntegrityError(f"{len(constants)} constants for {count} elements, with {key} {size!r}", fix=FIX)
    return constants.repeat_interleave(size)[:count]


def dequantize(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the weight (out, in) float32 of one linear; see `unpack` for errors."""
    codes, absmax, state = unpack(tensors)
    spread = _spread(absmax, state, "blocksize", len(codes))
    weight: Tensor = (tensors["weight.quant_map"].float()[codes.int()] * spread).view(state["shape"])
    return weight
