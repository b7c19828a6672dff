"""The source model's weights as the walk asks for them: by block and by group, checked as they are read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optikit.calibration.method import PreviousOp
from optikit.errors import RecipeError, StageFailedError
from optikit.formats import stacked
from optikit.formats.checkpoint import Checkpoint, Entry, finite, joined, made_of, read_rows
from optikit.formats.packing import STRIP_ROWS
from optikit.models import language_part, stacked_experts
from optikit.models.architectures import Architecture
from optikit.models.reader import architecture_of

GATE, UP, DOWN = range(3)
"""Projections of an expert, in the order in which rows of architectures.toml name them."""
STRIP_ELEMENTS = 1 << 22
"""Weights of a strip: a few copies of it in float32 are nothing beside the libraries."""


@dataclass(frozen=True)
class Linear:
    """One linear of a block.

    Attributes:
        inside: Name relative to its block; of an expert's, which is no module of its own, as checkpoints have it.
        name: Full name, as the checkpoint has it, without `.weight`.
        expert: Number of the routed expert that it belongs to, or None.
        part: Which of an expert's projections it is.
    """

    inside: str
    name: str
    expert: int | None = None
    part: int = GATE


Linears = tuple[Linear, ...]


@dataclass(frozen=True)
class JointScale:
    """What all experts of a block read.

    Attributes:
        previous: A norm, of which a scale can be divided out.
        readers: Names of dense weights (out, in) that read it, and that are multiplied then.
        linears: Those that read it and are changed.
    """

    previous: PreviousOp
    readers: tuple[str, ...]
    linears: Linears


class SourceModel:
    """A checkpoint and the row of its architecture.

    Attributes:
        checkpoint: The weights; of stacked experts each on its own.
        row: Which module does what.
        config: What config.json says of the language model.
        layers: Number of decoder blocks.
        max_positions: Longest sequence the model was made for, in tokens.
        own_head: The output head has a matrix of its own, not the embedding's.
        residual_scale: What outputs are multiplied by before they are added to the residual stream.
        experts: Routed experts of a block that has them; 0 where there are none.
        carried: Names of tensors that aren't the language model's.

    Raises:
        StageFailedError: The architecture is unknown, or the config contradicts its row.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        told = checkpoint.config()
        config = language_part.settings_of(told)
        try:
            row = architecture_of(checkpoint.directory, told)
        except RecipeError as error:
            raise StageFailedError(error.message, fix=error.fix) from error
        self.row: Architecture = row
        self.config = row.meant(config)
        self.layers = self._figure(row.keys["layers"])
        self.max_positions = self._figure(row.keys["max_positions"])
        self.experts = self._figure(row.experts.count) if row.experts else 0
        self._sparse = row.experts.sparse(self.layers, self.config) if row.experts else frozenset[int]()
        self._part = language_part.find(row, told, checkpoint, self.layers)
        self._stored = dict(self._part.stored)
        self._wholes: dict[str, tuple[int, ...]] = {}
        self.carried = self._part.carried
        self.checkpoint = self._apart(checkpoint)
        self.own_head = f"{row.head}.weight" in self._stored
        self.residual_scale = float(str(self.config.get(row.residual_scale, 1.0)))
        heads, hidden = (self._figure(row.keys[key]) for key in ("heads", "hidden"))
        self._head_dim = int(str(self.config.get(row.keys["head_dim"]) or hidden // heads))

    def _figure(self, key: str) -> int:
        return int(str(self.config[key]))

    def _apart(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint with every expert's weights on their own, where it holds them stacked."""
        experts = self.row.experts
        if experts is None or not experts.stacked:
            return checkpoint
        seen = copy.copy(checkpoint)
        own = {name: checkpoint.entries[stored] for name, stored in self._part.stored.items()}
        inside = {name: stacked_experts.inside_block(self.row, name) for name in own}
        self._wholes = {name: own[name].shape for name in own if inside[name] in experts.stacked}
        found = stacked.apart(self.row, self.config, own)
        self._stored = {name: self._part.stored.get(name, self._part.place(name)) for name in found}
        seen.entries = {name: checkpoint.entries[name] for name in self.carried}
        seen.entries |= {self._stored[name]: entry for name, entry in found.items()}
        return seen

    def stacked(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Return a checkpoint's tensors with those of experts stacked again, as the source has them."""
        experts = self.row.experts
        found = dict(entries)
        if experts is None or not experts.stacked:
            return found
        sizes = stacked.sizes_of(self.row, self.config)
        for whole, shape in self._wholes.items():
            weave = stacked.weave(experts, turned=stacked_experts.is_turned(self.row, sizes, whole, shape))
            each = [
                made_of([found.pop(self._stored[name]) for name in names], shape[1:], weave)
                for names in stacked.grouped(self.row, sizes, whole)
            ]
            found[self._part.place(whole)] = joined(each, shape)
        return found

    def tensor_name(self, name: str) -> str:
        """Return the checkpoint's name of a tensor: some checkpoints hold the base model without its prefix.

        Args:
            name: As transformers' module, or the checkpoint, has it.

        Raises:
            StageFailedError: The checkpoint has no such tensor.
        """
        if name in self.checkpoint:
            return name
        inside = stacked_experts.inside_block(self.row, name)
        there = name.removesuffix(inside) + self.row.stored_name(inside)
        found = self._stored.get(name) or self._stored.get(there)
        if found is None:
            raise StageFailedError(f"the checkpoint has no tensor {name!r}", fix="quantize a dense checkpoint, once")
        return found

    def has(self, name: str) -> bool:
        """Return whether the checkpoint has a tensor that transformers calls so."""
        inside = stacked_experts.inside_block(self.row, name)
        return name in self._stored or name.removesuffix(inside) + self.row.stored_name(inside) in self._stored

    def read(self, name: str) -> Tensor:
        """Read a tensor as it is stored.

        Raises:
            StageFailedError: It isn't there.
            IntegrityError: It holds NaN or infinity.
        """
        stored = self.tensor_name(name)
        return finite(stored, self.checkpoint.read(stored), self.checkpoint.directory)

    def is_sparse(self, block: int) -> bool:
        """Return whether a block has routed experts."""
        return block in self._sparse

    def groups(self, block: int, ignore: Callable[[str], bool], seen: Sequence[tuple[str, ...]] = ()) -> list[Linears]:
        """Return the linears of a block that are to be changed, grouped by input, in execution order.

        Args:
            block: Index of the block.
            ignore: Whether a linear (full name) is left as it is.
            seen: The groups of a block whose row doesn't tell them, as `EmptyModel.traced` finds them.
        """
        found: list[Linears] = []
        for step in self.steps(block, ignore, seen):
            found += [step] if step is not None else self._of_experts(block, ignore)
        return found

    def steps(
        self, block: int, ignore: Callable[[str], bool], seen: Sequence[tuple[str, ...]] = ()
    ) -> Iterator[Linears | None]:
        """Yield groups in execution order, and None where the experts of the block have their turn."""
        before = self.row.experts.before if self.row.experts else ""
        waiting = self.is_sparse(block)
        for names in seen or self.row.groups:
            if waiting and before in names:
                yield None
                waiting = False
            linears = self._chosen(block, names, ignore)
            if linears:
                yield linears
        if waiting:
            yield None

    def _chosen(self, block: int, names: Iterable[str], ignore: Callable[[str], bool]) -> Linears:
        full = {name: f"{self.row.block(block)}.{name}" for name in names}
        there = {name: whole for name, whole in full.items() if not self._absent(block, name)}
        return tuple(
            Linear(name, self.linear_name(whole)) for name, whole in there.items() if not ignore(self._part.told(whole))
        )

    def _absent(self, block: int, inside: str) -> bool:
        """Return whether this block has no such linear: it hangs on a setting, or on the kind of the block."""
        words = self.row.tensors.get(f"*.{inside}.weight", "")
        return (not words or " if " in words) and not self.has(f"{self.row.block(block)}.{inside}.weight")

    def block_name(self, block: int) -> str:
        """Return the checkpoint's name of a block."""
        return self._part.place(self.row.block(block))

    @property
    def linears(self) -> tuple[str, ...]:
        """Full names of the linears of all blocks, as the checkpoint has them."""
        groups = (group for block in range(self.layers) for group in self.groups(block, lambda _: False))
        return tuple(linear.name for group in groups for linear in group)

    def _of_experts(self, block: int, ignore: Callable[[str], bool]) -> Iterator[Linears]:
        for expert in range(self.experts):
            for parts in ((GATE, UP), (DOWN,)):
                linears = self.expert(block, expert, ignore, parts)
                if linears:
                    yield linears

    def expert(
        self, block: int, expert: int, ignore: Callable[[str], bool], parts: Iterable[int] = (GATE, UP, DOWN)
    ) -> Linears:
        """Return those projections of an expert that aren't ignored."""
        experts = self.row.experts
        if experts is None:
            return ()
        inside = {part: experts.linear(expert, part) for part in parts}
        full = {part: f"{self.row.block(block)}.{name}" for part, name in inside.items()}
        return tuple(
            Linear(inside[part], self.linear_name(name), expert, part)
            for part, name in full.items()
            if not ignore(self._part.told(name))
        )

    def previous_op(
        self, block: int, linears: Linears, ignore: Callable[[str], bool], changed: Mapping[str, Tensor]
    ) -> PreviousOp | None:
        """Return the module that can take a scale off the inputs of a group.

        What all experts of a block read can't be scaled for one of them; what an expert's own up projection makes can.

        Args:
            block: Index of the block.
            linears: The group, as `groups` has it.
            ignore: Whether a linear (full name) is left as it is.
            changed: Tensors of this block that are new, by full name.
        """
        if linears[0].expert is not None:
            return self._previous_of_expert(block, linears[0], ignore, changed)
        place = next(i for i, names in enumerate(self.row.groups) if linears[0].inside in names)
        inside = self.row.previous_ops[place]
        full = f"{self.row.block(block)}.{inside}"
        there = [name for name in self.row.groups[place] if not self._absent(block, name)]
        linear = inside in self.row.linears
        if not inside or len(linears) < len(there) or (linear and ignore(self._part.told(full))):
            return None
        name = self.linear_name(full)
        if linear:
            ties = self._ties(Linear(inside, name), self.width(linears[0]))
            return replace(self._previous_linear(Linear(inside, name), changed), ties=ties)
        tensors = self._stored_of(name, linear=False) | _of(name, changed)
        return PreviousOp(name=name, tensors=tensors, linear=False, offset=self.row.norm_offset)

    def joint(self, block: int, ignore: Callable[[str], bool]) -> JointScale | None:
        """Return what all experts of a block read, where a scale can be divided out of it; none may be ignored."""
        experts = self.row.experts
        if experts is None or not self.is_sparse(block):
            return None
        prefix = self.row.block(block)
        each = [self.expert(block, expert, ignore, (GATE, UP)) for expert in range(self.experts)]
        linears = [*self._chosen(block, experts.shared, ignore), *(linear for two in each for linear in two)]
        if len(linears) < len(experts.shared) + 2 * self.experts:
            return None
        name = self.linear_name(f"{prefix}.{experts.norm}")
        norm = PreviousOp(
            name=name, tensors=self._stored_of(name, linear=False), linear=False, offset=self.row.norm_offset
        )
        readers = tuple(self.tensor_name(f"{prefix}.{reader}.weight") for reader in experts.readers)
        return JointScale(norm, readers, tuple(linears))

    def sample(self, linears: Linears, rows: int) -> Tensor:
        """Return about so many rows of linears of one width, (n, in) float32: as many of each, evenly spaced."""
        share = max(1, rows // len(linears))
        found = []
        for linear in linears:
            weight = self.weight(linear)
            found.append(weight[torch.linspace(0, len(weight) - 1, min(share, len(weight))).round().long()].clone())
        return torch.cat(found)

    def _previous_of_expert(
        self, block: int, linear: Linear, ignore: Callable[[str], bool], changed: Mapping[str, Tensor]
    ) -> PreviousOp | None:
        experts = self.row.experts
        if linear.part != DOWN or linear.expert is None or experts is None or not experts.folds:
            return None
        up = self.expert(block, linear.expert, ignore, (UP,))
        return self._previous_linear(up[0], changed) if up else None

    def _previous_linear(self, linear: Linear, changed: Mapping[str, Tensor]) -> PreviousOp:
        tensors = self._stored_of(linear.name, linear=True) | _of(linear.name, changed)
        return PreviousOp(name=linear.name, tensors=tensors, linear=True)

    def absorbs(self, linear: Linear) -> bool:
        """Return whether a scale of what reads a linear's outputs can be folded into it."""
        if linear.expert is None:
            return linear.inside in self.row.previous_ops
        return linear.part == UP and self.row.experts is not None and self.row.experts.folds

    def _stored_of(self, name: str, *, linear: bool) -> dict[str, Tensor]:
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
        if linear.expert is not None:
            return ""
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

    def bias(self, linear: Linear) -> Tensor | None:
        """Read a linear's bias, (out_features,), or None where it has none."""
        name = f"{linear.name}.bias"
        return self.read(name) if name in self.checkpoint else None

    def rows(self, linear: Linear) -> int:
        """Return the output features of a linear."""
        return self.checkpoint.entries[f"{linear.name}.weight"].shape[1 if self.row.transposed else 0]

    def strips(self, linear: Linear) -> Iterator[tuple[int, Tensor]]:
        """Read a linear's weight a strip of outputs at a time: the first output, and (rows, in_features) float32.

        Only a weight that is stored the other way round, or between others, is read whole.

        Raises:
            IntegrityError: It holds NaN or infinity.
        """
        name, rows = f"{linear.name}.weight", self.rows(linear)
        step = max(1, STRIP_ELEMENTS // self.width(linear) // STRIP_ROWS) * STRIP_ROWS
        whole = self.weight(linear) if self.row.transposed else None
        if whole is None and self.checkpoint.entries[name].made is not None:
            whole = self.read(name)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            if whole is not None:
                yield start, whole[start:stop].float()
                continue
            part = read_rows(self.checkpoint.entries[name], start, stop)
            yield start, finite(name, part, self.checkpoint.directory).float()

    def as_checkpoint(self, linear: Linear, weight: Tensor) -> Tensor:
        """Return a weight (out_features, in_features) in the layout and dtype in which the checkpoint has it."""
        dtype = self.checkpoint.entries[f"{linear.name}.weight"].torch_dtype
        return (weight.T if self.row.transposed else weight).to(dtype).contiguous()


def _of(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a module."""
    return {key: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
