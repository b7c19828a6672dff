"""Weights in 4-bit floats (E2M1), two to a byte, the first in the lower half: NVFP4 and MXFP4.

For a linear of `in` inputs and `out` outputs:

    codes     (out, in / 2)    uint8          `weight_packed` of compressed-tensors, `weight` of ModelOpt
    scales    (out, in / 16)   float8_e4m3fn  NVFP4: `weight_scale`
              (out, in / 32)   uint8          MXFP4: exponents of two, biased by 127
    global    () or (1,)       float32        NVFP4: divides in compressed-tensors, `weight_global_scale`; multiplies in
                                              ModelOpt, `weight_scale_2`

    weight[o, i] = LEVELS[code[o, i]] · scale[o, i // group] · global

gpt-oss has the linears of all experts in one: codes (experts, out, in / 32, 16), scales (experts, out, in / 32), and
reads the weight as (experts, in, out). Source: OCP Microscaling Formats 1.0, section 5.3.3, and transformers 5.24,
integrations/mxfp4.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optikit.algorithms.fp4 import LEVELS
from optikit.errors import IntegrityError
from optikit.formats.fp8 import as_floats


def pack(codes: Tensor) -> Tensor:
    """Return codes (…, 2 · n) uint8, two to a byte, the first in the lower half: (…, n) uint8."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """Return the values of codes, two to a byte: (…, n) uint8 → (…, 2 · n) float32."""
    levels = torch.tensor([*LEVELS, *(-level for level in LEVELS)])
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return levels[codes.int()]


def dequantize(packed: Tensor, scales: Tensor) -> Tensor:
    """Return the weight (…, out, in) float32.

    Args:
        packed: (…, out, in / 2) uint8.
        scales: (…, out, groups) in a float dtype, with what is global in them, or uint8 exponents.

    Raises:
        IntegrityError: The scales don't go with the codes.
    """
    if scales.shape[:-1] != packed.shape[:-1] or not scales.shape[-1] or 2 * packed.shape[-1] % scales.shape[-1]:
        message = f"scales of shape {tuple(scales.shape)} for 4-bit codes of {tuple(packed.shape)} bytes"
        raise IntegrityError(message, fix="get the checkpoint again, or quantize the model anew")
    values = unpack(packed).view(*scales.shape, -1)
    return values.mul_(as_floats(scales).unsqueeze(-1)).flatten(-2)


def dequantize_experts(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the weights of all experts, (experts, in, out) float32, from (experts, out, groups, 16)."""
    return dequantize(blocks.flatten(-2), scales).transpose(-1, -2).contiguous()
