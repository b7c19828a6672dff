"""Layers of a drafter's graph, rounded to 8 bits: a wrong guess costs time, never text."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

BLOCK = 32
"""Weights that share a scale."""
LEVEL = 4
"""The kernel rounds its inputs to int8, too; 1 keeps them as they are."""


def store_rounded(name: str, weight: NDArray[Any], constants: list[onnx.TensorProto]) -> None:
    """Round a layer (rows, width) to 8 bits per block, symmetrically around the kernel's default zero, 128."""
    rows, width = weight.shape
    padded = np.zeros((rows, -(-width // BLOCK) * BLOCK), np.float32)
    padded[:, :width] = weight
    blocks = padded.reshape(rows, -1, BLOCK)
    scales = np.abs(blocks).max(-1) / 127
    codes = np.divide(blocks, scales[..., None], out=np.zeros_like(blocks), where=scales[..., None] > 0)
    packed = (np.rint(codes) + 128).astype(np.uint8)
    constants.append(numpy_helper.from_array(packed, f"{name}.codes"))
    constants.append(numpy_helper.from_array(scales.reshape(-1).astype(np.float32), f"{name}.scales"))


def product(name: str, weight: NDArray[Any], source: str, out: str) -> onnx.NodeProto:
    """Return the node that multiplies (…, width) by a layer that `store_rounded` stored, to (…, rows)."""
    rows, width = weight.shape
    return helper.make_node(
        "MatMulNBits",
        [source, f"{name}.codes", f"{name}.scales"],
        [out],
        domain="com.microsoft",
        K=width,
        N=rows,
        bits=8,
        block_size=BLOCK,
        accuracy_level=LEVEL,
    )
