"""The bitsandbytes checkpoint format for NF4: 4-bit codes of quantiles, a constant per block of 64 weights.

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


def unpack(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Return the codes (out · in,) uint8, constants (blocks,) float32, and (out, in) of one linear.

    Raises:
        IntegrityError: It is packed in other blocks, or for other levels, than are known here.
    """
    state = json.loads(bytes(tensors[NF4_STATE].tolist()))
    rows, columns = state["shape"]
    packed = tensors["weight"].view(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: rows * columns]
    _require(state, "blocksize", nf4.BLOCK)
    _require_map(tensors["weight.quant_map"], torch.tensor(nf4.LEVELS))
    absmax = tensors["weight.absmax"]
    if "weight.nested_absmax" in tensors:
        _require(state, "nested_blocksize", nf4.CONSTANTS_BLOCK)
        _require_map(tensors["weight.nested_quant_map"], nf4.dynamic_map())
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
        absmax = nf4.dequantize_constants(nf4.Constants(absmax, tensors["weight.nested_absmax"], offset))
    return codes, absmax.float(), (rows, columns)


def _require(state: Mapping[str, Any], key: str, wanted: int) -> None:
    if state.get(key) != wanted:
        raise IntegrityError(f"nf4 with {key} {state.get(key)!r}", fix=f"quantize with {key} {wanted}")


def _require_map(found: Tensor, wanted: Tensor) -> None:
    if not torch.allclose(found, wanted, atol=1e-6):
        raise IntegrityError("nf4 with a map of its own", fix="quantize with the levels of bitsandbytes")


def dequantize(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the weight (out, in) float32 of one linear; see `unpack` for errors."""
    codes, absmax, shape = unpack(tensors)
    return nf4.dequantize(codes, absmax).view(shape)
