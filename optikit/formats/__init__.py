"""Checkpoint formats: how weights lie in a directory, whoever wrote them.

`load_state(directory, dtype)` is for runtimes: the dense state dict of any directory that a stage here can write.
`dequantized_state(directory)` is the same, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optikit.errors import IntegrityError
from optikit.formats import gptq
from optikit.formats.checkpoint import Checkpoint
from optikit.models import architectures


def _transposed(config: Mapping[str, Any]) -> bool:
    row = architectures.find(str(config.get("model_type", "")))
    return row is not None and row.transposed


def dequantized_state(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a model directory, packed linears as the float weight that they stand for.

    Dense tensors come in the dtype they are stored in, dequantized ones in float32, under their Hugging Face names.

    Raises:
        IntegrityError: The directory is packed in a format that no stage here writes.
    """
    checkpoint = Checkpoint(directory)
    config: Mapping[str, Any] = checkpoint.config()
    packing: Mapping[str, Any] = config.get("quantization_config") or {}
    method = packing.get("quant_method")
    if method not in (None, "gptq") or packing.get("checkpoint_format", "gptq") != "gptq":
        raise IntegrityError(f"{directory} is packed as {method!r}", fix="formats that can be read: dense, gptq")
    for name in checkpoint:
        layer, _, kind = name.rpartition(".")
        if not packing or kind not in gptq.SUFFIXES or f"{layer}.qweight" not in checkpoint:
            yield name, checkpoint.read(name)
        elif kind == "qweight":
            tensors = {suffix: checkpoint.read(f"{layer}.{suffix}") for suffix in gptq.SUFFIXES}
            weight = gptq.dequantize(*gptq.unpack(tensors, int(packing["bits"])), tensors["g_idx"])
            yield f"{layer}.weight", weight.T.contiguous() if _transposed(config) else weight


def load_state(directory: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the dense state dict of a model directory, floating point tensors as `dtype`, Hugging Face names."""
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in dequantized_state(directory)}
