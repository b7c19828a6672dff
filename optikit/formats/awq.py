"""The `awq` checkpoint format, as AutoAWQ, vLLM and the onnxruntime-genai builder read it; written in version `gemm`.

For a linear of `in` inputs and `out` outputs, eight 4-bit codes to an int32:

    qweight  (in, out / 8)      int32    codes; nibble k of word c holds output 8·c + ORDER[k]
    qzeros   (groups, out / 8)  int32    zero points, in the same order; stored as they are
    scales   (groups, out)      float16

    weight[o, i] = (code[o, i] - zero[o, i // group_size]) · scale[o, i // group_size]

ORDER lets a GPU kernel convert a word with two masks and one shift. Version `gemv` packs in order along the inputs, an
output's codes in one row; its groups are filled up with zeros:

    qweight  (out, in / 8)           int32
    qzeros   (out, padded / 8)       int32
    scales   (out, padded)           float16

Source: AutoAWQ 0.2.9, awq/modules/linear/gemv.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from optikit.formats.gptq import pack_words, unpack_words

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output of each nibble of a word, lowest bits first."""
BITS = 4


def _reordered(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """Rearrange (n, m) within each eight rows."""
    eights = codes.reshape(-1, len(order), codes.shape[1])
    return eights[:, list(order)].reshape(codes.shape)


_INVERSE = tuple(ORDER.index(k) for k in range(len(ORDER)))


def pack(codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    """Pack one quantized linear.

    Args:
        codes: (out, in) uint8, values 0 … 15, `out` a multiple of 8.
        scales: (out, groups) float16.
        zeros: (out, groups) uint8, values 0 … 15.

    Returns:
        Tensors by suffix.
    """
    return {
        "qweight": pack_words(_reordered(codes, ORDER), BITS).T.contiguous(),
        "qzeros": pack_words(_reordered(zeros, ORDER), BITS).T.contiguous(),
        "scales": scales.to(torch.float16).T.contiguous(),
    }


def unpack(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (out, in) uint8, scales (out, groups) float16 and zero points (out, groups) uint8 of one linear."""
    codes, zeros = (
        _reordered(unpack_words(tensors[suffix].T.contiguous(), BITS), _INVERSE) for suffix in ("qweight", "qzeros")
    )
    return codes, tensors["scales"].T, zeros


def unpack_gemv(tensors: Mapping[str, Tensor], group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `unpack` does, of a linear in version `gemv`; `group_size` 0 is all inputs."""
    codes, zeros = (unpack_words(tensors[suffix].T.contiguous(), BITS).T for suffix in ("qweight", "qzeros"))
    groups = codes.shape[1] // (group_size or codes.shape[1])
    return codes, tensors["scales"][:, :groups], zeros[:, :groups]
