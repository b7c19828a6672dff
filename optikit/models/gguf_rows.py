"""Rows of tensors of gguf files in float32, by the dequantizers of the `gguf` package, a few at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optikit.models.gguf_header import BLOCKS, GgufTensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NUMBERS = {name: number for number, (name, _, _) in BLOCKS.items()}


def read_rows(tensor: GgufTensor, start: int, count: int) -> NDArray[np.float32]:
    """Return rows of a tensor whose header was read, (count, columns) float32; a vector has one.

    Source: ggml-quants.c; Q8_K, which the package leaves out, is d · q with a float32 d.
    """
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    size = tensor.bytes // tensor.rows
    with tensor.file.open("rb") as file:
        file.seek(tensor.start + start * size)
        raw = np.frombuffer(file.read(count * size), np.uint8).reshape(count, size)
    if tensor.type == "Q8_K":
        return _q8_k(raw)
    with np.errstate(all="ignore"):  # scales that aren't finite are told by whoever asks for finite weights
        found: NDArray[Any] = dequantize(raw, GGMLQuantizationType(_NUMBERS[tensor.type]))
    return found.astype(np.float32, copy=False)


def _q8_k(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Dequantize blocks of 256: a float32 scale, 256 signed codes, and 16 sums of codes."""
    import numpy as np

    blocks = raw.reshape(-1, 292)
    scales, codes = blocks[:, :4].copy().view(np.float32), blocks[:, 4:260].view(np.int8)
    with np.errstate(all="ignore"):
        return (scales * codes.astype(np.float32)).reshape(len(raw), -1)
