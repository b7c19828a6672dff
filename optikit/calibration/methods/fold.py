"""DOCSTRING optikit.calibration.methods.fold."""

from __future__ import annotations

import torch
from torch import Tensor

from optikit.algorithms import awq
from optikit.calibration.method import Feeder, Group


def fold(feeder: Feeder, scale: Tensor, *, suffix: str, axis: int) -> tuple[dict[str, Tensor], Tensor]:
    """Divide what a feeder gives by a scale, channel by channel.

    What is stored has a precision of its own: the linears that follow have to be multiplied by the scale that the
    rounded quotient amounts to, so that nothing is lost.

    Args:
        feeder: A norm, or a linear that the walk has quantized just before.
        scale: (in,) of the group, the same for channels that are copies of one.
        suffix: Name of a quantized linear's scales.
        axis: Which axis of them counts the linear's outputs.

    Returns:
        The feeder's tensors that change, by full name; and the scale (in,) that its outputs are really divided by.
    """
    per_row = scale if feeder.ties is None else _representatives(scale, feeder.ties)
    if feeder.linear:
        name = f"{feeder.name}.{suffix}"
        divided, exact = _divide_rows(feeder.tensors[name].to(scale.device).movedim(axis, 0), per_row)
        divided = divided.movedim(0, axis).contiguous()
    else:
        name = f"{feeder.name}.weight"
        divided, exact = awq.fold(feeder.tensors[name].to(scale.device), per_row, offset=feeder.offset)
    changed = {name: divided}
    bias = feeder.tensors.get(f"{feeder.name}.bias")
    if bias is not None:
        changed[f"{feeder.name}.bias"] = (bias.to(scale.device).float() / exact).to(bias.dtype)
    return changed, exact if feeder.ties is None else exact[feeder.ties]


def _representatives(scale: Tensor, ties: Tensor) -> Tensor:
    """Return the scale of each channel of the feeder: (in,) → (out of the feeder,)."""
    per_row = torch.ones(int(ties.max()) + 1, device=scale.device)
    per_row[ties] = scale
    return per_row


def _divide_rows(stored: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """Divide (rows, n) by (rows,) in its own dtype; return the quotient and what it was divided by, least squares."""
    before = stored.float()
    after = (before / by[:, None]).to(stored.dtype).float()
    norm = after.square().sum(dim=1)
    exact = (before * after).sum(dim=1) / norm
    usable = torch.isfinite(exact) & torch.isfinite(after).all(dim=1) & (after != 0).all(dim=1)
    return torch.where(usable[:, None], after, before).to(stored.dtype), torch.where(usable, exact, 1.0)


def _split(stacked: Tensor, group: Group) -> tuple[Tensor, ...]:
    return torch.split(stacked, [len(weight) for weight in group.weights])
