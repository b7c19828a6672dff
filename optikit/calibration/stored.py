"""The weights of a model directory as the walk asks for them: by block and by group, checked as they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optikit.errors import StageFailedError
from optikit.formats.checkpoint import Checkpoint
from optikit.models import architectures
from optikit.models.architectures import Architecture


@dataclass(frozen=True)
class Linear:
    """One linear of a block.

    Attributes:
        inside: Name relative to its block.
        name: Full name, as the checkpoint has it, without `.weight`.
    """

    inside: str
    name: str


class StoredModel:
    """A checkpoint and the row of its architecture.

    Attributes:
        checkpoint: The weights.
        row: Which module does what.
        layers: Number of decoder blocks.
        most_tokens: Longest sequence the model was made for.

    Raises:
        StageFailedError: The architecture is unknown, or the config contradicts its row.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.config()
        row = architectures.find(str(config.get("model_type")))
        if row is None:
            known = ", ".join(architectures.names())
            raise StageFailedError(f"unknown model_type {config.get('model_type')!r}", fix=f"known: {known}")
        self.checkpoint = checkpoint
        self.row: Architecture = row
        self.layers = int(str(config[row.keys["layers"]]))
        self.most_tokens = int(str(config[row.keys["max_positions"]]))

    def stored_name(self, name: str) -> str:
        """Return the checkpoint's name of a tensor: some checkpoints hold the base model without its prefix.

        Raises:
            StageFailedError: The checkpoint has no such tensor.
        """
        bare = name.removeprefix(self.row.blocks.partition(".")[0] + ".")
        for candidate in (name, bare):
            if candidate in self.checkpoint:
                return candidate
        raise StageFailedError(f"the checkpoint has no tensor {name!r}", fix="quantize a dense checkpoint, once")

    def read(self, name: str) -> Tensor:
        """Read a tensor as it is stored.

        Raises:
            StageFailedError: It isn't there, or holds NaN or infinity.
        """
        stored = self.stored_name(name)
        tensor = self.checkpoint.read(stored)
        if not torch.isfinite(tensor).all():
            raise StageFailedError(f"{stored} holds NaN or infinity", fix="the checkpoint is damaged: fetch it again")
        return tensor

    def groups(self, block: int, leave: Callable[[str], bool]) -> list[tuple[Linear, ...]]:
        """Return the linears of a block that are to be changed, grouped by input, in execution order."""
        prefix = self.row.block(block)
        groups = []
        for names in self.row.groups:
            full = [(name, f"{prefix}.{name}") for name in names]
            linears = [Linear(inside, self.stored_linear(name)) for inside, name in full if not leave(name)]
            if linears:
                groups.append(tuple(linears))
        return groups

    def stored_linear(self, name: str) -> str:
        """Return the checkpoint's name of a linear, without `.weight`."""
        return self.stored_name(f"{name}.weight").removesuffix(".weight")

    def width(self, linear: Linear) -> int:
        """Return the input features of a linear."""
        return self.checkpoint.entries[f"{linear.name}.weight"].shape[0 if self.row.transposed else 1]

    def weight(self, linear: Linear) -> Tensor:
        """Read a linear's weight as (out_features, in_features) float32."""
        tensor = self.read(f"{linear.name}.weight").float()
        return tensor.T.contiguous() if self.row.transposed else tensor

    def as_stored(self, linear: Linear, weight: Tensor) -> Tensor:
        """Return a weight (out_features, in_features) in the layout and dtype in which the checkpoint has it."""
        dtype = self.checkpoint.entries[f"{linear.name}.weight"].torch_dtype
        return (weight.T if self.row.transposed else weight).to(dtype).contiguous()
