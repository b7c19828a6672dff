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

SUFFIXES = ("weight", "weight_scale")


def pack(codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """Return the tensors of one linear by suffix: codes (out, in) int8, scales (out, 1) in a float dtype."""
    return {"weight": codes.to(torch.int8).contiguous(), "weight_scale": scales.reshape(-1, 1).contiguous()}


def dequantize(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the weight (out, in) float32 of one linear."""
    return tensors["weight"].float() * tensors["weight_scale"].float()
