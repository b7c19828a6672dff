"""The source model's weights as the walk asks for them: by block and by group, checked as they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from optikit.calibration.method import PreviousOp
from optikit.errors import RecipeError, StageFailedError
from optikit.formats.checkpoint import Checkpoint, finite
from optikit.models.architectures import Architecture
from optikit.models.reader import architecture_of


@dataclass(frozen=True)
class Linear:
    """One linear of a block.

    Attributes:
        inside: Name relative to its block.
        name: Full name, as the checkpoint has it, without `.weight`.
    """

    inside: str
    name: str


def linears_of(directory: Path) -> tuple[str, ...]:
    """Return the full names of all linears of a model directory's blocks, as its checkpoint has them."""
    return SourceModel(Checkpoint(directory)).linears


class SourceModel:
    """A checkpoint and the row of its architecture.

    Attributes:
        checkpoint: The weights.
        row: Which module does what.
        layers: Number of decoder blocks.
        max_positions: Longest sequence the model was made for, in tokens.
        own_head: The output head has a matrix of its own, not the embedding's.
        residual_scale: What outputs are multiplied by before they are added to the residual stream.

    Raises:
        StageFailedError: The architecture is unknown, or the config contradicts its row.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.config()
        try:
            row = architecture_of(checkpoint.directory, config)
        except RecipeError as error:
            raise StageFailedError(error.message, fix=error.fix) from error
        self.checkpoint = checkpoint
        self.row: Architecture = row
        config = row.meant(config)
        self.layers = int(str(config[row.keys["layers"]]))
        self.max_positions = int(str(config[row.keys["max_positions"]]))
        self.own_head = any(name in checkpoint for name in self._candidates(f"{row.head}.weight"))
        self.residual_scale = float(str(config.get(row.residual_scale, 1.0)))
        heads, hidden = (int(str(config[row.keys[key]])) for key in ("heads", "hidden"))
        self._head_dim = int(str(config.get(row.keys["head_dim"]) or hidden // heads))

    @property
    def linears(self) -> tuple[str, ...]:
        """Full names of the linears of all blocks, as the checkpoint has them."""
        return tuple(
            self.linear_name(f"{self.row.block(block)}.{inside}")
            for block in range(self.layers)
            for inside in self.row.linears
            if self.has(block, inside)
        )

    def tensor_name(self, name: str) -> str:
        """Return the checkpoint's name of a tensor: some checkpoints hold the base model without its prefix.

        Raises:
            StageFailedError: The checkpoint has no such tensor.
        """
        for candidate in self._candidates(name):
            if candidate in self.checkpoint:
                return candidate
        raise StageFailedError(f"the checkpoint has no tensor {name!r}", fix="quantize a dense checkpoint, once")

    def _candidates(self, name: str) -> tuple[str, ...]:
        module, _, leaf = name.rpartition(".")
        bare = name.removeprefix(self.row.blocks.partition(".")[0] + ".")
        return (name, bare, f"{self.row.stored_as.get(module, module)}.{leaf}")

    def read(self, name: str) -> Tensor:
        """Read a tensor as it is stored.

        Raises:
            StageFailedError: It isn't there.
            IntegrityError: It holds NaN or infinity.
        """
        stored = self.tensor_name(name)
        return finite(stored, self.checkpoint.read(stored), self.checkpoint.directory)

    def groups(
        self, block: int, ignore: Callable[[str], bool], seen: Sequence[tuple[str, ...]] = ()
    ) -> list[tuple[Linear, ...]]:
        """Return the linears of a block that are to be changed, grouped by input, in execution order.

        Args:
            block: Index of the block.
            ignore: Whether a linear (full name) is left as it is.
            seen: The groups of a block whose row doesn't tell them, as `EmptyModel.traced` finds them.
        """
        groups = []
        for names in seen or self.row.groups:
            full = [(name, f"{self.row.block(block)}.{name}") for name in names if self.has(block, name)]
            linears = [Linear(inside, self.linear_name(name)) for inside, name in full if not ignore(name)]
            if linears:
                groups.append(tuple(linears))
        return groups

    def has(self, block: int, inside: str) -> bool:
        """Return whether a block has a linear: of a hybrid's, not every one has all."""
        name = f"{self.row.block(block)}.{inside}.weight"
        return not self.row.hybrid or any(each in self.checkpoint for each in self._candidates(name))

    def previous_op(
        self, block: int, linears: tuple[Linear, ...], ignore: Callable[[str], bool], changed: Mapping[str, Tensor]
    ) -> PreviousOp | None:
        """Return the module that can take a scale off the inputs of a group.

        Args:
            block: Index of the block.
            linears: The group, as `groups` has it.
            ignore: Whether a linear (full name) is left as it is.
            changed: Tensors of this block that are new, by full name.
        """
        place = next(i for i, names in enumerate(self.row.groups) if linears[0].inside in names)
        inside = self.row.previous_ops[place]
        full = f"{self.row.block(block)}.{inside}"
        linear = inside in self.row.linears
        if not inside or len(linears) < len(self.row.groups[place]) or (linear and ignore(full)):
            return None
        name = self.linear_name(full)
        tensors = self._stored(name, linear=linear) | {
            key: tensor for key, tensor in changed.items() if key.startswith(f"{name}.")
        }
        ties = self._ties(Linear(inside, name), self.width(linears[0])) if linear else None
        offset = 0.0 if linear else self.row.norm_offset
        return PreviousOp(name=name, tensors=tensors, linear=linear, offset=offset, ties=ties)

    def _stored(self, name: str, *, linear: bool) -> dict[str, Tensor]:
        """Return a previous op's tensors as the checkpoint has them, but for a linear's weight: the walk makes it."""
        own = (f"{name}.bias",) if linear else (f"{name}.weight", f"{name}.bias")
        return {key: self.read(key) for key in own if key in self.checkpoint}

    def _ties(self, previous: Linear, width: int) -> Tensor | None:
        """Return which row of the previous op each of `width` inputs copies: key-value heads serve several queries."""
        shape = self.checkpoint.entries[f"{previous.name}.weight"].shape
        rows = shape[1 if self.row.transposed else 0]
        if rows == width:
            return None
        channel = torch.arange(width)
        head = channel // self._head_dim // (width // rows)
        return head * self._head_dim + channel % self._head_dim

    def residual_source(self, linear: Linear) -> str:
        """Return the module whose input is the residual stream that a linear's output is added to, or ""."""
        where = next(index for index, names in enumerate(self.row.groups) if linear.inside in names)
        return self.row.residual_sources[where]

    def linear_name(self, name: str) -> str:
        """Return the checkpoint's name of a linear, without `.weight`."""
        return self.tensor_name(f"{name}.weight").removesuffix(".weight")

    def width(self, linear: Linear) -> int:
        """Return the input features of a linear."""
        return self.checkpoint.entries[f"{linear.name}.weight"].shape[0 if self.row.transposed else 1]

    def weight(self, linear: Linear) -> Tensor:
        """Read a linear's weight as (out_features, in_features) float32."""
        tensor = self.read(f"{linear.name}.weight").float()
        return tensor.T.contiguous() if self.row.transposed else tensor

    def as_checkpoint(self, linear: Linear, weight: Tensor) -> Tensor:
        """Return a weight (out_features, in_features) in the layout and dtype in which the checkpoint has it."""
        dtype = self.checkpoint.entries[f"{linear.name}.weight"].torch_dtype
        return (weight.T if self.row.transposed else weight).to(dtype).contiguous()
