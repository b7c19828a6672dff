"""The `compressed-tensors` checkpoint format in integers: INT8 for kernels that round activations too, and packed.

`int-quantized`, for a linear of `in` inputs and `out` outputs:

    weight        (out, in)  int8
    weight_scale  (out, 1)   the model's float dtype

    output[t, o] = weight_scale[o] · Δ[t] · Σ_i weight[o, i] · code[t, i]

where the server rounds each token's inputs to int8 codes with Δ[t] = max_i |x[t, i]| / 127 as they come. vLLM runs it;
transformers dequantizes it with the compressed-tensors package.

`pack-quantized`, in 1 to 8 bits, codes in one stream along the inputs, lowest bits first, 2^(bits - 1) for zero:

    weight_packed      (out, ceil(in · bits / 32))      int32
    weight_scale       (out, groups)                    the model's float dtype
    weight_zero_point  (ceil(out · bits / 32), groups)  int32    packed along the outputs; where it isn't symmetric
    weight_g_idx       (in,)                            int32    group of each input; where groups are out of order
    weight_shape       (2,)                             int64    (out, in)

Source: compressed-tensors 0.20, compressors/pack_quantized/helpers.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from optikit.errors import IntegrityError, StageFailedError
from optikit.formats import fp8, gptq


def pack(codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """Return the tensors of one linear by suffix: codes (out, in) int8, scales (out, 1) in a float dtype."""
    return {"weight": codes.to(torch.int8).contiguous(), "weight_scale": scales.reshape(-1, 1).contiguous()}


def dequantize(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the weight (out, in) float32 of one `int-quantized` linear.

    Raises:
        IntegrityError: The scales don't go with the weight.
    """
    codes, zeros = tensors["weight"].float(), tensors.get("weight_zero_point")
    if zeros is not None and zeros.any():
        codes -= zeros.float().reshape(-1, 1) if zeros.numel() == len(codes) else zeros.float()
    return fp8.dequantize(codes, tensors["weight_scale"])


def dequantize_packed(tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """Return the weight (out, in) float32 of one `pack-quantized` linear.

    Raises:
        IntegrityError: Its shape isn't that of its codes.
    """
    codes = gptq.unpack_words(tensors["weight_packed"].T.contiguous(), bits).T
    scales = tensors["weight_scale"].reshape(len(codes), -1)
    rows, width = tensors["weight_shape"].tolist()
    if rows != len(codes) or not codes.shape[1] - 32 < width <= codes.shape[1]:
        message = f"weight_shape is {rows}x{width}, and the codes are those of {len(codes)}x{codes.shape[1]}"
        raise IntegrityError(message, fix="get the checkpoint again, or quantize the model anew")
    zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
    if "weight_zero_point" in tensors:
        zeros = gptq.unpack_words(tensors["weight_zero_point"], bits)[:rows]
    index = tensors.get("weight_g_idx")
    return gptq.dequantize(codes[:, :width], scales, zeros, None if index is None or (index < 0).any() else index)


def as_gptq(words: Tensor, scales: Tensor, bits: int) -> dict[str, Tensor]:
    """Repack a linear from symmetric `pack-quantized` to `gptq`, losslessly.

    Both hold unsigned codes along the inputs, lowest bits first, an output's in one row here and in one column there;
    a code of 2^(bits - 1) stands for zero.

    Args:
        words: weight_packed, (out, in · bits / 32) int32.
        scales: weight_scale, (out, groups) in a float dtype.
        bits: 4 or 8.

    Returns:
        Tensors by suffix, as `gptq.pack` returns them.

    Raises:
        StageFailedError: A scale has no exact float16.
    """
    half = scales.to(torch.float16)
    if not torch.equal(half.to(scales.dtype), scales):
        message = f"a {scales.dtype} scale of {scales.abs().min().item():.3g} has no exact float16"
        raise StageFailedError(message, fix="quantize in float16, or keep the compressed-tensors directory")
    rows, per_word = words.shape[0], 32 // bits
    width, groups = words.shape[1] * per_word, scales.shape[1]
    zeros = torch.full((rows, groups), 2 ** (bits - 1) - 1, dtype=torch.uint8)
    return {
        "qweight": words.T.contiguous(),
        "qzeros": gptq.pack_words(zeros, bits).T.contiguous(),
        "scales": half.T.contiguous(),
        "g_idx": torch.arange(width, dtype=torch.int32) // (width // groups),
    }
