"""The Gram matrix of a group's inputs, mean of x xᵀ over tokens: the Hessian of GPTQ and SparseGPT."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optikit.algorithms.correction import factor, gains, move
from optikit.algorithms.precision import exact_products, filled_up
from optikit.calibration import distributed
from optikit.calibration.method import Batch, Group

STRIP = 192
"""Columns per strip: only strips on and above the diagonal are computed, which saves nearly half of the products."""


class Corrected(NamedTuple):
    """Weights moved towards the dense model's outputs.

    Attributes:
        weight: Stacked, (rows of all linears, in_features) float32.
        factors: Per linear, how far it was moved of what least squares asks for, 0 to 1.
    """

    weight: Tensor
    factors: tuple[float, ...]


class Gram:
    """Sums x xᵀ in float32.

    Args:
        group: The linears that see the inputs.
    """

    def __init__(self, group: Group) -> None:
        self._sum = torch.zeros((group.width, group.width), device=group.weights[0].device)
        self._mean: Tensor | None = None
        self.tokens = 0

    def update(self, batch: Batch) -> None:
        """Add a batch's inputs."""
        with exact_products(batch.inputs.dtype):
            self._add(batch.inputs.float())

    def _add(self, wide: Tensor) -> None:
        filled = filled_up(wide)
        for start in range(0, len(self._sum), STRIP):
            strip = filled[:, start : start + STRIP]
            self._sum[start : start + STRIP, start:].addmm_(strip.T, filled[:, start:])
        self.tokens += len(wide)

    def merge(self) -> None:
        """Add what the other processes have seen."""
        distributed.total(self._sum)
        self.tokens = int(distributed.total(torch.tensor(self.tokens, device=self._sum.device)))

    def mean(self) -> Tensor:
        """Return the mean of x xᵀ, (width, width) float32, exactly symmetric; it takes the place of the sum."""
        if self._mean is not None:
            return self._mean
        for start in range(0, len(self._sum), STRIP):
            stop = start + STRIP
            diagonal = self._sum[start:stop, start:stop]
            diagonal.copy_(torch.triu(diagonal) + torch.triu(diagonal, 1).T)
            self._sum[stop:, start:stop] = self._sum[start:stop, stop:].T
        self._mean = self._sum.div_(max(self.tokens, 1))
        return self._mean


class _Part(Gram):
    """The Gram matrix of a part of the tokens, and how far the group's outputs there are from the dense model's.

    Args:
        group: The linears.
    """

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self._cross: Tensor | None = None

    def add(self, wide: Tensor, gap: Tensor) -> None:
        """Add inputs (tokens, in), and what outputs (or inputs) lack there; of no tokens to learn their width."""
        if self._cross is None:
            self._cross = torch.zeros((gap.shape[1], wide.shape[1]), device=wide.device)
        if len(wide):
            self._add(wide)
            self._cross.addmm_(gap.T, wide)

    def merge(self) -> None:
        """Add what the other processes have seen."""
        super().merge()
        if self._cross is not None:
            distributed.total(self._cross)

    def lacking(self, of: Tensor | None) -> Tensor:
        """Return the mean of (dense output - present output) xᵀ, (out, in) float32; callable once.

        Args:
            of: Stacked weights, where the gap of inputs was added; None where that of outputs was.
        """
        if self._cross is None:
            raise ValueError("no batch was seen")
        mean, self._cross = self._cross.div_(max(self.tokens, 1)), None
        return mean if of is None else of @ mean

    def take(self, other: _Part) -> None:
        """Join the means of another part, which is used up, to those of this one."""
        tokens = self.tokens + other.tokens
        self._mean = self.mean().mul_(self.tokens / tokens).add_(other.mean(), alpha=other.tokens / tokens)
        self.tokens = tokens


class PairedGram(_Part):
    """The Gram matrix, and the error of a group's outputs against the dense model's; of two parts of the tokens.

    A correction is fitted to one part and tried on the windows that were held out; see algorithms/correction.py. That
    costs the memory of a second pair of matrices, (in, in) and (out, in) float32, until the correction is made.
    `mean` is that of the first part before, and of all tokens after.

    Args:
        group: The linears.
        damp: Holds the correction back, as a fraction of the Gram matrix's mean diagonal.
    """

    def __init__(self, group: Group, damp: float) -> None:
        super().__init__(group)
        self._group = group
        self._damp = damp
        self._held_out: _Part = _Part(group)
        self._of_outputs = False

    def update(self, batch: Batch) -> None:
        """Add a batch: its inputs, and how far they are from the dense model's."""
        wide = batch.inputs.float()
        gap = batch.dense_inputs - wide
        self._of_outputs = batch.residual_gap is not None
        with exact_products(batch.inputs.dtype):
            if batch.residual_gap is not None:
                gap = torch.addmm(batch.residual_gap, gap, self._group.weights[0].T)
            for part in (self, self._held_out):
                part.add(wide[:0], gap[:0])
            for held_out, tokens in batch.parts():
                (self._held_out if held_out else self).add(wide[tokens], gap[tokens])

    def merge(self) -> None:
        """Add what the other processes have seen."""
        super().merge()
        self._held_out.merge()

    def corrected(self) -> Corrected:
        """Return the weights, corrected towards the dense model's outputs as far as it pays; callable once."""
        weight = torch.cat(self._group.weights)
        of, held_out = None if self._of_outputs else weight, self._held_out
        lacking, lacking_there = self.lacking(of), held_out.lacking(of)
        moved = move(self.mean(), lacking, damp=self._damp, tokens=self.tokens)
        rows = (self._group.split(each) for each in gains(moved, held_out.mean(), lacking_there))
        factors = tuple(factor(*each) for each in zip(*rows, strict=True))
        lacking.mul_(self.tokens).add_(lacking_there, alpha=held_out.tokens).div_(self.tokens + held_out.tokens)
        del moved, lacking_there
        self.take(held_out)
        del self._held_out, held_out
        if not any(factors):
            return Corrected(weight, factors)
        moved = move(self.mean(), lacking, damp=self._damp, tokens=self.tokens)  # what is tried is made of all tokens
        for part, by in zip(self._group.split(moved), factors, strict=True):
            part.mul_(by)
        return Corrected(weight.add_(moved), factors)


def gram_of(group: Group, correct_damp: float | None) -> Gram:
    """Return an empty Gram matrix; with a damping, a paired one."""
    return Gram(group) if correct_damp is None else PairedGram(group, correct_damp)
