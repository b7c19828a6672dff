"""Weights in 8-bit floats (E4M3), with a scale for all of them, for each output, or for each block, whoever wrote them.

For a linear of `in` inputs and `out` outputs:

    weight              (out, in)   float8_e4m3fn
    weight_scale        () or (1,) or (out, 1), or in blocks               compressed-tensors, ModelOpt, vLLM, FBGEMM
    weight_scale_inv    (ceil(out / rows), ceil(in / columns)), or ()      DeepSeek, Qwen, Mistral

    weight[o, i] · scale[o // rows, i // columns]

The scale is float32, the model's dtype, or an exponent of two in 8 bits. The last blocks may be smaller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optikit.errors import IntegrityError


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int] | None = None) -> Tensor:
    """Return the weight (out, in) float32.

    Args:
        weight: (…, out, in) in a float dtype.
        scale: One, one per output, or one per block.
        block: (rows, columns) of a block; None where scales divide the weight evenly.

    Raises:
        IntegrityError: The scales don't go with the weight.
    """
    rows, columns = weight.shape[-2:]
    factors = as_floats(scale)
    if factors.numel() == 1:
        return weight.float() * factors.view(())
    if factors.dim() == 1 and len(factors) == rows:
        return weight.float() * factors[:, None]
    grid = factors.shape[-2:]
    size = block or (-(-rows // grid[0]), -(-columns // grid[-1]))
    if factors.dim() != weight.dim() or grid != (-(-rows // size[0]), -(-columns // size[1])):
        message = f"scales of shape {tuple(scale.shape)} for a weight of {tuple(weight.shape)} in blocks of {size}"
        raise IntegrityError(message, fix="get the checkpoint again, or quantize the model anew")
    spread = (
        factors if size[1] >= columns and grid[1] == 1 else factors.repeat_interleave(size[1], dim=-1)[..., :columns]
    )
    return weight.float().mul_(spread.repeat_interleave(size[0], dim=-2)[..., :rows, :])


def as_floats(scale: Tensor) -> Tensor:
    """Return scales as float32; bytes are exponents of two, biased by 127, of which 255 is no number."""
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()
