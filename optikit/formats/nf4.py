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
from collections.abc import Mapping
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
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": nf4.BLOCK, "dtype": dtype, "shape": list(shape)}
    tensors = {
        "weight": ((even[::2] << 4) | even[1::2]).unsqueeze(1),
        "weight.quant_map": torch.tensor(nf4.LEVELS),
    }
    if isinstance(absmax, nf4.Constants):
        tensors["weight.absmax"] = absmax.codes
        tensors["weight.nested_absmax"] = absmax.scales
        tensors["weight.nested_quant_map"] = nf4.dynamic_map().clone()
        state |= {"nested_blocksize": nf4.CONSTANTS_BLOCK, "nested_dtype": "float32"}
        state["nested_offset"] = float(absmax.offset)
    else:
        tensors["weight.absmax"] = absmax
    tensors[NF4_STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


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
