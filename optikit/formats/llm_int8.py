"""The bitsandbytes checkpoint format for LLM.int8(): INT8 weights; outlier inputs are multiplied in half precision.

For a linear of `in` inputs and `out` outputs:

    weight         (out, in)  int8
    SCB            (out,)     float32    largest magnitude of each row; weight[o, i] stands for code · SCB[o] / 127
    weight_format  ()         uint8      0: plain rows

Which inputs are outliers is decided while serving, by `llm_int8_threshold` of the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LEVELS = 127


def pack(codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """Return the tensors of one linear by suffix: codes (out, in) int8, scales (out, 1) float32."""
    return {
        "weight": codes.to(torch.int8).contiguous(),
        "SCB": (scales.reshape(-1).float() * LEVELS).contiguous(),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def dequantize(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the weight (out, in) float32 of one linear."""
    return tensors["weight"].float() * tensors["SCB"].float()[:, None] * (1 / LEVELS)  # in the library's order
