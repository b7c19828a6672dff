"""Whether a gguf file holds one matrix twice: as its embedding and, rounded otherwise, as its output head.

Converters write `output.weight` beside `token_embd.weight` where the two get types of their own, also where the model
ties them. Taken for two matrices, such a model doubles what is the largest part of a small one.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from optikit.models.gguf_header import GgufHeader
from optikit.models.gguf_rows import read_rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
SAMPLED = 64
"""Rows that are looked at while planning, evenly spread."""
LEAST = 2.0**-8
"""Relative distance that bfloat16 explains."""
_BITS = re.compile(r"Q(\d)")


def finer(header: GgufHeader) -> str:
    """Return which of the two has more bytes, and so was rounded less."""
    return max((EMBEDDING, HEAD), key=lambda name: header.tensors[name].bytes)


def coarser(header: GgufHeader) -> str:
    """Return the other one."""
    return HEAD if finer(header) == EMBEDDING else EMBEDDING


def explained(header: GgufHeader) -> float:
    """Return the distance, relative to their length, of two roundings of one matrix: half a step of the coarser one.

    Its levels are 2^bits; weights that spread evenly lie 2^(1 - bits) · 0.58 of their length off.
    """
    kinds = (_BITS.search(header.tensors[name].type) for name in (EMBEDDING, HEAD))
    return max(LEAST if found is None else 2.0 ** (1 - int(found[1])) for found in kinds)


def tied(header: GgufHeader) -> bool:
    """Return whether the head of a file is its embedding: not there, or as near as rounding explains.

    Rows are sampled; whoever reads the file compares them all.

    Args:
        header: Of the file, which has a matrix `token_embd.weight`.
    """
    if HEAD not in header.tensors:
        return True
    shape = header.tensors[EMBEDDING].shape
    if header.tensors[HEAD].shape != shape:
        return False
    import numpy as np

    count = shape[0]
    rows = sorted({count * index // SAMPLED for index in range(SAMPLED)} | {count - 1})
    pair = (header.tensors[EMBEDDING], header.tensors[HEAD])
    one, other = (np.concatenate([read_rows(each, row, 1) for row in rows]) for each in pair)
    return bool(np.median(distance(one, other)) <= explained(header))


def distance(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return how far each row of two matrices is apart, relative to its mean length."""
    import numpy as np

    length = np.linalg.norm(one, axis=1) + np.linalg.norm(other, axis=1)
    found: NDArray[np.float32] = 2 * np.linalg.norm(one - other, axis=1) / np.maximum(length, 1e-30)
    return found
