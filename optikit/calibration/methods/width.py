"""Width pruning as a method of the walk: of the channels that a linear reads, choose those that stay, narrow all.

Only the readers (attention output, MLP's way back) are the walk's business; the linears that make their channels lose
rows without being asked anything, and are written along with the reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optikit.algorithms import width
from optikit.calibration import calibration_set
from optikit.calibration.empty_model import EmptyModel
from optikit.calibration.gradients import gradients
from optikit.calibration.gram import Gram
from optikit.calibration.method import Group, Result
from optikit.calibration.source_model import Linear, SourceModel
from optikit.calibration.write_checkpoint import NarrowedLayout
from optikit.formats.checkpoint import Checkpoint, keep_tensors, kept_tensors
from optikit.stage import Calibration, Job

GRADIENT_WINDOWS, GRADIENT_TOKENS = 16, 256
"""Windows, and tokens of each, that the backward pass looks at: the paper takes ten of 64."""


TAYLOR = "taylor.safetensors"
"""Importances, kept for a resume."""


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """Channels of a block that go together: some linears make them, one reads them.

    Attributes:
        reader: The linear whose columns they are, relative to its block.
        makers: The linears whose rows they are, relative to the block, with their rows per unit. One with several times
            `units · rows` rows is several linears stacked.
        size: Columns of the reader per unit.
        units: How many there are: MLP channels, or key-value heads.
        keep: How many stay.
    """

    reader: str
    makers: tuple[tuple[str, int], ...]
    size: int
    units: int
    keep: int

    def rows(self, kept: Tensor, total: int, size: int) -> Tensor:
        """Return the rows that kept units own in a maker with `total` rows, `size` of them per unit."""
        stacked = torch.arange(0, total, self.units * size)
        return (stacked[:, None] + width.channels(kept.cpu(), size)).reshape(-1)


@dataclass(frozen=True)
class Narrow:
    """Remove units of coupled channels. The walk has to ignore every linear but the readers.

    Attributes:
        layout: The shapes that stay.
        couplings: What can be narrowed in every block.
        compensate: Refit the readers to their old outputs.
        taylor: Importance of every unit, by full name of its reader; None judges by contribution.
        source: The model that is narrowed.
    """

    layout: NarrowedLayout
    couplings: tuple[Coupling, ...]
    compensate: bool
    taylor: Mapping[str, Tensor] | None = field(repr=False)
    source: SourceModel = field(repr=False)
    correct_damp: None = None

    def statistic(self, group: Group) -> Gram:
        """Return an empty Gram matrix."""
        return Gram(group)

    def apply(self, group: Group, statistic: Gram) -> Result:
        """Narrow a reader, and with it the linears that make its channels."""
        (name,), (weight,) = group.names, group.weights
        coupling = next(c for c in self.couplings if name.endswith(f".{c.reader}"))
        gram = statistic.mean()
        importance = width.contribution(weight, gram, coupling.size)
        if self.taylor is not None:
            importance = self.taylor[name].to(weight.device)
        units = width.kept(importance, coupling.keep)
        columns = width.channels(units, coupling.size)
        narrow = width.compensate(weight, gram, columns) if self.compensate else weight[:, columns]
        goes_on = torch.zeros_like(weight)
        goes_on[:, columns] = narrow
        tensors = {f"{name}.weight": self.source.as_checkpoint(Linear(coupling.reader, name), narrow)}
        block = name.removesuffix(coupling.reader)
        for inside, size in coupling.makers:
            tensors |= self._narrowed(Linear(inside, f"{block}{inside}"), coupling, units, size)
        share = float(importance[units].sum() / importance.sum().clamp_min(1e-30))
        facts = {"kept": units.tolist(), "kept_importance": round(share, 4)}
        return Result(weights=(goes_on,), tensors=tensors, facts={name: facts})

    def _narrowed(self, maker: Linear, coupling: Coupling, units: Tensor, size: int) -> dict[str, Tensor]:
        weight = self.source.weight(maker)
        rows = coupling.rows(units, len(weight), size)
        tensors = {f"{maker.name}.weight": self.source.as_checkpoint(maker, weight[rows])}
        if f"{maker.name}.bias" in self.source.checkpoint:
            tensors[f"{maker.name}.bias"] = self.source.read(f"{maker.name}.bias")[rows]
        return tensors


def taylor(job: Job, calibration: Calibration, couplings: tuple[Coupling, ...]) -> dict[str, Tensor]:
    """Return the first-order importance of every unit, (units,) by full name of its reader."""
    kept = job.scratch / TAYLOR
    earlier = kept_tensors(kept, job.note)
    if earlier is not None:  # a killed run came so far
        return earlier
    source = SourceModel(Checkpoint(job.source))
    model = EmptyModel(source, dtype=torch.float32, device=job.device)
    tokens = calibration_set.draw(
        job.source,
        calibration.text,
        samples=min(calibration.samples, GRADIENT_WINDOWS),
        length=min(calibration.length, GRADIENT_TOKENS),
        seed=job.seed,
    )
    found = {}
    for index, block in gradients(model, tokens, job.scratch):
        for coupling in couplings:
            name = source.linear_name(f"{source.row.block(index)}.{coupling.reader}")
            found[name] = width.taylor(_parts(block, coupling, transposed=source.row.transposed)).cpu()
        job.progress(source.layers - index, source.layers, "block, backward")
    keep_tensors(kept, found)
    return found


def _parts(block: nn.Module, coupling: Coupling, *, transposed: bool) -> list[width.Part]:
    parts = []
    for inside, size, columns in ((coupling.reader, coupling.size, True), *((m, s, False) for m, s in coupling.makers)):
        parameter: Any = block.get_submodule(inside).weight
        weight, gradient = parameter.detach(), parameter.grad
        if transposed:
            weight, gradient = weight.T, gradient.T
        own = weight.shape[1] if columns else coupling.units * size
        pieces = zip(*(t.split(own, dim=1 if columns else 0) for t in (weight, gradient)), strict=True)
        parts += [width.Part(w, g, columns=columns, size=size) for w, g in pieces]
    return parts
