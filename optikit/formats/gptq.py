"""The `gptq` checkpoint format, as GPTQModel, vLLM and the onnxruntime-genai builder read it; written in version 1.

For a linear of `in` inputs and `out` outputs, with p = 32 / bits codes to an int32, lowest bits first (3-bit codes are
one stream: 32 of them in 3 words):

    qweight  (in / p, out)      int32    codes; word r holds inputs r·p … r·p + p - 1
    qzeros   (groups, out / p)  int32    zero points minus one; as they are in version 2, `gptq_v2`
    scales   (groups, out)      float16
    g_idx    (in,)              int32    group of each input

    weight[o, i] = (code[o, i] - zero[o, g_idx[i]]) · scale[o, g_idx[i]]

Minus one makes a zero point of 0 wrap around, and loaders differ on what it wraps to: grids here use 1 … 2^bits - 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes along the first dimension.

    Args:
        codes: (n, m), values 0 … 2^bits - 1, n a multiple of 32 / bits.
        bits: 4 or 8.

    Returns:
        (n · bits / 32, m) int32, the first code in the lowest bits.
    """
    per_word = 32 // bits
    words = codes.reshape(codes.shape[0] // per_word, per_word, codes.shape[1])
    packed = words[:, 0].to(torch.int32)
    for offset in range(1, per_word):
        packed.bitwise_or_(words[:, offset].to(torch.int32) << (offset * bits))
    return packed


def unpack_words(packed: Tensor, bits: int) -> Tensor:
    """Undo `pack_words`, for any number of bits up to 8: (n, m) int32 → (n · 32 / bits, m) uint8."""
    if 32 % bits:
        return _unpack_stream(packed, bits)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    codes: Tensor = (packed[:, None, :] >> shifts[None, :, None]) & (2**bits - 1)
    return codes.to(torch.uint8).reshape(-1, packed.shape[1])


def _unpack_stream(packed: Tensor, bits: int) -> Tensor:
    """Unpack codes that words don't divide; what ends in the middle of 32 codes is filled up with zeros."""
    rows, columns = packed.shape
    words = torch.nn.functional.pad(packed, (0, 0, 0, -rows % bits)).view(-1, bits, columns)
    codes = torch.empty((words.shape[0], 32, columns), dtype=torch.uint8)
    for k in range(32):
        word, shift = divmod(k * bits, 32)
        code = words[:, word] >> shift
        if shift + bits > 32:
            code = (code & (2 ** (32 - shift) - 1)) | (words[:, word + 1] << (32 - shift))
        codes[:, k] = (code & (2**bits - 1)).to(torch.uint8)
    return codes.view(-1, columns)[: rows * 32 // bits]


def pack(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> dict[str, Tensor]:
    """Pack one quantized linear.

    Args:
        codes: (out, in) uint8.
        scales: (out, groups) float16.
        zeros: (out, groups) uint8, 1 … 2^bits - 1.
        bits: 4 or 8.

    Returns:
        Tensors by suffix.
    """
    width, groups = codes.shape[1], scales.shape[1]
    minus_one = (zeros.to(torch.int32) - 1) & (2**bits - 1)
    return {
        "qweight": pack_words(codes.T.contiguous(), bits),
        "qzeros": pack_words(minus_one, bits).T.contiguous(),
        "scales": scales.to(torch.float16).T.contiguous(),
        "g_idx": torch.arange(width, dtype=torch.int32, device=codes.device) // (width // groups),
    }


def unpack(tensors: Mapping[str, Tensor], bits: int, *, version: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (out, in) uint8, scales (out, groups) float16 and zero points (out, groups) uint8 of one linear."""
    codes = unpack_words(tensors["qweight"], bits).T
    zeros = (unpack_words(tensors["qzeros"].T, bits).to(torch.int32) + (version == 1)) & (2**bits - 1)
    return codes, tensors["scales"].T, zeros.to(torch.uint8)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor | None = None) -> Tensor:
    """Return the weight (out, in) float32 that codes (out, in), scales and zero points (out, groups) stand for."""
    if g_idx is None:
        rows, width = codes.shape
        grouped = codes.to(torch.float32).reshape(rows, scales.shape[1], -1)
        return grouped.sub_(zeros.float()[:, :, None]).mul_(scales.float()[:, :, None]).reshape(rows, width)
    index = g_idx.long()
    return (codes.float() - zeros.float()[:, index]) * scales.float()[:, index]
