"""The `compressed-tensors` checkpoint format, `int-quantized`: INT8 weights for kernels that round activations too.

For a linear of `in` inputs and `out` outputs:

    weight        (out, in)  int8
    weight_scale  (out, 1)   the model's float dtype

    output[t, o] = weight_scale[o] · Δ[t] · Σ_i weight[o, i] · code[t, i]

where the server rounds each token's inputs to int8 codes with Δ[t] = max_i |x[t, i]| / 127 as they come. vLLM runs it;
transformers dequantizes it with the compressed-tensors package.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from optikit.errors import StageFailedError
from optikit.formats import gptq


def pack(codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """Return the tensors of one linear by suffix: codes (out, in) int8, scales (out, 1) in a float dtype."""
    return {"weight": codes.to(torch.int8).contiguous(), "weight_scale": scales.reshape(-1, 1).contiguous()}


def dequantize(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the weight (out, in) float32 of one linear."""
    return tensors["weight"].float() * tensors["weight_scale"].float()


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
