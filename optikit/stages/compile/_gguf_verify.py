"""Compare every tensor of a gguf file with the directory it was made of.

The file is read by our own reader of headers and the gguf package's dequantizers, the source by `optikit.formats`.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from optikit.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from optikit.calibration.reference_logits import Weights
    from optikit.models.gguf_header import GgufTensor
    from optikit.stages.compile._gguf_write import Written

APART = {"F16": 2.0**-8, "BF16": 2.0**-8, "Q8_0": 2.0**-6, "Q5_0": 0.12, "Q4_0": 0.25}
"""Distance from what was rounded, relative to its length, that the type explains."""
FIX = "report it with the model's name"


def compare(source: Path, path: Path, written: Sequence[Written]) -> dict[str, Any]:
    """Return what was compared, as JSON: tensors by type, those that are bit-equal, the largest distance of others.

    Raises:
        IntegrityError: A tensor is another one, or isn't there; the message names it.
    """
    import torch

    from optikit.models.gguf_header import read_header
    from optikit.models.gguf_rows import read_rows

    header = read_header(path)
    names = {each.name for each in written}
    if names != set(header.tensors):
        raise IntegrityError(f"{path.name} has other tensors: {sorted(names ^ set(header.tensors))[:3]}", fix=FIX)
    wanted = _Source(source)
    equal, largest = 0, 0.0
    for each in written:
        tensor = header.tensors[each.name]
        found = torch.from_numpy(read_rows(tensor, 0, tensor.rows).copy())
        if not each.source:
            continue
        meant = wanted.read(each.source)
        found = wanted.back(each.source, found.reshape(tensor.shape))
        if each.exact and not torch.equal(found, meant):
            wrong = int((found != meant).sum())
            raise IntegrityError(f"{each.source}: {wrong} of {meant.numel()} weights in the file differ", fix=FIX)
        equal += each.exact
        apart = float((found - meant).norm() / meant.norm().clamp_min(1e-30))
        if not apart <= (0 if each.exact else APART[each.kind]):
            raise IntegrityError(f"{each.source}: the file's weights are {apart:.3g} of their length apart", fix=FIX)
        largest = max(largest, apart)
    types = dict(sorted(Counter(each.kind for each in written).items()))
    return {"tensors": types, "tensors_bit_equal": equal, "largest_rounding": float(f"{largest:.3g}")}


class _Source:
    """The weights of a model directory, as a gguf file of it means them."""

    def __init__(self, directory: Path) -> None:
        from optikit.models import quantization
        from optikit.models.reader import read
        from optikit.stages.compile._gguf_write import opened

        self.facts = read(directory)
        self.checkpoint = opened(directory, self.facts)
        self.storage = quantization.scheme(self.checkpoint.config(), directory / "config.json")

    def read(self, name: str) -> Tensor:
        from optikit.stages.compile._gguf_write import dense

        row = self.facts.architecture
        weight = dense(self.checkpoint, self.storage, self.facts, name)
        offset = row.norm_offset if row is not None and name.endswith("norm.weight") else 0.0
        return weight + offset

    def back(self, name: str, found: Tensor) -> Tensor:
        """Return rows of queries and keys in transformers' order: undone head by head, not by the writer's table."""
        from optikit.models import gguf_names
        from optikit.stages.compile import _gguf_settings

        heads = {"q_proj": self.facts.heads, "k_proj": self.facts.kv_heads}.get(name.split(".")[-2])
        if heads is None or _gguf_settings.architecture(self.facts) not in gguf_names.PAIRED:
            return found
        width = self.facts.head_dim
        rows = [
            found[head * width + 2 * (channel % (width // 2)) + channel // (width // 2)]
            for head in range(heads)
            for channel in range(width)
        ]
        import torch

        return torch.stack(rows)


def file_weights(source: Path, dest: Path) -> Weights:
    """Return what reads, for the matrices of a model directory, the weights that the file has in their place.

    They lie as the directory's do: GPT-2's are (in, out).
    """
    from functools import partial

    from optikit.models import gguf_names
    from optikit.models.gguf_header import read_header
    from optikit.models.reader import tensor_shapes
    from optikit.stages.compile import _gguf_settings
    from optikit.stages.compile._gguf_write import NAME

    wanted, header = _Source(source), read_header(dest / NAME)
    family, row = _gguf_settings.architecture(wanted.facts), wanted.facts.architecture
    names = {name: gguf_names.of_tensor(row, family, name) for name in tensor_shapes(wanted.facts)} if row else {}
    return {
        name: partial(_file_weight, wanted, header.tensors[written], name)
        for name, written in names.items()
        if written is not None and len(header.tensors[written].shape) > 1
    }


def _file_weight(wanted: _Source, tensor: GgufTensor, name: str) -> Tensor:
    import torch

    from optikit.models.gguf_rows import read_rows

    found = wanted.back(name, torch.from_numpy(read_rows(tensor, 0, tensor.rows).copy()))
    row = wanted.facts.architecture
    turned = row is not None and row.transposed and name.removesuffix(".weight") in wanted.facts.linears
    return found.T.contiguous() if turned else found
